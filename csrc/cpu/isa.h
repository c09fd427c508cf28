// X86_KERNELS: the clones, targets and intrinsics of x86-64 can be compiled. Elsewhere (aarch64, clang) the same
// functions are what the compiler makes of plain C++. -DRLHF_KERNELS_PORTABLE makes that build on x86-64, for tests.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(RLHF_KERNELS_PORTABLE)
#define X86_KERNELS
#endif
