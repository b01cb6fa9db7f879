// Attention forward, for the queries of one sequence and the heads that share a key head:
//
//     lse_i = log sum_j exp(S_ij)      O_i = sum_j exp(S_ij - lse_i) D_ij v_j
//     centrality_j = sum over voting queries i of exp(S_ij - lse_i)
//
// The keys are taken in blocks whose K^T and V stay in the cache; the softmax is carried from block to block by the
// running maximum m and sum l of each query (online softmax). D is the dropout mask over 1 - p.

#pragma once

#include <cstdint>

#include "cpu/attention/tiles.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct ForwardScratch {
  using scalar = typename V::scalar;

  scalar* keys_transposed;  // of the block
  scalar* values;           // [keys of the block, matrix_row]
  scalar* rows;             // [the larger of tile and block, matrix_row]: queries, or keys to transpose
  scalar* sums;             // [queries of the unit, matrix_row]: the numerator of O
  scalar* maximum;          // [queries of the unit]: m
  scalar* normalizer;       // [queries of the unit]: l
  ScoreTile<V> scores;
  BiasScratch<V> bias;
  scalar* row_weights;      // [kQueriesPerTile]
  scalar* centrality;       // [keys of the block]
  scalar* dropout;          // [keys of the block]
  int64_t bytes;

  ForwardScratch(const AttentionProblem& problem, char* base) {
    const int64_t keys = round_up(smaller(problem.longest_k, kKeysPerForwardBlock), kPanelWidth<V>);
    const int64_t queries = smaller(problem.longest_q, kQueriesPerUnit);
    const int64_t tile = smaller(problem.longest_q, kQueriesPerTile);
    const int64_t row = matrix_row<V>(problem.head_dim);
    Scratch scratch(base);
    keys_transposed = scratch.take<scalar>(keys * problem.head_dim);
    values = scratch.take<scalar>(keys * row);
    rows = scratch.take<scalar>(larger(keys, tile) * row);
    sums = scratch.take<scalar>(queries * row);
    maximum = scratch.take<scalar>(queries);
    normalizer = scratch.take<scalar>(queries);
    scores.row = matrix_row<V>(keys);
    scores.data = scratch.take<scalar>(tile * scores.row);
    bias = BiasScratch<V>::take(scratch, problem, tile, keys);
    row_weights = scratch.take<scalar>(kQueriesPerTile);
    centrality = scratch.take<scalar>(keys + V::width);
    dropout = scratch.take<scalar>(round_up(keys, kKeysPerPhiloxCall));
    bytes = scratch.size();
  }
};

// One row of scores becomes exp(S - m), zero from num_visible on; m, l and the row of sums follow the new maximum.
template <typename V>
void softmax_row(
    typename V::scalar* scores, int64_t num_visible, int64_t num_keys, typename V::scalar& maximum,
    typename V::scalar& normalizer, typename V::scalar* sums, int64_t head_dim, bool first_block) {
  using scalar = typename V::scalar;
  fill_rest<V>(scores, num_visible, num_keys, static_cast<scalar>(-__builtin_inf()));
  typename V::vector largest = V::broadcast(maximum);
  for (int64_t j = 0; j < num_keys; j += V::width) {
    largest = V::max(largest, V::load(scores + j));
  }
  const scalar new_maximum = V::max(largest);
  // A row that has seen no key yet keeps a finite pivot, so that exp(-inf - pivot) is 0 and not NaN.
  const scalar pivot = new_maximum == -__builtin_inf() ? 0 : new_maximum;
  typename V::vector sum = {};
  for (int64_t j = 0; j < num_keys; j += V::width) {
    const typename V::vector weight = V::exp(V::load(scores + j) - pivot);
    V::store(scores + j, weight);
    sum += weight;
  }
  if (first_block) {
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

// A tile of one head: its weights and what they add to the sums of its queries.
template <typename V>
void forward_tile(const ForwardPass& pass, const TilePlace& tile, int64_t first_row, const ForwardScratch<V>& scratch) {
  const AttentionProblem& problem = pass.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const bool first_block = tile.first_key == 0;
  load_rows<V>(
      scratch.rows, problem.q, problem.dtype, tile.sequence.first_q + tile.first_query, tile.num_queries(), tile.head,
      head_dim, problem.scale);
  prefetch_rows(
      problem.q, problem.dtype, tile.sequence.first_q + tile.first_query, tile.num_queries(),
      smaller(tile.head + 1, problem.num_heads - 1), head_dim);
  compute_scores<V>(problem, tile, scratch.rows, scratch.keys_transposed, scratch.scores, scratch.bias);
  typename V::scalar* sums = scratch.sums + first_row * row;
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    softmax_row<V>(
        scratch.scores[i], visible_keys(problem, tile, tile.first_query + i), tile.num_keys(),
        scratch.maximum[first_row + i], scratch.normalizer[first_row + i], sums + i * row, head_dim, first_block);
  }
  if (pass.centrality_by_head != nullptr && centrality_is_fused(tile.sequence.num_q, tile.sequence.num_k)) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      const int64_t query = tile.sequence.first_q + tile.first_query + i;
      const bool votes = pass.query_mask == nullptr || pass.query_mask[query] != 0;
      const typename V::scalar normalizer = scratch.normalizer[first_row + i];
      scratch.row_weights[i] = votes && normalizer != 0 ? 1 / normalizer : 0;
    }
    add_weighted_columns<V>(tile, scratch.scores, scratch.row_weights, scratch.centrality);
  }
  if (problem.dropout) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      dropout_factors(problem, tile, tile.first_query + i, scratch.dropout);
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        scratch.scores[i][j] *= scratch.dropout[j];
      }
    }
  }
  product<V>(
      tile.num_queries(), head_dim, tile.num_keys(), {scratch.scores.data, scratch.scores.row, 1},
      row_major<V>(scratch.values, head_dim), {sums, row}, !first_block);
}

