// Runs CUDA kernels on the CPU, so that tests check their numbers and barriers where there is no GPU. One cluster of
// blocks after the other (mostly of one block); each thread of it is a fiber, which runs until it waits for its
// cluster, block or warp. The order of threads is fixed, so a run is deterministic. A kernel file includes this in
// nvcc's place (see cuda/common.cuh).
//
// What it finds beside wrong numbers: a barrier or warp operation that some threads never reach (an error that says who
// waits where), shared memory read before it is written (it starts as NaN), another block's shared memory used before
// that block has surely begun or after it has ended, and, with -fsanitize=address, accesses outside global or shared
// arrays. A missing barrier shows when threads run in the other order (Block::backwards).
// Memory order beyond that, and speed, it cannot show.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;
using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
// volatile: no compiler then fuses the operation with another
inline float __fmul_rn(float a, float b) {
  const volatile float rounded = a * b;
  return rounded;
}
inline float __fadd_rn(float a, float b) {
  const volatile float rounded = a + b;
  return rounded;
}
inline float __fsub_rn(float a, float b) { return __fadd_rn(a, -b); }
inline float __fdiv_rn(float a, float b) {
  const volatile float rounded = a / b;
  return rounded;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }

namespace cuda_on_host {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr uint8_t kPoison = 0xFF;  // as fp32 and fp64 a NaN, as an index -1

enum class Wait { nothing, cluster, block, warp, ended };

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf resting;     // where it waits
  bool begun = false;
  char* stack = nullptr;
  Wait wait = Wait::ended;
  unsigned mask = 0;   // lanes of the warp operation
  int source = 0;      // the lane whose value is wanted
  uint64_t value = 0;  // given, then received
  bool vote = false;
  const char* where = "";
  void* fake_stack = nullptr;
};

class Block {
 public:
  ~Block() {
    for (Fiber& fiber : fibers_) {
      if (fiber.stack != nullptr) munmap(fiber.stack, kStackBytes);
    }
  }

  // A cluster of `blocks` blocks of `threads` threads each running `body`; `first` is its first block's blockIdx.
  void run(dim3 first, int blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body) {
    first_ = first, blocks_ = blocks, threads_ = threads, body_ = &body, failure_ = nullptr, met_ = false;
    const int all = blocks * threads;
    alive_ = all;
    fibers_.resize(std::max<size_t>(fibers_.size(), all));
    shared_.clear();
    dynamic_.clear();
    for (int b = 0; b < blocks; ++b) dynamic_.push_back(poisoned(dynamic_bytes));
    for (int t = 0; t < all; ++t) start(fibers_[t]);
    while (alive_ > 0) {
      bool moved = false;
      for (int k = 0; k < blocks; ++k) {  // each as far as it gets without the others
        while (advance(backwards ? blocks - 1 - k : k)) moved = true;
      }
      if (release(Wait::cluster, 0, all)) met_ = true;
      if (!moved && !anyone_ready()) throw std::runtime_error(deadlock());
    }
  }

  void wait_for_block(const char* where) { pause(Wait::block, where); }
  void wait_for_cluster(const char* where) { pause(Wait::cluster, where); }

  // Gives `value` to the lanes of `mask` and returns that of lane `source`; `votes` receives every lane's vote.
  uint64_t exchange(unsigned mask, uint64_t value, int source, bool vote, unsigned* votes, const char* where) {
    Fiber& me = fibers_[current_];
    me.mask = mask, me.value = value, me.source = source, me.vote = vote;
    if (!(mask >> lane() & 1)) throw std::runtime_error(std::string(where) + ": a lane not in its mask");
    pause(Wait::warp, where);
    if (votes != nullptr) *votes = me.mask;
    return me.value;
  }

  // Runs the last thread first: results that differ then depend on an order that a barrier should have fixed.
  bool backwards = false;

  int lane() const { return current_ % threads_ % warpSize; }
  void* dynamic() { return dynamic_[current_ / threads_].get(); }

