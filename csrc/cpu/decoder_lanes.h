// Pieces of a decoder whose rows are the lanes of vectors. Activations lie as words, a word being two neighbouring
// features of a row as bf16: [features / 2][16 rows of each vector], chunk of rows after chunk. A product of W reads W
// where it is, each pair of its elements against all rows of a chunk, and what follows it (norms, gates, residuals)
// goes feature by feature without looking at another lane: a row's bits depend on nothing beside it. Roundings to bf16
// are those that the modules of transformers make.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "head_lanes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace decoder {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMostVectors = 4;
template <int kV>
constexpr int kGroup = 24 / kV;   // rows of W whose sums are in registers
constexpr int64_t kColumns = 24;  // of a product taken at a time: whole groups, whatever kV

// Rows [lo, lo + rows) as so many vectors; `before`: lanes of the chunks before it; `apart`: lanes of other sets.
struct Chunk {
  int64_t lo, rows, vectors, before, apart;
  int64_t width() const { return vectors * kLanes; }
};

struct RowSet {
  int64_t rows = 0, lanes = 0;
  std::vector<Chunk> chunks;  // nearly equal, each as few vectors as its rows fill

  explicit RowSet(int64_t count, int64_t apart = 0) : rows(count) {
    const int64_t vectors = (count + kLanes - 1) / kLanes, n = (vectors + kMostVectors - 1) / kMostVectors;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t lo = vectors * c / n, hi = vectors * (c + 1) / n;
      chunks.push_back({lo * kLanes, std::min(hi * kLanes, count) - lo * kLanes, hi - lo, lo * kLanes, apart});
    }
    lanes = vectors * kLanes;
  }

  // The chunk of a vector of 16 rows.
  const Chunk& chunk_of(int64_t vector) const {
    size_t c = 0;
    while (vector * kLanes >= chunks[c].before + chunks[c].width()) ++c;
    return chunks[c];
  }
};

// f(std::integral_constant) for a chunk's vectors.
template <typename F>
void with_vectors(int64_t vectors, const F& f) {
  if (vectors == 1) f(std::integral_constant<int, 1>());
  if (vectors == 2) f(std::integral_constant<int, 2>());
  if (vectors == 3) f(std::integral_constant<int, 3>());
  if (vectors == 4) f(std::integral_constant<int, 4>());
}

// A weight [rows, 2 * words] of bf16, `stride` bytes from row to row.
struct Weight {
  const char* data = nullptr;
  int64_t rows = 0, words = 0, stride = 0;
  const char* row(int64_t i) const { return data + std::min(i, rows - 1) * stride; }
};

// sums[j][kV * 16] = row j of w, times the words of x. One chain a sum; `next`: rows to call for meanwhile.
template <int kR, int kV>
void dots(const char* w, int64_t stride, const uint32_t* x, int64_t words, const char* next, float* sums) {
  const char* rows[(kR + 2) / 3];  // every third: the others are one and two strides away
  __m512 sum[kR][kV];
#pragma GCC unroll 24
  for (int j = 0; j < kR; ++j) {
    if (j % 3 == 0) rows[j / 3] = w + j * stride;
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[j][v] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t q) __attribute__((always_inline)) {
    __m512i lanes[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) lanes[v] = _mm512_loadu_si512(x + (q * kV + v) * kLanes);
#pragma GCC unroll 24
    for (int j = 0; j < kR; ++j) {
      int32_t pair;
      std::memcpy(&pair, rows[j / 3] + j % 3 * stride + 4 * q, 4);
      const __m512i column = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sum[j][v] = _mm512_dpbf16_ps(sum[j][v], (__m512bh)lanes[v], (__m512bh)column);
    }
  };
  const auto move = [&](int64_t count) __attribute__((always_inline)) {
    x += count * kV * kLanes;
    for (const char*& row : rows) {
      row += 4 * count;
      asm("" : "+r"(row));  // or else the compiler keeps a pointer for each row
    }
  };
  for (; words >= 16; words -= 16, next += 64) {
    const char* ahead = next;
#pragma GCC unroll 24
    for (int j = 0; j < kR; ++j, ahead += stride) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 1
    for (int64_t q = 0; q < 16; q += 4, move(4)) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) step(i);
    }
  }
  for (; words > 0; --words, move(1)) step(0);
#pragma GCC unroll 24
  for (int j = 0; j < kR; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) _mm512_storeu_ps(sums + (j * kV + v) * kLanes, sum[j][v]);
  }
}

