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
  Divisor temperature;
  float scale, softcap, inner;
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
    return raw && (bias != nullptr || softcap > 0 || scale != 1.0f || temperature.value != 1.0f);
  }

  __device__ float untanh() const { return temperature.value / softcap; }

  // One tile of a row's z, in place; columns outside the row become `outside`. The branches stand around the loops, so
  // that a row jumps over the code it does not need.
  __device__ void apply(const Slice<float>& slice, int tile, float outside, Pack<float> (&z)[kHeld]) const {
    if (raw) {
      if (bias != nullptr) {
        Pack<float> add[kHeld];
        slice.load_tile(bias, tile, 0.0f, add);
        each(z, [&](float& v, int j, int k) { v += add[j].v[k]; });
      }
      if (softcap > 0) {
        each(z, [&](float& v, int, int) { v = temperature.divide(softcap * vec::tanh(v * inner)); });
      } else {
        if (scale != 1.0f) each(z, [&](float& v, int, int) { v *= scale; });
        if (temperature.value != 1.0f) each(z, [&](float& v, int, int) { v = temperature.divide(v); });
      }
    }
    each(z,
         [&](float& v, int j, int k) { v = slice.inside(slice.column(tile, j) + k) ? at_least(v, kLowest) : outside; });
  }

 private:
  template <typename F>
  __device__ static void each(Pack<float> (&z)[kHeld], const F& f) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) f(z[j].v[k], j, k);
    }
  }
};

}  // namespace cuda_rows
