// Row passes of the language-model head: statistics, exponentials and logit gradients of one vocabulary block
// [rows, n] of fp32 logits, each row read once from memory and worked on while it sits in cache.
//
// Blocks are merged by the caller (log-masses, and the chain rule of entropy and KL). See docs/kernels.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ratio_row.h"

using torch::stable::Tensor;

namespace {

// ---- leaf functions: one row or a part of it ----

// Raw logits to z = softcap * tanh(scale * (raw + bias) / softcap) / temperature, in place (softcap 0: none).
CLONES void transform(float* z, const float* bias, int64_t n, float scale, float softcap, float temperature) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
  }
  if (softcap > 0) {
    const float inner = scale / softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = softcap * vec::tanh(z[i] * inner) / temperature;
    return;
  }
  if (scale != 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] *= scale;
  }
  if (temperature != 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] /= temperature;
  }
}

// z to e^(z-shift) in place; returns the sum.
CLONES float exp_chunk(float* z, int64_t n, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = vec::exp(z[i] - shift);
    z[i] = e;
    sum += e;
  }
  return sum;
}

// The same times the softcap's derivative 1 - tanh^2, which z itself holds; the sum is without the derivative.
CLONES float exp_capped_chunk(float* z, int64_t n, float shift, float untanh) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = vec::exp(z[i] - shift), t = z[i] * untanh;
    z[i] = e * (1.0f - t * t);
    sum += e;
  }
  return sum;
}

struct JsSums {
  float js, kl_mean;  // shares of JS(p, q) and of KL(p || (p + q) / 2)
};

CLONES JsSums js_chunk(const float* z, const float* zr, int64_t n, Normalisers norm) {
  float js_sum = 0, mean_sum = 0;
#pragma omp simd reduction(+ : js_sum, mean_sum)
  for (int64_t i = 0; i < n; ++i) {
    add_js(z[i], zr[i], norm, js_sum, mean_sum);
  }
  return {js_sum, mean_sum};
}

CLONES void grad_ratio(float* z, const float* zr, int64_t n, Coefficients c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = gradient(z[i], zr[i], c);
}

// dz to the gradient of the raw logits: times scale / temperature and, with a softcap, 1 - tanh^2 (tanh from z).
CLONES void uncap(float* dz, const float* z, int64_t n, float factor, float untanh) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = z[i] * untanh;
    dz[i] *= factor * (1.0f - t * t);
  }
}

