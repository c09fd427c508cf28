// A strip of columns of one product, the rows of x being lanes: x^T lies packed as pairs of bf16, and every pair of a
// row of W, read where it is, meets up to 64 rows of x at once. A sum is one chain along the depth, and the row's own
// adapter is formed apart and added to it: the bits of a row depend on nothing beside it.
#pragma once
#include <cstring>
#include <limits>

#include "lora_dots.h"

#ifdef BF16_TILES

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using BF16 = Element<Type::bf16>;

constexpr int64_t kLanes = 16;
constexpr int64_t kWide = 144;   // columns whose sums are held at a time: whole groups, whole vectors
constexpr int64_t kPart = 2048;  // words of depth in one pass over the columns: x^T stays in the second-level cache
constexpr int64_t kLeastVectors = 2, kMostVectors = 4;
constexpr int kMostGroup = 9;
template <int kV>
constexpr int kGroup = kV == 4 ? 6 : kMostGroup;  // rows of W whose sums are in registers
constexpr int64_t kTogether = 8;                  // columns of an adapter: as many chains hide a product's latency

// Positions [lo, hi) of the order, as they meet W: so many vectors of lanes, packed.
struct Chunk {
  int64_t lo, hi, vectors;
  uint32_t* x;
};

// f(std::integral_constant) for a chunk's vectors.
template <typename F>
void with_vectors(int64_t vectors, const F& f) {
  if (vectors <= 2) f(std::integral_constant<int, 2>());
  if (vectors == 3) f(std::integral_constant<int, 3>());
  if (vectors >= 4) f(std::integral_constant<int, 4>());
}

// Nearly equal chunks, each as few vectors as its rows fill.
inline std::vector<Chunk> chunks_of(int64_t rows) {
  const int64_t vectors = (rows + kLanes - 1) / kLanes, count = (vectors + kMostVectors - 1) / kMostVectors;
  std::vector<Chunk> chunks;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t lo = vectors * c / count, hi = vectors * (c + 1) / count;
    chunks.push_back({lo * kLanes, std::min(hi * kLanes, rows), std::max(hi - lo, kLeastVectors), nullptr});
  }
  return chunks;
}

inline Matrix lines_of(const Matrix& m, int64_t lo, int64_t hi) {
  Matrix some = m;
  some.rows = hi - lo;
  if (m.order != nullptr) {
    some.order = m.order + lo;
  } else {
    some.data = static_cast<const char*>(m.data) + lo * m.stride * element_bytes(m.type);
  }
  return some;
}

// Steps [from, to) of the depth of bf16 rows as [words][kV * 16].
template <int kV>
void pack(const Matrix& m, int64_t from, int64_t to, uint32_t* out) {
  for (int64_t v = 0; v < kV; ++v) {
    const BF16::type* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = operand::line<BF16>(m, std::min(v * kLanes + i, m.rows - 1));
    for (int64_t s = from; s < to; ++s) {
      __m512i r[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        const auto* p = rows[i] + s * 2 * kStepWords;
        _mm_prefetch(reinterpret_cast<const char*>(p) + operand::kBytesAhead, _MM_HINT_T0);
        r[i] = operand::along<true, BF16>(p, v * kLanes + i < m.rows ? m.depth - s * 2 * kStepWords : 0);
      }
      lanes::transpose(r);
      uint32_t* to = out + (s * kStepWords * kV + v) * kLanes;
#pragma GCC unroll 16
      for (int64_t q = 0; q < kStepWords; ++q) _mm512_storeu_si512(to + q * kV * kLanes, r[q]);
    }
  }
}

// sums[row of w][kV * 16] += the products of `depth` elements; `next` is where the rows of the next call begin.
template <int kV>
void multiply_part(const char* w, const uint32_t* x, int64_t depth, const char* next, int64_t stride, bool first,
                   float* sums) {
  constexpr int kR = kGroup<kV>;
  const char* rows[kR / 3];  // every third: the others are one and two strides away
  __m512 sum[kR][kV];
#pragma GCC unroll 9
  for (int j = 0; j < kR; ++j) {
    if (j % 3 == 0) rows[j / 3] = w + j * stride;
    const float* from = sums + j * kV * kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sum[j][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(from + v * kLanes);
  }
  const auto step = [&](int64_t q, auto half) __attribute__((always_inline)) {
    __m512i lanes[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) lanes[v] = _mm512_loadu_si512(x + (q * kV + v) * kLanes);
#pragma GCC unroll 9
    for (int j = 0; j < kR; ++j) {
      int32_t pair = 0;
      std::memcpy(&pair, rows[j / 3] + j % 3 * stride + 4 * q, half ? 2 : 4);
      const __m512i column = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sum[j][v] = _mm512_dpbf16_ps(sum[j][v], (__m512bh)lanes[v], (__m512bh)column);
    }
  };
  const auto move = [&](int64_t words) __attribute__((always_inline)) {
    x += words * kV * kLanes;
    for (const char*& row : rows) {
      row += 4 * words;
      asm("" : "+r"(row));  // or else the compiler keeps a pointer for each row
    }
  };
  for (; depth >= 2 * kStepWords; depth -= 2 * kStepWords, next += 4 * kStepWords) {
    const char* ahead = next;
#pragma GCC unroll 9
    for (int j = 0; j < kR; ++j, ahead += stride) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 1
    for (int64_t q = 0; q < kStepWords; q += 4, move(4)) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) step(i, std::false_type());
    }
  }
  for (; depth >= 2; depth -= 2, move(1)) step(0, std::false_type());
  if (depth > 0) step(0, std::true_type());
