// Two rows of logits together: the log ratio of their masses and the KL between them, over one block.
//
// Everything is relative to the pivot, the top token of the first row, so that small ratios keep their digits.
#pragma once
#include "logit_row.h"

namespace {

CLONES RatioSums ratio_chunk(const float* z, const float* zr, int64_t n, float m, float mr, float pivot_d) {
  float e_sum = 0, u_sum = 0, a_sum = 0, b_sum = 0, d_sum = 0, r_sum = 0;
#pragma omp simd reduction(+ : e_sum, u_sum, a_sum, b_sum, d_sum, r_sum)
  for (int64_t i = 0; i < n; ++i) {
    add_ratio(z[i], zr[i], m, mr, pivot_d, e_sum, u_sum, a_sum, b_sum, d_sum, r_sum);
  }
  return {e_sum, u_sum, a_sum, b_sum, d_sum, r_sum};
}

struct Ratio : Divergence {
  Mass mass;
};

// log-mass of zr over the block relative to mr, by its own maximum (for rows whose other side lives elsewhere).
double shifted_log_mass(const float* zr, int64_t n, float max, float mr) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kChunk) sum += mass_chunk(zr + i, std::min(kChunk, n - i), max).e;
  return double(max) - mr + std::log(sum);
}

Ratio ratio_row(float* z, float* zr, int64_t n, int64_t target) {
  Ratio out;
  const float m = clamp_and_max(z, n), top = clamp_and_max(zr, n);
  const int32_t pivot = first_equal(z, n, m);
  if (pivot >= n || m == kLowest || !(top > kLowest)) {
    out.mass = mass_row(z, n, target);
    out.difference = double(top) - out.mass.lse;
    // a maximum below kLowest is that of a row of NaN alone
    if (pivot >= n || top < kLowest) out.difference = out.kl = std::numeric_limits<double>::quiet_NaN();
    return out;
  }
  const float kept = z[pivot], mr = zr[pivot], pivot_d = mr - m;
  z[pivot] = kLowest, zr[pivot] = kLowest;  // both: their difference is 0, e and e^zr are 0
  double e = 0, u = 0, a = 0, b = 0, d = 0, r = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    const RatioSums part = ratio_chunk(z + i, zr + i, std::min(kChunk, n - i), m, mr, pivot_d);
    e += part.e, u += part.u, a += part.a, b += part.b, d += part.d, r += part.r;
  }
  z[pivot] = kept, zr[pivot] = mr;
  out.mass = finish_mass(z, n, target, m, pivot, e, u);
  const bool far = far_above(top, mr);
  static_cast<Divergence&>(out) =
      finish_ratio({e, a, b, d, r}, pivot_d, far, far ? shifted_log_mass(zr, n, top, mr) : 0);
  return out;
}

}  // namespace
