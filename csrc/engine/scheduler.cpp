#include "scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rlhf_engine {

Scheduler::Scheduler(int num_slices, int slice_tokens, int max_active, int step_tokens)
    : pool_(num_slices),
      tree_(pool_, slice_tokens),
      slice_tokens_(slice_tokens),
      max_active_(max_active),
      step_tokens_(step_tokens) {
  if (slice_tokens < 1 || max_active < 1 || step_tokens < 1)
    throw std::invalid_argument("slice_tokens, max_active and step_tokens must be >= 1");
}

int Scheduler::add_rule(StopRule rule) {
  rules_.push_back(std::move(rule));
  return static_cast<int>(rules_.size()) - 1;
}

int Scheduler::add(std::vector<int> prompt, int max_new_tokens, int rule, int samples) {
  if (prompt.empty() || max_new_tokens < 1 || samples < 1 || rule < 0 || rule >= static_cast<int>(rules_.size()))
    throw std::invalid_argument("a sequence needs a prompt, max_new_tokens >= 1, samples >= 1 and a known rule");
  const int length = static_cast<int>(prompt.size()), limit = length + max_new_tokens;
  if (slices_for(limit - 1) > pool_.size()) throw std::invalid_argument("the sequence does not fit in the arena");
  const int first = static_cast<int>(sequences_.size());
  Prompt& owner = prompts_.emplace_back();
  owner.path = tree_.insert(prompt);
  owner.tokens = std::move(prompt);
  for (int sample = 0; sample < samples; ++sample) {
    Sequence& s = sequences_.emplace_back();
    s.owner = static_cast<int>(prompts_.size()) - 1;
    s.prompt = length;
    s.limit = limit;
    s.rule = rule;
    for (int node : owner.path) tree_.expect(node);
    end_node(s).members.push_back(first + sample);
  }
  return first;
}

void Scheduler::set_draws(DrawColumns columns) {
  const size_t count = sequences_.size();
  for (size_t size : {columns.temperature.size(), columns.top_p.size(), columns.min_p.size(), columns.top_k.size(),
                      columns.seed.size(), columns.stream.size(), columns.sample_index.size(), columns.greedy.size()})
    if (size != count) throw std::invalid_argument("draw parameters need one entry a sequence");
  draws_ = std::move(columns);
}

const Step& Scheduler::plan() {
  // An oldest sequence that waits for a younger writer leaves a step empty only when that writer has just given way to
  // it; the next attempt then has it compute the slice itself.
  for (int attempt = 0; attempt < 3; ++attempt) {
    step_.clear();
    short_of_slices_ = false;
    int decoding = 0;
    for (int number : running_) decoding += sequences_[number].fed + 1 == sequences_[number].length();
    int budget = std::max(1, step_tokens_ - decoding);
    for (size_t i = 0; i < running_.size(); ++i) schedule(running_[i], budget);  // preemption shortens the list's end
    if (!short_of_slices_) admit(budget);
    if (step_.rows.empty()) continue;
    ++counters_.steps;
    counters_.rows += static_cast<int64_t>(step_.rows.size());
    for (int length : step_.context_lens) step_.width = std::max(step_.width, slices_for(length));
    step_.tables.assign(step_.rows.size() * step_.width, 0);
    for (size_t row = 0; row < step_.rows.size(); ++row) {
      const std::vector<int>& table = sequences_[step_.rows[row]].table;
      const int used = std::min(step_.width, static_cast<int>(table.size()));
      std::copy_n(table.begin(), used, step_.tables.begin() + row * step_.width);
    }
    step_.scratch = find_scratch();
    return step_;
  }
  throw std::logic_error("the scheduler found nothing to do although sequences are unfinished");
}

int64_t Scheduler::find_scratch() const {
  if (const int slice = pool_.peek(); slice != kNone) return static_cast<int64_t>(slice) * slice_tokens_;
  for (int number : step_.rows) {  // behind a sequence's newest token, in its last slice
    const Sequence& s = sequences_[number];
    const int slices = slices_for(s.fed);
    if (s.fed % slice_tokens_ != 0)
      return static_cast<int64_t>(s.table[slices - 1]) * slice_tokens_ + slice_tokens_ - 1;
  }
  return kNone;
}

void Scheduler::pack(const StepSizes& sizes, uint8_t* out, size_t bytes) const {
  rlhf_engine::pack(step_, draws_, sizes, slice_tokens_, out, bytes);
}

Sequence Scheduler::take(int number) {
  Sequence& s = sequences_.at(number);
  if (s.state != State::kDone) throw std::logic_error("sequence " + std::to_string(number) + " has not finished");
  Sequence rest;  // what the scheduler still looks at
  rest.owner = s.owner, rest.prompt = s.prompt, rest.state = State::kDone;
  return std::exchange(s, std::move(rest));
}

