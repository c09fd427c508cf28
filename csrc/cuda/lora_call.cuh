// What the steps of lora_small_m.cuh share: the launch's parameter, a block's scratch memory, groups of columns, and
// which of a block's rows have which adapter.
#pragma once
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

}  // namespace cuda_rows
