// token_importance on the CPU: the scores of cpu/pruning/token_importance.h.

#include "cpu/pruning/importance.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "common/importance_arguments.h"
#include "cpu/core/arguments.h"

namespace stamp::cpu {

Scoring scoring_of(
    const Tensor& hidden, const Tensor& centrality, int64_t norm_order, bool per_visible_query,
    std::vector<Tensor>& held) {
  check_scoring_arguments(hidden, centrality, norm_order);
  const bool rows_are_contiguous = hidden.size(1) <= 1 || hidden.stride(1) == 1;
  const Tensor rows = rows_are_contiguous ? hidden : held_contiguous(hidden, held);
  const Tensor votes = held_contiguous(centrality, held);
  return {
      dtype_of("hidden", rows), rows.const_data_ptr(), rows.stride(0), rows.size(1), votes.const_data_ptr(),
      votes.scalar_type() == torch::headeronly::ScalarType::Double, norm_order == 2, per_visible_query};
}

namespace {

using OptionalTensor = std::optional<Tensor>;

// A thread that reads less than this is not worth starting.
constexpr int64_t kScoredBytesPerTask = 64 * 1024;

template <typename scalar>
void score_all(const Scoring& scoring, const int32_t* cu_seqlens, int64_t batch, int64_t num_rows, scalar* scores) {
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const int64_t rows_per_task = kScoredBytesPerTask / (scoring.width * static_cast<int64_t>(sizeof(scalar)) + 1) + 1;
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    if (!scoring.per_visible_query) {
      return kernels.score_rows(scoring, begin, end, end, scores + begin);
    }
    int64_t sequence = std::upper_bound(cu_seqlens, cu_seqlens + batch + 1, begin) - cu_seqlens;
    for (int64_t row = begin; row < end; ++sequence) {
      const int64_t end_sequence = cu_seqlens[sequence], end_rows = std::min(end, end_sequence);
      kernels.score_rows(scoring, row, end_rows, end_sequence, scores + row);
      row = end_rows;
    }
  });
}

Tensor token_importance(
    const Tensor& hidden, const Tensor& centrality, const OptionalTensor& cu_seqlens, int64_t norm_order,
    bool per_visible_query) {
  std::vector<Tensor> held;
  const Scoring scoring = scoring_of(hidden, centrality, norm_order, per_visible_query, held);
  const int64_t total = hidden.size(0);
  int64_t batch = 0, num_rows = total;
  const int32_t* offsets = nullptr;
  if (cu_seqlens.has_value()) {
    const Tensor checked = held_contiguous(*cu_seqlens, held);
    check_cu_seqlens("cu_seqlens", checked, total, INT32_MAX);
    offsets = checked.const_data_ptr<int32_t>();
    batch = checked.size(0) - 1;
    num_rows = offsets[batch];
  }
  STD_TORCH_CHECK(offsets != nullptr || !per_visible_query, "per_visible_query needs cu_seqlens");
  using torch::headeronly::ScalarType;
  const bool in_double = scoring.dtype == DType::kFloat64;
  const Tensor importance =
      torch::stable::new_empty(hidden, {total}, in_double ? ScalarType::Double : ScalarType::Float);
  if (in_double) {
    score_all(scoring, offsets, batch, num_rows, importance.mutable_data_ptr<double>());
  } else {
    score_all(scoring, offsets, batch, num_rows, importance.mutable_data_ptr<float>());
  }
  zero_tail(importance, num_rows);
  return importance;
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("token_importance", TORCH_BOX(&stamp::cpu::token_importance));
}
