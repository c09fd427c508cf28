// The product of few rows, as in decoding: bound by reading W, so nothing of W is packed. The rows of x lie packed, six
// at a time in the first-level cache while a strip of W, from the second level, goes past them; the strip after it is
// called for meanwhile.
#include "lora_dots.h"

#ifdef BF16_TILES

#include <limits>
#include <optional>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

constexpr int64_t kDeep = 64;             // steps of a part of the depth: six rows of x are half of the first level
constexpr int64_t kWide = 16 * kColumns;  // columns of a strip: such a part of them is a quarter of the second level
static_assert(kWide % 16 == 0);
constexpr int64_t kNear = 8 << 20;  // bytes of W

// Room for rows as words, in their order. Six lines at one depth must not fall into the same sets of the first-level
// cache, which repeat every 64 lines: rows are 11 lines apart there.
class Packed {
 public:
  Packed(const Job& job, const Matrix& m)
      : stride_(((operand::steps(job.words, m.depth) + 52) / 64 * 64 + 11) * kStepWords),
        words_(m.rows * stride_),
        from_(m),
        matrix_{words_.data, job.words, m.rows, m.depth, stride_ * operand::per_word(job.words), true} {}

  void pack(int64_t row) { to_words(matrix_.type, from_, row, 1, words_.data + row * stride_, stride_); }

  const Matrix& matrix() const { return matrix_; }

 private:
  int64_t stride_;  // words
  Buffer<uint32_t> words_;
  const Matrix& from_;
  Matrix matrix_;
};

// Columns [first, first + count) of all rows of one product.
struct Part {
  const Product* product;
  int64_t first, count;

  const void* of_w(int64_t from) const {
    const Matrix& w = product->terms[0].right;
    return static_cast<const char*>(w.data) + (first * w.stride + from) * element_bytes(w.type);
  }
};

class Strip {
 public:
  Strip(const Job& job, const Matrix& x)
      : job_(job),
        x_(x),
        depths_(blocks_of(x.rows) == 1 ? 1 : (operand::steps(job.words, x.depth) + kDeep - 1) / kDeep),
        ahead_(rows_ahead(job)),
        sums_(job.rows->count * kWide),
        lanes_(depths_ > 1 ? job.rows->count * kWide * 16 : 0),
        bias_(kWide),
        tails_(job.rows->count) {}

  // `later` is what this thread will probably be at after this part.
  void run(const Part& part, const Part& later) {
    const Term& term = part.product->terms[0];
    const Matrix& w = term.right;
    read_adapters(term, part.first, part.count);
    for (int64_t depth = 0; depth < depths_; ++depth) {
      const bool last = depth + 1 == depths_;
      const int64_t to = last ? w.depth : from(depth + 1);
      const void* next = !last ? part.of_w(to) : later.product == part.product ? later.of_w(0) : nullptr;
      const Columns columns{x_, w, part.first, part.count, from(depth), to, next, ahead_};
      int64_t turn = 0;
      in_blocks(0, job_.rows->count, [&](int64_t row, int64_t rows) {
        float* lanes = lanes_.data + row * kWide * 16;
        block_for(columns, rows)(columns, row, tails_.data() + row, turn++, lanes, sums_.data + row * kWide, kWide);
      });
    }
    const Output& out = part.product->out;
    operand::with_element(out.type, [&](auto element) { store<decltype(element)>(out, part.first, part.count); });
  }

 private:
  // Small matrices may be in the third-level cache already, from where the hardware calls for them better; of one that
  // comes from memory every row is called for.
  static int64_t rows_ahead(const Job& job) {
    const int64_t blocks = blocks_of(job.rows->count);
    int64_t bytes = 0;
    for (const Product& product : job.products) {
      const Matrix& w = product.terms[0].right;
      bytes += w.rows * w.depth * element_bytes(w.type);
    }
    if (blocks == 1) return kColumns;
    return blocks < kColumns && bytes > kNear ? 2 : 1;
  }

  int64_t from(int64_t depth) const {
    return operand::steps(job_.words, x_.depth) * depth / depths_ * kStepWords * operand::per_word(job_.words);
  }