  // The block's own copy of the shared variable that `tag` names; the first thread that gets there makes it.
  void* shared(const void* tag, size_t bytes) { return shared_of(current_ / threads_, tag, bytes); }

  // Where another block of the cluster has what the own one has at `p` in a shared variable.
  template <typename T>
  T* in_block(T* p, int block) {
    if (block < 0 || block >= blocks_) throw std::runtime_error("a block outside the cluster");
    if (!met_) throw std::runtime_error("another block's shared memory before a barrier of the cluster: has it begun?");
    const auto begin = fibers_.begin() + block * threads_;
    if (std::all_of(begin, begin + threads_, [](const Fiber& f) { return f.wait == Wait::ended; })) {
      throw std::runtime_error("the shared memory of a block that has ended");
    }
    const char* const at = reinterpret_cast<const char*>(p);
    for (const auto& [key, found] : shared_) {
      const char* const start = static_cast<const char*>(found.memory.get());
      if (key.first == current_ / threads_ && at >= start && at < start + found.bytes) {
        char* const there = static_cast<char*>(shared_of(block, key.second, found.bytes));
        return reinterpret_cast<T*>(there + (at - start));
      }
    }
    throw std::runtime_error("an address outside the block's shared variables");
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<void, Free>;
  struct Variable {
    Memory memory;
    size_t bytes = 0;
  };

  void* shared_of(int block, const void* tag, size_t bytes) {
    Variable& found = shared_[{block, tag}];
    if (!found.memory) found = {poisoned(bytes), bytes};
    return found.memory.get();
  }

  static Memory poisoned(size_t bytes) {
    if (bytes == 0) return nullptr;
    void* p = nullptr;
    if (posix_memalign(&p, 16, bytes) != 0) throw std::bad_alloc();
    std::memset(p, kPoison, bytes);
    return Memory(p);
  }

  void start(Fiber& fiber) {
    if (fiber.stack == nullptr) {
      void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      fiber.stack = static_cast<char*>(p);
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    fiber.wait = Wait::nothing, fiber.where = "its end", fiber.fake_stack = nullptr, fiber.begun = false;
  }

  // Resumes every thread of a block that waits for nothing; false where there is none.
  bool advance(int b) {
    bool moved = false;
    for (int k = 0; k < threads_; ++k) {
      const int t = b * threads_ + (backwards ? threads_ - 1 - k : k);
      if (fibers_[t].wait != Wait::nothing) continue;
      moved = true;
      resume(t);
      if (failure_) std::rethrow_exception(failure_);
      if (fibers_[t].wait == Wait::ended) --alive_;
    }
    for (int t = 0; t < threads_; t += warpSize) release_warp(b * threads_ + t, std::min(warpSize, threads_ - t));
    release(Wait::block, b * threads_, (b + 1) * threads_);
    return moved;
  }

  static void enter();

  // Fibers begin by setcontext and go on by longjmp, which, unlike swapcontext, makes no system call. The address
  // sanitizer follows the former only.
  __attribute__((noinline)) void resume(int t) {
    Fiber& fiber = fibers_[t];
    current_ = t;
    const int k = t % threads_;
    threadIdx = dim3(k % blockDim.x, k / blockDim.x % blockDim.y, k / (blockDim.x * blockDim.y));
    blockIdx = dim3(first_.x + t / threads_, first_.y, first_.z);
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack, kStackBytes);
    swapcontext(&main_, &fiber.context);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#else
    if (_setjmp(resting_) != 0) return;
    if (fiber.begun) _longjmp(fiber.resting, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
#endif
  }

  __attribute__((noinline)) void pause(Wait why, const char* where) {
    Fiber& me = fibers_[current_];
    me.wait = why, me.where = where;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(why == Wait::ended ? nullptr : &me.fake_stack, main_stack_, main_bytes_);
    swapcontext(&me.context, &main_);
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#else
    if (_setjmp(me.resting) == 0) _longjmp(resting_, 1);
#endif
  }

  bool anyone_ready() const {
    for (int t = 0; t < blocks_ * threads_; ++t) {
      if (fibers_[t].wait == Wait::nothing) return true;
    }
    return false;
  }

  // Ends the wait of the threads [begin, end) for one another once every one that has not ended is there.
  bool release(Wait what, int begin, int end) {
    for (int t = begin; t < end; ++t) {
      if (fibers_[t].wait != what && fibers_[t].wait != Wait::ended) return false;
    }
    for (int t = begin; t < end; ++t) {
      if (fibers_[t].wait == what) fibers_[t].wait = Wait::nothing;
    }
    return true;
  }

  void release_warp(int first, int lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& asked = fibers_[first + lane];
      if (asked.wait != Wait::warp) continue;
      const unsigned mask = asked.mask;
      bool complete = true;
      for (int k = 0; k < warpSize; ++k) {
        if (!(mask >> k & 1)) continue;
        const Fiber* other = k < lanes ? &fibers_[first + k] : nullptr;
        complete &= other != nullptr && other->wait == Wait::warp && other->mask == mask && other->where == asked.where;
      }
      if (complete) deliver(first, mask);
    }
  }

  void deliver(int first, unsigned mask) {
    uint64_t given[warpSize];
    unsigned votes = 0;
    for (int k = 0; k < warpSize; ++k) {
      if (!(mask >> k & 1)) continue;
      given[k] = fibers_[first + k].value;
      votes |= unsigned(fibers_[first + k].vote) << k;
    }
    for (int k = 0; k < warpSize; ++k) {
      if (!(mask >> k & 1)) continue;
      Fiber& fiber = fibers_[first + k];
      if (!(mask >> fiber.source & 1)) {
        throw std::runtime_error(std::string(fiber.where) + ": lane " + std::to_string(k) + " reads lane " +
                                 std::to_string(fiber.source) + ", which is not in the mask");
      }
      fiber.value = given[fiber.source], fiber.mask = votes, fiber.wait = Wait::nothing;
    }
  }

  std::string deadlock() const {
    std::map<std::string, std::pair<int, int>> waiting;  // where -> how many, and the first of them
    for (int t = 0; t < blocks_ * threads_; ++t) {
      const Fiber& fiber = fibers_[t];
      const auto [it, first] = waiting.try_emplace(fiber.wait == Wait::ended ? "its end" : fiber.where, 0, t);
      ++it->second.first;
    }
    std::string text = "the threads of a block wait for one another in different places:";
    for (const auto& [where, who] : waiting) {
      text += " " + std::to_string(who.first) + " (first: thread " + std::to_string(who.second) + ") at " + where + ";";
    }
    return text;
  }

  std::vector<Fiber> fibers_;
  std::map<std::pair<int, const void*>, Variable> shared_;  // by block and tag
  std::vector<Memory> dynamic_;
  ucontext_t main_;
  jmp_buf resting_;
  [[maybe_unused]] const void* main_stack_ = nullptr;
  [[maybe_unused]] size_t main_bytes_ = 0;
  dim3 first_;
  int blocks_ = 1, threads_ = 0, current_ = 0, alive_ = 0;
  bool met_ = false;  // the cluster's blocks have all begun
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
};

inline Block block;

inline void Block::enter() {
  Block& b = block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.main_stack_, &b.main_bytes_);
#endif
  try {
    (*b.body_)();
  } catch (...) {
    b.failure_ = std::current_exception();
  }
  b.pause(Wait::ended, "its end");
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* where) {
  const uint64_t bits = block.exchange(mask, to_bits(value), source, false, nullptr, where);
  T out;
  std::memcpy(&out, &bits, sizeof(T));
  return out;
}

