// logprob over whole rows of fp32, bf16 or fp16 logits: one read forward, one read and one write backward.
//
// One block a row. A thread keeps the top of the columns it has seen and sums of the others relative to it; when a
// higher one comes, the sums are scaled down and the old top becomes one of the others. The block then merges the
// threads' sums relative to the row's top token, which stays out of them: nothing cancels when it holds the mass.
#pragma once
#include "cuda/common.cuh"

namespace cuda_rows {

// The sums of e^(z - top) and of e^(z - top) (z - top) over the columns seen, the top itself left out.
struct RunningMass {
  Top top;
  float e = 0, u = 0;

  // The sums relative to a higher top token, of which the own top now is one of the others.
  __device__ MassSums below(float higher) const {
    if (!top.found()) return {e, u};  // nothing seen, or nothing but NaN
    const float d = at_least(top.value - higher, -200.0f), w = vec::exp(d);
    return {w * (1 + e), w * (u + d * (1 + e))};
  }

  // A higher one of the columns that follow: the sums go over to it.
  __device__ void rise(const Top& higher) {
    const MassSums sums = below(higher.value);
    e = sums.e, u = sums.u, top = higher;
  }
};

struct LogprobScratch {
  TopScratch<1> top;
  SumScratch<2> sums;
};

template <typename T>
__device__ inline void widen_tile(const Pack<T> (&in)[kHeld], const Divisor& temperature, float (&z)[kHeld][kPack<T>]) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const float v = widen(in[j].v[k]);
      z[j][k] = at_least(temperature.value == 1.0f ? v : temperature.divide(v), kLowest);
    }
  }
}

template <typename T>
__device__ inline T zero() {
  T out;
  narrow(0.0f, out);
  return out;
}

// out [5, rows]: logprob, lse, entropy, 1 - p_target, what lse lost by rounding; 0 where the target is ignore_index,
// NaN in the first and fourth where it is outside the row.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, sizeof(T) == 2 ? 3 : 4)
    logprob_rows_kernel(const T* logits, int64_t stride, const int64_t* targets, const float* temperatures,
                        int64_t ignore_index, float* out, int64_t rows, int n) {
  SHARED(LogprobScratch, scratch);
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  out += row;
  if (target == ignore_index) {
    if (threadIdx.x < 5) out[threadIdx.x * rows] = 0;
    return;
  }
  const T* const memory = logits + row * stride;
  const Divisor temperature(temperatures[row]);
  const bool here = target >= 0 && target < n;
  float target_z = 0;
  if (threadIdx.x == 0 && here) target_z = at_least(temperature.divide(widen(memory[target])), kLowest);
  const Slice<T> slice(memory, n);
  RunningMass mass;
  for (int tile = 0; tile < slice.tiles; ++tile) {
    Pack<T> packed[kHeld];
    slice.load_tile(memory, tile, zero<T>(), packed);
    float z[kHeld][kPack<T>];
    widen_tile(packed, temperature, z);
    Top top = mass.top;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        if (slice.inside(column + k)) top.offer(z[j][k], column + k, 0);
      }
    }
    if (top.column != mass.top.column) mass.rise(top);
    float e_sum = 0, u_sum = 0;  // of this tile: adding it up on its own keeps the digits of many tiles' sums
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        if (slice.inside(column + k) && column + k != top.column) add_mass(z[j][k], top.value, e_sum, u_sum);
      }
    }
    mass.e += e_sum, mass.u += u_sum;
  }
  Top top[1] = {mass.top};
  block_top(top, scratch.top);
  const MassSums own{mass.e, mass.u};
  const MassSums merged = mass.top.column == top[0].column ? own : mass.below(top[0].value);
  float sums[2] = {merged.e, merged.u};
  block_sums(sums, scratch.sums);
  if (threadIdx.x > 0) return;
  Mass whole;
  if (!top[0].found()) {
    set_nan(whole);
  } else if (top[0].value > kLowest) {
    const double* totals = scratch.sums.total;
    whole = finish_mass(here, target == top[0].column, target_z, top[0].value, totals[0], totals[1]);
  }
  if (here) whole.target = target_z;
  const double logprob = here ? logprob_of(whole.rest - whole.target) : std::numeric_limits<double>::quiet_NaN();
  const float lse = float(whole.lse);
  out[0] = float(logprob);
  out[rows] = lse;
  out[2 * rows] = float(whole.entropy);
  out[3 * rows] = float(-std::expm1(logprob));
  out[4 * rows] = float(whole.lse - lse);
}

// Gradient of the logits into out, which may be the logits themselves. coefficients [6, rows]: lse as a sum of two,
// constant, entropy, the log-probability's upstream gradient g (held as -g in constant), g (1 - p_target). A row whose
// target is outside it becomes NaN.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, sizeof(T) == 2 ? 3 : 4)
    logprob_rows_backward_kernel(const T* logits, int64_t stride, const int64_t* targets, const float* temperatures,
                                 int64_t ignore_index, const float* coefficients, T* out, int64_t out_stride,
                                 int64_t rows, int n) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const bool ignored = target == ignore_index, here = target >= 0 && target < n;
  const T* const memory = logits + row * stride;
  T* const written = out + row * out_stride;
  const Divisor temperature(temperatures[row]);
  const float* const own = coefficients + row;
  const Coefficients c{own[0], own[rows], 0, own[2 * rows], own[3 * rows], 0, 0, 0};
  const float constant_at_target = c.constant + own[4 * rows], exact = own[5 * rows];
  const float everywhere = ignored ? 0.0f : std::numeric_limits<float>::quiet_NaN();  // where there is no target
  const Slice<T> slice(memory, n);
  for (int tile = 0; tile < slice.tiles; ++tile) {
    Pack<T> packed[kHeld];
    float z[kHeld][kPack<T>];
    if (!ignored && here) slice.load_tile(memory, tile, zero<T>(), packed);
    if (!ignored && here) widen_tile(packed, temperature, z);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int column = slice.column(tile, j);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        float d = everywhere;
        if (!ignored && here) {
          const bool at_target = column + k == target;
          Coefficients there = c;
          there.constant = at_target ? constant_at_target : c.constant;
          d = gradient(z[j][k], there);
          d = (at_target ? d + exact : d) * temperature.inverse;
        }
        narrow(d, packed[j].v[k]);
      }
    }
    slice.store_tile(packed, tile, written);
  }
}

template <typename T>
void logprob_rows(const T* logits, int64_t stride, const int64_t* target, const float* temperature,
                  int64_t ignore_index, float* out, int64_t rows, int64_t n, cudaStream_t stream) {
  launch(logprob_rows_kernel<T>, rows, threads_for<T>(n), stream, logits, stride, target, temperature, ignore_index,
         out, rows, int(n));
}

template <typename T>
void logprob_rows_backward(const T* logits, int64_t stride, const int64_t* target, const float* temperature,
                           int64_t ignore_index, const float* coefficients, T* out, int64_t out_stride, int64_t rows,
                           int64_t n, cudaStream_t stream) {
  launch(logprob_rows_backward_kernel<T>, rows, threads_for<T>(n), stream, logits, stride, target, temperature,
         ignore_index, coefficients, out, out_stride, rows, int(n));
}

}  // namespace cuda_rows
