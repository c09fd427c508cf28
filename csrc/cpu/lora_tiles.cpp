// lora_linear on the CPU's tile units: the ops. y_p = x W_p^T + bias_p + scale_e (x A_pe^T) B_pe^T, and its gradients.
// The backward of x is the same product, with dY for x and every matrix transposed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>

#include "half.h"
#include "lora_job.h"

#ifdef BF16_TILES

namespace {

using lora::Adapter;
using lora::Job;
using lora::Matrix;
using lora::Outer;
using lora::Output;
using lora::Product;
using lora::Rows;
using lora::Span;
using lora::Term;
using lora::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Modules call without the checks of lora_linear's arguments, and a wrong size or type here would be a wrong address.
void expect(bool right, const char* what) {
  if (!right) throw std::runtime_error(std::string("lora_tiles: ") + what);
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::half;
    case ScalarType::Float:
      return Type::single;
    default:
      throw std::runtime_error("lora_tiles: a tensor is neither bfloat16, float16 nor float32");
  }
}

constexpr int64_t kFew = 24, kSome = 192;  // rows up to which dots, and from there lanes, are the fastest
constexpr int64_t kFewDots = 56;           // rows up to which packing W costs more than it saves, without lanes
constexpr int64_t kFewMatrix = 16;         // the same beside a matrix unit, many times as fast as the vector unit

// The operand whose rows are t's rows.
Matrix rows_of(const Tensor& t, const int32_t* order = nullptr) {
  const bool along = t.stride(1) == 1 || t.size(1) <= 1;
  if (!along && order != nullptr) throw std::runtime_error("lora_tiles: rows have gaps");
  if (!along && t.stride(0) != 1 && t.size(0) > 1)
    throw std::runtime_error("lora_tiles: neither stride of a matrix is 1");
  return {t.data_ptr(), type_of(t), t.size(0), t.size(1), t.stride(along ? 0 : 1), along, order};
}

