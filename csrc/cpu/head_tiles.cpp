// The head in bf16 on the chip's matrix or vector units, fused: a tile of fp32 logits is made, worked on while it lies
// in the first-level cache, and gone; what is kept are sums and, for a gradient, E' of one vocabulary block in bf16,
// which a second GEMM takes to E' W. Tokens are the lanes, so sums are elementwise.
//
// The vocabulary is cut into segments, summed apart and merged in order, and a token's sums do not look at the other
// tokens: results depend neither on the number of threads nor on the rows beside a row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <stdexcept>

#include "bf16_tile.h"
#include "buffer.h"

#ifdef BF16_TILES

#include "bf16_pack.h"
#include "head_masses.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

using torch::stable::Tensor;

constexpr int64_t kStrips = 10;                    // of 32 columns, whose E' is held at a time: what the first-level
constexpr int64_t kBlock = kStrips * bf16::kTile;  // cache holds of both operands of E' W
constexpr int64_t kStepsAtOnce = 10;               // of 32 k, likewise for the logits
constexpr int64_t kSegments = 4;                   // of the vocabulary
constexpr int64_t kRowsAtOnce = 1024;
constexpr int64_t kState = 10;
constexpr int64_t kTileSums = bf16::kTile * bf16::kTile;

struct Job {
  // hidden states of policy and reference [rows, width], weights [columns, width]
  const uint16_t *x, *xr, *w, *wr;
  int64_t rows, width, columns, row_stride, ref_stride, weight_stride, ref_weight_stride;
  const int64_t* target;
  const float *bias, *temperature;
  float softcap, scale;
  bool states, kl, rkl, grad;
  const bf16::TileUnit* unit;
  // of a chunk of rows: packed hidden states, E' W of every segment [segment][panel][width/32][32][32]
  int64_t panels, steps, segment_columns, segments;
  const uint32_t *packed, *packed_ref;
  float* pulled;
  ExpState* exp;  // [segment][panel]
  Panel* tokens;  // [panel]
  double* state;  // [segment][10][all rows]
  int32_t* far;   // [all rows]
  int64_t first_row, all_rows;

  int64_t panel_words() const { return steps * 16 * bf16::kTile; }
  int64_t panel_sums() const { return steps * bf16::kTile * bf16::kTile; }
};

// The masses of one panel in one segment.
struct Masses {
  MassState policy, reference;
};

void store_states(const Job& job, int64_t segment, int64_t panel, const Masses& m, int64_t begin, int64_t end) {
  const Panel& tokens = job.tokens[panel];
  for (int64_t t = 0; t < bf16::kTile; ++t) {
    const int64_t row = panel * bf16::kTile + t;
    if (row >= job.rows) break;
    const bool present = tokens.target[t] >= begin && tokens.target[t] < end;
    const auto finish_side = [&](const MassState& side, bool ratio) {
      const bool is_pivot = present && side.column[t] == tokens.target[t];
      return ratio ? finish<true>(side, int(t), present, is_pivot) : finish<false>(side, int(t), present, is_pivot);
    };
    const TokenMass p = finish_side(m.policy, job.kl);
    bool far = p.far;
    double values[kState] = {p.lse,        p.rest,         p.target,     p.entropy, p.other_lse,
                             p.other_rest, p.other_target, p.difference, p.kl,      0};
    if (job.xr != nullptr && (job.rkl || !job.kl)) {
      const TokenMass q = finish_side(m.reference, job.rkl);
      values[4] = q.lse, values[5] = q.rest, values[6] = q.target;
      if (!job.kl) values[7] = job.rkl ? -q.difference : q.lse - p.lse;
      values[9] = q.kl;
      far = far || q.far;
    }
    double* out = job.state + segment * kState * job.all_rows + job.first_row + row;
    for (int64_t k = 0; k < kState; ++k) out[k * job.all_rows] = values[k];
    if (far) job.far[job.first_row + row] = 1;
  }
}

void pack_strips(const uint16_t* w, int64_t stride, int64_t n, int64_t width, uint16_t* out) {
  using bf16::kTile;
  for (int64_t at = 0; at < n; at += kTile) {
    bf16::pack_rows(w + at * stride, stride, n - at, width, out + at * bf16::tiles(width) * kTile);
  }
}

// z[g] = the logits of strip g and one panel, raw. In chunks of k, so that the panel's chunk stays in the first level.
void logits(const Job& job, const uint16_t* strips, int64_t n, const uint32_t* panel, float (*z)[kTileSums]) {
  for (int64_t k = 0; k == 0 || k < job.steps; k += kStepsAtOnce) {  // without any steps: zeros
    const int64_t steps = std::min(kStepsAtOnce, job.steps - k);
    for (int64_t g = 0; g < n; ++g) {
      job.unit->multiply(strips + (g * job.steps + k) * kTileSums, panel + k * 16 * bf16::kTile, steps, z[g], k > 0);
    }
  }
}

