// What attention's forward pass and pruning want of the importance family.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "attention_plan.h"
#include "pruning_kernels.h"

namespace stamp::cpu {

// Centrality from the lse, of all sequences or of those that the forward pass has not served.
void centrality_from_lse(
    const AttentionInputs& inputs, const Tensor& lse, const uint8_t* query_mask, const Tensor& centrality,
    bool without_fused);

// A mask of queries as kernels read it; null: every query votes.
const uint8_t* votes_of(const std::optional<Tensor>& query_mask, std::vector<Tensor>& held);

// The scoring arguments of an op, as kernels read them.
Scoring scoring_of(
    const Tensor& hidden, const Tensor& centrality, int64_t norm_order, bool per_visible_query,
    std::vector<Tensor>& held);

}  // namespace stamp::cpu
