// One row of logits to (token, logprob): two reads of the row; no sort of it.
//
// With u = (max - z) / temperature, a token weighs exp(-u) in fixed point (40 fractional bits). Integer sums do not
// depend on the order of additions, so the drawn token is the same on every machine and equal to the Python
// definition's (rlhf_kernels/ops/sampling/naive.py). Filters keep a prefix of the order (u, index). Tokens below a
// bound that is sure to lie past its end are listed; the end is found among them by a radix search over the bits of u,
// which are ordered as u >= 0 is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#pragma GCC optimize("fp-contract=off")  // a fused multiply-add would change weights, and with them draws
#include "logit_block.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---- random numbers: Philox4x32-10, laid out as in rlhf_kernels/ops/sampling/philox.py ----

double uniform(uint64_t seed, uint64_t stream, uint32_t sample_index, uint32_t position) {
  uint32_t c[4] = {position, sample_index, uint32_t(stream), uint32_t(stream >> 32)};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c[1]) << 32 | c[0]) >> 11) * 0x1p-53;
}

// ---- one row ----

struct RowParameters {
  float temperature, min_p_cut;
  int64_t top_k;
  double top_p, uniform;
  bool greedy;
};

// Tokens by index in whole blocks, those past the end without weight.
struct Tokens {
  std::vector<float> u, w;
  int64_t blocks = 0;

  void resize(int64_t count) {
    blocks = count;
    u.resize(size_t((count + 1) * kBlock)),
        w.resize(size_t((count + 1) * kBlock));  // one more: lists are cut to blocks
  }
  const float* u_of(int64_t b) const { return u.data() + b * kBlock; }
  const float* w_of(int64_t b) const { return w.data() + b * kBlock; }
  float* w_of(int64_t b) { return w.data() + b * kBlock; }
};

struct Scratch {
  Tokens row, list;               // of a filtered row: all of it, and the tokens its filters may leave
  std::vector<int32_t> listed;    // whose indices in the row these are
  std::vector<int32_t> matching;  // places in the list that share the search's leading digits
  std::vector<int64_t> masses;    // of each block
  alignas(64) float logits[kBlock], block_u[kBlock], block_w[kBlock];
};

// A row's logits in blocks of fp32, the last one padded with -inf.
struct RowLogits {
  const void* data;
  ScalarType type;
  int64_t size;

  const float* block(int64_t b, float* buffer) const {
    const int64_t first = b * kBlock, n = std::min(kBlock, size - first);
    if (type == ScalarType::Float) {
      const float* z = static_cast<const float*>(data) + first;
      if (n == kBlock) return z;
      std::copy(z, z + n, buffer);
    } else {
      const uint16_t* z = static_cast<const uint16_t*>(data) + first;
      type == ScalarType::BFloat16 ? widen_bf16(z, n, buffer) : widen_half(z, n, buffer);
    }
    std::fill(buffer + n, buffer + kBlock, -kInf);
    return buffer;
  }
};

// The end of a prefix of the order (u, index): every key below `key`, and the first `ties` tokens that have it.
struct Limit {
  uint32_t key;
  int64_t ties, mass;  // mass: of the whole prefix
};

// Bounds of u between which a prefix of `goal` tokens (or of that mass) ends: low <= its last u <= high.
struct Range {
  float low = 0.0f, high = kLargestU;
};

// Masses are rough here: a bound counts only where it leaves no doubt.
void narrow(const Tokens& tokens, int64_t goal, bool by_mass, const Bounds& bounds, Range& range) {
  const double doubt = by_mass ? 1e-4 : 0.0, unit = by_mass ? kOne : 1.0;
  Below below;
  for (int64_t b = 0; b < tokens.blocks; ++b) {
    if (by_mass) {
      block_weigh(tokens.u_of(b), tokens.w_of(b), bounds, below);
    } else {
      block_count(tokens.u_of(b), bounds, below);
    }
  }
  for (int i = 0; i < kBounds; ++i) {
    const double sum = below.sum[i] * unit;
    if (sum * (1.0 - doubt) >= double(goal)) range.high = std::min(range.high, bounds.at[i]);
    if (sum * (1.0 + doubt) < double(goal)) range.low = std::max(range.low, bounds.at[i]);
  }
}

Bounds between(const Range& range) {
  Bounds bounds;
  for (int i = 0; i < kBounds; ++i) {
    bounds.at[i] = range.low + (range.high - range.low) * float(i + 1) / float(kBounds + 1);
  }
  return bounds;
}

// Lists the row's tokens with u <= bound.
void list_up_to(float bound, Scratch& s) {
  s.list.resize(s.row.blocks);
  s.listed.resize(s.list.u.size());
  int64_t n = 0;
  for (int64_t b = 0; b < s.row.blocks; ++b) {
    const Chosen to{s.list.u.data() + n, s.list.w.data() + n, s.listed.data() + n};
    n += block_choose(s.row.u_of(b), s.row.w_of(b), 0.0f, bound, int32_t(b * kBlock), to);
  }
  s.list.resize((n + kBlock - 1) / kBlock);
  std::fill(s.list.u.begin() + n, s.list.u.end(), kInf);
  std::fill(s.list.w.begin() + n, s.list.w.end(), 0.0f);
}

