// One row of logits to (token, logprob): two reads of the row, four where a filter is on; no sort.
//
// With u = (max - z) / temperature, a token weighs exp(-u) in fixed point (40 fractional bits). Integer sums do not
// depend on the order of additions, so the drawn token is the same on every machine and equal to the Python
// definition's (rlhf_kernels/ops/sampling/naive.py). Filters keep a prefix of the order (u, index); its end is found by
// a radix search over the bits of u, which are ordered as u >= 0 is.
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

struct Scratch {
  std::vector<float> u, w;        // the whole row, filled for filtered rows
  std::vector<int64_t> masses;    // of each block
  std::vector<int32_t> matching;  // indices that share the search's leading digits
  std::vector<int64_t> counts = std::vector<int64_t>(2048), sums = std::vector<int64_t>(2048);
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

// Radix search for the shortest prefix whose count (or mass) reaches `goal`; digits of 11, 10 and 10 bits.
class PrefixSearch {
 public:
  PrefixSearch(Scratch& scratch, int64_t size) : s_(scratch) {
    clear();
    for (int64_t i = 0; i < size; ++i) add(i, key(i) >> 20);
    counts_ = s_.counts;
    sums_ = s_.sums;
    size_ = size;
  }

  Limit find(int64_t goal, bool by_mass) {
    s_.counts = counts_;
    s_.sums = sums_;
    int64_t count = 0, mass = 0;
    const uint32_t first = descend(goal, by_mass, count, mass);
    s_.matching.clear();
    for (int64_t i = 0; i < size_; ++i)
      if (key(i) >> 20 == first) s_.matching.push_back(int32_t(i));
    clear();
    for (int32_t i : s_.matching) add(i, key(i) >> 10 & 1023u);
    const uint32_t second = first << 10 | descend(goal, by_mass, count, mass);
    clear();
    for (int32_t i : s_.matching)
      if (key(i) >> 10 == second) add(i, key(i) & 1023u);
    const uint32_t found = second << 10 | descend(goal, by_mass, count, mass);
    const int64_t each = fixed_point(exp_weight(std::bit_cast<float>(found)));
    const int64_t ties = by_mass ? (goal - mass + each - 1) / each : goal - count;
    return {found, ties, mass + ties * each};
  }

 private:
  uint32_t key(int64_t i) const { return std::bit_cast<uint32_t>(s_.u[i]); }
  void clear() {
    std::fill(s_.counts.begin(), s_.counts.end(), 0);
    std::fill(s_.sums.begin(), s_.sums.end(), 0);
  }
  void add(int64_t i, uint32_t digit) {
    s_.counts[digit] += 1;
    s_.sums[digit] += fixed_point(s_.w[i]);
  }
  // The digit in which the running count (or mass) reaches the goal; count and mass stop before it.
  uint32_t descend(int64_t goal, bool by_mass, int64_t& count, int64_t& mass) const {
    for (uint32_t d = 0;; ++d) {
      if ((by_mass ? mass + s_.sums[d] : count + s_.counts[d]) >= goal) return d;
      count += s_.counts[d];
      mass += s_.sums[d];
    }
  }

  Scratch& s_;
  std::vector<int64_t> counts_, sums_;  // of the first digit
  int64_t size_;
};

Limit find_limit(const RowParameters& p, int64_t size, int64_t total, Scratch& s) {
  const int64_t all = std::numeric_limits<int64_t>::max();
  Limit limit{std::bit_cast<uint32_t>(kInf), all, total};
  const bool by_count = p.top_k > 0 && p.top_k < size;
  if (by_count || p.top_p < 1.0) {
    PrefixSearch search(s, size);
    if (by_count) limit = search.find(p.top_k, false);
    if (p.top_p < 1.0) {
      const int64_t goal = int64_t(std::ceil(p.top_p * double(limit.mass)));
      limit = search.find(std::min(std::max<int64_t>(goal, 1), limit.mass), true);
    }
  }
  const uint32_t cut = std::bit_cast<uint32_t>(p.min_p_cut + 0.0f);  // -0 would have the sign bit
  return cut < limit.key ? Limit{cut, all, 0} : limit;
}

// Applies the limit to the stored weights and renews the masses of the blocks; returns the total.
int64_t filter(Limit limit, int64_t size, Scratch& s) {
  int64_t total = 0, left = limit.ties;
  for (int64_t b = 0; b * kBlock < size; ++b) {
    const float* u = s.u.data() + b * kBlock;
    float* w = s.w.data() + b * kBlock;
    int64_t first_ties = kBlock;
    if (left < size) {  // ties are counted by index, so the block's own share ends at an index
      first_ties = 0;
      for (; first_ties < kBlock && (left > 0 || std::bit_cast<uint32_t>(u[first_ties]) != limit.key); ++first_ties)
        left -= std::bit_cast<uint32_t>(u[first_ties]) == limit.key;
    }
    block_filter(u, limit.key, first_ties, w);
    total += s.masses[b] = block_mass(w);
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
  s.masses.resize(blocks);
  if (filtered) {
    s.u.resize(blocks * kBlock);
    s.w.resize(blocks * kBlock);
  }
  double lanes[kLanes] = {};
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    float* u = filtered ? s.u.data() + b * kBlock : s.block_u;
    float* w = filtered ? s.w.data() + b * kBlock : s.block_w;
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
    if (filtered) total = filter(find_limit(p, logits.size, total, s), logits.size, s);
    int64_t left = std::min(int64_t(p.uniform * double(total)), total - 1);
    int64_t b = 0;
    while (left >= s.masses[b]) left -= s.masses[b++];
    const float* w = s.block_w;
    if (filtered)
      w = s.w.data() + b * kBlock;
    else
      block_weights(logits.block(b, s.logits), top, p.temperature, s.block_u, s.block_w);
    int64_t i = 0;
    while (left >= fixed_point(w[i])) left -= fixed_point(w[i++]);
    token = b * kBlock + i;
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
