// Attention backward, for a block of keys of one sequence and the heads that share a key head. With P = exp(S - lse)
// and the dropout mask D over 1 - p:
//
//     dP = dO V^T      delta_i = dO_i . O_i      dS = P (D dP - delta)
//     dV = (P D)^T dO  dK = scale dS^T Q         dQ = scale dS K
//     dbias[b] = sum of dS over the pairs in bucket b
//
// The block's matrices stay in the cache while the queries pass by: five products, each score computed once. A sequence
// with one block has its dQ at once; a longer one adds up what its blocks give, part by part.

#pragma once

#include <cstdint>

#include "cpu/attention/tiles.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct BackwardScratch {
  using scalar = typename V::scalar;

  scalar* keys;               // [keys of the block, matrix_row]
  scalar* keys_transposed;
  scalar* values_transposed;
  scalar* dk;                 // [keys of the block, matrix_row]
  scalar* dv;
  scalar* queries;            // [queries of a tile, matrix_row], times scale
  scalar* grad_out;           // the same of dO
  scalar* rows;               // [larger of a tile's queries and a block's keys, matrix_row]: O, dQ, or values
  scalar* delta;              // [queries of a tile]
  ScoreTile<V> weights;       // S, then P, then P D
  ScoreTile<V> d_scores;      // dP, then dS
  BiasScratch<V> bias;
  scalar* dropout;            // [keys of the block]
  int64_t bytes;

  BackwardScratch(const AttentionProblem& problem, char* base) {
    const int64_t num_keys = round_up(smaller(problem.longest_k, kKeysPerBlock), kPanelWidth<V>);
    const int64_t num_queries = smaller(problem.longest_q, kQueriesPerTile);
    const int64_t row = matrix_row<V>(problem.head_dim);
    Scratch scratch(base);
    keys = scratch.take<scalar>(num_keys * row);
    keys_transposed = scratch.take<scalar>(num_keys * problem.head_dim);
    values_transposed = scratch.take<scalar>(num_keys * problem.head_dim);
    dk = scratch.take<scalar>(num_keys * row);
    dv = scratch.take<scalar>(num_keys * row);
    queries = scratch.take<scalar>(num_queries * row);
    grad_out = scratch.take<scalar>(num_queries * row);
    rows = scratch.take<scalar>(larger(num_queries, num_keys) * row);
    delta = scratch.take<scalar>(num_queries);
    weights.row = d_scores.row = matrix_row<V>(num_keys);
    weights.data = scratch.take<scalar>(num_queries * weights.row);
    d_scores.data = scratch.take<scalar>(num_queries * d_scores.row);
    bias = BiasScratch<V>::take(scratch, problem, num_queries, num_keys);
    dropout = scratch.take<scalar>(round_up(num_keys, kKeysPerPhiloxCall));
    bytes = scratch.size();
  }
};

inline bool needs_d_scores(const BackwardPass& pass) {
  return pass.dq.data != nullptr || pass.dk.data != nullptr || pass.dbias_by_unit != nullptr;
}

// One row of S and dP becomes P D and dS.
template <typename V>
void backward_row(
    typename V::scalar* weights, typename V::scalar* d_scores, int64_t num_visible, int64_t num_keys,
    typename V::scalar lse, typename V::scalar delta, const typename V::scalar* dropout, bool with_d_scores) {
  for (int64_t j = 0; j < num_keys; j += V::width) {
    const typename V::vector weight = V::exp(V::load(weights + j) - lse);
    const typename V::vector dropped = dropout == nullptr ? weight : weight * V::load(dropout + j);
    V::store(weights + j, dropped);
    if (with_d_scores) {
      V::store(d_scores + j, dropped * V::load(d_scores + j) - weight * delta);
    }
  }
  fill_rest<V>(weights, num_visible, num_keys, 0);
  if (with_d_scores) {
    fill_rest<V>(d_scores, num_visible, num_keys, 0);
  }
}

// Loads a tile's dO and, where dS is needed, its delta.
template <typename V>
void load_output_gradient(const BackwardPass& pass, const TilePlace& tile, const BackwardScratch<V>& scratch) {
  const AttentionProblem& problem = pass.problem;
  const int64_t first_row = tile.sequence.first_q + tile.first_query;
  load_rows<V>(
      scratch.grad_out, pass.grad_out, problem.dtype, first_row, tile.num_queries(), tile.head, problem.head_dim);
  if (!needs_d_scores(pass)) {
    return;
  }
  load_rows<V>(scratch.rows, pass.out, problem.dtype, first_row, tile.num_queries(), tile.head, problem.head_dim);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t row = i * matrix_row<V>(problem.head_dim);
    typename V::vector sum = {};
    for (int64_t d = 0; d < problem.head_dim; d += V::width) {
      sum += V::load(scratch.grad_out + row + d) * V::load(scratch.rows + row + d);
    }
    scratch.delta[i] = V::sum(sum);
  }
}

