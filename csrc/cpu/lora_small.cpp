// The product of few rows, as in decoding: bound by reading W, so nothing of W is packed. Every output is one chain of
// sums over x's and W's rows as they lie, four rows of x and six of W at a time, and over the row's own adapter (with
// fp32 words formed apart); the lanes are summed at the end. The bits of a row depend on nothing beside it.
#include "lora_job.h"

#ifdef BF16_TILES

#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using operand::Element;
using operand::kStepWords;

constexpr int64_t kRows = 4, kColumns = 6;  // of sums in registers
constexpr int64_t kWide = 10 * kColumns;    // columns whose fp32 sums are held at a time

// What a row's chains go on with: the words of its S, and of its adapter's B for the six columns, [6][steps][16].
struct Tail {
  const uint32_t *s = nullptr, *b = nullptr;
  int64_t steps = 0;
};

template <bool kPairs>
LANES __m512 add_product(__m512 sum, __m512i a, __m512i b) {
  if constexpr (kPairs) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// The lanes of four vectors, summed.
LANES __m128 lane_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int kM, bool kAdd>
LANES void sum_lanes(const __m512 (&sum)[kM][kColumns], float* out) {
#pragma GCC unroll 6
  for (int j = 0; j < kColumns; ++j) {
    constexpr int k1 = kM > 1 ? 1 : 0, k2 = kM > 2 ? 2 : 0, k3 = kM > 3 ? 3 : 0;
    __m128 total = lane_sums(sum[0][j], sum[k1][j], sum[k2][j], sum[k3][j]);
    if (kAdd) total = _mm_add_ps(_mm_loadu_ps(out + 4 * j), total);
    _mm_storeu_ps(out + 4 * j, total);
  }
}

// Adds the rows' adapters to their sums.
template <bool kPairs, int kM>
LANES void add_tails(const Tail* tails, __m512 (&sum)[kM][kColumns]) {
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
    for (int64_t s = 0; s < tails[i].steps; ++s) {
      const __m512i row = _mm512_loadu_si512(tails[i].s + s * kStepWords);
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) {
        const uint32_t* b = tails[i].b + (j * tails[i].steps + s) * kStepWords;
        sum[i][j] = add_product<kPairs>(sum[i][j], row, _mm512_loadu_si512(b));
      }
    }
  }
}

// out[column][row] = the products of kM rows of x and six of w.
template <bool kPairs, typename X, typename W, int kM>
void dots(const typename X::type* const* x, const typename W::type* const* w, int64_t depth, const Tail* tails,
          int64_t ahead, float* out) {
  constexpr int64_t kPer = kPairs ? 32 : 16;
  __m512 sum[kM][kColumns];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    __m512i row[kM];
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) row[i] = operand::along<kPairs, X>(x[i] + k, left);
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) {
      const __m512i column = operand::along<kPairs, W>(w[j] + k, left);
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) sum[i][j] = add_product<kPairs>(sum[i][j], row[i], column);
    }
  };
  int64_t k = 0;
  for (; k + kPer <= depth; k += kPer) {
    if (ahead != 0) {  // the next six rows, which are far in the hardware's eyes
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) _mm_prefetch(reinterpret_cast<const char*>(w[j] + k + ahead), _MM_HINT_T1);
    }
    step(k, kPer);
  }
  if (k < depth) step(k, depth - k);
  if constexpr (kPairs) {
    add_tails<kPairs, kM>(tails, sum);
    sum_lanes<kM, false>(sum, out);
  } else {  // the adapters' products formed apart: as many digits as two products have
    sum_lanes<kM, false>(sum, out);
    bool any = false;
    for (int i = 0; i < kM; ++i) any = any || tails[i].steps > 0;
    if (!any) return;
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_ps();
    }
    add_tails<kPairs, kM>(tails, sum);
    sum_lanes<kM, true>(sum, out);
  }
}

// A matrix whose rows lie along the depth, and the rows of x that meet it.
struct Sides {
  const Matrix &x, &w;
  int64_t depth;
};

// Rows [first, first + rows) of x, at most four, and columns [column, column + 6), as far as there are any.
template <bool kPairs, typename X, typename W>
void block_of_dots(const Sides& sides, int64_t first, int64_t rows, int64_t column, const Tail* tails, bool fetch,
                   float* out) {
  const typename X::type* x[kRows];
  const typename W::type* w[kColumns];
  for (int64_t i = 0; i < rows; ++i) x[i] = operand::line<X>(sides.x, first + i);
  for (int64_t j = 0; j < kColumns; ++j) w[j] = operand::line<W>(sides.w, std::min(column + j, sides.w.rows - 1));
  const int64_t ahead = fetch ? kColumns * sides.w.stride : 0;
  if (rows == 1) dots<kPairs, X, W, 1>(x, w, sides.depth, tails, ahead, out);
  if (rows == 2) dots<kPairs, X, W, 2>(x, w, sides.depth, tails, ahead, out);
  if (rows == 3) dots<kPairs, X, W, 3>(x, w, sides.depth, tails, ahead, out);
  if (rows == 4) dots<kPairs, X, W, 4>(x, w, sides.depth, tails, ahead, out);
}

