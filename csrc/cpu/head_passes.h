// What the fused head does with a tile of logits [32 columns][32 tokens] while it lies in the first-level cache: the
// exponentials that feed the gradient's GEMM, and the sums behind log-masses, entropy and KL.
//
// Each token has its own running state. The top token so far, the pivot, and the target stay out of the sums: nothing
// cancels when one of them holds the mass (see docs/kernels.md).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "bf16_tile.h"
#include "head_lanes.h"
#include "vec.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

using bf16::kTile;

constexpr float kMinusInf = -1e30f;     // stands for -inf, so that no difference of two logits is NaN
constexpr float kNothing = -1e20f;      // below it a shift is that of masked columns, at any sensible temperature
constexpr float kRoom = 86.5617f;       // 60 / ln 2: how far, in powers of 2, a logit may exceed the shift
constexpr float kHuge = 134217728.0f;   // 2^27: of a larger shift the rounding error alone would leave exp2's range
constexpr float kFarReference = 60.0f;  // e^60 leaves room for 1e12 columns in fp32
constexpr double kFarthest = 600;       // a single token's log ratio: e^600 and a share of e^-700 are still doubles

// The tokens of one panel.
struct alignas(64) Panel {
  float temperature[kTile], inverse[kTile];  // and 1 / temperature
  int32_t target[kTile];                     // column of this head, or outside of it
  bool tempered;                             // some temperature is not 1
};

// x / by for by's rounded reciprocal: the quotient's error is made good, so that it is the rounded quotient
// (Markstein), as the row passes have it. inf and NaN come through.
LANES __m512 divide(__m512 x, __m512 by, __m512 inverse) {
  const __m512 quotient = _mm512_mul_ps(x, inverse), rest = _mm512_fnmadd_ps(quotient, by, x);
  const __mmask16 finite = _mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q);
  return _mm512_mask3_fmadd_ps(rest, inverse, quotient, finite);
}

// Raw logits to z = softcap tanh(scale (raw + bias) / softcap) / temperature, bit for bit as the row passes of the
// blocks, which gradients by recomputation come from. Columns from `valid` on are masked.
struct Shape {
  const float* bias;  // of the tile's first column, or nullptr
  float scale, softcap;

  void operator()(float* z, int64_t valid, const Panel& panel) const {
    const bool plain = bias == nullptr && softcap == 0 && scale == 1.0f && !panel.tempered;
    for (int64_t i = plain ? valid : 0; i < kTile; ++i) {
      float* row = z + i * kTile;
      if (i >= valid) {
        std::fill_n(row, kTile, kMinusInf);
      } else if (softcap > 0) {
        const float inner = scale / softcap, added = bias == nullptr ? 0.0f : bias[i];
#pragma omp simd
        for (int64_t j = 0; j < kTile; ++j) {
          const float x = bias == nullptr ? row[j] : row[j] + added;
          row[j] = softcap * vec::tanh(x * inner) / panel.temperature[j];
        }
      } else {
        for (int64_t j = 0; j < kTile; j += 16) {
          __m512 x = _mm512_load_ps(row + j);
          if (bias != nullptr) x = _mm512_add_ps(x, lanes::constant(bias[i]));
          if (scale != 1.0f) x = _mm512_mul_ps(x, lanes::constant(scale));
          if (panel.tempered) {
            x = divide(x, _mm512_load_ps(panel.temperature + j), _mm512_load_ps(panel.inverse + j));
          }
          _mm512_store_ps(row + j, _mm512_max_ps(lanes::constant(kMinusInf), x));  // NaN passes: the second operand
        }
      }
    }
  }
};

// ---- exponentials: E' = 2^(z2 - shift) without the target, z2 = z / ln 2 ----

struct alignas(64) ExpState {
  float shift[kTile];
  float target[kTile];                 // the target's z, once it is met
  double mass[kTile];                  // sum of E'
  double product[kTile], kept[kTile];  // sum of what goes into E' W, before and after its rounding to bf16
  bool started;
};

struct HalfSums {
  __m512 mass, product, kept;  // as in ExpState; product with a softcap only
};

