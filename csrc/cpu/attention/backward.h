// Attention backward, by blocks of keys as in flash-attention. With P = exp(S - lse) and the dropout mask D:
//
//     dP = dO V^T             delta_i = dO_i . O_i      dS = P (D dP - delta)
//     dV = (P D)^T dO         dK = scale dS^T Q         dQ = scale dS K
//     dbias[head, bucket] = sum of dS over the pairs in the bucket
//
// A task computes one block of keys after the other. The matrices of a block stay in the cache, and the task loops over
// the query heads that share the KV head and over tiles of queries: five products for each tile, each score computed
// once. The dQ of a sequence with a single block is final; for a longer one query_gradient.h sums over the blocks.

#pragma once

#include <cstdint>

#include "cpu/attention/bias.h"
#include "cpu/attention/bias_gradient.h"
#include "cpu/attention/dropout.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/query_gradient.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/scores.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/scratch.h"

namespace stamp::cpu {
namespace {

template <typename V>
struct BackwardScratch {
  using scalar = typename V::scalar;

  scalar* keys;               // K [keys of a block, head_dim]
  scalar* keys_transposed;    // K^T [head_dim, keys of a block], in panels
  scalar* values_transposed;  // V^T [head_dim, keys of a block], in panels
  scalar* dk;                 // [keys of a block, head_dim]
  scalar* dv;                 // [keys of a block, head_dim]
  scalar* queries;            // scale Q [queries of a tile, head_dim]
  scalar* grad_out;           // dO [queries of a tile, head_dim]
  scalar* rows;               // [queries of a tile or keys of a block, head_dim]: O, dQ, or V before it is transposed
  scalar* delta;              // [queries of a tile]
  ScoreTile<V> weights;       // [queries of a tile, keys of a block]: S, then P D
  ScoreTile<V> dscores;       // [queries of a tile, keys of a block]: dP, then dS
  BiasScratch<V> bias;
  DropoutFactors<scalar> dropout;
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
    weights.row = dscores.row = matrix_row<V>(num_keys);
    weights.data = scratch.take<scalar>(num_queries * weights.row);
    dscores.data = scratch.take<scalar>(num_queries * dscores.row);
    bias = BiasScratch<V>::take(scratch, problem, num_queries, num_keys);
    dropout = DropoutFactors<scalar>::take(scratch, problem, num_keys);
    bytes = scratch.size();
  }
};

inline bool needs_dscores(const BackwardPass& pass) {
  return pass.dq.data != nullptr || pass.dk.data != nullptr || pass.dbias_by_task != nullptr;
}

// One row: S := P D and dP := dS, with zeros from num_visible on.
template <typename V>
void backward_row(
    typename V::scalar* weights, typename V::scalar* dscores, int64_t num_visible, int64_t num_keys,
    typename V::scalar lse, typename V::scalar delta, const typename V::scalar* dropout, bool with_dscores) {
  for (int64_t j = 0; j < num_keys; j += V::width) {
    const typename V::vector weight = V::exp(V::load(weights + j) - lse);  // P = exp(S - lse)
    const typename V::vector dropped = dropout == nullptr ? weight : weight * V::load(dropout + j);
    V::store(weights + j, dropped);
    if (with_dscores) {
      V::store(dscores + j, dropped * V::load(dscores + j) - weight * delta);  // dS = P (D dP - delta)
    }
  }
  fill_rest<V>(weights, num_visible, num_keys, 0);
  if (with_dscores) {
    fill_rest<V>(dscores, num_visible, num_keys, 0);
  }
}

// Loads dO of a tile and, where dS is needed, computes its delta.
template <typename V>
void load_grad_out(const BackwardPass& pass, const TilePlace& tile, const BackwardScratch<V>& scratch) {
  const AttentionProblem& problem = pass.problem;
  const int64_t start_row = tile.sequence.first_q + tile.start_query;
  // dO [num_queries, head_dim]
  load_rows<V>(
      scratch.grad_out, pass.grad_out, problem.dtype, start_row, tile.num_queries(), tile.head, problem.head_dim);
  if (!needs_dscores(pass)) {
    return;
  }
  // O [num_queries, head_dim]
  load_rows<V>(scratch.rows, pass.out, problem.dtype, start_row, tile.num_queries(), tile.head, problem.head_dim);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t row = i * matrix_row<V>(problem.head_dim);
    typename V::vector sum = {};
    for (int64_t d = 0; d < problem.head_dim; d += V::width) {
      sum += V::load(scratch.grad_out + row + d) * V::load(scratch.rows + row + d);
    }
    scratch.delta[i] = V::sum(sum);
  }
}

