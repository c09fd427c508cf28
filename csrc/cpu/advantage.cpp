// Generalised advantage estimation over flat sequences, and its transpose.
//
// Everything but the recurrence A_t = delta_t + decay A_{t+1} is elementwise and vectorises. The recurrence is a chain
// of dependent additions, so kTogether sequences advance side by side. A mask that only cuts the tail shortens a
// sequence; one with holes has its valid tokens packed first. Operations and their order are the textbook loop's: equal
// to the bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kTogether = 8;

template <typename T>
void deltas(const T* rewards, const T* values, T last_value, T gamma, int64_t n, T* out) {
  for (int64_t t = 0; t + 1 < n; ++t) out[t] = rewards[t] + gamma * values[t + 1] - values[t];
  if (n > 0) out[n - 1] = rewards[n - 1] + gamma * last_value - values[n - 1];
}

template <typename T>
void add(const T* a, const T* b, int64_t n, T* out) {
  for (int64_t t = 0; t < n; ++t) out[t] = a[t] + b[t];
}

// x[i][t] += decay * x[i][t - kStep] for each of the n rows, from its first element (kStep 1) or its last (kStep -1).
template <int kStep, typename T>
void chain(const std::array<T*, kTogether>& x, const std::array<int64_t, kTogether>& lengths, int64_t n, T decay) {
  std::array<T*, kTogether> at = x;
  if (kStep < 0)
    for (int64_t i = 0; i < n; ++i) at[i] += lengths[i] - 1;
  const int64_t shared = n == kTogether ? *std::min_element(lengths.begin(), lengths.end()) : 0;
  T running[kTogether] = {};
  for (int64_t t = 0; t < shared; ++t) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTogether; ++i) running[i] = at[i][kStep * t] = at[i][kStep * t] + decay * running[i];
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t t = shared; t < lengths[i]; ++t) running[i] = at[i][kStep * t] = at[i][kStep * t] + decay * running[i];
}

// The valid tokens of one sequence: its first `count` tokens, or, where the mask has holes, the tokens at `places`.
struct Valid {
  int64_t count;
  bool holes;
  std::vector<int64_t> places;

  void find(const bool* mask, int64_t n) {
    holes = false;
    count = n;
    if (!mask) return;
    const void* end = std::memchr(mask, 0, n);
    if (!end) return;
    count = static_cast<const bool*>(end) - mask;
    holes = std::memchr(mask + count, 1, n - count) != nullptr;
    if (!holes) return;
    places.clear();
    for (int64_t t = 0; t < n; ++t)
      if (mask[t]) places.push_back(t);
    count = int64_t(places.size());
  }
  template <typename T>
  void pack(const T* in, std::vector<T>& out) const {
    out.resize(count);
    for (int64_t i = 0; i < count; ++i) out[i] = in[places[i]];
  }
  template <typename T>
  void unpack(const std::vector<T>& in, T* out) const {
    for (int64_t i = 0; i < count; ++i) out[places[i]] = in[i];
  }
};

template <typename T>
struct Sequence {
  Valid valid;
  std::vector<T> first, second, packed;  // packed inputs and the row of the chain, where the mask has holes
};

template <typename T>
struct Forward {
  const T *rewards, *values, *last_value;
  const bool* mask;
  T gamma, decay;
  T *advantages, *returns;

  // The row the chain runs over, holding the deltas.
  T* begin(Sequence<T>& s, int64_t b, int64_t start, int64_t n) const {
    s.valid.find(mask ? mask + start : nullptr, n);
    T* out = advantages + start;
    if (!s.valid.holes) {
      deltas(rewards + start, values + start, last_value[b], gamma, s.valid.count, out);
      std::fill(out + s.valid.count, out + n, T(0));
      return out;
    }
    s.valid.pack(rewards + start, s.first);
    s.valid.pack(values + start, s.second);
    s.packed.resize(s.valid.count);
    deltas(s.first.data(), s.second.data(), last_value[b], gamma, s.valid.count, s.packed.data());
    return s.packed.data();
  }
  void end(Sequence<T>& s, int64_t, int64_t start, int64_t n) const {
    if (!s.valid.holes) {
      add(advantages + start, values + start, s.valid.count, returns + start);
      std::fill(returns + start + s.valid.count, returns + start + n, T(0));
      return;
    }
    for (T* out : {advantages + start, returns + start}) std::fill(out, out + n, T(0));
    s.valid.unpack(s.packed, advantages + start);
    add(s.packed.data(), s.second.data(), s.valid.count, s.first.data());
    s.valid.unpack(s.first, returns + start);
  }
  static constexpr int kStep = -1;
};

