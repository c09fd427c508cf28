// What the row passes share: the mass, entropy and target of one row of fp32 logits, and the logit gradient.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "logit_math.h"

namespace {

using namespace logit;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;  // columns summed in fp32 before a double takes over

CLONES float clamp_and_max(float* z, int64_t n) {
  float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) {
    const float v = at_least(z[i], kLowest);
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

CLONES MassSums mass_chunk(const float* z, int64_t n, float m) {
  float e_sum = 0, u_sum = 0;
#pragma omp simd reduction(+ : e_sum, u_sum)
  for (int64_t i = 0; i < n; ++i) {
    add_mass(z[i], m, e_sum, u_sum);
  }
  return {e_sum, u_sum};
}

CLONES void grad_plain(float* z, int64_t n, Coefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = gradient(z[i], c);
}

inline Mass finish_mass(const float* z, int64_t n, int64_t target, float m, int32_t pivot, double r, double u) {
  const bool here = target >= 0 && target < n;
  return logit::finish_mass(here, target == pivot, here ? z[target] : 0, m, r, u);
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
