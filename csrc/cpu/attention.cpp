// Attention over packed rows (forward and backward) and over the KV arena: arguments to jobs, jobs to threads.
// Shapes and dtypes are checked in Python; here only what needs the values: borders, lengths and slice indices.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

namespace rlhf_kernels::attention {
namespace {

constexpr int64_t JOB_ROWS = 128;  // rows (tokens x heads of a group) of one forward job: keys are packed once for them
constexpr int64_t SERIAL_COST = 1 << 19;  // multiply-adds below which waking a second thread costs more than it saves

struct Free {
  void operator()(float* p) const { std::free(p); }
};
std::unique_ptr<float[], Free> make_scratch(int64_t floats) {
  return std::unique_ptr<float[], Free>(static_cast<float*>(std::aligned_alloc(64, padded(floats) * sizeof(float))));
}

Tensor dense_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x); }

// Runs the jobs on the pool's threads, each a stretch of about the same cost. A job is (cost, scratch floats, ...).
template <typename Job>
void run(const std::vector<Job>& jobs, const std::vector<int64_t>& costs, int64_t scratch_floats,
         void (*kernel)(const Job&, float*)) {
  int64_t total = 0;
  for (int64_t cost : costs) total += cost;
  const auto n = static_cast<int64_t>(jobs.size());
  const int64_t parts = total < SERIAL_COST ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), n);
  if (parts <= 1) {
    auto scratch = make_scratch(scratch_floats);
    for (const Job& job : jobs) kernel(job, scratch.get());
    return;
  }
  std::vector<int64_t> borders(parts + 1, n);
  borders[0] = 0;
  int64_t sum = 0, part = 1;
  for (int64_t i = 0; i < n && part < parts; ++i) {
    sum += costs[i];
    while (part < parts && sum * parts >= total * part) borders[part++] = i + 1;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t low, int64_t high) {
    auto scratch = make_scratch(scratch_floats);
    for (int64_t i = borders[low]; i < borders[high]; ++i) kernel(jobs[i], scratch.get());
  });
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

// Adds the jobs of one sequence and key/value head: `job` is filled up to its first token.
template <typename T>
void add_jobs(ForwardJob<T> job, int64_t tokens, std::vector<ForwardJob<T>>& jobs, std::vector<int64_t>& costs) {
  const int64_t start = job.first_position, step = std::max<int64_t>(1, JOB_ROWS / job.options.group);
  const ForwardJob<T> whole = job;
  for (int64_t t = 0; t < tokens; t += step) {
    job.tokens = std::min(step, tokens - t);
    job.first_position = start + t;
    job.q = whole.q + t * whole.q_token;
    job.out = whole.out + t * whole.out_token;
    job.lse = whole.lse ? whole.lse + t * whole.lse_token : nullptr;
    const int64_t end = job.first_position + job.tokens, window = job.options.window;
    const int64_t keys = window ? std::min(end, window + job.tokens) : end;
    costs.push_back(keys * (job.tokens * job.options.group + 4) * (job.options.d + job.options.dv));
    jobs.push_back(job);
  }
}

template <typename T>
void varlen_forward_typed(const Tensor& q, const Tensor& k, const Tensor& v, const int32_t* borders, int64_t sequences,
                          const Options& options, Tensor& out, Tensor& lse) {
  std::vector<ForwardJob<T>> jobs;
  std::vector<int64_t> costs;
  const int64_t heads = q.size(1), kv_heads = k.size(1), group = options.group, dv = options.dv;
  const auto *qp = static_cast<const T*>(q.data_ptr()), *kp = static_cast<const T*>(k.data_ptr()),
             *vp = static_cast<const T*>(v.data_ptr());
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t g = 0; g < kv_heads; ++g) {
      const int64_t first = borders[b], h = g * group;
      ForwardJob<T> job{options};
      job.keys = {kp + first * k.stride(0) + g * k.stride(1), vp + first * v.stride(0) + g * v.stride(1), k.stride(0),
                  v.stride(0)};
      job.q = qp + first * q.stride(0) + h * q.stride(1);
      job.q_token = q.stride(0), job.q_head = q.stride(1);
      job.out = static_cast<T*>(out.data_ptr()) + (first * heads + h) * dv;
      job.out_token = heads * dv;
      job.lse = static_cast<float*>(lse.data_ptr()) + first * heads + h;
      job.lse_token = heads;
      job.first_position = 0;
      add_jobs(job, borders[b + 1] - first, jobs, costs);
    }
  }
  run(jobs, costs, forward_scratch(options, std::max<int64_t>(1, JOB_ROWS / group)),
      static_cast<void (*)(const ForwardJob<T>&, float*)>(&forward));
}

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

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
    varlen_forward_typed<float>(q, k, v, borders, sequences, options, out, lse);
  } else {
    varlen_forward_typed<bf16_bits>(q, k, v, borders, sequences, options, out, lse);
  }
  return {out, lse};
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
  run(jobs, costs, backward_scratch(options, longest), static_cast<void (*)(const BackwardJob<T>&, float*)>(&backward));
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
void sliced_typed(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& slice_table,
                  const int32_t* context_lens, const int32_t* borders, const Options& options, Tensor& out) {
  std::vector<ForwardJob<T>> jobs;
  std::vector<int64_t> costs;
  const int64_t heads = q.size(1), kv_heads = keys.size(1), dv = options.dv;
  const auto* table = static_cast<const int32_t*>(slice_table.data_ptr());
  for (int64_t b = 0; b < slice_table.size(0); ++b) {
    const int64_t first = borders[b], tokens = borders[b + 1] - first;
    for (int64_t g = 0; g < kv_heads; ++g) {
      const int64_t h = g * options.group;
      ForwardJob<T> job{options};
      job.keys = {static_cast<const T*>(keys.data_ptr()) + g * keys.stride(1),
                  static_cast<const T*>(values.data_ptr()) + g * values.stride(1),
                  keys.stride(2),
                  values.stride(2),
                  table + b * slice_table.stride(0),
                  keys.size(2),
                  keys.stride(0),
                  values.stride(0)};
      job.q = static_cast<const T*>(q.data_ptr()) + first * q.stride(0) + h * q.stride(1);
      job.q_token = q.stride(0), job.q_head = q.stride(1);
      job.out = static_cast<T*>(out.data_ptr()) + (first * heads + h) * dv;
      job.out_token = heads * dv;
      job.first_position = context_lens[b] - tokens;
      add_jobs(job, tokens, jobs, costs);
    }
  }
  run(jobs, costs, forward_scratch(options, std::max<int64_t>(1, JOB_ROWS / options.group)),
      static_cast<void (*)(const ForwardJob<T>&, float*)>(&forward));
}