// The end of the shortest prefix of the list whose count (or mass) reaches `goal`: the range is narrowed, and a radix
// search goes through the tokens in it.
Limit find_end(int64_t goal, bool by_mass, Range range, Scratch& s) {
  constexpr int kRounds = 3, kDigit = 8;
  for (int i = 0; i < kRounds && s.list.blocks > 1; ++i) narrow(s.list, goal, by_mass, between(range), range);
  int64_t count = 0, mass = 0, n = 0;
  s.matching.resize(s.list.u.size());
  for (int64_t b = 0; b < s.list.blocks; ++b) {
    const Chosen to{nullptr, nullptr, s.matching.data() + n};
    n += block_choose(s.list.u_of(b), s.list.w_of(b), range.low, range.high, int32_t(b * kBlock), to);
    block_before(s.list.u_of(b), s.list.w_of(b), range.low, count, mass);
  }
  s.matching.resize(size_t(n));
  const auto key = [&](int32_t i) { return std::bit_cast<uint32_t>(s.list.u[size_t(i)]); };
  if (!by_mass && goal > count + n) {  // all that have any weight
    for (int32_t i : s.matching) mass += fixed_point(s.list.w[size_t(i)]);
    return {std::bit_cast<uint32_t>(kInf), std::numeric_limits<int64_t>::max(), mass};
  }
  uint32_t found = 0;
  for (int shift = 32 - kDigit; shift >= 0; shift -= kDigit) {
    int64_t counts[1 << kDigit] = {}, sums[1 << kDigit] = {};
    for (int32_t i : s.matching) {
      const uint32_t digit = key(i) >> shift & ((1u << kDigit) - 1);
      counts[digit] += 1;
      sums[digit] += fixed_point(s.list.w[size_t(i)]);
    }
    uint32_t d = 0;
    for (; (by_mass ? mass + sums[d] : count + counts[d]) < goal; ++d) count += counts[d], mass += sums[d];
    found = found << kDigit | d;
    if (shift > 0) std::erase_if(s.matching, [&](int32_t i) { return key(i) >> shift != found; });
  }
  const int64_t each = fixed_point(exp_weight(std::bit_cast<float>(found)));
  const int64_t ties = by_mass ? (goal - mass + each - 1) / each : goal - count;
  return {found, ties, mass + ties * each};
}

int64_t goal_of(double top_p, int64_t mass) {
  return std::min(std::max<int64_t>(int64_t(std::ceil(top_p * double(mass))), 1), mass);
}

// What the filters leave; the tokens it may hold are listed. Tokens without weight need no place there.
Limit find_limit(const RowParameters& p, int64_t size, int64_t total, Scratch& s) {
  const int64_t all = std::numeric_limits<int64_t>::max();
  Limit limit{std::bit_cast<uint32_t>(kInf), all, total};
  const bool by_count = p.top_k > 0 && p.top_k < size;
  if (by_count || p.top_p < 1.0) {
    const int64_t goal = by_count ? p.top_k : goal_of(p.top_p, total);
    Range range;
    narrow(s.row, goal, !by_count, kFirstBounds, range);
    narrow(s.row, goal, !by_count, between(range), range);
    list_up_to(range.high, s);
    if (by_count) limit = find_end(goal, false, range, s);
    if (by_count && p.top_p < 1.0) range = {0.0f, range.high};
    if (p.top_p < 1.0) limit = find_end(goal_of(p.top_p, limit.mass), true, range, s);
  } else {
    list_up_to(std::min(p.min_p_cut, kLargestU), s);
  }
  const uint32_t cut = std::bit_cast<uint32_t>(p.min_p_cut + 0.0f);  // -0 would have the sign bit
  return cut < limit.key ? Limit{cut, all, 0} : limit;
}

// Applies the limit to the list's weights and takes the masses of its blocks; returns the total.
int64_t filter(Limit limit, Scratch& s) {
  int64_t total = 0, left = limit.ties;
  const int64_t size = s.list.blocks * kBlock;
  for (int64_t b = 0; b < s.list.blocks; ++b) {
    const float* u = s.list.u_of(b);
    int64_t first_ties = kBlock;
    if (left < size) {  // ties are counted by index, so the block's own share ends at an index
      first_ties = 0;
      for (; first_ties < kBlock && (left > 0 || std::bit_cast<uint32_t>(u[first_ties]) != limit.key); ++first_ties)
        left -= std::bit_cast<uint32_t>(u[first_ties]) == limit.key;
    }
    block_filter(u, limit.key, first_ties, s.list.w_of(b));
    total += s.masses[size_t(b)] = block_mass(s.list.w_of(b));
  }
  return total;
}

