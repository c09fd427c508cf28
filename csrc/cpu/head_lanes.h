// Vector pieces of the fused head: what is done with 16 tokens' logits at a time, one token a lane. AVX-512 only; the
// tile kernels that make the logits need AVX512-BF16 or AMX anyway.
#pragma once
#include <immintrin.h>

#include <cstdint>

// GCC 12's own headers start "undefined" registers from themselves, and its warnings say so at every use
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#define LANES static inline __attribute__((always_inline, unused))

namespace lanes {

constexpr float kLog2E = 1.44269504088896341f, kLog2ELow = 1.92596303e-8f;

LANES __m512 constant(float x) { return _mm512_set1_ps(x); }

// 2^f 2^n for |f| <= 1/2: a minimax polynomial (relative error 2e-9 before rounding).
LANES __m512 power(__m512 f, __m512 n) {
  __m512 p = constant(1.534581216e-4f);
  p = _mm512_fmadd_ps(p, f, constant(1.339993090e-3f));
  p = _mm512_fmadd_ps(p, f, constant(9.618489072e-3f));
  p = _mm512_fmadd_ps(p, f, constant(5.550328642e-2f));
  p = _mm512_fmadd_ps(p, f, constant(2.402264625e-1f));
  p = _mm512_fmadd_ps(p, f, constant(6.931471825e-1f));
  p = _mm512_fmadd_ps(p, f, constant(1.0f));
  return _mm512_scalef_ps(p, n);
}

LANES __m512 nearest(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// 2^x; -126 below that, so that no denormal is met: what it stands for is nothing beside any sum it joins. NaN passes
// (the second operand of max is returned when one is NaN).
LANES __m512 exp2(__m512 x) {
  x = _mm512_max_ps(constant(-126.0f), x);
  const __m512 n = nearest(x);
  return power(_mm512_sub_ps(x, n), n);
}

// e^x, for x in [-87, 88], clamped below.
LANES __m512 exp_bounded(__m512 x) {
  x = _mm512_max_ps(constant(-87.0f), x);
  const __m512 n = nearest(_mm512_mul_ps(x, constant(kLog2E)));
  return power(_mm512_fmadd_ps(x, constant(kLog2ELow), _mm512_fmsub_ps(x, constant(kLog2E), n)), n);
}

// e^x, for x in [-87, 88] (clamped).
LANES __m512 exp(__m512 x) { return exp_bounded(_mm512_min_ps(constant(88.0f), x)); }

// e^x - 1 - x for |x| < 1 by its series (truncation below 1e-7 relative).
LANES __m512 expm1_minus_x(__m512 x) {
  __m512 p = constant(1.0f / 39916800);
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 3628800));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 362880));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 40320));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 5040));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 720));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 120));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 24));
  p = _mm512_fmadd_ps(p, x, constant(1.0f / 6));
  p = _mm512_fmadd_ps(p, x, constant(0.5f));
  return _mm512_mul_ps(_mm512_mul_ps(x, x), p);
}

// Two fp32 a lane as a pair of bf16 in one word, the first in the lower half.
LANES __m512i bf16_pairs(__m512 first, __m512 second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// sum + the two bf16 of each word
LANES __m512 add_pairs(__m512 sum, __m512i pairs) {
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(0x3f803f80));
}

// Adds 16 fp32 to 16 doubles.
LANES void add_to(double* sums, __m512 x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

// 16 x 16 words, transposed.
LANES void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace lanes

#pragma GCC pop_options
