// sample over rows of fp32, bf16 or fp16 logits: (token, logprob) in one launch, without a sort of the vocabulary.
//
// A cluster of blocks takes a row, each a share of its columns. Two passes: the top token; then every weight, summed by
// pieces of the share, in which the draw finds its token. A filtered row takes more: the search for its end (see
// sample_search.cuh) and a sum of what the filter left. The row comes out of the second-level cache again; nothing but
// the results is written.
#pragma once
#include "cuda/sample_search.cuh"
#include "cuda/sample_share.cuh"

namespace cuda_rows {

constexpr int kLeastColumns = 8192;   // of a block in a cluster
constexpr int kMostColumn = 1 << 24;  // beyond any row's

struct SampleCall {
  const float *temperature, *min_p_cut;
  const int64_t* top_k;
  const double* top_p;
  const uint64_t *seed, *stream;
  const int64_t *sample_index, *position;
  const bool* greedy;
  int64_t* token;
  float* logprob;
};

struct SampleScratch {
  Exchange::Slots slots;
  Bins first, bins;  // of the first digit, and of the one at hand
  ShareScratch share;
};
static_assert(sizeof(SampleScratch) <= 48 << 10, "what a block may have without asking for more");

// Which tokens a filter keeps: keys below `key`, and `key` itself up to column `last`.
struct Kept {
  unsigned key = ~0u;
  int last = kMostColumn;

  __device__ bool has(float u, int column) const { return key_of(u) < key || (key_of(u) == key && column <= last); }
};

template <typename T>
class Sampler {
 public:
  __device__ Sampler(SampleScratch& scratch, const Cluster& cluster, const T* row, int n, int share)
      : scratch_(scratch),
        exchange_{cluster, scratch.slots},
        row_(row),
        columns_(n),
        share_(scratch.share, row, min(cluster.rank * share, n), min(share, n - min(cluster.rank * share, n))) {}

  // The first of the likeliest tokens. False: the row has no distribution.
  __device__ bool find_top() {
    uint64_t code = share_.top();
    exchange_.tell_all(0, code);
    exchange_.meet();
    for (int rank = 0; rank < exchange_.cluster.blocks; ++rank) code = larger(code, exchange_.heard(0, rank));
    top_ = from_ordered(unsigned(code >> 32));
    best_ = int(~unsigned(code));
    return top_ - top_ == 0.0f;  // finite
  }

  // The weights of all tokens at this temperature: their mass, and their sum without the top one. With `search`, also
  // the bins of their first digits.
  __device__ void weigh(float temperature, bool search) {
    temperature_ = temperature;
    share_.scale(top_, temperature);
    if (search) {
      scratch_.first.clear();
      __syncthreads();
    }
    double rest = 0;
    float few = 0;  // fp32 over four columns, fp64 from there on
    const uint64_t own = share_.sum([&](float u, int column, int k) {
      const float w = exp_weight(u);
      const uint64_t mass = fixed_point(w);
      few += column == best_ ? 0.0f : w;
      if (k % 4 == 3) rest += double(few), few = 0;
      if (search && key_of(u) <= kLastKey) scratch_.first.add(key_of(u) >> 20, mass);
      return mass;
    });
    rest_ = cluster_sum(share_.block_sum(rest));
    share_masses(own);
  }

  // Narrows the tokens down to those that the filters keep.
  __device__ void filter(int64_t top_k, double top_p, float min_p_cut) {
    Kept kept;
    Amount end{0, all_};  // of the prefix that is kept
    uint64_t ties = 0, equal = 0;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_mass = filter == 1;
      if (by_mass ? !(top_p < 1.0) : top_k == 0 || top_k >= columns_) continue;
      const double part = ceil(top_p * double(end.mass));
      uint64_t goal = part < 1.0 ? 1 : uint64_t(part);
      goal = goal < end.mass ? goal : end.mass;
      search({by_mass ? goal : uint64_t(top_k), by_mass}, kept, end, ties, equal);
    }
    const unsigned cut = key_of(min_p_cut + 0.0f);  // -0 would have the sign bit
    if (cut < kept.key) {
      kept.key = cut;
    } else if (ties < equal) {
      kept.last = column_of_tie(kept.key, ties - 1);
    }
    kept_ = kept;
    share_masses(share_.sum(mass_kept()));
  }

  // The token at which the running mass of the tokens that are kept exceeds `uniform` of it; one thread of the cluster
  // has it, and calls found(column).
  template <typename F>
  __device__ void draw(double uniform, const F& found) {
    uint64_t left = uint64_t(uniform * double(all_));
    left = left < all_ ? left : all_ - 1;
    if (left < before_ || left - before_ >= own_) return;
    share_.place(left - before_, mass_kept(), found);
  }

  __device__ int best() const { return best_; }
  __device__ double rest() const { return rest_; }  // sum of the weights of all tokens but the top one

  // u without its rounding to fp32, for the logprob.
  __device__ double exact_u(int column) const {
    return (double(top_) - double(widen(row_[column]))) / double(temperature_);
  }

 private:
  __device__ auto mass_kept() const {
    return [kept = kept_](float u, int column, int) { return kept.has(u, column) ? mass_of(u) : 0; };
  }

  // The block's sum among those of the cluster's blocks.
  __device__ void share_masses(uint64_t own) {
    exchange_.tell_all(0, own);
    exchange_.meet();
    own_ = own, before_ = all_ = 0;
    for (int rank = 0; rank < exchange_.cluster.blocks; ++rank) {
      if (rank == exchange_.cluster.rank) before_ = all_;
      all_ += exchange_.heard(0, rank);
    }
  }

