// What a CUDA op's binding needs of PyTorch: data pointers, the tensor's device made current, its current stream.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

namespace torch_call {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// Makes the tensor's device the current one for its lifetime; `stream` is PyTorch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &found));
    stream = static_cast<cudaStream_t>(found);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The kernels count a row's columns in 32 bits, and a grid holds 2^31 - 1 rows.
inline void check_extent(const Tensor& t) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - (1 << 20);
  if (t.size(0) > kMost || t.size(1) > kMost) {
    throw std::runtime_error("logits of " + std::to_string(t.size(0)) + " x " + std::to_string(t.size(1)) +
                             "; the CUDA row passes take fewer than 2^31 rows and columns");
  }
}

}  // namespace torch_call
