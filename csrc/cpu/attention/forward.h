// Attention forward, with the online softmax of flash-attention:
//
//     P_ij = exp(S_ij - lse_i)      lse_i = log sum_j exp(S_ij)      O_i = sum_j P_ij D_ij v_j
//     centrality_j = sum over queries i that count of P_ij
//
// S are the scores of scores.h, D is the dropout mask of dropout.h. A task computes one KV head of one sequence after
// the other, and in it the query heads that share the KV head. For each query head it loops over blocks of keys, whose
// K^T and V stay in the cache, and over tiles of queries. The running maximum m and sum l of each query go from block
// to block; the numerators of O are rescaled when m rises.

#pragma once

#include <cstdint>

#include "cpu/attention/bias.h"
#include "cpu/attention/dropout.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/scratch.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct ForwardScratch {
  using scalar = typename V::scalar;

  scalar* keys_transposed;  // K^T [head_dim, keys of a block], in panels
  scalar* values;           // V [keys of a block, head_dim]
  scalar* rows;             // [queries of a tile or keys of a block, head_dim]: Q, or K before it is transposed
  scalar* sums;             // [queries of a task, head_dim]: the numerators of O
  scalar* maximum;          // [queries of a task]: m
  scalar* normalizer;       // [queries of a task]: l
  ScoreTile<V> scores;      // [queries of a tile, keys of a block]: S, then exp(S - m), then times D
  BiasScratch<V> bias;
  scalar* row_weights;  // [queries of a tile]: 1 / l for queries that count, else 0
  scalar* centrality;   // [keys of a block]
  DropoutFactors<scalar> dropout;
  int64_t bytes;

  ForwardScratch(const AttentionProblem& problem, char* base) {
    const int64_t num_keys = round_up(smaller(problem.longest_k, kKeysPerForwardBlock), kPanelWidth<V>);
    const int64_t num_queries = smaller(problem.longest_q, kQueriesPerTask);
    const int64_t num_tile_queries = smaller(problem.longest_q, kQueriesPerTile);
    const int64_t row = matrix_row<V>(problem.head_dim);
    Scratch scratch(base);
    keys_transposed = scratch.take<scalar>(num_keys * problem.head_dim);
    values = scratch.take<scalar>(num_keys * row);
    rows = scratch.take<scalar>(larger(num_keys, num_tile_queries) * row);
    sums = scratch.take<scalar>(num_queries * row);
    maximum = scratch.take<scalar>(num_queries);
    normalizer = scratch.take<scalar>(num_queries);
    scores.row = matrix_row<V>(num_keys);
    scores.data = scratch.take<scalar>(num_tile_queries * scores.row);
    bias = BiasScratch<V>::take(scratch, problem, num_tile_queries, num_keys);
    row_weights = scratch.take<scalar>(kQueriesPerTile);
    centrality = scratch.take<scalar>(num_keys + V::width);
    dropout = DropoutFactors<scalar>::take(scratch, problem, num_keys);
    bytes = scratch.size();
  }
};

// One row of scores S := exp(S - m), with zeros from num_visible on. Updates m and l, and rescales the row of sums.
template <typename V>
void softmax_row(
    typename V::scalar* scores, int64_t num_visible, int64_t num_keys, typename V::scalar& maximum,
    typename V::scalar& normalizer, typename V::scalar* sums, int64_t head_dim, bool is_first_block) {
  using scalar = typename V::scalar;
  fill_rest<V>(scores, num_visible, num_keys, static_cast<scalar>(-__builtin_inf()));
  typename V::vector largest = V::broadcast(maximum);
  for (int64_t j = 0; j < num_keys; j += V::width) {
    largest = V::max(largest, V::load(scores + j));
  }
  const scalar new_maximum = V::max(largest);
  // The pivot is finite even if no key was visible yet, so that exp(-inf - pivot) is 0 and not NaN.
  const scalar pivot = new_maximum == -__builtin_inf() ? 0 : new_maximum;
  typename V::vector sum = {};
  for (int64_t j = 0; j < num_keys; j += V::width) {
    const typename V::vector weight = V::exp(V::load(scores + j) - pivot);
    V::store(scores + j, weight);
    sum += weight;
  }
  if (is_first_block) {
    normalizer = V::sum(sum);
  } else {
    const scalar correction = static_cast<scalar>(__builtin_exp(maximum - pivot));
    normalizer = normalizer * correction + V::sum(sum);
    if (correction != 1) {
      for (int64_t d = 0; d < head_dim; d += V::width) {
        V::store(sums + d, V::load(sums + d) * correction);
      }
    }
  }
  maximum = new_maximum;
}

