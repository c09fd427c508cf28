// How the leaf functions of the kernels get vector code without a build for one machine.
#pragma once

// A leaf function in three versions, picked once when the library is loaded. Lambdas inside do not inherit the target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
