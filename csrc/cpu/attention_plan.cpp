// Pieces of attention: sequences that share leading slices side by side, long ones cut.
#include "attention_plan.h"

#include <algorithm>

namespace rlhf_kernels::attention {
namespace {

constexpr int64_t PIECE_ROWS = 128;  // rows (tokens x heads of a group) of one piece: keys are packed once for them
constexpr int64_t READING = 16;      // what reading and packing keys costs, in rows
constexpr int64_t SERIAL_COST = 1 << 22;  // below it waking a second thread costs more than it saves (some 15 us)

// How many slices a sequence of `length` tokens has.
int64_t slices(const SliceTable& table, int64_t length) {
  return (length + table.slice_tokens - 1) / table.slice_tokens;
}

}  // namespace

int64_t Plan::most_queries() const { return std::max<int64_t>(1, PIECE_ROWS / options_.group); }

int64_t Plan::first_key(int64_t position) const {
  const int64_t first = options_.window ? position - options_.window + 1 : 0;
  return std::max<int64_t>(first, 0) / BLOCK * BLOCK;
}

void Plan::add_span(const Span& span) {
  spans.push_back(span);
  Piece& piece = pieces.back();
  piece.spans += 1;
  piece.cost += (span.end - span.begin) * (span.queries * options_.group + READING) * (options_.d + options_.dv);
}

void Plan::add(int64_t sequence, int64_t token, int64_t count, int64_t position) {
  const int64_t step = most_queries();
  for (int64_t t = 0; t < count; t += step) {
    const int64_t here = std::min(step, count - t);
    pieces.push_back({int64_t(spans.size()), 0, int64_t(queries.size()), here, 0});
    for (int64_t i = t; i < t + here; ++i) queries.push_back({token + i, position + i});
    add_span({sequence, first_key(position + t), position + t + here, 0, here});
  }
}

void Plan::add_sharing(std::vector<Span>& members, const SliceTable& table, const int32_t* lengths) {
  const auto first_slice = [&](const Span& m) { return table.row(m.sequence)[0]; };
  std::sort(members.begin(), members.end(), [&](const Span& a, const Span& b) {
    return first_slice(a) != first_slice(b) ? first_slice(a) < first_slice(b) : a.sequence < b.sequence;
  });
  const auto before = [&](const Span& a, const Span& b) {
    const int32_t *x = table.row(a.sequence), *y = table.row(b.sequence);
    return std::lexicographical_compare(x, x + slices(table, lengths[a.sequence]), y,
                                        y + slices(table, lengths[b.sequence]));
  };
  int64_t most = most_queries();
  if (kv_heads_ < 2 * threads_) {  // else the threads would have nothing to divide
    most = std::min(most, std::max<int64_t>(2, int64_t(members.size()) * kv_heads_ / (2 * threads_)));
  }
  for (size_t i = 0, end = 0; i < members.size(); i = end) {
    while (end < members.size() && first_slice(members[end]) == first_slice(members[i])) ++end;
    if (end - i > 1) std::sort(members.begin() + i, members.begin() + end, before);
    for (size_t j = i; j < end; j += size_t(most)) {
      const auto count = std::min<int64_t>(most, int64_t(end - j));
      pieces.push_back({int64_t(spans.size()), 0, int64_t(queries.size()), count, 0});
      int64_t begin = first_key(lengths[members[j].sequence] - 1);
      for (int64_t m = 0; m < count; ++m) {
        const Span& member = members[j + size_t(m)];
        const int64_t position = lengths[member.sequence] - 1;
        queries.push_back({member.first_query, position});
        begin = std::min(begin, first_key(position));
      }
      share(&members[j], count, begin, 0, table, lengths);
    }
  }
}

// The keys from `begin` on of members in the order of their slices: what all share, then each lot that shares more.
void Plan::share(const Span* members, int64_t count, int64_t begin, int64_t first_query, const SliceTable& table,
                 const int32_t* lengths) {
  const auto length = [&](int64_t m) -> int64_t { return lengths[members[m].sequence]; };
  if (count == 1) {
    begin = std::max(begin, first_key(length(0) - 1));
    if (begin < length(0)) add_span({members[0].sequence, begin, length(0), first_query, 1});  // else all was shared
    return;
  }
  const int32_t *first = table.row(members[0].sequence), *last = table.row(members[count - 1].sequence);
  const int64_t most = std::min(slices(table, length(0)), slices(table, length(count - 1)));
  int64_t common = 0;
  while (common < most && first[common] == last[common]) ++common;
  int64_t end = common * table.slice_tokens;
  for (int64_t m = 0; m < count; ++m) end = std::min(end, length(m));
  end = end / BLOCK * BLOCK;
  if (end > begin) {
    add_span({members[0].sequence, begin, end, first_query, count});
    begin = end;
  }
  const auto same_next = [&](int64_t a, int64_t b) {
    return slices(table, length(a)) > common && slices(table, length(b)) > common &&
           table.row(members[a].sequence)[common] == table.row(members[b].sequence)[common];
  };
  for (int64_t i = 0, next = 0; i < count; i = next) {
    for (next = i + 1; next < count && same_next(i, next);) ++next;
    share(members + i, next - i, begin, first_query + i, table, lengths);
  }
}

void Plan::balance() {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.cost * kv_heads_;
  if (threads_ == 1 || total < SERIAL_COST) return;
  std::vector<Piece> whole;
  whole.swap(pieces);
  for (const Piece& piece : whole) {
    const int64_t wanted = (piece.cost * 2 * threads_ + total - 1) / total;
    if (wanted > 1 && piece.spans == 1) {
      split(piece, wanted);
    } else {
      pieces.push_back(piece);
    }
  }
}

void Plan::split(Piece piece, int64_t parts) {
  const Span span = spans[size_t(piece.first_span)];
  const int64_t first = span.begin / CHUNK, chunks = (span.end + CHUNK - 1) / CHUNK - first;
  parts = std::min(parts, chunks);
  if (parts == 1) return pieces.push_back(piece);
  piece.split = int64_t(splits.size());
  splits.push_back({piece.first_query, piece.queries, chunks, states});
  states += chunks * piece.queries * options_.group;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t from = first + chunks * p / parts, to = first + chunks * (p + 1) / parts;
    piece.first_span = int64_t(spans.size()), piece.spans = 0, piece.cost = 0, piece.first_chunk = from - first;
    pieces.push_back(piece);
    add_span({span.sequence, std::max(span.begin, from * CHUNK), std::min(span.end, to * CHUNK), 0, span.queries});
  }
}

int64_t Plan::parts() const {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.cost * kv_heads_;
  if (total < SERIAL_COST) return 1;
  return std::min<int64_t>(threads_, int64_t(pieces.size()) * kv_heads_);
}

int64_t Plan::border(int64_t part, int64_t parts) const {
  int64_t total = 0, sum = 0;
  for (const Piece& piece : pieces) total += piece.cost;
  const int64_t goal = total * part / parts;  // of one head's cost: a piece's heads cost the same
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (sum + pieces[i].cost > goal) return int64_t(i) * kv_heads_ + (goal - sum) * kv_heads_ / pieces[i].cost;
    sum += pieces[i].cost;
  }
  return int64_t(pieces.size()) * kv_heads_;
}

}  // namespace rlhf_kernels::attention