struct Drawn {
  int64_t token;
  float logprob;
};

Drawn sample_row(const RowLogits& logits, const RowParameters& p, Scratch& s) {
  const int64_t blocks = (logits.size + kBlock - 1) / kBlock;
  float top = -kInf;
  int64_t top_block = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const float here = block_max(logits.block(b, s.logits), kBlock);
    if (here > top) top = here, top_block = b;
    if (here != here) top = kInf;  // a NaN: nothing is larger than inf, so it stays
  }
  if (!std::isfinite(top) || !(p.temperature > 0.0f) || !std::isfinite(p.temperature))
    return {0, std::numeric_limits<float>::quiet_NaN()};
  top += 0.0f;  // -0 - (+0) would give u the sign bit
  const float* z = logits.block(top_block, s.logits);
  const int64_t best = top_block * kBlock + (std::find(z, z + kBlock, top) - z);

  const bool filtered = !p.greedy && (p.top_k > 0 || p.top_p < 1.0 || p.min_p_cut < kInf);
  s.masses.resize(size_t(blocks));
  if (filtered) s.row.resize(blocks);
  double lanes[kLanes] = {};
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    float* u = filtered ? s.row.u.data() + b * kBlock : s.block_u;
    float* w = filtered ? s.row.w_of(b) : s.block_w;
    block_weights(logits.block(b, s.logits), top, p.temperature, u, w);
    if (!p.greedy) total += s.masses[b] = block_mass(w);
    if (b == top_block) w[best % kBlock] = 0.0f;
    add_lanes(w, lanes);
    if (b == top_block) w[best % kBlock] = 1.0f;
  }
  double rest = 0.0;  // of every token but the top one, so that -log1p(rest) keeps its digits near 0
  for (double lane : lanes) rest += lane;

  int64_t token = best;
  if (!p.greedy) {
    if (filtered) total = filter(find_limit(p, logits.size, total, s), s);
    int64_t left = std::min(int64_t(p.uniform * double(total)), total - 1);
    int64_t b = 0, i = 0;
    while (left >= s.masses[size_t(b)]) left -= s.masses[size_t(b++)];
    const float* w = filtered ? s.list.w_of(b) : s.block_w;
    if (!filtered) block_weights(logits.block(b, s.logits), top, p.temperature, s.block_u, s.block_w);
    while (left >= fixed_point(w[i])) left -= fixed_point(w[i++]);
    token = filtered ? s.listed[size_t(b * kBlock + i)] : b * kBlock + i;
  }
  const float chosen = logits.block(token / kBlock, s.logits)[token % kBlock];
  const double u = (double(top) - double(chosen)) / double(p.temperature);
  return {token, float(-u - std::log1p(rest))};
}

std::tuple<Tensor, Tensor> sample_rows(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p_cut,
                                       Tensor seed, Tensor stream, Tensor sample_index, Tensor position,
                                       Tensor greedy) {
  const int64_t n = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  Tensor token = torch::stable::new_empty(logits, {n}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  const ScalarType type = logits.scalar_type();
  const int64_t width = int64_t(logits.element_size());
  const char* data = static_cast<const char*>(logits.data_ptr());
  const auto* temperatures = static_cast<const float*>(temperature.data_ptr());
  const auto* cuts = static_cast<const float*>(min_p_cut.data_ptr());
  const auto* top_ks = static_cast<const int64_t*>(top_k.data_ptr());
  const auto* top_ps = static_cast<const double*>(top_p.data_ptr());
  const auto* seeds = static_cast<const uint64_t*>(seed.data_ptr());
  const auto* streams = static_cast<const uint64_t*>(stream.data_ptr());
  const auto* indices = static_cast<const int64_t*>(sample_index.data_ptr());
  const auto* positions = static_cast<const int64_t*>(position.data_ptr());
  const auto* greedies = static_cast<const bool*>(greedy.data_ptr());
  auto* tokens = static_cast<int64_t*>(token.data_ptr());
  auto* logprobs = static_cast<float*>(logprob.data_ptr());
  torch::stable::parallel_for(0, n, 1, [&](int64_t lo, int64_t hi) {
    Scratch scratch;
    for (int64_t i = lo; i < hi; ++i) {
      const RowLogits row{data + i * stride * width, type, vocabulary};
      const double draw = uniform(seeds[i], streams[i], uint32_t(indices[i]), uint32_t(positions[i]));
      const RowParameters p{temperatures[i], cuts[i], top_ks[i], top_ps[i], draw, greedies[i]};
      const Drawn drawn = sample_row(row, p, scratch);
      tokens[i] = drawn.token;
      logprobs[i] = drawn.logprob;
    }
  });
  return {token, logprob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("sample_rows", TORCH_BOX(&sample_rows)); }
