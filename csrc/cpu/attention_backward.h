// Flash-style attention of one job, backward, in blocks of 16 keys. No include guard, see attention_vec.h.
//
// A block begins at a multiple of 16 in the sequence's own positions and every sum runs over blocks in that order. Rows
// are (token, head of the group), token first.

constexpr int64_t KEYS = 16;  // of a block

// s[i] = 16 dot products of row i of x with the 16 columns of packed [width, 16], in two chains.
template <int R>
LEAF void dots(const float* x, int64_t stride, const float* packed, int64_t width, f16* s) {
  f16 e0{}, e1{}, e2{}, e3{}, o0{}, o1{}, o2{}, o3{};
  const float *x0 = x, *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
  for (int64_t c = 0; c < width; c += 2) {
    const f16 even = load(packed + 16 * c), odd = load(packed + 16 * c + 16);
    e0 += x0[c] * even, o0 += x0[c + 1] * odd;
    if constexpr (R > 1) e1 += x1[c] * even, o1 += x1[c + 1] * odd;
    if constexpr (R > 2) {
      e2 += x2[c] * even, o2 += x2[c + 1] * odd;
      e3 += x3[c] * even, o3 += x3[c + 1] * odd;
    }
  }
  s[0] = e0 + o0;
  if constexpr (R > 1) s[1] = e1 + o1;
  if constexpr (R > 2) s[2] = e2 + o2, s[3] = e3 + o3;
}

// y[i][c] += sum_j w[i * wi + j * wj] * x[j][c] for R rows i; the sum runs over j in order, then is added to y.
template <int R, int W>
LEAF void accumulate_columns(float* y, int64_t ys, const float* w, int64_t wi, int64_t wj, const float* x, int64_t xs,
                             int64_t count) {
  f16 a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{};
  for (int64_t j = 0; j < count; ++j, x += xs, w += wj) {
    const f16 x0 = load(x), x1 = W > 1 ? load(x + 16) : f16{};
    a0 += w[0] * x0;
    if constexpr (R > 1) a1 += w[wi] * x0;
    if constexpr (R > 2) a2 += w[2 * wi] * x0, a3 += w[3 * wi] * x0;
    if constexpr (W > 1) {
      b0 += w[0] * x1;
      if constexpr (R > 1) b1 += w[wi] * x1;
      if constexpr (R > 2) b2 += w[2 * wi] * x1, b3 += w[3 * wi] * x1;
    }
  }
  add(y, a0);
  if constexpr (R > 1) add(y + ys, a1);
  if constexpr (R > 2) add(y + 2 * ys, a2), add(y + 3 * ys, a3);
  if constexpr (W > 1) {
    add(y + 16, b0);
    if constexpr (R > 1) add(y + ys + 16, b1);
    if constexpr (R > 2) add(y + 2 * ys + 16, b2), add(y + 3 * ys + 16, b3);
  }
}

template <int R>
LEAF void accumulate(float* y, int64_t ys, const float* w, int64_t wi, int64_t wj, const float* x, int64_t xs,
                     int64_t count, int64_t width) {
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) accumulate_columns<R, 2>(y + c, ys, w, wi, wj, x + c, xs, count);
  if (c < width) accumulate_columns<R, 1>(y + c, ys, w, wi, wj, x + c, xs, count);
}

// y[j] += sum_r w[r * 16 + j] * x[r] for the 16 keys j of a block, in partial sums of 64 rows: one chain over all rows
// of a long sequence would lose digits.
TILE void accumulate_keys(float* y, const float* w, const float* x, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += 64) {
    const int64_t count = rows - r < 64 ? rows - r : 64;
    for (int64_t j = 0; j < KEYS; j += 4) {
      accumulate<4>(y + j * width, width, w + r * 16 + j, 1, 16, x + r * width, width, count, width);
    }
  }
}

template <typename T>
TILE void pack_transposed(const T* const* rows, int64_t width, float* packed) {
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) transpose_16x16<Widened>(rows, c, packed + 16 * c, 16);
  if (c == width) return;
  alignas(64) float last[16 * 16];  // the columns left over, zeros behind them
  const float* padded_rows[16];
  for (int64_t j = 0; j < KEYS; ++j) {
    store(last + 16 * j, load_some(rows[j] + c, width - c));
    padded_rows[j] = last + 16 * j;
  }
  transpose_16x16<Widened>(padded_rows, 0, packed + 16 * c, 16);
}

// What the backward pass keeps of a job's rows.
struct GradientRows {
  float *q, *grad, *dq;   // [rows, padded d], [rows, padded dv], [rows, padded d]
  float *p, *ds;          // [rows, 16]: of the block at hand
  float *lse, *dot, *at;  // [rows]: log-sum-exp, D = dO.O, position
  int64_t d, dv;          // padded
};

