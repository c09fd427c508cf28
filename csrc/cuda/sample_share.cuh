// A block's share of a row of logits in sampling: its columns in order, integer sums over them, and the place where
// such a running sum exceeds a number.
//
// A line is the groups of 16 bytes that lie side by side, one a thread; a piece is a few lines, whose sum is kept.
// Which thread has a column depends on the share's length alone, not on where the row lies: so do sums of floats.
#pragma once
#include "cuda/sample_weights.cuh"

namespace cuda_rows {

constexpr int kPieces = 64;

struct ShareScratch {
  uint64_t piece[kPieces][kMostWarps];
  uint64_t part[kMostWarps], whole[kMostWarps];
};

__device__ inline uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

template <typename T>
class Share {
 public:
  // The columns [first, first + columns) of a row.
  __device__ Share(ShareScratch& scratch, const T* row, int first, int columns)
      : scratch_(scratch),
        memory_(row + first),
        first_(first),
        slice_(columns),
        lines_(slice_.tiles * kHeld),
        in_piece_((slice_.tiles + kPieces - 1) / kPieces * kHeld) {}

  // The share's top token: its logit, ordered as a number, above the complement of its column, so that of codes the
  // largest has the likeliest token, of equals the first. A NaN is above all.
  __device__ uint64_t top() const {
    float top = -std::numeric_limits<float>::infinity();
    int at = 0;
    bool nan = false;
    for (int tile = 0; tile < slice_.tiles; ++tile) {  // from memory: several loads in flight
      Pack<T> packed[kHeld];
      slice_.load_tile(memory_, tile, outside(), packed);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
#pragma unroll
        for (int k = 0; k < kPack<T>; ++k) {
          const float z = widen(packed[j].v[k]);
          if (z > top) top = z, at = first_ + slice_.column(tile, j) + k;
          nan |= z != z;
        }
      }
    }
    uint64_t code = uint64_t(ordered(top, nan)) << 32 | ~unsigned(at);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) code = larger(code, __shfl_xor_sync(kWarp, code, step));
    if (threadIdx.x % 32 == 0) scratch_.whole[threadIdx.x / 32] = code;
    __syncthreads();
    for (int w = 0; w < int(blockDim.x) / 32; ++w) code = larger(code, scratch_.whole[w]);
    return code;
  }

  // What makes u of a logit.
  __device__ void scale(float top, float temperature) { top_ = top, temperature_ = temperature; }

  // each(u, column, place in a group) for the thread's columns. Beyond the share logits are -inf.
  template <typename F>
  __device__ void for_columns(const F& each) const {
    for_lines(0, lines_, each);
  }

  // The block's sum of integers amount(u, column, place in a group), of which it keeps those by pieces.
  template <typename F>
  __device__ uint64_t sum(const F& amount) const {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    __syncthreads();  // the pieces may still be read
    uint64_t whole = 0;
#pragma unroll 1
    for (int begin = 0, piece = 0; begin < lines_; begin += in_piece_, ++piece) {
      uint64_t own = 0;
      for_lines(begin, min(begin + in_piece_, lines_),
                [&](float u, int column, int k) { own += amount(u, column, k); });
#pragma unroll
      for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(kWarp, own, step);
      if (lane == 0) scratch_.piece[piece][warp] = own;
      whole += own;
    }
    return sum_of_warps(whole);
  }

  // The column at which the running sum of amount(u, column, ..) exceeds `left`, which is less than the sum() of it:
  // the thread that has it calls found(column).
  template <typename F, typename G>
  __device__ void place(uint64_t left, const F& amount, const G& found) const {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
    int piece = 0;
    for (;; ++piece) {
      uint64_t whole = 0;
      for (int w = 0; w < warps; ++w) whole += scratch_.piece[piece][w];
      if (left < whole) break;
      left -= whole;
    }
#pragma unroll 1
    for (int line = piece * in_piece_;; ++line) {
      uint64_t running[kPack<T>], own = 0;
      for_lines(line, line + 1, [&](float u, int column, int k) { running[k] = own += amount(u, column, k); });
      uint64_t before = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t lower = __shfl_up_sync(kWarp, before, step);
        if (lane >= step) before += lower;
      }
      if (lane == 31) scratch_.part[warp] = before;
      __syncthreads();
      before -= own;
      uint64_t whole = 0;
      for (int w = 0; w < warps; ++w) {
        if (w == warp) before += whole;
        whole += scratch_.part[w];
      }
      if (left >= before && left - before < own) {
        int k = 0;
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) k += left - before >= running[i];
        found(first_ + slice_.column(0, line) + k);
      }
      if (left < whole) return;
      left -= whole;
      __syncthreads();  // before the next line's parts
    }
  }

  // The block's sum of a number of each thread, in a fixed order.
  template <typename N>
  __device__ N block_sum(N own) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(kWarp, own, step);
    __syncthreads();  // the last sum may still be read
    return sum_of_warps(own);
  }

 private:
  static __device__ T outside() {
    T out;
    narrow(-std::numeric_limits<float>::infinity(), out);
    return out;
  }

  __device__ float u_of(float z) const {
    const float gap = __fsub_rn(top_, z);
    return temperature_ == 1.0f ? gap : __fdiv_rn(gap, temperature_);
  }

  template <typename F>
  __device__ void for_lines(int begin, int end, const F& each) const {
    Pack<T> next;
    slice_.load(memory_, slice_.column(0, begin), outside(), next);
#pragma unroll 1
    for (int line = begin; line < end; ++line) {
      const Pack<T> group = next;
      slice_.load(memory_, slice_.column(0, line + 1), outside(), next);
      const int column = first_ + slice_.column(0, line);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) each(u_of(widen(group.v[k])), column + k, k);
    }
  }

  template <typename N>
  __device__ N sum_of_warps(N own) const {
    if (threadIdx.x % 32 == 0) scratch_.whole[threadIdx.x / 32] = std::bit_cast<uint64_t>(own);
    __syncthreads();
    N sum = 0;
    for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += std::bit_cast<N>(scratch_.whole[w]);
    return sum;
  }

  ShareScratch& scratch_;
  const T* memory_;
  int first_;
  Slice<T> slice_;
  int lines_, in_piece_;
  float top_ = 0, temperature_ = 1;
};

}  // namespace cuda_rows
