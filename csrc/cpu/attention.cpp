// Attention over packed rows (forward and backward) and over the KV arena: arguments to pieces, pieces to threads.
// Shapes and dtypes are checked in Python; here only what needs the values: borders, lengths and slice indices.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "buffer.h"

using torch::stable::Tensor;

namespace rlhf_kernels::attention {
namespace {

constexpr int64_t SERIAL_COST = 1 << 19;   // of the backward pass, multiply-adds: as in attention_plan.cpp
constexpr int64_t SERIAL_BYTES = 1 << 20;  // of a write to the arena: below it one thread is as fast

Tensor dense_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

// One thread's memory for as long as it lives: an allocation a call would be as long as a short call's work.
float* scratch_of_thread(int64_t floats) {
  thread_local std::unique_ptr<Buffer<float>> held;
  thread_local int64_t size = 0;
  if (floats > size) {
    held.reset();
    held = std::make_unique<Buffer<float>>(floats);
    size = floats;
  }
  return held->data;
}

const int32_t* checked_borders(const Tensor& borders, int64_t tokens) {
  STD_TORCH_CHECK(borders.size(0) >= 1, "borders: empty");
  const auto* b = static_cast<const int32_t*>(borders.data_ptr());
  bool good = b[0] == 0 && b[borders.size(0) - 1] == tokens;
  for (int64_t i = 1; i < borders.size(0); ++i) good = good && b[i - 1] <= b[i];
  STD_TORCH_CHECK(good, "borders: not a rise from 0 to the number of tokens");
  return b;
}

Options options_of(const Tensor& q, int64_t kv_heads, int64_t dv, double scale, int64_t window, double softcap) {
  return {q.size(2), dv, q.size(1) / kv_heads, static_cast<float>(scale), window, static_cast<float>(softcap)};
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

  void set(const Options& options, const Operands<T>& of, const Plan& plan, int64_t index, float* states) {
    const Piece& piece = plan.pieces[size_t(index / of.kv_heads)];
    const int64_t head = index % of.kv_heads;
    set_queries(options, of, plan, piece.first_query, piece.queries, head);
    phases.resize(size_t(piece.spans));
    for (int64_t i = 0; i < piece.spans; ++i) {
      const Span& span = plan.spans[size_t(piece.first_span + i)];
      phases[size_t(i)] = {of.keys(span.sequence, head), span.begin, span.end, span.first_query, span.queries};
    }
    job.phases = phases.data(), job.phase_count = piece.spans;
    if (piece.split < 0) return;
    const int64_t rows = piece.queries * options.group;
    const int64_t at = head * plan.states + plan.splits[size_t(piece.split)].states + piece.first_chunk * rows;
    job.states = states + at * state_floats(options);
  }
};

template <typename T>
void run(const Options& options, const Operands<T>& of, const Plan& plan) {
  const int64_t parts = plan.parts(), units = int64_t(plan.pieces.size()) * of.kv_heads;
  const int64_t width = state_floats(options);
  const Buffer<float> states(plan.states * of.kv_heads * width);
  const int64_t scratch_floats = forward_scratch(options, plan.most_queries());
  const auto some = [&](int64_t low, int64_t high) {
    float* scratch = scratch_of_thread(scratch_floats);
    Unit<T> two[2];
    if (low < high) two[low % 2].set(options, of, plan, low, states.data);
    for (int64_t i = low; i < high; ++i) {
      if (i + 1 < high) two[(i + 1) % 2].set(options, of, plan, i + 1, states.data);
      forward(two[i % 2].job, i + 1 < high ? &two[(i + 1) % 2].job : nullptr, scratch);
    }
  };
  if (parts <= 1) {
    some(0, units);
  } else {
    torch::stable::parallel_for(
        0, parts, 1, [&](int64_t low, int64_t high) { some(plan.border(low, parts), plan.border(high, parts)); });
  }
  for (const Split& split : plan.splits) {
    for (int64_t head = 0; head < of.kv_heads; ++head) {
      Unit<T> unit;
      unit.set_queries(options, of, plan, split.first_query, split.queries, head);
      finish(unit.job, states.data + (head * plan.states + split.states) * width, split.chunks,
             scratch_of_thread(scratch_floats));
    }
  }
}

template <typename T>
void varlen_typed(const Tensor& q, const Tensor& k, const Tensor& v, const int32_t* borders, int64_t sequences,
                  const Options& options, Tensor& out, Tensor& lse) {
  const auto at = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
  Operands<T> of{at(q),       at(k),       at(v),       q.stride(0), q.stride(1), k.stride(0),
                 k.stride(1), v.stride(0), v.stride(1), at(out),     q.size(1),   k.size(1)};
  of.lse = static_cast<float*>(lse.data_ptr()), of.borders = borders;
  Plan plan(options, of.kv_heads, torch::stable::get_num_threads());
  for (int64_t b = 0; b < sequences; ++b) plan.add(b, borders[b], borders[b + 1] - borders[b], 0);
  plan.balance();
  run(options, of, plan);
}

std::tuple<Tensor, Tensor> varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, double scale, int64_t window,
                                          double softcap) {
  q = dense_rows(q), k = dense_rows(k), v = dense_rows(v);
  const int64_t tokens = q.size(0), heads = q.size(1), dv = v.size(2);
  const int32_t* borders = checked_borders(cu_seqlens, tokens);
  const Options options = options_of(q, k.size(1), dv, scale, window, softcap);
  Tensor out = torch::stable::new_empty(q, {tokens, heads, dv});
  Tensor lse = torch::stable::new_empty(q, {tokens, heads}, torch::headeronly::ScalarType::Float);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  if (is_float(q)) {
    varlen_typed<float>(q, k, v, borders, sequences, options, out, lse);
  } else {
    varlen_typed<bf16_bits>(q, k, v, borders, sequences, options, out, lse);
  }
  return {out, lse};
}

// Runs the jobs on the pool's threads, each a stretch of about the same cost.
template <typename T>
void run(const std::vector<BackwardJob<T>>& jobs, const std::vector<int64_t>& costs, int64_t scratch_floats) {
  int64_t total = 0;
  for (int64_t cost : costs) total += cost;
  const auto n = static_cast<int64_t>(jobs.size());
  const int64_t parts = total < SERIAL_COST ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), n);
  if (parts <= 1) {
    const Buffer<float> scratch(scratch_floats);
    for (const auto& job : jobs) backward(job, scratch.data);
    return;
  }
  std::vector<int64_t> borders(size_t(parts + 1), n);
  borders[0] = 0;
  int64_t sum = 0, part = 1;
  for (int64_t i = 0; i < n && part < parts; ++i) {
    sum += costs[size_t(i)];
    while (part < parts && sum * parts >= total * part) borders[size_t(part++)] = i + 1;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t low, int64_t high) {
    const Buffer<float> scratch(scratch_floats);
    for (int64_t i = borders[size_t(low)]; i < borders[size_t(high)]; ++i) backward(jobs[size_t(i)], scratch.data);
  });
}

