// The prompts of one generate call as a tree of slices, so that equal heads are computed and stored once.
//
// A node is one slice of prompt tokens: full, or the shorter tail that ends a prompt. Its identity is its parent and
// its tokens. `pending` counts the unfinished sequences whose prompt runs through the node and that do not lease it at
// the moment. When the last leaseholder leaves and someone is pending, the tree keeps the slice itself (the node is
// idle) until that someone comes or the slice is wanted elsewhere; with no one pending the slice is free at once.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "block_pool.h"

namespace rlhf_engine {

constexpr int kNone = -1;

struct PrefixNode {
  int depth = 0;             // place in the path: the node holds tokens depth * slice_tokens ... end - 1
  int end = 0;               // position after its last token
  int slice = kNone;         // where they lie; kNone: nowhere
  bool ready = false;        // written by the end of the step that is being planned
  int64_t written = kNone;   // the step that wrote it
  bool held = false;         // the tree has a reference of its own
  int64_t left = 0;          // when a leaseholder last left, for the order of eviction
  int pending = 0;           // see above
  int writer = kNone;        // the sequence that computes it, until it is ready
  int appender = kNone;      // the sequence that may write behind the tail's last token, in the same slice
  int lead = kNone;          // end of a prompt: the sequence that computes its last token, for everyone's first draw
  std::vector<int> members;  // end of a prompt: the sequences that have this prompt
};

class PrefixTree {
 public:
  PrefixTree(BlockPool& pool, int slice_tokens);

  std::vector<int> insert(const std::vector<int>& prompt);  // its nodes, made where they are new
  PrefixNode& operator[](int node) { return nodes_[node]; }
  const PrefixNode& operator[](int node) const { return nodes_[node]; }
  int size() const { return static_cast<int>(nodes_.size()); }

  void expect(int node);                           // one more sequence will want the node
  void forget(int node);                           // one less
  int lease(int node);                             // a sequence that was pending shares the node's slice
  void assign(int node, int slice, int sequence);  // a sequence that was pending computes the node into its own slice
  void publish(int node, int64_t step);            // its tokens are written by the end of the step
  void leave(int node);  // a leaseholder goes; one that will come back has been expected before

  void begin_departure() { ++clock_; }  // nodes left from here on count as left at the same time
  int idle() const { return static_cast<int>(idle_.size()); }
  bool is_idle(int node) const { return nodes_[node].held && pool_.refs(nodes_[node].slice) == 1; }
  bool evict();  // frees the idle node that was left longest ago, deepest first; false when there is none

 private:
  using IdleKey = std::tuple<int64_t, int, int>;  // left, -depth, node
  IdleKey idle_key(int node) const { return {nodes_[node].left, -nodes_[node].depth, node}; }
  void drop_hold(int node);
  void clear(int node);

  BlockPool& pool_;
  int slice_tokens_;
  int64_t clock_ = 0;
  std::vector<PrefixNode> nodes_;
  std::vector<std::unordered_map<std::string, int>> children_;  // by node + 1 (0: the root), then by the tokens' bytes
  std::set<IdleKey> idle_;
};

}  // namespace rlhf_engine
