// Dots of rows of x and rows of W: six by four sums of 16 lanes in registers, along the depth, over the row's own
// adapter behind it, and the lanes summed at the end. Each sum is formed in one order, whatever is formed beside it.
#pragma once
#include <type_traits>

#include "lora_job.h"

#ifdef BF16_TILES

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using operand::Element;
using operand::kStepWords;

constexpr int64_t kRows = 6, kColumns = 4;  // of sums in registers

// What a row's chains go on with: its S, of whole steps, and the four rows of its adapter's B, `stride` elements apart.
// Both are of the unit's words.
struct Tail {
  const void *s = nullptr, *b = nullptr;
  int64_t stride = 0, depth = 0;
};

template <bool kPairs>
using WordsOf = Element<kPairs ? Type::bf16 : Type::single>;

template <bool kPairs>
LANES __m512 add_product(__m512 sum, __m512i a, __m512i b) {
  if constexpr (kPairs) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// The lanes of four vectors, summed.
LANES __m128 lane_sums(const __m512 (&sum)[kColumns]) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sum[0], sum[1]), _mm512_unpackhi_ps(sum[0], sum[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sum[2], sum[3]), _mm512_unpackhi_ps(sum[2], sum[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds a row's adapter to its sums.
template <bool kPairs>
LANES void add_tail(const Tail& tail, __m512 (&sum)[kColumns]) {
  using X = WordsOf<kPairs>;
  constexpr int64_t kPer = kPairs ? 32 : 16;
  for (int64_t k = 0; k < tail.depth; k += kPer) {
    const __m512i row = _mm512_loadu_si512(static_cast<const typename X::type*>(tail.s) + k);
    const auto* b = static_cast<const typename X::type*>(tail.b) + k;
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j, b += tail.stride) {
      sum[j] = add_product<kPairs>(sum[j], row, operand::along<kPairs, X>(b, tail.depth - k));
    }
  }
}

// A row's sums with its adapter's: as many digits as two products have in fp32, so the adapter's is formed apart there.
template <bool kPairs>
LANES __m128 finish(const Tail& tail, __m512 (&sum)[kColumns]) {
  if constexpr (kPairs) add_tail<kPairs>(tail, sum);
  __m128 total = lane_sums(sum);
  if (!kPairs && tail.depth > 0) {
    __m512 apart[kColumns] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    add_tail<kPairs>(tail, apart);
    total = _mm_add_ps(total, lane_sums(apart));
  }
  return total;
}

// Where chains over a part of the depth come from and go to: lanes that are carried from part to part ([kM][4][16]),
// nullptr at the beginning and at the end, and then out[row * stride + column].
struct Chains {
  const float* from;
  float* to;
  const Tail* tails;
  float* out;
  int64_t stride;
};

// The dots of kM rows of x and four of W, while kAhead other rows of W, `stride` elements apart, are called for. Not
// inlined: all of its pointers are in registers then.
template <bool kPairs, typename W, int kM, int kAhead>
__attribute__((noinline)) void dots(const typename WordsOf<kPairs>::type* const* x, const typename W::type* const* w,
                                    int64_t depth, const typename W::type* ahead, int64_t stride,
                                    const Chains& chains) {
  constexpr int64_t kPer = kPairs ? 32 : 16;
  __m512 sum[kM][kColumns];
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = chains.from == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(chains.from + (i * kColumns + j) * 16);
    }
  }
  const auto step = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    __m512i column[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) column[j] = operand::along<kPairs, W>(w[j] + k, left);
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) {
      const __m512i row = operand::along<kPairs, WordsOf<kPairs>>(x[i] + k, left);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sum[i][j] = add_product<kPairs>(sum[i][j], row, column[j]);
    }
  };
  int64_t k = 0;
  for (; k + kPer <= depth; k += kPer) {
    const auto* line = ahead + k;
#pragma GCC unroll 4
    for (int i = 0; i < kAhead; ++i, line += stride) _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
    step(k, kPer);
  }
  if (k < depth) step(k, depth - k);
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    if (chains.to == nullptr) {
      _mm_storeu_ps(chains.out + i * chains.stride, finish<kPairs>(chains.tails[i], sum[i]));
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) _mm512_storeu_ps(chains.to + (i * kColumns + j) * 16, sum[i][j]);
  }
}

// Some columns of a product whose matrices' rows lie along the depth, and elements [from, to) of it. x is of the unit's
// words, w of any type that they hold exactly. later: what of W is needed after them, as rows like w's, or nullptr.
// ahead: how many rows of that a block calls for in the time of four: 1, 2, or 4 where there is one block, which calls
// for its own next rows.
struct Columns {
  const Matrix &x, &w;
  int64_t first, count;
  int64_t from, to;
  const void* later;
  int64_t ahead;
};

