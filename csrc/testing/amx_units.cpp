// The tile units of the CPU as C functions, AMX in software; and mistakes that amx_on_host.h must notice.
#define RLHF_AMX_ON_HOST
#include <thread>

#include "cpu/bf16_tile.cpp"

namespace {

const bf16::TileUnit& unit(int64_t isa) { return isa == int64_t(bf16::Isa::amx) ? bf16::kAmx : bf16::kAvx512; }

// The sums of one pair: C += A B, tiles of one row and one word.
void one_pair(uint32_t a, uint32_t b, float* c) {
  static const amx_on_host::Config config{1, 0, {}, {4, 4, 4}, {1, 1, 1}};
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 4);
  _tile_loadd(1, &a, 4);
  _tile_loadd(2, &b, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 4);
  _tile_release();
}

}  // namespace

extern "C" {

// Which unit is chosen here (bf16::Isa), 0 where there is none; Linux is asked for the tiles.
int64_t chosen_unit() { return bf16::tile_unit() == nullptr ? 0 : int64_t(bf16::tile_unit()->isa); }

void ask_for_tiles() { bf16::has_amx_bf16(); }

const char* multiply(int64_t isa, const void* a, const void* b, int64_t steps, float* c, bool add) {
  unit(isa).begin();
  unit(isa).multiply(a, b, steps, c, add);
  unit(isa).end();
  return nullptr;
}

const char* corner(int64_t isa, const void* a, const void* b, int64_t words, float* c, bool add, int64_t rows,
                   int64_t columns) {
  unit(isa).begin();
  unit(isa).corner(a, b, words, c, add, {rows, columns});
  unit(isa).end();
  return nullptr;
}

const char* multiply_pairs(const uint32_t* a, const uint32_t* b, float* c, int64_t count) {
  for (int64_t i = 0; i < count; ++i) one_pair(a[i], b[i], c + i);
  return nullptr;
}

void begin() { bf16::kAmx.begin(); }
void end() { bf16::kAmx.end(); }
void begin_on_a_thread() { std::thread(bf16::kAmx.begin).join(); }
void zero_a_tile() { bf16::amx_multiply(nullptr, nullptr, 0, nullptr, false); }

void load_tiles(int64_t tiles, int64_t rows, int64_t bytes) {
  amx_on_host::Config config{1, 0, {}, {}, {}};
  std::fill_n(config.rows, tiles, uint8_t(rows));
  std::fill_n(config.bytes_per_row, tiles, uint16_t(bytes));
  _tile_loadconfig(&config);
}

void multiply_tiles(int64_t c_rows, int64_t a_rows, int64_t b_rows) {
  const amx_on_host::Config config{1, 0, {}, {64, 64, 64}, {uint8_t(c_rows), uint8_t(a_rows), uint8_t(b_rows)}};
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 1, 2);
}

void use_a_fourth_tile() {
  load_tiles(3, 16, 64);
  _tile_zero(3);
}

}  // extern "C"
