// What the fused head does with a tile of logits [32 columns][32 tokens] while it lies in the first-level cache: the
// exponentials that feed the gradient's GEMM, and the sums behind log-masses, entropy and KL.
//
// Each token has its own running state. The top token so far, the pivot, and the target stay out of the sums: nothing
// cancels when one of them holds the mass (see docs/kernels.md).
#pragma once
#include <cmath>
#include <limits>

#include "bf16_tile.h"
#include "head_lanes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

using bf16::kTile;

constexpr float kMinusInf = -1e30f;     // stands for -inf, so that no difference of two logits is NaN
constexpr float kRoom = 86.5617f;       // 60 / ln 2: how far, in powers of 2, a logit may exceed the shift
constexpr float kFarReference = 60.0f;  // e^60 leaves room for 1e12 columns in fp32

// The tokens of one panel.
struct alignas(64) Panel {
  float slope[kTile];     // raw logit (after the softcap, if there is one) to z
  float slope2[kTile];    // the same to z / ln 2
  int32_t target[kTile];  // column of this head, or outside of it
};

// Raw logits to softcap tanh(scale (raw + bias) / softcap); without a softcap only the bias is added (the scale is in
// the slope). Columns from `valid` on become -inf in effect.
struct Shape {
  const float* bias;  // of the tile's first column, or nullptr
  float scale, softcap;
  float lowest;  // -1e30 with the sign that the slope turns into -inf

  void operator()(float* z, int64_t valid) const {
    if (bias == nullptr && softcap == 0 && valid == kTile) return;
    const __m512 inner = lanes::constant(softcap > 0 ? scale / softcap : 0), cap = lanes::constant(softcap);
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = 0; j < kTile; j += 16) {
        __m512 x = _mm512_load_ps(z + i * kTile + j);
        if (i >= valid) {
          x = lanes::constant(lowest);
        } else {
          if (bias != nullptr) x = _mm512_add_ps(x, lanes::constant(bias[i]));
          if (softcap > 0) x = _mm512_mul_ps(cap, lanes::tanh(_mm512_mul_ps(x, inner)));
        }
        _mm512_store_ps(z + i * kTile + j, x);
      }
    }
  }
};

// ---- exponentials: E' = 2^(z2 - shift) without the target, z2 = z / ln 2 ----

struct alignas(64) ExpState {
  float shift[kTile];
  float target[kTile];  // the target's shaped logit, NaN before it is met
  double mass[kTile];   // sum of E'
  bool started;
};

// One half of a tile: 16 tokens. pairs [16][16]: two neighbouring columns' E' (times the softcap's derivative) in bf16.
// Returns the tokens for which a column exceeds the shift by more than kRoom; their sums are then to be made anew.
template <bool kTargets, bool kCapped>
LANES __mmask16 exp_half(const float* z, __m512 slope2, __m512 shift, __m512i offset, __m512 inverse_cap, __m512* sum,
                         __m512i* pairs) {
  __m512 top = lanes::constant(-std::numeric_limits<float>::infinity()), total = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int i = 0; i < int(kTile); i += 2) {
    const __m512 z0 = _mm512_load_ps(z + i * kTile), z1 = _mm512_load_ps(z + (i + 1) * kTile);
    const __m512 y0 = _mm512_fmsub_ps(z0, slope2, shift), y1 = _mm512_fmsub_ps(z1, slope2, shift);
    __m512 e0 = lanes::exp2(y0), e1 = lanes::exp2(y1);
    if constexpr (kTargets) {
      const __mmask16 keep0 = _mm512_cmpneq_epi32_mask(offset, _mm512_set1_epi32(i));
      const __mmask16 keep1 = _mm512_cmpneq_epi32_mask(offset, _mm512_set1_epi32(i + 1));
      e0 = _mm512_maskz_mov_ps(keep0, e0);
      e1 = _mm512_maskz_mov_ps(keep1, e1);
      top = _mm512_mask_max_ps(top, keep0, top, y0);
      top = _mm512_mask_max_ps(top, keep1, top, y1);
    } else {
      top = _mm512_max_ps(top, _mm512_max_ps(y0, y1));
    }
    total = _mm512_add_ps(total, _mm512_add_ps(e0, e1));
    if constexpr (kCapped) {
      const __m512 one = lanes::constant(1.0f);
      const __m512 t0 = _mm512_mul_ps(z0, inverse_cap), t1 = _mm512_mul_ps(z1, inverse_cap);
      // a column of -inf lies outside tanh's range: its derivative is 0
      e0 = _mm512_mul_ps(e0, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fnmadd_ps(t0, t0, one)));
      e1 = _mm512_mul_ps(e1, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fnmadd_ps(t1, t1, one)));
    }
    pairs[i / 2] = lanes::bf16_pairs(e0, e1);
  }
  *sum = total;
  return _mm512_cmp_ps_mask(top, lanes::constant(kRoom), _CMP_GT_OQ);
}

