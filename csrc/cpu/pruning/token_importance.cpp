// token_importance on the CPU. The maths is in cpu/pruning/importance.h.

#include "cpu/pruning/token_importance.h"

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/arguments.h"

namespace stamp::cpu {

ImportanceProblem make_importance_problem(const ImportanceArguments& arguments, std::vector<Tensor>& held) {
  const Tensor& hidden = arguments.hidden;
  const bool rows_are_contiguous = hidden.size(1) <= 1 || hidden.stride(1) == 1;
  const Tensor rows = rows_are_contiguous ? hidden : held_contiguous(hidden, held);
  const Tensor centrality = held_contiguous(arguments.centrality, held);
  ImportanceProblem problem = {};
  problem.dtype = dtype_of(rows);
  problem.hidden = rows.const_data_ptr();
  problem.row_stride = rows.stride(0);
  problem.width = rows.size(1);
  problem.centrality = centrality.const_data_ptr();
  problem.centrality_is_double = centrality.scalar_type() == ScalarType::Double;
  problem.norm_order = arguments.norm_order;
  problem.per_visible_query = arguments.per_visible_query;
  return problem;
}

namespace {

using OptionalTensor = std::optional<Tensor>;

// No thread is started for fewer bytes than this.
constexpr int64_t kMinBytesPerTask = 64 * 1024;

// importance [num_rows] of the rows of all sequences. cu_seqlens is null if it is not given.
template <typename scalar>
void compute_importance(
    const ImportanceProblem& problem, const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_rows,
    scalar* importance) {
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const int64_t rows_per_task = kMinBytesPerTask / (problem.width * static_cast<int64_t>(sizeof(scalar)) + 1) + 1;
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    if (!problem.per_visible_query) {
      return kernels.importance_of_rows(problem, begin, end, end, importance + begin);
    }
    int64_t sequence = std::upper_bound(cu_seqlens, cu_seqlens + num_sequences + 1, begin) - cu_seqlens;
    for (int64_t row = begin; row < end; ++sequence) {
      const int64_t end_sequence = cu_seqlens[sequence], end_rows = std::min(end, end_sequence);
      kernels.importance_of_rows(problem, row, end_rows, end_sequence, importance + row);
      row = end_rows;
    }
  });
}

Tensor token_importance(
    const Tensor& hidden, const Tensor& centrality, const OptionalTensor& cu_seqlens, int64_t norm_order,
    bool per_visible_query) {
  const ImportanceArguments arguments = {hidden, centrality, norm_order, per_visible_query};
  check_importance_arguments(arguments);
  std::vector<Tensor> held;
  const ImportanceProblem problem = make_importance_problem(arguments, held);
  const int64_t total = hidden.size(0);
  int64_t num_sequences = 0, num_rows = total;
  const int32_t* offsets = nullptr;
  if (cu_seqlens.has_value()) {
    const Tensor checked = checked_cu_seqlens("cu_seqlens", *cu_seqlens, total, INT32_MAX, held);
    offsets = checked.const_data_ptr<int32_t>();
    num_sequences = checked.size(0) - 1;
    num_rows = offsets[num_sequences];
  }
  STD_TORCH_CHECK(offsets != nullptr || !per_visible_query, "per_visible_query needs cu_seqlens");
  const Tensor importance = torch::stable::new_empty(hidden, {total}, compute_type(problem.dtype));
  if (problem.dtype == DType::kFloat64) {
    compute_importance(problem, offsets, num_sequences, num_rows, importance.mutable_data_ptr<double>());
  } else {
    compute_importance(problem, offsets, num_sequences, num_rows, importance.mutable_data_ptr<float>());
  }
  zero_tail(importance, num_rows);
  return importance;
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("token_importance", TORCH_BOX(&stamp::cpu::token_importance));
}
