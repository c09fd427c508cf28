// The work between a decoder's matrix products, one pass each: RMS norm, SiLU times a gate, and rotary embedding on the
// way into the KV arena. Every rounding that the modules of transformers make, one elementwise op after another, is
// made here too, so that bf16 results are theirs; only the order of the norm's sum differs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 16;  // elements below which a second thread costs more than it saves
// x / rms(x), rounded, times the weight; or unrounded times (1 + weight), as Gemma's.
struct Norm {
  float eps, offset;
  bool round_first;
};

// The loops of one instruction set.
template <typename T>
struct Kernels {
  void (*norm)(const T* x, int64_t stride, const T* weight, int64_t rows, int64_t width, Norm norm, T* out);
  void (*gate)(T* gate, int64_t stride, const T* up, int64_t up_stride, int64_t rows, int64_t width);
  void (*rotate)(const T* x, int64_t stride, const T* cos, const T* sin, int64_t heads, int64_t rotary, T* to,
                 int64_t to_stride);
};

// The leaves are all inlined: vectors never cross a call, whose ABI would differ between the instruction sets.
#pragma GCC diagnostic ignored "-Wpsabi"

#define KERNELS                                           \
  template <typename T>                                   \
  constexpr Kernels<T> all() {                            \
    return {norm_rows<T>, gate_rows<T>, rotate_heads<T>}; \
  }

namespace portable {
#include "decoder_rows_kernels.h"
KERNELS
}  // namespace portable

#ifdef X86_KERNELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "decoder_rows_kernels.h"
KERNELS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "decoder_rows_kernels.h"
KERNELS
}  // namespace avx512
#pragma GCC pop_options

template <typename T>
Kernels<T> kernels() {
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  return level == 4 ? avx512::all<T>() : level == 3 ? avx2::all<T>() : portable::all<T>();
}
#else
template <typename T>
Kernels<T> kernels() {
  return portable::all<T>();
}
#endif

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// f(T()) for the elements' type; all tensors have it.
template <typename F>
void with_type(const char* op, std::initializer_list<const Tensor*> tensors, const F& f) {
  const ScalarType type = (*tensors.begin())->scalar_type();
  for (const Tensor* t : tensors) {
    STD_TORCH_CHECK(t->scalar_type() == type, op, ": the tensors differ in dtype");
    STD_TORCH_CHECK(t->dim() == 0 || t->stride(t->dim() - 1) == 1 || t->size(t->dim() - 1) <= 1, op,
                    ": a tensor's rows have gaps");
  }
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": neither float32 nor bfloat16");
  if (type == ScalarType::Float) {
    f(float());
  } else {
    f(uint16_t());
  }
}

Tensor rms_norm_rows(Tensor x, Tensor weight, double eps, double offset, bool round_first) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1),
                  "rms_norm_rows: x must be [rows, width] and weight [width]");
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, width});
  const Norm norm{float(eps), float(offset), round_first};
  with_type("rms_norm_rows", {&x, &weight}, [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t lo, int64_t hi) {
      kernels<T>().norm(data<const T>(x) + lo * x.stride(0), x.stride(0), data<const T>(weight), hi - lo, width, norm,
                        data<T>(out) + lo * width);
    });
  });
  return out;
}

void silu_mul(Tensor gate, Tensor up) {
  STD_TORCH_CHECK(gate.dim() == 2 && up.dim() == 2 && gate.size(0) == up.size(0) && gate.size(1) == up.size(1),
                  "silu_mul: gate and up must be [rows, width] alike");
  const int64_t rows = gate.size(0), width = gate.size(1);
  with_type("silu_mul", {&gate, &up}, [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, rows, kGrain / 2 / std::max<int64_t>(width, 1) + 1, [&](int64_t lo, int64_t hi) {
      kernels<T>().gate(data<T>(gate) + lo * gate.stride(0), gate.stride(0), data<const T>(up) + lo * up.stride(0),
                        up.stride(0), hi - lo, width);
    });
  });
}

// A token's row of a plane [num_slices, heads, slice_tokens, width].
template <typename T>
T* place_of(const Tensor& plane, int64_t slot) {
  const int64_t tokens = plane.size(2);
  return data<T>(plane) + slot / tokens * plane.stride(0) + slot % tokens * plane.stride(2);
}

// q [T, H, D] is rotated where it lies, k [T, KV, D] on its way into keys; v [T, KV, DV] goes into values.
void rotate_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor keys, Tensor values, Tensor slots) {
  const int64_t tokens = q.size(0), d = q.size(2), rotary = cos.size(1);
  STD_TORCH_CHECK(k.size(0) == tokens && v.size(0) == tokens && cos.size(0) == tokens && sin.size(0) == tokens &&
                      slots.size(0) == tokens && slots.stride(0) == 1 && slots.scalar_type() == ScalarType::Long,
                  "rotate_write: q, k, v, cos, sin and slots (int64) must have a row for each token");
  STD_TORCH_CHECK(k.size(2) == d && keys.size(3) == d && values.size(3) == v.size(2) && k.size(1) == keys.size(1) &&
                      v.size(1) == values.size(1) && rotary % 2 == 0 && rotary <= d && sin.size(1) == rotary,
                  "rotate_write: the heads of q, k, v, cos, sin and the arena differ");
  const auto* slot = data<const int64_t>(slots);
  const int64_t places = keys.size(0) * keys.size(2);
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(slot[t] >= 0 && slot[t] < places, "slots: out of range");
  }
  with_type("rotate_write", {&q, &k, &v, &cos, &sin, &keys, &values}, [&](auto type) {
    using T = decltype(type);
    const auto one = [&](int64_t t) {
      const T *c = data<const T>(cos) + t * cos.stride(0), *s = data<const T>(sin) + t * sin.stride(0);
      T* query = data<T>(q) + t * q.stride(0);
      const T *key = data<const T>(k) + t * k.stride(0), *value = data<const T>(v) + t * v.stride(0);
      T *to_key = place_of<T>(keys, slot[t]), *to_value = place_of<T>(values, slot[t]);
      kernels<T>().rotate(query, q.stride(1), c, s, q.size(1), rotary, query, q.stride(1));
      kernels<T>().rotate(key, k.stride(1), c, s, k.size(1), rotary, to_key, keys.stride(1));
      for (int64_t h = 0; h < k.size(1); ++h) {
        std::memcpy(to_key + h * keys.stride(1) + rotary, key + h * k.stride(1) + rotary, (d - rotary) * sizeof(T));
        std::memcpy(to_value + h * values.stride(1), value + h * v.stride(1), v.size(2) * sizeof(T));
      }
    };
    const int64_t elements = (q.size(1) + 2 * k.size(1)) * d;
    torch::stable::parallel_for(0, tokens, kGrain / std::max<int64_t>(elements, 1) + 1, [&](int64_t lo, int64_t hi) {
      for (int64_t t = lo; t < hi; ++t) one(t);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("rms_norm_rows", TORCH_BOX(&rms_norm_rows));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("rotate_write", TORCH_BOX(&rotate_write));
}
