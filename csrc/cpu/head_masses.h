// Log-mass, entropy and KL of the tiles of a row that streams by: sums relative to the pivot, the top token so far.
// The pivot and the target stay out of the sums; when a larger logit comes, the sums are carried over to it exactly.
#pragma once
#include "head_passes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

// Of one panel and one side; with x = z - z_pivot, e = e^x and d the other side's log ratio relative to the pivot's.
struct alignas(64) MassState {
  float pivot[kTile];     // z of the pivot, kNothing before any
  float other[kTile];     // the other side's z there
  int32_t column[kTile];  // where it is; -1 before any
  float target[kTile];    // the target's z on both sides
  float other_target[kTile];
  double e[kTile], u[kTile];                            // sums of e, e x
  double a[kTile], b[kTile], d[kTile], other_e[kTile];  // of e (expm1 d - d), e expm1 d, e d, e^(zr - zr_pivot)
  uint32_t far;                                         // tokens whose sums have left their range: unusable

  void clear() {
    for (int64_t t = 0; t < kTile; ++t) {
      pivot[t] = other[t] = kNothing, column[t] = -1, target[t] = 0, other_target[t] = 0;
      e[t] = u[t] = a[t] = b[t] = d[t] = other_e[t] = 0;
    }
    far = 0;
  }

  // Makes a larger logit the pivot of a token: every sum is restated relative to it, and the old pivot joins them.
  void move(int token, float z, float zr, int32_t to, bool old_is_target) {
    const int t = token;
    if (column[t] >= 0) {
      const double step = double(z) - pivot[t], shrink = std::exp(-step);
      const double ratio = (double(other[t]) - pivot[t]) - (double(zr) - z);  // the old pivot's d
      // shrink e^ratio and shrink (e^ratio - 1): 1 + expm1(ratio) would lose what a large negative ratio leaves
      const double moved = std::exp(ratio - step);
      const double grown = std::abs(ratio) < 1 ? shrink * std::expm1(ratio) : moved - shrink;
      const double count = e[t] + (old_is_target ? 0 : 1);
      const double second = std::abs(ratio) < 1e-3 ? shrink * ratio * ratio * (0.5 + ratio / 6 + ratio * ratio / 24)
                                                   : grown - shrink * ratio;
      a[t] = moved * a[t] + grown * d[t] + second * count;
      b[t] = moved * b[t] + grown * count;
      d[t] = shrink * (d[t] + ratio * count);
      other_e[t] = moved * (other_e[t] + (old_is_target ? 0 : 1));
      if (ratio > kFarthest || ratio - step > kFarReference) far |= 1u << t;
      u[t] = shrink * (u[t] - step * count);
      e[t] = shrink * count;
    }
    pivot[t] = z, other[t] = zr, column[t] = to;
  }
};

struct TileSums {
  __m512 e, u, a, b, d, other_e;
};

// Sums over a half tile. skip: the columns of pivot and target relative to the tile, left out if kSkip.
template <bool kRatio, bool kSkip>
LANES __mmask16 mass_half(const float* z, const float* zr, __m512 pivot, __m512 other, __m512i skip_pivot,
                          __m512i skip_target, TileSums* sums) {
  const __m512 zero = _mm512_setzero_ps(), one = lanes::constant(1.0f);
  TileSums s{zero, zero, zero, zero, zero, zero};
  const __m512 pivot_ratio = _mm512_sub_ps(other, pivot);
  __mmask16 far = 0;
  for (int i = 0; i < int(kTile); ++i) {
    const __m512 zi = _mm512_load_ps(z + i * kTile);
    __mmask16 keep = 0xffff;
    if constexpr (kSkip) {
      const __m512i row = _mm512_set1_epi32(i);
      keep = _mm512_cmpneq_epi32_mask(skip_pivot, row) & _mm512_cmpneq_epi32_mask(skip_target, row);
    }
    __m512 x = _mm512_max_ps(lanes::constant(-200.0f), _mm512_sub_ps(zi, pivot));
    x = _mm512_min_ps(zero, x);  // the pivot is rounded, the product is not
    __m512 e = lanes::exp_bounded(x);
    if constexpr (kSkip) e = _mm512_maskz_mov_ps(keep, e);
    s.e = _mm512_add_ps(s.e, e);
    s.u = _mm512_fmadd_ps(e, x, s.u);
    if constexpr (kRatio) {
      const __m512 zri = _mm512_load_ps(zr + i * kTile);
      __m512 d = _mm512_sub_ps(_mm512_sub_ps(zri, zi), pivot_ratio);
      if constexpr (kSkip) d = _mm512_maskz_mov_ps(keep, d);
      const __m512 ed = _mm512_mul_ps(e, d);
      const __mmask16 wide = _mm512_cmp_ps_mask(_mm512_abs_ps(d), one, _CMP_NLT_UQ);
      __m512 a = _mm512_mul_ps(e, lanes::expm1_minus_x(d));
      __m512 b = _mm512_add_ps(a, ed);
      __m512 r = _mm512_add_ps(e, b);
      if (wide != 0) {
        const __m512 xr = _mm512_sub_ps(zri, other);
        far |= _mm512_mask_cmp_ps_mask(keep & wide, xr, lanes::constant(kFarReference), _CMP_GT_OQ);
        __m512 direct = lanes::exp(xr);
        if constexpr (kSkip) direct = _mm512_maskz_mov_ps(keep, direct);
        const __m512 less = _mm512_sub_ps(direct, e);
        r = _mm512_mask_mov_ps(r, wide, direct);
        b = _mm512_mask_mov_ps(b, wide, less);
        a = _mm512_mask_sub_ps(a, wide, less, ed);
      }
      s.a = _mm512_add_ps(s.a, a);
      s.b = _mm512_add_ps(s.b, b);
      s.d = _mm512_add_ps(s.d, ed);
      s.other_e = _mm512_add_ps(s.other_e, r);
    }
  }
  *sums = s;
  return far;
}

