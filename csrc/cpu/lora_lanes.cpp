// The product of some rows, too many for dots and too few to pack W for: a strip of W that the second-level cache holds
// meets one chunk of rows, packed as lanes, after the other (lora_strip.h).
#include "lora_strip.h"

#ifdef BF16_TILES

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

constexpr int64_t kChunk = 4;  // steps packed at a time by more: lines of the cache that lie together

// Calls for rows [first, first + count) of a matrix.
void fetch_rows(const Matrix& m, int64_t first, int64_t count) {
  const int64_t size = element_bytes(m.type);
  for (int64_t i = first; i < std::min(first + count, m.rows); ++i) {
    const char* row = static_cast<const char*>(m.data) + i * m.stride * size;
    for (int64_t at = 0; at < m.depth * size; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
  }
}

// All products, cut into equal parts of their columns: the vector unit is what takes the time.
class Parts {
 public:
  explicit Parts(const Job& job) : job_(job), chunks_(chunks_of(job.lefts[0].rows)), items_(shrinks(job)) {
    const Matrix& x = job.lefts[0];
    int64_t products = 0;
    for (const Product& product : job.products) {
      ends_.push_back(ends_.back() + (product.out.columns + kLanes - 1) / kLanes);
      products += x.rows * product.out.columns * x.depth;
    }
    tasks_ = tasks_for(products, ends_.back());
    steps_ = operand::steps(Type::bf16, x.depth);
    for (const Chunk& chunk : chunks_) words_ += chunk.vectors * steps_ * kStepWords * kLanes;
  }

  void run() {
    const bool alone = tasks_ <= kAlone;
    uint32_t* common = alone ? nullptr : kept<uint32_t>(words_);
    const int64_t lines = (steps_ + kChunk - 1) / kChunk;
    Phase packing(alone ? 0 : lines * int64_t(chunks_.size())), shrinking(tasks_), multiplying(tasks_);
    in_tasks(tasks_, [&] {
      const int64_t part = multiplying.take();
      fetch(part);
      const std::vector<Chunk> chunks = packed_at(alone ? kept<uint32_t>(words_) : common);
      for (size_t c = 0; alone && c < chunks.size(); ++c) pack_steps(chunks[c], 0, steps_);
      packing.run([&](int64_t i) {
        const int64_t from = i % lines * kChunk;
        pack_steps(chunks[i / lines], from, std::min(from + kChunk, steps_));
      });
      shrinking.run([&](int64_t i) {
        for (int64_t k = item(i); k < item(i + 1); ++k) shrink(job_, job_.lefts[0], items_[k]);
      });
      packing.wait();
      shrinking.wait();
      multiply(chunks, part);
    });
  }

 private:
  // Where part i begins, of all items of the adapters and of all vectors of columns.
  int64_t item(int64_t i) const { return int64_t(items_.size()) * i / tasks_; }
  int64_t column(int64_t i) const { return ends_.back() * i / tasks_; }

  // What is read first after the packing, from far away: rows of A and of W.
  void fetch(int64_t part) const {
    for (int64_t k = item(part); k < item(part + 1); ++k) {
      const Shrink& one = items_[k];
      fetch_rows(one.term->adapters[one.span->adapter].shrink, one.rank, kColumns);
    }
    for (size_t p = 0; p < job_.products.size(); ++p) {
      const int64_t first = column(part) - ends_[p];
      if (first >= 0) fetch_rows(job_.products[p].terms[0].right, first * kLanes, kMostGroup);
    }
  }

  std::vector<Chunk> packed_at(uint32_t* packed) const {
    std::vector<Chunk> chunks = chunks_;
    for (Chunk& chunk : chunks) {
      chunk.x = packed;
      packed += chunk.vectors * steps_ * kStepWords * kLanes;
    }
    return chunks;
  }

  void pack_steps(const Chunk& chunk, int64_t from, int64_t to) const {
    const Matrix rows = lines_of(job_.lefts[0], chunk.lo, chunk.hi);
    with_vectors(chunk.vectors, [&](auto v) { pack<v>(rows, from, to, chunk.x); });
  }

  void multiply(const std::vector<Chunk>& chunks, int64_t part) const {
    const int64_t lo = column(part), hi = column(part + 1);
    Scratch scratch;
    for (size_t p = 0; p < job_.products.size(); ++p) {
      const Product& product = job_.products[p];
      const int64_t end = std::min((std::min(hi, ends_[p + 1]) - ends_[p]) * kLanes, product.out.columns);
      for (int64_t first = std::max<int64_t>(lo - ends_[p], 0) * kLanes; first < end; first += kWide) {
        for (const Chunk& chunk : chunks) {
          with_vectors(chunk.vectors, [&](auto v) {
            Strip<v>(job_, chunk, scratch).run(product, first, std::min(kWide, end - first));
          });
        }
      }
    }
  }

  const Job& job_;
  const std::vector<Chunk> chunks_;
  const std::vector<Shrink> items_;
  std::vector<int64_t> ends_{0};  // of each product's vectors of columns
  int64_t tasks_ = 1, steps_ = 0, words_ = 0;
};

}  // namespace

bool multiply_lanes(const Job& job) {
  if (job.words != Type::bf16 || !job.lefts[0].along) return false;
  const auto narrow = [](const Product& product) { return product.out.columns < kMostGroup; };
  if (std::any_of(job.products.begin(), job.products.end(), narrow) || !along(job)) return false;
  Parts(job).run();
  return true;
}

}  // namespace lora

#pragma GCC pop_options

#endif