// One tile: sums += exp(S - m) D V, and the tile's part of the centrality. `start_row` is the tile's first row in sums.
template <typename V>
void forward_tile(const ForwardPass& pass, const TilePlace& tile, int64_t start_row, const ForwardScratch<V>& scratch) {
  const AttentionProblem& problem = pass.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const bool is_first_block = tile.start_key == 0;
  // scale Q [num_queries, head_dim]
  load_rows<V>(
      scratch.rows, problem.q, problem.dtype, tile.sequence.first_q + tile.start_query, tile.num_queries(), tile.head,
      head_dim, problem.scale);
  prefetch_rows(
      problem.q, problem.dtype, tile.sequence.first_q + tile.start_query, tile.num_queries(),
      smaller(tile.head + 1, problem.num_heads - 1), head_dim);
  compute_scores<V>(problem, tile, scratch.rows, scratch.keys_transposed, scratch.scores, scratch.bias);
  typename V::scalar* sums = scratch.sums + start_row * row;
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    softmax_row<V>(
        scratch.scores[i], visible_keys(problem, tile, tile.start_query + i), tile.num_keys(),
        scratch.maximum[start_row + i], scratch.normalizer[start_row + i], sums + i * row, head_dim, is_first_block);
  }
  if (pass.centrality_by_head != nullptr && centrality_is_fused(tile.sequence.num_q, tile.sequence.num_k)) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      const int64_t query = tile.sequence.first_q + tile.start_query + i;
      const bool counts = pass.query_mask == nullptr || pass.query_mask[query] != 0;
      const typename V::scalar normalizer = scratch.normalizer[start_row + i];
      scratch.row_weights[i] = counts && normalizer != 0 ? 1 / normalizer : 0;
    }
    add_weighted_columns<V>(tile, scratch.scores, scratch.row_weights, scratch.centrality);
  }
  if (problem.dropout.is_active) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      const typename V::scalar* factors = scratch.dropout.of_query(problem, tile, i);
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        scratch.scores[i][j] *= factors[j];
      }
    }
  }
  // sums += exp(S - m) D V
  product<V>(
      tile.num_queries(), head_dim, tile.num_keys(), {scratch.scores.data, scratch.scores.row, 1},
      row_major<V>(scratch.values, head_dim), {sums, row}, !is_first_block);
}

// O = sums / l and lse = m + log l; 0 and -inf for queries that see no key.
template <typename V>
void store_outputs(
    const ForwardPass& pass, const Sequence& sequence, int64_t head, int64_t begin, int64_t end,
    const ForwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  scalar* lse = static_cast<scalar*>(pass.lse) + head * problem.total_q + sequence.first_q;
  for (int64_t query = begin; query < end; ++query) {
    const scalar normalizer = scratch.normalizer[query - begin];
    const scalar* sums = scratch.sums + (query - begin) * matrix_row<V>(problem.head_dim);
    const bool sees_a_key = normalizer != 0;
    store_row(
        pass.out, problem.dtype, sequence.first_q + query, head, problem.head_dim, sees_a_key ? sums : nullptr,
        1 / normalizer);
    lse[query] =
        static_cast<scalar>(sees_a_key ? scratch.maximum[query - begin] + __builtin_log(normalizer) : -__builtin_inf());
  }
}

