// The scores of a tile:
//
//     S_ij = scale q_i . k_j + bias[head, bucket(position_k[j] - position_q[i])]
//
// Keys that the causal mask hides get a score too; the caller overwrites it. Internal linkage, for the reason given in
// cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/bias.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/matrix_product.h"

namespace stamp::cpu {
namespace {

// scores [num_queries, num_keys] from the queries [num_queries, head_dim], already scaled, and K^T [head_dim,
// num_keys].
template <typename V>
void compute_scores(
    const AttentionProblem& problem, const TilePlace& tile, const typename V::scalar* queries,
    const typename V::scalar* keys_transposed, ScoreTile<V> scores, const BiasScratch<V>& bias_scratch) {
  const int64_t head_dim = problem.head_dim;
  // S = scale Q K^T
  product<V>(
      tile.num_queries(), tile.num_keys(), head_dim, {queries, matrix_row<V>(head_dim), 1},
      transposed<V>(keys_transposed, head_dim), {scores.data, scores.row}, false);
  if (problem.bias.of_entry != nullptr) {
    add_bias<V>(problem, tile, scores, bias_scratch);
  }
}

}  // namespace
}  // namespace stamp::cpu
