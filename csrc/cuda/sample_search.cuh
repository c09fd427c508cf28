// Where a filter ends in a row that a cluster of blocks shares: a radix search over the bits of u.
//
// Tokens are ordered by (u, index), and a filter keeps a prefix of that order: the shortest whose count, or mass,
// reaches a goal. Each block counts its tokens by a digit of u in shared memory; integers make the sums independent of
// the order of additions. Digits of 11, 10 and 10 bits.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/sample_weights.cuh"

namespace cuda_rows {

constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kGroup = 64;      // digits that are added up first
constexpr int kGroups = 17;
constexpr int kBins = kGroup * kGroups;
static_assert(kBins > int(kLastKey >> 20) && kBins >= 1 << 10, "the first digit, and the others");

// What the blocks of a cluster tell one another. Two sets of slots in turn: a block that already tells the next thing
// writes where none still reads.
struct Exchange {
  struct Slots {
    uint64_t value[2][2 * kGroup][kMostBlocks];
  };

  const Cluster& cluster;
  Slots& slots;
  int turn = 0;

  __device__ void tell(int slot, uint64_t value, int block) { tell_as(cluster.rank, slot, value, block); }
  __device__ void tell_as(int rank, int slot, uint64_t value, int block) {
    cluster.store(&slots.value[turn][slot][rank], value, block);
  }
  // To all blocks, by as many threads; every thread of the block calls it.
  __device__ void tell_all(int slot, uint64_t value) {
    if (int(threadIdx.x) < cluster.blocks) tell(slot, value, threadIdx.x);
  }
  __device__ void meet() { cluster.barrier(), turn ^= 1; }
  __device__ uint64_t heard(int slot, int rank) const { return slots.value[turn ^ 1][slot][rank]; }
  __device__ uint64_t heard_sum(int slot) const {
    uint64_t sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < cluster.blocks; ++rank) sum += heard(slot, rank);
    return sum;
  }
};

// Count and mass by digit; a mass in two words, the carry taken over by hand: shared memory adds 32 bits at once.
struct Bins {
  unsigned count[kBins], low[kBins], high[kBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) count[i] = low[i] = high[i] = 0;
  }
  __device__ void add(unsigned digit, uint64_t mass) {
    atomicAdd(&count[digit], 1u);
    const unsigned part = unsigned(mass), before = atomicAdd(&low[digit], part);
    const unsigned carried = unsigned(mass >> 32) + (before + part < before);
    if (carried != 0) atomicAdd(&high[digit], carried);
  }
  __device__ uint64_t mass(int digit) const { return uint64_t(high[digit]) << 32 | low[digit]; }
};

struct Amount {
  uint64_t count = 0, mass = 0;

  __device__ void add(const Amount& other) { count += other.count, mass += other.mass; }
};

struct Goal {
  uint64_t value;
  bool by_mass;

  __device__ bool reached(const Amount& amount) const { return (by_mass ? amount.mass : amount.count) >= value; }
};

__device__ inline Amount warp_sum(Amount own) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    own.add({__shfl_xor_sync(kWarp, own.count, step), __shfl_xor_sync(kWarp, own.mass, step)});
  }
  return own;
}

// Of 32 places in order, one a lane, the first with which the goal is reached, and what is there; -1: none. `before`
// grows by the places before it.
__device__ inline int first_to_reach(const Goal& goal, const Amount& own, Amount& before, Amount& there) {
  const int lane = int(threadIdx.x) % 32;
  Amount upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Amount lower{__shfl_up_sync(kWarp, upto.count, step), __shfl_up_sync(kWarp, upto.mass, step)};
    if (lane >= step) upto.add(lower);
  }
  upto.add(before);
  const unsigned votes = __ballot_sync(kWarp, goal.reached(upto));
  const int place = votes != 0 ? __ffs(votes) - 1 : 31;
  there = {__shfl_sync(kWarp, own.count, place), __shfl_sync(kWarp, own.mass, place)};
  before = {__shfl_sync(kWarp, upto.count, place), __shfl_sync(kWarp, upto.mass, place)};
  if (votes == 0) return -1;
  before.count -= there.count, before.mass -= there.mass;
  return place;
}

// The digit with which the goal is reached in all blocks' bins together, -1 if it is not; every thread gets it. The
// bins must be complete: after a barrier. Afterwards they may be cleared.
__device__ inline int find_digit(const Bins& bins, const Goal& goal, Exchange& exchange, Amount& before,
                                 Amount& there) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  const int blocks = exchange.cluster.blocks;
#pragma unroll 1
  for (int group = warp; group < kGroups; group += warps) {
    const int one = group * kGroup + lane, two = one + 32;
    const Amount sum = warp_sum({uint64_t(bins.count[one]) + bins.count[two], bins.mass(one) + bins.mass(two)});
    if (lane < blocks) exchange.tell(group, sum.count, lane), exchange.tell(kGroup + group, sum.mass, lane);
  }
  exchange.meet();
  Amount own;
  if (lane < kGroups) own = {exchange.heard_sum(lane), exchange.heard_sum(kGroup + lane)};
  const int group = first_to_reach(goal, own, before, there);
  if (group < 0) return -1;
#pragma unroll 1
  for (int i = threadIdx.x; i < kGroup * blocks; i += blockDim.x) {
    const int slot = i % kGroup, bin = group * kGroup + slot;
    exchange.tell(slot, bins.count[bin], i / kGroup);
    exchange.tell(kGroup + slot, bins.mass(bin), i / kGroup);
  }
  exchange.meet();
#pragma unroll 1
  for (int half = 0; half < kGroup; half += 32) {
    own = {exchange.heard_sum(half + lane), exchange.heard_sum(kGroup + half + lane)};
    const int place = first_to_reach(goal, own, before, there);
    if (place >= 0) return group * kGroup + half + place;
  }
  return -1;  // not reached: the group's sum was
}

}  // namespace cuda_rows
