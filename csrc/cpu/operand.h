// The operands of the tile units from matrices of any element type and either layout. A unit works on 32-bit words, a
// word being a pair of bf16 or one fp32 along the inner dimension (`depth`); what lies outside a matrix becomes 0, so
// that tiles need no edges.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bf16_tile.h"
#ifdef BF16_TILES
#include "head_lanes.h"
#endif

namespace operand {

constexpr int64_t kTile = bf16::kTile;
constexpr int64_t kStepWords = 16;             // of depth in a step of a unit
constexpr int64_t kStep = kTile * kStepWords;  // words of either operand in a step
constexpr int64_t kTileSums = kTile * kTile;

enum class Type { bf16, half, single };

// Lines of contiguous elements, `stride` apart: the rows, along the depth, or else all rows at one depth. `order`,
// where there is one, renumbers the lines.
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, depth, stride;
  bool along;
  const int32_t* order = nullptr;
};

}  // namespace operand

#ifdef BF16_TILES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace operand {
namespace {  // not merged with another file's: this file's instruction set is its own

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t per_word(Type unit) { return unit == Type::bf16 ? 2 : 1; }
inline int64_t words(Type unit, int64_t depth) { return (depth + per_word(unit) - 1) / per_word(unit); }
inline int64_t steps(Type unit, int64_t depth) { return (words(unit, depth) + kStepWords - 1) / kStepWords; }

LANES __mmask16 first16(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }
LANES __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }

template <Type>
struct Element;

template <>
struct Element<Type::single> {
  using type = float;
  LANES __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
  LANES void store(float* p, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(p, m, x); }
  LANES void store(float* p, __m512 low, __m512 high) {
    _mm512_storeu_ps(p, low);
    _mm512_storeu_ps(p + 16, high);
  }
};

template <>
struct Element<Type::bf16> {
  using type = uint16_t;
  LANES __m512 load(const uint16_t* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  LANES void store(uint16_t* p, __mmask16 m, __m512 x) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x));
  }
  LANES void store(uint16_t* p, __m512 low, __m512 high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

template <>
struct Element<Type::half> {
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  using type = uint16_t;
  LANES __m512 load(const uint16_t* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
  LANES void store(uint16_t* p, __mmask16 m, __m512 x) { _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x, kNearest)); }
  LANES void store(uint16_t* p, __m512 low, __m512 high) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(low, kNearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(high, kNearest));
  }
};

// f(Element<type>) for a type known at run time.
template <typename F>
inline void with_element(Type type, const F& f) {
  if (type == Type::bf16) f(Element<Type::bf16>());
  if (type == Type::half) f(Element<Type::half>());
  if (type == Type::single) f(Element<Type::single>());
}

// 16 words of one row along the depth, `left` elements of which are there.
template <bool kPairs, typename E>
LANES __m512i along(const typename E::type* p, int64_t left) {
  if constexpr (!kPairs) {
    return _mm512_castps_si512(E::load(p, first16(left)));
  } else if constexpr (std::is_same_v<E, Element<Type::bf16>>) {
    return _mm512_maskz_loadu_epi16(first32(left), p);
  } else {
    return (__m512i)_mm512_cvtne2ps_pbh(E::load(p + 16, first16(left - 16)), E::load(p, first16(left)));
  }
}

// One word of each of 16 rows that lie beside each other: `even` and `odd` (unused by fp32 words) point to their
// elements at two neighbouring depths, nullptr where there is none.
template <bool kPairs, typename E>
LANES __m512i across(const typename E::type* even, const typename E::type* odd, __mmask16 there) {
  if constexpr (!kPairs) {
    return even == nullptr ? _mm512_setzero_si512() : _mm512_castps_si512(E::load(even, there));
  } else if constexpr (std::is_same_v<E, Element<Type::bf16>>) {
    __m512i low = _mm512_setzero_si512(), high = low;
    if (even != nullptr) low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, even));
    if (odd != nullptr) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  } else {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (even != nullptr) low = E::load(even, there);
    if (odd != nullptr) high = E::load(odd, there);
    return lanes::bf16_pairs(low, high);
  }
}

template <typename E>
LANES const typename E::type* line(const Matrix& m, int64_t i) {
  return static_cast<const typename E::type*>(m.data) + (m.order == nullptr ? i : int64_t(m.order[i])) * m.stride;
}

// A matrix seen through its element type, cut to `depth` elements from `from` on.
template <typename E>
struct Lines {
  const Matrix& m;
  int64_t from, depth;
  using T = typename E::type;
  const T* line(int64_t i) const { return operand::line<E>(m, i); }
  const T* at_depth(int64_t k) const { return k < depth ? line(from + k) : nullptr; }
};

// 16 words of depth of 16 rows that lie beside each other, from `row` on: r[q] holds word q of all of them.
template <bool kPairs, typename E>
LANES void load_across(const Lines<E>& lines, int64_t row, int64_t step, __mmask16 there, __m512i* r) {
  constexpr int64_t kPer = kPairs ? 2 : 1;
#pragma GCC unroll 16
  for (int64_t q = 0; q < 16; ++q) {
    const int64_t k = (step * kStepWords + q) * kPer;
    const auto *even = lines.at_depth(k), *odd = kPairs ? lines.at_depth(k + 1) : nullptr;
    r[q] = across<kPairs, E>(even == nullptr ? nullptr : even + row, odd == nullptr ? nullptr : odd + row, there);
  }
}

