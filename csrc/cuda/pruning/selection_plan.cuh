// The arguments and results of an op that selects, as its kernels take them.

#pragma once

#include <cstdint>
#include <vector>

#include "common/budget_arguments.h"
#include "cuda/core/arguments.cuh"
#include "cuda/pruning/selection_kernels.cuh"

namespace stamp::cuda {

struct SelectionPlan {
  SelectionProblem problem;
  Tensor cu_seqlens_kept;
  Tensor indices;
  Tensor inverse;
  std::vector<Tensor> held;
};

// Checks arguments, contents too where that is asked for, makes the outputs, and counts the protected items.
// arguments.total_kept must be given: finding it out would take a sync.
SelectionPlan plan_selection(
    int64_t total, const Tensor& cu_seqlens, int64_t max_seqlen, const BudgetArguments& arguments,
    const Launch& launch);

}  // namespace stamp::cuda
