// The first half of lora_small_m.cuh: S = scaling x A^T of a block's rows, by slices of K over the blocks of a cluster.
#pragma once
#include "cuda/lora_call.cuh"

namespace cuda_rows {

// Sums the first N values over the lanes that differ in the bits of `step` and below, each in the same tree; a lane of
// the warp (step 16) gets that of the value lane / (32 / N).
template <int N, int M>
__device__ inline float spread_sum(float (&v)[M], int step = 16) {
  if constexpr (N == 1) {
    for (; step > 0; step /= 2) v[0] += __shfl_xor_sync(kWarp, v[0], step);
    return v[0];
  } else {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float given = upper ? v[i] : v[i + N / 2], kept = upper ? v[i + N / 2] : v[i];
      v[i] = kept + __shfl_xor_sync(kWarp, given, step);
    }
    return spread_sum<N / 2>(v, step / 2);
  }
}

// A warp's product of R rows of x and kTileRanks rows of A (`ranks` of them there) over one slice of K.
template <typename T, typename U, int R>
__device__ inline void shrink_tile(const LoraSmallM& call, const LoraEntry& entry, const RowTile& tile, int first_row,
                                   int slice, int rank, int at, int ranks, const Cluster& cluster,
                                   SmallMScratch& scratch) {
  constexpr int kSums = R * kTileRanks, kCopies = 32 / kSums;
  const int lane = int(threadIdx.x) % 32;
  const int groups = (call.k + kWidth * kSlices - 1) / (kWidth * kSlices);
  const int begin = slice * groups * kWidth, end = min(begin + groups * kWidth, call.k);
  const T* x[R];
  const U* a[kTileRanks];
#pragma unroll
  for (int i = 0; i < R; ++i) x[i] = static_cast<const T*>(call.x) + (first_row + tile.row[i]) * call.x_stride;
#pragma unroll
  for (int j = 0; j < kTileRanks; ++j) {
    a[j] = static_cast<const U*>(entry.a) + int64_t(rank + min(j, ranks - 1)) * entry.a_stride;
  }
  const bool aligned = on_16_bytes(static_cast<const T*>(call.x), call.x_stride) &&
                       on_16_bytes(static_cast<const U*>(entry.a), entry.a_stride);
  float sums[kSums] = {};
  for (int k = begin + lane * kWidth; k < end; k += 32 * kWidth) {
    if (aligned && k + kWidth <= end) {
      Eight<T> xs[R];
      Eight<U> as[kTileRanks];
#pragma unroll
      for (int j = 0; j < kTileRanks; ++j) as[j] = load_whole(a[j] + k);
#pragma unroll
      for (int i = 0; i < R; ++i) xs[i] = load_whole(x[i] + k);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
#pragma unroll
        for (int j = 0; j < kTileRanks; ++j) {
#pragma unroll
          for (int i = 0; i < R; ++i) sums[j * R + i] = fmaf(widen(xs[i].v[c]), widen(as[j].v[c]), sums[j * R + i]);
        }
      }
    } else {
#pragma unroll 1
      for (int c = k; c < min(k + kWidth, end); ++c) {
#pragma unroll
        for (int j = 0; j < kTileRanks; ++j) {
#pragma unroll
          for (int i = 0; i < R; ++i) sums[j * R + i] = fmaf(widen(x[i][c]), widen(a[j][c]), sums[j * R + i]);
        }
      }
    }
  }
  const float sum = spread_sum<kSums>(sums);
  const int which = lane / kCopies, j = which / R, i = which % R;
  if (j >= ranks || i >= tile.count) return;
  float* const own = &scratch.part[slice][tile.row[i]][at + j];
  for (int block = lane % kCopies; block < cluster.blocks; block += kCopies) cluster.store(own, sum, block);
}

// The block's slices of the S of all its rows, `ranks` columns from `first_rank` on, to every block of the cluster.
template <typename T, typename U>
__device__ inline void shrink(const LoraSmallM& call, const LoraEntry* entries, int first_row, int first_rank,
                              int ranks, const Cluster& cluster, SmallMScratch& scratch) {
  const int slices = kSlices / cluster.blocks, tiles = scratch.tiles;
  const int tasks = tiles * slices * ((ranks + kTileRanks - 1) / kTileRanks);
  for (int task = int(threadIdx.x) / 32; task < tasks; task += int(blockDim.x) / 32) {
    const RowTile& tile = scratch.tile[task % tiles];
    const int slice = cluster.rank + task / tiles % slices * cluster.blocks, at = task / tiles / slices * kTileRanks;
    const LoraEntry& entry = entries[tile.adapter];
    const int rank = first_rank + at, left = min(entry.rank - rank, kTileRanks);
    if (left <= 0) continue;
    if (tile.count == 1) {
      shrink_tile<T, U, 1>(call, entry, tile, first_row, slice, rank, at, left, cluster, scratch);
    } else {
      shrink_tile<T, U, kTileRows>(call, entry, tile, first_row, slice, rank, at, left, cluster, scratch);
    }
  }
}

// Joins the slices, scaled, into the first; zeros beyond a row's rank, up to whole groups.
__device__ inline void join_slices(const LoraSmallM& call, const LoraEntry* entries, int first_rank, int ranks,
                                   SmallMScratch& scratch) {
  const int padded = (ranks + kWidth - 1) / kWidth * kWidth;
  for (int at = threadIdx.x; at < kGroupRows * padded; at += blockDim.x) {
    const int row = at / padded, rank = at % padded, e = scratch.adapter[row];
    if (e < 0) continue;
    float sum = 0;
    if (first_rank + rank < entries[e].rank) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) sum += scratch.part[slice][row][rank];
      sum *= call.scaling != nullptr ? call.scaling[call.first + e] : entries[e].scaling;
    }
    scratch.part[0][row][rank] = sum;
  }
}

// Writes the rows of S that are kept, at the ranks that their adapters have.
template <typename T>
__device__ inline void keep_s(const LoraSmallM& call, const LoraEntry* entries, int projection, int first_row,
                              int first_rank, int ranks, const SmallMScratch& scratch) {
  for (int at = threadIdx.x; at < kGroupRows * ranks; at += blockDim.x) {
    const int row = at / ranks, rank = at % ranks, e = scratch.adapter[row];
    if (e < 0 || first_row + row >= call.kept_rows || first_rank + rank >= entries[e].rank) continue;
    T* const s = static_cast<T*>(call.s) + (first_row + row) * call.s_stride + call.s_column[projection];
    narrow(scratch.part[0][row][rank], s[first_rank + rank]);
  }
}

}  // namespace cuda_rows