inline unsigned ballot(unsigned mask, bool vote, const char* where) {
  unsigned votes = 0;
  block.exchange(mask, 0, block.lane(), vote, &votes, where);
  return votes;
}

// Which lane a shuffle reads: its own where the wanted one lies outside its segment of `width` lanes.
inline int down(int delta, int width) {
  const int lane = block.lane();
  return lane % width + delta < width ? lane + delta : lane;
}
inline int up(int delta, int width) {
  const int lane = block.lane();
  return lane % width >= delta ? lane - delta : lane;
}
inline int across(int bits, int width) {
  const int lane = block.lane(), other = lane ^ bits;
  return other / width <= lane / width ? other : lane;
}
inline int within(int source, int width) {
  const int lane = block.lane();
  return lane - lane % width + source % width;
}

// `cluster` blocks that are neighbours in x run together.
template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, dim3 threads, int cluster, size_t dynamic_bytes, A... args) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  if (count == 0 || count > kMostThreads) throw std::runtime_error("a block of " + std::to_string(count) + " threads");
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    throw std::runtime_error("a grid that CUDA would refuse");
  }
  if (cluster < 1 || cluster > 8 || grid.x % cluster != 0) throw std::runtime_error("a cluster that CUDA would refuse");
  gridDim = grid, blockDim = threads;
  const std::function<void()> body = [&] { kernel(P(args)...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        block.run(dim3(x, y, z), cluster, int(count), dynamic_bytes, body);
      }
    }
  }
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t dynamic_bytes, A... args) {
  launch_clusters(kernel, grid, threads, 1, dynamic_bytes, args...);
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_TEXT_(x) #x
#define CUDA_ON_HOST_TEXT(x) CUDA_ON_HOST_TEXT_(x)
#define CUDA_ON_HOST_AT(what) what " (" __FILE__ ":" CUDA_ON_HOST_TEXT(__LINE__) ")"

#define __syncthreads() cuda_on_host::block.wait_for_block(CUDA_ON_HOST_AT("__syncthreads"))
#define CLUSTER_BARRIER() cuda_on_host::block.wait_for_cluster(CUDA_ON_HOST_AT("a barrier of the cluster"))
#define CUDA_ON_HOST_FIRST_(x, ...) x
#define __syncwarp(...) \
  cuda_on_host::ballot(CUDA_ON_HOST_FIRST_(__VA_OPT__(__VA_ARGS__, ) 0xFFFFFFFFu), false, CUDA_ON_HOST_AT("__syncwarp"))
#define __ballot_sync(mask, vote) cuda_on_host::ballot(mask, vote, CUDA_ON_HOST_AT("__ballot_sync"))
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, !(vote)) == 0)

