// Selection of the kept tokens (select_items.h), and the gather of their rows, forward and backward.
//
//   forward   y[j] = x[indices[j]]                         indices [T'] int64, -1 on tail rows
//   backward  dx[t] = inverse[t] < 0 ? 0 : dy[inverse[t]]  inverse [T] int32, -1 where token t was dropped
//
// Both are one operation: copy the named row, or write zeros where the map says -1. Every output row is written once,
// so there is neither a zero-fill pass nor an atomic addition, and the result does not depend on the thread count.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "row_copies.h"
#include "select_items.h"
#include "selection_plan.h"

namespace stamp::cpu {
namespace {

// Threads that do less than this are not worth starting.
constexpr int64_t kBytesPerTask = 32 * 1024;
constexpr int64_t kTokensPerTask = 2048;

using OptionalTensor = std::optional<Tensor>;

template <typename T, typename scalar>
void select_all(const SelectionPlan& plan, const T* importance) {
  using Selector = ItemSelector<scalar>;
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const auto select = [&](int64_t begin, int64_t end, char* scratch) {
    Selector selector(plan, kernels, scratch);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const T* scores = importance + plan.cu_seqlens[sequence];
      if constexpr (sizeof(T) == sizeof(scalar)) {
        selector.select(plan, sequence, scores);
      } else {
        const int64_t num_tokens = plan.cu_seqlens[sequence + 1] - plan.cu_seqlens[sequence];
        for (int64_t i = 0; i < num_tokens; ++i) {
          selector.scores[i] = to_float(scores[i]);
        }
        selector.select(plan, sequence, selector.scores);
      }
    }
  };
  for_sequences(plan, kTokensPerTask, Selector::scratch_bytes(plan), select);
}

std::tuple<Tensor, Tensor, Tensor> select_tokens(
    const Tensor& importance, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t item_length, std::optional<int64_t> total_kept) {
  STD_TORCH_CHECK(importance.dim() == 1, "importance must have one dimension, got ", importance.dim());
  SelectionPlan plan = plan_selection(
      importance.size(0), cu_seqlens, max_seqlen,
      {ratio_q32, keep_count, keep_counts, min_keep, protect, item_length, total_kept});
  const Tensor scores = held_contiguous(importance, plan.held);
  switch (dtype_of("importance", scores)) {
    case DType::kFloat32:
      select_all<float, float>(plan, static_cast<const float*>(scores.const_data_ptr()));
      break;
    case DType::kFloat16:
      select_all<Half, float>(plan, static_cast<const Half*>(scores.const_data_ptr()));
      break;
    case DType::kBFloat16:
      select_all<BFloat16, float>(plan, static_cast<const BFloat16*>(scores.const_data_ptr()));
      break;
    case DType::kFloat64:
      select_all<double, double>(plan, static_cast<const double*>(scores.const_data_ptr()));
      break;
  }
  return {plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

template <typename index_t>
std::vector<Tensor> gather_rows(
    const std::vector<Tensor>& sources, const Tensor& map_tensor, const char* map_name, bool may_stream) {
  check_row_map_tensor(sources, map_tensor, map_name);
  const Tensor map_contiguous = torch::stable::contiguous(map_tensor);
  const index_t* map = map_contiguous.const_data_ptr<index_t>();
  const int64_t num_rows = map_contiguous.size(0);
  RowCopies copies(sources, num_rows);
  check_row_map(map, num_rows, sources[0].size(0), map_name);

  int64_t bytes_per_row = 0;
  for (const Rows& rows : copies.rows) {
    bytes_per_row += rows.row_bytes;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_row));
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (const Rows& rows : copies.rows) {
      copy_rows(rows, map, begin, end, may_stream && is_worth_streaming(rows, num_rows));
    }
  });
  return copies.outputs;
}

std::vector<Tensor> gather_tokens_forward(const std::vector<Tensor>& x, const Tensor& indices) {
  return gather_rows<int64_t>(x, indices, "indices", false);
}

std::vector<Tensor> gather_tokens_backward(const std::vector<Tensor>& grad, const Tensor& inverse) {
  return gather_rows<int32_t>(grad, inverse, "inverse", true);
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&stamp::cpu::select_tokens));
  m.impl("gather_tokens_forward", TORCH_BOX(&stamp::cpu::gather_tokens_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&stamp::cpu::gather_tokens_backward));
}
