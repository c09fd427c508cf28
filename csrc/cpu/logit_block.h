// Leaf functions of sampling: what is done with one block of a row's logits. Include after switching off contraction.
#pragma once
#include "isa.h"

#ifdef X86_KERNELS
#define CHOOSES_BY_COMPRESSING
#include <immintrin.h>
#endif

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
constexpr float kLargestU = 87.3f;        // what lies further weighs nothing (vec_exp.h)
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
  if (temperature == 1.0f) {  // a division costs as much as all the rest
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      u[i] = top - z[i];
      w[i] = exp_weight(u[i]);
    }
    return;
  }
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

constexpr int kBounds = 4;

struct Bounds {
  float at[kBounds];
};
constexpr Bounds kFirstBounds{{1.0f, 3.0f, 8.0f, 20.0f}};  // of u: e^-20 is next to nothing even 2^22 times

struct Below {  // how many tokens lie below each bound, or roughly their mass
  double sum[kBounds] = {};
};

CLONES void block_count(const float* u, const Bounds& bounds, Below& below) {
  int32_t n[kBounds];
  for (int b = 0; b < kBounds; ++b) {
    int32_t sum = 0;
    const float bound = bounds.at[b];
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < kBlock; ++i) sum += u[i] < bound;
    n[b] = sum;
  }
  for (int b = 0; b < kBounds; ++b) below.sum[b] += n[b];
}

CLONES void block_weigh(const float* u, const float* w, const Bounds& bounds, Below& below) {
  float m[kBounds];
  for (int b = 0; b < kBounds; ++b) {
    float sum = 0.0f;
    const float bound = bounds.at[b];
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < kBlock; ++i) sum += u[i] < bound ? w[i] : 0.0f;
    m[b] = sum;
  }
  for (int b = 0; b < kBounds; ++b) below.sum[b] += m[b];
}

// The exact number and mass of the tokens below a bound, added to count and mass.
CLONES void block_before(const float* u, const float* w, float bound, int64_t& count, int64_t& mass) {
  int64_t c = 0, m = 0;
#pragma omp simd reduction(+ : c, m)
  for (int64_t i = 0; i < kBlock; ++i) {
    c += u[i] < bound;
    m += fixed_point(u[i] < bound ? w[i] : 0.0f);
  }
  count += c, mass += m;
}

struct Chosen {  // where chosen tokens go; up to 15 places past the last are written to
  float *u, *w;  // null: not wanted
  int32_t* index;
};

CLONES int64_t block_choose_plain(const float* u, const float* w, float low, float high, int32_t first,
                                  const Chosen& to) {
  int64_t n = 0;
  for (int32_t i = 0; i < int32_t(kBlock); ++i) {
    to.index[n] = first + i;
    if (to.u) to.u[n] = u[i], to.w[n] = w[i];
    n += u[i] >= low && u[i] <= high;
  }
  return n;
}

#ifdef CHOOSES_BY_COMPRESSING
__attribute__((target("avx512f"))) int64_t block_choose_avx512(const float* u, const float* w, float low, float high,
                                                               int32_t first, const Chosen& to) {
  int64_t n = 0;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const __m512 x = _mm512_loadu_ps(u + i);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_GE_OQ), x,
                                                     _mm512_set1_ps(high), _CMP_LE_OQ);
    if (inside == 0) continue;
    // compressed in a register: straight to memory it is slow
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(first + int32_t(i)));
    _mm512_storeu_si512(to.index + n, _mm512_maskz_compress_epi32(inside, index));
    if (to.u) {
      _mm512_storeu_ps(to.u + n, _mm512_maskz_compress_ps(inside, x));
      _mm512_storeu_ps(to.w + n, _mm512_maskz_compress_ps(inside, _mm512_loadu_ps(w + i)));
    }
    n += __builtin_popcount(inside);
  }
  return n;
}
#endif

// Writes the tokens i with low <= u[i] <= high, in order, their index being first + i; returns how many.
inline int64_t block_choose(const float* u, const float* w, float low, float high, int32_t first, const Chosen& to) {
#ifdef CHOOSES_BY_COMPRESSING
  static const bool wide = __builtin_cpu_supports("avx512f");
  if (wide) return block_choose_avx512(u, w, low, high, first, to);
#endif
  return block_choose_plain(u, w, low, high, first, to);
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