// A tile joins the state. zr is read with kRatio only.
template <bool kRatio>
void mass_tile(const float* z, const float* zr, const Panel& panel, int64_t first_column, MassState& state) {
  for (int half = 0; half < 2; ++half) {
    const int at = 16 * half;
    const __m512i start = _mm512_set1_epi32(int32_t(first_column)), width = _mm512_set1_epi32(int32_t(kTile));
    const __m512i target = _mm512_sub_epi32(_mm512_load_si512(panel.target + at), start);
    const __mmask16 here = _mm512_cmplt_epu32_mask(target, width);
    __m512 top = lanes::constant(kMinusInf);
    for (int i = 0; i < int(kTile); ++i) {
      top = _mm512_max_ps(top, _mm512_load_ps(z + at + i * kTile));
    }
    const __mmask16 rising = _mm512_cmp_ps_mask(top, _mm512_load_ps(state.pivot + at), _CMP_GT_OQ);
    alignas(64) float tops[16];
    _mm512_store_ps(tops, top);
    for (unsigned bits = rising; bits != 0; bits &= bits - 1) {
      const int token = at + __builtin_ctz(bits);
      int row = 0;
      while (row + 1 < int(kTile) && z[row * kTile + token] != tops[token - at]) ++row;
      const float reference = kRatio ? zr[row * kTile + token] : 0.0f;
      state.move(token, tops[token - at], reference, int32_t(first_column + row),
                 state.column[token] == panel.target[token]);
    }
    for (unsigned bits = here; bits != 0; bits &= bits - 1) {
      const int token = at + __builtin_ctz(bits), row = panel.target[token] - int(first_column);
      state.target[token] = z[row * kTile + token];
      if (kRatio) state.other_target[token] = zr[row * kTile + token];
    }
    const __m512 pivot = _mm512_load_ps(state.pivot + at), other = _mm512_load_ps(state.other + at);
    const __m512i where = _mm512_sub_epi32(_mm512_load_si512(state.column + at), start);
    TileSums sums;
    const __mmask16 far = (rising | here) != 0
                              ? mass_half<kRatio, true>(z + at, zr + at, pivot, other, where, target, &sums)
                              : mass_half<kRatio, false>(z + at, zr + at, pivot, other, where, target, &sums);
    lanes::add_to(state.e + at, sums.e);
    lanes::add_to(state.u + at, sums.u);
    if constexpr (kRatio) {
      state.far |= uint32_t(far) << at;
      lanes::add_to(state.a + at, sums.a);
      lanes::add_to(state.b + at, sums.b);
      lanes::add_to(state.d + at, sums.d);
      lanes::add_to(state.other_e + at, sums.other_e);
    }
  }
}

struct TokenMass {
  double lse, rest, target, entropy;           // as `Mass` in logit_row.h
  double other_lse, other_rest, other_target;  // with kRatio: the other side
  double difference, kl;
  bool far;  // as in MassState: difference, kl and the other side's masses are void
};

// What a token's sums say; the target and the pivot join here, in double. present: the target was among the columns.
template <bool kRatio>
TokenMass finish(const MassState& s, int t, bool present, bool is_pivot) {
  const double lowest = kMinusInf, missing = -std::numeric_limits<double>::infinity();
  TokenMass out{};
  out.target = present ? std::max(double(s.target[t]), lowest) : missing;
  const bool apart = present && !is_pivot;
  const double x = apart ? out.target - s.pivot[t] : 0, share = apart ? std::exp(x) : 0;
  const double e = s.e[t] + share, u = s.u[t] + share * x;
  out.lse = s.pivot[t] + std::log1p(e);
  out.rest = !present ? out.lse : apart ? s.pivot[t] + std::log1p(s.e[t]) : e == 0 ? lowest : s.pivot[t] + std::log(e);
  out.entropy = std::log1p(e) - u / (1 + e);
  const double nan_or_0 = e * 0;
  if (s.column[t] < 0) {  // nothing but masked columns, or NaN
    out.lse = out.rest = lowest + nan_or_0, out.entropy = nan_or_0;
  }
  if constexpr (kRatio) {
    out.other_target = present ? std::max(double(s.other_target[t]), lowest) : missing;
    const double d = apart ? (out.other_target - out.target) - (double(s.other[t]) - s.pivot[t]) : 0;
    out.far = d > kFarthest || (s.far >> t & 1u) != 0;
    const double grown = std::expm1(d);
    const double a = s.a[t] + share * (grown - d), b = s.b[t] + share * grown, ds = s.d[t] + share * d;
    const double other = s.other_e[t] + share * (1 + grown), q = b / (1 + e);
    double growth;
    if (std::abs(q) < 0.5) {
      growth = std::log1p(q);
      out.kl = a / (1 + e) - (q - growth);
    } else {
      growth = std::log((1 + other) / (1 + e));
      out.kl = growth - ds / (1 + e);
    }
    out.difference = growth + (double(s.other[t]) - s.pivot[t]);
    out.other_lse = s.other[t] + std::log1p(other);
    out.other_rest = !present            ? out.other_lse
                     : apart             ? s.other[t] + std::log1p(s.other_e[t])
                     : s.other_e[t] == 0 ? lowest
                                         : s.other[t] + std::log(s.other_e[t]);
    if (s.column[t] < 0) out.other_lse = out.other_rest = lowest + other * 0;
  }
  return out;
}

}  // namespace

#pragma GCC pop_options
