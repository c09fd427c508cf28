// The row passes of the head on CUDA: bindings of head_stats.cuh and head_pull.cuh. `scratch` of head_grad is not used:
// what it would hold stays in registers.
#include <torch/csrc/stable/library.h>

#include "cuda/head_pull.cuh"
#include "cuda/head_stats.cuh"
#include "cuda/torch_call.h"

namespace {

using torch_call::data;
using torch_call::OnDeviceOf;
using torch_call::Tensor;

cuda_rows::Shaping shaping_of(const std::optional<Tensor>& bias, const Tensor& temperature, double softcap,
                              double scale, bool raw) {
  return {data<float>(bias), data<float>(temperature), float(scale), float(softcap), raw};
}

void head_stats(Tensor z, std::optional<Tensor> zr, Tensor target, std::optional<Tensor> bias, Tensor temperature,
                double softcap, double scale, bool raw, bool kl, bool rkl, Tensor state) {
  torch_call::check_extent(z);
  const OnDeviceOf device(z);
  cuda_rows::head_stats(data<float>(z), data<float>(zr), data<int64_t>(target),
                        shaping_of(bias, temperature, softcap, scale, raw), kl, rkl, data<double>(state), z.size(0),
                        z.size(1), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void head_exp(Tensor z, Tensor target, std::optional<Tensor> bias, Tensor temperature, double softcap, double scale,
              bool raw, bool first, Tensor shift, Tensor mass, Tensor factor, Tensor target_z) {
  torch_call::check_extent(z);
  const OnDeviceOf device(z);
  cuda_rows::head_exp(data<float>(z), data<int64_t>(target), shaping_of(bias, temperature, softcap, scale, raw), first,
                      data<float>(shift), data<double>(mass), data<float>(factor), data<double>(target_z), z.size(0),
                      z.size(1), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void head_js(Tensor z, Tensor zr, std::optional<Tensor> bias, Tensor temperature, double softcap, double scale,
             bool raw, Tensor lse, Tensor ratio, Tensor sums) {
  torch_call::check_extent(z);
  const OnDeviceOf device(z);
  cuda_rows::head_js(data<float>(z), data<float>(zr), shaping_of(bias, temperature, softcap, scale, raw),
                     data<float>(lse), data<float>(ratio), data<double>(sums), z.size(0), z.size(1), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void head_grad(Tensor z, std::optional<Tensor> zr, Tensor target, std::optional<Tensor> bias, Tensor temperature,
               double softcap, double scale, bool raw, Tensor coefficients, std::optional<Tensor> scratch) {
  torch_call::check_extent(z);
  const OnDeviceOf device(z);
  cuda_rows::head_grad(data<float>(z), data<float>(zr), data<int64_t>(target),
                       shaping_of(bias, temperature, softcap, scale, raw), data<float>(coefficients), z.size(0),
                       z.size(1), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) {
  m.impl("head_stats", TORCH_BOX(&head_stats));
  m.impl("head_exp", TORCH_BOX(&head_exp));
  m.impl("head_js", TORCH_BOX(&head_js));
  m.impl("head_grad", TORCH_BOX(&head_grad));
}
