// The loops of decoder_rows.cpp, in vectors of 16 floats. No include guard: decoder_rows.cpp includes this once for
// each instruction set, inside a namespace and a target pragma of its own. A row's last elements go through copies.

#define LEAF static inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;

// Vectors of 16: the compiler prefers narrower ones where it vectorises by itself.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float FloatsAnywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(32), aligned(2), may_alias));

LEAF Floats load(const float* p) { return *reinterpret_cast<const FloatsAnywhere*>(p); }
LEAF Floats load(const uint16_t* p) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(p), Words) << 16);
}
LEAF Words bf16_bits(Floats x) {  // to nearest even
  const Words bits = (Words)x, finite = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? finite : Words{} + 0x7fc0u;
}
LEAF void store(Floats x, float* p) { *reinterpret_cast<FloatsAnywhere*>(p) = x; }
LEAF void store(Floats x, uint16_t* p) {
  *reinterpret_cast<HalvesAnywhere*>(p) = __builtin_convertvector(bf16_bits(x), HalvesAnywhere);
}
LEAF Floats rounded(Floats x, const float*) { return x; }
LEAF Floats rounded(Floats x, const uint16_t*) { return (Floats)(bf16_bits(x) << 16); }

// e^x, x bounded to where it is finite and normal.
LEAF Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = x > 88.0f ? Floats{} + 88.0f : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer sits in the low bits
  const Floats n = shifted - 12582912.0f, f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // Cephes' split of ln 2
  Floats y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * (f * f) + f + 1.0f;
  return y * (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
}

// The first `count` elements, then zeros; and back.
template <typename T>
LEAF Floats load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T some[kLanes] = {};
  std::memcpy(some, p, size_t(count) * sizeof(T));
  return load(some);
}
template <typename T>
LEAF void store(Floats x, T* p, int64_t count) {
  if (count >= kLanes) return store(x, p);
  T some[kLanes];
  store(x, some);
  std::memcpy(p, some, size_t(count) * sizeof(T));
}

template <typename T>
LEAF void norm_row(const T* x, const T* weight, int64_t width, const Norm& norm, T* out) {
  Floats sums = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats value = load(x + j, width - j);
    sums += value * value;
  }
  float sum = 0.0f;
  for (int64_t j = 0; j < kLanes; ++j) sum += sums[j];
  const float scale = 1.0f / std::sqrt(sum / float(width) + norm.eps);
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats y = load(x + j, width - j) * scale;
    if (norm.round_first) y = rounded(y, x);
    store(y * (load(weight + j, width - j) + norm.offset), out + j, width - j);
  }
}

template <typename T>
LEAF void gate_row(T* gate, const T* up, int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats x = load(gate + j, width - j);
    store(rounded(x / (exponential(-x) + 1.0f), gate) * load(up + j, width - j), gate + j, width - j);
  }
}

// The first `rotary` of a head's elements, halves rotated against each other; `to` may be x.
template <typename T>
LEAF void rotate_head(const T* x, const T* cos, const T* sin, int64_t rotary, T* to) {
  const int64_t half = rotary / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const int64_t count = half - j, k = half + j;
    const Floats low = load(x + j, count), high = load(x + k, count);
    const Floats a = rounded(low * load(cos + j, count), x), b = rounded(high * load(sin + j, count), x);
    const Floats c = rounded(high * load(cos + k, count), x), d = rounded(low * load(sin + k, count), x);
    store(a - b, to + j, count);
    store(c + d, to + k, count);
  }
}

template <typename T>
void norm_rows(const T* x, int64_t stride, const T* weight, int64_t rows, int64_t width, Norm norm, T* out) {
  for (int64_t i = 0; i < rows; ++i) norm_row(x + i * stride, weight, width, norm, out + i * width);
}

template <typename T>
void gate_rows(T* gate, int64_t stride, const T* up, int64_t up_stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) gate_row(gate + i * stride, up + i * up_stride, width);
}

template <typename T>
void rotate_heads(const T* x, int64_t stride, const T* cos, const T* sin, int64_t heads, int64_t rotary, T* to,
                  int64_t to_stride) {
  for (int64_t h = 0; h < heads; ++h) rotate_head(x + h * stride, cos, sin, rotary, to + h * to_stride);
}

#undef LEAF