// The operand whose rows are t's columns.
Matrix columns_of(const Tensor& t, const int32_t* order = nullptr) {
  Matrix m = rows_of(t, order);
  std::swap(m.rows, m.depth);
  m.along = !m.along;
  return m;
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

// One stored row after the other, each without gaps, of the type that all of a call have but the adapters.
bool is_output(const Tensor& t, int64_t rows, int64_t columns, ScalarType type) {
  return is_matrix(t, rows, columns) && t.scalar_type() == type && (columns <= 1 || t.stride(1) == 1);
}

// Sizes of what forward and backward share. features: of x.
void check_weights(const std::vector<Tensor>& w, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                   const std::vector<double>& scaling, int64_t features, ScalarType type) {
  const size_t n = scaling.size();
  expect(!w.empty() && a.size() == w.size() * n && b.size() == a.size(),
         "there must be one A and B for each projection and adapter");
  for (size_t p = 0; p < w.size(); ++p) {
    expect(w[p].dim() == 2 && w[p].size(1) == features, "a weight has not the features of x");
    expect(w[p].scalar_type() == type, "a weight has not the dtype of x");
    for (size_t i = p * n; i < (p + 1) * n; ++i) {
      expect(a[i].dim() == 2 && a[i].size(1) == features, "an A has not the features of x");
      expect(is_matrix(b[i], w[p].size(0), a[i].size(0)), "a B is not [weight's rows, A's rows]");
    }
  }
}

void check_index(const std::optional<Tensor>& index, int64_t rows) {
  if (!index.has_value()) return;
  expect(index->scalar_type() == ScalarType::Int || index->scalar_type() == ScalarType::Long,
         "index is neither int32 nor int64");
  expect(index->dim() == 1 && index->size(0) >= rows, "index has fewer entries than there are rows");
}

struct Unit {
  const bf16::TileUnit* unit;
  Type words;
};

Unit unit_for(Type type) {
  const Unit found = type == Type::bf16 ? Unit{bf16::tile_unit(), Type::bf16} : Unit{bf16::float_unit(), Type::single};
  if (found.unit == nullptr) throw std::runtime_error("this machine has no tile unit for that dtype");
  return found;
}

template <typename F>
void each_row(const std::optional<Tensor>& index, const std::vector<int64_t>& runs, int64_t count, const F& f) {
  if (!index.has_value()) {
    for (size_t i = 0; i + 2 < runs.size(); i += 3) {
      for (int64_t row = std::max<int64_t>(runs[i], 0); row < std::min(runs[i + 1], count); ++row) f(row, runs[i + 2]);
    }
  } else if (index->scalar_type() == ScalarType::Int) {
    for (int64_t row = 0; row < count; ++row) f(row, elements<int32_t>(*index)[row * index->stride(0)]);
  } else {
    for (int64_t row = 0; row < count; ++row) f(row, elements<int64_t>(*index)[row * index->stride(0)]);
  }
}

// The first `count` rows by adapter: first those without, then each adapter's, last those outside, each in their order.
Rows by_adapter(const std::optional<Tensor>& index, const std::vector<int64_t>& runs, int64_t count, int64_t n) {
  const auto slot = [n](int64_t e) { return e == -1 ? 0 : e >= 0 && e < n ? e + 1 : n + 1; };
  std::vector<int64_t> first(n + 3, 0);
  each_row(index, runs, count, [&](int64_t, int64_t e) { ++first[slot(e) + 1]; });
  std::partial_sum(first.begin(), first.end(), first.begin());
  expect(first.back() == count, "runs do not name every row once");
  Rows rows;
  rows.count = count;
  for (int64_t i = 0; i < n + 2; ++i) {
    const int64_t adapter = i == n + 1 ? lora::kOutside : i - 1;
    if (first[i] < first[i + 1]) rows.spans.push_back({first[i], first[i + 1], adapter});
  }
  if (rows.spans.size() <= 1) return rows;
  rows.order.resize(count);
  std::vector<int64_t> at(first.begin(), first.end() - 1);
  each_row(index, runs, count, [&](int64_t row, int64_t e) { rows.order[at[slot(e)]++] = int32_t(row); });
  return rows;
}

struct Widths {  // of S: where each projection's part begins, in the compact tensor and in whole tiles
  std::vector<int64_t> rank, compact{0}, padded{0};
};

Widths widths_of(const std::vector<Tensor>& a, size_t projections) {
  Widths w;
  const size_t n = projections == 0 ? 0 : a.size() / projections;
  for (size_t p = 0; p < projections; ++p) {
    int64_t rank = 0;
    for (size_t e = 0; e < n; ++e) rank = std::max(rank, a[p * n + e].size(0));
    w.rank.push_back(rank);
    w.compact.push_back(w.compact.back() + rank);
    w.padded.push_back(w.padded.back() + operand::tiles(rank) * bf16::kTile);
  }
  return w;
}

Adapter adapter_of(const Matrix& shrink, const Matrix& expand, double scale) {
  return {shrink, expand, shrink.rows, float(scale)};
}

// S as it is kept: x's dtype, each projection's columns beside each other, rows of the batch.
void keep_s(const Job& job, const Widths& w, const Tensor& s) {
  const int64_t saved = s.size(0);
  const bool round = job.rounded == Type::half;
  const int64_t size = lora::element_bytes(job.words);
  torch::stable::parallel_for(0, job.rows->count, 64, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t row = job.rows->row(i);
      if (row >= saved) continue;
      for (size_t p = 0; p < w.rank.size(); ++p) {
        const char* from = static_cast<const char*>(job.s) + (i * job.s_width + w.padded[p]) * size;
        const int64_t at = row * s.stride(0) + w.compact[p];
        if (!round) {
          std::memcpy(static_cast<char*>(s.data_ptr()) + at * size, from, size_t(w.rank[p] * size));
          continue;
        }
        for (int64_t j = 0; j < w.rank[p]; ++j) {
          elements<uint16_t>(s)[at + j] = float_to_half(reinterpret_cast<const float*>(from)[j]);
        }
      }
    }
  });
}

