// Row passes of the head over a vocabulary block [rows, n] of fp32 logits: statistics and shares of JS. One block a
// row; the row is read once and stays in registers between the search for its top token and the sums.
//
// The contract is that of cpu/logprob.cpp. Rows that one tile cannot hold (n > 4096) are read a second time.
#pragma once
#include "cuda/shaping.cuh"

namespace cuda_rows {

// What one row's statistics need of the block: itself (0), and the reference (1) if there is one.
template <int kSides>
struct StatsScratch {
  TopScratch<kSides> top;
  SumScratch<6 * kSides> sums;
  float target[kSides];
};

struct StatsSide {
  Top top;                // of this row, and the other row's logit there
  float other_top = 0;    // the other row's own maximum
  double other_rest = 0;  // the other row's mass beside its top token, relative to it
  float target_z = 0;
  bool ratio = false;  // whether the divergence from the other row is asked for
};

// The sums of one side to its numbers, as in cpu/ratio_row.h.
__device__ inline void finish_side(const StatsSide& side, const double* sums, int target, Mass& mass,
                                   Divergence& divergence) {
  const bool here = target >= 0;
  const float m = side.top.value;
  if (!side.top.found()) {
    set_nan(mass);
  } else if (m == kLowest) {
    if (here) mass.target = side.target_z;
  } else {
    mass = finish_mass(here, target == side.top.column, side.target_z, m, sums[0], sums[1]);
  }
  if (!side.ratio) return;
  if (!side.top.found() || m == kLowest || !(side.other_top > kLowest)) {
    divergence.difference = double(side.other_top) - mass.lse;
    if (!side.top.found() || side.other_top < kLowest) {  // a row of NaN alone
      divergence.difference = divergence.kl = std::numeric_limits<double>::quiet_NaN();
    }
    return;
  }
  const float mr = side.top.other;
  const bool far = far_above(side.other_top, mr);
  const double other_mass = far ? double(side.other_top) - mr + std::log1p(side.other_rest) : 0;
  divergence = finish_ratio({sums[0], sums[2], sums[3], sums[4], sums[5]}, mr - m, far, other_mass);
}

// Adds the sums of one tile of a row: of its mass and, with `ratio`, of its divergence from the other row.
template <int kSides>
__device__ void add_tile(const Slice<float>& slice, int tile, const Pack<float> (&z)[kHeld],
                         const Pack<float> (&other)[kHeld], const Top& top, bool ratio, float* sums) {
  const float pivot_d = top.other - top.value;
  const auto each = [&](const auto& add) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        const bool pivot = column + k == top.column;  // left out: both rows' logits there count as masked
        add(pivot ? kLowest : z[j].v[k], pivot ? kLowest : other[j].v[k]);
      }
    }
  };
  if (kSides == 2 && ratio) {
    each([&](float v, float w) {
      add_ratio(v, w, top.value, top.other, pivot_d, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]);
    });
  } else {
    each([&](float v, float) { add_mass(v, top.value, sums[0], sums[1]); });
  }
}

