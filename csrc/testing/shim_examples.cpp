// Small kernels that try the shim itself: what it computes, and what it must notice.
#define RLHF_CUDA_ON_HOST
#include "cuda/cluster.cuh"
#include "testing/host_entry.h"

namespace {

struct Values {
  int v[64];
};

// Each thread's value plus those of all threads before it, in a block of 64.
__global__ void scan(const int* in, int* out) {
  SHARED(Values, sums);
  const int t = threadIdx.x;
  sums.v[t] = in[blockIdx.x * blockDim.x + t];
  __syncthreads();
  for (int step = 1; step < int(blockDim.x); step *= 2) {
    const int before = t >= step ? sums.v[t - step] : 0;
    __syncthreads();
    sums.v[t] += before;
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + t] = sums.v[t];
}

// Eight results of one warp: shuffles of each kind, votes, an atomic count.
__global__ void warp_operations(int* out) {
  const int lane = threadIdx.x;
  int* own = out + 8 * lane;
  own[0] = __shfl_sync(0xFFFFFFFFu, lane * 10, 3);
  own[1] = __shfl_down_sync(0xFFFFFFFFu, lane, 4);
  own[2] = __shfl_up_sync(0xFFFFFFFFu, lane, 4, 16);
  own[3] = __shfl_xor_sync(0xFFFFFFFFu, lane, 5);
  own[4] = int(__ballot_sync(0xFFFFFFFFu, lane % 3 == 0));
  own[5] = lane < 8 ? __shfl_sync(0xFFu, lane + 100, lane ^ 1) : -1;
  __syncwarp();
  own[6] = atomicAdd(&out[8 * 32], lane);
  own[7] = __all_sync(0xFFFFFFFFu, lane < 32) + 2 * __any_sync(0xFFFFFFFFu, lane > 31);
}

__global__ void reversed(const double* in, double* out) {
  DYNAMIC_SHARED(double, held);
  held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

__global__ void most_of_a_barrier(int* out) {
  if (threadIdx.x < 48) {
    __syncthreads();
  } else {
    out[0] = __shfl_sync(0xFFFFFFFFu, 1, 0);
  }
}

__global__ void a_lane_not_in_its_mask() { __syncwarp(0xFFFFu); }

__global__ void lanes_that_never_come(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, 1, 1);
}

__global__ void unwritten(double* out) {
  SHARED(double, value);
  if (blockIdx.x == 0) value = 1;  // the second block must not find it
  out[blockIdx.x] = value;
}

__global__ void without_a_barrier(int* out) {
  SHARED(Values, held);
  held.v[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = held.v[(threadIdx.x + 63) % 64];  // the neighbour before, who has written only if it ran before
}

__global__ void off_its_boundary(float4* out) {
  out[0] = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(out) + 5);
}

__global__ void past_the_end(const float* in, float* out, int n) { out[0] = in[n]; }

__global__ void past_shared(int* out) {
  SHARED(Values, held);
  held.v[threadIdx.x] = 0;
  __syncthreads();
  out[0] = (&held.v[0])[64 + threadIdx.x];
}

struct Parts {
  float v[4];
};

// Each of a cluster's 4 blocks gives the others its number; each adds up what it got.
__global__ void cluster_sums(float* out) {
  SHARED(Parts, parts);
  const cuda_rows::Cluster cluster(4);
  cluster.barrier();
  if (threadIdx.x < 4) cluster.store(&parts.v[cluster.rank], float(blockIdx.x), int(threadIdx.x));
  cluster.barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = parts.v[0] + parts.v[1] + parts.v[2] + parts.v[3];
}

__global__ void cluster_without_a_barrier() {
  SHARED(Parts, parts);
  const cuda_rows::Cluster cluster(4);
  cluster.store(&parts.v[0], 1, (cluster.rank + 1) % 4);
}

__global__ void blocks_that_have_ended() {
  SHARED(Parts, parts);
  const cuda_rows::Cluster cluster(4);
  cluster.barrier();
  if (cluster.rank > 0) return;
  cluster.barrier();  // runs last: the others have ended
  cluster.store(&parts.v[0], 1, 1);
}

__global__ void part_of_a_cluster(float* out) {
  const cuda_rows::Cluster cluster(4);
  if (threadIdx.x < 8 || cluster.rank == 0) cluster.barrier();
  if (cluster.rank > 0) __syncthreads();
}

}  // namespace

using cuda_on_host::launch;
using cuda_on_host::launch_clusters;

extern "C" {
const char* run_scan(const int* in, int* out) {
  return guarded([&] { launch(scan, 3, 64, 0, in, out); });
}
const char* run_warp_operations(int* out) {
  return guarded([&] { launch(warp_operations, 1, 32, 0, out); });
}
const char* run_reversed(const double* in, double* out) {
  return guarded([&] { launch(reversed, 1, 100, 100 * sizeof(double), in, out); });
}
const char* run_most_of_a_barrier(int* out) {
  return guarded([&] { launch(most_of_a_barrier, 1, 64, 0, out); });
}
const char* run_a_lane_not_in_its_mask() {
  return guarded([&] { launch(a_lane_not_in_its_mask, 1, 32, 0); });
}
const char* run_lanes_that_never_come(int* out) {
  return guarded([&] { launch(lanes_that_never_come, 1, 32, 0, out); });
}
const char* run_unwritten(double* out) {
  return guarded([&] { launch(unwritten, 2, 1, 0, out); });
}
const char* run_without_a_barrier(int* out) {
  return guarded([&] { launch(without_a_barrier, 1, 64, 0, out); });
}
const char* run_off_its_boundary(float4* out) {
  return guarded([&] { launch(off_its_boundary, 1, 1, 0, out); });
}
const char* run_past_the_end(const float* in, float* out, int64_t n) {
  return guarded([&] { launch(past_the_end, 1, 1, 0, in, out, int(n)); });
}
const char* run_cluster_sums(float* out) {
  return guarded([&] { launch_clusters(cluster_sums, 8, 16, 4, 0, out); });
}
const char* run_cluster_without_a_barrier() {
  return guarded([&] { launch_clusters(cluster_without_a_barrier, 4, 1, 4, 0); });
}
const char* run_blocks_that_have_ended() {
  return guarded([&] { launch_clusters(blocks_that_have_ended, 4, 1, 4, 0); });
}
const char* run_part_of_a_cluster(float* out) {
  return guarded([&] { launch_clusters(part_of_a_cluster, 4, 16, 4, 0, out); });
}
const char* run_too_large_a_cluster(float* out) {
  return guarded([&] { launch_clusters(cluster_sums, 32, 16, 16, 0, out); });
}
const char* run_past_shared(int* out) {
  return guarded([&] { launch(past_shared, 1, 32, 0, out); });
}
const char* run_too_many_threads(int* out) {
  return guarded([&] { launch(warp_operations, 1, 2048, 0, out); });
}
}
