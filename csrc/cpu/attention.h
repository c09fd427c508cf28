// One job of attention on the CPU: queries of some key/value heads, of one sequence or of several that share their
// first keys. What a job does is in attention_forward.h and attention_backward.h; attention.cpp makes the jobs.
#pragma once

#include <cstdint>

namespace rlhf_kernels::attention {

// The element types: float, and bf16 as its 16 bits.
using bf16_bits = uint16_t;

constexpr int64_t BLOCK = 32;    // keys of a block of the forward pass
constexpr int64_t CHUNK = 512;   // keys that are summed up before they join the total; a job may take some chunks alone
constexpr float NEVER = -1e30f;  // a maximum before any key; finite, so that NEVER - NEVER is no NaN

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
struct Token {  // a query position, at the job's first head
  const T* q;
  T* out;      // contiguous heads of dv
  float* lse;  // one a head, log-sum-exp of the scores; null: not wanted
  int64_t position;
};

// Keys [begin, end) of a sequence, begin a multiple of BLOCK, for some of the job's tokens.
template <typename T>
struct Phase {
  KeyRows<T> keys;
  int64_t begin, end;
  int64_t first_token, tokens;
};

template <typename T>
struct ForwardJob {
  Options options;
  int64_t q_head;
  const Token<T>* tokens;
  int64_t token_count;
  const Phase<T>* phases;  // in order: a token's phases rise
  int64_t phase_count;
  // Key/value heads it takes, and from one to the next how far keys and values lie; q, out and lse go on behind.
  int64_t heads = 1, k_head = 0, v_head = 0;
  // Not null: the job, of one head, takes some chunks of one phase and leaves their states [chunk, row, state_floats]
  // here.
  float* states = nullptr;
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

inline int64_t padded(int64_t width, int64_t to = 16) { return (width + to - 1) / to * to; }

// A row's running softmax: its output so far, 16 partial sums of weights, the maximum.
inline int64_t state_floats(const Options& o) { return padded(o.dv, 32) + 32; }

// Floats of scratch a job needs.
inline int64_t forward_scratch(const Options& o, int64_t tokens) {
  const int64_t d = padded(o.d), dv = padded(o.dv, 32);
  return padded(tokens * o.group * (d + 2 * state_floats(o) + 1)) + (BLOCK + 1) * (d + dv) + 16;
}
inline int64_t backward_scratch(const Options& o, int64_t tokens) {
  return tokens * o.group * (2 * padded(o.d) + padded(o.dv) + 3 + 32) + 16 * (3 * padded(o.d) + 3 * padded(o.dv)) + 96;
}

// scratch is aligned to 64 bytes. next: the job after this one, whose first keys are called for; or null.
void forward(const ForwardJob<float>& job, const ForwardJob<float>* next, float* scratch);
void forward(const ForwardJob<bf16_bits>& job, const ForwardJob<bf16_bits>* next, float* scratch);
// The results of a job whose chunks were taken apart, from the states of all of them in order.
void finish(const ForwardJob<float>& job, const float* states, int64_t chunks, float* scratch);
void finish(const ForwardJob<bf16_bits>& job, const float* states, int64_t chunks, float* scratch);
void backward(const BackwardJob<float>& job, float* scratch);
void backward(const BackwardJob<bf16_bits>& job, float* scratch);

}  // namespace rlhf_kernels::attention
