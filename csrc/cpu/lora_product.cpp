// Products of tiles with the adapters of each row: a 32 x 32 tile of fp32 sums is made from packed operands, every
// adapter that a row of the tile has is added to its own rows, and the tile is rounded once on its way out.
//
// A row's sums do not look at the tile's other rows: each adapter's product is formed apart and added to its own rows
// only. The bits of a row depend on nothing beside it.
#include "lora_ahead.h"
#include "lora_job.h"

#ifdef BF16_TILES

#include <torch/csrc/stable/ops.h>

#include <limits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using operand::kStep;
using operand::kStepWords;
using operand::kTile;
using operand::kTileSums;

constexpr int64_t kPanelBytes = 768 << 10;  // of packed columns held at a time, in the second-level cache
constexpr int64_t kMostPanels = 10;
constexpr int64_t kPassSteps = 80;  // of depth in one pass over the rows: deeper columns would not fit there
constexpr int64_t kLeftBytes = int64_t(16) << 20;  // of packed rows held at a time

// Positions [first, first + rows) of the job, packed.
struct Block {
  const Job& job;
  int64_t first, rows;
  std::vector<int64_t> steps, offsets;  // of each left matrix: steps of its depth, where it begins in `packed`
  uint32_t* packed;

  int64_t row_tiles() const { return operand::tiles(rows); }
  uint32_t* left(int64_t which, int64_t tile) const { return packed + offsets[which] + tile * steps[which] * kStep; }
  // f(lo, hi, adapter) for the spans of a tile, rows [lo, hi) of it.
  template <typename F>
  void spans(int64_t tile, const F& f) const {
    const int64_t begin = first + tile * kTile, end = std::min(begin + kTile, first + rows);
    const std::vector<Span>& all = job.rows->spans;
    auto span = std::upper_bound(all.begin(), all.end(), begin, [](int64_t at, const Span& s) { return at < s.hi; });
    for (; span != all.end() && span->lo < end; ++span) {
      f(std::max(span->lo, begin) - begin, std::min(span->hi, end) - begin, span->adapter);
    }
  }
};

// The panels of one adapter's matrix, packed anew when the adapter changes: rows come sorted, so once for each.
struct PackedAdapter {
  std::vector<uint32_t> unaligned;
  int64_t held = -1;

  uint32_t* data() {
    const auto at = reinterpret_cast<uintptr_t>(unaligned.data());
    return unaligned.data() + (64 - at % 64) % 64 / sizeof(uint32_t);
  }
  const uint32_t* get(const Job& job, int64_t adapter, const Matrix& m, int64_t first, int64_t count) {
    if (adapter != held) {
      const size_t size = size_t(operand::tiles(count) * operand::steps(job.words, m.depth) * kStep + 16);
      if (unaligned.size() < size) unaligned.resize(size);
      operand::right(job.words, m, first, count, data());
      held = adapter;
    }
    return data();
  }
};

// 32 sums of S, scaled and rounded, the first `valid` of them; zeros beyond.
void store_s(const Job& job, const float* sums, float scale, int64_t valid, void* to) {
  const __m512 by = _mm512_set1_ps(scale);
  __m512 low = _mm512_mul_ps(_mm512_maskz_loadu_ps(operand::first16(valid), sums), by);
  __m512 high = _mm512_mul_ps(_mm512_maskz_loadu_ps(operand::first16(valid - 16), sums + 16), by);
  if (job.words == Type::bf16) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    return;
  }
  low = round_s(job, low), high = round_s(job, high);
  _mm512_storeu_ps(to, low);
  _mm512_storeu_ps(static_cast<float*>(to) + 16, high);
}

