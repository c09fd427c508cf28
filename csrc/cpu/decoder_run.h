// A generation step of a decoder in stages that threads share: what decoder_stack.cpp has checked and laid out.
#pragma once
#include <vector>

#include "attention_run.h"
#include "decoder_lanes.h"
#include "stages.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace decoder {
namespace {

using rlhf_kernels::attention::bf16_bits;
using rlhf_kernels::attention::Operands;
using rlhf_kernels::attention::Options;
using rlhf_kernels::attention::Plan;

// What a layer's tensors are, in the order in which they come.
enum Projection { to_q, to_k, to_v, to_o, to_gate, to_up, to_down, kProjections };
enum Vectors { before_attention, before_mlp, of_q, of_k, kVectors };

// A projection and the adapter of the step's rows.
struct Linear {
  Weight w;
  const uint16_t* bias = nullptr;
  Weight a, b;
  int64_t s = 0;  // words of S before its own
};

struct Layer {
  Linear linear[kProjections];
  const uint16_t* vectors[kVectors];
  Options options;
  Operands<bf16_bits> of;  // its keys and values
  size_t plan;             // which of the step's plans fits its window
};

struct Model {
  const uint16_t* embedding;
  int64_t vocabulary, hidden, inner, heads, kv_heads, d;
  std::vector<Layer> layers;
  const uint16_t* norm;
  Weight head;
  Norm norms, head_norms;
  float scaling;
  int64_t s_words = 0;  // of all adapters of the widest group of projections
};

// The step's rows and where each goes.
struct Step {
  RowSet rows, last;  // last: whose logits are wanted
  bool all;           // which are all rows, as they come
  const int64_t *ids, *positions, *slots, *wanted;
  const uint16_t *cos, *sin;
  int64_t rotary;
  std::vector<int64_t> places;  // of each row in a layer's keys and in its values, which are laid out alike
  int64_t head_stride;          // in there
  uint16_t* logits;
};

// Memory of a step: words of [features / 2][lanes] for every chunk, and rows.
struct Scratch {
  uint32_t *h, *x, *act, *h_last, *x_last, *s;
  uint16_t *q, *out;
};

constexpr int64_t kHeadColumns = 96;  // of the logits: whole cache lines of a row
constexpr int64_t kPartsEach = 4;     // of attention for each thread, so that they end together

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

class Run {
 public:
  Run(const Model& model, const Step& step, const Scratch& memory, const std::vector<Plan>& plans, float* states,
      int64_t threads)
      : model_(model),
        step_(step),
        memory_(memory),
        plans_(plans),
        states_(states),
        parts_(threads == 1 ? 1 : kPartsEach * threads) {
    const int64_t columns = std::max({kHeadColumns, 2 * kColumns, model.d});
    sums_floats_ = 2 * columns * kMostVectors * kLanes;
    tile_floats_ = kMostVectors * kLanes * (model.d + 32) / 2;
  }

  static int64_t stages(const Model& model) { return int64_t(model.layers.size()) * 14 + 4; }

  // What every thread does.
  void go(Stages& stages) const {
    Walk walk(stages);
    embed(walk);
    const bool all = step_.all;
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const Layer& layer = model_.layers[i];
      const bool last = !all && i + 1 == model_.layers.size();
      const RowSet& rows = last ? step_.last : step_.rows;
      uint32_t *h = last ? memory_.h_last : memory_.h, *x = last ? memory_.x_last : memory_.x;
      norm(walk, step_.rows, layer.vectors[before_attention], memory_.h, memory_.x);
      if (last) gather(walk, layer.vectors[before_attention]);
      shrink(walk, layer, to_k, to_v, step_.rows, memory_.x, model_.hidden);
      shrink(walk, layer, to_q, to_q, rows, x, model_.hidden);
      project(walk, layer, rows, x);
      if (rows.rows == 0) return;
      attend(walk, layer, plans_[layer.plan]);
      pack(walk, rows, x);
      shrink(walk, layer, to_o, to_o, rows, x, model_.heads * model_.d);
      add(walk, layer.linear[to_o], rows, x, h);
      norm(walk, rows, layer.vectors[before_mlp], h, x);
      shrink(walk, layer, to_gate, to_up, rows, x, model_.hidden);
      gate(walk, layer, rows, x);
      shrink(walk, layer, to_down, to_down, rows, memory_.act, model_.inner);
      add(walk, layer.linear[to_down], rows, memory_.act, h);
    }
    norm(walk, step_.last, model_.norm, all ? memory_.h : memory_.h_last, memory_.x_last);
    head(walk);
  }

