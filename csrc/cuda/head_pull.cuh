// Row passes of the head whose result the second GEMM takes back to the hidden states: E' = e^(z - shift), and the
// gradient of the logits. One block a row, in place, one read and one write. The contract is that of cpu/logprob.cpp.
#pragma once
#include "cuda/shaping.cuh"

namespace cuda_rows {

struct ExpScratch {
  TopScratch<1> top;
  SumScratch<1> sum;
};

// A block of logits to e^(z - shift) times the softcap's derivative, the target's column 0; shift [rows] starts as the
// first block's maximum and rises when a later one exceeds it by 60, which scales mass [rows] (fp64) by factor [rows].
__global__ void __launch_bounds__(kMostThreads, 3)
    head_exp_kernel(float* block, const int64_t* targets, Shaping shaping, bool first, float* shift, double* mass,
                    float* factor, double* target_z, int n) {
  SHARED(ExpScratch, scratch);
  const int64_t row = blockIdx.x;
  float* const memory = block + row * n;
  const int target = column_in_block(targets[row], n);
  const RowShaping to_z(shaping, row);
  const Slice<float> slice(memory, n);
  const bool held = slice.tiles == 1;
  float c = first ? 0 : shift[row];
  Pack<float> z[kHeld];
  Top top[1];
  bool own_target = false;  // whether it is among this thread's columns
  float value_there = 0;
  for (int tile = 0; tile < slice.tiles; ++tile) {
    slice.load_tile(memory, tile, kLowest, z);
    to_z.apply(slice, tile, kLowest, z);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        const bool at_target = column + k == target;
        own_target |= at_target;
        value_there = at_target ? z[j].v[k] : value_there;
        z[j].v[k] = at_target ? kLowest : z[j].v[k];
        if (slice.inside(column + k)) top[0].offer(z[j].v[k], column + k, 0);
      }
    }
    if (!held) slice.store_tile(z, tile, memory);
  }
  if (own_target) target_z[row] = value_there;
  block_top(top, scratch.top);
  const float highest = top[0].value;
  float grown = 1;
  if (first) {
    c = highest;
  } else if (highest - c > 60.0f) {
    grown = vec::exp(at_least(c - highest, -200.0f));
    c = highest;
  }
  const float untanh = shaping.softcap > 0 ? to_z.untanh() : 0;
  float sum[1] = {};
  for (int tile = 0; tile < slice.tiles; ++tile) {
    if (!held) slice.load_tile(memory, tile, kLowest, z);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        const float v = z[j].v[k], e = vec::exp(v - c), t = v * untanh;
        if (slice.inside(column + k) && column + k != target) sum[0] += e;
        z[j].v[k] = column + k == target ? 0.0f : e * (1.0f - t * t);
      }
    }
    slice.store_tile(z, tile, memory);
  }
  block_sums(sum, scratch.sum);
  if (threadIdx.x > 0) return;
  shift[row] = c;
  factor[row] = grown;
  mass[row] = mass[row] * grown + scratch.sum.total[0];
}

// Logits to the gradient of the raw logits; coefficients [10, rows]: the members of Coefficients in order, then the
// log-probability's upstream gradient g (which `constant` holds as -g) and g (1 - p_target), added at the target alone.
template <bool kReference>
__global__ void __launch_bounds__(kMostThreads, kReference ? 2 : 4)
    head_grad_kernel(float* z_block, const float* zr_block, const int64_t* targets, Shaping shaping,
                     const float* coefficients, int64_t rows, int n) {
  const int64_t row = blockIdx.x;
  float* const memory = z_block + row * n;
  const float* const reference = kReference ? zr_block + row * n : nullptr;
  const int target = column_in_block(targets[row], n);
  const RowShaping to_z(shaping, row);
  const Slice<float> slice(memory, n);
  const float* const own = coefficients + row;
  const Coefficients c{own[0],        own[rows],     own[2 * rows], own[3 * rows],
                       own[4 * rows], own[5 * rows], own[6 * rows], own[7 * rows]};
  const float constant_at_target = c.constant + own[8 * rows], exact = own[9 * rows];
  const float factor = shaping.scale / to_z.temperature.value, untanh = shaping.softcap > 0 ? to_z.untanh() : 0;
  for (int tile = 0; tile < slice.tiles; ++tile) {
    Pack<float> z[kHeld], zr[kHeld];
    slice.load_tile(memory, tile, kLowest, z);
    to_z.apply(slice, tile, kLowest, z);
    if constexpr (kReference) {
      slice.load_tile(reference, tile, kLowest, zr);
      to_z.apply(slice, tile, kLowest, zr);
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) {
        const float v = z[j].v[k], t = v * untanh;
        const bool at_target = column + k == target;
        Coefficients here = c;
        here.constant = at_target ? constant_at_target : c.constant;
        float d = kReference ? gradient(v, zr[j].v[k], here) : gradient(v, here);
        d = at_target ? d + exact : d;
        z[j].v[k] = d * (factor * (1.0f - t * t));
      }
    }
    slice.store_tile(z, tile, memory);
  }
}

inline void head_exp(float* z, const int64_t* target, const Shaping& shaping, bool first, float* shift, double* mass,
                     float* factor, double* target_z, int64_t rows, int64_t n, cudaStream_t stream) {
  launch(head_exp_kernel, rows, threads_for<float>(n), stream, z, target, shaping, first, shift, mass, factor, target_z,
         int(n));
}

inline void head_grad(float* z, const float* zr, const int64_t* target, const Shaping& shaping,
                      const float* coefficients, int64_t rows, int64_t n, cudaStream_t stream) {
  const int threads = threads_for<float>(n);
  const auto kernel = zr == nullptr ? head_grad_kernel<false> : head_grad_kernel<true>;
  launch(kernel, rows, threads, stream, z, zr, target, shaping, coefficients, rows, int(n));
}

}  // namespace cuda_rows
