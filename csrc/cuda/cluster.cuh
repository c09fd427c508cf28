// A thread-block cluster (sm_90): blocks that run at the same time, meet at barriers and write into one another's
// shared memory. Elsewhere a cluster is one block, and the same kernel text does without.
#pragma once
#include <type_traits>

#include "cuda/common.cuh"

namespace cuda_rows {

#if defined(RLHF_CUDA_ON_HOST)
constexpr bool kClusters = true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kClusters = true;
#define CLUSTER_BARRIER() asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory")
#else
constexpr bool kClusters = false;
#define CLUSTER_BARRIER() ((void)0)
#endif

// The cluster of a kernel that was launched by launch_clusters with as many blocks.
struct Cluster {
  int blocks, rank;  // rank: the own block's place in it

  __device__ explicit Cluster(int launched) : blocks(kClusters ? launched : 1), rank(int(blockIdx.x) % blocks) {}

  __device__ void barrier() const {
    if (kClusters && blocks > 1) {
      CLUSTER_BARRIER();
    } else {
      __syncthreads();
    }
  }

  // Writes to where `own`, in the own block's shared memory, lies in another block's. All blocks must have begun: after
  // a barrier.
  template <typename T>
  __device__ void store(T* own, std::type_identity_t<T> value, int block) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if defined(RLHF_CUDA_ON_HOST)
    *(blocks > 1 ? cuda_on_host::block.in_block(own, block) : own) = value;
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      unsigned there;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                   : "=r"(there)
                   : "r"(unsigned(__cvta_generic_to_shared(own))), "r"(block));
      if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(there), "r"(std::bit_cast<unsigned>(value)) : "memory");
      } else {
        const auto bits = std::bit_cast<unsigned long long>(value);
        asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(there), "l"(bits) : "memory");
      }
      return;
    }
#endif
    *own = value;
#endif
  }
};

// Clusters of `blocks` blocks that are neighbours in x.
template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, int threads, int blocks, cudaStream_t stream, A... args) {
#if defined(RLHF_CUDA_ON_HOST)
  cuda_on_host::launch_clusters(kernel, grid, dim3(threads), blocks, 0, args...);
#else
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
  config.attrs = &cluster, config.numAttrs = blocks > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, P(args)...);  // its error is found as any launch's
#endif
}

}  // namespace cuda_rows
