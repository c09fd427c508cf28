// The second half of lora_small_m.cuh: S B^T in a block's columns, and its sum with y.
#pragma once
#include "cuda/lora_call.cuh"

namespace cuda_rows {

// Lanes that share a column: each takes kWidth of its `ranks`.
__device__ inline int lanes_of(int ranks) {
  int lanes = 1;
  while (lanes * kWidth < ranks) lanes *= 2;
  return lanes;
}

// A warp's product of R rows of S and the 32 / lanes columns from `column` on, added to `out`.
template <typename U, int R>
__device__ inline void expand_columns(const LoraEntry& entry, const RowTile& tile, int first_rank, int ranks, int lanes,
                                      int column, int columns, int at, SmallMScratch& scratch) {
  const int lane = int(threadIdx.x) % 32, part = lane % lanes, group = part * kWidth;
  column += lane / lanes, at += lane / lanes;
  float sums[R] = {};
  if (column < columns && group < ranks) {
    const U* const b = static_cast<const U*>(entry.b) + int64_t(column) * entry.b_stride + first_rank + group;
    const bool whole = on_16_bytes(static_cast<const U*>(entry.b), entry.b_stride) && group + kWidth <= ranks;
    const Eight<U> bs = whole ? load_whole(b) : load_some(b, ranks - group);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float* const s = &scratch.part[0][tile.row[i]][group];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sums[i] = fmaf(s[c], widen(bs.v[c]), sums[i]);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) sums[i] += __shfl_xor_sync(kWarp, sums[i], step);
  }
  if (column >= columns) return;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i >= tile.count || i % lanes != part) continue;
    float& out = scratch.out[tile.row[i]][at];
    out = first_rank == 0 ? sums[i] : out + sums[i];
  }
}

// The block's columns of S B^T for all its rows.
template <typename U>
__device__ inline void expand(const LoraEntry* entries, int first_rank, int column, int block_columns, int columns,
                              SmallMScratch& scratch) {
  const int warps = int(blockDim.x) / 32;
  int turn = int(threadIdx.x) / 32;  // the warps take the units of all tiles in turn
  for (int t = 0; t < scratch.tiles; ++t) {
    const RowTile& tile = scratch.tile[t];
    const LoraEntry& entry = entries[tile.adapter];
    const int ranks = min(entry.rank - first_rank, kRanks);
    if (ranks <= 0) continue;
    const int lanes = lanes_of(ranks), unit = 32 / lanes;
    int at = turn * unit;
    for (; at < block_columns; at += warps * unit) {
      if (tile.count == 1) {
        expand_columns<U, 1>(entry, tile, first_rank, ranks, lanes, column + at, columns, at, scratch);
      } else {
        expand_columns<U, kTileRows>(entry, tile, first_rank, ranks, lanes, column + at, columns, at, scratch);
      }
    }
    turn = (at - block_columns) / unit;
  }
}

// Starts B's way from memory while the shrink is at work.
template <typename U>
__device__ inline void prefetch_b(const LoraEntry* entries, int column, int block_columns, int columns,
                                  const SmallMScratch& scratch) {
#if !defined(RLHF_CUDA_ON_HOST)
  const int end = min(column + block_columns, columns);
  for (int t = 0; t < scratch.tiles; ++t) {
    const LoraEntry& entry = entries[scratch.tile[t].adapter];
    for (int c = column + int(threadIdx.x); c < end; c += int(blockDim.x)) {
      const U* const b = static_cast<const U*>(entry.b) + int64_t(c) * entry.b_stride;
      for (int at = 0; at < entry.rank; at += 128 / int(sizeof(U))) asm volatile("prefetch.L2 [%0];" ::"l"(b + at));
    }
  }
#endif
}

// y += out in the block's columns; NaN where the index named no adapter.
template <typename T>
__device__ inline void add_to_y(const LoraSmallM& call, T* y, int64_t stride, int first_row, int column, int columns,
                                const SmallMScratch& scratch) {
  const bool aligned = on_16_bytes(y, stride);
  const int groups = call.block_columns / kWidth;
  for (int v = threadIdx.x; v < kGroupRows * groups; v += blockDim.x) {
    const int row = v / groups, at = v % groups * kWidth, valid = columns - column - at;
    const bool outside = scratch.outside >> row & 1;
    if ((scratch.adapter[row] < 0 && !outside) || valid <= 0) continue;
    T* const p = y + (first_row + row) * stride + column + at;
    const bool whole = aligned && valid >= kWidth;
    Eight<T> values = whole ? load_whole(p) : load_some(p, valid);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float sum = widen(values.v[c]) + scratch.out[row][at + c];
      narrow(outside ? std::numeric_limits<float>::quiet_NaN() : sum, values.v[c]);
    }
    if (whole) {
      store_whole(values, p);
    } else {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        if (c < valid) p[c] = values.v[c];
      }
    }
  }
}

}  // namespace cuda_rows
