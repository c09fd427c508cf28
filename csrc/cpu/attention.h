// One job of attention on the CPU: the queries of one sequence that share one key/value head. What a job does is in
// attention_kernels.h; attention.cpp makes the jobs.
#pragma once

#include <cstdint>

namespace rlhf_kernels::attention {

// The element types: float, and bf16 as its 16 bits.
using bf16_bits = uint16_t;

// Where a sequence's keys and values of one head lie. Strides count elements.
template <typename T>
struct KeyRows {
  const T* k;
  const T* v;
  int64_t k_token, v_token;
  const int32_t* slices = nullptr;  // the sequence's slice table; null: its tokens lie one after another
  int64_t slice_tokens = 0, k_slice = 0, v_slice = 0;
};

struct Options {
  int64_t d, dv;
  int64_t group;  // query heads to one key/value head
  float scale;
  int64_t window;  // keys a query sees, itself included; 0: all
  float softcap;   // 0: none
};

template <typename T>
struct ForwardJob {
  Options options;
  KeyRows<T> keys;
  const T* q;  // at the job's first token and head
  int64_t q_token, q_head;
  T* out;  // contiguous heads of dv
  int64_t out_token;
  float* lse;  // one a head, log-sum-exp of the scores; null: not wanted
  int64_t lse_token;
  int64_t tokens, first_position;
};

template <typename T>
struct BackwardJob {
  Options options;
  const T *q, *k, *v, *out, *grad;  // at the sequence's first token and the job's first head
  int64_t q_token, q_head, k_token, v_token;
  int64_t out_token;  // of out and grad, whose heads are contiguous
  const float* lse;
  int64_t lse_token;
  T *dq, *dk, *dv;
  int64_t dq_token, dk_token, dv_token;
  int64_t tokens;
};

inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// Floats of scratch a job needs.
inline int64_t forward_scratch(const Options& o, int64_t tokens) {
  return tokens * o.group * (padded(o.d) + padded(o.dv) + 32) + 16 * (padded(o.d) + padded(o.dv)) + 64;
}
inline int64_t backward_scratch(const Options& o, int64_t tokens) {
  return tokens * o.group * (2 * padded(o.d) + padded(o.dv) + 3 + 32) + 16 * (3 * padded(o.d) + 3 * padded(o.dv)) + 96;
}

// scratch is aligned to 64 bytes.
void forward(const ForwardJob<float>& job, float* scratch);
void forward(const ForwardJob<bf16_bits>& job, float* scratch);
void backward(const BackwardJob<float>& job, float* scratch);
void backward(const BackwardJob<bf16_bits>& job, float* scratch);

}  // namespace rlhf_kernels::attention
