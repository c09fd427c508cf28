// One generation step of a whole decoder as one op: embedding, layers (RMS norm, rotary attention over the KV arena,
// gated MLP), final norm and head, in bf16. One parallel region; rows are lanes throughout (decoder_lanes.h), but for
// q and what attention gives. In the last layer only the rows whose logits are wanted go on behind keys and values.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <map>

#include "bf16_tile.h"

#ifdef BF16_TILES

#include "decoder_run.h"

namespace {

using namespace decoder;
using rlhf_kernels::attention::checked_borders;
using rlhf_kernels::attention::checked_table;
using rlhf_kernels::attention::SliceTable;
using rlhf_kernels::attention::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A wrong size or type here would be a wrong address.
void expect(bool right, const char* what) { STD_TORCH_CHECK(right, "decoder_step: ", what); }

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void expect_rows(const Tensor& t, int64_t dims, ScalarType type, const char* what) {
  expect(t.dim() == dims && t.scalar_type() == type && (t.stride(dims - 1) == 1 || t.size(dims - 1) <= 1), what);
}

Weight weight_of(const Tensor& t, int64_t rows, int64_t columns) {
  expect_rows(t, 2, ScalarType::BFloat16, "a weight is no bf16 matrix whose rows have no gaps");
  expect(t.size(0) == rows && t.size(1) == columns, "a weight has not the shape that the others ask for");
  return {data<const char>(t), rows, columns / 2, 2 * t.stride(0)};
}

// nullptr for an empty one.
const uint16_t* vector_of(const Tensor& t, int64_t width) {
  if (t.numel() == 0) return nullptr;
  expect_rows(t, 1, ScalarType::BFloat16, "a norm's weight or a bias is no bf16 vector");
  expect(t.size(0) == width, "a norm's weight or a bias has another width than what it meets");
  return data<const uint16_t>(t);
}

struct Parameters {
  const std::vector<Tensor>&weights, &biases, &vectors, &adapters, &keys, &values;
  const std::vector<double>&scales, &softcaps;
  const std::vector<int64_t>& windows;
};

// The projections of a layer; those that read one tensor have their S beside each other.
void take_linears(const Parameters& given, size_t i, Model& model, Layer& layer) {
  const int64_t q = model.heads * model.d, kv = model.kv_heads * model.d;
  const int64_t rows[] = {q, kv, kv, model.hidden, model.inner, model.inner, model.hidden};
  const int64_t columns[] = {model.hidden, model.hidden, model.hidden, q, model.hidden, model.hidden, model.inner};
  int64_t s = 0;
  for (size_t p = 0; p < kProjections; ++p) {
    Linear& linear = layer.linear[p];
    const size_t at = i * kProjections + p;
    linear.w = weight_of(given.weights[at], rows[p], columns[p]);
    if (!given.biases.empty()) linear.bias = vector_of(given.biases[at], rows[p]);
    if (p == to_o || p == to_gate || p == to_down) s = 0;
    if (given.adapters.empty() || given.adapters[2 * at].numel() == 0) continue;
    const int64_t rank = given.adapters[2 * at].size(0);
    expect(rank % 2 == 0, "an adapter's rank is odd");
    linear.a = weight_of(given.adapters[2 * at], rank, columns[p]);
    linear.b = weight_of(given.adapters[2 * at + 1], rows[p], rank);
    linear.s = s, s += rank / 2;
    model.s_words = std::max(model.s_words, s);
  }
}

void take_layers(const Parameters& given, const SliceTable& table, Model& model) {
  const size_t n = given.keys.size();
  expect(n > 0 && given.values.size() == n && given.weights.size() == n * kProjections &&
             given.vectors.size() == n * kVectors && given.scales.size() == n && given.softcaps.size() == n &&
             given.windows.size() == n && (given.biases.empty() || given.biases.size() == n * kProjections) &&
             (given.adapters.empty() || given.adapters.size() == 2 * n * kProjections),
         "the lists have not as many entries as there are layers");
  model.d = given.keys[0].size(3), model.kv_heads = given.keys[0].size(1);
  model.heads = given.weights[to_q].size(0) / model.d, model.inner = given.weights[to_gate].size(0);
  expect(model.d % 2 == 0 && model.hidden % 2 == 0 && model.inner % 2 == 0 && model.heads % model.kv_heads == 0,
         "a width is odd, or heads do not divide");
  for (size_t i = 0; i < n; ++i) {
    Layer layer;
    take_linears(given, i, model, layer);
    const int64_t widths[] = {model.hidden, model.hidden, model.d, model.d};
    for (size_t j = 0; j < kVectors; ++j) layer.vectors[j] = vector_of(given.vectors[i * kVectors + j], widths[j]);
    expect(layer.vectors[before_attention] && layer.vectors[before_mlp], "a norm has no weight");
    const Tensor &k = given.keys[i], &v = given.values[i];
    for (const Tensor* plane : {&k, &v}) {
      expect_rows(*plane, 4, ScalarType::BFloat16, "keys and values are no bf16 [slices, heads, tokens, d]");
      for (int64_t dim = 0; dim < 4; ++dim) {
        expect(plane->size(dim) == given.keys[0].size(dim) && plane->stride(dim) == given.keys[0].stride(dim),
               "layers' keys and values differ in shape");
      }
    }
    layer.options = {model.d,
                     model.d,
                     model.heads / model.kv_heads,
                     float(given.scales[i]),
                     given.windows[i],
                     float(given.softcaps[i])};
    layer.of = {nullptr,     data<uint16_t>(k), data<uint16_t>(v), model.heads * model.d,
                model.d,     k.stride(2),       k.stride(1),       v.stride(2),
                v.stride(1), nullptr,           model.heads,       model.kv_heads};
    layer.of.table = table, layer.of.k_slice = k.stride(0), layer.of.v_slice = v.stride(0);
    model.layers.push_back(layer);
  }
}

Norm norm_of(const std::vector<double>& styles, size_t at) {
  expect(styles.size() == 6, "norms are not eps, offset and whether to round, of rows and of heads");
  return {float(styles[at]), float(styles[at + 1]), styles[at + 2] != 0};
}

// What there is to attend in a layer of some options: of all tokens, or of the wanted ones.
Plan plan_of(const Layer& layer, const Model& model, const int32_t* borders, const int32_t* lengths, int64_t sequences,
             const Step* wanted) {
  Plan plan(layer.options, model.kv_heads, torch::stable::get_num_threads());
  std::vector<Span> steps;  // sequences with one query
  for (int64_t b = 0, i = 0; b < sequences; ++b) {
    const int64_t tokens = borders[b + 1] - borders[b];
    if (wanted == nullptr && tokens > 1) plan.add(b, borders[b], tokens, lengths[b] - tokens);
    if (wanted == nullptr && tokens == 1) steps.push_back({b, 0, 0, borders[b], 1});
    if (wanted == nullptr) continue;
    for (int64_t first = i; i < wanted->last.rows && wanted->wanted[i] < borders[b + 1]; ++i) {
      const int64_t position = lengths[b] - borders[b + 1] + wanted->wanted[i];
      const bool step = i == first && position == lengths[b] - 1;
      if (step) steps.push_back({b, 0, 0, i, 1});
      if (!step) plan.add(b, i, 1, position);
    }
  }
  plan.add_sharing(steps, layer.of.table, lengths);
  plan.balance();
  return plan;
}

// Where rows' keys and values go, and that every index is inside.
void take_rows(const Tensor& keys, const Model& model, int64_t tables, Step& step) {
  const int64_t tokens = keys.size(2), places = keys.size(0) * tokens;
  for (int64_t i = 0; i < step.rows.rows; ++i) {
    const int64_t slot = step.slots[i];
    STD_TORCH_CHECK(slot >= 0 && slot < places, "slots: out of range");
    STD_TORCH_CHECK(step.ids[i] >= 0 && step.ids[i] < model.vocabulary, "ids: out of range");
    STD_TORCH_CHECK(step.positions[i] >= 0 && step.positions[i] < tables, "positions: out of range");
    step.places.push_back(slot / tokens * keys.stride(0) + slot % tokens * keys.stride(2));
  }
  step.all = step.last.rows == step.rows.rows;
  for (int64_t i = 0; i < step.last.rows; ++i) {
    const int64_t row = step.wanted[i];
    STD_TORCH_CHECK(row >= 0 && row < step.rows.rows && (i == 0 || row > step.wanted[i - 1]), "wanted: no rising rows");
  }
}

// One thread's memory from step to step, and places in it.
class Memory {
 public:
  void reserve(int64_t words) {
    if (words <= size_) return;
    held_.reset();
    held_ = std::make_unique<Buffer<uint32_t>>(words);
    size_ = words;
  }

