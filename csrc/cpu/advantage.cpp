// Generalised advantage estimation over flat sequences: one backward scan a sequence, sequences in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

namespace {

template <typename T>
void scan(const T* rewards, const T* values, T next_value, double gamma, double lam, int64_t n, T* advantages) {
  T running = 0;
  for (int64_t t = n - 1; t >= 0; --t) {
    const T delta = rewards[t] + T(gamma) * next_value - values[t];
    running = delta + T(gamma * lam) * running;
    advantages[t] = running;
    next_value = values[t];
  }
}

Tensor gae_rows(Tensor rewards, Tensor values, Tensor starts, Tensor last_value, double gamma, double lam) {
  Tensor out = torch::stable::empty_like(rewards);
  const auto* s = static_cast<const int64_t*>(starts.data_ptr());
  torch::stable::parallel_for(0, starts.size(0) - 1, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b) {
      scan(static_cast<const float*>(rewards.data_ptr()) + s[b], static_cast<const float*>(values.data_ptr()) + s[b],
           static_cast<const float*>(last_value.data_ptr())[b], gamma, lam, s[b + 1] - s[b],
           static_cast<float*>(out.data_ptr()) + s[b]);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("gae_rows", TORCH_BOX(&gae_rows)); }