// The largest z2 of the columns other than the target: what the shift of a first tile starts from.
LANES __m512 top_half(const float* z, __m512 slope2, __m512i offset) {
  __m512 top = lanes::constant(kMinusInf);
  for (int i = 0; i < int(kTile); ++i) {
    const __mmask16 keep = _mm512_cmpneq_epi32_mask(offset, _mm512_set1_epi32(i));
    top = _mm512_mask_max_ps(top, keep, top, _mm512_mul_ps(_mm512_load_ps(z + i * kTile), slope2));
  }
  return top;
}

// The exponentials of a tile into e, an A operand [32 tokens][32 columns] in bf16. raise(token, factor) is called where
// the shift rises: all that was summed for that token so far, this tile excepted, is to be multiplied by factor.
template <bool kCapped, typename Raise>
void exp_tile(const float* z, const Panel& panel, int64_t first_column, float softcap, ExpState& state, uint16_t* e,
              const Raise& raise) {
  const __m512 inverse_cap = lanes::constant(kCapped ? 1.0f / softcap : 0.0f);
  for (int half = 0; half < 2; ++half) {
    const int at = 16 * half;
    const __m512 slope2 = _mm512_load_ps(panel.slope2 + at);
    const __m512i offset =
        _mm512_sub_epi32(_mm512_load_si512(panel.target + at), _mm512_set1_epi32(int32_t(first_column)));
    const __mmask16 here = _mm512_cmplt_epu32_mask(offset, _mm512_set1_epi32(int32_t(kTile)));
    if (!state.started) _mm512_store_ps(state.shift + at, top_half(z + at, slope2, offset));
    for (unsigned bits = here; bits != 0; bits &= bits - 1) {
      const int token = at + __builtin_ctz(bits);
      state.target[token] = z[(panel.target[token] - first_column) * kTile + token];
    }
    __m512 sum;
    __m512i pairs[16];
    for (;;) {
      const __m512 shift = _mm512_load_ps(state.shift + at);
      const __mmask16 over = here != 0
                                 ? exp_half<true, kCapped>(z + at, slope2, shift, offset, inverse_cap, &sum, pairs)
                                 : exp_half<false, kCapped>(z + at, slope2, shift, offset, inverse_cap, &sum, pairs);
      if (over == 0) break;
      alignas(64) float top[16];
      _mm512_store_ps(top, top_half(z + at, slope2, offset));
      for (unsigned bits = over; bits != 0; bits &= bits - 1) {
        const int token = at + __builtin_ctz(bits);
        const double factor = std::exp2(double(state.shift[token]) - double(top[token - at]));
        state.shift[token] = top[token - at];
        state.mass[token] *= factor;
        raise(token, float(factor));
      }
    }
    lanes::add_to(state.mass + at, sum);
    lanes::transpose(pairs);
    for (int token = 0; token < 16; ++token) _mm512_store_si512(e + (at + token) * kTile, pairs[token]);
  }
  state.started = true;
}

}  // namespace

#pragma GCC pop_options