// R rows against a block: p = e^(s - lse), ds = p (dO.v - D), through the softcap's slope where there is one; dq += ds
// k.
template <int R>
TILE void gradient_tile(const GradientRows& rows, int64_t row, const Options& options, const Mask& mask,
                        const float* kt, const float* vt, const float* k, int64_t count) {
  f16 s[R], dp[R];
  dots<R>(rows.q + row * rows.d, rows.d, kt, rows.d, s);
  dots<R>(rows.grad + row * rows.dv, rows.dv, vt, rows.dv, dp);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    f16 slope = all(1.0f);
    if (options.softcap > 0) {
      const f16 t = hyperbolic_tangent(s[i] * (1.0f / options.softcap));
      s[i] = t * options.softcap;
      slope = 1.0f - t * t;
    }
    const f16 p = exponential(s[i] - rows.lse[row + i]), ds = p * (dp[i] - rows.dot[row + i]) * slope;
    store(rows.p + (row + i) * 16, mask.apply(rows.at[row + i], p, f16{}));
    store(rows.ds + (row + i) * 16, mask.apply(rows.at[row + i], ds, f16{}));
  }
  accumulate<R>(rows.dq + row * rows.d, rows.d, rows.ds + row * 16, 16, 1, k, rows.d, count, rows.d);
}

// One sequence and one key/value head. P and dS of a block are kept for all rows, then summed three ways.
template <typename T>
LEAF void backward_job(const BackwardJob<T>& job, float* scratch) {
  const Options& options = job.options;
  const int64_t group = options.group, count = job.tokens * group, d = padded(options.d), dv = padded(options.dv);
  float *kt = scratch, *vt = kt + 16 * d, *keys = vt + 16 * dv, *dk = keys + 16 * d, *dvalues = dk + 16 * d;
  GradientRows rows;
  rows.d = d, rows.dv = dv;
  rows.q = dvalues + 16 * dv, rows.grad = rows.q + count * d, rows.dq = rows.grad + count * dv;
  rows.p = rows.dq + count * d, rows.ds = rows.p + count * 16;
  rows.lse = rows.ds + count * 16, rows.dot = rows.lse + count, rows.at = rows.dot + count;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = r / group, h = r % group, place = t * job.out_token + h * options.dv;
    widen_row(job.q + t * job.q_token + h * job.q_head, options.d, options.scale, rows.q + r * d);
    widen_row(job.grad + place, options.dv, 1.0f, rows.grad + r * dv);
    rows.lse[r] = job.lse[t * job.lse_token + h];
    rows.at[r] = float(t);
    f16 sum{};
    for (int64_t c = 0; c < dv; c += 16) {
      const f16 o = c + 16 <= options.dv ? load(job.out + place + c) : load_some(job.out + place + c, options.dv - c);
      sum += o * load(rows.grad + r * dv + c);
    }
    rows.dot[r] = total(sum);
  }
  for (int64_t c = 0; c < count * d; c += 16) store(rows.dq + c, f16{});

  for (int64_t first = 0; first < job.tokens; first += KEYS) {
    const int64_t here = job.tokens - first < KEYS ? job.tokens - first : KEYS;
    const T *k[KEYS], *v[KEYS];
    for (int64_t j = 0; j < KEYS; ++j) {  // places past the end repeat the last row; they are masked
      const int64_t at = first + (j < here ? j : here - 1);
      k[j] = job.k + at * job.k_token, v[j] = job.v + at * job.v_token;
    }
    pack_transposed(k, options.d, kt);
    pack_transposed(v, options.dv, vt);
    for (int64_t j = 0; j < KEYS; ++j) widen_row(k[j], options.d, 1.0f, keys + j * d);
    for (int64_t c = 0; c < 16 * (d + dv); c += 16) store(dk + c, f16{});

    int64_t last = job.tokens;  // past the last token that sees a key of the block
    if (options.window && first + KEYS - 1 + options.window < last) last = first + KEYS - 1 + options.window;
    const int64_t begin = first * group, end = last * group;
    const Mask mask{first, options.window};
    int64_t r = begin;
    for (; r + 4 <= end; r += 4) gradient_tile<4>(rows, r, options, mask, kt, vt, keys, here);
    for (; r < end; ++r) gradient_tile<1>(rows, r, options, mask, kt, vt, keys, here);
    accumulate_keys(dk, rows.ds + begin * 16, rows.q + begin * d, end - begin, d);
    accumulate_keys(dvalues, rows.p + begin * 16, rows.grad + begin * dv, end - begin, dv);
    for (int64_t j = 0; j < here; ++j) {
      narrow_row(dk + j * d, options.d, 1.0f, job.dk + (first + j) * job.dk_token);
      narrow_row(dvalues + j * dv, options.dv, 1.0f, job.dv + (first + j) * job.dv_token);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    narrow_row(rows.dq + r * d, options.d, options.scale, job.dq + r / group * job.dq_token + r % group * options.d);
  }
}