void Scheduler::admit(int budget) {
  int reserved = 0;  // what the running sequences will want comes first: admitting into it would only preempt again
  for (int number : running_) reserved += will_need(sequences_[number], number);
  while (budget > 0 && running() < max_active_) {
    while (next_ < static_cast<int>(sequences_.size()) && sequences_[next_].state == State::kDone) ++next_;
    if (next_ == static_cast<int>(sequences_.size())) return;
    const int number = next_;
    Sequence& s = sequences_[number];
    int needed = will_need(s, number), available = pool_.free_count() + tree_.idle();
    for (int node : path(s)) {
      if (!tree_[node].ready) break;
      --needed;
      available -= tree_.is_idle(node);
    }
    if (!running_.empty() && needed + reserved > available) return;
    s.state = State::kRunning;
    running_.push_back(number);
    ++next_;
    schedule(number, budget);
    if (short_of_slices_) return;
    reserved += will_need(s, number);
  }
}

void Scheduler::schedule(int number, int& budget) {
  Sequence& s = sequences_[number];
  if (!follow(number)) return;
  const int left = s.length() - s.fed;
  const bool decodes = left == 1 && s.generated() > 0;
  int count = decodes ? 1 : std::min(left, budget);
  if (count == 0) return;
  const int last = (static_cast<int>(path(s).size()) - 1) * slice_tokens_;  // where the prompt's last node begins
  if (s.generated() == 0 && s.fed + count > last) {  // one computes a prompt's last logits, for all that have it
    int& lead = end_node(s).lead;
    if (lead == kNone) lead = number;
    if (lead != number) count = last - s.fed;
  }
  for (int index = s.fed / slice_tokens_; index <= (s.fed + count - 1) / slice_tokens_; ++index)
    if (!provide(number, index)) return;
  if (!decodes) budget -= count;
  emit(number, count);
}

bool Scheduler::follow(int number) {
  Sequence& s = sequences_[number];
  const int last = static_cast<int>(path(s).size()) - 1;
  while (s.passed <= last && s.fed == s.passed * slice_tokens_) {
    const int node = path(s)[s.passed];
    if (s.passed == last && s.generated() == 0) return tree_[node].lead == kNone || tree_[node].lead == number;
    if (tree_[node].slice == kNone) return true;
    if (!tree_[node].ready) return false;
    s.table.push_back(tree_.lease(node));
    counters_.prefix_tokens_shared += tree_[node].end - s.fed;
    s.fed = tree_[node].end;
    ++s.passed;
  }
  return true;
}

bool Scheduler::provide(int number, int index) {
  Sequence& s = sequences_[number];
  if (index < static_cast<int>(s.table.size())) return own_tail(number, index);
  if (!make_room(number)) return false;
  const int slice = pool_.acquire();
  s.table.push_back(slice);
  if (index < static_cast<int>(path(s).size())) {
    const int node = path(s)[s.passed++];
    if (tree_[node].slice == kNone) {
      tree_.assign(node, slice, number);
      if (index + 1 == static_cast<int>(path(s).size())) tree_[node].appender = number;
    } else {
      tree_.forget(node);  // computed for a longer prompt; this one needs the logits too, and keeps a slice of its own
    }
  }
  return true;
}

bool Scheduler::own_tail(int number, int index) {
  Sequence& s = sequences_[number];
  const int end = static_cast<int>(path(s).size()) - 1, node = path(s)[end];
  while (index == end && s.fed >= s.prompt && s.table[index] == tree_[node].slice) {
    int& appender = tree_[node].appender;
    if (appender == kNone) appender = number;  // one sharer writes behind the shared tokens, where no other looks
    if (appender == number) return true;
    if (tree_[node].written == counters_.steps) return false;  // copies come before the forward: wait for the next step
    if (pool_.free_count() == 0) {                             // the appender itself may be the one to give way
      if (!make_room(number)) return false;
      continue;
    }
    const int slice = pool_.acquire();
    step_.copies.emplace_back(s.table[index], slice);
    s.table[index] = slice;
    tree_.leave(node);
  }
  return true;
}

bool Scheduler::make_room(int number) {
  while (pool_.free_count() == 0) {
    if (tree_.evict()) continue;
    const int youngest = running_.back();
    preempt_youngest();
    if (youngest == number) return false;
  }
  return true;
}

void Scheduler::emit(int number, int count) {
  Sequence& s = sequences_[number];
  for (int p = s.fed; p < s.fed + count; ++p) {
    step_.input_ids.push_back(token(s, p));
    step_.position_ids.push_back(p);
    step_.slots.push_back(static_cast<int64_t>(s.table[p / slice_tokens_]) * slice_tokens_ + p % slice_tokens_);
  }
  counters_.prompt_tokens_computed += std::max(0, std::min(s.fed + count, s.prompt) - s.fed);
  counters_.recomputed_tokens += std::max(0, std::min(s.fed + count, s.farthest) - s.fed);
  s.fed += count;
  s.farthest = std::max(s.farthest, s.fed);
  for (int i = (s.fed - count) / slice_tokens_; i < s.passed; ++i)
    if (tree_[path(s)[i]].writer == number && tree_[path(s)[i]].end <= s.fed)
      tree_.publish(path(s)[i], counters_.steps);
  step_.rows.push_back(number);
  step_.context_lens.push_back(s.fed);
  step_.cu_q.push_back(static_cast<int>(step_.input_ids.size()));
  if (s.fed < s.length()) return;
  step_.logit_rows.push_back(static_cast<int64_t>(step_.input_ids.size()) - 1);
  if (s.generated() > 0) return draw(number);
  for (int member : end_node(s).members)
    if (sequences_[member].state != State::kDone && sequences_[member].generated() == 0) draw(member);
}

