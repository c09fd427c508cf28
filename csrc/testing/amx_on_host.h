// AMX in software, so that tests check the AMX unit's numbers and its use of the tiles where the chip has none. Each
// thread has tiles and a configuration of its own, as on the chip. cpu/bf16_tile.cpp includes this behind the
// compiler's own headers, where RLHF_AMX_ON_HOST is defined, and then takes AMX to be there.
//
// What it finds beside wrong numbers (it says what and where, and aborts): a tile instruction without configuration or
// before Linux was asked for the tiles, operands whose shapes do not fit, a configuration that the chip would refuse,
// and begin and end that are not in pairs: loaded twice, released twice, or left behind by a thread or the process.
//
// Numbers follow Intel's description of TDPBF16PS: of the pairs of a row and a column the even and the odd elements are
// summed apart, from 0 and in order, by fused multiply-adds; the two sums are added, and the result is added to C. All
// of it rounds to nearest even and takes denormals for 0, in and out. Whether every chip sums in that order is not
// known (tests allow for another), nor the bits of its NaNs. What a chip shares between its threads, speed, and other
// libraries that use the tiles between begin and end, it cannot show.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_on_host {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;
constexpr unsigned kFlushAndRoundToEven = 0x9FC0;  // MXCSR: denormals are 0 in and out, no exceptions

struct Config {  // as LDTILECFG reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  alignas(64) uint8_t bytes[kMostRows][kMostBytes];
};

[[noreturn]] inline void fail(const char* where, const char* what, const char* since = nullptr) {
  std::fprintf(stderr, "amx_on_host: %s: %s", where, what);
  if (since != nullptr) std::fprintf(stderr, " since %s", since);
  std::fputc('\n', stderr);
  std::abort();
}

// The threads that have a configuration: those of a pool are gone before their own destructors could tell.
struct Process {
  std::atomic<bool> permitted = false;
  std::atomic<int> configured = 0;
  ~Process() {
    if (configured != 0) fail("the end of the process", "tiles are still configured");
  }
};
inline Process process;

struct Thread {
  Config config;
  Tile tiles[kTiles];
  const char* since = nullptr;  // where it was configured; nullptr: it is not
  ~Thread() {
    if (since != nullptr) fail("the end of a thread", "its tiles are configured", since);
  }
};
inline thread_local Thread thread;

inline void check_config(const Config& config, const char* where) {
  if (config.palette != 1) fail(where, "the palette is not 1");
  if (config.start_row != 0) fail(where, "the start row is not 0");
  if (std::any_of(config.reserved, config.reserved + 14, [](uint8_t byte) { return byte != 0; })) {
    fail(where, "a reserved byte is not 0");
  }
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.bytes_per_row[i];
    if (rows > kMostRows || bytes > kMostBytes) fail(where, "a tile is larger than 16 rows of 64 bytes");
    if ((rows == 0) != (bytes == 0)) fail(where, "a tile has rows without bytes, or bytes without rows");
    if (i >= kTiles && rows != 0) fail(where, "there are more than 8 tiles");
  }
}

inline void load_config(const void* from, const char* where) {
  if (!process.permitted) fail(where, "Linux was not asked for the tiles");
  if (thread.since != nullptr) fail(where, "tiles are configured already", thread.since);
  std::memcpy(&thread.config, from, sizeof(Config));
  check_config(thread.config, where);
  std::memset(thread.tiles, 0, sizeof(thread.tiles));
  thread.since = where;
  ++process.configured;
}

inline void release(const char* where) {
  if (thread.since == nullptr) fail(where, "there is no configuration to release");
  thread.since = nullptr;
  --process.configured;
}

struct Shape {
  int rows, bytes;
};

inline Shape shape(int tile, const char* where) {
  if (thread.since == nullptr) fail(where, "tiles are used without a configuration");
  const Shape found{thread.config.rows[tile], thread.config.bytes_per_row[tile]};
  if (found.rows == 0) fail(where, "a tile that the configuration leaves out");
  return found;
}

inline void zero(int tile, const char* where) {
  shape(tile, where);
  std::memset(&thread.tiles[tile], 0, sizeof(Tile));
}

inline void load(int tile, const void* from, int64_t stride, const char* where) {
  const Shape part = shape(tile, where);
  Tile& to = thread.tiles[tile];
  std::memset(&to, 0, sizeof(Tile));
  for (int i = 0; i < part.rows; ++i) std::memcpy(to.bytes[i], static_cast<const char*>(from) + i * stride, part.bytes);
}