  uint32_t* data() { return held_->data; }

 private:
  std::unique_ptr<Buffer<uint32_t>> held_;
  int64_t size_ = 0;
};

Scratch scratch_of(const Model& model, const Step& step) {
  thread_local Memory memory;
  const int64_t lanes = step.rows.lanes, last = step.last.lanes, attended = model.heads * model.d;
  const int64_t widest = std::max(model.hidden, attended) / 2;
  const int64_t sizes[] = {lanes * model.hidden / 2, lanes * widest,      lanes * model.inner / 2,
                           last * model.hidden / 2,  last * widest,       (lanes + last) * model.s_words,
                           lanes * attended / 2,     lanes * attended / 2};
  int64_t at[9] = {};
  for (int i = 0; i < 8; ++i) at[i + 1] = at[i] + (sizes[i] + 15) / 16 * 16;
  memory.reserve(at[8]);
  uint32_t* m = memory.data();
  return {m,
          m + at[1],
          m + at[2],
          m + at[3],
          m + at[4],
          m + at[5],
          reinterpret_cast<uint16_t*>(m + at[6]),
          reinterpret_cast<uint16_t*>(m + at[7])};
}

Tensor decoder_step(Tensor ids, Tensor positions, Tensor wanted, Tensor embedding, std::vector<Tensor> weights,
                    std::vector<Tensor> biases, std::vector<Tensor> vectors, std::vector<Tensor> adapters,
                    double scaling, Tensor norm, Tensor head, std::vector<double> norms, Tensor cos, Tensor sin,
                    std::vector<Tensor> keys, std::vector<Tensor> values, Tensor slots, Tensor slice_table,
                    Tensor context_lens, Tensor cu_q, std::vector<double> scales, std::vector<int64_t> windows,
                    std::vector<double> softcaps) {
  const bf16::TileUnit* unit = bf16::tile_unit();
  STD_TORCH_CHECK(unit != nullptr, "decoder_step: this machine has no AVX512-BF16");
  for (const Tensor* t : {&ids, &positions, &wanted, &slots}) {
    expect_rows(*t, 1, ScalarType::Long, "ids, positions, wanted or slots are no int64 vector");
  }
  for (const Tensor* t : {&context_lens, &cu_q}) expect_rows(*t, 1, ScalarType::Int, "lengths are no int32 vector");
  expect_rows(slice_table, 2, ScalarType::Int, "slice_table is no int32 matrix");
  for (const Tensor* t : {&embedding, &cos, &sin}) {
    expect_rows(*t, 2, ScalarType::BFloat16, "embedding, cos or sin are no bf16 matrix");
    expect(t->stride(0) == t->size(1), "embedding, cos or sin have gaps");
  }
  const int64_t tokens = ids.size(0), sequences = slice_table.size(0);
  expect(positions.size(0) == tokens && slots.size(0) == tokens && context_lens.size(0) == sequences &&
             cu_q.size(0) == sequences + 1 && !keys.empty() && keys[0].dim() == 4,
         "a vector has another length than the tokens or the sequences");
  expect(sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && cos.size(1) % 2 == 0 &&
             cos.size(1) <= keys[0].size(3),
         "cos and sin differ, or are wider than a head");
  const int32_t *borders = checked_borders(cu_q, tokens), *lengths = data<const int32_t>(context_lens);
  const SliceTable table = checked_table(slice_table, lengths, borders, keys[0].size(0), keys[0].size(2));
  Model model{data<const uint16_t>(embedding), embedding.size(0), embedding.size(1)};
  take_layers({weights, biases, vectors, adapters, keys, values, scales, softcaps, windows}, table, model);
  model.norm = vector_of(norm, model.hidden), model.head = weight_of(head, head.size(0), model.hidden);
  expect(model.norm != nullptr, "the last norm has no weight");
  model.norms = norm_of(norms, 0), model.head_norms = norm_of(norms, 3), model.scaling = float(scaling);
  const int64_t threads = torch::stable::get_num_threads();

  Tensor logits = torch::stable::new_empty(embedding, {wanted.size(0), head.size(0)});
  Step step{RowSet(tokens), RowSet(wanted.size(0), RowSet(tokens).lanes)};
  step.ids = data<const int64_t>(ids), step.positions = data<const int64_t>(positions);
  step.slots = data<const int64_t>(slots), step.wanted = data<const int64_t>(wanted);
  step.cos = data<const uint16_t>(cos), step.sin = data<const uint16_t>(sin), step.rotary = cos.size(1);
  step.head_stride = keys[0].stride(1), step.logits = data<uint16_t>(logits);
  take_rows(keys[0], model, cos.size(0), step);

  std::vector<Plan> plans;
  std::map<int64_t, size_t> by_window;  // all that plans look at beside the step
  int64_t states = 0;
  for (Layer& layer : model.layers) {
    const auto [found, fresh] = by_window.try_emplace(layer.options.window, plans.size());
    if (fresh) plans.push_back(plan_of(layer, model, borders, lengths, sequences, nullptr));
    layer.plan = found->second;
  }
  Layer& last = model.layers.back();
  if (!step.all) {
    last.plan = plans.size();
    plans.push_back(plan_of(last, model, borders, lengths, sequences, &step));
  }
  for (const Plan& plan : plans) states = std::max(states, plan.states);
  const Buffer<float> parts(states * model.kv_heads * rlhf_kernels::attention::state_floats(last.options));
  Stages stages(Run::stages(model));
  const Run run(model, step, scratch_of(model, step), plans, parts.data, threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) run.go(stages);
  });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step)); }

#endif
