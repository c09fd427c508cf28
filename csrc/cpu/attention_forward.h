// Flash-style attention of one job, forward, in blocks of 32 keys. No include guard, see attention_vec.h.
//
// A block begins at a multiple of 32 in the sequence's own positions; blocks of 512 positions are summed up apart and
// joined in order. So every sum runs in an order that positions alone decide, whatever the other rows, the chunking,
// the slices or the threads are: a token's output is the same bits in all of them, and the same in training (forward
// over whole sequences) and in generation (decode over the arena). Blocks or keys a query does not see add exact zeros.
// Rows are (token, head of the group), token first.

// sum[i][j] += a[i] b[j]: a word of each of R rows, and a row 16 C columns wide.
template <typename Unit, int R, int C>
LEAF void multiply_add(const float* a, int64_t as, const float* b, f16 (&sum)[R][C]) {
  f16 row[C];
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) row[j] = load(b + 16 * j);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const f16 word = spread(a + i * as);
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[i][j] = Unit::multiply_add(sum[i][j], word, row[j]);
  }
}

#ifdef WIDE_SHUFFLES
constexpr int SCORE_ROWS = 8, SCORE_COLUMNS = 2, VALUE_ROWS = 4, VALUE_COLUMNS = 4;
#else  // vectors of 16 take several registers each
constexpr int SCORE_ROWS = 4, SCORE_COLUMNS = 1, VALUE_ROWS = 4, VALUE_COLUMNS = 1;
#endif

// The rows of a job. A state is [padded dv] outputs, 16 partial sums, the maximum (see state_floats).
struct Rows {
  float *q, *states, *totals, *at;  // words of [rows, depth]; [rows, width]; [rows, width]; positions [rows]
  int64_t depth, width, dv;         // of dv: padded

  LEAF_METHOD float* state(int64_t r) const { return states + r * width; }
};

struct Block {  // a block's keys, transposed and packed, and the rows of its values
  int64_t first, words;
  const float* keys;
  const float* values[BLOCK];
};

template <int R, int C>
LEAF void store_tile(const f16 (&sum)[R][C], float* s) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) store(s + i * BLOCK + 16 * j, sum[i][j]);
  }
}

// Sets s[i] to the scores of R rows against the block: the sum over even words plus that over odd ones.
template <typename Unit, int R>
LEAF void score(const Rows& rows, int64_t row, const Block& block, float* s) {
  constexpr int C = SCORE_COLUMNS;
  const float* q = rows.q + row * rows.depth;
  const int64_t depth = rows.depth;
#pragma GCC unroll 2
  for (int c = 0; c < 2; c += C) {
    const float* keys = block.keys + 16 * c;
    f16 even[R][C] = {}, odd[R][C] = {};
    if constexpr (R * C <= 4) {  // side by side: few sums alone would wait for one another
      for (int64_t k = 0; k + 1 < depth; k += 2) {
        multiply_add<Unit>(q + k, depth, keys + k * BLOCK, even);
        multiply_add<Unit>(q + k + 1, depth, keys + (k + 1) * BLOCK, odd);
      }
      if (depth % 2) multiply_add<Unit>(q + depth - 1, depth, keys + (depth - 1) * BLOCK, even);
    } else {
      for (int64_t k = 0; k < depth; k += 2) multiply_add<Unit>(q + k, depth, keys + k * BLOCK, even);
      store_tile(even, s + 16 * c);
      for (int64_t k = 1; k < depth; k += 2) multiply_add<Unit>(q + k, depth, keys + k * BLOCK, odd);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < C; ++j) even[i][j] = load(s + i * BLOCK + 16 * (c + j));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) even[i][j] += odd[i][j];
    }
    store_tile(even, s + 16 * c);
  }
}

// outputs[i] = outputs[i] kept[i] + weights[i] . values, from column c on.
template <typename Unit, int R, int C>
LEAF void weigh_columns(float* o, int64_t width, const float* weights, const float* kept, const Block& block,
                        int64_t c) {
  f16 sum[R][C] = {};
  for (int64_t k = 0; k < block.words; ++k) {
    multiply_add<Unit>(weights + k, BLOCK / Unit::PER_WORD, block.values[k] + c, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* to = o + i * width + c + 16 * j;
      store(to, load(to) * kept[i] + sum[i][j]);
    }
  }
}

