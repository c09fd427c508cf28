// The tile units: AMX (four 16 x 16 tiles of sums, two of each operand), AVX512-BF16 and fp32 (11 rows x 32 columns of
// sums in registers at a time).
#include "bf16_tile.h"

#include <cstdlib>
#include <cstring>
#include <string>

#ifdef BF16_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef RLHF_AMX_ON_HOST  // a test's build, for machines without AMX
#include "testing/amx_on_host.h"
#endif
#endif

namespace bf16 {
namespace {

#ifdef BF16_TILES

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define AVX512 __attribute__((target("avx512f,avx512bf16")))  // GCC makes bf16 instructions of nothing but intrinsics

constexpr int64_t kStepA = kTile * 32;  // bf16 of A in a step of 32 k
constexpr int64_t kStepB = kTile * 16;  // pairs of B in it

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

AMX void amx_begin() {
  static const TileConfig config;  // static: to the compiler the intrinsic reads but 8 bytes of it
  _tile_loadconfig(&config);
}

AMX void amx_end() { _tile_release(); }

AMX void amx_multiply(const void* left, const void* right, int64_t steps, float* c, bool add) {
  constexpr int kRow = 4 * kTile;  // bytes
  const auto* a = static_cast<const uint16_t*>(left);
  const auto* b = static_cast<const uint32_t*>(right);
  if (add) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kTile, kRow);
    _tile_loadd(3, c + 16 * kTile + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += kStepA, b += kStepB) {
    _tile_loadd(6, b, kRow);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, kRow);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kStepA / 2, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kTile, kRow);
  _tile_stored(3, c + 16 * kTile + 16, kRow);
}

// One of the four 16 x 16 tiles.
AMX void amx_quarter(const uint16_t* a, const uint32_t* b, int64_t steps, float* c, bool add) {
  constexpr int kRow = 4 * kTile;  // bytes
  if (add) {
    _tile_loadd(0, c, kRow);
  } else {
    _tile_zero(0);
  }
  for (int64_t k = 0; k < steps; ++k, a += kStepA, b += kStepB) {
    _tile_loadd(6, b, kRow);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, kRow);
}

AMX void amx_corner(const void* left, const void* right, int64_t words, float* c, bool add, Corner corner) {
  const int64_t steps = (words + 15) / 16;
  if (corner.rows > 16 && corner.columns > 16) return amx_multiply(left, right, steps, c, add);
  const auto* a = static_cast<const uint16_t*>(left);
  const auto* b = static_cast<const uint32_t*>(right);
  amx_quarter(a, b, steps, c, add);
  if (corner.columns > 16) amx_quarter(a, b + 16, steps, c + 16, add);
  if (corner.rows > 16) amx_quarter(a + kStepA / 2, b, steps, c + 16 * kTile, add);
}

struct Bf16Pairs {
  using Register = __m512bh;
  AVX512 static inline __attribute__((always_inline)) __m512 add(__m512 sum, __m512bh a, __m512bh b) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
};

struct Floats {
  using Register = __m512;
  AVX512 static inline __attribute__((always_inline)) __m512 add(__m512 sum, __m512 a, __m512 b) {
    return _mm512_fmadd_ps(a, b, sum);
  }
};

// One word of depth: each row's word of A broadcast to all parts of B's row.
template <typename Op, int kRows, int kParts>
AVX512 inline __attribute__((always_inline)) void one_word(const uint32_t* a, const uint32_t* b,
                                                            __m512 (&sum)[kRows][kParts]) {
  typename Op::Register right[kParts];
#pragma GCC unroll 2
  for (int j = 0; j < kParts; ++j) right[j] = (typename Op::Register)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const auto word = (typename Op::Register)_mm512_set1_epi32(int(a[i * 16]));
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) sum[i][j] = Op::add(sum[i][j], word, right[j]);
  }
}