  // The sum of the blocks' numbers, in a fixed order.
  __device__ double cluster_sum(double own) {
    exchange_.tell_all(0, std::bit_cast<uint64_t>(own));
    exchange_.meet();
    double all = 0;
    for (int rank = 0; rank < exchange_.cluster.blocks; ++rank) all += std::bit_cast<double>(exchange_.heard(0, rank));
    return all;
  }

  // The end of the shortest prefix that reaches the goal: its last key, how many of the `equal` tokens with it are in
  // it (`ties`), and its count and mass. Unchanged where no such prefix ends among the tokens that weigh something.
  __device__ void search(const Goal& goal, Kept& kept, Amount& end, uint64_t& ties, uint64_t& equal) {
    Amount before, there;
    const int first = find_digit(scratch_.first, goal, exchange_, before, there);
    if (first < 0) return;
    unsigned found = unsigned(first);
#pragma unroll 1
    for (int shift = 10; shift >= 0; shift -= 10) {
      __syncthreads();  // the bins may still be read
      scratch_.bins.clear();
      __syncthreads();
      share_.for_columns([&](float u, int, int) {
        if (key_of(u) >> (shift + 10) == found) scratch_.bins.add(key_of(u) >> shift & 1023u, mass_of(u));
      });
      __syncthreads();
      found = found << 10 | unsigned(find_digit(scratch_.bins, goal, exchange_, before, there));
    }
    kept.key = found;
    const uint64_t each = mass_of(std::bit_cast<float>(kept.key));
    equal = there.count;
    ties = goal.by_mass ? (goal.value - before.mass + each - 1) / each : goal.value - before.count;
    end = {before.count + ties, before.mass + ties * each};
  }

  // The column of the token that has `key` and `rank` others with it before it.
  __device__ int column_of_tie(unsigned key, uint64_t rank) {
    const auto equals = [=](float u, int, int) -> uint64_t { return key_of(u) == key; };
    share_masses(share_.sum(equals));
    if (rank >= before_ && rank - before_ < own_) {
      share_.place(rank - before_, equals, [&](int column) {
#pragma unroll 1
        for (int block = 0; block < exchange_.cluster.blocks; ++block) exchange_.tell_as(0, 0, column, block);
      });
    }
    exchange_.meet();
    return int(exchange_.heard(0, 0));
  }

  SampleScratch& scratch_;
  Exchange exchange_;
  const T* row_;
  int columns_;
  Share<T> share_;
  float top_ = 0, temperature_ = 1;
  int best_ = 0;
  double rest_ = 0;
  uint64_t own_ = 0, before_ = 0, all_ = 0;  // mass of the block, of the blocks before it, of all
  Kept kept_;
};

// A row whose parameters are out of range gets token 0 and a NaN, as one without a distribution does.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 2)
    sample_rows_kernel(SampleCall call, const T* logits, int64_t stride, int n, int share, int blocks) {
  SHARED(SampleScratch, scratch);
  const Cluster cluster(blocks);
  const int64_t row = int64_t(blockIdx.x) / cluster.blocks;
  const float temperature = call.temperature[row], cut = call.min_p_cut[row];
  const int64_t top_k = call.top_k[row], index = call.sample_index[row], position = call.position[row];
  const double top_p = call.top_p[row];
  const bool greedy = call.greedy[row];
  const bool in_range = temperature > 0.0f && temperature <= std::numeric_limits<float>::max() && cut >= 0.0f &&
                        top_p >= 0.0 && top_p <= 1.0 && top_k >= 0 && uint64_t(index) >> 32 == 0 &&
                        uint64_t(position) >> 32 == 0;
  Sampler<T> sampler(scratch, cluster, logits + row * stride, n, share);
  cluster.barrier();  // all blocks have begun
  const auto write = [&](int64_t token, float logprob) { call.token[row] = token, call.logprob[row] = logprob; };
  if (!sampler.find_top() || !in_range) {
    if (cluster.rank == 0 && threadIdx.x == 0) write(0, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const bool search = !greedy && (top_k > 0 || top_p < 1.0);
  sampler.weigh(temperature, search);
  const auto found = [&](int column) { write(column, float(-sampler.exact_u(column) - log1p(sampler.rest()))); };
  if (greedy) {
    if (cluster.rank == 0 && threadIdx.x == 0) found(sampler.best());
    return;
  }
  if (search || cut <= std::numeric_limits<float>::max()) sampler.filter(top_k, top_p, cut);
  sampler.draw(uniform(call.seed[row], call.stream[row], unsigned(index), unsigned(position)), found);
}

// Blocks of a row's cluster, where the chip has clusters.
inline int sample_blocks(int64_t n, bool clusters) {
  int blocks = 1;
  while (clusters && blocks < kMostBlocks && n > int64_t(blocks) * kLeastColumns) blocks *= 2;
  return blocks;
}

template <typename T>
void sample_rows(const SampleCall& call, const T* logits, int64_t stride, int64_t rows, int64_t n, bool clusters,
                 cudaStream_t stream) {
  if (rows == 0) return;
  const int blocks = sample_blocks(n, clusters);
  const int64_t unit = 32 * kPack<T>;  // so that a share begins on 16 bytes where its row does
  const int64_t share = (n + blocks * unit - 1) / (blocks * unit) * unit;
  launch_clusters(sample_rows_kernel<T>, dim3(unsigned(rows * blocks)), threads_for<T>(share), blocks, stream, call,
                  logits, stride, int(n), int(share), blocks);
}

}  // namespace cuda_rows
