// A tile of scores, [queries of one head, keys of one block], and what forward, backward and centrality do to it:
//
//     S_ij = scale * q_i . k_j + bias[bucket(pos_k[j] - pos_q[i])]        (-inf where causal order hides j)
//
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/rows.h"
#include "cpu/attention/dropout.h"

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

// Queries [first_query, end_query) against keys [first_key, end_key) of a sequence, by local index, in one head.
struct TilePlace {
  Sequence sequence;
  int64_t head;
  int64_t first_query;
  int64_t end_query;
  int64_t first_key;
  int64_t end_key;

  int64_t num_queries() const {
    return end_query - first_query;
  }
  int64_t num_keys() const {
    return end_key - first_key;
  }
};

// How many of the block's keys, counted from its first, a query sees.
inline int64_t visible_keys(const AttentionProblem& problem, const TilePlace& tile, int64_t query) {
  if (!problem.causal) {
    return tile.num_keys();
  }
  const int64_t end = query + 1 + tile.sequence.num_k - tile.sequence.num_q;  // aligned bottom-right
  return larger<int64_t>(0, smaller(end - tile.first_key, tile.num_keys()));
}

// The tile's end_key moved back to what its last query sees.
inline TilePlace without_hidden_keys(const AttentionProblem& problem, TilePlace tile) {
  tile.end_key = tile.first_key + visible_keys(problem, tile, tile.end_query - 1);
  return tile;
}

template <typename V>
struct ScoreTile {
  typename V::scalar* data;  // [kQueriesPerTile, row]
  int64_t row;

  typename V::scalar* operator[](int64_t i) const {
    return data + i * row;
  }
};

// Where the bias and the bucket of a distance stand in their tables.
inline int64_t entry_of_distance(const AttentionProblem& problem, int64_t distance) {
  return larger(-problem.max_distance, smaller(distance, problem.max_distance)) + problem.max_distance;
}

// Where positions are indices, the distances of a tile are those of its diagonals: diagonal x is that of query i and
// key j with x = j - i + num_queries - 1, so a row of the tile meets consecutive ones.
inline bool positions_are_indices(const AttentionProblem& problem) {
  return problem.positions_q == nullptr && problem.positions_k == nullptr;
}

inline int64_t num_diagonals(const TilePlace& tile) {
  return tile.num_queries() + tile.num_keys() - 1;
}

inline int64_t entry_of_diagonal(const AttentionProblem& problem, const TilePlace& tile, int64_t x) {
  return entry_of_distance(problem, x + tile.first_key - (tile.end_query - 1));
}

// Where they are not, row i of the tile has an entry for each key. The distances of a batch fit 32 bits.
inline void entries_of_row(const AttentionProblem& problem, const TilePlace& tile, int64_t i, int32_t* entries) {
  const int32_t max_distance = static_cast<int32_t>(problem.max_distance);
  const int32_t query = static_cast<int32_t>(tile.first_query + i);
  const int32_t position_q =
      problem.positions_q == nullptr ? query : problem.positions_q[tile.sequence.first_q + query];
  if (problem.positions_k == nullptr) {
    for (int32_t j = 0; j < tile.num_keys(); ++j) {
      entries[j] = static_cast<int32_t>(entry_of_distance(problem, tile.first_key + j - position_q));
    }
    return;
  }
  const int32_t* positions_k = problem.positions_k + tile.sequence.first_k + tile.first_key;
  for (int64_t j = 0; j < tile.num_keys(); ++j) {
    const int32_t distance = positions_k[j] - position_q;
    entries[j] = larger(-max_distance, smaller(distance, max_distance)) + max_distance;
  }
}

// Room for what a tile's bias needs.
template <typename V>
struct BiasScratch {
  typename V::scalar* diagonals;  // and a vector more
  typename V::scalar* lanes;      // [4, num_buckets]
  int32_t* entries;               // [keys of the block]

  static BiasScratch take(Scratch& scratch, const AttentionProblem& problem, int64_t num_queries, int64_t num_keys) {
    using scalar = typename V::scalar;
    return {
        scratch.take<scalar>(num_queries + num_keys + V::width), scratch.take<scalar>(4 * problem.num_buckets),
        scratch.take<int32_t>(num_keys)};
  }
};

// S += bias.
template <typename V>
void add_bias(
    const AttentionProblem& problem, const TilePlace& tile, ScoreTile<V> scores, const BiasScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const scalar* bias =
      static_cast<const scalar*>(problem.bias_of_distance) + tile.head * (2 * problem.max_distance + 1);
  if (!positions_are_indices(problem)) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      entries_of_row(problem, tile, i, scratch.entries);
      scalar* row = scores[i];
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        row[j] += bias[scratch.entries[j]];
      }
    }
    return;
  }
  for (int64_t x = 0; x < num_diagonals(tile); ++x) {
    scratch.diagonals[x] = bias[entry_of_diagonal(problem, tile, x)];
  }
  for (int64_t x = num_diagonals(tile); x < num_diagonals(tile) + V::width; ++x) {
    scratch.diagonals[x] = 0;  // read with the last vector of a row, for keys that are not there
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const scalar* diagonals = scratch.diagonals + tile.num_queries() - 1 - i;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(scores[i] + j, V::load(scores[i] + j) + V::load(diagonals + j));
    }
  }
}

