// How raw logits become z in the row passes of the head: bias, scale, softcap, temperature.
#pragma once
#include "cuda/common.cuh"

namespace cuda_rows {

// A target's column in a block of n, or a column that no group has where it lies in another block.
__device__ inline int column_in_block(int64_t target, int n) {
  return target >= 0 && target < n ? int(target) : std::numeric_limits<int>::min();
}

// How raw logits become z; the raw flag says whether that is still to be done.
struct Shaping {
  const float* bias;         // [n] or null
  const float* temperature;  // [rows]
  float scale, softcap;
  bool raw;
};

// Shaping for one row: z = softcap * tanh(scale * (raw + bias) / softcap) / temperature (softcap 0: none), clamped.
struct RowShaping {
  const float* bias;
  float temperature, scale, softcap, inner;
  bool raw;

  __device__ RowShaping(const Shaping& s, int64_t row)
      : bias(s.bias),
        temperature(s.temperature[row]),
        scale(s.scale),
        softcap(s.softcap),
        inner(s.softcap > 0 ? s.scale / s.softcap : 0),
        raw(s.raw) {}

  // Whether z differs from the logits that were read, but for what the clamp does (which every reader repeats).
  __device__ bool changes() const {
    return raw && (bias != nullptr || softcap > 0 || scale != 1.0f || temperature != 1.0f);
  }

  __device__ float untanh() const { return temperature / softcap; }

  __device__ float operator()(float z, float add) const {
    if (raw) {
      if (bias != nullptr) z += add;
      if (softcap > 0) {
        z = softcap * vec::tanh(z * inner) / temperature;
      } else {
        if (scale != 1.0f) z *= scale;
        if (temperature != 1.0f) z /= temperature;
      }
    }
    return at_least(z, kLowest);
  }

  // One tile of a row's z, in place; columns outside the row become `outside`.
  __device__ void apply(const Slice<float>& slice, int tile, float outside, Pack<float> (&z)[kHeld]) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
      Pack<float> add = {};
      if (raw && bias != nullptr) slice.load(bias, column, 0.0f, add);
      const bool whole = slice.whole(column);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        const float v = (*this)(z[j].v[k], add.v[k]);
        z[j].v[k] = whole || slice.inside(column + k) ? v : outside;
      }
    }
  }
};

}  // namespace cuda_rows
