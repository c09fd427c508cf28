// What there is to attend, cut into pieces that threads share: which query tokens go over which keys together. Heads
// are no part of it: every piece is done once for each key/value head.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace rlhf_kernels::attention {

struct Query {
  int64_t token, position;  // token: its place among all queries
};

struct Span {  // keys [begin, end) of a sequence, for some of a piece's queries
  int64_t sequence, begin, end;
  int64_t first_query, queries;
};

struct Piece {
  int64_t first_span, spans, first_query, queries;
  int64_t cost;        // of one head
  int64_t split = -1;  // the piece takes some chunks of this split
  int64_t first_chunk = 0;
};

struct Split {  // queries whose keys are taken in several pieces
  int64_t first_query, queries, chunks;
  int64_t states;  // where theirs begin, in states of a head
};

struct SliceTable {  // sequences' slices in order
  const int32_t* entries;
  int64_t stride, slice_tokens;

  const int32_t* row(int64_t sequence) const { return entries + sequence * stride; }
};

class Plan {
 public:
  Plan(const Options& options, int64_t kv_heads, int64_t threads)
      : options_(options), kv_heads_(kv_heads), threads_(threads) {}

  // A sequence's queries, the first of them at `position`.
  void add(int64_t sequence, int64_t token, int64_t queries, int64_t position);
  // Sequences with one query each (sequence and token of members[i]; lengths by sequence): those that share leading
  // slices read them together.
  void add_sharing(std::vector<Span>& members, const SliceTable& table, const int32_t* lengths);
  // To be called last: cuts pieces that are too large for the threads at the borders of chunks.
  void balance();

  int64_t most_queries() const;  // of a piece
  int64_t parts() const;         // how many threads are worth waking
  // The first unit (piece * kv_heads + head) of the part `part` of `parts`.
  int64_t border(int64_t part, int64_t parts) const;

  std::vector<Query> queries;
  std::vector<Span> spans;
  std::vector<Piece> pieces;
  std::vector<Split> splits;
  int64_t states = 0;  // of a head, that splits need

 private:
  int64_t first_key(int64_t position) const;
  void add_span(const Span& span);
  void share(const Span* members, int64_t count, int64_t begin, int64_t first_query, const SliceTable& table,
             const int32_t* lengths);
  void split(Piece piece, int64_t parts);

  const Options options_;
  const int64_t kv_heads_, threads_;
};

}  // namespace rlhf_kernels::attention
