// prune on the CPU: importance, selection and gather of one sequence after the other, while its rows are in the cache.
// token_importance, select_tokens and gather_tokens call the same functions, so the bits are the same.

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/pruning/copy_rows.h"
#include "cpu/pruning/gather_arguments.h"
#include "cpu/pruning/select_items.h"
#include "cpu/pruning/selection_plan.h"
#include "cpu/pruning/token_importance.h"

namespace stamp::cpu {
namespace {

// No thread is started for fewer bytes than this.
constexpr int64_t kMinBytesPerTask = 64 * 1024;

using OptionalTensor = std::optional<Tensor>;

// kept_positions := the original positions of the rows that a sequence keeps; positions null: the index in the
// sequence.
void write_positions(const SelectionPlan& plan, int64_t sequence, const int32_t* positions, int32_t* kept_positions) {
  const int64_t first_row = plan.cu_seqlens[sequence];
  for (int64_t j = plan.kept_offsets[sequence]; j < plan.kept_offsets[sequence + 1]; ++j) {
    const int64_t row = plan.kept_rows[j];
    kept_positions[j] = positions != nullptr ? positions[row] : static_cast<int32_t>(row - first_row);
  }
}

template <typename scalar>
void prune_sequences(
    const SelectionPlan& plan, const ImportanceProblem& problem, const std::vector<Rows>& copies,
    const int32_t* positions, int32_t* kept_positions, int64_t min_tokens_per_task) {
  using Selector = ItemSelector<scalar>;
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const auto prune = [&](int64_t begin, int64_t end, char* scratch) {
    Selector selector(plan, kernels, scratch);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const int64_t first_row = plan.cu_seqlens[sequence], end_row = plan.cu_seqlens[sequence + 1];
      kernels.importance_of_rows(problem, first_row, end_row, end_row, selector.importance);
      selector.select(plan, sequence, selector.importance);
      write_positions(plan, sequence, positions, kept_positions);
      for (const Rows& rows : copies) {
        copy_rows(rows, plan.kept_rows, plan.kept_offsets[sequence], plan.kept_offsets[sequence + 1], false);
      }
    }
  };
  for_sequences(plan, min_tokens_per_task, Selector(plan, kernels, nullptr).bytes, prune);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> prune(
    const std::vector<Tensor>& x, const Tensor& centrality, const OptionalTensor& positions, const Tensor& cu_seqlens,
    int64_t max_seqlen, int64_t norm_order, bool per_visible_query, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  check_row_sources("x", x);
  const ImportanceArguments importance = {x[0], centrality, norm_order, per_visible_query};
  check_importance_arguments(importance);
  const int64_t total = x[0].size(0);
  check_int32_rows("x", total);
  const BudgetArguments budget = {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept};
  SelectionPlan plan = plan_selection(total, cu_seqlens, max_seqlen, budget);
  const ImportanceProblem problem = make_importance_problem(importance, plan.held);
  const RowCopies copies(x, plan.total_kept);
  const Tensor kept_positions = torch::stable::new_empty(plan.inverse, {plan.total_kept});
  const int32_t* original_positions = nullptr;
  if (positions.has_value()) {
    check_positions(*positions, x[0]);
    original_positions = held_contiguous(*positions, plan.held).const_data_ptr<int32_t>();
  }

  int64_t bytes_per_row = 1;
  for (const Rows& rows : copies.rows) {
    bytes_per_row += rows.row_bytes;
  }
  int32_t* kept_positions_data = kept_positions.mutable_data_ptr<int32_t>();
  const auto prune_as = problem.dtype == DType::kFloat64 ? prune_sequences<double> : prune_sequences<float>;
  prune_as(plan, problem, copies.rows, original_positions, kept_positions_data, kMinBytesPerTask / bytes_per_row + 1);

  const int64_t kept = plan.kept_offsets[plan.num_sequences];
  if (kept < plan.total_kept) {
    std::memset(kept_positions_data + kept, 0, (plan.total_kept - kept) * sizeof(int32_t));
    for (const Rows& rows : copies.rows) {
      std::memset(rows.destination + kept * rows.row_bytes, 0, (plan.total_kept - kept) * rows.row_bytes);
    }
  }
  return {copies.outputs, kept_positions, plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("prune", TORCH_BOX(&stamp::cpu::prune));
}