template <typename Unit, int R>
LEAF void weigh(const Rows& rows, int64_t row, const float* weights, const float* kept, const Block& block) {
  int64_t c = 0;
  for (; c + 16 * VALUE_COLUMNS <= rows.dv; c += 16 * VALUE_COLUMNS) {
    weigh_columns<Unit, R, VALUE_COLUMNS>(rows.state(row), rows.width, weights, kept, block, c);
  }
  for (; c < rows.dv; c += 16) weigh_columns<Unit, R, 1>(rows.state(row), rows.width, weights, kept, block, c);
}

// One block for R rows from `row` on: scores, new maximum, weights, weighted values.
template <typename Unit, int R>
TILE void attend_tile(const Rows& rows, int64_t row, const Options& options, const Block& block) {
  float low = rows.at[row], high = low;
  for (int i = 1; i < R; ++i) {
    low = rows.at[row + i] < low ? rows.at[row + i] : low;
    high = rows.at[row + i] > high ? rows.at[row + i] : high;
  }
  const float first = float(block.first), last = float(block.first + BLOCK - 1), window = float(options.window);
  if (first > high || (options.window && last < low - window + 1)) return;
  const bool masked = last > low || (options.window && first < high - window + 1);

  alignas(64) float s[R * BLOCK], weights[R * BLOCK / Unit::PER_WORD], kept[R];
  score<Unit, R>(rows, row, block, s);
  for (int i = 0; i < R; ++i) {
    f16 a = Unit::scaled(load(s + i * BLOCK), options.scale), b = Unit::scaled(load(s + i * BLOCK + 16), options.scale);
    if (options.softcap > 0) {
      a = hyperbolic_tangent(a * (1.0f / options.softcap)) * options.softcap;
      b = hyperbolic_tangent(b * (1.0f / options.softcap)) * options.softcap;
    }
    if (masked) {
      const f16 unseen = all(-__builtin_inff());
      a = Mask{block.first, options.window}.apply(rows.at[row + i], a, unseen);
      b = Mask{block.first + 16, options.window}.apply(rows.at[row + i], b, unseen);
    }
    float* sums = rows.state(row + i) + rows.dv;
    const float before = sums[16], top = largest(maximum(a, b));
    kept[i] = 1.0f;
    if (R <= 2 || top > before) {  // without a branch where nothing else would fill the time of a wrong guess
      sums[16] = top > before ? top : before;
      kept[i] = exponential(all(before - sums[16]))[0];
    }
    a = exponential(a - sums[16]), b = exponential(b - sums[16]);
    store(sums, Unit::take_weights(load(sums) * kept[i], a, b, weights + i * BLOCK / Unit::PER_WORD));
  }
  constexpr int N = R < VALUE_ROWS ? R : VALUE_ROWS;
  for (int i = 0; i < R; i += N) {
    weigh<Unit, N>(rows, row + i, weights + i * BLOCK / Unit::PER_WORD, kept + i, block);
  }
}

LEAF void clear_state(float* state, int64_t dv) {
  for (int64_t c = 0; c < dv + 16; c += 16) store(state + c, f16{});
  state[dv + 16] = NEVER;
}

// total and part become one softmax, in total.
LEAF void join(float* total, const float* part, int64_t dv) {
  const float a = total[dv + 16], b = part[dv + 16], top = a > b ? a : b;
  const f16 factors = exponential(f16{a - top, b - top});
  for (int64_t c = 0; c < dv + 16; c += 16)
    store(total + c, load(total + c) * factors[0] + load(part + c) * factors[1]);
  total[dv + 16] = top;
}

template <typename Unit, typename T>
LEAF void give_row(const ForwardJob<T>& job, int64_t row, const float* state, int64_t dv) {
  const Options& options = job.options;
  const int64_t count = job.token_count * options.group, in_head = row % count;
  const Token<T>& token = job.tokens[in_head / options.group];
  const int64_t head = row / count * options.group + in_head % options.group;
  const float sum = total(load(state + dv));
  Unit::give_output(state, options.dv, 1.0f / sum, token.out + head * options.dv);
  if (token.lse) token.lse[head] = state[dv + 16] + __builtin_logf(sum);
}

