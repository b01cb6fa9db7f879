// The scoring of an op's tensors.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cuda/pruning/importance_kernels.cuh"

namespace stamp::cuda {

using torch::stable::Tensor;

// Checks shapes and types. The rows of hidden [total, width] may be apart; what has to be copied stays in `held`.
// Without offsets and without memory for the scores, which are the caller's to fill in.
Scoring scoring_of(
    const Tensor& hidden, const Tensor& centrality, int64_t norm_order, bool per_visible_query,
    std::vector<Tensor>& held);

// Memory for the scores [total] of hidden, in the compute type.
Tensor new_scores(const Tensor& hidden);

}  // namespace stamp::cuda