using Block = void (*)(const Sides&, int64_t, int64_t, int64_t, const Tail*, bool, float*);

// x and w have one type, or w has been brought to fp32.
Block block_for(Type x, Type w) {
  if (x == Type::bf16) return block_of_dots<true, Element<Type::bf16>, Element<Type::bf16>>;
  if (x == Type::single) return block_of_dots<false, Element<Type::single>, Element<Type::single>>;
  if (w == Type::half) return block_of_dots<false, Element<Type::half>, Element<Type::half>>;
  return block_of_dots<false, Element<Type::half>, Element<Type::single>>;
}

// Rows of a matrix as the unit's words, [rows][steps][16].
void to_words(const Job& job, const Matrix& m, int64_t first, int64_t rows, uint32_t* out) {
  const int64_t steps = operand::steps(job.words, m.depth);
  operand::with_layout(job.words, m.type, [&](auto pairs, auto element) {
    using E = decltype(element);
    constexpr bool kPairs = decltype(pairs)::value;
    constexpr int64_t kPer = kPairs ? 32 : 16;
    for (int64_t i = 0; i < rows; ++i) {
      const auto* p = operand::line<E>(m, std::min(first + i, m.rows - 1));
      for (int64_t s = 0; s < steps; ++s, out += kStepWords) {
        _mm512_storeu_si512(out, operand::along<kPairs, E>(p + s * kPer, m.depth - s * kPer));
      }
    }
  });
}

// S of one adapter's rows and six of its ranks.
struct Shrink {
  const Term* term;
  const Span* span;
  int64_t rank;
};

void shrink(const Job& job, const Shrink& item) {
  const Adapter& adapter = item.term->adapters[item.span->adapter];
  const Matrix& x = job.lefts[0];
  const bool as_it_lies = adapter.shrink.type == job.words;
  Matrix words{nullptr, job.words, kColumns, x.depth, 0, true};
  std::vector<uint32_t> copy;
  if (!as_it_lies) {
    const int64_t steps = operand::steps(job.words, x.depth);
    copy.resize(size_t(kColumns * steps * kStepWords));
    to_words(job, adapter.shrink, item.rank, kColumns, copy.data());
    words.data = copy.data(), words.stride = steps * kStepWords * operand::per_word(job.words);
  }
  const Sides sides{x, as_it_lies ? adapter.shrink : words, x.depth};
  const Block block = block_for(x.type, job.words);
  const int64_t ranks = std::min(kColumns, adapter.rank - item.rank);
  const Tail none[kRows];
  for (int64_t i = item.span->lo; i < item.span->hi; i += kRows) {
    const int64_t rows = std::min(kRows, item.span->hi - i);
    float sums[kColumns * kRows];
    block(sides, i, rows, as_it_lies ? item.rank : 0, none, false, sums);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < ranks; ++j) {
        const float s = sums[j * kRows + r] * adapter.scale;
        char* to = s_row(job, i + r, item.term->s_column + item.rank + j);
        operand::with_element(job.words, [&](auto element) {
          using E = decltype(element);
          E::store(reinterpret_cast<typename E::type*>(to), 1, round_s(job, _mm512_set1_ps(s)));
        });
      }
    }
  }
}

void shrink_all(const Job& job) {
  std::vector<Shrink> items;
  int64_t products = 0;
  for (const Product& product : job.products) {
    const Term& term = product.terms[0];
    for (const Span& span : job.rows->spans) {
      if (span.adapter < 0) continue;
      for (int64_t r = 0; r < term.adapters[span.adapter].rank; r += kColumns) items.push_back({&term, &span, r});
      products += (span.hi - span.lo) * term.adapters[span.adapter].rank * job.lefts[0].depth;
    }
  }
  if (items.empty()) return;
  in_parts(int64_t(items.size()), products, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) shrink(job, items[i]);
  });
}

// Columns [first, first + count) of all rows of one product.
class Strip {
 public:
  explicit Strip(const Job& job) : job_(job), sums_(job.rows->count * kWide), bias_(kWide) {}