void lora_tiles(Tensor x, std::vector<Tensor> w, std::vector<Tensor> bias, std::vector<Tensor> a, std::vector<Tensor> b,
                std::optional<Tensor> index, std::vector<int64_t> runs, std::vector<double> scaling,
                std::vector<Tensor> y, std::optional<Tensor> s) {
  expect(x.dim() == 2, "x is no matrix");
  check_weights(w, a, b, scaling, x.size(1), x.scalar_type());
  check_index(index, x.size(0));
  expect(y.size() == w.size() && (bias.empty() || bias.size() == w.size()),
         "there must be one y and bias for each weight");
  const size_t n = scaling.size();
  const Rows rows = by_adapter(index, runs, x.size(0), int64_t(n));
  const Widths widths = widths_of(a, w.size());
  expect(
      !s.has_value() || (s->size(0) <= x.size(0) && is_output(*s, s->size(0), widths.compact.back(), x.scalar_type())),
      "s is not [saved rows, ranks] of x's dtype");
  const Unit unit = unit_for(type_of(x));
  Job job{unit.unit, unit.words, type_of(x), {rows_of(x, rows.renumbered())}, {}, &rows, widths.padded.back(), nullptr};
  for (size_t p = 0; p < w.size(); ++p) {
    Term term{0, rows_of(w[p]), {}, widths.padded[p]};
    for (size_t e = 0; e < n; ++e) {
      term.adapters.push_back(adapter_of(rows_of(a[p * n + e]), rows_of(b[p * n + e]), scaling[e]));
    }
    expect(is_output(y[p], x.size(0), w[p].size(0), x.scalar_type()), "a y is not [rows, weight's rows] of x's dtype");
    const void* added = p < bias.size() && bias[p].numel() > 0 ? bias[p].data_ptr() : nullptr;
    expect(added == nullptr || (bias[p].dim() == 1 && bias[p].size(0) == w[p].size(0)),
           "a bias has not the weight's rows");
    expect(added == nullptr || bias[p].scalar_type() == x.scalar_type(), "a bias has not the dtype of x");
    job.products.push_back({{term}, {y[p].data_ptr(), type_of(y[p]), y[p].size(1), y[p].stride(0), added}});
  }
  Buffer<char> scratch(rows.count * job.s_width * lora::element_bytes(job.words) + 1);
  job.s = scratch.data;
  const bool matrix = unit.unit->isa == bf16::Isa::amx;
  bool done = !matrix && rows.count > kFew && rows.count <= kSome && lora::multiply_lanes(job);
  if (!done && rows.count <= (matrix ? kFewMatrix : kFewDots)) done = lora::multiply_few(job);
  if (!done) lora::multiply(job);
  if (s.has_value() && s->numel() > 0) keep_s(job, widths, *s);
}

void zero(const Tensor& t) {  // a fresh tensor, without gaps
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, size_t(t.numel() * lora::element_bytes(type_of(t))));
}

void check_gradients(const std::vector<Tensor>& grad, const std::vector<Tensor>& w, const std::vector<Tensor>& a,
                     const std::vector<Tensor>& b, const Tensor& x, const Tensor& s, const Widths& widths,
                     int64_t grad_rows, const Tensor& dx, const std::vector<Tensor>& da,
                     const std::vector<Tensor>& db) {
  const ScalarType type = w[0].scalar_type();
  const int64_t features = w[0].size(1);
  expect(da.size() == a.size() && db.size() == b.size(), "there must be one dA and dB for each A and B");
  expect(grad_rows >= 0, "grad_rows is negative");
  for (size_t p = 0; p < w.size(); ++p) {
    if (grad[p].numel() == 0) continue;
    expect(grad[p].dim() == 2 && grad[p].size(0) >= grad_rows && grad[p].size(1) == w[p].size(0) &&
               grad[p].scalar_type() == type,
           "a gradient is not [rows, weight's rows] of the weight's dtype");
  }
  expect(dx.numel() == 0 || (dx.size(0) >= grad_rows && is_output(dx, dx.size(0), features, type)),
         "dx is not [rows, features] of the weight's dtype");
  for (size_t i = 0; i < a.size(); ++i) {
    expect(da[i].numel() == 0 || is_output(da[i], a[i].size(0), features, da[i].scalar_type()),
           "a dA is not like its A");
    expect(db[i].numel() == 0 || is_output(db[i], b[i].size(0), b[i].size(1), db[i].scalar_type()),
           "a dB is not like its B");
    expect(da[i].numel() == 0 || (x.dim() == 2 && x.size(0) >= grad_rows && x.size(1) == features),
           "x is not [grad_rows, features]");
    expect(db[i].numel() == 0 || (s.size(0) >= grad_rows && is_output(s, s.size(0), widths.compact.back(), type)),
           "s is not [grad_rows, ranks] of the weight's dtype");
  }
}