// Where the dQ of a tile's row goes: to the gradient itself, or to its sequence's part.
template <typename V>
typename V::scalar* dq_part_row(const BackwardPass& pass, const TilePlace& tile, int64_t part, int64_t query) {
  const AttentionProblem& problem = pass.problem;
  const int64_t row = part * tile.sequence.num_q + query;
  return static_cast<typename V::scalar*>(pass.dq_parts) + pass.dq_parts_offset[tile.sequence.index] +
      (row * problem.num_heads + tile.head) * problem.head_dim;
}

// Stores, or adds to what the part's earlier blocks gave, a tile's dQ; null: it is zero.
template <typename V>
void add_query_gradient(
    const BackwardPass& pass, const TilePlace& tile, int64_t part, bool first_block, const typename V::scalar* dq) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const scalar scale = static_cast<scalar>(problem.scale);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t query = tile.first_query + i;
    const scalar* row = dq == nullptr ? nullptr : dq + i * matrix_row<V>(problem.head_dim);
    if (tile.sequence.num_k <= kKeysPerBlock) {
      store_row(pass.dq, problem.dtype, tile.sequence.first_q + query, tile.head, problem.head_dim, row, scale);
      continue;
    }
    scalar* sum = dq_part_row<V>(pass, tile, part, query);
    for (int64_t d = 0; d < problem.head_dim; ++d) {
      sum[d] = (first_block ? 0 : sum[d]) + (row == nullptr ? 0 : scale * row[d]);
    }
  }
}

template <typename V>
void backward_tile(
    const BackwardPass& pass, const TilePlace& tile, int64_t part, bool first_block, double* dbias,
    const BackwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const bool with_d_scores = needs_d_scores(pass);
  const scalar* lse =
      static_cast<const scalar*>(pass.lse) + tile.head * problem.total_q + tile.sequence.first_q + tile.first_query;

  load_output_gradient<V>(pass, tile, scratch);
  load_rows<V>(
      scratch.queries, problem.q, problem.dtype, tile.sequence.first_q + tile.first_query, tile.num_queries(),
      tile.head, head_dim, problem.scale);
  compute_scores<V>(problem, tile, scratch.queries, scratch.keys_transposed, scratch.weights, scratch.bias);
  if (with_d_scores) {
    product<V>(
        tile.num_queries(), tile.num_keys(), head_dim, {scratch.grad_out, row, 1},
        transposed<V>(scratch.values_transposed, head_dim), {scratch.d_scores.data, scratch.d_scores.row}, false);
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t query = tile.first_query + i;
    if (problem.dropout) {
      dropout_factors(problem, tile, query, scratch.dropout);
    }
    const bool sees_a_key = lse[i] != -__builtin_inf();
    backward_row<V>(
        scratch.weights[i], scratch.d_scores[i], sees_a_key ? visible_keys(problem, tile, query) : 0, tile.num_keys(),
        lse[i], scratch.delta[i], problem.dropout ? scratch.dropout : nullptr, with_d_scores);
  }

  if (pass.dv.data != nullptr) {
    product<V>(
        tile.num_keys(), head_dim, tile.num_queries(), {scratch.weights.data, 1, scratch.weights.row},
        row_major<V>(scratch.grad_out, head_dim), {scratch.dv, row}, true);
  }
  if (pass.dk.data != nullptr) {
    product<V>(
        tile.num_keys(), head_dim, tile.num_queries(), {scratch.d_scores.data, 1, scratch.d_scores.row},
        row_major<V>(scratch.queries, head_dim), {scratch.dk, row}, true);
  }
  if (dbias != nullptr) {
    add_bias_gradient<V>(problem, tile, scratch.d_scores, scratch.bias, dbias);
  }
  if (pass.dq.data != nullptr) {
    product<V>(
        tile.num_queries(), head_dim, tile.num_keys(), {scratch.d_scores.data, scratch.d_scores.row, 1},
        row_major<V>(scratch.keys, head_dim), {scratch.rows, row}, false);
    add_query_gradient<V>(pass, tile, part, first_block, scratch.rows);
  }
}

// Keys [first_key, end_key) of a sequence and a key head.
struct BlockPlace {
  Sequence sequence;
  int64_t head_kv;
  int64_t first_key;
  int64_t end_key;
  int64_t part;
  bool first_of_part;
};

// Asks for what the next key head's block will read.
inline void prefetch_block(const BackwardPass& pass, const BlockPlace& block) {
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
  const int64_t num_keys = block.end_key - block.first_key, first_row_k = block.sequence.first_k + block.first_key;
  for (const HeadRows* rows : {&problem.k, &problem.v}) {
    prefetch_rows(*rows, problem.dtype, first_row_k, num_keys, block.head_kv + 1, problem.head_dim);
  }
  for (const HeadRows* rows : {&problem.q, &pass.out, &pass.grad_out}) {
    prefetch_rows(
        *rows, problem.dtype, block.sequence.first_q, smaller(block.sequence.num_q, kQueriesPerTile),
        (block.head_kv + 1) * gqa_group_size, problem.head_dim);
  }
}

