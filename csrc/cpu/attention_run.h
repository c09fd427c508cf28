// The pieces of a plan (attention_plan.h) as jobs over operands, a stretch of them on one thread.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "attention_plan.h"
#include "buffer.h"

namespace rlhf_kernels::attention {
namespace {

constexpr int64_t ROWS_TOGETHER = 16;  // of all heads of a job; with more rows it is not reading that takes the time

inline const int32_t* checked_borders(const torch::stable::Tensor& borders, int64_t tokens) {
  STD_TORCH_CHECK(borders.size(0) >= 1, "borders: empty");
  const auto* b = static_cast<const int32_t*>(borders.data_ptr());
  bool good = b[0] == 0 && b[borders.size(0) - 1] == tokens;
  for (int64_t i = 1; i < borders.size(0); ++i) good = good && b[i - 1] <= b[i];
  STD_TORCH_CHECK(good, "borders: not a rise from 0 to the number of tokens");
  return b;
}

// slice_table int32 [sequences, width], in which every sequence's length must find its slices.
inline SliceTable checked_table(const torch::stable::Tensor& slice_table, const int32_t* lengths,
                                const int32_t* borders, int64_t num_slices, int64_t slice_tokens) {
  const SliceTable table{static_cast<const int32_t*>(slice_table.data_ptr()), slice_table.stride(0), slice_tokens};
  for (int64_t b = 0; b < slice_table.size(0); ++b) {
    STD_TORCH_CHECK(lengths[b] >= borders[b + 1] - borders[b], "context_lens: fewer than the queries");
    const int64_t slices = (lengths[b] + slice_tokens - 1) / slice_tokens;
    STD_TORCH_CHECK(slices <= slice_table.size(1), "slice_table: too narrow");
    for (int64_t i = 0; i < slices; ++i) {
      const int32_t slice = table.row(b)[i];
      STD_TORCH_CHECK(slice >= 0 && slice < num_slices, "slice_table: out of range");
    }
  }
  return table;
}

// The tensors of a forward pass as its jobs see them.
template <typename T>
struct Operands {
  const T *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  T* out;
  int64_t heads, kv_heads;
  float* lse = nullptr;
  const int32_t* borders = nullptr;  // of packed sequences; null: they lie in slices
  SliceTable table = {};
  int64_t k_slice = 0, v_slice = 0;

  KeyRows<T> keys(int64_t sequence, int64_t head) const {
    const T *k0 = k + head * k_head, *v0 = v + head * v_head;
    if (borders) return {k0 + borders[sequence] * k_token, v0 + borders[sequence] * v_token, k_token, v_token};
    return {k0, v0, k_token, v_token, table.row(sequence), table.slice_tokens, k_slice, v_slice};
  }
};

// A job and what it points to.
template <typename T>
struct Unit {
  ForwardJob<T> job;
  std::vector<Token<T>> tokens;
  std::vector<Phase<T>> phases;

  void set_queries(const Options& options, const Operands<T>& of, const Plan& plan, int64_t first, int64_t count,
                   int64_t head) {
    tokens.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) {
      const Query& query = plan.queries[size_t(first + i)];
      const int64_t h = head * options.group, row = query.token * of.heads + h;
      tokens[size_t(i)] = {of.q + query.token * of.q_token + h * of.q_head, of.out + row * options.dv,
                           of.lse ? of.lse + row : nullptr, query.position};
    }
    job = {options, of.q_head, tokens.data(), count, nullptr, 0};
  }

  // Units from `index` on, as many heads of the piece as are done together; returns how many.
  int64_t set(const Options& options, const Operands<T>& of, const Plan& plan, int64_t index, int64_t most,
              float* states) {
    const Piece& piece = plan.pieces[size_t(index / of.kv_heads)];
    const int64_t head = index % of.kv_heads;
    set_queries(options, of, plan, piece.first_query, piece.queries, head);
    if (piece.split < 0) {
      const int64_t together = std::max<int64_t>(1, ROWS_TOGETHER / (piece.queries * options.group));
      job.heads = std::min({together, of.kv_heads - head, most});
      job.k_head = of.k_head, job.v_head = of.v_head;
    }
    phases.resize(size_t(piece.spans));
    for (int64_t i = 0; i < piece.spans; ++i) {
      const Span& span = plan.spans[size_t(piece.first_span + i)];
      phases[size_t(i)] = {of.keys(span.sequence, head), span.begin, span.end, span.first_query, span.queries};
    }
    job.phases = phases.data(), job.phase_count = piece.spans;
    if (piece.split < 0) return job.heads;
    const int64_t rows = piece.queries * options.group;
    const int64_t at = head * plan.states + plan.splits[size_t(piece.split)].states + piece.first_chunk * rows;
    job.states = states + at * state_floats(options);
    return 1;
  }
};

// Units [low, high) of a plan: piece * kv_heads + head. states: for the plan's splits, state_floats each.
template <typename T>
void run_units(const Options& options, const Operands<T>& of, const Plan& plan, int64_t low, int64_t high,
               float* states) {
  float* scratch = kept<float>(forward_scratch(options, plan.most_queries()));
  Unit<T> two[2];
  int now = 0;
  int64_t after = low < high ? low + two[now].set(options, of, plan, low, high - low, states) : high;
  for (int64_t i = low; i < high; now = !now) {
    i = after;
    if (i < high) after += two[!now].set(options, of, plan, i, high - i, states);
    forward(two[now].job, i < high ? &two[!now].job : nullptr, scratch);
  }
}

// Joins the states of a split, once all its pieces have run; index: split * kv_heads + head.
template <typename T>
void finish_split(const Options& options, const Operands<T>& of, const Plan& plan, int64_t index, const float* states) {
  const Split& split = plan.splits[size_t(index / of.kv_heads)];
  const int64_t head = index % of.kv_heads;
  Unit<T> unit;
  unit.set_queries(options, of, plan, split.first_query, split.queries, head);
  finish(unit.job, states + (head * plan.states + split.states) * state_floats(options), split.chunks,
         kept<float>(forward_scratch(options, plan.most_queries())));
}

}  // namespace
}  // namespace rlhf_kernels::attention