Tensor sliced_forward(Tensor q, Tensor keys, Tensor values, Tensor slice_table, Tensor context_lens, Tensor cu_q,
                      double scale, int64_t window, double softcap) {
  q = dense_rows(q);
  if (slice_table.stride(1) != 1) slice_table = torch::stable::contiguous(slice_table);
  const int32_t* borders = checked_borders(cu_q, q.size(0));
  const auto* lengths = static_cast<const int32_t*>(context_lens.data_ptr());
  const auto* table = static_cast<const int32_t*>(slice_table.data_ptr());
  const int64_t slice_tokens = keys.size(2), num_slices = keys.size(0);
  for (int64_t b = 0; b < slice_table.size(0); ++b) {
    STD_TORCH_CHECK(lengths[b] >= borders[b + 1] - borders[b], "context_lens: fewer than the queries");
    const int64_t slices = (lengths[b] + slice_tokens - 1) / slice_tokens;
    STD_TORCH_CHECK(slices <= slice_table.size(1), "slice_table: too narrow");
    for (int64_t i = 0; i < slices; ++i) {
      const int32_t slice = table[b * slice_table.stride(0) + i];
      STD_TORCH_CHECK(slice >= 0 && slice < num_slices, "slice_table: out of range");
    }
  }
  const Options options = options_of(q, keys.size(1), values.size(3), scale, window, softcap);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), values.size(3)});
  if (is_float(q)) {
    sliced_typed<float>(q, keys, values, slice_table, lengths, borders, options, out);
  } else {
    sliced_typed<bf16_bits>(q, keys, values, slice_table, lengths, borders, options, out);
  }
  return out;
}

// Copies tokens [T, heads, width] to their slots of a plane [num_slices, heads, slice_tokens, width].
void write_plane(Tensor& plane, const int64_t* slots, const Tensor& rows) {
  const int64_t bytes = is_float(plane) ? 4 : 2, width = plane.size(3) * bytes, slice_tokens = plane.size(2);
  auto* to = static_cast<char*>(plane.data_ptr());
  const auto* from = static_cast<const char*>(rows.data_ptr());
  for (int64_t t = 0; t < rows.size(0); ++t) {
    char* place = to + (slots[t] / slice_tokens * plane.stride(0) + slots[t] % slice_tokens * plane.stride(2)) * bytes;
    for (int64_t h = 0; h < rows.size(1); ++h) {
      std::memcpy(place + h * plane.stride(1) * bytes, from + (t * rows.stride(0) + h * rows.stride(1)) * bytes, width);
    }
  }
}

void arena_write(Tensor keys, Tensor values, Tensor slots, Tensor k, Tensor v) {
  k = dense_rows(k), v = dense_rows(v);
  slots = torch::stable::contiguous(slots);
  const auto* s = static_cast<const int64_t*>(slots.data_ptr());
  const int64_t places = keys.size(0) * keys.size(2);
  for (int64_t t = 0; t < slots.size(0); ++t) STD_TORCH_CHECK(s[t] >= 0 && s[t] < places, "slots: out of range");
  write_plane(keys, s, k);
  write_plane(values, s, v);
}

}  // namespace
}  // namespace rlhf_kernels::attention

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  using namespace rlhf_kernels::attention;
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_forward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_backward));
  m.impl("sliced_attention_forward", TORCH_BOX(&sliced_forward));
  m.impl("arena_write", TORCH_BOX(&arena_write));
}
