// Work in stages inside one parallel region: threads take a stage's items in turns and go on once all of it is done.
// Waking threads once a region and not once a stage is what makes a stage of a few microseconds worth dividing.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace {

class Stages {
 public:
  explicit Stages(int64_t most) : stages_(new Stage[size_t(most)]) {}

  struct alignas(64) Stage {
    std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  Stage& operator[](int64_t i) { return stages_[size_t(i)]; }

 private:
  const std::unique_ptr<Stage[]> stages_;
};

// One thread's way through the stages; all threads go the same way. They need not run at the same time: who comes first
// takes what there is, and waits only for what another has begun.
class Walk {
 public:
  explicit Walk(Stages& stages) : stages_(stages) {}

  template <typename F>
  void run(int64_t items, const F& f) {
    Stages::Stage& stage = stages_[at_++];
    int64_t mine = 0;
    for (int64_t i = take(stage); i < items; i = take(stage), ++mine) f(i);
    if (mine > 0) stage.done.fetch_add(mine, std::memory_order_release);
    for (int64_t turns = 0; stage.done.load(std::memory_order_acquire) < items; ++turns) {
      if (turns < kPatience) __builtin_ia32_pause();
      if (turns >= kPatience) std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kPatience = 1000;
  static int64_t take(Stages::Stage& stage) { return stage.taken.fetch_add(1, std::memory_order_relaxed); }

  Stages& stages_;
  int64_t at_ = 0;
};

}  // namespace
