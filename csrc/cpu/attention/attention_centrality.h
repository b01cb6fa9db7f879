// Centrality from the lse of an attention that has been computed, as an op and as a part of packed_attention.

#pragma once

#include <cstdint>

#include "cpu/attention/arguments.h"

namespace stamp::cpu {

// Which sequences centrality_from_lse computes: all, or those that the forward pass does not (see centrality_is_fused).
enum class CentralityOf { kAllSequences, kSequencesThatAreNotFused };

// centrality [total_k] from lse [num_heads, total_q] in the compute type. query_mask [total_q], or null: every query
// counts.
void centrality_from_lse(
    const AttentionProblem& problem, const void* lse, const uint8_t* query_mask, CentralityOf sequences,
    const Tensor& centrality);

}  // namespace stamp::cpu