// Scales one token's sums and what it has of the block so far: its shift has risen.
void scale_token(int token, float factor, float* sums, int64_t steps, uint16_t* e, int64_t tiles) {
  using bf16::kTile;
  for (int64_t h = 0; h < steps; ++h) {
    float* row = sums + (h * kTile + token) * kTile;
    for (int64_t i = 0; i < kTile; ++i) row[i] *= factor;
  }
  const __m512 by = lanes::constant(factor);
  for (int64_t g = 0; g < tiles; ++g) {
    auto* row = reinterpret_cast<__m256i*>(e + (g * kTile + token) * kTile);
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row)), 16);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row + 1)), 16);
    const __m512 first = _mm512_mul_ps(_mm512_castsi512_ps(low), by);
    const __m512 second = _mm512_mul_ps(_mm512_castsi512_ps(high), by);
    _mm512_storeu_si512(row, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}

void add_masses(const Job& job, const float* z, const float* zr, const Panel& tokens, int64_t column, Masses& m) {
  if (job.kl) mass_tile<true>(z, zr, tokens, column, m.policy);
  if (!job.kl) mass_tile<false>(z, z, tokens, column, m.policy);
  if (job.rkl) mass_tile<true>(zr, z, tokens, column, m.reference);
  if (!job.rkl && !job.kl && job.xr != nullptr) mass_tile<false>(zr, zr, tokens, column, m.reference);
}

// Everything a block of tokens gets from one segment of the vocabulary.
void work(const Job& job, int64_t first_panel, int64_t last_panel, int64_t segment) {
  using bf16::kTile;
  const int64_t panels = last_panel - first_panel, steps = job.steps;
  const int64_t begin = segment * job.segment_columns, end = std::min(job.columns, begin + job.segment_columns);
  Buffer<uint16_t> rows(kStrips * steps * kTileSums), ref_rows(job.wr != nullptr ? kStrips * steps * kTileSums : 1);
  Buffer<uint32_t> pairs(job.grad ? kBlock / 2 * steps * kTile : 1);
  Buffer<uint16_t> e(job.grad ? panels * kTile * kBlock : 1);
  Buffer<Masses> masses(job.states ? panels : 1);
  Buffer<float[kTileSums]> z(kStrips), zr(job.xr != nullptr ? kStrips : 1);
  for (int64_t p = 0; job.states && p < panels; ++p) masses.data[p].policy.clear(), masses.data[p].reference.clear();
  job.unit->begin();
  for (int64_t column = begin; column < end; column += kBlock) {
    const int64_t n = std::min(kBlock, end - column), strips = bf16::tiles(n);
    const uint16_t* w = job.w + column * job.weight_stride;
    if (job.grad) bf16::pack_row_pairs(w, job.weight_stride, n, job.width, strips * 16, pairs.data);
    pack_strips(w, job.weight_stride, n, job.width, rows.data);
    if (job.wr != nullptr) {
      pack_strips(job.wr + column * job.ref_weight_stride, job.ref_weight_stride, n, job.width, ref_rows.data);
    }
    const uint16_t* reference = job.wr != nullptr ? ref_rows.data : rows.data;
    for (int64_t p = first_panel; p < last_panel; ++p) {
      logits(job, rows.data, strips, job.packed + p * job.panel_words(), z.data);
      if (job.xr != nullptr) logits(job, reference, strips, job.packed_ref + p * job.panel_words(), zr.data);
      uint16_t* panel_e = e.data + (p - first_panel) * kTile * kBlock;
      float* sums = job.pulled + (segment * job.panels + p) * job.panel_sums();
      for (int64_t g = 0; g < strips; ++g) {
        const int64_t at = column + g * kTile, valid = std::min(kTile, end - at);
        const Shape shape{job.bias == nullptr ? nullptr : job.bias + at, job.scale, job.softcap};
        shape(z.data[g], valid, job.tokens[p]);
        if (job.xr != nullptr) shape(zr.data[g], valid, job.tokens[p]);
        if (job.states) add_masses(job, z.data[g], zr.data[g], job.tokens[p], at, masses.data[p - first_panel]);
        if (!job.grad) continue;
        ExpState& exp = job.exp[segment * job.panels + p];
        const auto raise = [&](int token, float factor) {
          scale_token(token, factor, sums, column > begin ? steps : 0, panel_e, g);
        };
        uint16_t* out = panel_e + g * kTile * kTile;
        if (job.softcap > 0) exp_tile<true>(z.data[g], job.tokens[p], at, job.softcap, exp, out, raise);
        if (job.softcap == 0) exp_tile<false>(z.data[g], job.tokens[p], at, 0.0f, exp, out, raise);
      }
    }
    for (int64_t h = 0; job.grad && h < steps; ++h) {
      const uint32_t* b = pairs.data + h * strips * 16 * kTile;
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const uint16_t* a = e.data + (p - first_panel) * kTile * kBlock;
        float* sums = job.pulled + (segment * job.panels + p) * job.panel_sums() + h * kTileSums;
        job.unit->multiply(a, b, strips, sums, column > begin);
      }
    }
  }
  job.unit->end();
  for (int64_t p = first_panel; job.states && p < last_panel; ++p) {
    store_states(job, segment, p, masses.data[p - first_panel], begin, end);
  }
}

