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

// out[row * stride + column] = the dots of kM rows of x and four of W. On the way, cache lines of a row of W that is
// needed later are called for: one in four is enough for the hardware to see it coming, and more would be in its way.
// Not inlined: all of its pointers are in registers then.
template <bool kPairs, typename W, int kM>
__attribute__((noinline)) void dots(const typename WordsOf<kPairs>::type* const* x, const typename W::type* const* w,
                                    int64_t depth, const typename W::type* later, const Tail* tails, float* out,
                                    int64_t stride) {
  __m512 sum[kM][kColumns];
  constexpr int64_t kPer = kPairs ? 32 : 16;
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_ps();
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
  for (; k + 4 * kPer <= depth; k += 4 * kPer) {
    _mm_prefetch(reinterpret_cast<const char*>(later + k), _MM_HINT_T1);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) step(k + i * kPer, kPer);
  }
  for (; k + kPer <= depth; k += kPer) step(k, kPer);
  if (k < depth) step(k, depth - k);
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) _mm_storeu_ps(out + i * stride, finish<kPairs>(tails[i], sum[i]));
}

// Some columns of a product whose matrices' rows lie along the depth. x is of the unit's words, w of any type that they
// hold exactly. later: what of W is needed afterwards, as the rows of w from its first column on.
struct Columns {
  const Matrix &x, &w;
  int64_t first, count;
  const void* later;
};

// out[row * stride + column] for kM rows of x, from `row` on. turn: which of four columns' later ones are called for.
template <bool kPairs, typename W, int kM>
void block_of_dots(const Columns& columns, int64_t row, Tail* tails, int64_t turn, float* out, int64_t stride) {
  using X = WordsOf<kPairs>;
  const Matrix& w = columns.w;
  const typename X::type* x[kM];
  for (int i = 0; i < kM; ++i) x[i] = operand::line<X>(columns.x, row + i);
  for (int64_t at = 0; at < columns.count; at += kColumns) {
    const typename W::type* lines[kColumns];
    for (int64_t j = 0; j < kColumns; ++j) lines[j] = operand::line<W>(w, std::min(columns.first + at + j, w.rows - 1));
    const auto* later = lines[0];
    if (turn < kColumns) later = static_cast<const typename W::type*>(columns.later) + (at + turn) * w.stride;
    dots<kPairs, W, kM>(x, lines, w.depth, later, tails, out + at, stride);
    for (int i = 0; i < kM; ++i) {
      tails[i].b = static_cast<const typename X::type*>(tails[i].b) + kColumns * tails[i].stride;
    }
  }
}

using Block = void (*)(const Columns&, int64_t, Tail*, int64_t, float*, int64_t);

template <bool kPairs, typename W>
Block block_of_rows(int64_t rows) {
  constexpr Block blocks[kRows] = {block_of_dots<kPairs, W, 1>, block_of_dots<kPairs, W, 2>,
                                   block_of_dots<kPairs, W, 3>, block_of_dots<kPairs, W, 4>,
                                   block_of_dots<kPairs, W, 5>, block_of_dots<kPairs, W, 6>};
  return blocks[rows - 1];
}

inline Block block_for(Type x, Type w, int64_t rows) {
  if (x == Type::bf16) return block_of_rows<true, Element<Type::bf16>>(rows);
  if (w == Type::half) return block_of_rows<false, Element<Type::half>>(rows);
  return block_of_rows<false, Element<Type::single>>(rows);
}

// f(first, rows) for rows [lo, hi) in blocks as equal as can be.
template <typename F>
inline void in_blocks(int64_t lo, int64_t hi, const F& f) {
  const int64_t count = hi - lo, blocks = (count + kRows - 1) / kRows;
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