// One tile: adds to dK, dV, dQ and dbias. dbias [num_buckets] is that of the tile's head; null: not needed.
template <typename V>
void backward_tile(
    const BackwardPass& pass, const TilePlace& tile, int64_t split, bool is_first_block, double* dbias,
    const BackwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const bool with_dscores = needs_dscores(pass);
  const scalar* lse =
      static_cast<const scalar*>(pass.lse) + tile.head * problem.total_q + tile.sequence.first_q + tile.start_query;

  load_grad_out<V>(pass, tile, scratch);
  // scale Q [num_queries, head_dim]
  load_rows<V>(
      scratch.queries, problem.q, problem.dtype, tile.sequence.first_q + tile.start_query, tile.num_queries(),
      tile.head, head_dim, problem.scale);
  compute_scores<V>(problem, tile, scratch.queries, scratch.keys_transposed, scratch.weights, scratch.bias);
  if (with_dscores) {
    // dP = dO V^T
    product<V>(
        tile.num_queries(), tile.num_keys(), head_dim, {scratch.grad_out, row, 1},
        transposed<V>(scratch.values_transposed, head_dim), {scratch.dscores.data, scratch.dscores.row}, false);
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t query = tile.start_query + i;
    const scalar* factors = problem.dropout.is_active ? scratch.dropout.of_query(problem, tile, i) : nullptr;
    const bool sees_a_key = lse[i] != -__builtin_inf();
    backward_row<V>(
        scratch.weights[i], scratch.dscores[i], sees_a_key ? visible_keys(problem, tile, query) : 0, tile.num_keys(),
        lse[i], scratch.delta[i], factors, with_dscores);
  }

  if (pass.dv.data != nullptr) {
    // dV += (P D)^T dO
    product<V>(
        tile.num_keys(), head_dim, tile.num_queries(), {scratch.weights.data, 1, scratch.weights.row},
        row_major<V>(scratch.grad_out, head_dim), {scratch.dv, row}, true);
  }
  if (pass.dk.data != nullptr) {
    // dK += dS^T (scale Q)
    product<V>(
        tile.num_keys(), head_dim, tile.num_queries(), {scratch.dscores.data, 1, scratch.dscores.row},
        row_major<V>(scratch.queries, head_dim), {scratch.dk, row}, true);
  }
  if (dbias != nullptr) {
    add_dbias<V>(problem, tile, scratch.dscores, scratch.bias, dbias);
  }
  if (pass.dq.data != nullptr) {
    // dQ = dS K, scaled when it is stored
    product<V>(
        tile.num_queries(), head_dim, tile.num_keys(), {scratch.dscores.data, scratch.dscores.row, 1},
        row_major<V>(scratch.keys, head_dim), {scratch.rows, row}, false);
    store_dq_tile<V>(pass, tile, split, is_first_block, scratch.rows);
  }
}

// Keys [start_key, end_key) of a sequence in one KV head, a block of a split.
struct BlockPlace {
  Sequence sequence;
  int64_t head_kv;
  int64_t start_key;
  int64_t end_key;
  int64_t split;
  bool is_first_of_split;
};

// Prefetches what the same block of the next KV head will read.
inline void prefetch_block(const BackwardPass& pass, const BlockPlace& block) {
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.gqa_group_size;
  const int64_t num_keys = block.end_key - block.start_key, start_row_k = block.sequence.first_k + block.start_key;
  for (const HeadRows* rows : {&problem.k, &problem.v}) {
    prefetch_rows(*rows, problem.dtype, start_row_k, num_keys, block.head_kv + 1, problem.head_dim);
  }
  for (const HeadRows* rows : {&problem.q, &pass.out, &pass.grad_out}) {
    prefetch_rows(
        *rows, problem.dtype, block.sequence.first_q, smaller(block.sequence.num_q, kQueriesPerTile),
        (block.head_kv + 1) * gqa_group_size, problem.head_dim);
  }
}

