// What a token weighs in sampling, in arithmetic that every backend repeats bit for bit (see
// rlhf_kernels/ops/sampling/naive.py): u = (top - z) / temperature, e^-u in single fp32 operations that nothing may
// fuse, and that as a multiple of 2^-40. And the random number of a row.
#pragma once
#include "cuda/common.cuh"

namespace cuda_rows {

// ---- random numbers: Philox4x32-10, laid out as in rlhf_kernels/ops/sampling/philox.py ----

// 53 bits in [0, 1).
__device__ inline double uniform(uint64_t seed, uint64_t stream, unsigned sample_index, unsigned position) {
  unsigned c0 = position, c1 = sample_index, c2 = unsigned(stream), c3 = unsigned(stream >> 32);
  unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = unsigned(p1 >> 32) ^ c1 ^ k0, c2 = unsigned(p0 >> 32) ^ c3 ^ k1;
    c1 = unsigned(p1), c3 = unsigned(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c1) << 32 | c0) >> 11) * 0x1p-53;
}

// ---- weights ----

// A token's key: the bits of its u, which are ordered as u >= 0 is.
__device__ inline unsigned key_of(float u) { return std::bit_cast<unsigned>(u); }

// e^-28.5 is less than half of 2^-40: tokens with larger keys weigh nothing, and no filter need look at them.
constexpr unsigned kLastKey = std::bit_cast<unsigned>(28.5f);

// e^-u, 0 beyond 87.3.
__device__ inline float exp_weight(float u) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves a rounded integer in the low mantissa bits
  constexpr unsigned kLargest = std::bit_cast<unsigned>(87.3f);
  const unsigned bits = key_of(u);
  const float x = -std::bit_cast<float>(bits < kLargest ? bits : kLargest);
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  float r = __fsub_rn(x, __fmul_rn(n, 0.693359375f));
  r = __fsub_rn(r, __fmul_rn(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
  const float y = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(r, r), p), r), 1.0f);
  const unsigned exponent = (std::bit_cast<unsigned>(shifted) - std::bit_cast<unsigned>(kMagic)) << 23;
  return bits > kLargest ? 0.0f : std::bit_cast<float>(std::bit_cast<unsigned>(y) + exponent);
}

// A weight in [0, 1] as a multiple of 2^-40, half to even. In integers: conversions to fp64 and back are slower.
__device__ inline uint64_t fixed_point(float w) {
  const unsigned bits = std::bit_cast<unsigned>(w);
  const unsigned mantissa = (bits & 0x7FFFFFu) | 0x800000u;  // w = mantissa * 2^(exponent - 150)
  const int left = int(bits >> 23) - 110;
  const int right = min(max(-left, 1), 26);  // 26 and more: nothing is left
  const unsigned rounded = (mantissa + ((1u << (right - 1)) - 1) + (mantissa >> right & 1u)) >> right;
  return left >= 0 ? uint64_t(mantissa) << left : rounded;
}

__device__ inline uint64_t mass_of(float u) { return fixed_point(exp_weight(u)); }

// ---- a logit as an integer that is ordered as it is ----

// -0 becomes +0. NaN is above all.
__device__ inline unsigned ordered(float z, bool nan) {
  const unsigned bits = std::bit_cast<unsigned>(z + 0.0f);
  return nan ? ~0u : bits ^ (bits >> 31 != 0 ? ~0u : 0x80000000u);
}

__device__ inline float from_ordered(unsigned code) {
  return std::bit_cast<float>(code ^ (code >> 31 != 0 ? 0x80000000u : ~0u));  // ~0: a NaN
}

}  // namespace cuda_rows
