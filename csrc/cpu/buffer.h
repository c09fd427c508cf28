// Small things the bf16 kernels share: scratch memory and typed access to tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>

namespace {

template <typename T>
struct Buffer {  // page-aligned, not initialised
  explicit Buffer(int64_t n)
      : data(static_cast<T*>(std::aligned_alloc(4096, (size_t(n) * sizeof(T) / 4096 + 1) * 4096))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

// A thread's scratch memory for its calls one after the other: where every call allocates some, the system takes it
// back each time, and the fresh pages cost more than what is written to them.
template <typename T>
T* kept(int64_t n) {
  thread_local std::optional<Buffer<T>> held;
  thread_local int64_t size = 0;
  if (!held.has_value() || size < n) {
    size = 0;
    held.emplace(n);
    size = n;
  }
  return held->data;
}

template <typename T>
T* elements(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* elements(const std::optional<torch::stable::Tensor>& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

}  // namespace
