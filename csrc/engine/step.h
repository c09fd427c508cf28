// One step as flat arrays, and the same arrays in one buffer, so that one copy takes a step to the device.
//
// A "row" is a sequence that takes part; a "draw" is a token to sample. A buffer's arrays lie one after the other, each
// at a multiple of kAlignment bytes, in the order of Field. It may be larger than the step where every row is one
// token with one draw: the rows added then write one token to a scratch slot and draw a token that no one reads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace rlhf_engine {

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
  int64_t scratch = -1;                                 // a slot that nothing reads; -1: there is none

  void clear();
  bool one_token_a_row() const;  // every row is one token, with logits and one draw of its own
};

// How each sequence's tokens are drawn; by its number.
struct DrawColumns {
  std::vector<double> temperature, top_p, min_p;
  std::vector<int64_t> top_k, seed, stream, sample_index;
  std::vector<uint8_t> greedy;
};

struct StepSizes {
  int tokens = 0, rows = 0, width = 0, logits = 0, draws = 0;
};

constexpr size_t kAlignment = 64;  // bytes: a cache line; kernels may assume 16

// The arrays of a buffer: int64 up to sample_index, float64 up to min_p, int32 up to the table, then one byte each.
enum Field {
  kInputIds,
  kPositionIds,
  kSlots,
  kLogitRows,
  kDrawRows,
  kPosition,
  kTopK,
  kSeed,
  kStream,
  kSampleIndex,
  kTemperature,
  kTopP,
  kMinP,
  kCuQ,
  kContextLens,
  kSliceTable,
  kGreedy,
  kFields
};

using Starts = std::array<size_t, kFields + 1>;
Starts layout(const StepSizes& sizes);  // where each field begins, and at last the bytes of them all

// Writes the step and its draws' columns. std::invalid_argument when `bytes` is too few, or when the sizes are not the
// step's own and it cannot be filled up to them.
void pack(const Step& step, const DrawColumns& columns, const StepSizes& sizes, int slice_tokens, uint8_t* out,
          size_t bytes);

}  // namespace rlhf_engine