// S of one tile and one term.
void shrink(const Block& block, const Term& term, int64_t tile, PackedAdapter& held, float (*sums)[kTileSums]) {
  const Job& job = block.job;
  const int64_t steps = block.steps[term.left], position = block.first + tile * kTile;
  const uint32_t* left = block.left(term.left, tile);
  block.spans(tile, [&](int64_t lo, int64_t hi, int64_t e) {
    if (e < 0 || term.adapters[e].rank == 0) return;
    const Adapter& adapter = term.adapters[e];
    const uint32_t* right = held.get(job, e, adapter.shrink, 0, adapter.rank);
    const int64_t panels = operand::tiles(adapter.rank);
    if (steps == 0) std::fill_n(sums[0], panels * kTileSums, 0.0f);
    const int64_t parts = chunks(*job.unit, job.words, steps);
    for (int64_t c = 0; c < parts; ++c) {
      const int64_t s = steps * c / parts, n = steps * (c + 1) / parts - s;
      for (int64_t j = 0; j < panels; ++j) {
        const bf16::Corner corner{hi, adapter.rank - j * kTile};
        job.unit->corner(left + s * kStep, right + (j * steps + s) * kStep, n * kStepWords, sums[j], s > 0, corner);
      }
    }
    for (int64_t j = 0; j < panels; ++j) {
      for (int64_t i = lo; i < hi; ++i) {
        store_s(job, sums[j] + i * kTile, adapter.scale, adapter.rank - j * kTile,
                s_row(job, position + i, term.s_column + j * kTile));
      }
    }
  });
}

// Packs the rows of a block and takes each to its S.
void prepare(const Block& block) {
  const Job& job = block.job;
  std::vector<const Term*> adapted;
  int64_t widest = 1;
  for (const Product& product : job.products) {
    for (const Term& term : product.terms) {
      int64_t rank = 0;
      for (const Adapter& adapter : term.adapters) rank = std::max(rank, adapter.rank);
      if (rank > 0) adapted.push_back(&term);
      widest = std::max(widest, operand::tiles(rank));
    }
  }
  torch::stable::parallel_for(0, block.row_tiles(), 1, [&](int64_t lo, int64_t hi) {
    std::vector<PackedAdapter> held(adapted.size());
    Buffer<float[kTileSums]> sums(widest);
    job.unit->begin();
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t position = block.first + i * kTile, rows = std::min(kTile, block.rows - i * kTile);
      for (size_t which = 0; which < job.lefts.size(); ++which) {
        Matrix m = job.lefts[which];
        m.rows = block.first + block.rows;
        operand::left(job.words, m, position, block.left(int64_t(which), i));
      }
      if (job.s_width > 0) {
        std::fill_n(static_cast<char*>(s_row(job, position, 0)), rows * s_row_bytes(job), 0);
      }
      for (size_t t = 0; t < adapted.size(); ++t) shrink(block, *adapted[t], i, held[t], sums.data);
    }
    job.unit->end();
  });
}

// Where store_rows will write, for ownership of its cache lines.
template <typename E>
void fetch_rows(const Block& block, const Output& out, int64_t tile, int64_t column, int64_t count) {
  for (int64_t i = tile * kTile; i < std::min(block.rows, (tile + 1) * kTile); ++i) {
    auto* to = static_cast<typename E::type*>(out.data) + block.job.rows->row(block.first + i) * out.stride + column;
    const auto* end = reinterpret_cast<const char*>(to + count);
    for (const char* p = reinterpret_cast<const char*>(to); p < end; p += 64) __builtin_prefetch(p, 1, 3);
  }
}

// Rows of tiles beside each other, with a bias, to where the rows belong.
template <typename E>
void store_rows(const Block& block, const Output& out, const float (*sums)[kTileSums], int64_t tile, int64_t column,
                int64_t count, const float* bias) {
  const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
  block.spans(tile, [&](int64_t lo, int64_t hi, int64_t adapter) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t row = block.job.rows->row(block.first + tile * kTile + i);
      auto* to = static_cast<typename E::type*>(out.data) + row * out.stride + column;
      for (int64_t at = 0; at < count; at += kTile) {
        const float* from = sums[at / kTile] + i * kTile;
        __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + 16);
        if (bias != nullptr) {
          low = _mm512_add_ps(low, _mm512_load_ps(bias + at)),
          high = _mm512_add_ps(high, _mm512_load_ps(bias + at + 16));
        }
        if (adapter == kOutside) low = high = nan;
        if (count - at >= kTile) {
          E::store(to + at, low, high);
        } else {
          E::store(to + at, operand::first16(count - at), low);
          E::store(to + at + 16, operand::first16(count - at - 16), high);
        }
      }
    }
  });
}