// A operand: rows [first, first + 32) as [steps][32][16 words].
template <bool kPairs, typename E>
inline void pack_left(const Matrix& m, int64_t first, int64_t from, int64_t depth, uint32_t* out) {
  constexpr int64_t kPer = kPairs ? 2 : 1;
  const Lines<E> lines{m, from, depth};
  const int64_t n = steps(kPairs ? Type::bf16 : Type::single, depth);
  for (int64_t row = 0; m.along && row < kTile; ++row) {
    uint32_t* to = out + row * kStepWords;
    if (first + row < m.rows) {
      const auto *p = lines.line(first + row) + from, *next = lines.line(std::min(first + row + 1, m.rows - 1)) + from;
      for (int64_t s = 0; s < n; ++s) {
        const int64_t k = s * kStepWords * kPer;
        _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T0);  // a line is too short to be foreseen
        _mm512_storeu_si512(to + s * kStep, along<kPairs, E>(p + k, depth - k));
      }
    } else {
      for (int64_t s = 0; s < n; ++s) _mm512_storeu_si512(to + s * kStep, _mm512_setzero_si512());
    }
  }
  for (int64_t s = 0; !m.along && s < n; ++s) {
    for (int64_t half = 0; half < kTile; half += 16) {
      __m512i r[16];
      load_across<kPairs, E>(lines, first + half, s, first16(m.rows - first - half), r);
      lanes::transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + s * kStep + (half + i) * kStepWords, r[i]);
    }
  }
}

// Sixteen lines at a time are too many streams for the hardware, and lines across the depth are none.
constexpr int64_t kBytesAhead = 512;  // along a line
constexpr int64_t kAhead = 8;         // words of depth

// Calls for word q of depth of lines that lie across it.
template <int64_t kPer, typename E>
LANES void fetch(const Lines<E>& lines, int64_t q, int64_t first, int64_t count) {
  for (int64_t k = q * kPer; k < std::min((q + 1) * kPer, lines.depth); ++k) {
    const auto* from = reinterpret_cast<const char*>(lines.line(lines.from + k) + first);
    for (int64_t at = 0; at < count * int64_t(sizeof(typename E::type)); at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
  }
}

// 32 pairs of bf16.
LANES void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* out) {
  const __m512i pick = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, pick, b));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(a, _mm512_or_si512(pick, _mm512_set1_epi16(16)), b));
}

// B operand: rows [first, first + count), which become columns, as [count / 32][steps * 16 words][32].
template <bool kPairs, typename E>
inline void pack_right(const Matrix& m, int64_t first, int64_t count, int64_t from, int64_t depth, uint32_t* out) {
  constexpr int64_t kPer = kPairs ? 2 : 1;
  const Lines<E> lines{m, from, depth};
  const int64_t n = steps(kPairs ? Type::bf16 : Type::single, depth), panel = n * kStep;
  if (m.along) {
    for (int64_t half = 0; half < tiles(count) * kTile; half += 16) {
      uint32_t* to = out + half / kTile * panel + half % kTile;
      const int64_t left = std::min<int64_t>(count - half, 16);
      const typename E::type* line[16];
      for (int64_t i = 0; i < 16; ++i) line[i] = lines.line(first + std::clamp<int64_t>(half + i, 0, count - 1)) + from;
      for (int64_t s = 0; s < n; ++s) {
        const int64_t k = s * kStepWords * kPer;
        __m512i r[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
          r[i] = along<kPairs, E>(line[i] + k, i < left ? depth - k : 0);
          _mm_prefetch(reinterpret_cast<const char*>(line[i] + k) + kBytesAhead, _MM_HINT_T1);
        }
        lanes::transpose(r);
#pragma GCC unroll 16
        for (int64_t q = 0; q < 16; ++q) _mm512_storeu_si512(to + (s * kStepWords + q) * kTile, r[q]);
      }
    }
    return;
  }
  for (int64_t q = 0; q < n * kStepWords; ++q) {
    const auto *even = lines.at_depth(q * kPer), *odd = kPairs ? lines.at_depth(q * kPer + 1) : nullptr;
    fetch<kPer>(lines, q + kAhead, first, count);
    for (int64_t half = 0; half < tiles(count) * kTile; half += 16) {
      const int64_t at = first + half;
      uint32_t* to = out + half / kTile * panel + q * kTile + half % kTile;
      if constexpr (kPairs && std::is_same_v<E, Element<Type::bf16>>) {
        if (odd != nullptr && half + kTile <= count) {
          interleave(even + at, odd + at, to);
          half += 16;
          continue;
        }
      }
      const __m512i word = across<kPairs, E>(even == nullptr ? nullptr : even + at, odd == nullptr ? nullptr : odd + at,
                                             first16(count - half));
      _mm512_storeu_si512(to, word);
    }
  }
}

// f(pairs, element) for a unit and a matrix.
template <typename F>
inline void with_layout(Type unit, Type type, const F& f) {
  with_element(type, [&](auto element) {
    if (unit == Type::bf16) f(std::true_type(), element);
    if (unit != Type::bf16) f(std::false_type(), element);
  });
}

inline void left(Type unit, const Matrix& m, int64_t first, uint32_t* out, int64_t from = 0, int64_t depth = -1) {
  with_layout(unit, m.type, [&](auto pairs, auto element) {
    pack_left<decltype(pairs)::value, decltype(element)>(m, first, from, depth < 0 ? m.depth : depth, out);
  });
}

inline void right(Type unit, const Matrix& m, int64_t first, int64_t count, uint32_t* out, int64_t from = 0,
                  int64_t depth = -1) {
  with_layout(unit, m.type, [&](auto pairs, auto element) {
    pack_right<decltype(pairs)::value, decltype(element)>(m, first, count, from, depth < 0 ? m.depth : depth, out);
  });
}

}  // namespace
}  // namespace operand

#pragma GCC pop_options
#endif