// A block's statistics to state [10, rows] (fp64); z (and zr) become transformed logits where that changes them.
template <int kSides>
__global__ void __launch_bounds__(kMostThreads, kSides == 2 ? 2 : 4)
    head_stats_kernel(float* z_block, float* zr_block, const int64_t* targets, Shaping shaping, bool kl, bool rkl,
                      double* state, int64_t rows, int n) {
  SHARED(StatsScratch<kSides>, scratch);
  const int64_t row = blockIdx.x;
  float* const memory[2] = {z_block + row * n, kSides == 2 ? zr_block + row * n : nullptr};
  const int target = column_in_block(targets[row], n);
  const RowShaping to_z(shaping, row);
  const Slice<float> slice(memory[0], n);
  const bool held = slice.tiles == 1;
  Pack<float> z[kSides][kHeld];
  Top top[kSides];
  for (int tile = 0; tile < slice.tiles; ++tile) {
#pragma unroll
    for (int s = 0; s < kSides; ++s) slice.load_tile(memory[s], tile, kLowest, z[s]);
#pragma unroll
    for (int s = 0; s < kSides; ++s) to_z.apply(slice, tile, kLowest, z[s]);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        if (!slice.inside(column + k)) continue;
#pragma unroll
        for (int s = 0; s < kSides; ++s) {
          top[s].offer(z[s][j].v[k], column + k, z[kSides - 1 - s][j].v[k]);
          if (column + k == target) scratch.target[s] = z[s][j].v[k];
        }
      }
    }
    if (!held || to_z.changes()) {
#pragma unroll
      for (int s = 0; s < kSides; ++s) slice.store_tile(z[s], tile, memory[s]);
    }
  }
  block_top(top, scratch.top);
  float sums[6 * kSides] = {};
  for (int tile = 0; tile < slice.tiles; ++tile) {
    if (!held) {
#pragma unroll
      for (int s = 0; s < kSides; ++s) slice.load_tile(memory[s], tile, kLowest, z[s]);
    }
    add_tile<kSides>(slice, tile, z[0], z[kSides - 1], top[0], kl, sums);
    if constexpr (kSides == 2) add_tile<kSides>(slice, tile, z[1], z[0], top[1], rkl, sums + 6);
  }
  block_sums(sums, scratch.sums);
  if (threadIdx.x >= kSides) return;
  const int s = int(threadIdx.x);  // one thread a side, both in step
  const double* totals = scratch.sums.total;
  StatsSide side;
  side.top = s == 0 ? top[0] : top[kSides - 1];
  if (kSides == 2) {
    side.other_top = s == 0 ? top[kSides - 1].value : top[0].value;
    side.other_rest = totals[6 * (1 - s)];
    side.ratio = s == 0 ? kl : rkl;
  }
  if (target >= 0) side.target_z = scratch.target[s];
  Mass mass;
  Divergence divergence;
  finish_side(side, totals + 6 * s, target, mass, divergence);
  double* out = state + row;
  const int first = s == 0 ? 0 : 4;
  out[(first + 0) * rows] = mass.lse;
  out[(first + 1) * rows] = mass.rest;
  out[(first + 2) * rows] = mass.target;
  if (s == 0) out[3 * rows] = mass.entropy;
  if constexpr (kSides == 1) {
    const Mass none;
    const double rest[6] = {none.lse, none.rest, none.target, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < 6; ++k) out[(4 + k) * rows] = rest[k];
  } else {
    const double other_lse = __shfl_xor_sync(3u, mass.lse, 1);
    if (s == 0) {
      out[8 * rows] = divergence.kl;
      if (kl || !rkl) out[7 * rows] = kl ? divergence.difference : other_lse - mass.lse;
    } else {
      out[9 * rows] = divergence.kl;
      if (rkl && !kl) out[7 * rows] = -divergence.difference;
    }
  }
}

// Adds a block's shares of JS and of KL(p || (p + q) / 2) to sums [2, rows] (fp64); lse is a sum of two, [2, rows].
// z and zr stay as they are.
__global__ void __launch_bounds__(kMostThreads, 3)
    head_js_kernel(const float* z_block, const float* zr_block, Shaping shaping, const float* lse, const float* ratio,
                   double* sums, int64_t rows, int n) {
  SHARED(SumScratch<2>, scratch);
  const int64_t row = blockIdx.x;
  const RowShaping to_z(shaping, row);
  const float* const z_row = z_block + row * n;
  const float* const zr_row = zr_block + row * n;
  const Slice<float> slice(z_row, n);
  const Normalisers norm = normalisers(lse[row], lse[rows + row], ratio[row]);
  float part[2] = {};
  for (int tile = 0; tile < slice.tiles; ++tile) {
    Pack<float> z[kHeld], zr[kHeld];
    slice.load_tile(z_row, tile, kLowest, z);
    slice.load_tile(zr_row, tile, kLowest, zr);
    to_z.apply(slice, tile, kLowest, z);
    to_z.apply(slice, tile, kLowest, zr);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        if (slice.inside(column + k)) add_js(z[j].v[k], zr[j].v[k], norm, part[0], part[1]);
      }
    }
  }
  block_sums(part, scratch);
  if (threadIdx.x < 2) sums[threadIdx.x * rows + row] += scratch.total[threadIdx.x];
}

inline void head_stats(float* z, float* zr, const int64_t* target, const Shaping& shaping, bool kl, bool rkl,
                       double* state, int64_t rows, int64_t n, cudaStream_t stream) {
  const int threads = threads_for<float>(n);
  if (zr == nullptr) {
    launch(head_stats_kernel<1>, rows, threads, stream, z, zr, target, shaping, false, false, state, rows, int(n));
  } else {
    launch(head_stats_kernel<2>, rows, threads, stream, z, zr, target, shaping, kl, rkl, state, rows, int(n));
  }
}

inline void head_js(const float* z, const float* zr, const Shaping& shaping, const float* lse, const float* ratio,
                    double* sums, int64_t rows, int64_t n, cudaStream_t stream) {
  launch(head_js_kernel, rows, threads_for<float>(n), stream, z, zr, shaping, lse, ratio, sums, rows, int(n));
}

}  // namespace cuda_rows