#pragma GCC unroll 9
  for (int j = 0; j < kR; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) _mm512_storeu_ps(sums + (j * kV + v) * kLanes, sum[j][v]);
  }
}

LANES __mmask16 lanes_below(int64_t row, int64_t v) { return operand::first16(row - v * kLanes); }

struct Scratch {
  Buffer<float> sums{(kWide + kMostGroup) * kMostVectors * kLanes};
  std::vector<uint32_t> s, copy;
  const Term* term = nullptr;  // whose S s is, of which chunk's rows
  const Chunk* chunk = nullptr;
};

// Some columns of a chunk of the rows of one product.
template <int kV>
class Strip {
 public:
  Strip(const Job& job, const Chunk& chunk, Scratch& scratch)
      : job_(job), chunk_(chunk), count_(chunk.hi - chunk.lo), scratch_(scratch), sums_(scratch.sums), s_(scratch.s) {
    for (const Span& span : job.rows->spans) {
      const int64_t lo = std::max(span.lo, chunk.lo), hi = std::min(span.hi, chunk.hi);
      if (lo < hi) spans_.push_back({lo - chunk.lo, hi - chunk.lo, span.adapter});
    }
  }

  void run(const Product& product, int64_t first, int64_t count) {
    const Matrix& w = product.terms[0].right;
    constexpr int kR = kGroup<kV>;
    const auto row = [&](int64_t i) { return std::min(i, w.rows - kR); };  // the last rows may come twice
    const auto bytes = [&](int64_t i, int64_t k) {
      return reinterpret_cast<const char*>(operand::line<BF16>(w, row(i)) + k);
    };
    fetch(product.out, first, count);
    for (int64_t k = 0; k < w.depth; k += 2 * kPart) {
      for (int64_t at = first; at < first + count; at += kR) {
        const char* next = bytes(at + kR, k);
        multiply_part<kV>(bytes(at, k), chunk_.x + k / 2 * kWidth, std::min(2 * kPart, w.depth - k), next, 2 * w.stride,
                          k == 0, sums_.data + (at - first) * kWidth);
      }
    }
    const int64_t last = (count - 1) / kR * kR, again = first + last - row(first + last);
    float* group = sums_.data + last * kWidth;
    if (again > 0) std::copy(group + again * kWidth, group + kR * kWidth, group);
    add_adapters(product.terms[0], first, count);
    operand::with_element(product.out.type, [&](auto element) { store<decltype(element)>(product.out, first, count); });
  }

 private:
  static constexpr int64_t kWidth = kV * kLanes;

  // Where store will write.
  void fetch(const Output& out, int64_t first, int64_t count) {
    const int64_t size = element_bytes(out.type);
    for (int64_t i = 0; i < count_; ++i) {
      const char* to = static_cast<const char*>(out.data) + (job_.rows->row(chunk_.lo + i) * out.stride + first) * size;
      for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(to + at, 1);
    }
  }

  void add_adapters(const Term& term, int64_t first, int64_t count) {
    int64_t rank = 0;
    for (const Span& span : spans_) {
      if (span.adapter >= 0) rank = std::max(rank, term.adapters[span.adapter].rank);
    }
    if (rank == 0) return;
    if (scratch_.term != &term || scratch_.chunk != &chunk_) {
      const Matrix s{s_row(job_, chunk_.lo, term.s_column), Type::bf16, count_, rank, job_.s_width, true};
      const int64_t most = operand::steps(Type::bf16, rank);
      s_.resize(size_t(most * kStepWords * kWidth));
      pack<kV>(s, 0, most, s_.data());
      scratch_.term = &term, scratch_.chunk = &chunk_;
    }
    for (const Span& span : spans_) {
      if (span.adapter < 0 || term.adapters[span.adapter].rank == 0) continue;
      Matrix b = term.adapters[span.adapter].expand;
      const bool words = b.type == Type::bf16 && b.depth % 2 == 0 && count % kTogether == 0;
      if (words) {
        b.data = operand::line<BF16>(b, first);
      } else {
        const int64_t width = operand::steps(Type::bf16, b.depth) * kStepWords;
        const int64_t columns = (count + kTogether - 1) / kTogether * kTogether;
        scratch_.copy.resize(size_t(columns * width));
        to_words(Type::bf16, b, first, columns, scratch_.copy.data(), width);
        b.data = scratch_.copy.data(), b.stride = 2 * width, b.depth += b.depth % 2;
      }
      add_adapter(b, span, count);
    }
  }