// out[row * stride + column] for kM rows of x, from `row` on, after the last part of the depth; lanes[count][kM][16]
// between the parts. turn: how many blocks have called for rows ahead.
template <bool kPairs, typename W, int kM, int kAhead>
void block_of_dots(const Columns& columns, int64_t row, Tail* tails, int64_t turn, float* lanes, float* out,
                   int64_t stride) {
  using X = WordsOf<kPairs>;
  const Matrix& w = columns.w;
  const typename X::type* x[kM];
  for (int i = 0; i < kM; ++i) x[i] = operand::line<X>(columns.x, row + i) + columns.from;
  Chains chains{columns.from == 0 ? nullptr : lanes, columns.to == w.depth ? nullptr : lanes, tails, out, stride};
  for (int64_t at = 0; at < columns.count; at += kColumns) {
    const typename W::type* lines[kColumns];
    for (int64_t j = 0; j < kColumns; ++j) {
      lines[j] = operand::line<W>(w, std::min(columns.first + at + j, w.rows - 1)) + columns.from;
    }
    const auto* later = static_cast<const typename W::type*>(columns.later);
    const bool last = at + kColumns >= columns.count;
    const auto* ahead = lines[0];
    if (kAhead == kColumns && !last) ahead += kColumns * w.stride;
    if (kAhead == kColumns && last && later != nullptr) ahead = later;
    if (kAhead < kColumns && later != nullptr && turn * kAhead < kColumns)
      ahead = later + (at + turn * kAhead) * w.stride;
    dots<kPairs, W, kM, kAhead>(x, lines, columns.to - columns.from, ahead, w.stride, chains);
    chains.out += kColumns;
    if (chains.from != nullptr) chains.from += kM * kColumns * 16;
    if (chains.to != nullptr) chains.to += kM * kColumns * 16;
    for (int i = 0; chains.to == nullptr && i < kM; ++i) {
      tails[i].b = static_cast<const typename X::type*>(tails[i].b) + kColumns * tails[i].stride;
    }
  }
}

using Block = void (*)(const Columns&, int64_t, Tail*, int64_t, float*, float*, int64_t);

template <bool kPairs, typename W, int kAhead>
Block block_of_rows(int64_t rows) {
  constexpr Block blocks[kRows] = {block_of_dots<kPairs, W, 1, kAhead>, block_of_dots<kPairs, W, 2, kAhead>,
                                   block_of_dots<kPairs, W, 3, kAhead>, block_of_dots<kPairs, W, 4, kAhead>,
                                   block_of_dots<kPairs, W, 5, kAhead>, block_of_dots<kPairs, W, 6, kAhead>};
  return blocks[rows - 1];
}

template <bool kPairs, typename W>
Block block_ahead(int64_t ahead, int64_t rows) {
  if (ahead == 1) return block_of_rows<kPairs, W, 1>(rows);
  return ahead == 2 ? block_of_rows<kPairs, W, 2>(rows) : block_of_rows<kPairs, W, 4>(rows);
}

// The block for `rows` rows of columns.x.
inline Block block_for(const Columns& columns, int64_t rows) {
  if (columns.x.type == Type::bf16) return block_ahead<true, Element<Type::bf16>>(columns.ahead, rows);
  if (columns.w.type == Type::half) return block_ahead<false, Element<Type::half>>(columns.ahead, rows);
  return block_ahead<false, Element<Type::single>>(columns.ahead, rows);
}

inline int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// f(first, rows) for rows [lo, hi) in blocks as equal as can be.
template <typename F>
inline void in_blocks(int64_t lo, int64_t hi, const F& f) {
  const int64_t count = hi - lo, blocks = blocks_of(count);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = lo + count * b / blocks;
    f(first, lo + count * (b + 1) / blocks - first);
  }
}

// Rows of a matrix as the unit's words, `stride` words apart.
inline void to_words(Type words, const Matrix& m, int64_t first, int64_t rows, uint32_t* out, int64_t stride) {
  operand::with_layout(words, m.type, [&](auto pairs, auto element) {
    using E = decltype(element);
    constexpr bool kPairs = decltype(pairs)::value;
    constexpr int64_t kPer = kPairs ? 32 : 16;
    for (int64_t i = 0; i < rows; ++i, out += stride) {
      const auto* p = operand::line<E>(m, std::min(first + i, m.rows - 1));
      for (int64_t k = 0; k < m.depth; k += kPer) {
        _mm512_storeu_si512(out + k / kPer * kStepWords, operand::along<kPairs, E>(p + k, m.depth - k));
      }
    }
  });
}

}  // namespace
}  // namespace lora

#pragma GCC pop_options

#endif