template <typename T>
void varlen_backward_typed(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                           const Tensor& lse, const int32_t* borders, int64_t sequences, const Options& options,
                           Tensor& dq, Tensor& dk, Tensor& dv) {
  std::vector<BackwardJob<T>> jobs;
  std::vector<int64_t> costs;
  int64_t longest = 1;
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  const auto at = [](const Tensor& x, int64_t token, int64_t head) {
    return static_cast<T*>(x.data_ptr()) + token * x.stride(0) + head * x.stride(1);
  };
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t first = borders[b], tokens = borders[b + 1] - first;
    if (tokens == 0) continue;
    longest = std::max(longest, tokens);
    for (int64_t g = 0; g < kv_heads; ++g) {
      const int64_t h = g * options.group;
      BackwardJob<T> job{options};
      job.q = at(q, first, h), job.k = at(k, first, g), job.v = at(v, first, g);
      job.out = at(out, first, h), job.grad = at(grad, first, h);
      job.q_token = q.stride(0), job.q_head = q.stride(1), job.k_token = k.stride(0), job.v_token = v.stride(0);
      job.out_token = out.stride(0);
      job.lse = static_cast<const float*>(lse.data_ptr()) + first * heads + h, job.lse_token = heads;
      job.dq = at(dq, first, h), job.dk = at(dk, first, g), job.dv = at(dv, first, g);
      job.dq_token = dq.stride(0), job.dk_token = dk.stride(0), job.dv_token = dv.stride(0);
      job.tokens = tokens;
      const int64_t keys = options.window ? std::min(options.window, tokens) : tokens;
      costs.push_back(2 * keys * tokens * options.group * (options.d + options.dv));
      jobs.push_back(job);
    }
  }
  run(jobs, costs, backward_scratch(options, longest));
}

std::tuple<Tensor, Tensor, Tensor> varlen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                   Tensor cu_seqlens, double scale, int64_t window, double softcap) {
  q = dense_rows(q), k = dense_rows(k), v = dense_rows(v), grad = torch::stable::contiguous(grad);
  const int32_t* borders = checked_borders(cu_seqlens, q.size(0));
  const Options options = options_of(q, k.size(1), v.size(2), scale, window, softcap);
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  const int64_t sequences = cu_seqlens.size(0) - 1;
  if (is_float(q)) {
    varlen_backward_typed<float>(grad, q, k, v, out, lse, borders, sequences, options, dq, dk, dv);
  } else {
    varlen_backward_typed<bf16_bits>(grad, q, k, v, out, lse, borders, sequences, options, dq, dk, dv);
  }
  return {dq, dk, dv};
}

