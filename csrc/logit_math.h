// The maths of the row passes for one column and for one row's sums: one definition, which the CPU loops inline into
// vector code and the CUDA kernels call per thread. No framework in it.
//
// The top token is the pivot: it is left out of every sum, so nothing cancels when it holds the mass.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/vec.h"

namespace logit {

constexpr float kLowest = -1e30f;  // stands for -inf, so that no difference of two logits is NaN
constexpr double kMasked = kLowest;

INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }  // a NaN stays one
INLINE double at_least(double x, double bound) { return x < bound ? bound : x; }

// ---- one column ----

struct MassSums {
  float e, u;  // sums of e^(z-m) and e^(z-m) (z-m)
};

INLINE void add_mass(float z, float m, float& e_sum, float& u_sum) {
  const float x = at_least(z - m, -200.0f), e = vec::exp(x);
  e_sum += e;
  u_sum += e * x;
}

struct RatioSums {
  float e, u;     // as in MassSums
  float a, b, d;  // sums of e (expm1 d - d), e expm1 d, e d, with d the log ratio relative to the pivot's
  float r;        // sum of e^(zr - zr_pivot)
};

INLINE void add_ratio(float z, float zr, float m, float mr, float pivot_d, float& e_sum, float& u_sum, float& a_sum,
                      float& b_sum, float& d_sum, float& r_sum) {
  const float x = at_least(z - m, -200.0f), e = vec::exp(x);
  const float d = (zr - z) - pivot_d;
  const float near = e * vec::expm1_minus_x(d);
  const float far_r = vec::exp(zr - mr);
  const float ed = e * d;
  const bool small = vec::abs(d) < 1.0f;
  const float b = small ? near + ed : far_r - e;
  e_sum += e;
  u_sum += e * x;
  a_sum += small ? near : b - ed;
  b_sum += b;
  d_sum += ed;
  r_sum += small ? e + b : far_r;
}

// The logsumexps of both sides, each as a sum of two (fp32 alone would err by 1e-6 at 20), and their difference.
struct Normalisers {
  float lse, lse_low, ref_lse, ref_lse_low, ratio;
};

INLINE Normalisers normalisers(float lse, float lse_low, float ratio) {
  const double reference = double(lse) + lse_low + ratio;
  const float high = float(reference);
  return {lse, lse_low, high, float(reference - high), ratio};
}

// Shares of JS(p, q) and of KL(p || (p + q) / 2). With h half the log ratio and a = sqrt(p q), a column's share of JS
// is a (h sinh h - cosh h log cosh h): nothing cancels. The reference's own normaliser gives q: p e^2h would round
// twice where the two models live on different tokens.
INLINE void add_js(float z, float zr, const Normalisers& norm, float& js_sum, float& mean_sum) {
  const float log_p = (z - norm.lse) - norm.lse_low;
  const float t = (zr - z) - norm.ratio, h = 0.5f * t, x = h * h;
  const float p = vec::exp(log_p), q = vec::exp((zr - norm.ref_lse) - norm.ref_lse_low);
  float g = -8.28145785e-5f;
  g = g * x + 3.60898125e-4f;
  g = g * x - 1.38821174e-3f;
  g = g * x + 6.94440522e-3f;
  g = g * x + 8.3599e-10f;
  g = g * x + 0.5f;
  const float near = p * vec::exp(h) * (x * g);
  const float p_part = p > 0.0f ? p * -vec::log_cosh_plus(h) : 0.0f;
  const float q_part = q > 0.0f ? q * -vec::log_cosh_plus(-h) : 0.0f;
  js_sum += vec::abs(h) < 0.5f ? near : 0.5f * (p_part + q_part);
  mean_sum += p_part;
}

// Gradients of a row's fields with respect to z, the upstream gradients folded into coefficients (see head_grad).
struct Coefficients {
  float lse, lse_low;  // the logsumexp as a sum of two
  float ratio, constant, entropy, kl, rkl, js;
};

INLINE float gradient(float z, const Coefficients& c) {
  const float log_p = at_least((z - c.lse) - c.lse_low, -200.0f);
  return vec::exp(log_p) * (c.constant + c.entropy * log_p);
}

INLINE float gradient(float z, float zr, const Coefficients& c) {
  float log_p = (z - c.lse) - c.lse_low;
  const float t = (zr - z) - c.ratio;
  const float q = vec::exp(log_p + t);
  log_p = at_least(log_p, -200.0f);
  const float p = vec::exp(log_p);
  const float less = vec::abs(t) < 1.0f ? -p * vec::expm1(t) : p - q;  // p - q
  const float mean = -vec::log_cosh_plus(0.5f * t);                    // log p - log((p + q) / 2)
  const float inner = c.constant + c.entropy * log_p - c.kl * t + c.js * mean;
  return (p > 0.0f ? p * inner : 0.0f) + c.rkl * less;
}

// ---- one row, from its sums ----

struct Mass {
  double lse = kMasked, rest = kMasked;  // log-mass of the block, with and without the target
  double target = -std::numeric_limits<double>::infinity();
  double entropy = 0;
};

INLINE void set_nan(Mass& mass) { mass.lse = mass.rest = mass.entropy = std::numeric_limits<double>::quiet_NaN(); }

// m: the row's maximum, the pivot's z; r, u: the MassSums of the other columns. target_z is read if the target is here.
INLINE Mass finish_mass(bool target_here, bool target_is_pivot, float target_z, float m, double r, double u) {
  Mass out;
  const double s = 1 + r;
  out.lse = m + std::log1p(r);
  out.rest = out.lse;
  out.entropy = std::log1p(r) - u / s;
  if (target_here) {
    out.target = target_z;
    if (target_is_pivot) {
      out.rest = r == 0 ? kMasked : m + std::log(r);  // a NaN stays one
    } else {  // s >= 1 + the target's share: the subtraction loses at most one bit
      out.rest = m + std::log(s - std::exp(at_least(double(target_z) - m, -200.0)));
    }
  }
  return out;
}

struct Divergence {
  double difference = 0, kl = 0;  // log-mass of the other side minus this one's; KL within the block
};

struct RatioTotals {
  double e, a, b, d, r;  // RatioSums
};

// mr: the other side's logit at the pivot; when its maximum top is far above, other_mass gives its log-mass minus mr.
INLINE bool far_above(float top, float mr) { return top - mr > 60.0f; }

INLINE Divergence finish_ratio(const RatioTotals& sums, float pivot_d, bool far, double other_mass) {
  Divergence out;
  const double s = 1 + sums.e, q = sums.b / s;
  double growth;  // log of the other side's mass over this one's, both relative to the pivot
  if (far) {
    growth = other_mass - std::log1p(sums.e);
    out.kl = growth - sums.d / s;
  } else if (std::abs(q) < 0.5) {
    growth = std::log1p(q);
    out.kl = sums.a / s - (q - growth);
  } else {
    growth = std::log((1 + sums.r) / s);
    out.kl = growth - sums.d / s;
  }
  out.difference = growth + pivot_d;
  return out;
}

// logprob = -log(1 + e^gap) for the gap between the log-mass of the others and the target's z.
INLINE double logprob_of(double gap) {
  return gap > 0 ? -gap - std::log1p(std::exp(-gap)) : -std::log1p(std::exp(gap));
}

}  // namespace logit