// Columns [first, first + count) of x w^T: sums [count][kV * 16].
template <int kV>
void multiply(const Weight& w, int64_t first, int64_t count, const uint32_t* x, float* sums) {
  int64_t at = 0;
  const auto some = [&](auto size) __attribute__((always_inline)) {
    constexpr int kR = decltype(size)::value;
    for (; at + kR <= count; at += kR) {
      dots<kR, kV>(w.row(first + at), w.stride, x, w.words, w.row(first + at + kR), sums + at * kV * kLanes);
    }
  };
  some(std::integral_constant<int, kGroup<kV>>());
  if constexpr (kGroup<kV> > 8) some(std::integral_constant<int, 8>());
  some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}

LANES __m512 low_of(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
LANES __m512 high_of(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
}
LANES __m512 widen(uint16_t bits) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(bits) << 16))); }
LANES __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
LANES __m512 rounded(__m512 x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }

// x / rms(x), rounded, times the weight; or unrounded times (1 + weight).
struct Norm {
  float eps = 0, offset = 0;
  bool round_first = true;
};

LANES __m512 norm_scale(__m512 squares, int64_t width, const Norm& norm) {
  const __m512 mean = _mm512_div_ps(squares, lanes::constant(float(width)));
  return _mm512_div_ps(lanes::constant(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, lanes::constant(norm.eps))));
}

LANES __m512 normed(__m512 x, __m512 scale, uint16_t weight, const Norm& norm) {
  __m512 y = _mm512_mul_ps(x, scale);
  if (norm.round_first) y = rounded(y);
  return _mm512_mul_ps(y, _mm512_add_ps(widen(weight), lanes::constant(norm.offset)));
}

// Words of 16 rows, one word of depth every `step`; read(k) gives word k.
template <typename Read>
void norm_words(const Read& read, const uint16_t* weight, int64_t words, const Norm& norm, uint32_t* to, int64_t step) {
  __m512 squares[2] = {};
  for (int64_t k = 0; k < words; ++k) {
    const __m512i x = read(k);
    squares[0] = _mm512_fmadd_ps(low_of(x), low_of(x), squares[0]);
    squares[1] = _mm512_fmadd_ps(high_of(x), high_of(x), squares[1]);
  }
  const __m512 scale = norm_scale(_mm512_add_ps(squares[0], squares[1]), 2 * words, norm);
  for (int64_t k = 0; k < words; ++k) {
    const __m512i x = read(k);
    const __m512 a = normed(low_of(x), scale, weight[2 * k], norm),
                 b = normed(high_of(x), scale, weight[2 * k + 1], norm);
    _mm512_storeu_si512(to + k * step, lanes::bf16_pairs(a, b));
  }
}

// The same for the columns of a product, of one head: sums [width][kV * 16], bf16 already, in place.
template <int kV>
void norm_sums(const uint16_t* weight, int64_t width, const Norm& norm, float* sums) {
  for (int64_t v = 0; v < kV; ++v) {
    __m512 squares[2] = {};
    for (int64_t j = 0; j < width; ++j) {
      const __m512 x = _mm512_loadu_ps(sums + (j * kV + v) * kLanes);
      squares[j % 2] = _mm512_fmadd_ps(x, x, squares[j % 2]);
    }
    const __m512 scale = norm_scale(_mm512_add_ps(squares[0], squares[1]), width, norm);
    for (int64_t j = 0; j < width; ++j) {
      float* at = sums + (j * kV + v) * kLanes;
      _mm512_storeu_ps(at, normed(_mm512_loadu_ps(at), scale, weight[j], norm));
    }
  }
}

template <int kV>
LANES __m512i pair_of(const float* sums, int64_t j, int64_t v) {
  const float* at = sums + (j * kV + v) * kLanes;
  return lanes::bf16_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + kV * kLanes));
}

// words [count / 2][kV * 16] = the sums, times `factor`.
template <int kV>
void store_words(const float* sums, int64_t count, float factor, uint32_t* words) {
  const __m512 f = lanes::constant(factor);
  for (int64_t i = 0; i < count / 2 * kV; ++i) {
    const float* at = sums + (i / kV * 2 * kV + i % kV) * kLanes;
    const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(at), f), b = _mm512_mul_ps(_mm512_loadu_ps(at + kV * kLanes), f);
    _mm512_storeu_si512(words + i * kLanes, lanes::bf16_pairs(a, b));
  }
}