// One block, against all queries of its sequence in all heads of the group.
template <typename V>
void backward_block(
    const BackwardPass& pass, const BlockPlace& block, double* dbias, const BackwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const Sequence& sequence = block.sequence;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const int64_t num_keys = block.end_key - block.first_key;
  const int64_t first_row = sequence.first_k + block.first_key;
  if (needs_d_scores(pass)) {
    load_rows<V>(scratch.rows, problem.v, problem.dtype, first_row, num_keys, block.head_kv, head_dim);
    pack_transposed<V>(scratch.values_transposed, scratch.rows, num_keys, head_dim);
  }
  load_rows<V>(scratch.keys, problem.k, problem.dtype, first_row, num_keys, block.head_kv, head_dim);
  pack_transposed<V>(scratch.keys_transposed, scratch.keys, num_keys, head_dim);
  __builtin_memset(scratch.dk, 0, num_keys * row * sizeof(scalar));
  __builtin_memset(scratch.dv, 0, num_keys * row * sizeof(scalar));

  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
  for (int64_t h = 0; h < gqa_group_size; ++h) {
    const int64_t head = block.head_kv * gqa_group_size + h;
    double* dbias_of_head = dbias == nullptr ? nullptr : dbias + h * problem.num_buckets;
    for (int64_t query = 0; query < sequence.num_q; query += kQueriesPerTile) {
      const int64_t end_query = smaller(query + kQueriesPerTile, sequence.num_q);
      const TilePlace tile =
          without_hidden_keys(problem, {sequence, head, query, end_query, block.first_key, block.end_key});
      if (tile.num_keys() > 0) {
        backward_tile<V>(pass, tile, block.part, block.first_of_part, dbias_of_head, scratch);
      } else if (pass.dq.data != nullptr && block.first_of_part) {
        add_query_gradient<V>(pass, tile, block.part, block.first_of_part, nullptr);
      }
    }
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    if (pass.dk.data != nullptr) {
      store_row<scalar>(pass.dk, problem.dtype, first_row + j, block.head_kv, head_dim, scratch.dk + j * row, 1);
    }
    if (pass.dv.data != nullptr) {
      store_row<scalar>(pass.dv, problem.dtype, first_row + j, block.head_kv, head_dim, scratch.dv + j * row, 1);
    }
  }
}

// dQ of queries without a key.
inline void zero_query_gradients(const BackwardPass& pass, const Sequence& sequence, int64_t head_kv) {
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
  for (int64_t query = 0; query < sequence.num_q; ++query) {
    for (int64_t head = head_kv * gqa_group_size; head < (head_kv + 1) * gqa_group_size; ++head) {
      store_row<float>(pass.dq, problem.dtype, sequence.first_q + query, head, problem.head_dim, nullptr, 1);
    }
  }
}

template <typename V>
void backward(const BackwardPass& pass, const AttentionUnit& unit, char* scratch_memory) {
  const AttentionProblem& problem = pass.problem;
  const BackwardScratch<V> scratch(problem, scratch_memory);
  const int64_t dbias_of_key_head = problem.num_heads / problem.num_heads_kv * problem.num_buckets;
  double* dbias = nullptr;
  if (pass.dbias_by_unit != nullptr) {
    dbias = pass.dbias_by_unit + unit.first_head * problem.num_buckets;
    __builtin_memset(dbias, 0, (unit.end_head_kv - unit.first_head_kv) * dbias_of_key_head * sizeof(double));
  }
  for (int64_t s = unit.first_sequence; s < unit.end_sequence; ++s) {
    const Sequence sequence = sequence_at(problem, s);
    const int64_t end = smaller(unit.end, sequence.num_k);
    for (int64_t head_kv = unit.first_head_kv; head_kv < unit.end_head_kv; ++head_kv) {
      if (sequence.num_k == 0 && pass.dq.data != nullptr) {
        zero_query_gradients(pass, sequence, head_kv);
      }
      double* dbias_of_head =
          dbias == nullptr ? nullptr : dbias + (head_kv - unit.first_head_kv) * dbias_of_key_head;
      for (int64_t first_key = unit.begin; first_key < end; first_key += kKeysPerBlock) {
        const int64_t end_key = smaller(first_key + kKeysPerBlock, end);
        const BlockPlace block = {sequence, head_kv, first_key, end_key, unit.part, first_key == unit.begin};
        if (head_kv + 1 < unit.end_head_kv) {
          prefetch_block(pass, block);
        }
        backward_block<V>(pass, block, dbias_of_head, scratch);
      }
    }
  }
}

template <typename V>
int64_t backward_scratch_bytes(const BackwardPass& pass) {
  return BackwardScratch<V>(pass.problem, nullptr).bytes;
}

}  // namespace
}  // namespace stamp::cpu