// kRows rows of the tile from `first` on, 16 kParts columns: all their sums are in registers.
template <typename Op, int kRows, int kParts>
AVX512 inline __attribute__((always_inline)) void some_rows(const void* left, const void* right, int64_t first,
                                                             int64_t words, float* c, bool add) {
  const auto* a = static_cast<const uint32_t*>(left) + first * 16;
  const auto* b = static_cast<const uint32_t*>(right);
  c += first * kTile;
  __m512 sum[kRows][kParts];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * kTile + 16 * j) : _mm512_setzero_ps();
  }
  for (; words >= 16; words -= 16, a += kTile * 15) {
    for (int q = 0; q < 16; ++q, ++a, b += kTile) one_word<Op, kRows, kParts>(a, b, sum);
    a += 16;
  }
  for (; words > 0; --words, ++a, b += kTile) one_word<Op, kRows, kParts>(a, b, sum);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) _mm512_storeu_ps(c + i * kTile + 16 * j, sum[i][j]);
  }
}

template <typename Op>
AVX512 inline __attribute__((always_inline)) void whole_tile(const void* a, const void* b, int64_t words, float* c,
                                                              bool add) {
  some_rows<Op, 11, 2>(a, b, 0, words, c, add);
  some_rows<Op, 11, 2>(a, b, 11, words, c, add);
  some_rows<Op, 10, 2>(a, b, 22, words, c, add);
}

template <typename Op>
AVX512 inline __attribute__((always_inline)) void part_of_tile(const void* a, const void* b, int64_t words, float* c,
                                                                bool add, Corner corner) {
  if (corner.columns <= 16) {
    some_rows<Op, 16, 1>(a, b, 0, words, c, add);
    if (corner.rows > 16) some_rows<Op, 16, 1>(a, b, 16, words, c, add);
  } else if (corner.rows <= 16) {
    some_rows<Op, 8, 2>(a, b, 0, words, c, add);
    if (corner.rows > 8) some_rows<Op, 8, 2>(a, b, 8, words, c, add);
  } else {
    whole_tile<Op>(a, b, words, c, add);
  }
}

AVX512 void avx512_multiply(const void* a, const void* b, int64_t steps, float* c, bool add) {
  whole_tile<Bf16Pairs>(a, b, 16 * steps, c, add);
}

AVX512 void avx512_corner(const void* a, const void* b, int64_t words, float* c, bool add, Corner corner) {
  part_of_tile<Bf16Pairs>(a, b, words, c, add, corner);
}

AVX512 void float_multiply(const void* a, const void* b, int64_t steps, float* c, bool add) {
  whole_tile<Floats>(a, b, 16 * steps, c, add);
}

AVX512 void float_corner(const void* a, const void* b, int64_t words, float* c, bool add, Corner corner) {
  part_of_tile<Floats>(a, b, words, c, add, corner);
}

void nothing() {}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// The chip has it, and Linux lets this process use the tile registers (asked for once, then for all its threads).
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const TileUnit kAmx{Isa::amx, amx_multiply, amx_corner, amx_begin, amx_end};
const TileUnit kAvx512{Isa::avx512, avx512_multiply, avx512_corner, nothing, nothing};
const TileUnit kFloat{Isa::avx512, float_multiply, float_corner, nothing, nothing};

std::string asked() {
  const char* value = std::getenv("RLHF_KERNELS_CPU_ISA");
  return value == nullptr ? "" : value;
}

const TileUnit* choose_float() { return asked() == "portable" || !has_avx512() ? nullptr : &kFloat; }

const TileUnit* choose() {  // the passes over a tile need AVX-512 beside the tile units
  if (choose_float() == nullptr || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  return asked() != "avx512_bf16" && has_amx_bf16() ? &kAmx : &kAvx512;
}

#else

const TileUnit* choose() { return nullptr; }
const TileUnit* choose_float() { return nullptr; }

#endif

}  // namespace

const TileUnit* tile_unit() {
  static const TileUnit* const unit = choose();
  return unit;
}

const TileUnit* float_unit() {
  static const TileUnit* const unit = choose_float();
  return unit;
}

}  // namespace bf16