// The queries [begin, end) of one sequence, in the query heads of one KV head.
template <typename V>
void forward_sequence(
    const ForwardPass& pass, const Sequence& sequence, int64_t head_kv, bool is_last_head, int64_t begin, int64_t end,
    const ForwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.gqa_group_size;
  const bool fused_centrality =
      pass.centrality_by_head != nullptr && centrality_is_fused(sequence.num_q, sequence.num_k);
  if (fused_centrality) {
    fill_rest<V>(scratch.centrality, 0, sequence.num_k, 0);
  }
  for (int64_t head = head_kv * gqa_group_size; head < (head_kv + 1) * gqa_group_size; ++head) {
    for (int64_t i = 0; i < end - begin; ++i) {
      scratch.maximum[i] = static_cast<scalar>(-__builtin_inf());
      scratch.normalizer[i] = 0;
    }
    for (int64_t start_key = 0; start_key < sequence.num_k; start_key += kKeysPerForwardBlock) {
      const int64_t end_key = smaller(start_key + kKeysPerForwardBlock, sequence.num_k);
      const int64_t num_keys = end_key - start_key;
      // A single block of keys is loaded once for all heads.
      const bool is_packed = head > head_kv * gqa_group_size && sequence.num_k <= kKeysPerForwardBlock;
      if (!is_packed) {
        const int64_t row = sequence.first_k + start_key;
        // K [num_keys, head_dim], K^T [head_dim, num_keys] and V [num_keys, head_dim]
        load_rows<V>(scratch.rows, problem.k, problem.dtype, row, num_keys, head_kv, problem.head_dim);
        pack_transposed<V>(scratch.keys_transposed, scratch.rows, num_keys, problem.head_dim);
        load_rows<V>(scratch.values, problem.v, problem.dtype, row, num_keys, head_kv, problem.head_dim);
        if (!is_last_head) {
          prefetch_rows(problem.k, problem.dtype, row, num_keys, head_kv + 1, problem.head_dim);
          prefetch_rows(problem.v, problem.dtype, row, num_keys, head_kv + 1, problem.head_dim);
        }
      }
      for (int64_t start_query = begin; start_query < end; start_query += kQueriesPerTile) {
        const int64_t end_query = smaller(start_query + kQueriesPerTile, end);
        const TilePlace tile =
            without_hidden_keys(problem, {sequence, head, start_query, end_query, start_key, end_key});
        if (tile.num_keys() > 0) {
          forward_tile<V>(pass, tile, start_query - begin, scratch);
        }
      }
    }
    store_outputs<V>(pass, sequence, head, begin, end, scratch);
  }
  if (fused_centrality) {
    scalar* centrality = static_cast<scalar*>(pass.centrality_by_head) + head_kv * problem.total_k + sequence.first_k;
    __builtin_memcpy(centrality, scratch.centrality, sequence.num_k * sizeof(scalar));
  }
}

template <typename V>
void forward(const ForwardPass& pass, const AttentionTask& task, char* scratch_memory) {
  const ForwardScratch<V> scratch(pass.problem, scratch_memory);
  for (int64_t s = task.first_sequence; s < task.end_sequence; ++s) {
    const Sequence sequence = sequence_at(pass.problem, s);
    for (int64_t head_kv = task.first_head_kv; head_kv < task.end_head_kv; ++head_kv) {
      const bool is_last = head_kv + 1 == task.end_head_kv;
      forward_sequence<V>(pass, sequence, head_kv, is_last, task.begin, smaller(task.end, sequence.num_q), scratch);
    }
  }
}

template <typename V>
int64_t forward_scratch_bytes(const ForwardPass& pass) {
  return ForwardScratch<V>(pass.problem, nullptr).bytes;
}

}  // namespace
}  // namespace stamp::cpu