CLONES void multiply(float* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// ---- ops ----

// How raw logits become z; the raw flag says whether that is still to be done.
struct Transform {
  const float* bias;
  const float* temperature;
  float scale, softcap;
  bool raw;
  void operator()(float* z, int64_t row, int64_t n) const {
    if (raw) transform(z, bias, n, scale, softcap, temperature[row]);
  }
  float untanh(int64_t row) const { return temperature[row] / softcap; }
};

// Writes a block's statistics to state [10, rows] (fp64): lse, rest, target, entropy of the policy; lse, rest, target
// of the reference; difference, kl, rkl. z (and zr) become transformed logits.
void head_stats(Tensor z, std::optional<Tensor> zr, Tensor target, std::optional<Tensor> bias, Tensor temperature,
                double softcap, double scale, bool raw, bool kl, bool rkl, Tensor state) {
  const int64_t rows = z.size(0), n = z.size(1);
  const auto* targets = data<int64_t>(target);
  const Transform to_z{data<float>(bias), data<float>(temperature), float(scale), float(softcap), raw};
  double* out = data<double>(state);
  each_row(rows, n, [&](int64_t i) {
    float* row = data<float>(z) + i * n;
    to_z(row, i, n);
    Ratio policy;
    Mass reference;
    double reverse = 0;
    if (!zr.has_value()) {
      policy.mass = mass_row(row, n, targets[i]);
    } else {
      float* other = data<float>(*zr) + i * n;
      to_z(other, i, n);
      if (kl) policy = ratio_row(row, other, n, targets[i]);
      if (!kl) policy.mass = mass_row(row, n, targets[i]);
      if (rkl) {
        const Ratio swapped = ratio_row(other, row, n, targets[i]);
        reference = swapped.mass, reverse = swapped.kl;
        if (!kl) policy.difference = -swapped.difference;
      } else {
        reference = mass_row(other, n, targets[i]);
        if (!kl) policy.difference = reference.lse - policy.mass.lse;
      }
    }
    const double values[10] = {policy.mass.lse, policy.mass.rest, policy.mass.target, policy.mass.entropy,
                               reference.lse,   reference.rest,   reference.target,   policy.difference,
                               policy.kl,       reverse};
    for (int64_t k = 0; k < 10; ++k) out[k * rows + i] = values[k];
  });
}

// Turns a block of logits into e^(z - shift) times the softcap's derivative, the target's column 0. shift [rows] starts
// as the first block's maximum and rises when a later one exceeds it by 60; mass [rows] (fp64) and the caller's own
// sums are then to be multiplied by factor [rows]. Writes the target's z where it lies in this block.
void head_exp(Tensor z, Tensor target, std::optional<Tensor> bias, Tensor temperature, double softcap, double scale,
              bool raw, bool first, Tensor shift, Tensor mass, Tensor factor, Tensor target_z) {
  const int64_t rows = z.size(0), n = z.size(1);
  const auto* targets = data<int64_t>(target);
  const Transform to_z{data<float>(bias), data<float>(temperature), float(scale), float(softcap), raw};
  each_row(rows, n, [&](int64_t i) {
    float* row = data<float>(z) + i * n;
    to_z(row, i, n);
    const int64_t t = targets[i];
    const bool here = t >= 0 && t < n;
    if (here) {
      data<double>(target_z)[i] = row[t];
      row[t] = kLowest;
    }
    const float top = clamp_and_max(row, n);
    float& c = data<float>(shift)[i];
    double& sum = data<double>(mass)[i];
    float grown = 1;
    if (first) {
      c = top;
    } else if (top - c > 60.0f) {
      grown = vec::exp(std::max(c - top, -200.0f));
      c = top;
    }
    data<float>(factor)[i] = grown;
    sum *= grown;
    for (int64_t j = 0; j < n; j += kChunk) {
      const int64_t width = std::min(kChunk, n - j);
      sum += softcap > 0 ? exp_capped_chunk(row + j, width, c, to_z.untanh(i)) : exp_chunk(row + j, width, c);
    }
    if (here) {
      if (c == kLowest) sum -= 1;  // the masked target itself was counted
      row[t] = 0;
    }
  });
}

// Adds a block's shares of JS and of KL(p || (p + q) / 2) to sums [2, rows] (fp64). lse (a sum of two, [2, rows]) and
// ratio [rows] are fp32.
void head_js(Tensor z, Tensor zr, std::optional<Tensor> bias, Tensor temperature, double softcap, double scale,
             bool raw, Tensor lse, Tensor ratio, Tensor sums) {
  const int64_t rows = z.size(0), n = z.size(1);
  const Transform to_z{data<float>(bias), data<float>(temperature), float(scale), float(softcap), raw};
  const float* high = data<float>(lse);
  each_row(rows, n, [&](int64_t i) {
    float *row = data<float>(z) + i * n, *other = data<float>(zr) + i * n;
    to_z(row, i, n);
    to_z(other, i, n);
    clamp_and_max(row, n);
    clamp_and_max(other, n);
    const Normalisers norm = normalisers(high[i], high[rows + i], data<float>(ratio)[i]);
    for (int64_t j = 0; j < n; j += kChunk) {
      const JsSums part = js_chunk(row + j, other + j, std::min(kChunk, n - j), norm);
      data<double>(sums)[i] += part.js;
      data<double>(sums)[rows + i] += part.kl_mean;
    }
  });
}

// Turns a block of logits into the gradient of the raw logits. coefficients [10, rows] (fp32): the members of
// Coefficients in order, then the log-probability's upstream gradient g (which `constant` holds as -g) and
// g (1 - p_target). scratch [rows, n] is used with a softcap only.
void head_grad(Tensor z, std::optional<Tensor> zr, Tensor target, std::optional<Tensor> bias, Tensor temperature,
               double softcap, double scale, bool raw, Tensor coefficients, std::optional<Tensor> scratch) {
  const int64_t rows = z.size(0), n = z.size(1);
  const auto* targets = data<int64_t>(target);
  const Transform to_z{data<float>(bias), data<float>(temperature), float(scale), float(softcap), raw};
  const float* c = data<float>(coefficients);
  each_row(rows, n, [&](int64_t i) {
    float* row = data<float>(z) + i * n;
    float* other = zr.has_value() ? data<float>(*zr) + i * n : nullptr;
    to_z(row, i, n);
    clamp_and_max(row, n);
    if (other != nullptr) {
      to_z(other, i, n);
      clamp_and_max(other, n);
    }
    const auto column = [&](int64_t k) { return c[k * rows + i]; };
    const Coefficients k{column(0), column(1), column(2), column(3), column(4), column(5), column(6), column(7)};
    float* capped = nullptr;
    if (softcap > 0) {
      capped = data<float>(*scratch) + i * n;
      std::copy(row, row + n, capped);
    }
    const int64_t t = targets[i];
    const bool here = t >= 0 && t < n;
    float at_target = 0;
    if (here) {  // once more for the target alone, without the log-probability's share, which is added exactly
      Coefficients rest = k;
      rest.constant += column(8);
      at_target = row[t];
      if (other != nullptr) {
        grad_ratio(&at_target, other + t, 1, rest);
      } else {
        grad_plain(&at_target, 1, rest);
      }
      at_target += column(9);
    }
    if (other != nullptr) {
      grad_ratio(row, other, n, k);
    } else {
      grad_plain(row, n, k);
    }
    if (here) row[t] = at_target;
    const float factor = float(scale) / to_z.temperature[i];
    if (capped != nullptr) {
      uncap(row, capped, n, factor, to_z.untanh(i));
    } else if (factor != 1.0f) {
      multiply(row, n, factor);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("head_stats", TORCH_BOX(&head_stats));
  m.impl("head_exp", TORCH_BOX(&head_exp));
  m.impl("head_js", TORCH_BOX(&head_js));
  m.impl("head_grad", TORCH_BOX(&head_grad));
}
