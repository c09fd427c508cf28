// The one GEMM step of the bf16 kernels: a 32 x 32 tile of fp32 sums, C = (C +) A B, on the chip's matrix or vector
// units. B is packed (bf16_pack.h) as pairs of k, [k/2][32 columns], a pair in one 32-bit word; C is row-major
// [32][32]; A has 32 rows of whole steps of 32 k, packed or where it is.
#pragma once
#include <cstdint>

#include "isa.h"

// Compilers that know the instructions and take `#pragma GCC target`, which clang does not.
#if defined(X86_KERNELS) && __GNUC__ >= 11
#define BF16_TILES
#endif

namespace bf16 {

constexpr int64_t kTile = 32;

enum class Isa { portable = 0, avx512 = 1, amx = 2 };

// The part of C that is wanted; the rest of it is written or not.
struct Corner {
  int64_t rows, columns;
};

struct TileUnit {
  Isa isa;
  // steps: k / 32. add: C is added to, else overwritten.
  void (*multiply)(const void* a, const void* b, int64_t steps, float* c, bool add);
  // The same for a corner of C and any number of words of k (of whole steps in memory, 0 beyond): for what is thin.
  void (*corner)(const void* a, const void* b, int64_t words, float* c, bool add, Corner corner);
  // Around every run of multiply on a thread: the matrix unit's state is per thread and shared with other libraries.
  void (*begin)();
  void (*end)();
};

// The best unit of this machine, or a lesser one asked for by RLHF_KERNELS_CPU_ISA=amx|avx512_bf16|portable; chosen
// once. nullptr where there is neither AMX-BF16 nor AVX512-BF16.
const TileUnit* tile_unit();

// The unit of fp32 operands, a word being one k (so 16 k a step): AVX-512F, or nullptr.
const TileUnit* float_unit();

}  // namespace bf16
