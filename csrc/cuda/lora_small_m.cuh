// Adapters of few rows (decoding: 1 to 64) in one launch: y[i] += scaling[e] (x[i] A_e^T) B_e^T, e the row's adapter,
// for all projections that share x. y holds the base product, which the vendor library has made.
//
// Why one launch of this shape. At 8 rows, K = N = 4096 and rank 16 in bf16, W is 33.5 MB, the adapter 0.26 MB, x and y
// 0.2 MB: by bytes the adapters are 1 % of the base product, and what they cost is launches and latency.
// - The base stays the library's: taking it into the launch would save y's way to memory and back, 2 M / K or 0.4 % of
//   W's bytes, and a bypassed row would no longer be the library's bits.
// - Shrink and expand in two launches would send S through memory and wait twice. In one, every block of columns needs
//   the S of its rows. Recomputed by each of 128 blocks of 32 columns that is 128 x (A + x) = 25 MB out of L2, 5 us; a
//   cluster of 8 blocks (sm_90) cuts K into 8 slices, each block makes its slice of S for all, and writes it into the
//   others' shared memory: 3 MB, 0.6 us. Without clusters (sm_80) a block recomputes all slices, for fewer rows and
//   more columns. No spinning, no counters, no memory to be cleared between launches.
// - Blocks of rows and columns fill the chip once: few rows take narrow blocks of columns, many take wide ones.
// (Arithmetic for an H200; no GPU was at hand.)
//
// Sums: a slice is one K/8 of the row, whoever computes it; a lane adds its 8-column groups in order, lanes join in a
// tree, slices join in order, all in fp32. So the bits depend neither on the other rows, nor on the chip, nor on the
// blocks' shape, and y is rounded once after the base's own rounding.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/lora_expand.cuh"
#include "cuda/lora_shrink.cuh"

namespace cuda_rows {

// Grid: blocks of columns, groups of rows, projections. T: x and y; U: the adapters.
template <typename T, typename U>
__global__ void __launch_bounds__(kMostThreads, 2) lora_small_m_kernel(const __grid_constant__ LoraSmallM call) {
  SHARED(SmallMScratch, scratch);
  const Cluster cluster(call.blocks);
  const int projection = blockIdx.z, first_row = int(blockIdx.y) * call.group_rows;
  const int column = int(blockIdx.x) * call.block_columns, columns = call.columns[projection];
  const LoraEntry* const entries = call.entry + projection * call.adapters;
  if (column - cluster.rank * call.block_columns >= columns) return;  // the whole cluster: this projection is narrower
  if (threadIdx.x < 32) sort_rows(call, entries, first_row, scratch);
  cluster.barrier();  // every block has begun, too, and can be written to
  if (scratch.tiles == 0 && scratch.outside == 0) return;  // the whole cluster again
  int ranks = 0;
  for (int t = 0; t < scratch.tiles; ++t) ranks = max(ranks, entries[scratch.tile[t].adapter].rank);
  prefetch_b<U>(entries, column, call.block_columns, columns, scratch);
  for (int rank = 0; rank < ranks; rank += kRanks) {
    const int now = min(ranks - rank, kRanks);
    if (rank > 0) cluster.barrier();  // every block has read the parts that are now overwritten
    shrink<T, U>(call, entries, first_row, rank, now, cluster, scratch);
    cluster.barrier();
    join_slices(call, entries, rank, now, scratch);
    __syncthreads();
    if (blockIdx.x == 0 && first_row < call.kept_rows) {
      keep_s<T>(call, entries, projection, first_row, rank, now, scratch);
    }
    expand<U>(entries, rank, column, call.block_columns, columns, scratch);
  }
  __syncthreads();
  add_to_y(call, static_cast<T*>(call.y[projection]), call.y_stride[projection], first_row, column, columns, scratch);
}

// ---- the launch ----

// Blocks for a chip: as many as it runs at once, if the call's columns give them, and no more while they can be wider.
inline void shape_blocks(LoraSmallM& call, bool clusters, int multiprocessors) {
  call.blocks = clusters ? kSlices : 1;
  call.group_rows = clusters ? kGroupRows : kTileRows;
  const int groups = (call.rows + call.group_rows - 1) / call.group_rows;
  const auto blocks = [&](int width) {
    int64_t count = 0;
    for (int p = 0; p < call.projections; ++p) count += (call.columns[p] + width - 1) / width;
    return count * groups;
  };
  call.block_columns = 32;
  while (call.block_columns < kMostColumns && blocks(call.block_columns) > multiprocessors) call.block_columns *= 2;
}

// y of one projection.
struct LoraOutput {
  void* y;
  int64_t stride;
  int columns, s_column;
};

// One launch for up to kMostProjections of `outputs` and as many adapters as there is room for, several beyond. `call`
// has all but those; `entries`: projection by projection, call.all each.
template <typename T, typename U>
void lora_small_m(LoraSmallM call, const std::vector<LoraEntry>& entries, const std::vector<LoraOutput>& outputs,
                  bool clusters, int multiprocessors, cudaStream_t stream) {
  const int count = int(outputs.size());
  for (int p = 0; p < count; p += kMostProjections) {
    call.projections = std::min(count - p, kMostProjections);
    int columns = 0;
    for (int i = 0; i < call.projections; ++i) {
      const LoraOutput& out = outputs[p + i];
      call.y[i] = out.y, call.y_stride[i] = out.stride, call.columns[i] = out.columns, call.s_column[i] = out.s_column;
      columns = std::max(columns, out.columns);
    }
    if (columns == 0 || call.rows == 0) continue;
    shape_blocks(call, clusters, multiprocessors);
    const int per_cluster = call.block_columns * call.blocks;
    const dim3 grid((columns + per_cluster - 1) / per_cluster * call.blocks,
                    (call.rows + call.group_rows - 1) / call.group_rows, call.projections);
    const int most = kMostEntries / call.projections;
    call.first = 0;
    do {  // once without any adapter too: for rows that name one all the same
      call.adapters = std::min(call.all - call.first, most);
      for (int i = 0; i < call.projections; ++i) {
        const auto begin = entries.begin() + int64_t(p + i) * call.all + call.first;
        std::copy_n(begin, call.adapters, call.entry + i * call.adapters);
      }
      launch_clusters(lora_small_m_kernel<T, U>, grid, kMostThreads, call.blocks, stream, call);
      call.first += most;
    } while (call.first < call.all);
  }
}

}  // namespace cuda_rows