  // The S of the vectors that hold the adapter's rows meet words of this B, and only its own rows take the sum.
  void add_adapter(const Matrix& b, const Span& span, int64_t count) {
    const int64_t stride = 2 * b.stride;
    for (int64_t v = span.lo / kLanes; v * kLanes < span.hi; ++v) {
      const __mmask16 own = lanes_below(span.hi, v) & ~lanes_below(span.lo, v);
      float* to = sums_.data + v * kLanes;
      for (int64_t at = 0; at < count; at += kTogether) {
        const char* words = static_cast<const char*>(b.data) + at * stride;
        const uint32_t* s = s_.data() + v * kLanes;
        __m512 sum[kTogether] = {};
        for (int64_t q = 0; q < b.depth / 2; ++q, s += kWidth) {
          const __m512i rows = _mm512_loadu_si512(s);
#pragma GCC unroll 8
          for (int64_t j = 0; j < kTogether; ++j) {
            int32_t pair;
            std::memcpy(&pair, words + j * stride + 4 * q, 4);
            const __m512i column = _mm512_set1_epi32(pair);
            sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)rows, (__m512bh)column);
          }
        }
#pragma GCC unroll 8
        for (int64_t j = 0; j < kTogether; ++j, to += kWidth) {
          _mm512_mask_storeu_ps(to, own, _mm512_add_ps(_mm512_loadu_ps(to), sum[j]));
        }
      }
    }
  }

  // Whole cache lines where the columns fill them: rows are often a page apart, and so their lines soon driven out.
  template <typename E>
  void store(const Output& out, int64_t first, int64_t count) {
    std::vector<bool> outside(count_);
    for (const Span& span : spans_) {
      if (span.adapter == kOutside) std::fill(outside.begin() + span.lo, outside.begin() + span.hi, true);
    }
    for (int64_t at = 0; at < count;) {
      const int64_t some = std::min((first + at) % (2 * kLanes) == 0 ? 2 * kLanes : kLanes, count - at);
      for (int64_t lo = 0; lo < count_; lo += kLanes) store_rows<E>(out, outside, lo, first, at, some);
      at += some;
    }
  }

  // Up to 16 rows from `lo` on of up to 32 columns.
  template <typename E>
  void store_rows(const Output& out, const std::vector<bool>& outside, int64_t lo, int64_t first, int64_t at,
                  int64_t count) {
    using T = typename E::type;
    const __mmask16 there[2] = {operand::first16(count), operand::first16(count - kLanes)};
    alignas(64) float rows[2][kLanes][kLanes];
    __m512 bias[2];
    for (int64_t half = 0; half * kLanes < count; ++half) {
      const int64_t from = at + half * kLanes;
      __m512i r[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) r[j] = _mm512_loadu_si512(sums_.data + (from + j) * kWidth + lo);
      lanes::transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) _mm512_store_si512(rows[half][i], r[i]);
      if (out.bias != nullptr) bias[half] = E::load(static_cast<const T*>(out.bias) + first + from, there[half]);
    }
    for (int64_t i = 0; i < std::min(kLanes, count_ - lo); ++i) {
      T* to = static_cast<T*>(out.data) + job_.rows->row(chunk_.lo + lo + i) * out.stride + first + at;
      __m512 x[2] = {_mm512_load_ps(rows[0][i]), _mm512_load_ps(rows[1][i])};
      for (int64_t half = 0; half < 2; ++half) {
        if (out.bias != nullptr) x[half] = _mm512_add_ps(x[half], bias[half]);
        if (outside[lo + i]) x[half] = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
      }
      if (count == 2 * kLanes) {
        E::store(to, x[0], x[1]);
        continue;
      }
      E::store(to, there[0], x[0]);
      if (there[1] != 0) E::store(to + kLanes, there[1], x[1]);
    }
  }

  const Job& job_;
  const Chunk& chunk_;
  const int64_t count_;
  std::vector<Span> spans_;  // of the chunk, counted from its first row
  Scratch& scratch_;
  Buffer<float>& sums_;
  std::vector<uint32_t>& s_;
};

}  // namespace
}  // namespace lora

#pragma GCC pop_options

#endif