// words += the sums, both rounded.
template <int kV>
void add_words(const float* sums, int64_t count, uint32_t* words) {
  for (int64_t j = 0; j < count / 2; ++j) {
    for (int64_t v = 0; v < kV; ++v) {
      uint32_t* at = words + (j * kV + v) * kLanes;
      const __m512i y = pair_of<kV>(sums, 2 * j, v), x = _mm512_loadu_si512(at);
      const __m512 a = _mm512_add_ps(low_of(x), low_of(y)), b = _mm512_add_ps(high_of(x), high_of(y));
      _mm512_storeu_si512(at, lanes::bf16_pairs(a, b));
    }
  }
}

LANES __m512 silu(__m512 x) {
  const __m512 e = lanes::exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(e, lanes::constant(1.0f)));
}

// words = silu(gate) * up
template <int kV>
void gate_words(const float* gate, const float* up, int64_t count, uint32_t* words) {
  for (int64_t j = 0; j < count / 2; ++j) {
    for (int64_t v = 0; v < kV; ++v) {
      const __m512i g = pair_of<kV>(gate, 2 * j, v), u = pair_of<kV>(up, 2 * j, v);
      const __m512 a = _mm512_mul_ps(rounded(silu(low_of(g))), low_of(u));
      const __m512 b = _mm512_mul_ps(rounded(silu(high_of(g))), high_of(u));
      _mm512_storeu_si512(words + (j * kV + v) * kLanes, lanes::bf16_pairs(a, b));
    }
  }
}

// Rows of bf16 from the sums: row(i) is where row i's `count` columns go.
template <int kV, typename Row>
void store_rows(const float* sums, int64_t count, int64_t rows, const Row& row) {
  for (int64_t at = 0; at < count; at += 2 * kLanes) {
    const auto there = __mmask32(count - at >= 32 ? 0xffffffffu : (1u << (count - at)) - 1);
    for (int64_t v = 0; v * kLanes < rows; ++v) {
      __m512i r[kLanes];
#pragma GCC unroll 16
      for (int64_t q = 0; q < kLanes; ++q) {
        r[q] = at + 2 * q < count ? pair_of<kV>(sums, at + 2 * q, v) : _mm512_setzero_si512();
      }
      lanes::transpose(r);
      for (int64_t i = 0; i < std::min(kLanes, rows - v * kLanes); ++i) {
        _mm512_mask_storeu_epi16(row(v * kLanes + i) + at, there, r[i]);
      }
    }
  }
}

// Words of up to 16 rows of bf16, one word of depth every `step`; row(i) is row i, zeros where there is none.
template <typename Row>
void load_words(const Row& row, int64_t rows, int64_t words, uint32_t* to, int64_t step) {
  const uint16_t* from[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) from[i] = row(std::min(i, rows - 1));
  for (int64_t k = 0; k < words; k += kLanes) {
    const auto there = __mmask16(words - k >= kLanes ? 0xffff : (1 << (words - k)) - 1);
    __m512i r[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      r[i] = _mm512_maskz_loadu_epi32(i < rows ? there : 0, from[i] + 2 * k);
    }
    lanes::transpose(r);
    const int64_t count = std::min(kLanes, words - k);
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int64_t q = 0; q < kLanes; ++q) _mm512_storeu_si512(to + (k + q) * step, r[q]);
    } else {
      alignas(64) uint32_t last[kLanes * kLanes];
      for (int64_t q = 0; q < kLanes; ++q) _mm512_store_si512(last + q * kLanes, r[q]);
      for (int64_t q = 0; q < count; ++q) std::memcpy(to + (k + q) * step, last + q * kLanes, 4 * kLanes);
    }
  }
}

// One head of one token: its first `rotary` elements, halves rotated against each other, and the rest as it is.
inline void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t rotary, int64_t width,
                   uint16_t* to) {
  const int64_t half = rotary / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const auto there = __mmask16(half - j >= kLanes ? 0xffff : (1 << (half - j)) - 1);
    const auto read = [&](const uint16_t* p)
                          __attribute__((always_inline)) { return widen(_mm256_maskz_loadu_epi16(there, p + j)); };
    const __m512 low = read(x), high = read(x + half);
    const __m512 a = rounded(_mm512_mul_ps(low, read(cos))), b = rounded(_mm512_mul_ps(high, read(sin)));
    const __m512 c = rounded(_mm512_mul_ps(high, read(cos + half))), d = rounded(_mm512_mul_ps(low, read(sin + half)));
    _mm256_mask_storeu_epi16(to + j, there, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(a, b)));
    _mm256_mask_storeu_epi16(to + half + j, there, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(c, d)));
  }
  if (rotary < width) std::memcpy(to + rotary, x + rotary, size_t(width - rotary) * sizeof(uint16_t));
}

}  // namespace
}  // namespace decoder

#pragma GCC pop_options
