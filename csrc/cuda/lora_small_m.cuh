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
// - M blocks of rows x columns fill the chip once: few rows take narrow blocks of columns, many take wide ones.
//
// Sums: a slice is one K/8 of the row, whoever computes it; a lane adds its 8-column groups in order, lanes join in a
// tree, slices join in order, all in fp32. So the bits depend neither on the other rows, nor on the chip, nor on the
// blocks' shape, and y is rounded once after the base's own rounding.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/cluster.cuh"

namespace cuda_rows {

constexpr int kMostRows = 64, kMostProjections = 4, kMostEntries = 96;
constexpr int kSlices = 8;         // of K, and blocks of a cluster
constexpr int kGroupRows = 8;      // rows that a block takes at most
constexpr int kTileRows = 4;       // of these, rows of one adapter whose sums a thread makes together
constexpr int kTileRanks = 4;      // rows of A that it takes with them
constexpr int kRanks = 128;        // ranks in one go
constexpr int kMostColumns = 256;  // of a block
constexpr int kWidth = 8;          // columns that a lane takes at a time: 16 or 32 bytes

// One projection's part of one adapter.
struct LoraEntry {
  const void *a, *b;  // [rank, K] and [N, rank]
  int a_stride, b_stride, rank;
  float scaling;
};

// The kernel's one parameter: by value, so that a CUDA graph keeps it.
struct LoraSmallM {
  LoraEntry entry[kMostEntries];  // projection by projection, `adapters` each
  void* y[kMostProjections];
  int64_t y_stride[kMostProjections];
  int columns[kMostProjections];
  int s_column[kMostProjections];
  const void *x, *index;  // index null: `adapter`
  const float* scaling;   // of every adapter, or null: the entries'
  void* s;                // the first kept_rows rows of S, scaled, each projection's from s_column on
  int64_t x_stride, s_stride;
  int16_t adapter[kMostRows];
  bool wide;  // the index is int64, else int32
  int rows, kept_rows, k, projections;
  int all, first, adapters;  // adapters of the call; the launch has [first, first + adapters)
  int blocks, group_rows, block_columns;
};
static_assert(sizeof(LoraSmallM) <= 4096, "a kernel's parameters");

// Rows of a block that have one adapter; beyond `count` the last one again.
struct RowTile {
  int adapter, count, row[kTileRows];
};

struct alignas(16) SmallMScratch {
  float part[kSlices][kGroupRows][kRanks];  // S by slices; then the first is their sum
  float out[kGroupRows][kMostColumns];
  RowTile tile[kGroupRows];
  int adapter[kGroupRows];  // -1: the row stays as it is
  int tiles;
  unsigned outside;  // rows whose index names no adapter
};

// ---- groups of kWidth columns ----

template <typename T>
struct alignas(16) Eight {
  T v[kWidth];
};

template <typename T>
__device__ inline Eight<T> load_whole(const T* p) {
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < kWidth / kPack<T>; ++i) {
    const Pack<T> pack = std::bit_cast<Pack<T>>(reinterpret_cast<const uint4*>(p)[i]);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) out.v[i * kPack<T> + j] = pack.v[j];
  }
  return out;
}

// The first `valid` elements, zeros beyond.
template <typename T>
__device__ inline Eight<T> load_some(const T* p, int valid) {
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i < valid) {
      out.v[i] = p[i];
    } else {
      narrow(0.0f, out.v[i]);
    }
  }
  return out;
}

template <typename T>
__device__ inline void store_whole(const Eight<T>& in, T* p) {
#pragma unroll
  for (int i = 0; i < kWidth / kPack<T>; ++i) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) pack.v[j] = in.v[i * kPack<T> + j];
    store16(std::bit_cast<uint4>(pack), p + i * kPack<T>);
  }
}

template <typename T>
__device__ inline bool on_16_bytes(const T* p, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(p) | uint64_t(stride) * sizeof(T)) % 16 == 0;
}

// ---- which rows have which adapter ----

__device__ inline int64_t index_of(const LoraSmallM& call, int row) {
  if (call.index == nullptr) return call.adapter[row];
  return call.wide ? static_cast<const int64_t*>(call.index)[row] : static_cast<const int*>(call.index)[row];
}

// By the first warp: one lane a row.
__device__ inline void sort_rows(const LoraSmallM& call, const LoraEntry* entries, int first_row,
                                 SmallMScratch& scratch) {
  const int lane = threadIdx.x;
  const bool mine = lane < call.group_rows && first_row + lane < call.rows;
  const int64_t asked = mine ? index_of(call, first_row + lane) : -1;
  const bool here = asked >= call.first && asked < call.first + call.adapters;
  const bool served = here && entries[asked - call.first].rank > 0;
  const int own = served ? int(asked) - call.first : -1;
  unsigned same = 0;  // rows with this lane's adapter
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row) same |= unsigned(__shfl_sync(kWarp, own, row) == own) << row;
  const unsigned earlier = (1u << lane) - 1;
  const bool leads = served && __popc(same & earlier) % kTileRows == 0;
  const unsigned leaders = __ballot_sync(kWarp, leads);
  const unsigned outside = __ballot_sync(kWarp, asked < -1 || asked >= call.all);
  if (lane < kGroupRows) scratch.adapter[lane] = own;
  if (lane == 0) scratch.tiles = __popc(leaders), scratch.outside = outside;
  if (!leads) return;
  RowTile& tile = scratch.tile[__popc(leaders & earlier)];
  unsigned left = same & ~earlier;
  int count = 0, row = lane;
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (left != 0) row = __ffs(left) - 1, left &= left - 1, ++count;
    tile.row[i] = row;
  }
  tile.adapter = own, tile.count = count;
}

// ---- shrink: S = x A^T by slices of K ----

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

// ---- expand: S B^T ----

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

// Grid: blocks of columns, groups of rows, projections. T: x and y; U: the adapters.
template <typename T, typename U>
__global__ void __launch_bounds__(kMostThreads, 2) lora_small_m_kernel(const __grid_constant__ LoraSmallM call) {
  SHARED(SmallMScratch, scratch);
  const Cluster cluster(call.blocks);
  const int projection = blockIdx.z, first_row = int(blockIdx.y) * call.group_rows;
  const int column = int(blockIdx.x) * call.block_columns, columns = call.columns[projection];
  const LoraEntry* const entries = call.entry + projection * call.adapters;
  if (column - cluster.rank * call.block_columns >= columns) return;  // the whole cluster: this projection is narrower
  cluster.arrive();
  if (threadIdx.x < 32) sort_rows(call, entries, first_row, scratch);
  cluster.wait();
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