// Some steps of a term's depth; `at`: words of the pass before it, for one column tile.
struct Part {
  size_t term;
  int64_t from, steps, at;
};

// The depth of all terms, one after the other, in nearly equal passes. Whatever else there is to do, it is cut alike.
std::vector<std::vector<Part>> passes_of(const Block& block, const Product& product) {
  int64_t all = 0, before = 0;
  for (const Term& term : product.terms) all += block.steps[term.left];
  const int64_t count = std::max<int64_t>(1, (all + kPassSteps - 1) / kPassSteps);
  std::vector<std::vector<Part>> passes(count);
  for (size_t t = 0; t < product.terms.size(); ++t) {
    const int64_t steps = block.steps[product.terms[t].left];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = all * i / count;
      const int64_t lo = std::max(begin, before), hi = std::min(all * (i + 1) / count, before + steps);
      if (lo < hi) passes[i].push_back({t, lo - before, hi - lo, (lo - begin) * kStep});
    }
    before += steps;
  }
  return passes;
}

// The tiles of some rows and columns of one product.
class Region {
 public:
  Region(const Block& block, const Product& product)
      : block_(block), product_(product), passes_(passes_of(block, product)), held_(product.terms.size()) {
    int64_t rank = 1;
    for (const Term& term : product.terms) {
      for (const Adapter& adapter : term.adapters) rank = std::max(rank, adapter.rank);
    }
    for (const auto& pass : passes_) {
      if (!pass.empty()) panel_ = std::max(panel_, pass.back().at + pass.back().steps * kStep);
    }
    group_ = std::clamp<int64_t>(kPanelBytes / (4 * std::max<int64_t>(panel_, 1)), 2, kMostPanels);
    rank_steps_ = operand::steps(block.job.words, rank);
  }

  void run(int64_t first_tile, int64_t last_tile, int64_t first_column, int64_t last_column) {
    const int64_t columns = last_column - first_column, tiles = last_tile - first_tile;
    // equal groups
    const int64_t groups = (columns + group_ - 1) / group_, group = (columns + groups - 1) / groups;
    // between passes the sums of all tiles are kept
    Buffer<float[kTileSums]> sums(group * (passes_.size() > 1 ? tiles : 1)), own(1);
    Buffer<uint32_t> packed(group * panel_ + 1), s(rank_steps_ * kStep);
    Buffer<float> bias(group * kTile);
    packed_ = packed.data, s_ = s.data, own_ = own.data, bias_ = bias.data;
    block_.job.unit->begin();
    for (int64_t g = 0; g < groups; ++g) {
      first_ = first_column + columns * g / groups;
      const int64_t next = first_column + columns * (g + 1) / groups,
                    beyond = first_column + columns * (g + 2) / groups;
      count_ = next - first_;
      load_bias();
      for (held_.assign(held_.size(), {}), pass_ = 0; pass_ < passes_.size(); ++pass_) {
        const bool last = pass_ + 1 == passes_.size();
        pack_columns();
        look_ahead(g + 1 < groups ? beyond - next : 0, tiles);
        for (int64_t i = first_tile; i < last_tile; ++i) {
          sums_ = sums.data + (passes_.size() > 1 ? (i - first_tile) * group : 0);
          if (last) fetch(i);
          base(i);
          if (last) finish(i);
        }
      }
    }
    block_.job.unit->end();
  }

 private:
  int64_t width() const { return std::min(count_ * kTile, product_.out.columns - first_ * kTile); }

  void load_bias() {
    if (product_.out.bias == nullptr) return;
    operand::with_element(product_.out.type, [&](auto element) {
      using E = decltype(element);
      const auto* from = static_cast<const typename E::type*>(product_.out.bias) + first_ * kTile;
      for (int64_t at = 0; at < width(); at += 16) {
        _mm512_storeu_ps(bias_ + at, E::load(from + at, operand::first16(width() - at)));
      }
    });
  }

