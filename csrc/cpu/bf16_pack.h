// Packing of row-major bf16 matrices into the operands of bf16_tile.h; what lies outside the matrix becomes 0, so that
// tiles need no edges. For use where there is a tile unit only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bf16_tile.h"
#include "head_lanes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace bf16 {
namespace {  // not merged with another file's: this file's instruction set is its own

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// A operand: up to 32 rows of x (row stride ld, k columns) as [k/32][32][32].
inline void pack_rows(const uint16_t* x, int64_t ld, int64_t rows, int64_t k, uint16_t* out) {
  const int64_t steps = tiles(k);
  rows = std::min(rows, kTile);
  if (rows < kTile || k % kTile != 0) std::memset(out, 0, size_t(2 * steps * kTile * kTile));
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* row = x + r * ld;
    uint16_t* to = out + r * kTile;
    for (int64_t s = 0; s < k / kTile; ++s) std::memcpy(to + s * kTile * kTile, row + s * kTile, 2 * kTile);
    const int64_t rest = k % kTile;
    if (rest != 0) std::memcpy(to + (steps - 1) * kTile * kTile, row + k - rest, size_t(2 * rest));
  }
}

// B operand from a matrix whose rows are the columns of B (x^T): up to 32 rows of x as [k/2][32] pairs along k, padded
// to whole steps of 32 k.
inline void pack_columns(const uint16_t* x, int64_t ld, int64_t rows, int64_t k, uint32_t* out) {
  for (int64_t at = 0; at < k; at += kTile) {
    const auto inside = __mmask32(k - at >= kTile ? 0xffffffffu : (1u << (k - at)) - 1);
    for (int64_t half = 0; half < kTile; half += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = _mm512_setzero_si512();
        if (half + i < rows) r[i] = _mm512_maskz_loadu_epi16(inside, x + (half + i) * ld + at);
      }
      lanes::transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (at / 2 + i) * kTile + half, r[i]);
    }
  }
}

// A operand from fp32, rounded to bf16: up to 32 rows of x, k columns.
inline void pack_float_rows(const float* x, int64_t ld, int64_t rows, int64_t k, uint16_t* out) {
  for (int64_t at = 0; at < k; at += kTile, out += kTile * kTile) {
    const int64_t n = std::min(kTile, k - at);
    const auto low = __mmask16(n >= 16 ? 0xffff : (1 << n) - 1), high = __mmask16(n <= 16 ? 0 : (1 << (n - 16)) - 1);
    for (int64_t i = 0; i < kTile; ++i) {
      __m512 first = _mm512_setzero_ps(), second = first;
      if (i < rows) {
        first = _mm512_maskz_loadu_ps(low, x + i * ld + at);
        second = _mm512_maskz_loadu_ps(high, x + i * ld + at + 16);
      }
      _mm512_storeu_si512(out + i * kTile, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
  }
}

// A operand of x^T from fp32, rounded to bf16: 32 columns of x (`columns` of them valid) become the rows, k rows of x
// the inner dimension.
inline void pack_float_columns(const float* x, int64_t ld, int64_t k, int64_t columns, uint16_t* out) {
  for (int64_t at = 0; at < k; at += kTile, out += kTile * kTile) {
    for (int64_t half = 0; half < kTile; half += 16) {
      const int64_t n = std::clamp<int64_t>(columns - half, 0, 16);
      const auto inside = __mmask16(n == 16 ? 0xffff : (1 << n) - 1);
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = at + 2 * i;
        __m512 even = _mm512_setzero_ps(), odd = even;
        if (row < k) even = _mm512_maskz_loadu_ps(inside, x + row * ld + half);
        if (row + 1 < k) odd = _mm512_maskz_loadu_ps(inside, x + (row + 1) * ld + half);
        pairs[i] = lanes::bf16_pairs(even, odd);
      }
      lanes::transpose(pairs);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (half + i) * kTile, pairs[i]);
    }
  }
}

// B operand from a matrix whose rows are its k: n rows of x, `columns` wide, as [columns/32][k/2][32] with pairs of
// rows; n is padded to `pairs` pairs.
inline void pack_row_pairs(const uint16_t* x, int64_t ld, int64_t n, int64_t columns, int64_t pairs, uint32_t* out) {
  const int64_t whole = columns / kTile;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t *even = x + 2 * p * ld, *odd = even + ld;
    const bool has_even = 2 * p < n, has_odd = 2 * p + 1 < n;
    for (int64_t g = 0; g < tiles(columns); ++g) {
      uint32_t* to = out + (g * pairs + p) * kTile;
      if (has_odd && g < whole) {
        const uint16_t *lo = even + g * kTile, *hi = odd + g * kTile;
#pragma omp simd
        for (int64_t i = 0; i < kTile; ++i) to[i] = uint32_t(lo[i]) | uint32_t(hi[i]) << 16;
        continue;
      }
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t j = g * kTile + i;
        const uint32_t lo = has_even && j < columns ? even[j] : 0u, hi = has_odd && j < columns ? odd[j] : 0u;
        to[i] = lo | hi << 16;
      }
    }
  }
}

}  // namespace
}  // namespace bf16

#pragma GCC pop_options
