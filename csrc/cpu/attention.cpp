// Attention over packed rows (forward and backward) and over the KV arena: arguments to pieces, pieces to threads.
// Shapes and dtypes are checked in Python; here only what needs the values: borders, lengths and slice indices.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "attention_run.h"
#include "buffer.h"

using torch::stable::Tensor;

namespace rlhf_kernels::attention {
namespace {

constexpr int64_t SERIAL_COST = 1 << 19;   // of the backward pass, multiply-adds: as in attention_plan.cpp
constexpr int64_t SERIAL_BYTES = 1 << 20;  // of a write to the arena: below it one thread is as fast

Tensor dense_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

Options options_of(const Tensor& q, int64_t kv_heads, int64_t dv, double scale, int64_t window, double softcap) {
  return {q.size(2), dv, q.size(1) / kv_heads, static_cast<float>(scale), window, static_cast<float>(softcap)};
}

template <typename T>
void run(const Options& options, const Operands<T>& of, const Plan& plan) {
  const int64_t parts = plan.parts(), units = int64_t(plan.pieces.size()) * of.kv_heads;
  const Buffer<float> states(plan.states * of.kv_heads * state_floats(options));
  if (parts <= 1) {
    run_units(options, of, plan, 0, units, states.data);
  } else {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t low, int64_t high) {
      run_units(options, of, plan, plan.border(low, parts), plan.border(high, parts), states.data);
    });
  }
  for (int64_t i = 0; i < int64_t(plan.splits.size()) * of.kv_heads; ++i)
    finish_split(options, of, plan, i, states.data);
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
  const int64_t sequences = slice_table.size(0);
  const SliceTable table = checked_table(slice_table, lengths, borders, keys.size(0), keys.size(2));
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
