// logprob over logits that are already there: one read forward, one read and write backward. A row is taken in chunks
// that are widened to fp32 on the stack; chunks merge by log-mass and the chain rule of entropy.
#include <torch/csrc/stable/library.h>

#include "half.h"
#include "logit_row.h"

namespace {

constexpr int64_t kWidth = 4096;  // columns of a chunk: 16 KiB of fp32

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

CLONES void load_single(const float* x, float* z, int64_t n, float temperature) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = x[i] / temperature;
}

CLONES void load_bf16(const Bf16* x, float* z, int64_t n, float temperature) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = bf16_to_float(x[i].bits) / temperature;
}

CLONES void load_half(const Half* x, float* z, int64_t n, float temperature) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = half_to_float(x[i].bits) / temperature;
}

CLONES void store_single(const float* z, float* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = z[i] * factor;
}

CLONES void store_bf16(const float* z, Bf16* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i].bits = float_to_bf16(z[i] * factor);
}

CLONES void store_half(const float* z, Half* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i].bits = float_to_half(z[i] * factor);
}

void load(const float* x, float* z, int64_t n, float temperature) { load_single(x, z, n, temperature); }
void load(const Bf16* x, float* z, int64_t n, float temperature) { load_bf16(x, z, n, temperature); }
void load(const Half* x, float* z, int64_t n, float temperature) { load_half(x, z, n, temperature); }
void store(const float* z, float* x, int64_t n, float factor) { store_single(z, x, n, factor); }
void store(const float* z, Bf16* x, int64_t n, float factor) { store_bf16(z, x, n, factor); }
void store(const float* z, Half* x, int64_t n, float factor) { store_half(z, x, n, factor); }

double log_add(double a, double b) {
  const double top = std::max(a, b);
  return top + std::log1p(std::exp(std::min(a, b) - top));
}

void merge(Mass& whole, const Mass& part) {
  const double lse = log_add(whole.lse, part.lse);
  const double gap = -std::abs(whole.lse - part.lse), e = std::exp(gap);
  whole.entropy = std::exp(whole.lse - lse) * whole.entropy + std::exp(part.lse - lse) * part.entropy + std::log1p(e) -
                  e * gap / (1 + e);
  whole.rest = log_add(whole.rest, part.rest);
  whole.target = std::max(whole.target, part.target);
  whole.lse = lse;
}

template <typename T>
void forward_rows(const Tensor& logits, const int64_t* target, const float* temperature, int64_t ignore_index,
                  float* out) {
  const int64_t rows = logits.size(0), n = logits.size(1), stride = logits.stride(0);
  each_row(rows, n, [&](int64_t i) {
    if (target[i] == ignore_index) {
      for (int64_t k = 0; k < 5; ++k) out[k * rows + i] = 0;
      return;
    }
    const T* row = data<T>(logits) + i * stride;
    float z[kWidth];
    Mass whole;
    for (int64_t j = 0; j < n; j += kWidth) {
      const int64_t width = std::min(kWidth, n - j);
      load(row + j, z, width, temperature[i]);
      const Mass part = mass_row(z, width, target[i] - j);
      if (j == 0) whole = part;
      if (j > 0) merge(whole, part);
    }
    const double logprob = logprob_of(whole.rest - whole.target);
    out[i] = float(logprob);
    out[rows + i] = float(whole.lse);
    out[2 * rows + i] = float(whole.entropy);
    out[3 * rows + i] = float(-std::expm1(logprob));
    out[4 * rows + i] = float(whole.lse - out[rows + i]);
  });
}

template <typename T>
void backward_rows(const Tensor& logits, const int64_t* target, const float* temperature, int64_t ignore_index,
                   const float* c, Tensor& out) {
  const int64_t rows = logits.size(0), n = logits.size(1), stride = logits.stride(0), out_stride = out.stride(0);
  each_row(rows, n, [&](int64_t i) {
    const T* row = data<T>(logits) + i * stride;
    T* d = data<T>(out) + i * out_stride;
    if (target[i] == ignore_index) {
      std::fill(d, d + n, T{});
      return;
    }
    const float upstream = c[4 * rows + i];
    const Coefficients k{c[i], c[rows + i], 0, c[2 * rows + i], c[3 * rows + i], 0, 0, 0};
    Coefficients rest = k;
    rest.constant += upstream;
    float z[kWidth];
    for (int64_t j = 0; j < n; j += kWidth) {
      const int64_t width = std::min(kWidth, n - j), t = target[i] - j;
      load(row + j, z, width, temperature[i]);
      float at_target = 0;
      const bool here = t >= 0 && t < width;
      if (here) {  // the log-probability's share g (1 - p) is added exactly
        at_target = z[t];
        grad_plain(&at_target, 1, rest);
        at_target += c[5 * rows + i];
      }
      grad_plain(z, width, k);
      if (here) z[t] = at_target;
      store(z, d + j, width, 1.0f / temperature[i]);
    }
  });
}

// out [5, rows] (fp32): logprob, lse, entropy, 1 - p_target, and what lse lost by rounding; 0 where the target is
// ignore_index.
void logprob_rows(Tensor logits, Tensor target, Tensor temperature, int64_t ignore_index, Tensor out) {
  const auto* y = data<int64_t>(target);
  const auto* t = data<float>(temperature);
  auto* o = data<float>(out);
  using torch::headeronly::ScalarType;
  if (logits.scalar_type() == ScalarType::Float) forward_rows<float>(logits, y, t, ignore_index, o);
  if (logits.scalar_type() == ScalarType::BFloat16) forward_rows<Bf16>(logits, y, t, ignore_index, o);
  if (logits.scalar_type() == ScalarType::Half) forward_rows<Half>(logits, y, t, ignore_index, o);
}

// Gradient of the logits into out, which may be the logits themselves. coefficients [6, rows] (fp32): lse as a sum
// of two, constant, entropy, the log-probability's upstream gradient g (held as -g in constant), g (1 - p_target).
void logprob_rows_backward(Tensor logits, Tensor target, Tensor temperature, int64_t ignore_index, Tensor coefficients,
                           Tensor out) {
  const auto* y = data<int64_t>(target);
  const auto* t = data<float>(temperature);
  const auto* c = data<float>(coefficients);
  using torch::headeronly::ScalarType;
  if (logits.scalar_type() == ScalarType::Float) backward_rows<float>(logits, y, t, ignore_index, c, out);
  if (logits.scalar_type() == ScalarType::BFloat16) backward_rows<Bf16>(logits, y, t, ignore_index, c, out);
  if (logits.scalar_type() == ScalarType::Half) backward_rows<Half>(logits, y, t, ignore_index, c, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("logprob_rows", TORCH_BOX(&logprob_rows));
  m.impl("logprob_rows_backward", TORCH_BOX(&logprob_rows_backward));
}
