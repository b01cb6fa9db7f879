// Pruning in one go: a sequence's rows are scored, its best items selected, and their rows copied while they are still
// in the cache. The same functions serve token_importance, select_tokens and gather_tokens: the same bits.

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/pruning/importance.h"
#include "cpu/pruning/row_copies.h"
#include "cpu/pruning/select_items.h"
#include "cpu/pruning/selection_plan.h"

namespace stamp::cpu {
namespace {

// A thread that does less than this is not worth starting.
constexpr int64_t kBytesPerTask = 64 * 1024;

using OptionalTensor = std::optional<Tensor>;

void write_positions(const SelectionPlan& plan, int64_t sequence, const int32_t* positions, int32_t* kept_positions) {
  const int64_t first_row = plan.cu_seqlens[sequence];
  for (int64_t j = plan.kept_offsets[sequence]; j < plan.kept_offsets[sequence + 1]; ++j) {
    const int64_t row = plan.kept_rows[j];
    kept_positions[j] = positions != nullptr ? positions[row] : static_cast<int32_t>(row - first_row);
  }
}

template <typename scalar>
void prune_all(
    const SelectionPlan& plan, const Scoring& scoring, const std::vector<Rows>& copies, const int32_t* positions,
    int32_t* kept_positions, int64_t least_tokens_per_task) {
  using Selector = ItemSelector<scalar>;
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const auto prune = [&](int64_t begin, int64_t end, char* scratch) {
    Selector selector(plan, kernels, scratch);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const int64_t first_row = plan.cu_seqlens[sequence], end_row = plan.cu_seqlens[sequence + 1];
      kernels.score_rows(scoring, first_row, end_row, end_row, selector.scores);
      selector.select(plan, sequence, selector.scores);
      write_positions(plan, sequence, positions, kept_positions);
      for (const Rows& rows : copies) {
        copy_rows(rows, plan.kept_rows, plan.kept_offsets[sequence], plan.kept_offsets[sequence + 1], false);
      }
    }
  };
  for_sequences(plan, least_tokens_per_task, Selector::scratch_bytes(plan), prune);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> prune(
    const std::vector<Tensor>& x, const Tensor& centrality, const OptionalTensor& positions, const Tensor& cu_seqlens,
    int64_t max_seqlen, int64_t norm_order, bool per_visible_query, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  STD_TORCH_CHECK(!x.empty(), "prune needs at least the hidden states");
  const int64_t total = x[0].size(0);
  SelectionPlan plan = plan_selection(
      total, cu_seqlens, max_seqlen,
      {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept});
  const Scoring scoring = scoring_of(x[0], centrality, norm_order, per_visible_query, plan.held);
  const RowCopies copies(x, plan.total_kept);
  const Tensor kept_positions = torch::stable::new_empty(plan.inverse, {plan.total_kept});
  const int32_t* original_positions = nullptr;
  if (positions.has_value()) {
    STD_TORCH_CHECK(
        positions->dim() == 1 && positions->size(0) == total, "positions must have one entry for each token");
    original_positions = held_contiguous(*positions, plan.held).const_data_ptr<int32_t>();
  }

  int64_t bytes_per_row = 1;
  for (const Rows& rows : copies.rows) {
    bytes_per_row += rows.row_bytes;
  }
  int32_t* position = kept_positions.mutable_data_ptr<int32_t>();
  const auto prune_as = scoring.dtype == DType::kFloat64 ? prune_all<double> : prune_all<float>;
  prune_as(plan, scoring, copies.rows, original_positions, position, kBytesPerTask / bytes_per_row + 1);

  const int64_t kept = plan.kept_offsets[plan.batch];
  if (kept < plan.total_kept) {
    std::memset(position + kept, 0, (plan.total_kept - kept) * sizeof(int32_t));
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
