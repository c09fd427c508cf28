// The KV slices' book-keeping: which of the arena's slices are leased, and by how many.
//
// A slice is leased with one reference; every sequence (or the prefix tree) that shares it adds one, and it returns to
// the free list with the last release. Nothing here knows what lies in a slice.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace rlhf_engine {

class BlockPool {
 public:
  explicit BlockPool(int num_slices);

  int acquire();            // a free slice, with one reference; std::runtime_error when there is none
  void retain(int slice);   // one more reference
  bool release(int slice);  // one reference less; true when that was the last one

  int peek() const { return free_.empty() ? -1 : free_.back(); }  // the slice acquire would give; -1: none
  int refs(int slice) const { return refs_.at(slice); }
  int size() const { return static_cast<int>(refs_.size()); }
  int free_count() const { return static_cast<int>(free_.size()); }
  int used() const { return size() - free_count(); }
  int peak_used() const { return peak_; }

 private:
  void check_leased(int slice) const;

  std::vector<int> refs_;
  std::vector<int> free_;  // a stack: the slice returned last is the warmest in the cache
  int peak_ = 0;
};

}  // namespace rlhf_engine