#define CUDA_ON_HOST_WIDTH_(width, ...) width
#define CUDA_ON_HOST_SHUFFLE_(name, mask, value, lane_of, by, ...)                                          \
  cuda_on_host::shuffle(mask, value,                                                                        \
                        cuda_on_host::lane_of(by, CUDA_ON_HOST_WIDTH_(__VA_OPT__(__VA_ARGS__, ) warpSize)), \
                        CUDA_ON_HOST_AT(name))
#define __shfl_sync(mask, value, source, ...) \
  CUDA_ON_HOST_SHUFFLE_("__shfl_sync", mask, value, within, source, __VA_ARGS__)
#define __shfl_down_sync(mask, value, delta, ...) \
  CUDA_ON_HOST_SHUFFLE_("__shfl_down_sync", mask, value, down, delta, __VA_ARGS__)
#define __shfl_up_sync(mask, value, delta, ...) \
  CUDA_ON_HOST_SHUFFLE_("__shfl_up_sync", mask, value, up, delta, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, bits, ...) \
  CUDA_ON_HOST_SHUFFLE_("__shfl_xor_sync", mask, value, across, bits, __VA_ARGS__)

// A shared variable, and the launch's dynamic shared memory; see cuda/common.cuh for the same names under nvcc.
#define SHARED(type, name)          \
  static const char name##_tag = 0; \
  type& name = *static_cast<type*>(cuda_on_host::block.shared(&name##_tag, sizeof(type)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_host::block.dynamic())

// Threads run one at a time, so plain reads and writes are atomic.
template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <typename T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = value > old ? value : old;
  return old;
}
template <typename T>
T atomicMin(T* p, T value) {
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}
template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <typename T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
inline void __threadfence() {}
