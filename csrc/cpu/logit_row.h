// What the row passes share: the mass, entropy and target of one row of fp32 logits, and the logit gradient.
//
// The top token is the pivot: it is left out of every sum, so nothing cancels when it holds the mass.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "vec.h"

namespace {

using torch::stable::Tensor;

constexpr float kLowest = -1e30f;  // stands for -inf, so that no difference of two logits is NaN
constexpr int64_t kChunk = 1024;   // columns summed in fp32 before a double takes over
constexpr double kMasked = kLowest;

CLONES float clamp_and_max(float* z, int64_t n) {
  float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) {
    const float v = z[i] < kLowest ? kLowest : z[i];
    z[i] = v;
    m = v > m ? v : m;
  }
  return m;
}

CLONES int32_t first_equal(const float* z, int64_t n, float value) {
  int32_t found = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : found)
  for (int32_t i = 0; i < static_cast<int32_t>(n); ++i) {
    const int32_t here = z[i] == value ? i : std::numeric_limits<int32_t>::max();
    found = here < found ? here : found;
  }
  return found;
}

struct MassSums {
  float e, u;  // sums of e^(z-m) and e^(z-m) (z-m)
};

CLONES MassSums mass_chunk(const float* z, int64_t n, float m) {
  float e_sum = 0, u_sum = 0;
#pragma omp simd reduction(+ : e_sum, u_sum)
  for (int64_t i = 0; i < n; ++i) {
    float x = z[i] - m;
    x = x < -200.0f ? -200.0f : x;
    const float e = vec::exp(x);
    e_sum += e;
    u_sum += e * x;
  }
  return {e_sum, u_sum};
}

// Gradients of a row's fields with respect to z, the upstream gradients folded into coefficients (see head_grad).
struct Coefficients {
  float lse, lse_low;  // the logsumexp as a sum of two: fp32 alone would err by 1e-6 at 20
  float ratio, constant, entropy, kl, rkl, js;
};

CLONES void grad_plain(float* z, int64_t n, Coefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float log_p = (z[i] - c.lse) - c.lse_low;
    log_p = log_p < -200.0f ? -200.0f : log_p;
    z[i] = vec::exp(log_p) * (c.constant + c.entropy * log_p);
  }
}

struct Mass {
  double lse = kMasked, rest = kMasked;  // log-mass of the block, with and without the target
  double target = -std::numeric_limits<double>::infinity();
  double entropy = 0;
};

inline void set_nan(Mass& mass) { mass.lse = mass.rest = mass.entropy = std::numeric_limits<double>::quiet_NaN(); }

inline Mass finish_mass(const float* z, int64_t n, int64_t target, float m, int32_t pivot, double r, double u) {
  Mass out;
  const double s = 1 + r;
  out.lse = m + std::log1p(r);
  out.rest = out.lse;
  out.entropy = std::log1p(r) - u / s;
  if (target >= 0 && target < n) {
    out.target = z[target];
    if (target == pivot) {
      out.rest = r == 0 ? kMasked : m + std::log(r);  // a NaN stays one
    } else {  // s >= 1 + the target's share: the subtraction loses at most one bit
      out.rest = m + std::log(s - std::exp(std::max(double(z[target]) - m, -200.0)));
    }
  }
  return out;
}

inline Mass mass_row(float* z, int64_t n, int64_t target) {
  Mass out;
  const float m = clamp_and_max(z, n);
  const int32_t pivot = first_equal(z, n, m);
  if (pivot >= n) {
    set_nan(out);
    return out;
  }
  if (m == kLowest) {
    if (target >= 0 && target < n) out.target = z[target];
    return out;
  }
  const float kept = z[pivot];
  z[pivot] = kLowest;
  double r = 0, u = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    const MassSums part = mass_chunk(z + i, std::min(kChunk, n - i), m);
    r += part.e, u += part.u;
  }
  z[pivot] = kept;
  return finish_mass(z, n, target, m, pivot, r, u);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

template <typename F>
void each_row(int64_t rows, int64_t columns, const F& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) body(i);
  });
}

}  // namespace