  // Where B's rows for these columns are, of every adapter in use: words of it as they lie, or else a copy.
  void read_adapters(const Term& term, int64_t first, int64_t count) {
    const int64_t columns = (count + kColumns - 1) / kColumns * kColumns, per = operand::per_word(job_.words);
    size_t at = 0;
    for (const Span& span : job_.rows->spans) {
      if (span.adapter < 0) continue;
      const Matrix& b = term.adapters[span.adapter].expand;
      const int64_t width = operand::steps(job_.words, b.depth) * kStepWords;
      Tail tail{nullptr, static_cast<const char*>(b.data) + first * b.stride * element_bytes(b.type), b.stride,
                b.depth};
      if (b.type != job_.words || columns != count) {
        if (copies_.size() == at) copies_.emplace_back();
        std::vector<uint32_t>& copy = copies_[at++];
        copy.resize(size_t(columns * width));
        to_words(job_.words, b, first, columns, copy.data(), width);
        tail = {nullptr, copy.data(), width * per, width * per};
      }
      for (int64_t i = span.lo; i < span.hi; ++i) {
        tail.s = s_row(job_, i, term.s_column);
        tails_[i] = tail;
      }
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
  const Matrix& x_;
  const int64_t depths_, ahead_;  // parts of the depth; see Columns
  Buffer<float> sums_, lanes_, bias_;
  std::vector<Tail> tails_;
  std::vector<std::vector<uint32_t>> copies_;
};

}  // namespace

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

std::vector<Shrink> shrinks(const Job& job) {
  std::fill_n(static_cast<char*>(job.s), job.rows->count * s_row_bytes(job), 0);
  std::vector<Shrink> items;
  for (const Product& product : job.products) {
    const Term& term = product.terms[0];
    for (const Span& span : job.rows->spans) {
      const int64_t rank = span.adapter < 0 ? 0 : term.adapters[span.adapter].rank;
      for (int64_t r = 0; r < rank; r += kColumns) items.push_back({&term, &span, r});
    }
  }
  return items;
}

void shrink(const Job& job, const Matrix& x, const Shrink& item) {
  const Adapter& adapter = item.term->adapters[item.span->adapter];
  const bool as_it_lies = adapter.shrink.type == job.words;
  Matrix words{nullptr, job.words, kColumns, x.depth, 0, true};
  std::vector<uint32_t> copy;
  if (!as_it_lies) {
    const int64_t stride = operand::steps(job.words, x.depth) * kStepWords;
    copy.resize(size_t(kColumns * stride));
    to_words(job.words, adapter.shrink, item.rank, kColumns, copy.data(), stride);
    words.data = copy.data(), words.stride = stride * operand::per_word(job.words);
  }
  const Columns columns{
      x, as_it_lies ? adapter.shrink : words, as_it_lies ? item.rank : 0, kColumns, 0, x.depth, nullptr, 1};
  const __mmask16 ranks = operand::first16(std::min(kColumns, adapter.rank - item.rank));
  in_blocks(item.span->lo, item.span->hi, [&](int64_t row, int64_t rows) {
    Tail none[kRows];
    float sums[kRows * kColumns];
    block_for(columns, rows)(columns, row, none, kColumns, nullptr, sums, kColumns);
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 s = _mm512_maskz_loadu_ps(ranks, sums + i * kColumns);
      char* to = s_row(job, row + i, item.term->s_column + item.rank);
      operand::with_element(job.words, [&](auto element) {
        using E = decltype(element);
        E::store(reinterpret_cast<typename E::type*>(to), ranks,
                 round_s(job, _mm512_mul_ps(s, _mm512_set1_ps(adapter.scale))));
      });
    }
  });
}

bool multiply_few(const Job& job) {
  if (!along(job)) return false;
  std::vector<Part> parts;
  int64_t products = 0;
  for (const Product& product : job.products) {
    for (int64_t first = 0; first < product.out.columns; first += kWide) {
      parts.push_back({&product, first, std::min(kWide, product.out.columns - first)});
    }
    products += job.rows->count * product.out.columns * job.lefts[0].depth;
  }
  const int64_t tasks = tasks_for(products, int64_t(parts.size()));
  const bool alone = tasks <= kAlone;
  std::optional<Packed> common;
  if (!alone) common.emplace(job, job.lefts[0]);
  const std::vector<Shrink> items = shrinks(job);
  Phase packing(alone ? 0 : job.rows->count), shrinking(int64_t(items.size())), multiplying(int64_t(parts.size()));
  in_tasks(tasks, [&] {
    std::optional<Packed> own;
    if (alone) own.emplace(job, job.lefts[0]);
    Packed& x = alone ? *own : *common;
    Strip strip(job, x.matrix());
    for (int64_t i = 0; alone && i < job.rows->count; ++i) x.pack(i);
    packing.run([&](int64_t i) { x.pack(i); });
    packing.wait();
    shrinking.run([&](int64_t i) { shrink(job, x.matrix(), items[i]); });
    shrinking.wait();
    multiplying.run([&](int64_t i) { strip.run(parts[i], parts[std::min(i + tasks, int64_t(parts.size()) - 1)]); });
  });
  return true;
}

}  // namespace lora

#pragma GCC pop_options

#endif
