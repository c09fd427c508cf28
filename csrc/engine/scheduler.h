// What runs in the next step of a generate call: admission, prefix sharing, preemption, refill.
//
// A sequence's number is its rank: the smaller number never gives way to the larger. The running sequences are always
// the smallest unfinished numbers, so the waiting ones are simply those from `next_` on. When slices run out, the
// youngest running sequence gives its slices back, keeps its tokens, and is computed again later.
// A step is planned in rank order: one token of every decoding sequence, and pieces of prompts up to `step_tokens`.
// Attention writes a step's keys before it reads any, so a sequence may read slices that an older one fills in this
// step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "block_pool.h"
#include "prefix_tree.h"
#include "step.h"

namespace rlhf_engine {

enum class State { kWaiting, kRunning, kDone };

struct StopRule {
  std::vector<int> eos;   // finish reason "eos"
  std::vector<int> stop;  // finish reason "stop"
};

// What the samples of a prompt share.
struct Prompt {
  std::vector<int> tokens;
  std::vector<int> path;  // its nodes in the prefix tree
};

struct Sequence {
  int owner = 0;                // its Prompt
  int prompt = 0;               // tokens in the prompt
  std::vector<int> completion;  // what was generated
  std::vector<float> logprobs;  // of the generated tokens
  int limit = 0;                // most tokens in all
  int rule = 0;                 // its StopRule
  int passed = 0;               // how many of the prompt's nodes it leases, computes or has replaced by its own slice
  std::vector<int> table;       // its slices
  int fed = 0;                  // tokens whose keys and values are in the arena by the end of this step
  int farthest = 0;             // the most `fed` has been: what is fed again below it is recomputed
  State state = State::kWaiting;
  const char* reason = "";  // finish reason, once done

  int generated() const { return static_cast<int>(completion.size()); }
  int length() const { return prompt + generated(); }
};

struct Counters {
  int64_t steps = 0, rows = 0, preemptions = 0;
  int64_t prefix_tokens_shared = 0;  // prompt tokens whose keys and values another sequence had computed
  int64_t prompt_tokens_computed = 0, recomputed_tokens = 0, generated_tokens = 0;
};

class Scheduler {
 public:
  Scheduler(int num_slices, int slice_tokens, int max_active, int step_tokens);

  int add_rule(StopRule rule);
  int add(std::vector<int> prompt, int max_new_tokens, int rule, int samples = 1);  // returns the first one's number
  void set_draws(DrawColumns columns);                                              // one entry a sequence
  bool unfinished() const { return done_ < static_cast<int>(sequences_.size()); }
  const Step& plan();
  std::vector<int> commit(const int64_t* tokens, const float* logprobs, int count);  // returns who finished

  void pack(const StepSizes& sizes, uint8_t* out, size_t bytes) const;  // the planned step; see step.h
  Sequence take(int number);                                            // a finished sequence, which is forgotten here

  const Sequence& sequence(int number) const { return sequences_.at(number); }
  const Counters& counters() const { return counters_; }
  const BlockPool& pool() const { return pool_; }
  int running() const { return static_cast<int>(running_.size()); }
  void check() const;  // throws std::logic_error when a reference is lost or counted twice (for tests)

 private:
  int slices_for(int tokens) const { return (tokens + slice_tokens_ - 1) / slice_tokens_; }
  const std::vector<int>& path(const Sequence& s) const { return prompts_[s.owner].path; }
  int token(const Sequence& s, int p) const {
    return p < s.prompt ? prompts_[s.owner].tokens[p] : s.completion[p - s.prompt];
  }
  PrefixNode& end_node(const Sequence& s) { return tree_[path(s).back()]; }
  void admit(int budget);
  void schedule(int number, int& budget);
  bool follow(int number);               // leases what others have computed; false: must wait for them
  bool provide(int number, int index);   // a slice to write to at table[index]; false: not in this step
  bool own_tail(int number, int index);  // the same where others may share the tail
  bool make_room(int number);            // one free slice at least; false: preempted itself
  void emit(int number, int count);      // its next `count` tokens join the step
  int64_t find_scratch() const;          // a slot that no row of the step reads; -1: none
  void draw(int number);                 // its next token is sampled from the step's newest logits
  void preempt_youngest();
  void release(int number);  // its slices go back
  void finish(int number, const char* reason);
  int will_need(const Sequence& s, int number) const;  // slices it wants soon, beyond those it has

  BlockPool pool_;
  PrefixTree tree_;
  int slice_tokens_, max_active_, step_tokens_;
  std::vector<StopRule> rules_;
  std::vector<Prompt> prompts_;
  std::vector<Sequence> sequences_;
  DrawColumns draws_;
  std::vector<int> running_;  // ascending
  int next_ = 0;              // no sequence before it waits
  int done_ = 0;
  bool short_of_slices_ = false;  // someone was preempted while this step was planned
  Step step_;
  Counters counters_;
};

}  // namespace rlhf_engine
