// fp16 and bf16 to fp32 and back in integer operations, which vectorise in every clone: the compiler's own _Float16
// conversions stay scalar there, and are library calls where the machine has none.
#pragma once
#include <bit>
#include <cstdint>

#if defined(__GNUC__)
#define HALF_INLINE static inline __attribute__((always_inline, unused))
#else
#define HALF_INLINE static inline
#endif

HALF_INLINE float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }

HALF_INLINE uint16_t float_to_bf16(float x) {  // to nearest even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

HALF_INLINE float half_to_float(uint16_t x) {
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // moves the exponent's bias, subnormals too
  const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | (x & 0x8000u) << 16);
}

HALF_INLINE uint16_t float_to_half(float x) {  // to nearest even; from 65520 on infinity
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has fp16's smallest subnormal as its unit in the last place, so adding it rounds
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;  // 2^-14
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t((magnitude < 0x477ff000u ? finite : large) | (bits >> 16 & 0x8000u));
}