// One half of a tile: 16 tokens. pairs [16][16]: two neighbouring columns' E' (times the softcap's derivative) in bf16.
// Returns the tokens for which a column exceeds the shift by more than kRoom; their sums are then to be made anew.
// rounded, with kRounded: the tokens whose z2 is rounded before the shift is taken off, as the shift itself was.
template <bool kTargets, bool kCapped, bool kRounded>
LANES __mmask16 exp_half(const float* z, __m512 shift, __m512i offset, __m512 untanh, __mmask16 rounded, HalfSums* sums,
                         __m512i* pairs) {
  __m512 top = lanes::constant(-std::numeric_limits<float>::infinity()), total = _mm512_setzero_ps();
  __m512 product = total, kept = total;
  const __m512 per_ln2 = lanes::constant(lanes::kLog2E);
#pragma GCC unroll 2
  for (int i = 0; i < int(kTile); i += 2) {
    const __m512 z0 = _mm512_load_ps(z + i * kTile), z1 = _mm512_load_ps(z + (i + 1) * kTile);
    __m512 y0 = _mm512_fmsub_ps(z0, per_ln2, shift), y1 = _mm512_fmsub_ps(z1, per_ln2, shift);
    if constexpr (kRounded) {  // products that the compiler does not contract
      constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      y0 = _mm512_mask_sub_ps(y0, rounded, _mm512_mul_round_ps(z0, per_ln2, kNearest), shift);
      y1 = _mm512_mask_sub_ps(y1, rounded, _mm512_mul_round_ps(z1, per_ln2, kNearest), shift);
    }
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
      const __m512 t0 = _mm512_mul_ps(z0, untanh), t1 = _mm512_mul_ps(z1, untanh);
      // a column of -inf lies outside tanh's range: its derivative is 0
      e0 = _mm512_mul_ps(e0, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fnmadd_ps(t0, t0, one)));
      e1 = _mm512_mul_ps(e1, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fnmadd_ps(t1, t1, one)));
      product = _mm512_add_ps(product, _mm512_add_ps(e0, e1));
    }
    pairs[i / 2] = lanes::bf16_pairs(e0, e1);
    kept = lanes::add_pairs(kept, pairs[i / 2]);
  }
  *sums = {total, product, kept};
  return _mm512_cmp_ps_mask(top, lanes::constant(kRoom), _CMP_GT_OQ);
}

// The largest z2 of the columns other than the target: what the shift of a first tile starts from.
LANES __m512 top_half(const float* z, __m512i offset) {
  __m512 top = lanes::constant(kMinusInf);
  for (int i = 0; i < int(kTile); ++i) {
    const __mmask16 keep = _mm512_cmpneq_epi32_mask(offset, _mm512_set1_epi32(i));
    top = _mm512_mask_max_ps(top, keep, top,
                             _mm512_mul_ps(_mm512_load_ps(z + i * kTile), lanes::constant(lanes::kLog2E)));
  }
  return top;
}

// The exponentials of a tile into e, an A operand [32 tokens][32 columns] in bf16. raise(token, factor) is called where
// the shift rises: all that was summed for that token so far, this tile excepted, is to be multiplied by factor.
template <bool kCapped, typename Raise>
void exp_tile(const float* z, const Panel& panel, int64_t first_column, float softcap, ExpState& state, uint16_t* e,
              const Raise& raise) {
  for (int half = 0; half < 2; ++half) {
    const int at = 16 * half;
    __m512 untanh = _mm512_setzero_ps();
    if (kCapped) untanh = _mm512_div_ps(_mm512_load_ps(panel.temperature + at), lanes::constant(softcap));
    const __m512i offset =
        _mm512_sub_epi32(_mm512_load_si512(panel.target + at), _mm512_set1_epi32(int32_t(first_column)));
    const __mmask16 here = _mm512_cmplt_epu32_mask(offset, _mm512_set1_epi32(int32_t(kTile)));
    if (!state.started) _mm512_store_ps(state.shift + at, top_half(z + at, offset));
    for (unsigned bits = here; bits != 0; bits &= bits - 1) {
      const int token = at + __builtin_ctz(bits);
      state.target[token] = z[(panel.target[token] - first_column) * kTile + token];
    }
    HalfSums sums;
    __m512i pairs[16];
    for (;;) {
      const __m512 shift = _mm512_load_ps(state.shift + at);
      const __mmask16 rounded = _mm512_cmp_ps_mask(_mm512_abs_ps(shift), lanes::constant(kHuge), _CMP_GT_OQ);
      __mmask16 over;
      if (rounded != 0) {
        over = exp_half<true, kCapped, true>(z + at, shift, offset, untanh, rounded, &sums, pairs);
      } else if (here != 0) {
        over = exp_half<true, kCapped, false>(z + at, shift, offset, untanh, 0, &sums, pairs);
      } else {
        over = exp_half<false, kCapped, false>(z + at, shift, offset, untanh, 0, &sums, pairs);
      }
      if (over == 0) break;  // else the tile's top exceeds the shift, which then rises to it
      alignas(64) float top[16];
      _mm512_store_ps(top, top_half(z + at, offset));
      for (unsigned bits = over; bits != 0; bits &= bits - 1) {
        const int token = at + __builtin_ctz(bits);
        const double factor = std::exp2(double(state.shift[token]) - double(top[token - at]));
        state.shift[token] = top[token - at];
        state.mass[token] *= factor, state.product[token] *= factor, state.kept[token] *= factor;
        raise(token, float(factor));
      }
    }
    lanes::add_to(state.mass + at, sums.mass);
    lanes::add_to(state.product + at, kCapped ? sums.product : sums.mass);
    lanes::add_to(state.kept + at, sums.kept);
    lanes::transpose(pairs);
    for (int token = 0; token < 16; ++token) _mm512_store_si512(e + (at + token) * kTile, pairs[token]);
  }
  state.started = true;
}

}  // namespace

#pragma GCC pop_options
