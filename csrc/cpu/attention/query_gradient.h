// Where the backward pass puts dQ, which sums over the blocks of keys:
//
//     dQ_i = scale sum_j dS_ij k_j
//
// A sequence with a single block writes its rows of dq. A longer one sums the blocks of each split of its keys into the
// split's rows of dq_splits, and the op sums over the splits. Internal linkage, for the reason given in
// cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tiles.h"

namespace stamp::cpu {
namespace {

// The row of dQ of one query and head in a split of its sequence.
template <typename V>
typename V::scalar* dq_split_row(const BackwardPass& pass, const TilePlace& tile, int64_t split, int64_t query) {
  const AttentionProblem& problem = pass.problem;
  const int64_t row = split * tile.sequence.num_q + query;
  return static_cast<typename V::scalar*>(pass.dq_splits) + pass.dq_splits_offset[tile.sequence.index] +
      (row * problem.num_heads + tile.head) * problem.head_dim;
}

// Stores dQ [num_queries, head_dim] of a tile, or adds it to that of the split's earlier blocks. Null means zeros.
template <typename V>
void store_dq_tile(
    const BackwardPass& pass, const TilePlace& tile, int64_t split, bool is_first_block, const typename V::scalar* dq) {
  using scalar = typename V::scalar;
  const AttentionProblem& problem = pass.problem;
  const scalar scale = static_cast<scalar>(problem.scale);
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const int64_t query = tile.start_query + i;
    const scalar* row = dq == nullptr ? nullptr : dq + i * matrix_row<V>(problem.head_dim);
    if (tile.sequence.num_k <= kKeysPerBlock) {
      store_row(pass.dq, problem.dtype, tile.sequence.first_q + query, tile.head, problem.head_dim, row, scale);
      continue;
    }
    scalar* sum = dq_split_row<V>(pass, tile, split, query);
    for (int64_t d = 0; d < problem.head_dim; ++d) {
      sum[d] = (is_first_block ? 0 : sum[d]) + (row == nullptr ? 0 : scale * row[d]);
    }
  }
}

// dQ of the queries of a sequence without keys, in the query heads of one KV head.
inline void zero_dq(const BackwardPass& pass, const Sequence& sequence, int64_t head_kv) {
  const AttentionProblem& problem = pass.problem;
  const int64_t gqa_group_size = problem.gqa_group_size;
  for (int64_t query = 0; query < sequence.num_q; ++query) {
    for (int64_t head = head_kv * gqa_group_size; head < (head_kv + 1) * gqa_group_size; ++head) {
      store_row<float>(pass.dq, problem.dtype, sequence.first_q + query, head, problem.head_dim, nullptr, 1);
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
