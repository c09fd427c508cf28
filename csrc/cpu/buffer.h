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

template <typename T>
T* elements(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* elements(const std::optional<torch::stable::Tensor>& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

}  // namespace
