// The attention kernels, compiled once for each instruction set and chosen at run time. target_clones would not do:
// vectors of 16 floats are split for the default target before a clone is made.
#include "attention.h"

// The leaves are all inlined: vectors never cross a call, whose ABI would differ between the instruction sets.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rlhf_kernels::attention {

#define ENTRIES                                                                             \
  void run(const ForwardJob<float>& job, float* scratch) { forward_job(job, scratch); }     \
  void run(const ForwardJob<bf16_bits>& job, float* scratch) { forward_job(job, scratch); } \
  void run(const BackwardJob<float>& job, float* scratch) { backward_job(job, scratch); }   \
  void run(const BackwardJob<bf16_bits>& job, float* scratch) { backward_job(job, scratch); }

namespace portable {
#include "attention_kernels.h"
ENTRIES
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "attention_kernels.h"
ENTRIES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define WIDE_SHUFFLES
#include "attention_kernels.h"
#undef WIDE_SHUFFLES
ENTRIES
}  // namespace avx512
#pragma GCC pop_options

namespace {
template <typename Job>
void dispatch(const Job& job, float* scratch) {
  static const int level = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                               ? 4
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 3
                                                                                             : 1;
  if (level == 4) return avx512::run(job, scratch);
  if (level == 3) return avx2::run(job, scratch);
  portable::run(job, scratch);
}
}  // namespace
#else
namespace {
template <typename Job>
void dispatch(const Job& job, float* scratch) {
  portable::run(job, scratch);
}
}  // namespace
#endif

void forward(const ForwardJob<float>& job, float* scratch) { dispatch(job, scratch); }
void forward(const ForwardJob<bf16_bits>& job, float* scratch) { dispatch(job, scratch); }
void backward(const BackwardJob<float>& job, float* scratch) { dispatch(job, scratch); }
void backward(const BackwardJob<bf16_bits>& job, float* scratch) { dispatch(job, scratch); }

}  // namespace rlhf_kernels::attention
