// Gradients of the adapters: sums over the rows of one adapter, dA = dS^T X and dB^T = S^T dY. The rank is the tile's
// rows, features its lanes, so the wide operand is packed as it lies; rows are summed in their order, whole, by one
// task: the same bits on any number of threads.
#include "lora_ahead.h"
#include "lora_job.h"

#ifdef BF16_TILES

#include <torch/csrc/stable/ops.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using operand::kStep;
using operand::kStepWords;
using operand::kTile;
using operand::kTileSums;

constexpr int64_t kStepsPacked = 8;  // of rows, packed at a time
constexpr int64_t kPanels = 8;       // of 32 features, at most, packed at a time
constexpr int64_t kTasks = 4;        // for each thread, at least

// A tile into rows, or into columns, of any type.
template <typename E>
void store(const float* tile, int64_t rows, int64_t columns, bool transposed, typename E::type* out, int64_t stride) {
  if (!transposed) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t at = 0; at < columns; at += 16) {
        E::store(out + i * stride + at, operand::first16(columns - at), _mm512_loadu_ps(tile + i * kTile + at));
      }
    }
    return;
  }
  for (int64_t at = 0; at < rows; at += 16) {
    for (int64_t half = 0; half < columns; half += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + (at + i) * kTile + half);
      lanes::transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (half + i >= columns) continue;
        E::store(out + (half + i) * stride + at, operand::first16(rows - at), _mm512_castsi512_ps(r[i]));
      }
    }
  }
}

void store_tile(const Outer& outer, const float* tile, int64_t rank, int64_t column) {
  const int64_t rows = std::min(kTile, outer.left.rows - rank), columns = std::min(kTile, outer.right.rows - column);
  operand::with_element(outer.type, [&](auto element) {
    using E = decltype(element);
    const int64_t at = outer.transposed ? column * outer.stride + rank : rank * outer.stride + column;
    store<E>(tile, rows, columns, outer.transposed, static_cast<typename E::type*>(outer.out) + at, outer.stride);
  });
}

// Panels [first, first + count) of features, to be followed by as many of `others`; left is packed as
// [rank / 32][steps].
void some_panels(const bf16::TileUnit& unit, Type words, const Outer& outer, const uint32_t* left, int64_t first,
                 int64_t count, int64_t others, uint32_t* right, float (*sums)[kTileSums]) {
  const int64_t depth = outer.hi - outer.lo, steps = operand::steps(words, depth),
                ranks = operand::tiles(outer.left.rows), step = kStepWords * operand::per_word(words);
  const auto width = [&](int64_t panel, int64_t panels) {
    return std::min(panels * kTile, outer.right.rows - panel * kTile);
  };
  std::fill_n(sums[0], ranks * count * kTileSums, 0.0f);
  for (int64_t begin = 0; begin < steps; begin += kStepsPacked) {
    const int64_t held = std::min(kStepsPacked, steps - begin), from = begin * step, next = from + held * step;
    operand::right(words, outer.right, first * kTile, width(first, count), right, outer.lo + from,
                   std::min(depth, next) - from);
    const int64_t parts = chunks(unit, words, held), calls = parts * ranks * count, most = kStepsPacked * step;
    Ahead ahead = next < depth ? Ahead(outer.right, first * kTile, width(first, count), outer.lo + next,
                                       std::min(depth - next, most), calls)
                               : Ahead(outer.right, (first + count) * kTile, width(first + count, others), outer.lo,
                                       std::min(depth, most), calls);
    for (int64_t c = 0; c < parts; ++c) {
      const int64_t s = held * c / parts, n = held * (c + 1) / parts - s;
      for (int64_t r = 0; r < ranks; ++r) {
        const bf16::Corner corner{outer.left.rows - r * kTile, kTile};
        for (int64_t j = 0; j < count; ++j) {
          ahead.fetch();
          unit.corner(left + (r * steps + begin + s) * kStep, right + (j * held + s) * kStep, n * kStepWords,
                      sums[r * count + j], true, corner);
        }
      }
    }
  }
  for (int64_t r = 0; r < ranks; ++r) {
    for (int64_t j = 0; j < count; ++j) store_tile(outer, sums[r * count + j], r * kTile, (first + j) * kTile);
  }
}

}  // namespace

void multiply_outer(const bf16::TileUnit& unit, Type words, const std::vector<Outer>& outers) {
  struct Task {
    size_t outer;
    int64_t first, count;
  };
  std::vector<int64_t> offsets;
  std::vector<std::pair<size_t, int64_t>> strips;  // of left matrices: which one, which 32 of its ranks
  std::vector<Task> tasks;
  int64_t size = 0, most = 1, panels = 0;
  for (size_t o = 0; o < outers.size(); ++o) {
    const Outer& outer = outers[o];
    const int64_t ranks = operand::tiles(outer.left.rows);
    panels += operand::tiles(outer.right.rows);
    offsets.push_back(size);
    size += ranks * operand::steps(words, outer.hi - outer.lo) * kStep;
    most = std::max(most, ranks);
    for (int64_t r = 0; r < ranks; ++r) strips.push_back({o, r});
  }
  const int64_t each = std::clamp<int64_t>(panels / (kTasks * torch::stable::get_num_threads()), 1, kPanels);
  for (size_t o = 0; o < outers.size(); ++o) {
    const int64_t own = operand::tiles(outers[o].right.rows), parts = (own + each - 1) / each;
    for (int64_t i = 0; i < parts; ++i) tasks.push_back({o, own * i / parts, own * (i + 1) / parts - own * i / parts});
  }
  Buffer<uint32_t> left(size + 1);
  torch::stable::parallel_for(0, int64_t(strips.size()), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const auto [o, r] = strips[i];
      const Outer& outer = outers[o];
      const int64_t depth = outer.hi - outer.lo;
      uint32_t* to = left.data + offsets[o] + r * operand::steps(words, depth) * kStep;
      operand::left(words, outer.left, r * kTile, to, outer.lo, depth);
    }
  });
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t lo, int64_t hi) {
    Buffer<uint32_t> right(each * kStepsPacked * kStep);
    Buffer<float[kTileSums]> sums(most * each);
    unit.begin();
    for (int64_t i = lo; i < hi; ++i) {
      const Task& task = tasks[i];
      const bool follows = i + 1 < hi && tasks[i + 1].outer == task.outer;
      some_panels(unit, words, outers[task.outer], left.data + offsets[task.outer], task.first, task.count,
                  follows ? tasks[i + 1].count : 0, right.data, sums.data);
    }
    unit.end();
  });
}

}  // namespace lora

#pragma GCC pop_options

#endif
