// Products of bf16 matrices with fp32 sums on the chip's matrix or vector units, for the head's sweep by blocks.
// Library GEMMs on the CPU round such sums to bf16, or take fp32 operands at a fraction of the speed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "bf16_tile.h"
#include "buffer.h"

#ifdef BF16_TILES

#include "bf16_pack.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace {

using bf16::kTile;
using torch::stable::Tensor;

constexpr int64_t kGroup = 10;        // of 32 rows or columns of the result: taken at a time
constexpr int64_t kStepsAtOnce = 10;  // of 32 k, so that a row tile's chunk stays in the first-level cache
constexpr int64_t kTileSums = kTile * kTile;

const bf16::TileUnit& tile_unit() {
  const bf16::TileUnit* unit = bf16::tile_unit();
  if (unit == nullptr) throw std::runtime_error("this machine has no bf16 tile unit");
  return *unit;
}

constexpr int64_t panel_words(int64_t steps) { return steps * 16 * kTile; }

// C = A B, a task for some row tiles: left(i, out) packs row tile i, right(j, out) column panel j, all of them once;
// store(i, j, tile) takes a finished tile.
template <typename Left, typename Right, typename Store>
void multiply_by_rows(int64_t row_tiles, int64_t column_tiles, int64_t k, const Left& left, const Right& right,
                      const Store& store) {
  const bf16::TileUnit& unit = tile_unit();
  const int64_t steps = bf16::tiles(k);
  Buffer<uint32_t> columns(column_tiles * panel_words(steps));
  torch::stable::parallel_for(0, column_tiles, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t j = lo; j < hi; ++j) right(j, columns.data + j * panel_words(steps));
  });
  torch::stable::parallel_for(0, row_tiles, 1, [&](int64_t lo, int64_t hi) {
    Buffer<uint16_t> rows(kGroup * steps * kTileSums);
    Buffer<float[kTileSums]> sums(kGroup);
    unit.begin();
    for (int64_t first = lo; first < hi; first += kGroup) {
      const int64_t group = std::min(kGroup, hi - first);
      for (int64_t i = 0; i < group; ++i) left(first + i, rows.data + i * steps * kTileSums);
      for (int64_t j = 0; j < column_tiles; ++j) {
        for (int64_t s = 0; s == 0 || s < steps; s += kStepsAtOnce) {  // without any steps: zeros
          const int64_t n = std::min(kStepsAtOnce, steps - s);
          const uint32_t* b = columns.data + j * panel_words(steps) + panel_words(s);
          for (int64_t i = 0; i < group; ++i) {
            unit.multiply(rows.data + (i * steps + s) * kTileSums, b, n, sums.data[i], s > 0);
          }
        }
        for (int64_t i = 0; i < group; ++i) store(first + i, j, sums.data[i]);
      }
    }
    unit.end();
  });
}

// The same, a task for some column panels: for few row tiles, which are packed once.
template <typename Left, typename Right, typename Store>
void multiply_by_columns(int64_t row_tiles, int64_t column_tiles, int64_t k, const Left& left, const Right& right,
                         const Store& store) {
  const bf16::TileUnit& unit = tile_unit();
  const int64_t steps = bf16::tiles(k);
  Buffer<uint16_t> rows(row_tiles * steps * kTileSums);
  torch::stable::parallel_for(0, row_tiles, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) left(i, rows.data + i * steps * kTileSums);
  });
  torch::stable::parallel_for(0, column_tiles, 1, [&](int64_t lo, int64_t hi) {
    Buffer<uint32_t> columns(kGroup * panel_words(steps));
    Buffer<float[kTileSums]> sums(kGroup);
    unit.begin();
    for (int64_t first = lo; first < hi; first += kGroup) {
      const int64_t group = std::min(kGroup, hi - first);
      for (int64_t j = 0; j < group; ++j) right(first + j, columns.data + j * panel_words(steps));
      for (int64_t i = 0; i < row_tiles; ++i) {
        const uint16_t* strip = rows.data + i * steps * kTileSums;
        for (int64_t s = 0; s == 0 || s < steps; s += kStepsAtOnce) {
          const int64_t n = std::min(kStepsAtOnce, steps - s);
          for (int64_t j = 0; j < group; ++j) {
            unit.multiply(strip + s * kTileSums, columns.data + j * panel_words(steps) + panel_words(s), n,
                          sums.data[j], s > 0);
          }
        }
        for (int64_t j = 0; j < group; ++j) store(i, first + j, sums.data[j]);
      }
    }
    unit.end();
  });
}

// A tile is added to rows of fp32.
void add_floats(const float* tile, float* out, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < std::min(rows, kTile); ++i) {
    float* row = out + i * stride;
    for (int64_t j = 0; j < std::min(columns, kTile); ++j) row[j] += tile[i * kTile + j];
  }
}