 private:
  // Words of a matrix of `words` features / 2, at a chunk.
  static uint32_t* at(uint32_t* m, const Chunk& chunk, int64_t words) { return m + chunk.before * words; }

  template <typename F>
  void each_vector(Walk& walk, const RowSet& rows, const F& f) const {
    walk.run(rows.lanes / kLanes, [&](int64_t i) {
      const Chunk& chunk = rows.chunk_of(i);
      f(chunk, i - chunk.before / kLanes);
    });
  }

  void embed(Walk& walk) const {
    const int64_t words = model_.hidden / 2;
    each_vector(walk, step_.rows, [&](const Chunk& chunk, int64_t v) {
      const int64_t lo = chunk.lo + v * kLanes;
      load_words([&](int64_t i) { return model_.embedding + step_.ids[lo + i] * model_.hidden; },
                 std::min(kLanes, step_.rows.rows - lo), words, at(memory_.h, chunk, words) + v * kLanes,
                 chunk.width());
    });
  }

  void norm(Walk& walk, const RowSet& rows, const uint16_t* weight, uint32_t* h, uint32_t* x) const {
    const int64_t words = model_.hidden / 2;
    each_vector(walk, rows, [&](const Chunk& chunk, int64_t v) {
      const uint32_t* from = at(h, chunk, words) + v * kLanes;
      const int64_t width = chunk.width();
      norm_words([&](int64_t k) __attribute__((always_inline)) { return _mm512_loadu_si512(from + k * width); }, weight,
                 words, model_.norms, at(x, chunk, words) + v * kLanes, width);
    });
  }

