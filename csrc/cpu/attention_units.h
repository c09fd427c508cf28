// The arithmetic of the forward pass: fp32 words, or words of two bf16 where there is an instruction for their products
// (BF16_PAIRS). No include guard, see attention_vec.h.

// Every element a float. What is bf16 is widened, which is exact.
struct Floats {
  using Lanes = Widened;
  static constexpr int64_t PER_WORD = 1, COLUMNS = 16;

  LEAF f16 multiply_add(f16 sum, f16 word, f16 row) { return sum + word * row; }

  template <typename T>
  LEAF void take_query(const T* q, int64_t d, float scale, float* words) {
    widen_row(q, d, scale, words);
  }
  LEAF f16 scaled(f16 score, float) { return score; }

  template <typename T>
  LEAF f16 read_some(const T* from, int64_t elements) {
    return load_some(from, elements);
  }

  // The weights of 32 keys: kept as the words of a row, added to its sums.
  LEAF f16 take_weights(f16 sums, f16 first, f16 second, float* words) {
    store(words, first), store(words + 16, second);
    return sums + first + second;
  }

  // The rows of up to 32 values: in place if they can be.
  template <typename T>
  LEAF void pack_values(const T* const* v, const T* const*, int64_t count, int64_t dv, float* packed,
                        const float** rows) {
    const bool in_place = sizeof(T) == sizeof(float) && dv % COLUMNS == 0;
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = in_place ? reinterpret_cast<const float*>(v[j]) : packed + j * padded(dv);
      if (!in_place) widen_row(v[j], dv, 1.0f, packed + j * padded(dv));
    }
  }

  template <typename T>
  LEAF void give_output(const float* o, int64_t dv, float factor, T* out) {
    narrow_row(o, dv, factor, out);
  }
};

#ifdef BF16_PAIRS
// Two neighbouring bf16 a word, their products summed in fp32. Weights are rounded to bf16, and it is the rounded ones
// that their sum adds up. Columns of values stand as unpacking leaves them: within 32, those of even groups of four
// first.
struct Pairs {
  using Lanes = Words;
  static constexpr int64_t PER_WORD = 2, COLUMNS = 32;
  typedef uint16_t h32 __attribute__((vector_size(64)));
  typedef uint16_t h32_anywhere __attribute__((vector_size(64), aligned(2), may_alias));

  LEAF f16 multiply_add(f16 sum, f16 word, f16 row) {
    return (f16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)word, (__m512bh)row);
  }

  LEAF f16 scaled(f16 score, float scale) { return score * scale; }
  LEAF void take_query(const bf16_bits* q, int64_t d, float, float* words) {
    words[(d - 1) / 2] = 0.0f;
    __builtin_memcpy(words, q, std::size_t(d) * sizeof(bf16_bits));
  }

  LEAF f16 read_some(const bf16_bits* from, int64_t elements) {
    return (f16)_mm512_maskz_loadu_epi16((1u << elements) - 1, from);
  }

  LEAF f16 take_weights(f16 sums, f16 first, f16 second, float* words) {
    const f16 both = (f16)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    store(words, both);
    return multiply_add(sums, both, (f16)(i16{} + 0x3f803f80));  // times 1, twice
  }

  LEAF h32 read_values(const bf16_bits* from, int64_t columns) {
    if (columns >= COLUMNS) return *reinterpret_cast<const h32_anywhere*>(from);
    return (h32)_mm512_maskz_loadu_epi16((1u << columns) - 1, from);
  }

  // Pairs of values, a column of 32 (a cache line) after the other; meanwhile the next block's are called for.
  LEAF void pack_values(const bf16_bits* const* v, const bf16_bits* const* ahead, int64_t, int64_t dv, float* packed,
                        const float** rows) {
    const int64_t width = padded(dv, COLUMNS);
    for (int64_t j = 0; j < BLOCK / 2; ++j) rows[j] = packed + j * width;
    for (int64_t c = 0; c < dv; c += COLUMNS) {
      for (int64_t j = 0; j < BLOCK; j += 2) {
        const __m512i x = (__m512i)read_values(v[j] + c, dv - c), y = (__m512i)read_values(v[j + 1] + c, dv - c);
        __builtin_prefetch(ahead[j] + c), __builtin_prefetch(ahead[j + 1] + c);
        store(packed + j / 2 * width + c, (f16)_mm512_unpacklo_epi16(x, y));
        store(packed + j / 2 * width + c + 16, (f16)_mm512_unpackhi_epi16(x, y));
      }
    }
  }

  LEAF void give_output(const float* o, int64_t dv, float factor, bf16_bits* out) {
    for (int64_t c = 0; c < dv; c += COLUMNS) {
      const f16 even = load(o + c), odd = load(o + c + 16);
      const f16 low = __builtin_shuffle(even, odd, i16{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
      const f16 high = __builtin_shuffle(even, odd, i16{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)(high * factor), (__m512)(low * factor));
      const int64_t left = dv - c;
      _mm512_mask_storeu_epi16(out + c, left >= COLUMNS ? ~__mmask32(0) : (1u << left) - 1, rounded);
    }
  }
};
#endif
