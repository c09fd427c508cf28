// The tile units: AMX (four 16 x 16 tiles of sums, two of each operand) and AVX512-BF16 (11 rows x 32 columns of sums
// in registers at a time).
#include "bf16_tile.h"

#include <cstdlib>
#include <cstring>
#include <string>

#ifdef BF16_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bf16 {
namespace {

#ifdef BF16_TILES

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define AVX512 __attribute__((target("avx512f,avx512bf16")))

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

AMX void amx_multiply(const uint16_t* a, const uint32_t* b, int64_t steps, float* c, bool add) {
  constexpr int kRow = 4 * kTile;  // bytes
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

// kRows rows of the tile: 2 kRows accumulators, each word of A broadcast to both halves of B's row.
template <int kRows>
AVX512 inline __attribute__((always_inline)) void avx512_rows(const uint16_t* a, int64_t first, const uint32_t* b,
                                                              int64_t steps, float* c, bool add) {
  a += first * kTile;
  c += first * kTile;
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = add ? _mm512_loadu_ps(c + i * kTile) : _mm512_setzero_ps();
    sum[i][1] = add ? _mm512_loadu_ps(c + i * kTile + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < steps; ++k, a += kStepA) {
    for (int q = 0; q < 16; ++q, b += kTile) {
      const auto b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * kTile + 2 * q, 4);
        const auto word = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], word, b0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], word, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    _mm512_storeu_ps(c + i * kTile, sum[i][0]);
    _mm512_storeu_ps(c + i * kTile + 16, sum[i][1]);
  }
}

AVX512 void avx512_multiply(const uint16_t* a, const uint32_t* b, int64_t steps, float* c, bool add) {
  avx512_rows<11>(a, 0, b, steps, c, add);
  avx512_rows<11>(a, 11, b, steps, c, add);
  avx512_rows<10>(a, 22, b, steps, c, add);
}

void nothing() {}

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
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

const TileUnit kAmx{Isa::amx, amx_multiply, amx_begin, amx_end};
const TileUnit kAvx512{Isa::avx512, avx512_multiply, nothing, nothing};

const TileUnit* choose() {
  const char* value = std::getenv("RLHF_KERNELS_CPU_ISA");
  const std::string asked = value == nullptr ? "" : value;
  if (asked == "portable" || !has_avx512_bf16()) return nullptr;  // the row passes need AVX-512 beside the tiles
  if (asked != "avx512_bf16" && has_amx_bf16()) return &kAmx;
  return &kAvx512;
}

#else

const TileUnit* choose() { return nullptr; }

#endif

}  // namespace

const TileUnit* tile_unit() {
  static const TileUnit* const unit = choose();
  return unit;
}

}  // namespace bf16