// The addresses of a head's keys and values of a block; zeros past the end.
template <typename T>
LEAF void find_rows(const ForwardJob<T>& job, const Phase<T>& phase, int64_t first, int64_t head, const T* zeros,
                    const T** k, const T** v) {
  KeyRows<T> keys = phase.keys;
  keys.k += head * job.k_head, keys.v += head * job.v_head;
  const int64_t count = phase.end - first < BLOCK ? phase.end - first : BLOCK;
  int64_t j = 0;
  while (j < count) {
    const T *kj = keys.k + (first + j) * keys.k_token, *vj = keys.v + (first + j) * keys.v_token;
    int64_t run = count;
    if (keys.slices != nullptr) {
      const auto at = uint32_t(first + j), slice = at / uint32_t(keys.slice_tokens);
      const int64_t offset = at % uint32_t(keys.slice_tokens), left = keys.slice_tokens - offset;
      kj = keys.k + keys.slices[slice] * keys.k_slice + offset * keys.k_token;
      vj = keys.v + keys.slices[slice] * keys.v_slice + offset * keys.v_token;
      run = j + left < count ? j + left : count;
    }
    for (; j < run; ++j, kj += keys.k_token, vj += keys.v_token) k[j] = kj, v[j] = vj;
  }
  for (; j < BLOCK; ++j) k[j] = v[j] = zeros;
}

// Packs 32 keys [width] as columns, to[word * 32 + key]; between times calls for the next block, which may lie in other
// slices, where no hardware prefetch would go.
template <typename Unit, typename T>
TILE void pack_keys(const T* const* k, const T* const* next_k, const T* const* next_v, int64_t width, float* to) {
  constexpr int64_t STEP = 16 * Unit::PER_WORD;
  for (int64_t half = 0; half < BLOCK; half += 16) {
    int64_t c = 0;
    for (; c + STEP <= width; c += STEP) {
      for (int64_t j = half; j < half + 16; ++j) {
        __builtin_prefetch(next_k[j] + c);
        if (Unit::PER_WORD == 1) __builtin_prefetch(next_v[j] + c);  // pairs: as values are packed
      }
      transpose_16x16<typename Unit::Lanes>(k + half, c, to + c / Unit::PER_WORD * BLOCK + half, BLOCK);
    }
    if (c == width) continue;
    alignas(64) float last[16 * 16];  // the words left over, zeros behind them
    const float* rows[16];
    for (int64_t j = 0; j < 16; ++j) {
      store(last + 16 * j, Unit::read_some(k[half + j] + c, width - c));
      rows[j] = last + 16 * j;
    }
    transpose_16x16<Widened>(rows, 0, to + c / Unit::PER_WORD * BLOCK + half, BLOCK);
  }
}

// What a job works with: the rows of the block at hand and of the next one, which are called for meanwhile.
template <typename T>
struct Places {
  const T *k[2][BLOCK], *v[2][BLOCK];
  int now = 0;
};

template <typename Unit, typename T>
LEAF void attend_rows(const Rows& rows, int64_t r, int64_t end, const Options& options, const Block& block) {
  for (; r + SCORE_ROWS <= end; r += SCORE_ROWS) attend_tile<Unit, SCORE_ROWS>(rows, r, options, block);
  if (SCORE_ROWS > 4 && r + 4 <= end) attend_tile<Unit, 4>(rows, r, options, block), r += 4;
  if (r + 2 <= end) attend_tile<Unit, 2>(rows, r, options, block), r += 2;
  if (r < end) attend_tile<Unit, 1>(rows, r, options, block);
}

// Where a job is: a block of a phase, for one head.
template <typename T>
struct Place {
  const ForwardJob<T>* job;
  int64_t phase, first, head;

  // The next one: heads, then blocks, then phases, then the next job. False at the end.
  LEAF_METHOD bool advance(const ForwardJob<T>* next) {
    if (++head < job->heads) return true;
    head = 0, first += BLOCK;
    if (first < job->phases[phase].end) return true;
    if (++phase == job->phase_count) {
      if (!next) return false;
      job = next, phase = 0;
    }
    first = job->phases[phase].begin;
    return true;
  }
};