  // The elements of a part's depth, and how many come before it in the term's.
  std::pair<int64_t, int64_t> elements_of(const Part& part) const {
    const int64_t each = kStepWords * operand::per_word(block_.job.words);
    return {part.from * each, std::min(part.steps * each, product_.terms[part.term].right.depth - part.from * each)};
  }

  void pack_columns() {
    for (const Part& part : passes_[pass_]) {
      const auto [from, depth] = elements_of(part);
      operand::right(block_.job.words, product_.terms[part.term].right, first_ * kTile, width(),
                     packed_ + part.at * count_, from, depth);
    }
  }

  // The columns that come next: of the next pass, or of the next group, `columns` of them, in its first.
  void look_ahead(int64_t columns, int64_t tiles) {
    const bool last = pass_ + 1 == passes_.size();
    const int64_t first = last ? (first_ + count_) * kTile : first_ * kTile;
    const int64_t count = last ? std::min(columns * kTile, product_.out.columns - first) : width();
    int64_t calls = 0;
    for (const Part& part : passes_[pass_])
      calls += tiles * count_ * chunks(*block_.job.unit, block_.job.words, part.steps);
    ahead_.clear();
    for (const Part& part : passes_[last ? 0 : pass_ + 1]) {
      const auto [from, depth] = elements_of(part);
      ahead_.emplace_back(product_.terms[part.term].right, first, count, from, depth, calls);
    }
  }

  void base(int64_t tile) {
    bool add = pass_ > 0;
    const bf16::TileUnit& unit = *block_.job.unit;
    const int64_t rows = std::min(kTile, block_.rows - tile * kTile);
    for (const Part& part : passes_[pass_]) {
      const uint32_t* left = block_.left(product_.terms[part.term].left, tile) + part.from * kStep;
      const uint32_t* right = packed_ + part.at * count_;
      const int64_t parts = chunks(*block_.job.unit, block_.job.words, part.steps);
      for (int64_t c = 0; c < parts; ++c) {
        const int64_t s = part.steps * c / parts, n = part.steps * (c + 1) / parts - s;
        const int64_t share = (n * kStep + count_ - 1) / count_;
        for (int64_t j = 0; j < count_; ++j) {
          prefetch(left + (s + n) * kStep + j * share, share);  // the next chunk, from the third level
          for (Ahead& ahead : ahead_) ahead.fetch();
          const uint32_t* panel = right + (j * part.steps + s) * kStep;
          if (rows > 16) {
            unit.multiply(left + s * kStep, panel, n, sums_[j], add);
          } else {
            unit.corner(left + s * kStep, panel, n * kStepWords, sums_[j], add, {rows, kTile});
          }
        }
        add = true;
      }
    }
    if (!add) std::fill_n(sums_[0], count_ * kTileSums, 0.0f);
  }

  void fetch(int64_t tile) {
    operand::with_element(product_.out.type, [&](auto element) {
      fetch_rows<decltype(element)>(block_, product_.out, tile, first_ * kTile, width());
    });
  }

  void finish(int64_t tile) {
    for (size_t t = 0; t < product_.terms.size(); ++t) expand(tile, product_.terms[t], held_[t]);
    store(tile);
  }