template <typename T>
void sliced_typed(const Tensor& q, const Tensor& keys, const Tensor& values, const SliceTable& table,
                  const int32_t* lengths, const int32_t* borders, int64_t sequences, const Options& options,
                  Tensor& out) {
  const auto at = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
  Operands<T> of{at(q),          at(keys),         at(values),       q.stride(0), q.stride(1), keys.stride(2),
                 keys.stride(1), values.stride(2), values.stride(1), at(out),     q.size(1),   keys.size(1)};
  of.table = table, of.k_slice = keys.stride(0), of.v_slice = values.stride(0);
  Plan plan(options, of.kv_heads, torch::stable::get_num_threads());
  std::vector<Span> steps;  // sequences with one query
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t tokens = borders[b + 1] - borders[b];
    if (tokens == 1) {
      steps.push_back({b, 0, 0, borders[b], 1});
    } else {
      plan.add(b, borders[b], tokens, lengths[b] - tokens);
    }
  }
  plan.add_sharing(steps, table, lengths);
  plan.balance();
  run(options, of, plan);
}

Tensor sliced_forward(Tensor q, Tensor keys, Tensor values, Tensor slice_table, Tensor context_lens, Tensor cu_q,
                      double scale, int64_t window, double softcap) {
  q = dense_rows(q);
  if (slice_table.stride(1) != 1) slice_table = torch::stable::contiguous(slice_table);
  const int32_t* borders = checked_borders(cu_q, q.size(0));
  const auto* lengths = static_cast<const int32_t*>(context_lens.data_ptr());
  const int64_t num_slices = keys.size(0), sequences = slice_table.size(0);
  const SliceTable table{static_cast<const int32_t*>(slice_table.data_ptr()), slice_table.stride(0), keys.size(2)};
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(lengths[b] >= borders[b + 1] - borders[b], "context_lens: fewer than the queries");
    const int64_t slices = (lengths[b] + table.slice_tokens - 1) / table.slice_tokens;
    STD_TORCH_CHECK(slices <= slice_table.size(1), "slice_table: too narrow");
    for (int64_t i = 0; i < slices; ++i) {
      const int32_t slice = table.row(b)[i];
      STD_TORCH_CHECK(slice >= 0 && slice < num_slices, "slice_table: out of range");
    }
  }
  const Options options = options_of(q, keys.size(1), values.size(3), scale, window, softcap);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), values.size(3)});
  if (is_float(q)) {
    sliced_typed<float>(q, keys, values, table, lengths, borders, sequences, options, out);
  } else {
    sliced_typed<bf16_bits>(q, keys, values, table, lengths, borders, sequences, options, out);
  }
  return out;
}

// A plane of the arena [num_slices, heads, slice_tokens, width] and the tokens [T, heads, width] that go into it; all
// in bytes.
struct Plane {
  char* to;
  const char* from;
  int64_t slice, head, place, token, token_head, width;

  Plane(Tensor& plane, const Tensor& rows)
      : to(static_cast<char*>(plane.data_ptr())), from(static_cast<const char*>(rows.data_ptr())) {
    const int64_t bytes = is_float(plane) ? 4 : 2;
    slice = plane.stride(0) * bytes, head = plane.stride(1) * bytes, place = plane.stride(2) * bytes;
    token = rows.stride(0) * bytes, token_head = rows.stride(1) * bytes, width = plane.size(3) * bytes;
  }

  void write(int64_t t, int64_t h, int64_t index, int64_t offset) const {
    std::memcpy(to + index * slice + offset * place + h * head, from + t * token + h * token_head, size_t(width));
  }
};

void arena_write(Tensor keys, Tensor values, Tensor slots, Tensor k, Tensor v) {
  k = dense_rows(k), v = dense_rows(v);
  slots = torch::stable::contiguous(slots);
  const auto* s = static_cast<const int64_t*>(slots.data_ptr());
  const int64_t tokens = slots.size(0), heads = keys.size(1), slice_tokens = keys.size(2);
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(s[t] >= 0 && s[t] < keys.size(0) * slice_tokens, "slots: out of range");
  }
  const Plane of_keys(keys, k), of_values(values, v);
  const auto some = [&](int64_t low, int64_t high) {
    for (int64_t t = low; t < high; ++t) {
      const int64_t index = s[t] / slice_tokens, offset = s[t] % slice_tokens;
      for (int64_t h = 0; h < heads; ++h) of_keys.write(t, h, index, offset), of_values.write(t, h, index, offset);
    }
  };
  const int64_t bytes = heads * (of_keys.width + of_values.width);
  if (tokens * bytes < SERIAL_BYTES) return some(0, tokens);
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, SERIAL_BYTES / 4 / bytes), some);
}

Tensor sliced_step(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor slots, Tensor slice_table,
                   Tensor context_lens, Tensor cu_q, double scale, int64_t window, double softcap) {
  arena_write(keys, values, slots, k, v);  // all of it first: sequences may read slices that others write in this step
  return sliced_forward(q, keys, values, slice_table, context_lens, cu_q, scale, window, softcap);
}

}  // namespace
}  // namespace rlhf_kernels::attention

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  using namespace rlhf_kernels::attention;
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_forward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_backward));
  m.impl("sliced_attention_forward", TORCH_BOX(&sliced_forward));
  m.impl("sliced_step", TORCH_BOX(&sliced_step));
  m.impl("arena_write", TORCH_BOX(&arena_write));
}
