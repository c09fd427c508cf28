// The CUDA kernel of sample as a plain function for ctypes, run on the CPU. It returns null, or an error's message.
#define RLHF_CUDA_ON_HOST
#include "cuda/sample_rows.cuh"
#include "testing/host_entry.h"

extern "C" {

// type: 0 fp32, 1 bf16, 2 fp16
const char* host_sample_rows(int64_t type, const void* logits, int64_t stride, int64_t rows, int64_t n,
                             const float* temperature, const int64_t* top_k, const double* top_p,
                             const float* min_p_cut, const uint64_t* seed, const uint64_t* stream,
                             const int64_t* sample_index, const int64_t* position, const bool* greedy, int64_t* token,
                             float* logprob, bool clusters) {
  const cuda_rows::SampleCall call{temperature,  min_p_cut, top_k,  top_p, seed,   stream,
                                   sample_index, position,  greedy, token, logprob};
  return guarded([&] {
    with_type(type, [&](auto t) {
      cuda_rows::sample_rows(call, static_cast<const decltype(t)*>(logits), stride, rows, n, clusters, nullptr);
    });
  });
}

// The integer weights of n values of u.
const char* host_masses(const float* u, int64_t* out, int64_t n) {
  return guarded([&] {
    for (int64_t i = 0; i < n; ++i) out[i] = int64_t(cuda_rows::mass_of(u[i]));
  });
}

}  // extern "C"