// The segments' exponentials of one token, brought to the largest shift: sums in order of the segments.
void merge_exponentials(const Job& job, int64_t row, float* shift, double* mass, double* target, float* pulled) {
  const int64_t panel = row / bf16::kTile, t = row % bf16::kTile;
  double top = -std::numeric_limits<double>::infinity(), factor[kSegments];
  for (int64_t s = 0; s < job.segments; ++s) top = std::max(top, double(job.exp[s * job.panels + panel].shift[t]));
  const Panel& tokens = job.tokens[panel];
  constexpr double unit = 1.0 / lanes::kLog2E;  // ln 2 as the passes have it
  *shift = float(top * unit);
  const double base = std::abs(top) < kHuge ? double(*shift) : top * unit;
  *mass = 0, *target = -std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < job.segments; ++s) {
    const ExpState& state = job.exp[s * job.panels + panel];
    // the shift is handed on in natural units, rounded: the factors make up for it, where exp has the range. A shift of
    // -inf in effect: there is no column beside the target and masked ones.
    const double scaled = state.shift[t] < kNothing ? 0.0 : std::exp(double(state.shift[t]) * unit - base);
    *mass += scaled * state.mass[t];
    // E' W as a mean of W's rows whose weights sum to what they should: what the rounding of E' did to their sum would
    // show beside W_y, where the rows resemble each other
    factor[s] = state.kept[t] > 0 ? scaled * (state.product[t] / state.kept[t]) : scaled;
    const bool here = tokens.target[t] >= 0 && tokens.target[t] / job.segment_columns == s;
    if (here) *target = std::max(double(state.target[t]), double(kMinusInf));
  }
  for (int64_t h = 0; h < job.width; h += bf16::kTile) {
    const int64_t n = std::min(bf16::kTile, job.width - h);
    for (int64_t s = 0; s < job.segments; ++s) {
      const float* from = job.pulled + (s * job.panels + panel) * job.panel_sums() + (h + t) * bf16::kTile;
      const float by = float(factor[s]);
      for (int64_t i = 0; i < n; ++i) pulled[h + i] = (s == 0 ? 0.0f : pulled[h + i]) + by * from[i];
    }
  }
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The tokens of a chunk: temperatures and targets; what lies behind the last row is computed and not kept.
void fill_panels(const Job& job, Panel* panels) {
  for (int64_t i = 0; i < job.panels * bf16::kTile; ++i) {
    Panel& panel = panels[i / bf16::kTile];
    const int64_t t = i % bf16::kTile, row = std::min(i, job.rows - 1);
    if (t == 0) panel.tempered = false;
    panel.temperature[t] = job.temperature[row];
    panel.inverse[t] = 1.0f / job.temperature[row];
    panel.tempered = panel.tempered || job.temperature[row] != 1.0f;
    const int64_t y = i < job.rows ? job.target[row] : -1;
    panel.target[t] = y >= 0 && y < job.columns ? int32_t(y) : -1;
  }
}

