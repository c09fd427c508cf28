// The engine's core by itself, without Python: statements about the block pool, the prefix tree, the scheduler and the
// packed step, and a random run of the scheduler against a stand-in for the model. Prints what failed; exits with 1.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "engine/scheduler.h"

using namespace rlhf_engine;

namespace {

int failures = 0;

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                             \
  } while (false)

template <typename Error>
bool raises(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void a_slice_is_free_after_its_last_release() {
  BlockPool pool(2);
  const int a = pool.acquire(), b = pool.acquire();
  CHECK(a != b && pool.free_count() == 0 && pool.peek() == -1);
  CHECK(raises<std::runtime_error>([&] { pool.acquire(); }));
  pool.retain(a);
  CHECK(!pool.release(a) && pool.release(a) && pool.peek() == a);
  CHECK(raises<std::logic_error>([&] { pool.release(a); }));
  CHECK(raises<std::logic_error>([&] { pool.retain(a); }));
  CHECK(raises<std::out_of_range>([&] { pool.release(2); }));
  CHECK(pool.used() == 1 && pool.peak_used() == 2);
  CHECK(raises<std::invalid_argument>([] { BlockPool none(0); }));
}

void prompts_share_nodes_as_far_as_whole_slices_are_equal() {
  BlockPool pool(4);
  PrefixTree tree(pool, 2);
  const auto a = tree.insert({1, 2, 3, 4, 5}), b = tree.insert({1, 2, 3, 4}), c = tree.insert({1, 2, 3});
  CHECK(a.size() == 3 && b.size() == 2 && c.size() == 2);
  CHECK(a[0] == b[0] && a[1] == b[1] && c[0] == a[0] && c[1] != a[1]);
  CHECK(tree.insert({3, 4})[0] != a[1]);  // the same tokens behind another head
}

void what_someone_waits_for_is_kept_and_evicted_deepest_first() {
  BlockPool pool(4);
  PrefixTree tree(pool, 2);
  const auto path = tree.insert({1, 2, 3});
  for (int node : path) {
    tree.expect(node), tree.expect(node);
    tree.assign(node, pool.acquire(), 0);
    tree.publish(node, 0);
  }
  tree.begin_departure();
  for (int node : path) tree.leave(node);
  CHECK(pool.used() == 2 && tree.idle() == 2);
  CHECK(tree.evict() && tree[path[0]].ready && !tree[path[1]].ready);
  CHECK(tree.lease(path[0]) == tree[path[0]].slice && tree.idle() == 0);
  CHECK(!tree.evict());
  CHECK(raises<std::logic_error>([&] { tree.lease(path[1]); }));
  tree.leave(path[0]);
  CHECK(pool.used() == 0);
}

// A call of sequences that share heads, with a budget that may be tight.
struct Call {
  std::vector<std::vector<int>> prompts;
  std::vector<int> news, samples;
  int slices = 1, slice_tokens = 1, max_active = 1, step_tokens = 1;
};

Call random_call(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  Call call;
  call.slice_tokens = 1 + below(5), call.max_active = 1 + below(6), call.step_tokens = 1 + below(12);
  std::vector<int> head(1 + below(9));
  for (int& token : head) token = 1 + below(2);
  int longest = 0;
  for (int i = 1 + below(6); i > 0; --i) {
    std::vector<int> prompt(head.begin(), head.begin() + 1 + below(static_cast<int>(head.size())));
    for (int more = below(4); more > 0; --more) prompt.push_back(1 + below(2));
    call.news.push_back(1 + below(8)), call.samples.push_back(1 + below(3));
    const int kept = static_cast<int>(prompt.size()) + call.news.back() - 1;
    longest = std::max(longest, (kept + call.slice_tokens - 1) / call.slice_tokens);
    call.prompts.push_back(std::move(prompt));
  }
  call.slices = longest + below(2 * longest + 1);
  return call;
}

// Which prefix's keys lie in each slot: a prefix is its sequence's tokens so far.
using Prefix = std::vector<int>;

void run(const Call& call) {
  Scheduler core(call.slices, call.slice_tokens, call.max_active, call.step_tokens);
  const int rule = core.add_rule({{0}, {}});
  std::vector<Prefix> known;
  for (size_t i = 0; i < call.prompts.size(); ++i) {
    const int first = core.add(call.prompts[i], call.news[i], rule, call.samples[i]);
    CHECK(first == static_cast<int>(known.size()));
    known.insert(known.end(), call.samples[i], call.prompts[i]);
  }
  std::vector<Prefix> slots(call.slices * call.slice_tokens);
  for (int steps = 0; core.unfinished(); ++steps) {
    const Step& step = core.plan();
    for (auto [from, to] : step.copies)
      for (int t = 0; t < call.slice_tokens; ++t)
        slots[to * call.slice_tokens + t] = slots[from * call.slice_tokens + t];
    for (size_t row = 0; row < step.rows.size(); ++row)
      for (int i = step.cu_q[row]; i < step.cu_q[row + 1]; ++i) {
        const Prefix& tokens = known[step.rows[row]];
        CHECK(step.input_ids[i] == tokens[step.position_ids[i]]);
        slots[step.slots[i]].assign(tokens.begin(), tokens.begin() + step.position_ids[i] + 1);
      }
    if (step.scratch >= 0) slots[step.scratch] = {-1};  // rows added to a static step write there
    for (size_t row = 0; row < step.rows.size(); ++row)
      for (int p = 0; p < step.context_lens[row]; ++p) {
        const int slice = step.tables[row * step.width + p / call.slice_tokens];
        const Prefix& tokens = known[step.rows[row]];
        CHECK(slots[slice * call.slice_tokens + p % call.slice_tokens] ==
              Prefix(tokens.begin(), tokens.begin() + p + 1));
      }
    std::vector<int64_t> tokens;
    std::vector<float> logprobs;
    for (int64_t number : step.draw_sequences) {
      tokens.push_back((known[number].size() * 7 + number * 3) % 11);
      logprobs.push_back(-1.0f);
      known[number].push_back(static_cast<int>(tokens.back()));
    }
    core.commit(tokens.data(), logprobs.data(), static_cast<int>(tokens.size()));
    core.check();
    CHECK(steps < 100000);
  }
  CHECK(core.pool().used() == 0);
  for (size_t number = 0; number < known.size(); ++number) {
    const Sequence s = core.take(static_cast<int>(number));
    CHECK(Prefix(known[number].begin() + s.prompt, known[number].end()) == s.completion);
  }
}

void every_row_reads_its_own_tokens_whatever_the_budget() {
  std::mt19937 random(1);
  for (int i = 0; i < 2000 && failures == 0; ++i) run(random_call(random));
}

void a_packed_step_is_the_step_and_its_padding_is_harmless() {
  Scheduler core(8, 4, 4, 16);
  const int rule = core.add_rule({{}, {}});
  core.add({1, 2, 3}, 5, rule), core.add({4, 5}, 5, rule), core.add({6}, 5, rule);
  core.set_draws({{0.5, 1, 2}, {1, 0.9, 1}, {0, 0, 0.1}, {0, 5, 0}, {7, 8, 9}, {10, 11, 12}, {0, 1, 2}, {0, 1, 0}});
  core.plan();
  const int64_t drawn[] = {7, 8, 9};
  const float logprobs[] = {0, 0, 0};
  core.commit(drawn, logprobs, 3);
  const Step& step = core.plan();
  CHECK(step.one_token_a_row() && step.scratch >= 0);
  const StepSizes sizes{4, 4, 3, 4, 4};
  const Starts starts = layout(sizes);
  std::vector<uint64_t> words(starts[kFields] / 8);
  uint8_t* out = reinterpret_cast<uint8_t*>(words.data());
  core.pack(sizes, out, starts[kFields]);
  const auto ints = [&](Field f) { return reinterpret_cast<const int64_t*>(out + starts[f]); };
  const auto shorts = [&](Field f) { return reinterpret_cast<const int*>(out + starts[f]); };
  CHECK(ints(kInputIds)[1] == 8 && ints(kInputIds)[3] == 0 && ints(kPositionIds)[0] == 3);
  CHECK(ints(kSlots)[3] == step.scratch && ints(kSeed)[2] == 9 && ints(kStream)[1] == 11);
  CHECK(reinterpret_cast<const double*>(out + starts[kTopP])[1] == 0.9);
  CHECK(out[starts[kGreedy] + 1] == 1 && out[starts[kGreedy]] == 0);
  CHECK(shorts(kCuQ)[4] == 4 && shorts(kContextLens)[3] == 1 && shorts(kContextLens)[0] == 4);
  CHECK(shorts(kSliceTable)[3 * 3] == step.scratch / 4 && shorts(kSliceTable)[0] == step.tables[0]);
  CHECK(raises<std::invalid_argument>([&] { core.pack(sizes, out, starts[kFields] - 1); }));
  CHECK(raises<std::invalid_argument>([&] { core.pack({4, 4, 0, 4, 4}, out, starts[kFields]); }));
  CHECK(raises<std::invalid_argument>([&] { core.pack({2, 2, 3, 2, 2}, out, starts[kFields]); }));
}

void misuse_is_refused() {
  Scheduler core(2, 4, 4, 16);
  const int rule = core.add_rule({{}, {}});
  CHECK(raises<std::invalid_argument>([&] { core.add({}, 1, rule); }));
  CHECK(raises<std::invalid_argument>([&] { core.add({1}, 0, rule); }));
  CHECK(raises<std::invalid_argument>([&] { core.add({1}, 1, rule, 0); }));
  CHECK(raises<std::invalid_argument>([&] { core.add({1}, 1, rule + 1); }));
  CHECK(raises<std::invalid_argument>([&] { core.add({1, 2}, 8, rule); }));
  core.add({1}, 1, rule);
  CHECK(raises<std::invalid_argument>([&] { core.set_draws({}); }));
  CHECK(raises<std::logic_error>([&] { core.take(0); }));
  CHECK(raises<std::out_of_range>([&] { core.take(5); }));
}

}  // namespace

int main() {
  a_slice_is_free_after_its_last_release();
  prompts_share_nodes_as_far_as_whole_slices_are_equal();
  what_someone_waits_for_is_kept_and_evicted_deepest_first();
  a_packed_step_is_the_step_and_its_padding_is_harmless();
  misuse_is_refused();
  every_row_reads_its_own_tokens_whatever_the_budget();
  std::printf("%s\n", failures == 0 ? "whole" : "broken");
  return failures != 0;
}