// One block of keys, with all queries of its sequence in the query heads that share its KV head.
template <typename V>
void backward_block(
    const BackwardPass& pass, const BlockPlace& block, double* dbias, const BackwardScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const Sequence& sequence = block.sequence;
  const int64_t head_dim = problem.head_dim;
  const int64_t row = matrix_row<V>(head_dim);
  const int64_t num_keys = block.end_key - block.start_key;
  const int64_t start_row = sequence.first_k + block.start_key;
  if (needs_dscores(pass)) {
    // V [num_keys, head_dim] and V^T [head_dim, num_keys]
    load_rows<V>(scratch.rows, problem.v, problem.dtype, start_row, num_keys, block.head_kv, head_dim);
    pack_transposed<V>(scratch.values_transposed, scratch.rows, num_keys, head_dim);
  }
  // K [num_keys, head_dim] and K^T [head_dim, num_keys]
  load_rows<V>(scratch.keys, problem.k, problem.dtype, start_row, num_keys, block.head_kv, head_dim);
  pack_transposed<V>(scratch.keys_transposed, scratch.keys, num_keys, head_dim);
  __builtin_memset(scratch.dk, 0, num_keys * row * sizeof(scalar));
  __builtin_memset(scratch.dv, 0, num_keys * row * sizeof(scalar));

  const int64_t gqa_group_size = problem.gqa_group_size;
  for (int64_t h = 0; h < gqa_group_size; ++h) {
    const int64_t head = block.head_kv * gqa_group_size + h;
    double* dbias_of_head = dbias == nullptr ? nullptr : dbias + h * problem.bias.num_buckets;
    for (int64_t start_query = 0; start_query < sequence.num_q; start_query += kQueriesPerTile) {
      const int64_t end_query = smaller(start_query + kQueriesPerTile, sequence.num_q);
      const TilePlace tile =
          without_hidden_keys(problem, {sequence, head, start_query, end_query, block.start_key, block.end_key});
      if (tile.num_keys() > 0) {
        backward_tile<V>(pass, tile, block.split, block.is_first_of_split, dbias_of_head, scratch);
      } else if (pass.dq.data != nullptr && block.is_first_of_split) {
        store_dq_tile<V>(pass, tile, block.split, block.is_first_of_split, nullptr);
      }
    }
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    if (pass.dk.data != nullptr) {
      store_row<scalar>(pass.dk, problem.dtype, start_row + j, block.head_kv, head_dim, scratch.dk + j * row, 1);
    }
    if (pass.dv.data != nullptr) {
      store_row<scalar>(pass.dv, problem.dtype, start_row + j, block.head_kv, head_dim, scratch.dv + j * row, 1);
    }
  }
}

template <typename V>
void backward(const BackwardPass& pass, const AttentionTask& task, char* scratch_memory) {
  const AttentionProblem& problem = pass.problem;
  const BackwardScratch<V> scratch(problem, scratch_memory);
  const int64_t dbias_head_kv_size = problem.gqa_group_size * problem.bias.num_buckets;
  double* dbias = nullptr;
  if (pass.dbias_by_task != nullptr) {
    dbias = pass.dbias_by_task + task.first_dbias_head * problem.bias.num_buckets;
    __builtin_memset(dbias, 0, (task.end_head_kv - task.first_head_kv) * dbias_head_kv_size * sizeof(double));
  }
  for (int64_t s = task.first_sequence; s < task.end_sequence; ++s) {
    const Sequence sequence = sequence_at(problem, s);
    const int64_t end = smaller(task.end, sequence.num_k);
    for (int64_t head_kv = task.first_head_kv; head_kv < task.end_head_kv; ++head_kv) {
      if (sequence.num_k == 0 && pass.dq.data != nullptr) {
        zero_dq(pass, sequence, head_kv);
      }
      double* dbias_of_head_kv =
          dbias == nullptr ? nullptr : dbias + (head_kv - task.first_head_kv) * dbias_head_kv_size;
      for (int64_t start_key = task.begin; start_key < end; start_key += kKeysPerBlock) {
        const int64_t end_key = smaller(start_key + kKeysPerBlock, end);
        BlockPlace block;
        block.sequence = sequence;
        block.head_kv = head_kv;
        block.start_key = start_key;
        block.end_key = end_key;
        block.split = task.split;
        block.is_first_of_split = start_key == task.begin;
        if (head_kv + 1 < task.end_head_kv) {
          prefetch_block(pass, block);
        }
        backward_block<V>(pass, block, dbias_of_head_kv, scratch);
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
