// logprob(logits) on CUDA: bindings of logprob_rows.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/logprob_rows.cuh"
#include "cuda/torch_call.h"

namespace {

using torch::headeronly::ScalarType;
using torch_call::data;
using torch_call::OnDeviceOf;
using torch_call::Tensor;

template <typename T>
void forward(const Tensor& logits, const Tensor& target, const Tensor& temperature, int64_t ignore_index, Tensor& out,
             cudaStream_t stream) {
  cuda_rows::logprob_rows(data<const T>(logits), logits.stride(0), data<int64_t>(target), data<float>(temperature),
                          ignore_index, data<float>(out), logits.size(0), logits.size(1), stream);
}

template <typename T>
void backward(const Tensor& logits, const Tensor& target, const Tensor& temperature, int64_t ignore_index,
              const Tensor& coefficients, Tensor& out, cudaStream_t stream) {
  cuda_rows::logprob_rows_backward(data<const T>(logits), logits.stride(0), data<int64_t>(target),
                                   data<float>(temperature), ignore_index, data<float>(coefficients), data<T>(out),
                                   out.stride(0), logits.size(0), logits.size(1), stream);
}

void logprob_rows(Tensor logits, Tensor target, Tensor temperature, int64_t ignore_index, Tensor out) {
  torch_call::check_extent(logits);
  const OnDeviceOf device(logits);
  const auto run = [&](auto launch) { launch(logits, target, temperature, ignore_index, out, device.stream); };
  if (logits.scalar_type() == ScalarType::Float) run(forward<float>);
  if (logits.scalar_type() == ScalarType::BFloat16) run(forward<__nv_bfloat16>);
  if (logits.scalar_type() == ScalarType::Half) run(forward<__half>);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void logprob_rows_backward(Tensor logits, Tensor target, Tensor temperature, int64_t ignore_index, Tensor coefficients,
                           Tensor out) {
  torch_call::check_extent(logits);
  const OnDeviceOf device(logits);
  const auto run = [&](auto launch) {
    launch(logits, target, temperature, ignore_index, coefficients, out, device.stream);
  };
  if (logits.scalar_type() == ScalarType::Float) run(backward<float>);
  if (logits.scalar_type() == ScalarType::BFloat16) run(backward<__nv_bfloat16>);
  if (logits.scalar_type() == ScalarType::Half) run(backward<__half>);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) {
  m.impl("logprob_rows", TORCH_BOX(&logprob_rows));
  m.impl("logprob_rows_backward", TORCH_BOX(&logprob_rows_backward));
}