// Rows of one chunk through the whole vocabulary.
void chunk(Job job, float* shift, double* mass, double* target_z, float* pulled, int64_t pulled_stride) {
  using bf16::kTile;
  job.panels = bf16::tiles(job.rows);
  Buffer<uint32_t> packed(job.panels * job.panel_words());
  Buffer<uint32_t> packed_ref(job.xr != nullptr ? job.panels * job.panel_words() : 1);
  Buffer<Panel> tokens(job.panels);
  Buffer<ExpState> exp(job.segments * job.panels);
  Buffer<float> sums(job.grad ? job.segments * job.panels * job.panel_sums() : 1);
  fill_panels(job, tokens.data);
  for (int64_t i = 0; i < job.segments * job.panels; ++i) {
    exp.data[i].started = false;
    std::fill_n(exp.data[i].mass, kTile, 0.0);
    std::fill_n(exp.data[i].product, kTile, 0.0);
    std::fill_n(exp.data[i].kept, kTile, 0.0);
  }
  torch::stable::parallel_for(0, job.panels, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t p = lo; p < hi; ++p) {
      const int64_t row = p * kTile, left = job.rows - row, at = p * job.panel_words();
      bf16::pack_columns(job.x + row * job.row_stride, job.row_stride, left, job.width, packed.data + at);
      if (job.xr == nullptr) continue;
      bf16::pack_columns(job.xr + row * job.ref_stride, job.ref_stride, left, job.width, packed_ref.data + at);
    }
  });
  job.packed = packed.data, job.packed_ref = packed_ref.data, job.tokens = tokens.data, job.exp = exp.data;
  job.pulled = sums.data;
  // A task packs the weight for itself: as many tokens as the number of threads allows.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (job.panels * job.segments + threads - 1) / threads;
  const int64_t size = std::max<int64_t>(1, std::min(share, job.panels));
  const int64_t blocks = (job.panels + size - 1) / size;
  torch::stable::parallel_for(0, blocks * job.segments, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t first = i / job.segments * size;
      work(job, first, std::min(first + size, job.panels), i % job.segments);
    }
  });
  if (!job.grad) return;
  torch::stable::parallel_for(0, job.rows, 16, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      merge_exponentials(job, i, shift + i, mass + i, target_z + i, pulled + i * pulled_stride);
    }
  });
}

// Sums over the whole vocabulary. state fp64 [segments, 10, rows] (as head_stats') and far int32 [rows] (1: the sums of
// the reference have left fp32's range, the row's state is void) are given where states are wanted; shift fp32, mass,
// target_z fp64 [rows] and pulled fp32 [rows, width] where exponentials are. Returns how many segments there are.
int64_t head_tiles(Tensor x, std::optional<Tensor> xr, Tensor w, std::optional<Tensor> wr, Tensor target,
                   std::optional<Tensor> bias, Tensor temperature, double softcap, double scale, bool kl, bool rkl,
                   std::optional<Tensor> state, std::optional<Tensor> far, std::optional<Tensor> shift,
                   std::optional<Tensor> mass, std::optional<Tensor> target_z, std::optional<Tensor> pulled) {
  Job job{};
  job.unit = bf16::tile_unit();
  if (job.unit == nullptr) throw std::runtime_error("head_tiles: this machine has no bf16 tile unit");
  job.width = x.size(1), job.columns = w.size(0);
  job.row_stride = x.stride(0), job.weight_stride = w.stride(0);
  job.ref_stride = xr.has_value() ? xr->stride(0) : 0, job.ref_weight_stride = wr.has_value() ? wr->stride(0) : 0;
  job.w = elements<uint16_t>(w), job.wr = elements<uint16_t>(wr), job.bias = elements<float>(bias);
  job.softcap = float(softcap), job.scale = float(scale), job.kl = kl, job.rkl = rkl;
  job.states = state.has_value(), job.grad = pulled.has_value();
  job.steps = bf16::tiles(job.width);
  job.segment_columns = round_up((job.columns + kSegments - 1) / kSegments, kBlock);
  job.segments = (job.columns + job.segment_columns - 1) / job.segment_columns;
  job.all_rows = x.size(0);
  job.state = job.states ? elements<double>(state) : nullptr;
  job.far = job.states ? elements<int32_t>(*far) : nullptr;
  for (int64_t first = 0; first < job.all_rows; first += kRowsAtOnce) {
    job.first_row = first, job.rows = std::min(kRowsAtOnce, job.all_rows - first);
    job.x = elements<uint16_t>(x) + first * job.row_stride;
    job.xr = xr.has_value() ? elements<uint16_t>(*xr) + first * job.ref_stride : nullptr;
    job.target = elements<int64_t>(target) + first;
    job.temperature = elements<float>(temperature) + first;
    if (job.grad) {
      chunk(job, elements<float>(*shift) + first, elements<double>(*mass) + first, elements<double>(*target_z) + first,
            elements<float>(*pulled) + first * job.width, job.width);
    } else {
      chunk(job, nullptr, nullptr, nullptr, nullptr, 0);
    }
  }
  return job.segments;
}

}  // namespace

#pragma GCC pop_options

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("head_tiles", TORCH_BOX(&head_tiles)); }

#endif

namespace {

// 0 where there is no tile unit, 1 for AVX512-BF16, 2 for AMX.
int64_t bf16_isa() {
  const bf16::TileUnit* unit = bf16::tile_unit();
  return unit == nullptr ? 0 : int64_t(unit->isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CompositeExplicitAutograd, m) { m.impl("bf16_isa", TORCH_BOX(&bf16_isa)); }
