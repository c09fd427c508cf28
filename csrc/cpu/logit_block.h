// Leaf functions of sampling: what is done with one block of a row's logits. Include after switching off contraction.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

#include "clones.h"
#include "half.h"
#include "vec_exp.h"

namespace {

constexpr int64_t kBlock = 256;  // tokens handled at a time: u, weights and logits of a block stay in L1
constexpr int64_t kLanes = 16;   // partial sums of the logprob, in a fixed order whatever the vector width
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kOne = 1099511627776.0;  // 2^40: a weight of 1

CLONES void widen_bf16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(in[i]);
}

CLONES void widen_half(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}

// The largest of z[0..n), NaN if there is one.
CLONES float block_max(const float* z, int64_t n) {
  float top = -kInf;
  int32_t nans = 0;
#pragma omp simd reduction(max : top) reduction(+ : nans)
  for (int64_t i = 0; i < n; ++i) {
    top = z[i] > top ? z[i] : top;
    nans += z[i] != z[i];
  }
  return nans ? std::numeric_limits<float>::quiet_NaN() : top;
}

CLONES void block_weights(const float* z, float top, float temperature, float* u, float* w) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    u[i] = (top - z[i]) / temperature;
    w[i] = exp_weight(u[i]);
  }
}

// A weight in [0, 1] as a multiple of 2^-40, half to even: adding 2^52 leaves the integer in the low mantissa bits.
__attribute__((always_inline)) inline int64_t fixed_point(float w) {
  return std::bit_cast<int64_t>(double(w) * kOne + 0x1p52) - std::bit_cast<int64_t>(0x1p52);
}

CLONES int64_t block_mass(const float* w) {
  int64_t mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t i = 0; i < kBlock; ++i) mass += fixed_point(w[i]);
  return mass;
}

CLONES void add_lanes(const float* w, double* lanes) {
  for (int64_t i = 0; i < kBlock; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += double(w[i + l]);
  }
}

// Zeroes the weights outside the limit: kept are keys below `key`, and `key` itself at the first `ties` indices.
CLONES void block_filter(const float* u, uint32_t key, int64_t ties, float* w) {
#pragma omp simd
  for (int32_t i = 0; i < int32_t(kBlock); ++i) {
    const uint32_t k = std::bit_cast<uint32_t>(u[i]);
    w[i] = k < key || (k == key && i < int32_t(ties)) ? w[i] : 0.0f;
  }
}

}  // namespace