inline void store(int tile, void* to, int64_t stride, const char* where) {
  const Shape part = shape(tile, where);
  const Tile& from = thread.tiles[tile];
  for (int i = 0; i < part.rows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, from.bytes[i], part.bytes);
}

// Row `row` of C += A B. The arithmetic is a function of its own so that it stays within the changed rounding mode;
// what lies beyond a tile's columns is 0 and stays so.
__attribute__((noinline, target("avx2,fma"))) inline void add_row(Tile& c, const Tile& a, const Tile& b, int row,
                                                                  int pairs) {
  constexpr int kColumns = kMostBytes / 4;
  uint32_t left[kColumns], right[kColumns];
  float even[kColumns] = {}, odd[kColumns] = {}, sum[kColumns];
  const auto low = [](uint32_t pair) { return std::bit_cast<float>(pair << 16); };
  const auto high = [](uint32_t pair) { return std::bit_cast<float>(pair & 0xFFFF0000u); };
  std::memcpy(left, a.bytes[row], kMostBytes);
  for (int k = 0; k < pairs; ++k) {
    std::memcpy(right, b.bytes[k], kMostBytes);
    const float first = low(left[k]), second = high(left[k]);
    for (int j = 0; j < kColumns; ++j) even[j] = std::fma(first, low(right[j]), even[j]);
    for (int j = 0; j < kColumns; ++j) odd[j] = std::fma(second, high(right[j]), odd[j]);
  }
  std::memcpy(sum, c.bytes[row], kMostBytes);
  for (int j = 0; j < kColumns; ++j) sum[j] += even[j] + odd[j];
  std::memcpy(c.bytes[row], sum, kMostBytes);
}

inline void multiply_bf16(int c, int a, int b, const char* where) {
  const Shape sums = shape(c, where), left = shape(a, where), right = shape(b, where);
  if (a == b || a == c || b == c) fail(where, "one tile is two operands");
  if (sums.bytes % 4 != 0 || left.bytes % 4 != 0) fail(where, "a row is not made of whole words");
  if (sums.rows != left.rows || sums.bytes != right.bytes || left.bytes / 4 != right.rows) {
    fail(where, "the operands' shapes do not fit");
  }
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kFlushAndRoundToEven);
  for (int i = 0; i < sums.rows; ++i) {
    add_row(thread.tiles[c], thread.tiles[a], thread.tiles[b], i, left.bytes / 4);
  }
  _mm_setcsr(before);
}

// CPUID of a chip that has AMX.
inline int cpuid(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  const int found = __get_cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0) *d |= kAmxBf16 | kAmxTile;
  return found;
}

// The one system call of cpu/bf16_tile.cpp: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline long ask_linux(long call, long request, long feature) {
  if (call != SYS_arch_prctl || request != 0x1023 || feature != 18) fail("syscall", "not the request for the tiles");
  process.permitted = true;
  return 0;
}

}  // namespace amx_on_host

#define AMX_ON_HOST_TEXT_(x) #x
#define AMX_ON_HOST_TEXT(x) AMX_ON_HOST_TEXT_(x)
#define AMX_ON_HOST_AT(what) what " (" __FILE__ ":" AMX_ON_HOST_TEXT(__LINE__) ")"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef __get_cpuid_count
#undef syscall
#define _tile_loadconfig(from) amx_on_host::load_config(from, AMX_ON_HOST_AT("_tile_loadconfig"))
#define _tile_release() amx_on_host::release(AMX_ON_HOST_AT("_tile_release"))
#define _tile_zero(tile) amx_on_host::zero(tile, AMX_ON_HOST_AT("_tile_zero"))
#define _tile_loadd(tile, from, stride) amx_on_host::load(tile, from, stride, AMX_ON_HOST_AT("_tile_loadd"))
#define _tile_stored(tile, to, stride) amx_on_host::store(tile, to, stride, AMX_ON_HOST_AT("_tile_stored"))
#define _tile_dpbf16ps(c, a, b) amx_on_host::multiply_bf16(c, a, b, AMX_ON_HOST_AT("_tile_dpbf16ps"))
#define __get_cpuid_count amx_on_host::cpuid
#define syscall amx_on_host::ask_linux
