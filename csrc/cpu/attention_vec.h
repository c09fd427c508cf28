// Vectors of 16 floats for the attention kernels. No include guard: attention_kernels.cpp includes this once for each
// instruction set, inside a namespace and a target pragma of its own, with WIDE_SHUFFLES where one instruction shuffles
// 16 lanes (the compiler's own macros do not follow the pragma).

#define LEAF static inline __attribute__((always_inline))
#define LEAF_METHOD inline __attribute__((always_inline))

typedef float f16 __attribute__((vector_size(64)));
typedef float f16_anywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef float f16_of_halves __attribute__((vector_size(64), aligned(2), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16_anywhere __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64)));

LEAF f16 load(const float* p) { return *reinterpret_cast<const f16_anywhere*>(p); }
LEAF f16 load(const bf16_bits* p) {
  return (f16)(__builtin_convertvector(*reinterpret_cast<const h16_anywhere*>(p), u16) << 16);
}
LEAF void store(float* p, f16 x) { *reinterpret_cast<f16_anywhere*>(p) = x; }
LEAF void add(float* p, f16 x) { store(p, load(p) + x); }
LEAF f16 all(float x) { return f16{} + x; }
LEAF f16 spread(const float* p) {  // its bits as they are: they may be two bf16
  return f16{*p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p, *p};
}
LEAF f16 maximum(f16 a, f16 b) { return a > b ? a : b; }

LEAF f16 lanes() { return f16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

LEAF float widen(float x) { return x; }
LEAF float widen(bf16_bits x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
LEAF void narrow(float x, float* to) { *to = x; }
LEAF void narrow(float x, bf16_bits* to) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  *to = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The first `count` < 16 elements, then zeros.
template <typename T>
LEAF f16 load_some(const T* p, int64_t count) {
  alignas(64) float some[16] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = widen(p[i]);
  return load(some);
}

#ifdef WIDE_SHUFFLES
#define ROTATED(x, n)                                                                                            \
  __builtin_shuffle(x, i16{(0 + n) & 15, (1 + n) & 15, (2 + n) & 15, (3 + n) & 15, (4 + n) & 15, (5 + n) & 15,   \
                           (6 + n) & 15, (7 + n) & 15, (8 + n) & 15, (9 + n) & 15, (10 + n) & 15, (11 + n) & 15, \
                           (12 + n) & 15, (13 + n) & 15, (14 + n) & 15, (15 + n) & 15})
#define FOLD(x, operation)         \
  x = operation(x, ROTATED(x, 8)); \
  x = operation(x, ROTATED(x, 4)); \
  x = operation(x, ROTATED(x, 2)); \
  x = operation(x, ROTATED(x, 1)); \
  return x[0];
LEAF f16 sum(f16 a, f16 b) { return a + b; }
LEAF float largest(f16 x){FOLD(x, maximum)} LEAF float total(f16 x){FOLD(x, sum)}
#undef FOLD
#undef ROTATED
#else  // a shuffle of 16 lanes would be taken apart lane by lane
#define FOLD(x, operation)                                        \
  alignas(64) float a[16];                                        \
  store(a, x);                                                    \
  for (int n = 8; n; n /= 2)                                      \
    for (int i = 0; i < n; ++i) a[i] = operation(a[i], a[i + n]); \
  return a[0];
LEAF float maximum(float a, float b) { return a > b ? a : b; }
LEAF float sum(float a, float b) { return a + b; }
LEAF float largest(f16 x){FOLD(x, maximum)} LEAF float total(f16 x){FOLD(x, sum)}
#undef FOLD
#endif

// e^x for x <= 0 or near it; exactly 0 below -87, where the result would be subnormal. Cephes' polynomial, about 1 ulp.
LEAF f16 exponential(f16 x) {
  const f16 inside = x < -87.0f ? all(-87.0f) : x;
  const f16 shifted = inside * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer sits in the low bits
  const f16 n = shifted - 12582912.0f;
  const f16 r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  f16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const i16 power = ((i16)shifted - 0x4b400000 + 127) << 23;
  y = y * (f16)power;
  return x < -87.0f ? f16{} : y;
}

// Cephes' tanhf: a polynomial near 0, where the quotient of exponentials would cancel.
LEAF f16 hyperbolic_tangent(f16 x) {
  const f16 size = x < 0.0f ? -x : x;
  const f16 e = exponential(size * -2.0f);
  const f16 far = (1.0f - e) / (1.0f + e);
  const f16 z = x * x;
  f16 y = z * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  const f16 near = y * z * x + x;
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}
