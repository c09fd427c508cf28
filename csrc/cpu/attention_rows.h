// Rows of queries, keys and values for the attention kernels: widened, narrowed, transposed, masked. No include guard,
// see attention_vec.h.

// A function of its own in the object code; it takes no vectors, so its call is the same in every instruction set.
#define TILE static __attribute__((noinline))

// A row as floats, times factor, then zeros up to the padded width.
template <typename T>
LEAF void widen_row(const T* from, int64_t width, float factor, float* to) {
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) store(to + c, load(from + c) * factor);
  if (c < width) store(to + c, load_some(from + c, width - c) * factor);
}

template <typename T>
LEAF void narrow_row(const float* from, int64_t width, float factor, T* to) {
  for (int64_t c = 0; c < width; ++c) narrow(from[c] * factor, to + c);
}

// How 16 lanes are read from a row: elements as floats, or pairs of bf16 as words.
struct Widened {
  template <typename T>
  LEAF f16 read(const T* p) {
    return load(p);
  }
};
struct Words {
  LEAF f16 read(const bf16_bits* p) { return *reinterpret_cast<const f16_of_halves*>(p); }
};

// to[c * stride + j] = lane c of rows[j] from `start` on, for 16 rows.
template <typename Lanes, typename T>
LEAF void transpose_16x16(const T* const* rows, int64_t start, float* to, int64_t stride) {
#ifdef WIDE_SHUFFLES
  // clang-format off
#define LOW_WORDS i16{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}
#define HIGH_WORDS i16{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31}
#define LOW_PAIRS i16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}
#define HIGH_PAIRS i16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}
#define EVEN_QUARTERS i16{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}
#define ODD_QUARTERS i16{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}
  // clang-format on
  f16 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const f16 x = Lanes::read(rows[i] + start), y = Lanes::read(rows[i + 1] + start);
    a[i] = __builtin_shuffle(x, y, LOW_WORDS), a[i + 1] = __builtin_shuffle(x, y, HIGH_WORDS);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = __builtin_shuffle(a[i], a[i + 2], LOW_PAIRS), b[i + 1] = __builtin_shuffle(a[i], a[i + 2], HIGH_PAIRS);
    b[i + 2] = __builtin_shuffle(a[i + 1], a[i + 3], LOW_PAIRS);
    b[i + 3] = __builtin_shuffle(a[i + 1], a[i + 3], HIGH_PAIRS);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const f16 e0 = __builtin_shuffle(b[i], b[4 + i], EVEN_QUARTERS),
              o0 = __builtin_shuffle(b[i], b[4 + i], ODD_QUARTERS);
    const f16 e1 = __builtin_shuffle(b[8 + i], b[12 + i], EVEN_QUARTERS);
    const f16 o1 = __builtin_shuffle(b[8 + i], b[12 + i], ODD_QUARTERS);
    store(to + i * stride, __builtin_shuffle(e0, e1, EVEN_QUARTERS));
    store(to + (8 + i) * stride, __builtin_shuffle(e0, e1, ODD_QUARTERS));
    store(to + (4 + i) * stride, __builtin_shuffle(o0, o1, EVEN_QUARTERS));
    store(to + (12 + i) * stride, __builtin_shuffle(o0, o1, ODD_QUARTERS));
  }
#undef LOW_WORDS
#undef HIGH_WORDS
#undef LOW_PAIRS
#undef HIGH_PAIRS
#undef EVEN_QUARTERS
#undef ODD_QUARTERS
#else
  for (int j = 0; j < 16; ++j) {
    const f16 row = Lanes::read(rows[j] + start);
    for (int c = 0; c < 16; ++c) to[c * stride + j] = row[c];
  }
#endif
}

struct Mask {  // which of 16 keys from `first` on a query at `position` sees
  int64_t first, window;
  LEAF_METHOD f16 apply(float position, f16 seen, f16 otherwise) const {
    const f16 ahead = (position - float(first)) - lanes();  // how far the query is past the key
    f16 s = ahead < 0.0f ? otherwise : seen;
    if (window) s = ahead >= float(window) ? otherwise : s;
    return s;
  }
};