// Heads side by side, block after block: what lies together in a slice is read together.
template <typename Unit, typename T>
LEAF void forward_job(const ForwardJob<T>& job, const ForwardJob<T>* next, float* scratch) {
  const Options& options = job.options;
  const int64_t group = options.group, in_head = job.token_count * group, count = in_head * job.heads;
  Rows rows;
  rows.depth = (options.d + Unit::PER_WORD - 1) / Unit::PER_WORD;
  rows.dv = padded(options.dv, Unit::COLUMNS), rows.width = state_floats(options);
  float *keys = scratch, *values = keys + BLOCK * padded(options.d), *zeros = values + BLOCK * padded(options.dv, 32);
  rows.states = zeros + padded(options.d) + padded(options.dv, 32), rows.totals = rows.states + count * rows.width;
  rows.q = rows.totals + count * rows.width, rows.at = rows.q + count * padded(options.d);
  for (int64_t c = 0; c < padded(options.d) + padded(options.dv); c += 16) store(zeros + c, f16{});

  bool chunks = false;  // whether states are joined at all
  for (int64_t p = 0; p < job.phase_count; ++p) chunks |= job.phases[p].end > CHUNK - BLOCK;
  for (int64_t r = 0; r < count; ++r) {
    const Token<T>& token = job.tokens[r % in_head / group];
    const int64_t head = r / in_head * group + r % in_head % group;
    Unit::take_query(token.q + head * job.q_head, options.d, options.scale, rows.q + r * rows.depth);
    rows.at[r] = float(token.position);
    clear_state(rows.state(r), rows.dv);
    if (chunks) clear_state(rows.totals + r * rows.width, rows.dv);
  }

  const auto* nothing = reinterpret_cast<const T*>(zeros);
  Places<T> places;
  Place<T> ahead{&job, 0, job.phases->begin, 0};
  const auto find = [&](int64_t to) __attribute__((always_inline)) {
    find_rows(*ahead.job, ahead.job->phases[ahead.phase], ahead.first, ahead.head, nothing, places.k[to], places.v[to]);
  };
  find(0);
  Block block;
  block.keys = keys;
  for (Place<T> at = ahead; at.job == &job;) {
    const Phase<T>& phase = job.phases[at.phase];
    const int64_t left = phase.end - at.first, here = left < BLOCK ? left : BLOCK, now = places.now;
    const bool more = ahead.advance(next);
    const int64_t then = more ? !now : now;
    if (more) find(then);
    pack_keys<Unit>(places.k[now], places.k[then], places.v[then], options.d, keys);
    Unit::pack_values(places.v[now], places.v[then], here, options.dv, values, block.values);
    places.now = int(then);
    block.first = at.first, block.words = (here + Unit::PER_WORD - 1) / Unit::PER_WORD;
    const int64_t begin = at.head * in_head + phase.first_token * group, end = begin + phase.tokens * group;
    attend_rows<Unit, T>(rows, begin, end, options, block);

    if ((at.first + BLOCK) % CHUNK == 0 || (left <= BLOCK && job.states)) {
      for (int64_t r = begin; r < end; ++r) {
        float* state = rows.state(r);
        if (job.states) {
          const int64_t chunk = at.first / CHUNK - phase.begin / CHUNK;
          __builtin_memcpy(job.states + (chunk * count + r) * rows.width, state,
                           std::size_t(rows.width) * sizeof(float));
        } else {
          join(rows.totals + r * rows.width, state, rows.dv);
        }
        clear_state(state, rows.dv);
      }
    }
    if (!more) break;
    at = ahead;
  }
  if (job.states) return;
  for (int64_t r = 0; r < count; ++r) {
    if (chunks) join(rows.totals + r * rows.width, rows.state(r), rows.dv);
    give_row<Unit>(job, r, chunks ? rows.totals + r * rows.width : rows.state(r), rows.dv);
  }
}

template <typename Unit, typename T>
LEAF void finish_job(const ForwardJob<T>& job, const float* states, int64_t chunks, float* scratch) {
  const int64_t count = job.token_count * job.options.group, width = state_floats(job.options);
  const int64_t dv = padded(job.options.dv, Unit::COLUMNS);
  for (int64_t r = 0; r < count; ++r) {
    clear_state(scratch, dv);
    for (int64_t c = 0; c < chunks; ++c) join(scratch, states + (c * count + r) * width, dv);
    give_row<Unit>(job, r, scratch, dv);
  }
}