void Scheduler::draw(int number) {
  step_.draw_rows.push_back(static_cast<int64_t>(step_.logit_rows.size()) - 1);
  step_.draw_sequences.push_back(number);
  step_.draw_positions.push_back(sequences_[number].length());
}

std::vector<int> Scheduler::commit(const int64_t* tokens, const float* logprobs, int count) {
  if (count != static_cast<int>(step_.draw_sequences.size()))
    throw std::invalid_argument("commit got " + std::to_string(count) + " tokens for " +
                                std::to_string(step_.draw_sequences.size()) + " draws");
  std::vector<int> finished;
  const auto holds = [](const std::vector<int>& set, int token) {
    return std::find(set.begin(), set.end(), token) != set.end();
  };
  for (int i = 0; i < count; ++i) {
    const int number = static_cast<int>(step_.draw_sequences[i]), token = static_cast<int>(tokens[i]);
    Sequence& s = sequences_[number];
    s.completion.push_back(token);
    s.logprobs.push_back(logprobs[i]);
    const char* reason = holds(rules_[s.rule].eos, token)    ? "eos"
                         : holds(rules_[s.rule].stop, token) ? "stop"
                         : s.length() == s.limit             ? "length"
                                                             : nullptr;
    if (reason == nullptr) continue;
    finish(number, reason);
    finished.push_back(number);
  }
  counters_.generated_tokens += count;
  step_.clear();
  return finished;
}

void Scheduler::preempt_youngest() {
  const int number = running_.back();
  Sequence& s = sequences_[number];
  if (end_node(s).lead == number) end_node(s).lead = kNone;
  for (int i = 0; i < s.passed; ++i) tree_.expect(path(s)[i]);
  release(number);
  s.passed = s.fed = 0;
  s.state = State::kWaiting;
  running_.pop_back();
  next_ = number;
  short_of_slices_ = true;
  ++counters_.preemptions;
}

void Scheduler::finish(int number, const char* reason) {
  Sequence& s = sequences_[number];
  for (int i = s.passed; i < static_cast<int>(path(s).size()); ++i) tree_.forget(path(s)[i]);
  release(number);
  if (s.state == State::kRunning) running_.erase(std::lower_bound(running_.begin(), running_.end(), number));
  s.state = State::kDone;
  s.reason = reason;
  ++done_;
}

void Scheduler::release(int number) {
  Sequence& s = sequences_[number];
  tree_.begin_departure();
  for (int i = static_cast<int>(s.table.size()) - 1; i >= 0; --i) {
    const int node = i < static_cast<int>(path(s).size()) ? path(s)[i] : kNone;
    if (node == kNone || tree_[node].slice != s.table[i]) {
      pool_.release(s.table[i]);
      continue;
    }
    if (tree_[node].appender == number) tree_[node].appender = kNone;
    tree_.leave(node);
  }
  s.table.clear();
}

int Scheduler::will_need(const Sequence& s, int number) const {
  // Everything it knows, and half a slice further: a whole one leaves a tenth of the arena empty, none at all has most
  // of what is admitted computed twice. A sequence that another one leads shares all but the tail.
  const int soon = std::min(s.length() + (slice_tokens_ + 1) / 2, s.limit - 1);
  const int lead = tree_[path(s).back()].lead;
  const bool led = s.generated() == 0 && lead != kNone && lead != number;
  const int has = std::max(static_cast<int>(s.table.size()), led ? static_cast<int>(path(s).size()) - 1 : 0);
  return std::max(0, slices_for(soon) - has);
}

void Scheduler::check() const {
  std::vector<int> refs(pool_.size(), 0), pending(tree_.size(), 0);
  const auto fail = [](const std::string& what, int at) { throw std::logic_error(what + " " + std::to_string(at)); };
  for (const Sequence& s : sequences_) {
    if (s.state != State::kRunning && !s.table.empty())
      fail("slices of a sequence that does not run, first", s.table[0]);
    for (int slice : s.table) ++refs[slice];
    if (s.state == State::kDone) continue;
    for (int i = s.passed; i < static_cast<int>(path(s).size()); ++i) ++pending[path(s)[i]];
  }
  for (int node = 0; node < tree_.size(); ++node) {
    if (pending[node] != tree_[node].pending) fail("wrong count of pending sequences at node", node);
    if (tree_[node].held) ++refs[tree_[node].slice];
    if (tree_[node].held && tree_[node].pending == 0) fail("held for no one: node", node);
  }
  int used = 0;
  for (int slice = 0; slice < pool_.size(); ++slice) {
    if (refs[slice] != pool_.refs(slice)) fail("wrong reference count of slice", slice);
    used += refs[slice] > 0;
  }
  if (used != pool_.used()) fail("slices lost: used is", pool_.used());
}

}  // namespace rlhf_engine