void lora_tiles_backward(std::vector<Tensor> grad, std::vector<Tensor> w, std::vector<Tensor> a, std::vector<Tensor> b,
                         std::optional<Tensor> index, std::vector<int64_t> runs, std::vector<double> scaling, Tensor x,
                         Tensor s, int64_t grad_rows, Tensor dx, std::vector<Tensor> da, std::vector<Tensor> db) {
  expect(!w.empty() && w[0].dim() == 2 && grad.size() == w.size(), "there must be one gradient for each weight");
  const int64_t features = w[0].size(1);
  check_weights(w, a, b, scaling, features, w[0].scalar_type());
  check_index(index, grad_rows);
  const size_t n = scaling.size();
  const Rows rows = by_adapter(index, runs, grad_rows, int64_t(n));
  const Widths widths = widths_of(a, w.size());
  check_gradients(grad, w, a, b, x, s, widths, grad_rows, dx, da, db);
  const Type type = type_of(w[0]);
  const Unit unit = unit_for(type);
  bool asked = dx.numel() > 0;
  for (const Tensor& t : da) asked = asked || t.numel() > 0;
  Product product{{}, {nullptr, type, 0, 0, nullptr}};
  if (dx.numel() > 0) {
    product.out = {dx.data_ptr(), type, dx.size(1), dx.stride(0), nullptr};
    char* beyond = static_cast<char*>(dx.data_ptr()) + grad_rows * dx.stride(0) * lora::element_bytes(type);
    std::memset(beyond, 0, size_t((dx.size(0) - grad_rows) * dx.size(1) * lora::element_bytes(type)));
  }
  Job job{unit.unit, unit.words, type, {}, {}, &rows, widths.padded.back(), nullptr};
  for (size_t p = 0; p < w.size(); ++p) {
    if (grad[p].numel() == 0) continue;
    Term term{int64_t(job.lefts.size()), {}, {}, widths.padded[p]};
    if (dx.numel() > 0) term.right = columns_of(w[p]);  // else it may be a stand-in
    job.lefts.push_back(rows_of(grad[p], rows.renumbered()));
    for (size_t e = 0; e < n; ++e) {
      term.adapters.push_back(adapter_of(columns_of(b[p * n + e]), columns_of(a[p * n + e]), scaling[e]));
    }
    product.terms.push_back(term);
  }
  job.products.push_back(product);
  Buffer<char> scratch(rows.count * job.s_width * lora::element_bytes(job.words) + 1);
  job.s = scratch.data;
  if (asked) lora::multiply(job);
  std::vector<Outer> outers;
  for (size_t p = 0; p < w.size(); ++p) {
    for (size_t e = 0; e < n; ++e) {
      const size_t i = p * n + e;
      const int64_t rank = a[i].size(0), at = rank == 0 ? 0 : widths.padded[p] * lora::element_bytes(job.words);
      const auto span = std::find_if(rows.spans.begin(), rows.spans.end(),
                                     [e](const Span& one) { return one.adapter == int64_t(e); });
      if (span == rows.spans.end() || grad[p].numel() == 0) {
        zero(da[i]), zero(db[i]);
        continue;
      }
      if (da[i].numel() > 0) {
        const Matrix ds{scratch.data + at, job.words, rank, rows.count, job.s_width, false};
        outers.push_back({ds, columns_of(x, rows.renumbered()), span->lo, span->hi, da[i].data_ptr(), type_of(da[i]),
                          da[i].stride(0), false});
      }
      if (db[i].numel() > 0) {
        const void* kept = static_cast<const char*>(s.data_ptr()) + widths.compact[p] * lora::element_bytes(type_of(s));
        const Matrix left{kept, type_of(s), rank, rows.count, s.stride(0), false, rows.renumbered()};
        outers.push_back({left, columns_of(grad[p], rows.renumbered()), span->lo, span->hi, db[i].data_ptr(),
                          type_of(db[i]), db[i].stride(0), true});
      }
    }
  }
  lora::multiply_outer(*unit.unit, job.words, outers);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("lora_tiles", TORCH_BOX(&lora_tiles));
  m.impl("lora_tiles_backward", TORCH_BOX(&lora_tiles_backward));
}

#endif

namespace {

int64_t float_isa() {
  const bf16::TileUnit* unit = bf16::float_unit();
  return unit == nullptr ? 0 : int64_t(unit->isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CompositeExplicitAutograd, m) { m.impl("float_isa", TORCH_BOX(&float_isa)); }
