// exp(-u) in fp32, one rounded operation after the other, so that it can be restated bit for bit elsewhere
// (rlhf_kernels/ops/sampling/naive.py: exp_weight). Include it only where floating-point contraction is off.
#pragma once

#include <bit>
#include <cstdint>

// u >= 0, inf included; 0 below exp(-87.3), where fp32 turns subnormal. Relative error below 1e-7. The select is on
// integers (u >= 0 orders as its bits do): on floats the compiler keeps a branch and does not vectorise.
__attribute__((always_inline)) inline float exp_weight(float u) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low mantissa bits
  constexpr uint32_t kLargest = std::bit_cast<uint32_t>(87.3f);
  const uint32_t bits = std::bit_cast<uint32_t>(u);
  const float x = -std::bit_cast<float>(bits < kLargest ? bits : kLargest);
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  float r = x - n * 0.693359375f;  // 9 bits: the product is exact
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = ((r * r) * p + r) + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kMagic)) << 23;
  const uint32_t scaled = std::bit_cast<uint32_t>(y) + exponent;
  const int32_t in_range = int32_t(bits - kLargest - 1u) >> 31;  // all ones or 0: a second select would become a branch
  return std::bit_cast<float>(scaled & uint32_t(in_range));
}
