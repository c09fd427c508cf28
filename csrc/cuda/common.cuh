// What the CUDA row kernels share: rows cut into groups of 16 bytes, reductions over a block in a fixed order, and what
// differs between nvcc and a run on the host (RLHF_CUDA_ON_HOST, for tests).
#pragma once
#if defined(RLHF_CUDA_ON_HOST)
#include "testing/cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED(type, name) __shared__ type name
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#include <bit>

#include "logit_math.h"

namespace cuda_rows {

using namespace logit;

// One block of `threads` a row.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, A... args) {
  if (blocks == 0) return;
#if defined(RLHF_CUDA_ON_HOST)
  cuda_on_host::launch(kernel, dim3(unsigned(blocks)), dim3(threads), 0, args...);
#else
  // clang-format off
  kernel<<<dim3(unsigned(blocks)), threads, 0, stream>>>(P(args)...);
  // clang-format on
#endif
}

// ---- groups: 16 aligned bytes of a row; the first and the last may lie partly outside it ----

template <typename T>
constexpr int kPack = 16 / sizeof(T);  // columns of a group

constexpr int kHeld = 4;  // groups of a tile that one thread takes: four 16-byte loads in flight
// Threads of a block: a row of 4,096 fp32 columns is one tile. Each kernel's launch bounds name as many such blocks on
// a multiprocessor as leave no register spilled.
constexpr int kMostThreads = 256;

template <typename T>
struct alignas(16) Pack {
  T v[kPack<T>];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }

// One 16-byte store: of a plain assignment the compiler makes several smaller ones where some elements are conditional.
__device__ inline void store16(uint4 value, void* p) {
#if defined(RLHF_CUDA_ON_HOST)
  *static_cast<uint4*>(p) = value;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

// Division by one number again and again: a product with its inverse, corrected by what that leaves, which rounds as a
// division does (but for subnormal results) in a third of its instructions.
struct Divisor {
  float value, inverse;

  __device__ explicit Divisor(float value) : value(value), inverse(1.0f / value) {}

  __device__ float divide(float x) const {
    const float q = x * inverse, corrected = fmaf(fmaf(-q, value, x), inverse, q);
    return corrected == corrected ? corrected : q;  // x or q may be infinite
  }
};

// Elements that a row starts behind a 16-byte boundary.
template <typename T>
__device__ inline int lead_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPack<T>);
}

// A thread's part of a row of n columns: tiles of blockDim.x * kHeld groups, in each the groups threadIdx.x,
// threadIdx.x + blockDim.x, and so on, so that a warp reads 512 bytes in a row.
template <typename T>
struct Slice {
  int n, lead, tiles;

  __device__ Slice(const T* row, int n) : n(n), lead(lead_of(row)) {
    const int groups = (n + lead + kPack<T> - 1) / kPack<T>, in_tile = int(blockDim.x) * kHeld;
    tiles = (groups + in_tile - 1) / in_tile;
  }

  // Groups counted from the first column wherever the row lies: a thread's columns then depend on n alone.
  __device__ explicit Slice(int n) : Slice(static_cast<const T*>(nullptr), n) {}

  // The first column of a tile's group j; it may be negative, or past the row's end.
  __device__ int column(int tile, int j) const {
    return ((tile * kHeld + j) * int(blockDim.x) + int(threadIdx.x)) * kPack<T> - lead;
  }

  __device__ bool whole(int column) const { return column >= 0 && column + kPack<T> <= n; }
  __device__ bool inside(int column) const { return unsigned(column) < unsigned(n); }

  // The columns of one group, `outside` beyond the row's ends. Another row than the slice's own may start elsewhere.
  __device__ void load(const T* row, int column, T outside, Pack<T>& out) const {
    if (whole(column) && lead_of(row) == lead) {
      out = std::bit_cast<Pack<T>>(*reinterpret_cast<const uint4*>(row + column));
    } else {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) out.v[k] = inside(column + k) ? row[column + k] : outside;
    }
  }

  __device__ void store(const Pack<T>& in, int column, T* row) const {
    if (whole(column) && lead_of(row) == lead) {
      store16(std::bit_cast<uint4>(in), row + column);
    } else {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        if (inside(column + k)) row[column + k] = in.v[k];
      }
    }
  }

  __device__ void load_tile(const T* row, int tile, T outside, Pack<T> (&out)[kHeld]) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) load(row, column(tile, j), outside, out[j]);
  }

  __device__ void store_tile(const Pack<T> (&in)[kHeld], int tile, T* row) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) store(in[j], column(tile, j), row);
  }
};

// Threads for rows of n columns: as many as hold the row in one tile, up to kMostThreads.
template <typename T>
int threads_for(int64_t n) {
  int threads = 64;
  while (threads < kMostThreads && int64_t(threads) * kHeld * kPack<T> < n) threads *= 2;
  return threads;
}

// ---- reductions over the block: warps by shuffles, then one by one in order, so that a result never varies ----

constexpr int kMostWarps = kMostThreads / 32;
constexpr unsigned kWarp = 0xFFFFFFFFu;

// A row's top token: its logit, its column (the first of equals) and the other row's logit there. NaN is never the top.
struct Top {
  float value = -std::numeric_limits<float>::infinity();
  int column = std::numeric_limits<int>::max();
  float other = 0;

  __device__ bool found() const { return column != std::numeric_limits<int>::max(); }

  __device__ void offer(float v, int at, float beside) {  // columns come in rising order
    if (v > value) value = v, column = at, other = beside;
  }

  __device__ void offer(const Top& t) {
    if (t.value > value || (t.value == value && t.column < column)) *this = t;
  }
};

template <int N>
struct TopScratch {
  float value[kMostWarps][N], other[kMostWarps][N];
  int column[kMostWarps][N];
};

// Every thread gets the block's top of each of the N rows.
template <int N>
__device__ void block_top(Top (&top)[N], TopScratch<N>& scratch) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      Top t;
      t.value = __shfl_xor_sync(kWarp, top[i].value, step);
      t.column = __shfl_xor_sync(kWarp, top[i].column, step);
      t.other = __shfl_xor_sync(kWarp, top[i].other, step);
      top[i].offer(t);
    }
  }
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scratch.value[warp][i] = top[i].value;
      scratch.other[warp][i] = top[i].other;
      scratch.column[warp][i] = top[i].column;
    }
  }
  __syncthreads();
  const int warps = int(blockDim.x) / 32;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Top t;
      t.value = scratch.value[w][i], t.column = scratch.column[w][i], t.other = scratch.other[w][i];
      top[i].offer(t);
    }
  }
}

template <int N>
struct SumScratch {
  float part[kMostWarps][N];
  double total[N];
};

// Adds the N sums up over the block, from the warps on in fp64; the totals are then there for the first warp alone.
template <int N>
__device__ void block_sums(float (&sums)[N], SumScratch<N>& scratch) {
  static_assert(N <= 32, "one lane of the first warp adds up one sum");
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(kWarp, sums[i], step);
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch.part[warp][i] = sums[i];
  }
  __syncthreads();
  if (warp > 0) return;
  if (lane < N) {
    double total = 0;
    const int warps = int(blockDim.x) / 32;
    for (int w = 0; w < warps; ++w) total += scratch.part[w][lane];
    scratch.total[lane] = total;
  }
  __syncwarp();
}

}  // namespace cuda_rows
