// Centrality from the lse of an attention that has been computed:
//
//     centrality_j = sum over heads and queries i that count of P_ij,     P_ij = exp(S_ij - lse_i)
//
// A task computes blocks of kKeysPerBlock keys of its sequences, in all heads. For each block it loops over heads and
// tiles of queries in a fixed order, so the bits do not depend on the threads.

#pragma once

#include <cstdint>

#include "cpu/attention/bias.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/scratch.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct CentralityScratch {
  using scalar = typename V::scalar;

  scalar* keys_transposed;  // K^T [head_dim, keys of a block], in panels
  scalar* rows;             // [queries of a tile or keys of a block, head_dim]: Q, or K before it is transposed
  ScoreTile<V> scores;      // [queries of a tile, keys of a block]: S, then P
  BiasScratch<V> bias;
  scalar* row_weights;  // [queries of a tile]: 1 for queries that count, else 0
  scalar* sums;         // [keys of a block]: centrality
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
    row_weights = scratch.take<scalar>(num_queries);
    sums = scratch.take<scalar>(num_keys);
    bytes = scratch.size();
  }
};

// sums += the column sums of one tile.
template <typename V>
void centrality_tile(const CentralityPass& pass, const TilePlace& tile, const CentralityScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t start_row = tile.sequence.first_q + tile.start_query;
  const scalar* lse = static_cast<const scalar*>(pass.lse) + tile.head * problem.total_q + start_row;
  // scale Q [num_queries, head_dim]
  load_rows<V>(
      scratch.rows, problem.q, problem.dtype, start_row, tile.num_queries(), tile.head, problem.head_dim,
      problem.scale);
  compute_scores<V>(problem, tile, scratch.rows, scratch.keys_transposed, scratch.scores, scratch.bias);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    scalar* row = scratch.scores[i];
    const bool sees_a_key = lse[i] != -__builtin_inf();
    scratch.row_weights[i] = pass.query_mask == nullptr || pass.query_mask[start_row + i] != 0 ? 1 : 0;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(row + j, V::exp(V::load(row + j) - lse[i]));  // P = exp(S - lse)
    }
    fill_rest<V>(row, sees_a_key ? visible_keys(problem, tile, tile.start_query + i) : 0, tile.num_keys(), 0);
  }
  add_weighted_columns<V>(tile, scratch.scores, scratch.row_weights, scratch.sums);
}

// Centrality of the keys [start_key, end_key) of a sequence.
template <typename V>
void centrality_block(
    const CentralityPass& pass, const Sequence& sequence, int64_t start_key, int64_t end_key,
    const CentralityScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t num_keys = end_key - start_key;
  const int64_t gqa_group_size = problem.gqa_group_size;
  fill_rest<V>(scratch.sums, 0, num_keys, 0);
  for (int64_t head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
    // K [num_keys, head_dim]
    load_rows<V>(
        scratch.rows, problem.k, problem.dtype, sequence.first_k + start_key, num_keys, head_kv, problem.head_dim);
    pack_transposed<V>(scratch.keys_transposed, scratch.rows, num_keys, problem.head_dim);
    for (int64_t head = head_kv * gqa_group_size; head < (head_kv + 1) * gqa_group_size; ++head) {
      for (int64_t start_query = 0; start_query < sequence.num_q; start_query += kQueriesPerTile) {
        const int64_t end_query = smaller(start_query + kQueriesPerTile, sequence.num_q);
        const TilePlace tile =
            without_hidden_keys(problem, {sequence, head, start_query, end_query, start_key, end_key});
        if (tile.num_keys() > 0) {
          centrality_tile<V>(pass, tile, scratch);
        }
      }
    }
  }
  scalar* centrality = static_cast<scalar*>(pass.centrality) + sequence.first_k + start_key;
  __builtin_memcpy(centrality, scratch.sums, num_keys * sizeof(scalar));
}

template <typename V>
void centrality(const CentralityPass& pass, const AttentionTask& task, char* scratch_memory) {
  const CentralityScratch<V> scratch(pass.problem, scratch_memory);
  for (int64_t s = task.first_sequence; s < task.end_sequence; ++s) {
    const Sequence sequence = sequence_at(pass.problem, s);
    if (pass.skip_fused && centrality_is_fused(sequence.num_q, sequence.num_k)) {
      continue;
    }
    const int64_t end = smaller(task.end, sequence.num_k);
    for (int64_t start_key = task.begin; start_key < end; start_key += kKeysPerBlock) {
      centrality_block<V>(pass, sequence, start_key, smaller(start_key + kKeysPerBlock, end), scratch);
    }
  }
}

template <typename V>
int64_t centrality_scratch_bytes(const CentralityPass& pass) {
  return CentralityScratch<V>(pass.problem, nullptr).bytes;
}

}  // namespace
}  // namespace stamp::cpu
