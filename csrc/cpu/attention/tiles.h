// A tile of scores, [queries of one head, keys of one block] of a sequence, and what the kernels need to know about it.
// Internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/core/arithmetic.h"

namespace stamp::cpu {
namespace {

struct Sequence {
  int64_t index;
  int64_t first_q;
  int64_t num_q;
  int64_t first_k;
  int64_t num_k;
};

inline Sequence sequence_at(const AttentionProblem& problem, int64_t index) {
  const int32_t* q = problem.cu_seqlens_q + index;
  const int32_t* k = problem.cu_seqlens_k + index;
  return {index, q[0], q[1] - q[0], k[0], k[1] - k[0]};
}

// Queries [start_query, end_query) and keys [start_key, end_key) of a sequence in one head, by local index.
struct TilePlace {
  Sequence sequence;
  int64_t head;
  int64_t start_query;
  int64_t end_query;
  int64_t start_key;
  int64_t end_key;

  int64_t num_queries() const {
    return end_query - start_query;
  }
  int64_t num_keys() const {
    return end_key - start_key;
  }
};

// How many keys of the tile a query sees, counted from the first.
inline int64_t visible_keys(const AttentionProblem& problem, const TilePlace& tile, int64_t query) {
  if (!problem.causal) {
    return tile.num_keys();
  }
  const int64_t end = query + 1 + tile.sequence.num_k - tile.sequence.num_q;  // aligned bottom-right
  return larger<int64_t>(0, smaller(end - tile.start_key, tile.num_keys()));
}

// The tile without the keys that none of its queries sees.
inline TilePlace without_hidden_keys(const AttentionProblem& problem, TilePlace tile) {
  tile.end_key = tile.start_key + visible_keys(problem, tile, tile.end_query - 1);
  return tile;
}

template <typename V>
struct ScoreTile {
  typename V::scalar* data;  // [num_queries, num_keys]
  int64_t row;               // the row stride

  typename V::scalar* operator[](int64_t i) const {
    return data + i * row;
  }
};

// Entries from `begin` to the end of the row's last vector := value.
template <typename V>
void fill_rest(typename V::scalar* row, int64_t begin, int64_t num_keys, typename V::scalar value) {
  for (int64_t j = begin; j < round_up(num_keys, V::width); ++j) {
    row[j] = value;
  }
}

// sums_j += sum_i row_weights_i weights_ij over the rows i of a tile with a row weight. The others are left out, not
// multiplied by 0: they may hold NaN or infinity. The tile is summed first: if equal weights were added to a long sum
// one by one, each addition would round in the same direction.
template <typename V>
void add_weighted_columns(
    const TilePlace& tile, ScoreTile<V> weights, const typename V::scalar* row_weights, typename V::scalar* sums) {
  int64_t rows[kQueriesPerTile], num_rows = 0;
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    rows[num_rows] = i;
    num_rows += row_weights[i] != 0;
  }
  for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
    typename V::vector sum = {};
    for (int64_t i = 0; i < num_rows; ++i) {
      sum += row_weights[rows[i]] * V::load(weights[rows[i]] + j);
    }
    V::store(sums + j, V::load(sums + j) + sum);
  }
}

}  // namespace
}  // namespace stamp::cpu
