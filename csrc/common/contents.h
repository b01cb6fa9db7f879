// Checks of the contents of tensors in CPU memory. The CPU's ops always make them; a GPU's ops make them on copies, and
// only where STAMP_KERNELS_CHECK=1 asks for them. A check raises before anything is written.

#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/headeronly/util/Exception.h>

#include "common/budget.h"

namespace stamp {

// Offsets [num_sequences + 1]: from 0 to at most `total`, never decreasing, with steps of at most max_seqlen.
inline void check_cu_seqlens(
    const char* name, const int32_t* offsets, int64_t num_sequences, int64_t total, int64_t max_seqlen) {
  STD_TORCH_CHECK(offsets[0] == 0, name, "[0] must be 0, got ", offsets[0]);
  for (int64_t i = 0; i < num_sequences; ++i) {
    STD_TORCH_CHECK(
        offsets[i] <= offsets[i + 1], name, " must never decrease, got ", offsets[i], " then ", offsets[i + 1],
        " at index ", i);
  }
  for (int64_t i = 0; i < num_sequences; ++i) {
    STD_TORCH_CHECK(
        offsets[i + 1] - offsets[i] <= max_seqlen, name, ": sequence ", i, " has length ", offsets[i + 1] - offsets[i],
        ", more than the given max_seqlen ", max_seqlen);
  }
  STD_TORCH_CHECK(
      offsets[num_sequences] <= total, name, "[-1] must be at most the number of rows ", total, ", got ",
      offsets[num_sequences]);
}

inline void check_keep_counts(const Budget& budget, int64_t num_sequences) {
  int64_t smallest = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    if (budget.kind == BudgetKind::kCounts32) {
      smallest = std::min<int64_t>(smallest, static_cast<const int32_t*>(budget.keep_counts)[i]);
    } else if (budget.kind == BudgetKind::kCounts64) {
      smallest = std::min(smallest, static_cast<const int64_t*>(budget.keep_counts)[i]);
    }
  }
  STD_TORCH_CHECK(smallest >= 0, "keep_count must not be negative, got ", smallest);
}

inline void check_total_kept(int64_t total_kept, int64_t kept) {
  STD_TORCH_CHECK(kept <= total_kept, "total_kept is ", total_kept, ", but the sequences keep ", kept, " tokens");
}

}  // namespace stamp
