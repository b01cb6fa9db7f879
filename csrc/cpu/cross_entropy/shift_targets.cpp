// The op shift_targets: the targets of multi-step prediction are the labels stride, 2 stride, ... rows ahead.
//
//   targets[t, k] = labels[t + (k + 1) stride] where that row is in the sequence of t;
//                   ignore_index past the end of the sequence, and on tail rows

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/arguments.h"

namespace stamp::cpu {
namespace {

// For fewer targets than this, a thread is not worth starting.
constexpr int64_t kTargetsPerTask = 16 * 1024;
// The size of their tensor in bytes must not overflow.
constexpr int64_t kMaxTargets = INT64_MAX / sizeof(int64_t);

struct Shift {
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int64_t num_sequences;
  int64_t total;
  int64_t stride_label;  // from a row's label to the next row's, in elements
  int64_t steps;
  int64_t stride;
  int64_t ignore_index;
};

template <typename label_t>
void shift_all(const Shift& shift, const void* label_data, int64_t* targets) {
  const label_t* labels = static_cast<const label_t*>(label_data);
  const int32_t* ends = shift.cu_seqlens + 1;
  const int64_t num_rows = shift.cu_seqlens[shift.num_sequences];
  const int64_t rows_per_task = std::max<int64_t>(1, kTargetsPerTask / shift.steps);
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    int64_t* to = targets + begin * shift.steps;
    const int32_t* sequence_end = std::upper_bound(ends, ends + shift.num_sequences, begin);
    for (int64_t row = begin; row < end; ++row) {
      while (*sequence_end <= row) {
        ++sequence_end;
      }
      int64_t* const end_of_row = to + shift.steps;
      for (int64_t ahead = row + shift.stride; to < end_of_row && ahead < *sequence_end; ahead += shift.stride) {
        *to++ = labels[ahead * shift.stride_label];
      }
      while (to < end_of_row) {
        *to++ = shift.ignore_index;
      }
    }
  });
  std::fill(targets + num_rows * shift.steps, targets + shift.total * shift.steps, shift.ignore_index);
}

Tensor shift_targets(
    const Tensor& labels, const Tensor& cu_seqlens, int64_t steps, int64_t stride, int64_t ignore_index) {
  STD_TORCH_CHECK(labels.dim() == 1, "labels must have one dimension, got ", labels.dim());
  STD_TORCH_CHECK(steps >= 1 && stride >= 1, "steps and stride must be at least 1, got ", steps, " and ", stride);
  check_storage("labels", labels);
  const int64_t total = labels.size(0);
  STD_TORCH_CHECK(
      total == 0 || steps <= kMaxTargets / total, "steps must be at most ", kMaxTargets / std::max<int64_t>(total, 1),
      " for ", total, " labels, got ", steps);
  std::vector<Tensor> held;
  const Tensor offsets = checked_cu_seqlens("cu_seqlens", cu_seqlens, total, INT32_MAX, held);
  const Tensor targets = torch::stable::new_empty(labels, {total, steps}, ScalarType::Long);
  // A stride of `total` rows leaves every sequence already; a longer one could overflow.
  const Shift shift = {offsets.const_data_ptr<int32_t>(), offsets.size(0) - 1, total, labels.stride(0), steps,
                       std::min(stride, total),           ignore_index};
  const void* data = labels.const_data_ptr();
  int64_t* to = targets.mutable_data_ptr<int64_t>();
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      shift_all<int64_t>(shift, data, to);
      break;
    case ScalarType::Int:
      shift_all<int32_t>(shift, data, to);
      break;
    case ScalarType::Short:
      shift_all<int16_t>(shift, data, to);
      break;
    case ScalarType::Char:
      shift_all<int8_t>(shift, data, to);
      break;
    case ScalarType::Byte:
      shift_all<uint8_t>(shift, data, to);
      break;
    default:
      STD_TORCH_CHECK(false, "labels must be int64, int32, int16, int8 or uint8");
  }
  return targets;
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("shift_targets", TORCH_BOX(&stamp::cpu::shift_targets));
}