  void run(const Product& product, int64_t first, int64_t count) {
    const Matrix& x = job_.lefts[0];
    const Term& term = product.terms[0];
    const Sides sides{x, term.right, x.depth};
    const Block block = block_for(x.type, x.type);
    std::vector<Tail> tails(job_.rows->count);
    for (int64_t at = 0; at < count; at += kColumns) {
      read_adapters(term, first + at, tails);
      const bool more = first + at + 2 * kColumns <= term.right.rows;
      for (int64_t i = 0; i < job_.rows->count; i += kRows) {
        float sums[kColumns * kRows];
        const int64_t rows = std::min(kRows, job_.rows->count - i);
        block(sides, i, rows, first + at, tails.data() + i, more && i == 0, sums);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < kColumns; ++j) sums_.data[(i + r) * kWide + at + j] = sums[j * kRows + r];
        }
      }
    }
    operand::with_element(product.out.type, [&](auto element) { store<decltype(element)>(product.out, first, count); });
  }

 private:
  // The words of B for six columns, of every adapter in use.
  void read_adapters(const Term& term, int64_t column, std::vector<Tail>& tails) {
    size_t size = 0;
    for (const Span& span : job_.rows->spans) {
      if (span.adapter >= 0)
        size += kColumns * kStepWords * operand::steps(job_.words, term.adapters[span.adapter].rank);
    }
    if (size == 0) return;
    words_.resize(size);
    size_t at = 0;
    for (const Span& span : job_.rows->spans) {
      if (span.adapter < 0 || term.adapters[span.adapter].rank == 0) continue;
      const Matrix& b = term.adapters[span.adapter].expand;
      const int64_t steps = operand::steps(job_.words, b.depth);
      to_words(job_, b, column, kColumns, words_.data() + at);
      for (int64_t i = span.lo; i < span.hi; ++i) {
        tails[i] = {reinterpret_cast<const uint32_t*>(s_row(job_, i, term.s_column)), words_.data() + at, steps};
      }
      at += size_t(kColumns * steps * kStepWords);
    }
  }

  template <typename E>
  void store(const Output& out, int64_t first, int64_t count) {
    using T = typename E::type;
    for (int64_t at = 0; out.bias != nullptr && at < count; at += 16) {
      const __mmask16 there = operand::first16(count - at);
      _mm512_mask_storeu_ps(bias_.data + at, there, E::load(static_cast<const T*>(out.bias) + first + at, there));
    }
    for (const Span& span : job_.rows->spans) {
      for (int64_t i = span.lo; i < span.hi; ++i) {
        T* to = static_cast<T*>(out.data) + job_.rows->row(i) * out.stride + first;
        for (int64_t at = 0; at < count; at += 16) {
          const __mmask16 there = operand::first16(count - at);
          __m512 x = _mm512_maskz_loadu_ps(there, sums_.data + i * kWide + at);
          if (out.bias != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(there, bias_.data + at));
          if (span.adapter == kOutside) x = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
          E::store(to + at, there, x);
        }
      }
    }
  }

  const Job& job_;
  Buffer<float> sums_, bias_;
  std::vector<uint32_t> words_;
};

bool along(const Job& job) {
  for (const Product& product : job.products) {
    const Term& term = product.terms[0];
    if (!term.right.along) return false;
    for (const Adapter& adapter : term.adapters) {
      if (adapter.rank > 0 && !(adapter.shrink.along && adapter.expand.along)) return false;
    }
  }
  return job.lefts[0].depth > 0;
}

}  // namespace

bool shrink_few(const Job& job) {
  if (!along(job)) return false;
  std::fill_n(static_cast<char*>(job.s), job.rows->count * s_row_bytes(job), 0);
  shrink_all(job);
  return true;
}

bool multiply_few(const Job& job) {
  if (!shrink_few(job)) return false;
  const int64_t rows = job.rows->count;
  std::vector<int64_t> ends{0};  // of each product's strips of kWide columns
  int64_t products = 0;
  for (const Product& product : job.products) {
    ends.push_back(ends.back() + (product.out.columns + kWide - 1) / kWide);
    products += rows * product.out.columns * job.lefts[0].depth;
  }
  in_parts(ends.back(), products, [&](int64_t lo, int64_t hi) {
    Strip strip(job);
    for (size_t p = 0; p < job.products.size(); ++p) {
      for (int64_t i = std::max(lo, ends[p]); i < std::min(hi, ends[p + 1]); ++i) {
        const int64_t first = (i - ends[p]) * kWide;
        strip.run(job.products[p], first, std::min(kWide, job.products[p].out.columns - first));
      }
    }
  });
  return true;
}

}  // namespace lora

#pragma GCC pop_options

#endif
