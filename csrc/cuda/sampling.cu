// sample on CUDA: binding of sample_rows.cuh.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/sample_rows.cuh"
#include "cuda/torch_call.h"

namespace {

using torch::headeronly::ScalarType;
using torch_call::data;
using torch_call::OnDeviceOf;
using torch_call::Tensor;

std::tuple<Tensor, Tensor> sample_rows(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p_cut,
                                       Tensor seed, Tensor stream, Tensor sample_index, Tensor position,
                                       Tensor greedy) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  if (rows > std::numeric_limits<int>::max() / cuda_rows::kMostBlocks) {
    throw std::runtime_error("sample_rows takes fewer than 2^28 rows, got " + std::to_string(rows));
  }
  const OnDeviceOf device(logits);
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const cuda_rows::SampleCall call{data<float>(temperature),    data<float>(min_p_cut),  data<int64_t>(top_k),
                                   data<double>(top_p),         data<uint64_t>(seed),    data<uint64_t>(stream),
                                   data<int64_t>(sample_index), data<int64_t>(position), data<bool>(greedy),
                                   data<int64_t>(token),        data<float>(logprob)};
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, logits.get_device_index()));
  const auto run = [&](auto t) {
    using T = decltype(t);
    const bool clusters = major == 9;  // what sm_90a code runs on
    cuda_rows::sample_rows(call, data<const T>(logits), logits.stride(0), rows, n, clusters, device.stream);
  };
  if (logits.scalar_type() == ScalarType::Float) run(float());
  if (logits.scalar_type() == ScalarType::BFloat16) run(__nv_bfloat16());
  if (logits.scalar_type() == ScalarType::Half) run(__half());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {token, logprob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("sample_rows", TORCH_BOX(&sample_rows)); }