// O = sums / l and lse = m + log l; 0 and -inf for queries that saw no key.
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
    lse[query] = static_cast<scalar>(
        sees_a_key ? scratch.maximum[query - begin] + __builtin_log(normalizer) : -__builtin_inf());
  }
}

template <typename V>
void forward_sequence(
    const ForwardPass& pass, const Sequence& sequence, int64_t head_kv, bool is_last_head, int64_t begin, int64_t end,
    const ForwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
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
    for (int64_t first_key = 0; first_key < sequence.num_k; first_key += kKeysPerForwardBlock) {
      const int64_t end_key = smaller(first_key + kKeysPerForwardBlock, sequence.num_k);
      const int64_t num_keys = end_key - first_key;
      const bool is_packed = head > head_kv * gqa_group_size && sequence.num_k <= kKeysPerForwardBlock;
      if (!is_packed) {
        const int64_t row = sequence.first_k + first_key;
        load_rows<V>(scratch.rows, problem.k, problem.dtype, row, num_keys, head_kv, problem.head_dim);
        pack_transposed<V>(scratch.keys_transposed, scratch.rows, num_keys, problem.head_dim);
        load_rows<V>(scratch.values, problem.v, problem.dtype, row, num_keys, head_kv, problem.head_dim);
        if (!is_last_head) {
          prefetch_rows(problem.k, problem.dtype, row, num_keys, head_kv + 1, problem.head_dim);
          prefetch_rows(problem.v, problem.dtype, row, num_keys, head_kv + 1, problem.head_dim);
        }
      }
      for (int64_t query = begin; query < end; query += kQueriesPerTile) {
        const TilePlace tile = without_hidden_keys(
            problem, {sequence, head, query, smaller(query + kQueriesPerTile, end), first_key, end_key});
        if (tile.num_keys() > 0) {
          forward_tile<V>(pass, tile, query - begin, scratch);
        }
      }
    }
    store_outputs<V>(pass, sequence, head, begin, end, scratch);
  }
  if (fused_centrality) {
    scalar* centrality = static_cast<scalar*>(pass.centrality_by_head) + head_kv * pass.total_k + sequence.first_k;
    __builtin_memcpy(centrality, scratch.centrality, sequence.num_k * sizeof(scalar));
  }
}

template <typename V>
void forward(const ForwardPass& pass, const AttentionUnit& unit, char* scratch_memory) {
  const ForwardScratch<V> scratch(pass.problem, scratch_memory);
  for (int64_t s = unit.first_sequence; s < unit.end_sequence; ++s) {
    const Sequence sequence = sequence_at(pass.problem, s);
    for (int64_t head_kv = unit.first_head_kv; head_kv < unit.end_head_kv; ++head_kv) {
      const bool is_last = head_kv + 1 == unit.end_head_kv;
      forward_sequence<V>(pass, sequence, head_kv, is_last, unit.begin, smaller(unit.end, sequence.num_q), scratch);
    }
  }
}

template <typename V>
int64_t forward_scratch_bytes(const ForwardPass& pass) {
  return ForwardScratch<V>(pass.problem, nullptr).bytes;
}

}  // namespace
}  // namespace stamp::cpu
