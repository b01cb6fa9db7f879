// From the arguments of select_tokens and prune to what the selection kernels read and write.

#pragma once

#include <cstdint>
#include <vector>

#include "common/budget_arguments.h"
#include "cuda/core/arguments.cuh"
#include "cuda/pruning/selection_kernels.cuh"

namespace stamp::cuda {

struct SelectionPlan {
  SelectionProblem problem;
  Tensor cu_seqlens_kept;    // int32 [num_sequences + 1]
  Tensor indices;            // int64 [total_kept]
  Tensor inverse;            // int32 [total]
  std::vector<Tensor> held;  // keeps the arguments alive
};

// Checks arguments (and contents where STAMP_KERNELS_CHECK=1), allocates the results, and counts the protected items.
// `rows`, the argument `name`, has the rows to select from. arguments.total_kept must be given, since computing it
// would take a sync.
SelectionPlan plan_selection(
    const char* name, const Tensor& rows, const Tensor& cu_seqlens, int64_t max_seqlen,
    const BudgetArguments& arguments, const Launch& launch);

}  // namespace stamp::cuda
