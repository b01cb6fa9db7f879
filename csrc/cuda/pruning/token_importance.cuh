// From the importance arguments of token_importance and prune to what the kernels read.

#pragma once

#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "common/importance_arguments.h"
#include "cuda/pruning/importance_kernels.cuh"

namespace stamp::cuda {

// From checked arguments. The rows of hidden may be strided; contiguous copies stay in `held`. The caller fills in
// the offsets and the memory of the importance.
ImportanceProblem make_importance_problem(const ImportanceArguments& arguments, std::vector<Tensor>& held);

// Memory for the importance [total] of hidden, in the compute type.
Tensor new_importance(const Tensor& hidden);

}  // namespace stamp::cuda