// dbias[bucket] += sum of dS over the tile's pairs in it. The pairs of a tile are added in the compute type, tiles in
// double.
template <typename V>
void add_bias_gradient(
    const AttentionProblem& problem, const TilePlace& tile, ScoreTile<V> d_scores, const BiasScratch<V>& scratch,
    double* dbias) {
  using scalar = typename V::scalar;
  if (!positions_are_indices(problem)) {
    // Neighbouring keys often share a bucket: four sums for each, so that an addition need not wait for the last one.
    scalar* lanes = scratch.lanes;
    for (int64_t b = 0; b < 4 * problem.num_buckets; ++b) {
      lanes[b] = 0;
    }
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      entries_of_row(problem, tile, i, scratch.entries);
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        lanes[4 * problem.bucket_of_distance[scratch.entries[j]] + j % 4] += d_scores[i][j];
      }
    }
    for (int64_t b = 0; b < problem.num_buckets; ++b) {
      dbias[b] += (static_cast<double>(lanes[4 * b]) + lanes[4 * b + 1]) + (lanes[4 * b + 2] + lanes[4 * b + 3]);
    }
    return;
  }
  for (int64_t x = 0; x < num_diagonals(tile) + V::width; ++x) {
    scratch.diagonals[x] = 0;
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    scalar* diagonals = scratch.diagonals + tile.num_queries() - 1 - i;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(diagonals + j, V::load(diagonals + j) + V::load(d_scores[i] + j));
    }
  }
  for (int64_t x = 0; x < num_diagonals(tile); ++x) {
    dbias[problem.bucket_of_distance[entry_of_diagonal(problem, tile, x)]] += scratch.diagonals[x];
  }
}

// S of a tile from the loaded queries (already scaled) and the packed transpose of the keys; hidden keys hold anything.
template <typename V>
void compute_scores(
    const AttentionProblem& problem, const TilePlace& tile, const typename V::scalar* queries,
    const typename V::scalar* keys_transposed, ScoreTile<V> scores, const BiasScratch<V>& bias_scratch) {
  const int64_t head_dim = problem.head_dim;
  product<V>(
      tile.num_queries(), tile.num_keys(), head_dim, {queries, matrix_row<V>(head_dim), 1},
      transposed<V>(keys_transposed, head_dim), {scores.data, scores.row}, false);
  if (problem.bias_of_distance != nullptr) {
    add_bias<V>(problem, tile, scores, bias_scratch);
  }
}

// Entries [begin, end of the row's last vector) := value.
template <typename V>
void fill_rest(typename V::scalar* row, int64_t begin, int64_t num_keys, typename V::scalar value) {
  for (int64_t j = begin; j < round_up(num_keys, V::width); ++j) {
    row[j] = value;
  }
}

// sums_j += sum_i weight_i P_ij over the rows of a tile, added up by themselves first: equal weights would otherwise
// round the same way a thousand times.
template <typename V>
void add_weighted_columns(
    const TilePlace& tile, ScoreTile<V> weights, const typename V::scalar* row_weights, typename V::scalar* sums) {
  for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
    typename V::vector sum = {};
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      sum += row_weights[i] * V::load(weights[i] + j);
    }
    V::store(sums + j, V::load(sums + j) + sum);
  }
}

constexpr int64_t kKeysPerPhiloxCall = 4 * kPhiloxLanes;

// D_ij of one query: 0 where the weight is dropped, 1 / (1 - p) elsewhere. Room for a whole philox call is needed.
template <typename scalar>
void dropout_factors(const AttentionProblem& problem, const TilePlace& tile, int64_t query, scalar* factors) {
  static_assert(kKeysPerBlock % 4 == 0 && kKeysPerForwardBlock % 4 == 0, "a counter holds four keys of one block");
  const scalar kept = static_cast<scalar>(problem.keep_scale);
  for (int64_t j = 0; j < tile.num_keys(); j += kKeysPerPhiloxCall) {
    uint32_t words[4][kPhiloxLanes];
    philox4x32(
        static_cast<uint32_t>((tile.first_key + j) / 4), static_cast<uint32_t>(query),
        static_cast<uint32_t>(tile.head), static_cast<uint32_t>(tile.sequence.index), problem.seed_low,
        problem.seed_high, words);
    for (int64_t i = 0; i < kPhiloxLanes; ++i) {
      factors[j + 4 * i] = words[0][i] < problem.dropout_threshold ? 0 : kept;
      factors[j + 4 * i + 1] = words[1][i] < problem.dropout_threshold ? 0 : kept;
      factors[j + 4 * i + 2] = words[2][i] < problem.dropout_threshold ? 0 : kept;
      factors[j + 4 * i + 3] = words[3][i] < problem.dropout_threshold ? 0 : kept;
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
