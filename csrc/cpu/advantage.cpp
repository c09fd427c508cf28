// Generalised advantage estimation over flat sequences, and its transpose: one scan a sequence. A scan is a chain of
// dependent additions, so each thread runs kTogether sequences side by side to keep the pipeline full.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kTogether = 8;

template <typename T>
struct Forward {
  const T *rewards, *values, *last_value;
  const bool* mask;  // null: every token is valid
  T gamma, decay;    // decay = gamma * lam
  T* advantages;

  struct State {
    T next_value, running;
    int64_t place;  // one past the token to come
  };
  State start(int64_t b, const int64_t* starts) const { return {last_value[b], T(0), starts[b + 1]}; }
  void step(State& s) const {
    const int64_t t = --s.place;
    const bool valid = !mask || mask[t];
    const T value = values[t];
    const T running = rewards[t] + gamma * s.next_value - value + decay * s.running;
    advantages[t] = valid ? running : T(0);
    s.running = valid ? running : s.running;
    s.next_value = valid ? value : s.next_value;
  }
  void finish(const State&, int64_t) const {}
};

template <typename T>
struct Backward {
  const T* grad;
  const bool* mask;
  T gamma, decay;
  T *grad_rewards, *grad_values, *grad_last;

  struct State {
    T running;
    int64_t place;
  };
  State start(int64_t b, const int64_t* starts) const { return {T(0), starts[b]}; }
  void step(State& s) const {
    const int64_t t = s.place++;
    const bool valid = !mask || mask[t];
    const T running = grad[t] + decay * s.running;
    grad_rewards[t] = valid ? running : T(0);
    grad_values[t] = valid ? gamma * s.running - running : T(0);
    s.running = valid ? running : s.running;
  }
  void finish(const State& s, int64_t b) const { grad_last[b] = gamma * s.running; }
};

// Runs sequences [lo, hi), kTogether at a time: in step while all of the group have tokens, then each to its end.
template <typename Scan>
void run(const Scan& scan, const int64_t* starts, int64_t lo, int64_t hi) {
  for (int64_t first = lo; first < hi; first += kTogether) {
    const int64_t n = std::min(kTogether, hi - first);
    std::array<typename Scan::State, kTogether> states;
    int64_t shared = starts[first + 1] - starts[first];
    for (int64_t i = 0; i < n; ++i) {
      states[i] = scan.start(first + i, starts);
      shared = std::min(shared, starts[first + i + 1] - starts[first + i]);
    }
    if (n == kTogether) {
      for (int64_t t = 0; t < shared; ++t)
        for (int64_t i = 0; i < kTogether; ++i) scan.step(states[i]);
    } else {
      shared = 0;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t left = starts[first + i + 1] - starts[first + i] - shared;
      for (int64_t t = 0; t < left; ++t) scan.step(states[i]);
      scan.finish(states[i], first + i);
    }
  }
}

template <typename Scan>
void run_all(const Scan& scan, const Tensor& starts) {
  const auto* s = static_cast<const int64_t*>(starts.data_ptr());
  torch::stable::parallel_for(0, starts.size(0) - 1, kTogether, [&](int64_t lo, int64_t hi) { run(scan, s, lo, hi); });
}

const bool* mask_data(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
}

template <typename T>
void forward(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask, const Tensor& starts,
             const Tensor& last_value, double gamma, double lam, Tensor& out) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.data_ptr()); };
  const Forward<T> scan{data(rewards),
                        data(values),
                        data(last_value),
                        mask_data(mask),
                        T(gamma),
                        T(gamma * lam),
                        static_cast<T*>(out.data_ptr())};
  run_all(scan, starts);
}

template <typename T>
void backward(const Tensor& grad, const std::optional<Tensor>& mask, const Tensor& starts, double gamma, double lam,
              Tensor& rewards, Tensor& values, Tensor& last) {
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
  const Backward<T> scan{data(grad),    mask_data(mask), T(gamma),  T(gamma * lam),
                         data(rewards), data(values),    data(last)};
  run_all(scan, starts);
}

Tensor gae_rows(Tensor rewards, Tensor values, std::optional<Tensor> mask, Tensor starts, Tensor last_value,
                double gamma, double lam) {
  Tensor out = torch::stable::empty_like(rewards);
  const auto scan = rewards.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  scan(rewards, values, mask, starts, last_value, gamma, lam, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gae_rows_backward(Tensor grad, std::optional<Tensor> mask, Tensor starts,
                                                     double gamma, double lam) {
  Tensor rewards = torch::stable::empty_like(grad), values = torch::stable::empty_like(grad);
  Tensor last = torch::stable::new_empty(grad, {starts.size(0) - 1});
  const auto scan = grad.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  scan(grad, mask, starts, gamma, lam, rewards, values, last);
  return {rewards, values, last};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("gae_rows", TORCH_BOX(&gae_rows));
  m.impl("gae_rows_backward", TORCH_BOX(&gae_rows_backward));
}
