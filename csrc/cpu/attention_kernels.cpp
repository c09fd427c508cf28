// The attention kernels, compiled once for each instruction set and chosen at run time. target_clones would not do:
// vectors of 16 floats are split for the default target before a clone is made.
#include "attention.h"
#include "bf16_tile.h"
#include "isa.h"

#ifdef X86_KERNELS
#include <immintrin.h>
#endif

// The leaves are all inlined: vectors never cross a call, whose ABI would differ between the instruction sets.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rlhf_kernels::attention {

#define FORWARD(UNIT, T)                                                                    \
  void run(const ForwardJob<T>& job, const ForwardJob<T>* next, float* scratch) {           \
    forward_job<UNIT>(job, next, scratch);                                                  \
  }                                                                                         \
  void run(const ForwardJob<T>& job, const float* states, int64_t chunks, float* scratch) { \
    finish_job<UNIT>(job, states, chunks, scratch);                                         \
  }
#define BACKWARD(T) \
  void run(const BackwardJob<T>& job, float* scratch) { backward_job(job, scratch); }

namespace portable {
#include "attention_kernels.h"
FORWARD(Floats, float)
FORWARD(Floats, bf16_bits)
BACKWARD(float)
BACKWARD(bf16_bits)
}  // namespace portable

#ifdef X86_KERNELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "attention_kernels.h"
FORWARD(Floats, float)
FORWARD(Floats, bf16_bits)
BACKWARD(float)
BACKWARD(bf16_bits)
}  // namespace avx2
#pragma GCC pop_options

#define WIDE_SHUFFLES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "attention_kernels.h"
FORWARD(Floats, float)
FORWARD(Floats, bf16_bits)
BACKWARD(float)
BACKWARD(bf16_bits)
}  // namespace avx512
#pragma GCC pop_options

#ifdef BF16_TILES
#define BF16_PAIRS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace avx512_bf16 {
#include "attention_kernels.h"
FORWARD(Pairs, bf16_bits)
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

namespace {

bool has_pairs() {
#ifdef BF16_TILES
  return bf16::tile_unit() != nullptr && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <typename Job, typename... Rest>
void dispatch(const Job& job, Rest... rest) {
  static const int level = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                               ? 4
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 3
                                                                                             : 1;
#ifdef BF16_TILES
  static const bool pairs = level == 4 && has_pairs();
  if constexpr (requires { avx512_bf16::run(job, rest...); }) {
    if (pairs) return avx512_bf16::run(job, rest...);
  }
#endif
  if (level == 4) return avx512::run(job, rest...);
  if (level == 3) return avx2::run(job, rest...);
  portable::run(job, rest...);
}
}  // namespace
#else
namespace {
template <typename Job, typename... Rest>
void dispatch(const Job& job, Rest... rest) {
  portable::run(job, rest...);
}
}  // namespace
#endif

void forward(const ForwardJob<float>& job, const ForwardJob<float>* next, float* scratch) {
  dispatch(job, next, scratch);
}
void forward(const ForwardJob<bf16_bits>& job, const ForwardJob<bf16_bits>* next, float* scratch) {
  dispatch(job, next, scratch);
}
void finish(const ForwardJob<float>& job, const float* states, int64_t chunks, float* scratch) {
  dispatch(job, states, chunks, scratch);
}
void finish(const ForwardJob<bf16_bits>& job, const float* states, int64_t chunks, float* scratch) {
  dispatch(job, states, chunks, scratch);
}
void backward(const BackwardJob<float>& job, float* scratch) { dispatch(job, scratch); }
void backward(const BackwardJob<bf16_bits>& job, float* scratch) { dispatch(job, scratch); }

}  // namespace rlhf_kernels::attention
