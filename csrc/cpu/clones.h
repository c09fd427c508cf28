// How the leaf functions of the kernels get vector code without a build for one machine.
#pragma once
#include "isa.h"

// A leaf function in three versions, picked once when the library is loaded. Lambdas inside do not inherit the target.
#ifdef X86_KERNELS
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
