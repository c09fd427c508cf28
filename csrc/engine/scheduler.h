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
#include <utility>
#include <vector>

#include "block_pool.h"
#include "prefix_tree.h"

namespace rlhf_engine {

enum class State { kWaiting, kRunning, kDone };

struct StopRule {
  std::vector<int> eos;   // finish reason "eos"
  std::vector<int> stop;  // finish reason "stop"
};

struct Sequence {
  std::vector<int> tokens;      // the prompt and what was generated
  std::vector<float> logprobs;  // of the generated tokens
  int prompt = 0;               // tokens in the prompt
  int limit = 0;                // most tokens in all
  int rule = 0;                 // its StopRule
  std::vector<int> path;        // the prompt's nodes
  int passed = 0;               // how many of them it leases, computes or has replaced by a slice of its own
  std::vector<int> table;       // its slices
  int fed = 0;                  // tokens whose keys and values are in the arena by the end of this step
  int farthest = 0;             // the most `fed` has been: what is fed again below it is recomputed
  State state = State::kWaiting;
  std::string reason;  // finish reason, once done

  int length() const { return static_cast<int>(tokens.size()); }
  int generated() const { return length() - prompt; }
};

// One step, as flat arrays. A "row" is a sequence that takes part; a "draw" is a token to sample.
struct Step {
  std::vector<int64_t> input_ids, position_ids, slots;  // [tokens]
  std::vector<int> rows;                                // [rows]: the sequences that take part
  std::vector<int> tables;                              // [rows, width]
  int width = 0;                                        // slices in the longest table
  std::vector<int> context_lens, cu_q;                  // [rows], [rows + 1]
  std::vector<int64_t> logit_rows;                      // [logits]: the tokens whose logits are wanted
  std::vector<int64_t> draw_rows;                       // [draws]: which of those logits it is drawn from
  std::vector<int64_t> draw_sequences, draw_positions;  // [draws]: whose next token, at which position
  std::vector<std::pair<int, int>> copies;              // slices to copy before the forward: from, to

  void clear();
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
  int add(const std::vector<int>& prompt, int max_new_tokens, int rule);  // returns the sequence's number
  bool unfinished() const { return done_ < static_cast<int>(sequences_.size()); }
  const Step& plan();
  std::vector<int> commit(const int64_t* tokens, const float* logprobs, int count);  // returns who finished

  const Sequence& sequence(int number) const { return sequences_.at(number); }
  const Counters& counters() const { return counters_; }
  const BlockPool& pool() const { return pool_; }
  int running() const { return static_cast<int>(running_.size()); }
  void check() const;  // throws std::logic_error when a reference is lost or counted twice (for tests)

 private:
  int slices_for(int tokens) const { return (tokens + slice_tokens_ - 1) / slice_tokens_; }
  PrefixNode& end_node(const Sequence& s) { return tree_[s.path.back()]; }
  void admit(int budget);
  void schedule(int number, int& budget);
  bool follow(int number);               // leases what others have computed; false: must wait for them
  bool provide(int number, int index);   // a slice to write to at table[index]; false: not in this step
  bool own_tail(int number, int index);  // the same where others may share the tail
  bool make_room(int number);            // one free slice at least; false: preempted itself
  void emit(int number, int count);      // its next `count` tokens join the step
  void draw(int number);                 // its next token is sampled from the step's newest logits
  void preempt_youngest();
  void release(int number);  // its slices go back
  void finish(int number, const char* reason);
  int will_need(const Sequence& s, int number) const;  // slices it wants soon, beyond those it has

  BlockPool pool_;
  PrefixTree tree_;
  int slice_tokens_, max_active_, step_tokens_;
  std::vector<StopRule> rules_;
  std::vector<Sequence> sequences_;
  std::vector<int> running_;  // ascending
  int next_ = 0;              // no sequence before it waits
  int done_ = 0;
  bool short_of_slices_ = false;  // someone was preempted while this step was planned
  Step step_;
  Counters counters_;
};

}  // namespace rlhf_engine