  // The wanted rows, out of all, and their norm.
  void gather(Walk& walk, const uint16_t* weight) const {
    const int64_t words = model_.hidden / 2;
    each_vector(walk, step_.last, [&](const Chunk& chunk, int64_t v) {
      int64_t from[kLanes] = {}, step[kLanes] = {};
      const int64_t lo = chunk.lo + v * kLanes;
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = step_.wanted[std::min(lo + i, step_.last.rows - 1)];
        const Chunk& there = step_.rows.chunk_of(row / kLanes);
        from[i] = there.before * words + row - there.before, step[i] = there.width();
      }
      uint32_t* to = at(memory_.h_last, chunk, words) + v * kLanes;
      for (int64_t k = 0; k < words; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) to[k * chunk.width() + i] = memory_.h[from[i] + k * step[i]];
      }
      norm_words([&](int64_t k) { return _mm512_loadu_si512(to + k * chunk.width()); }, weight, words, model_.norms,
                 at(memory_.x_last, chunk, words) + v * kLanes, chunk.width());
    });
  }

  // S of the adapters of some projections that read x.
  void shrink(Walk& walk, const Layer& layer, int first, int last, const RowSet& rows, const uint32_t* x,
              int64_t features) const {
    if (model_.s_words == 0) return;
    const auto chunks = int64_t(rows.chunks.size());
    walk.run((last - first + 1) * chunks, [&](int64_t item) {
      const Linear& linear = layer.linear[first + item / chunks];
      if (linear.a.rows == 0) return;
      const Chunk& chunk = rows.chunks[size_t(item % chunks)];
      float* sums = kept<float>(sums_floats_ + tile_floats_);
      with_vectors(chunk.vectors, [&](auto v) {
        for (int64_t r = 0; r < linear.a.rows; r += kColumns) {
          const int64_t count = std::min(kColumns, linear.a.rows - r);
          multiply<v>(linear.a, r, count, x + chunk.before * features / 2, sums);
          store_words<v>(sums, count, model_.scaling, s_at(linear, chunk) + r / 2 * chunk.width());
        }
      });
    });
  }

  uint32_t* s_at(const Linear& linear, const Chunk& chunk) const {
    return memory_.s + (chunk.apart + chunk.before) * model_.s_words + linear.s * chunk.width();
  }

  // Columns of a projection: sums [count][V * 16], with what the adapter and the bias add. `more`: as large as sums.
  template <int kV>
  void columns(const Linear& linear, int64_t first, int64_t count, const Chunk& chunk, const uint32_t* x, float* sums,
               float* more) const {
    multiply<kV>(linear.w, first, count, x, sums);
    if (linear.a.rows > 0) {
      multiply<kV>(linear.b, first, count, s_at(linear, chunk), more);
      for (int64_t i = 0; i < count * kV * kLanes; i += kLanes) {
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(more + i)));
      }
    }
    for (int64_t i = 0; linear.bias != nullptr && i < count * kV; ++i) {
      float* to = sums + i * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), widen(linear.bias[first + i / kV])));
    }
  }

  // q, k and v, a head at a time: norms of heads, rotation, and where they go.
  void project(Walk& walk, const Layer& layer, const RowSet& wanted, const uint32_t* x_wanted) const {
    const int64_t words = model_.hidden / 2, q_heads = wanted.rows > 0 ? model_.heads : 0;
    walk.run(q_heads + 2 * model_.kv_heads, [&](int64_t item) {
      const int64_t i = item - q_heads;
      const Projection which = i < 0 ? to_q : i < model_.kv_heads ? to_k : to_v;
      const int64_t index = i < 0 ? item : i % model_.kv_heads;
      const bool some = which == to_q;
      for (const Chunk& chunk : (some ? wanted : step_.rows).chunks) {
        const uint32_t* x = (some ? x_wanted : memory_.x) + chunk.before * words;
        with_vectors(chunk.vectors,
                     [&](auto v) { one_head<v>(layer, which, index, chunk, x, &wanted == &step_.last); });
      }
    });
  }

  template <int kV>
  void one_head(const Layer& layer, Projection which, int64_t index, const Chunk& chunk, const uint32_t* x,
                bool few) const {
    const int64_t d = model_.d, pitch = d + 32;
    float *sums = kept<float>(sums_floats_ + tile_floats_), *more = sums + sums_floats_ / 2;
    auto* tile = reinterpret_cast<uint16_t*>(sums + sums_floats_);
    if (which != to_q) fetch(which == to_k ? layer.of.k : layer.of.v, chunk, index);
    columns<kV>(layer.linear[which], index * d, d, chunk, x, sums, more);
    const uint16_t* weight = which == to_q ? layer.vectors[of_q] : which == to_k ? layer.vectors[of_k] : nullptr;
    if (weight != nullptr) {
      for (int64_t i = 0; i < d * kV * kLanes; i += kLanes) {
        _mm512_storeu_ps(sums + i, rounded(_mm512_loadu_ps(sums + i)));
      }
      norm_sums<kV>(weight, d, model_.head_norms, sums);
    }
    if (which == to_v) {
      return store_rows<kV>(sums, d, chunk.rows, [&](int64_t i) {
        return const_cast<uint16_t*>(layer.of.v) + step_.places[size_t(chunk.lo + i)] + index * step_.head_stride;
      });
    }
    store_rows<kV>(sums, d, chunk.rows, [&](int64_t i) { return tile + i * pitch; });
    for (int64_t i = 0; i < chunk.rows; ++i) {
      const int64_t row = chunk.lo + i, token = which == to_q && few ? step_.wanted[row] : row;
      const int64_t table = step_.positions[token] * step_.rotary;
      uint16_t* to = which == to_q
                         ? memory_.q + (row * model_.heads + index) * d
                         : const_cast<uint16_t*>(layer.of.k) + step_.places[size_t(row)] + index * step_.head_stride;
      rotate(tile + i * pitch, step_.cos + table, step_.sin + table, step_.rotary, d, to);
    }
  }

  // Calls for the places that a head's rows will be written to, all over the arena.
  void fetch(const uint16_t* plane, const Chunk& chunk, int64_t index) const {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      const uint16_t* to = plane + step_.places[size_t(chunk.lo + i)] + index * step_.head_stride;
      for (int64_t at = 0; at < model_.d; at += 32) __builtin_prefetch(to + at, 1);
    }
  }

  void attend(Walk& walk, const Layer& layer, const Plan& plan) const {
    Operands<bf16_bits> of = layer.of;
    of.q = memory_.q, of.out = memory_.out;
    walk.run(parts_, [&](int64_t i) {
      run_units(layer.options, of, plan, plan.border(i, parts_), plan.border(i + 1, parts_), states_);
    });
    walk.run(int64_t(plan.splits.size()) * of.kv_heads,
             [&](int64_t i) { finish_split(layer.options, of, plan, i, states_); });
  }

  void pack(Walk& walk, const RowSet& rows, uint32_t* x) const {
    const int64_t width = model_.heads * model_.d;
    each_vector(walk, rows, [&](const Chunk& chunk, int64_t v) {
      const int64_t lo = chunk.lo + v * kLanes;
      load_words([&](int64_t i) { return memory_.out + (lo + i) * width; }, std::min(kLanes, rows.rows - lo), width / 2,
                 at(x, chunk, width / 2) + v * kLanes, chunk.width());
    });
  }

  // h += x w^T
  void add(Walk& walk, const Linear& linear, const RowSet& rows, const uint32_t* x, uint32_t* h) const {
    walk.run(pieces(model_.hidden, kColumns), [&](int64_t item) {
      const int64_t first = item * kColumns, count = std::min(kColumns, model_.hidden - first);
      float *sums = kept<float>(sums_floats_ + tile_floats_), *more = sums + sums_floats_ / 2;
      for (const Chunk& chunk : rows.chunks) {
        with_vectors(chunk.vectors, [&](auto v) {
          columns<v>(linear, first, count, chunk, x + chunk.before * linear.w.words, sums, more);
          add_words<v>(sums, count, at(h, chunk, model_.hidden / 2) + first / 2 * chunk.width());
        });
      }
    });
  }

  void gate(Walk& walk, const Layer& layer, const RowSet& rows, const uint32_t* x) const {
    walk.run(pieces(model_.inner, kColumns), [&](int64_t item) {
      const int64_t first = item * kColumns, count = std::min(kColumns, model_.inner - first);
      float* sums = kept<float>(sums_floats_ + tile_floats_);
      for (const Chunk& chunk : rows.chunks) {
        with_vectors(chunk.vectors, [&](auto v) {
          float *up = sums + kColumns * v * kLanes, *more = sums + sums_floats_ / 2;
          const uint32_t* from = x + chunk.before * model_.hidden / 2;
          columns<v>(layer.linear[to_gate], first, count, chunk, from, sums, more);
          columns<v>(layer.linear[to_up], first, count, chunk, from, up, more);
          gate_words<v>(sums, up, count, at(memory_.act, chunk, model_.inner / 2) + first / 2 * chunk.width());
        });
      }
    });
  }

  void head(Walk& walk) const {
    const int64_t columns = model_.head.rows;
    walk.run(pieces(columns, kHeadColumns), [&](int64_t item) {
      const int64_t first = item * kHeadColumns, count = std::min(kHeadColumns, columns - first);
      float* sums = kept<float>(sums_floats_ + tile_floats_);
      for (const Chunk& chunk : step_.last.chunks) {
        with_vectors(chunk.vectors, [&](auto v) {
          multiply<v>(model_.head, first, count, memory_.x_last + chunk.before * model_.hidden / 2, sums);
          store_rows<v>(sums, count, chunk.rows,
                        [&](int64_t i) { return step_.logits + (chunk.lo + i) * columns + first; });
        });
      }
    });
  }

  const Model& model_;
  const Step& step_;
  const Scratch memory_;
  const std::vector<Plan>& plans_;
  float* states_;
  const int64_t parts_;
  int64_t sums_floats_, tile_floats_;
};

}  // namespace
}  // namespace decoder

#pragma GCC pop_options