// A tile's transpose into fp32: its rows are the result's columns.
void store_transposed(const float* tile, float* out, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t at = 0; at < kTile; at += 16) {
    const auto inside = __mmask16(columns - at >= 16 ? 0xffff : columns > at ? (1 << (columns - at)) - 1 : 0);
    for (int64_t half = 0; half < kTile; half += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + (at + i) * kTile + half);
      lanes::transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (half + i < rows) _mm512_mask_storeu_epi32(out + (half + i) * stride + at, inside, r[i]);
      }
    }
  }
}

// A tile into rows of bf16.
void store_bf16(const float* tile, uint16_t* out, int64_t stride, int64_t rows, int64_t columns) {
  const auto inside = __mmask32(columns >= kTile ? 0xffffffffu : (1u << columns) - 1);
  for (int64_t i = 0; i < std::min(rows, kTile); ++i) {
    const __m512 first = _mm512_loadu_ps(tile + i * kTile), second = _mm512_loadu_ps(tile + i * kTile + 16);
    _mm512_mask_storeu_epi16(out + i * stride, inside, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}

// out fp32 [rows, n] = x [rows, k] w[n, k]^T, bf16: tiles of w x^T, as the fused sweep makes them
void bf16_logits(Tensor x, Tensor w, Tensor out) {
  const int64_t rows = x.size(0), k = x.size(1), n = w.size(0);
  multiply_by_rows(
      bf16::tiles(n), bf16::tiles(rows), k,
      [&](int64_t i, uint16_t* to) {
        bf16::pack_rows(elements<uint16_t>(w) + i * kTile * w.stride(0), w.stride(0), n - i * kTile, k, to);
      },
      [&](int64_t j, uint32_t* to) {
        bf16::pack_columns(elements<uint16_t>(x) + j * kTile * x.stride(0), x.stride(0), rows - j * kTile, k, to);
      },
      [&](int64_t i, int64_t j, const float* tile) {
        float* to = elements<float>(out) + j * kTile * out.stride(0) + i * kTile;
        store_transposed(tile, to, out.stride(0), rows - j * kTile, n - i * kTile);
      });
}

// total fp32 [rows, h] += dz [rows, n] w [n, h]; dz fp32 is rounded to w's bf16
void bf16_pull(Tensor dz, Tensor w, Tensor total) {
  const int64_t rows = dz.size(0), n = dz.size(1), h = w.size(1);
  multiply_by_columns(
      bf16::tiles(rows), bf16::tiles(h), n,
      [&](int64_t i, uint16_t* to) {
        bf16::pack_float_rows(elements<float>(dz) + i * kTile * dz.stride(0), dz.stride(0), rows - i * kTile, n, to);
      },
      [&](int64_t j, uint32_t* to) {
        const int64_t width = std::min(kTile, h - j * kTile);
        bf16::pack_row_pairs(elements<uint16_t>(w) + j * kTile, w.stride(0), n, width, bf16::tiles(n) * 16, to);
      },
      [&](int64_t i, int64_t j, const float* tile) {
        float* to = elements<float>(total) + i * kTile * total.stride(0) + j * kTile;
        add_floats(tile, to, total.stride(0), rows - i * kTile, h - j * kTile);
      });
}

// out bf16 [n, h] = dz[rows, n]^T x [rows, h]; dz fp32 is rounded to x's bf16
void bf16_outer(Tensor dz, Tensor x, Tensor out) {
  const int64_t rows = dz.size(0), n = dz.size(1), h = x.size(1);
  multiply_by_rows(
      bf16::tiles(n), bf16::tiles(h), rows,
      [&](int64_t i, uint16_t* to) {
        bf16::pack_float_columns(elements<float>(dz) + i * kTile, dz.stride(0), rows, n - i * kTile, to);
      },
      [&](int64_t j, uint32_t* to) {
        const int64_t width = std::min(kTile, h - j * kTile);
        bf16::pack_row_pairs(elements<uint16_t>(x) + j * kTile, x.stride(0), rows, width, bf16::tiles(rows) * 16, to);
      },
      [&](int64_t i, int64_t j, const float* tile) {
        uint16_t* to = elements<uint16_t>(out) + i * kTile * out.stride(0) + j * kTile;
        store_bf16(tile, to, out.stride(0), n - i * kTile, h - j * kTile);
      });
}

}  // namespace

#pragma GCC pop_options

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("bf16_logits", TORCH_BOX(&bf16_logits));
  m.impl("bf16_pull", TORCH_BOX(&bf16_pull));
  m.impl("bf16_outer", TORCH_BOX(&bf16_outer));
}

#endif
