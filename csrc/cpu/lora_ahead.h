// Data called for before it is needed. Beside a busy neighbour the third-level cache answers late, which cost these
// kernels a fifth of their speed and more: what streams from there is asked for one chunk, or one group, ahead.
#pragma once
#include <algorithm>
#include <cstdint>

#include "operand.h"

#ifdef BF16_TILES

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace lora {
namespace {

using operand::Matrix;
using operand::Type;

// To the second-level cache; may lie behind the end.
inline void prefetch(const uint32_t* p, int64_t words) {
  for (int64_t i = 0; i < words; i += 16) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

// Calls for what is packed next, rows [first, first + count) of a matrix, a few cache lines at a time, in `calls` steps
// of the multiplication before it. Lines that are renumbered are not called for.
class Ahead {
 public:
  Ahead(const Matrix& m, int64_t first, int64_t count, int64_t from, int64_t depth, int64_t calls) {
    const int64_t size = m.type == Type::single ? 4 : 2;
    const int64_t lines = count <= 0 || m.order != nullptr ? 0 : m.along ? count : depth;
    stride_ = m.stride * size;
    at_ = static_cast<const char*>(m.data) + first * (m.along ? stride_ : size) + from * (m.along ? size : stride_);
    width_ = (m.along ? depth : count) * size;
    left_ = lines * ((width_ + 63) / 64);
    share_ = (left_ + calls - 1) / std::max<int64_t>(calls, 1);
  }

  void fetch() {
    for (int64_t i = std::min(share_, left_); i > 0; --i, --left_) {
      _mm_prefetch(at_ + from_, _MM_HINT_T1);
      from_ += 64;
      if (from_ >= width_) from_ = 0, at_ += stride_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t stride_ = 0, width_ = 0, from_ = 0, left_ = 0, share_ = 0;
};

}  // namespace
}  // namespace lora

#pragma GCC pop_options

#endif
