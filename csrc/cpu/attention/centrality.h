// Centrality of a block of keys of one sequence, from the lse of an attention that has been computed:
//
//     centrality_j = sum over heads and voting queries i of exp(S_ij - lse_i)
//
// The keys own their sums, and heads and queries pass by in a fixed order.

#pragma once

#include <cstdint>

#include "cpu/attention/tiles.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct CentralityScratch {
  using scalar = typename V::scalar;

  scalar* keys_transposed;
  scalar* rows;         // [larger of a tile's queries and a block's keys, matrix_row]: queries, or keys to transpose
  ScoreTile<V> scores;  // S, then P
  BiasScratch<V> bias;
  scalar* votes;        // [queries of a tile]: 1 or 0
  scalar* sums;         // [keys of the block]
  int64_t bytes;

  CentralityScratch(const AttentionProblem& problem, char* base) {
    const int64_t num_keys = round_up(smaller(problem.longest_k, kKeysPerBlock), kPanelWidth<V>);
    const int64_t num_queries = smaller(problem.longest_q, kQueriesPerTile);
    Scratch scratch(base);
    keys_transposed = scratch.take<scalar>(num_keys * problem.head_dim);
    rows = scratch.take<scalar>(larger(num_queries, num_keys) * matrix_row<V>(problem.head_dim));
    scores.row = matrix_row<V>(num_keys);
    scores.data = scratch.take<scalar>(num_queries * scores.row);
    bias = BiasScratch<V>::take(scratch, problem, num_queries, num_keys);
    votes = scratch.take<scalar>(num_queries);
    sums = scratch.take<scalar>(num_keys);
    bytes = scratch.size();
  }
};

template <typename V>
void centrality_tile(const CentralityPass& pass, const TilePlace& tile, const CentralityScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t first_row = tile.sequence.first_q + tile.first_query;
  const scalar* lse = static_cast<const scalar*>(pass.lse) + tile.head * problem.total_q + first_row;
  load_rows<V>(
      scratch.rows, problem.q, problem.dtype, first_row, tile.num_queries(), tile.head, problem.head_dim,
      problem.scale);
  compute_scores<V>(problem, tile, scratch.rows, scratch.keys_transposed, scratch.scores, scratch.bias);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    scalar* row = scratch.scores[i];
    const bool sees_a_key = lse[i] != -__builtin_inf();
    scratch.votes[i] = pass.query_mask == nullptr || pass.query_mask[first_row + i] != 0 ? 1 : 0;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(row + j, V::exp(V::load(row + j) - lse[i]));
    }
    fill_rest<V>(
        row, sees_a_key ? visible_keys(problem, tile, tile.first_query + i) : 0, tile.num_keys(), 0);
  }
  add_weighted_columns<V>(tile, scratch.scores, scratch.votes, scratch.sums);
}

template <typename V>
void centrality_block(
    const CentralityPass& pass, const Sequence& sequence, int64_t first_key, int64_t end_key,
    const CentralityScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t num_keys = end_key - first_key;
  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
  fill_rest<V>(scratch.sums, 0, num_keys, 0);
  for (int64_t head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
    load_rows<V>(
        scratch.rows, problem.k, problem.dtype, sequence.first_k + first_key, num_keys, head_kv, problem.head_dim);
    pack_transposed<V>(scratch.keys_transposed, scratch.rows, num_keys, problem.head_dim);
    for (int64_t head = head_kv * gqa_group_size; head < (head_kv + 1) * gqa_group_size; ++head) {
      for (int64_t query = 0; query < sequence.num_q; query += kQueriesPerTile) {
        const TilePlace tile = without_hidden_keys(
            problem, {sequence, head, query, smaller(query + kQueriesPerTile, sequence.num_q), first_key, end_key});
        if (tile.num_keys() > 0) {
          centrality_tile<V>(pass, tile, scratch);
        }
      }
    }
  }
  scalar* centrality = static_cast<scalar*>(pass.centrality) + sequence.first_k + first_key;
  __builtin_memcpy(centrality, scratch.sums, num_keys * sizeof(scalar));
}

template <typename V>
void centrality(const CentralityPass& pass, const AttentionUnit& unit, char* scratch_memory) {
  const CentralityScratch<V> scratch(pass.problem, scratch_memory);
  for (int64_t s = unit.first_sequence; s < unit.end_sequence; ++s) {
    const Sequence sequence = sequence_at(pass.problem, s);
    if (pass.without_fused && centrality_is_fused(sequence.num_q, sequence.num_k)) {
      continue;
    }
    const int64_t end = smaller(unit.end, sequence.num_k);
    for (int64_t first_key = unit.begin; first_key < end; first_key += kKeysPerBlock) {
      centrality_block<V>(pass, sequence, first_key, smaller(first_key + kKeysPerBlock, end), scratch);
    }
  }
}

template <typename V>
int64_t centrality_scratch_bytes(const CentralityPass& pass) {
  return CentralityScratch<V>(pass.problem, nullptr).bytes;
}

}  // namespace
}  // namespace stamp::cpu
