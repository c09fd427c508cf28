// What the CPU kernels of lora_linear work on: rows in an order that puts every adapter's together, products of tiles,
// and the thin products of the adapters.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "bf16_tile.h"
#include "buffer.h"
#include "operand.h"

namespace lora {

using operand::Matrix;
using operand::Type;

// Positions [lo, hi) of the order belong to one adapter, -1 being none and kOutside an index that names none.
struct Span {
  int64_t lo, hi, adapter;
};

constexpr int64_t kOutside = -2;

struct Rows {
  int64_t count = 0;
  std::vector<int32_t> order;  // position -> row; empty where they are the same
  std::vector<Span> spans;     // in order, without gaps, an adapter at most once

  const int32_t* renumbered() const { return order.empty() ? nullptr : order.data(); }
  int64_t row(int64_t position) const { return order.empty() ? position : order[position]; }
};

// One adapter's part of a term: S = scale * left * shrink^T, rounded, then S * expand^T.
struct Adapter {
  Matrix shrink, expand;
  int64_t rank;
  float scale;
};

// left [rows, depth] times right^T, right [columns, depth], and its adapters.
struct Term {
  int64_t left;  // which of the block's packed matrices
  Matrix right;
  std::vector<Adapter> adapters;
  int64_t s_column;  // where its part of a row of S begins
};

struct Output {
  void* data;
  Type type;
  int64_t columns, stride;
  const void* bias;  // of the same type, or nullptr
};

struct Product {
  std::vector<Term> terms;  // summed
  Output out;
};

// Products that share their rows. S in the unit's own elements (bf16 or fp32): [positions][s_width], given or scratch.
struct Job {
  const bf16::TileUnit* unit;
  Type words;    // bf16 or single: what a word of an operand is
  Type rounded;  // to which S is rounded
  std::vector<Matrix> lefts;
  std::vector<Product> products;
  const Rows* rows;
  int64_t s_width;  // a multiple of 32, as every s_column
  void* s;
};

// Into how many parts a depth is cut, nearly equal ones: both operands' part lies in the first-level cache. A call of
// the fp32 unit forms its sums apart, so several calls keep the chains short.
inline int64_t chunks(const bf16::TileUnit& unit, Type words, int64_t steps) {
  const int64_t most = unit.isa == bf16::Isa::amx ? 11 : 8,
                least = words == Type::single ? std::min<int64_t>(4, steps) : 0;
  return std::max(least, (steps + most - 1) / most);
}

void multiply(const Job& job);

// The same for few rows and one term a product; false where it is not made for the layout, and nothing is done.
bool multiply_few(const Job& job);

// The same for some rows, enough to fill vectors: bf16 only.
bool multiply_lanes(const Job& job);

// Whether every matrix of either of them lies along the depth, but for x.
bool along(const Job& job);

// S of one adapter's rows and some of its ranks: what there is to do once S is zeroed, and the doing of it, with rows
// of x that are words already.
struct Shrink {
  const Term* term;
  const Span* span;
  int64_t rank;
};

std::vector<Shrink> shrinks(const Job& job);
void shrink(const Job& job, const Matrix& x, const Shrink& item);

// out [rank, columns] = left^T right over positions [lo, hi), both [positions, ...]; transposed: out is [columns,
// rank].
struct Outer {
  Matrix left, right;  // rank, columns of them along the rows
  int64_t lo, hi;
  void* out;
  Type type;
  int64_t stride;
  bool transposed;
};

void multiply_outer(const bf16::TileUnit& unit, Type words, const std::vector<Outer>& outers);

#ifdef BF16_TILES

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

inline int64_t element_bytes(Type type) { return type == Type::single ? 4 : 2; }

inline int64_t s_row_bytes(const Job& job) { return job.s_width * element_bytes(job.words); }

inline char* s_row(const Job& job, int64_t position, int64_t column) {
  return static_cast<char*>(job.s) + position * s_row_bytes(job) + column * element_bytes(job.words);
}

// S to x's dtype, where its elements are wider than that.
LANES __m512 round_s(const Job& job, __m512 s) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return job.rounded == Type::half ? _mm512_cvtph_ps(_mm512_cvtps_ph(s, kNearest)) : s;
}

// Threads up to which each packs all rows for itself: what another has just written is slow to come by.
constexpr int64_t kAlone = 4;

constexpr int64_t kOneThread = 1 << 19;  // products that are not worth a second thread

inline int64_t tasks_for(int64_t products, int64_t items) {
  const int64_t worth = std::max<int64_t>(1, products / kOneThread);
  return std::min({worth, int64_t(torch::stable::get_num_threads()), items});
}

// f(i) for i in [0, items), cut evenly.
template <typename F>
inline void in_parts(int64_t items, int64_t products, const F& f) {
  const int64_t tasks = tasks_for(products, items);
  if (tasks <= 1) return f(0, items);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; ++t) f(items * t / tasks, items * (t + 1) / tasks);
  });
}

// Items that tasks take in turns, for items whose time depends on whose caches are near, and for tasks with several
// phases: they go on when all items are done, and need not all run at the same time.
class Phase {
 public:
  explicit Phase(int64_t items) : items_(items) {}

  // The next item that nobody has taken, at last `items` or more.
  int64_t take() { return taken_.fetch_add(1, std::memory_order_relaxed); }

  template <typename F>
  void run(const F& f) {
    for (int64_t i = take(); i < items_; i = take()) {
      const Done done{done_};
      f(i);
    }
  }

  void wait() const {
    for (int64_t i = 0; done_.load(std::memory_order_acquire) < items_; ++i) {
      if (i < kPatience) _mm_pause();
      if (i >= kPatience) std::this_thread::yield();
    }
  }

 private:
  struct Done {  // even where f throws: others wait
    std::atomic<int64_t>& count;
    ~Done() { count.fetch_add(1, std::memory_order_release); }
  };

  static constexpr int64_t kPatience = 1000;
  const int64_t items_;
  std::atomic<int64_t> taken_{0}, done_{0};
};

// f() in each of so many tasks.
template <typename F>
inline void in_tasks(int64_t tasks, const F& f) {
  if (tasks <= 1) return f();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; ++t) f();
  });
}

}  // namespace

#pragma GCC pop_options

#endif

}  // namespace lora