template <typename T>
struct Backward {
  const T* grad;
  const bool* mask;
  T gamma, decay;
  T *grad_rewards, *grad_values, *grad_last;

  T* begin(Sequence<T>& s, int64_t, int64_t start, int64_t n) const {
    s.valid.find(mask ? mask + start : nullptr, n);
    T* out = grad_rewards + start;
    if (s.valid.holes) {
      s.valid.pack(grad + start, s.packed);
      return s.packed.data();
    }
    std::copy(grad + start, grad + start + s.valid.count, out);
    std::fill(out + s.valid.count, out + n, T(0));
    return out;
  }
  void end(Sequence<T>& s, int64_t b, int64_t start, int64_t n) const {
    const int64_t count = s.valid.count;
    const T* d = s.valid.holes ? s.packed.data() : grad_rewards + start;
    T* values = grad_values + start;
    if (s.valid.holes) {
      s.second.resize(count);
      values = s.second.data();
    } else {
      std::fill(values + count, values + n, T(0));
    }
    if (count > 0) values[0] = -d[0];
    for (int64_t t = 1; t < count; ++t) values[t] = gamma * d[t - 1] - d[t];
    grad_last[b] = count > 0 ? gamma * d[count - 1] : T(0);
    if (!s.valid.holes) return;
    std::fill(grad_rewards + start, grad_rewards + start + n, T(0));
    std::fill(grad_values + start, grad_values + start + n, T(0));
    s.valid.unpack(s.packed, grad_rewards + start);
    s.valid.unpack(s.second, grad_values + start);
  }
  static constexpr int kStep = 1;
};

template <typename T, template <typename> class Scan>
void run(const Scan<T>& scan, const Tensor& starts) {
  const auto* s = static_cast<const int64_t*>(starts.data_ptr());
  torch::stable::parallel_for(0, starts.size(0) - 1, kTogether, [&](int64_t lo, int64_t hi) {
    std::array<Sequence<T>, kTogether> group;
    std::array<T*, kTogether> rows{};
    std::array<int64_t, kTogether> lengths{};
    for (int64_t b = lo; b < hi; b += kTogether) {
      const int64_t n = std::min(kTogether, hi - b);
      for (int64_t i = 0; i < n; ++i) {
        rows[i] = scan.begin(group[i], b + i, s[b + i], s[b + i + 1] - s[b + i]);
        lengths[i] = group[i].valid.count;
      }
      chain<Scan<T>::kStep>(rows, lengths, n, scan.decay);
      for (int64_t i = 0; i < n; ++i) scan.end(group[i], b + i, s[b + i], s[b + i + 1] - s[b + i]);
    }
  });
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

const bool* mask_data(const std::optional<Tensor>& mask) { return mask ? data<bool>(*mask) : nullptr; }

template <typename T>
void forward(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask, const Tensor& starts,
             const Tensor& last_value, double gamma, double lam, const Tensor& advantages, const Tensor& returns) {
  run(Forward<T>{data<T>(rewards), data<T>(values), data<T>(last_value), mask_data(mask), T(gamma), T(gamma * lam),
                 data<T>(advantages), data<T>(returns)},
      starts);
}

template <typename T>
void backward(const Tensor& grad, const std::optional<Tensor>& mask, const Tensor& starts, double gamma, double lam,
              const Tensor& rewards, const Tensor& values, const Tensor& last) {
  run(Backward<T>{data<T>(grad), mask_data(mask), T(gamma), T(gamma * lam), data<T>(rewards), data<T>(values),
                  data<T>(last)},
      starts);
}

std::tuple<Tensor, Tensor> gae_rows(Tensor rewards, Tensor values, std::optional<Tensor> mask, Tensor starts,
                                    Tensor last_value, double gamma, double lam) {
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  const auto scan = rewards.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  scan(rewards, values, mask, starts, last_value, gamma, lam, advantages, returns);
  return {advantages, returns};
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
