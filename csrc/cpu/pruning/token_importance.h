// From the importance arguments of token_importance and prune to what the kernels read.

#pragma once

#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/pruning/importance_arguments.h"
#include "cpu/pruning/kernels.h"

namespace stamp::cpu {

// From checked arguments. Contiguous copies stay in `held`.
ImportanceProblem make_importance_problem(const ImportanceArguments& arguments, std::vector<Tensor>& held);

}  // namespace stamp::cpu
