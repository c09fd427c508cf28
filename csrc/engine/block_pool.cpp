#include "block_pool.h"

#include <algorithm>

namespace rlhf_engine {

BlockPool::BlockPool(int num_slices) {
  if (num_slices < 1) throw std::invalid_argument("num_slices is " + std::to_string(num_slices) + "; it must be >= 1");
  refs_.assign(num_slices, 0);
  free_.reserve(num_slices);
  for (int slice = num_slices - 1; slice >= 0; --slice) free_.push_back(slice);
}

int BlockPool::acquire() {
  if (free_.empty()) throw std::runtime_error("no free slice");
  const int slice = free_.back();
  free_.pop_back();
  refs_[slice] = 1;
  peak_ = std::max(peak_, used());
  return slice;
}

void BlockPool::retain(int slice) {
  check_leased(slice);
  ++refs_[slice];
}

bool BlockPool::release(int slice) {
  check_leased(slice);
  if (--refs_[slice] > 0) return false;
  free_.push_back(slice);
  return true;
}

void BlockPool::check_leased(int slice) const {
  if (slice < 0 || slice >= size()) throw std::out_of_range("slice " + std::to_string(slice) + " does not exist");
  if (refs_[slice] == 0) throw std::logic_error("slice " + std::to_string(slice) + " is not leased");
}

}  // namespace rlhf_engine
