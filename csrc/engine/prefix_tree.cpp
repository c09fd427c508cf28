#include "prefix_tree.h"

#include <algorithm>

namespace rlhf_engine {

PrefixTree::PrefixTree(BlockPool& pool, int slice_tokens) : pool_(pool), slice_tokens_(slice_tokens), children_(1) {}

std::vector<int> PrefixTree::insert(const std::vector<int>& prompt) {
  std::vector<int> path;
  const int length = static_cast<int>(prompt.size());
  int parent = kNone;
  for (int begin = 0; begin < length; begin += slice_tokens_) {
    const int end = std::min(begin + slice_tokens_, length);
    std::string key(reinterpret_cast<const char*>(prompt.data() + begin), (end - begin) * sizeof(int));
    auto [place, is_new] = children_[parent + 1].try_emplace(std::move(key), size());
    parent = place->second;
    if (is_new) {
      nodes_.emplace_back();
      nodes_.back().depth = begin / slice_tokens_;
      nodes_.back().end = end;
      children_.emplace_back();
    }
    path.push_back(parent);
  }
  return path;
}

void PrefixTree::expect(int node) { ++nodes_[node].pending; }

void PrefixTree::forget(int node) {
  PrefixNode& n = nodes_[node];
  if (n.pending == 0) throw std::logic_error("node " + std::to_string(node) + " is not expected by anyone");
  if (--n.pending == 0 && n.held) drop_hold(node);
}

int PrefixTree::lease(int node) {
  PrefixNode& n = nodes_[node];
  if (!n.ready) throw std::logic_error("node " + std::to_string(node) + " is not computed");
  if (is_idle(node)) idle_.erase(idle_key(node));
  pool_.retain(n.slice);
  forget(node);
  return n.slice;
}

void PrefixTree::assign(int node, int slice, int sequence) {
  PrefixNode& n = nodes_[node];
  if (n.slice != kNone) throw std::logic_error("node " + std::to_string(node) + " has a slice already");
  n.slice = slice;
  n.writer = sequence;
  forget(node);
}

void PrefixTree::publish(int node, int64_t step) {
  PrefixNode& n = nodes_[node];
  if (n.slice == kNone) throw std::logic_error("node " + std::to_string(node) + " has no slice");
  n.ready = true;
  n.written = step;
}

void PrefixTree::leave(int node) {
  PrefixNode& n = nodes_[node];
  if (n.ready && n.pending > 0 && !n.held) {
    n.held = true;  // the leaseholder's reference becomes the tree's
  } else if (pool_.release(n.slice)) {
    clear(node);
    return;
  }
  if (!n.ready) return clear(node);
  n.left = clock_;
  if (is_idle(node)) idle_.insert(idle_key(node));
}

bool PrefixTree::evict() {
  if (idle_.empty()) return false;
  drop_hold(std::get<2>(*idle_.begin()));
  return true;
}

void PrefixTree::drop_hold(int node) {
  if (is_idle(node)) idle_.erase(idle_key(node));
  nodes_[node].held = false;
  if (pool_.release(nodes_[node].slice)) clear(node);
}

void PrefixTree::clear(int node) {
  PrefixNode& n = nodes_[node];
  n.slice = n.writer = n.appender = kNone;
  n.ready = false;
}

}  // namespace rlhf_engine
