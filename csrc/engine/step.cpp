#include "step.h"

#include <algorithm>
#include <stdexcept>

namespace rlhf_engine {

namespace {

// One array of a buffer, as elements of T.
template <typename T>
T* at(uint8_t* out, const Starts& starts, Field field) {
  return reinterpret_cast<T*>(out + starts[field]);
}

template <typename T>
void put(T* to, const std::vector<T>& values, size_t count, T rest) {
  std::fill(std::copy(values.begin(), values.end(), to), to + count, rest);
}

template <typename T>
void gather(T* to, const std::vector<T>& column, const std::vector<int64_t>& sequences, size_t count, T rest) {
  for (int64_t number : sequences) *to++ = column[number];
  std::fill_n(to, count - sequences.size(), rest);
}

template <typename T>
void count_on(T* values, size_t from, size_t to) {
  for (size_t i = from; i < to; ++i) values[i] = static_cast<T>(i);
}

void check(const Step& step, const DrawColumns& columns, const StepSizes& sizes) {
  const bool own = static_cast<size_t>(sizes.tokens) == step.input_ids.size() &&
                   static_cast<size_t>(sizes.rows) == step.rows.size() &&
                   static_cast<size_t>(sizes.logits) == step.logit_rows.size() &&
                   static_cast<size_t>(sizes.draws) == step.draw_rows.size();
  const bool larger = step.one_token_a_row() && step.scratch >= 0 && sizes.tokens == sizes.rows &&
                      sizes.rows == sizes.logits && sizes.logits == sizes.draws &&
                      static_cast<size_t>(sizes.rows) > step.rows.size();
  if ((!own && !larger) || sizes.width < step.width)
    throw std::invalid_argument("the step does not fit the sizes asked for");
  for (int64_t number : step.draw_sequences)
    if (static_cast<size_t>(number) >= columns.greedy.size())
      throw std::invalid_argument("sequence " + std::to_string(number) + " has no draw parameters");
}

}  // namespace

void Step::clear() {
  input_ids.clear(), position_ids.clear(), slots.clear(), rows.clear(), tables.clear(), context_lens.clear();
  logit_rows.clear(), draw_rows.clear(), draw_sequences.clear(), draw_positions.clear(), copies.clear();
  cu_q.assign(1, 0);
  width = 0;
  scratch = -1;
}

bool Step::one_token_a_row() const {
  if (input_ids.size() != rows.size() || logit_rows.size() != rows.size() || draw_rows.size() != rows.size())
    return false;
  for (size_t i = 0; i < draw_rows.size(); ++i)
    if (draw_rows[i] != static_cast<int64_t>(i)) return false;
  return true;
}

Starts layout(const StepSizes& sizes) {
  const size_t tokens = sizes.tokens, rows = sizes.rows, draws = sizes.draws, logits = sizes.logits;
  const std::array<size_t, kFields> bytes{
      8 * tokens, 8 * tokens, 8 * tokens, 8 * logits, 8 * draws, 8 * draws,      8 * draws, 8 * draws,
      8 * draws,  8 * draws,  8 * draws,  8 * draws,  8 * draws, 4 * (rows + 1), 4 * rows,  4 * rows * sizes.width,
      draws};
  Starts starts{};
  for (size_t i = 0; i < bytes.size(); ++i)
    starts[i + 1] = (starts[i] + bytes[i] + kAlignment - 1) / kAlignment * kAlignment;
  return starts;
}

void pack(const Step& step, const DrawColumns& columns, const StepSizes& sizes, int slice_tokens, uint8_t* out,
          size_t bytes) {
  check(step, columns, sizes);
  const auto starts = layout(sizes);
  if (bytes < starts.back()) throw std::invalid_argument("the buffer is too small for the step");
  const size_t rows = step.rows.size(), all = sizes.rows, draws = sizes.draws;
  const auto& numbers = step.draw_sequences;
  put<int64_t>(at<int64_t>(out, starts, kInputIds), step.input_ids, sizes.tokens, 0);
  put<int64_t>(at<int64_t>(out, starts, kPositionIds), step.position_ids, sizes.tokens, 0);
  put<int64_t>(at<int64_t>(out, starts, kSlots), step.slots, sizes.tokens, step.scratch);
  int64_t* logit_rows = at<int64_t>(out, starts, kLogitRows);
  put<int64_t>(logit_rows, step.logit_rows, sizes.logits, 0);
  count_on(logit_rows, step.logit_rows.size(), sizes.logits);
  int64_t* draw_rows = at<int64_t>(out, starts, kDrawRows);
  put<int64_t>(draw_rows, step.draw_rows, draws, 0);
  count_on(draw_rows, step.draw_rows.size(), draws);
  put<int64_t>(at<int64_t>(out, starts, kPosition), step.draw_positions, draws, 0);
  gather<int64_t>(at<int64_t>(out, starts, kTopK), columns.top_k, numbers, draws, 0);
  gather<int64_t>(at<int64_t>(out, starts, kSeed), columns.seed, numbers, draws, 0);
  gather<int64_t>(at<int64_t>(out, starts, kStream), columns.stream, numbers, draws, 0);
  gather<int64_t>(at<int64_t>(out, starts, kSampleIndex), columns.sample_index, numbers, draws, 0);
  gather<double>(at<double>(out, starts, kTemperature), columns.temperature, numbers, draws, 1.0);
  gather<double>(at<double>(out, starts, kTopP), columns.top_p, numbers, draws, 1.0);
  gather<double>(at<double>(out, starts, kMinP), columns.min_p, numbers, draws, 0.0);
  int* cu_q = at<int>(out, starts, kCuQ);
  put<int>(cu_q, step.cu_q, all + 1, 0);
  count_on(cu_q, rows + 1, all + 1);
  put<int>(at<int>(out, starts, kContextLens), step.context_lens, all, 1);
  int* tables = at<int>(out, starts, kSliceTable);
  std::fill_n(tables, all * sizes.width, 0);
  for (size_t row = 0; row < rows; ++row)
    std::copy_n(step.tables.begin() + row * step.width, step.width, tables + row * sizes.width);
  for (size_t row = rows; row < all; ++row) tables[row * sizes.width] = static_cast<int>(step.scratch / slice_tokens);
  gather<uint8_t>(at<uint8_t>(out, starts, kGreedy), columns.greedy, numbers, draws, 1);
}

}  // namespace rlhf_engine
