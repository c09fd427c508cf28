// The CUDA row kernels as plain functions for ctypes, run on the CPU. Each returns null, or the message of an error.
#define RLHF_CUDA_ON_HOST
#include "cuda/head_pull.cuh"
#include "cuda/head_stats.cuh"
#include "cuda/logprob_rows.cuh"
#include "testing/host_entry.h"

using cuda_rows::Shaping;

extern "C" {

const char* host_head_stats(float* z, float* zr, const int64_t* target, const float* bias, const float* temperature,
                            float softcap, float scale, bool raw, bool kl, bool rkl, double* state, int64_t rows,
                            int64_t n) {
  const Shaping shaping{bias, temperature, scale, softcap, raw};
  return guarded([&] { cuda_rows::head_stats(z, zr, target, shaping, kl, rkl, state, rows, n, nullptr); });
}

const char* host_head_exp(float* z, const int64_t* target, const float* bias, const float* temperature, float softcap,
                          float scale, bool raw, bool first, float* shift, double* mass, float* factor,
                          double* target_z, int64_t rows, int64_t n) {
  const Shaping shaping{bias, temperature, scale, softcap, raw};
  return guarded(
      [&] { cuda_rows::head_exp(z, target, shaping, first, shift, mass, factor, target_z, rows, n, nullptr); });
}

const char* host_head_js(const float* z, const float* zr, const float* bias, const float* temperature, float softcap,
                         float scale, bool raw, const float* lse, const float* ratio, double* sums, int64_t rows,
                         int64_t n) {
  const Shaping shaping{bias, temperature, scale, softcap, raw};
  return guarded([&] { cuda_rows::head_js(z, zr, shaping, lse, ratio, sums, rows, n, nullptr); });
}

const char* host_head_grad(float* z, const float* zr, const int64_t* target, const float* bias,
                           const float* temperature, float softcap, float scale, bool raw, const float* coefficients,
                           int64_t rows, int64_t n) {
  const Shaping shaping{bias, temperature, scale, softcap, raw};
  return guarded([&] { cuda_rows::head_grad(z, zr, target, shaping, coefficients, rows, n, nullptr); });
}

// type: 0 fp32, 1 bf16, 2 fp16
const char* host_logprob_rows(int type, const void* logits, int64_t stride, const int64_t* target,
                              const float* temperature, int64_t ignore_index, float* out, int64_t rows, int64_t n) {
  return guarded([&] {
    with_type(type, [&](auto t) {
      cuda_rows::logprob_rows(static_cast<const decltype(t)*>(logits), stride, target, temperature, ignore_index, out,
                              rows, n, nullptr);
    });
  });
}

const char* host_logprob_rows_backward(int type, const void* logits, int64_t stride, const int64_t* target,
                                       const float* temperature, int64_t ignore_index, const float* coefficients,
                                       void* out, int64_t out_stride, int64_t rows, int64_t n) {
  return guarded([&] {
    with_type(type, [&](auto t) {
      cuda_rows::logprob_rows_backward(static_cast<const decltype(t)*>(logits), stride, target, temperature,
                                       ignore_index, coefficients, static_cast<decltype(t)*>(out), out_stride, rows, n,
                                       nullptr);
    });
  });
}

}  // extern "C"