  void expand(int64_t tile, const Term& term, PackedAdapter& held) {
    const Job& job = block_.job;
    const int64_t rows = std::min(kTile, block_.rows - tile * kTile), position = block_.first + tile * kTile;
    block_.spans(tile, [&](int64_t lo, int64_t hi, int64_t e) {
      if (e < 0 || term.adapters[e].rank == 0) return;
      const Adapter& adapter = term.adapters[e];
      const int64_t words = operand::words(job.words, adapter.rank), steps = operand::steps(job.words, adapter.rank);
      const uint32_t* right = held.get(job, e, adapter.expand, first_ * kTile, width());
      const Matrix s{s_row(job, position, term.s_column), job.words, rows, adapter.rank, job.s_width, true};
      operand::left(job.words, s, 0, s_);
      for (int64_t j = 0; j < count_; ++j) {
        job.unit->corner(s_, right + j * steps * kStep, words, own_[0], false, {hi, kTile});
        for (int64_t at = lo * kTile; at < hi * kTile; at += 16) {
          const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums_[j] + at), _mm512_load_ps(own_[0] + at));
          _mm512_store_ps(sums_[j] + at, sum);
        }
      }
    });
  }

  void store(int64_t tile) {
    operand::with_element(product_.out.type, [&](auto element) {
      store_rows<decltype(element)>(block_, product_.out, sums_, tile, first_ * kTile, width(),
                                    product_.out.bias == nullptr ? nullptr : bias_);
    });
  }

  const Block& block_;
  const Product& product_;
  const std::vector<std::vector<Part>> passes_;
  std::vector<PackedAdapter> held_;
  std::vector<Ahead> ahead_;
  int64_t panel_ = 0;  // words of a pass, for one column tile
  int64_t group_, rank_steps_, first_ = 0, count_ = 0;
  size_t pass_ = 0;
  uint32_t *packed_ = nullptr, *s_ = nullptr;
  float (*sums_)[kTileSums] = nullptr, (*own_)[kTileSums] = nullptr;
  float* bias_ = nullptr;
};

// Into how many parts rows and columns are cut for `threads`: the largest part is small, and so is what it packs.
struct Cut {
  int64_t rows, columns;
};

Cut cut(int64_t row_tiles, int64_t column_tiles, int64_t threads) {
  Cut best{1, 1};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t rows = 1; rows <= std::min(threads, row_tiles); ++rows) {
    const int64_t columns = std::min(std::max<int64_t>(1, threads / rows), column_tiles);
    const double height = double((row_tiles + rows - 1) / rows), width = double((column_tiles + columns - 1) / columns);
    const double cost = height * width + 2 * width + height / 4;
    if (cost < least) least = cost, best = {rows, columns};
  }
  return best;
}

void multiply_block(const Block& block) {
  const int64_t threads = torch::stable::get_num_threads();
  prepare(block);
  for (const Product& product : block.job.products) {
    const int64_t row_tiles = block.row_tiles(), column_tiles = operand::tiles(product.out.columns);
    if (column_tiles == 0) continue;
    const Cut parts = cut(row_tiles, column_tiles, threads);
    torch::stable::parallel_for(0, parts.rows * parts.columns, 1, [&](int64_t lo, int64_t hi) {
      Region region(block, product);
      for (int64_t part = lo; part < hi; ++part) {
        const int64_t r = part / parts.columns, c = part % parts.columns;
        region.run(row_tiles * r / parts.rows, row_tiles * (r + 1) / parts.rows, column_tiles * c / parts.columns,
                   column_tiles * (c + 1) / parts.columns);
      }
    });
  }
}

}  // namespace

void multiply(const Job& job) {
  if (job.rows->count == 0) return;
  std::vector<int64_t> steps, per_tile{0};
  for (const Matrix& left : job.lefts) {
    steps.push_back(operand::steps(job.words, left.depth));
    per_tile.push_back(per_tile.back() + steps.back() * kStep);
  }
  const int64_t tile_bytes = std::max<int64_t>(1, per_tile.back() * 4), all = operand::tiles(job.rows->count);
  const int64_t most = std::clamp<int64_t>(kLeftBytes / tile_bytes, 8, 64), blocks = (all + most - 1) / most;
  const int64_t size = (all + blocks - 1) / blocks * kTile;
  Buffer<uint32_t> packed(size / kTile * per_tile.back() + 1);
  for (int64_t first = 0; first < job.rows->count; first += size) {
    Block block{job, first, std::min(size, job.rows->count - first), steps, {}, packed.data};
    for (size_t i = 0; i < job.lefts.size(); ++i) block.offsets.push_back(per_tile[i] * block.row_tiles());
    multiply_block(block);
  }
}

}  // namespace lora

#pragma GCC pop_options

#endif
