// The scoring arguments of token_importance and prune.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/pruning/kernels.h"

namespace stamp::cpu {

using torch::stable::Tensor;

// The scoring arguments of an op, as kernels read them.
Scoring scoring_of(
    const Tensor& hidden, const Tensor& centrality, int64_t norm_order, bool per_visible_query,
    std::vector<Tensor>& held);

}  // namespace stamp::cpu
