// Vectorisable elementary functions. Each is branch-free and inlined into the loop of a CLONES leaf function, where the
// compiler turns it into AVX-512, AVX2 or baseline code; CUDA kernels call them too. Errors are a few fp32 ulp; NaN
// propagates.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "clones.h"

#if defined(__CUDACC__)
#define INLINE __host__ __device__ __forceinline__
#else
#define INLINE static inline __attribute__((always_inline, unused))
#endif

namespace vec {

constexpr float kLn2 = 0.69314718055994531f;

// x = n ln 2 + f with |f| <= ln2 / 2; returns expm1(f) and writes 2^n. Needs |x| <= 88 (NaN passes through f).
INLINE float reduce(float x, float* power) {
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // Cephes' split of ln 2: n * hi is exact
  *power = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23);
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  return f + f * f * p;
}

// e^x; 0 below -87 (no denormals), clamped at e^88 above.
INLINE float exp(float x) {
  float bounded = x < -87.0f ? -87.0f : x;
  bounded = bounded > 88.0f ? 88.0f : bounded;
#if defined(__CUDA_ARCH__)
  const float value = expf(bounded);  // within 1 ulp too, in half the instructions: its last step is one of hardware
#else
  float power;
  const float y = reduce(bounded, &power);
  const float value = power * y + power;
#endif
  return x < -87.0f ? 0.0f : value;
}

// e^x - 1 with small relative error for x near 0; clamped like exp.
INLINE float expm1(float x) {
  float bounded = x < -87.0f ? -87.0f : x;
  bounded = bounded > 88.0f ? 88.0f : bounded;
  float power;
  const float y = reduce(bounded, &power);
  return power * y + (power - 1.0f);
}

// e^x - 1 - x for |x| < 1 by its series (truncation below 1e-7 relative).
INLINE float expm1_minus_x(float x) {
  float p = 1.0f / 39916800;
  p = p * x + 1.0f / 3628800;
  p = p * x + 1.0f / 362880;
  p = p * x + 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  return x * x * p;
}

// log(x) for normal positive x (Cephes' logf).
INLINE float log(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = p * f * f2 + e * -2.12194440e-4f - 0.5f * f2;
  return f + tail + e * 0.693359375f;
}

INLINE float abs(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu); }

// h + log cosh h, that is log(1 + e^2h) - log 2: by a fitted series below 0.5 (relative error 5e-11 before rounding),
// above without a difference of large numbers.
INLINE float log_cosh_plus(float h) {
  const float a = abs(h), x = h * h;
  float p = -5.74278525e-4f;
  p = p * x + 2.14313128e-3f;
  p = p * x - 6.74049223e-3f;
  p = p * x + 2.22219019e-2f;
  p = p * x - 8.33333265e-2f;
  p = p * x + 0.5f;
  const float direct = (h + a) + log(0.5f + 0.5f * exp(-2.0f * a));
  return a < 0.5f ? h + x * p : direct;
}

// tanh within 1 ulp: Cephes' series below 0.625, above it 1 - 2 / (e^2|x| + 1).
INLINE float tanh(float x) {
  const float a = abs(x), x2 = x * x;
  float p = -5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const float near = x + x * x2 * p;
#if defined(__CUDA_ARCH__)
  const float far = 1.0f - __fdividef(2.0f, exp(2.0f * a) + 1.0f);  // its 2 ulp are of at most 0.44
#else
  const float far = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
#endif
  return a < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace vec
