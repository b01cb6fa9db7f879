// Checks of what tensors hold, on host memory: the CPU's always, that of a GPU where a check is asked for. They name what
// is wrong and raise before anything is written.

#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/headeronly/util/Exception.h>

#include "common/budget.h"

namespace stamp {

// Offsets [batch + 1]: a rising sequence from 0 to at most `total`, no step longer than max_seqlen.
inline void check_cu_seqlens(
    const char* name, const int32_t* offsets, int64_t batch, int64_t total, int64_t max_seqlen) {
  STD_TORCH_CHECK(offsets[0] == 0, name, "[0] must be 0, got ", offsets[0]);
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(
        offsets[i] <= offsets[i + 1], name, " must never decrease, got ", offsets[i], " then ", offsets[i + 1],
        " at index ", i);
  }
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(
        offsets[i + 1] - offsets[i] <= max_seqlen, name, ": sequence ", i, " has length ", offsets[i + 1] - offsets[i],
        ", more than the given max_seqlen ", max_seqlen);
  }
  STD_TORCH_CHECK(
      offsets[batch] <= total, name, "[-1] must be at most the number of rows ", total, ", got ", offsets[batch]);
}

inline void check_keep_counts(const Budget& budget, int64_t batch) {
  int64_t least = 0;
  for (int64_t i = 0; i < batch; ++i) {
    if (budget.kind == BudgetKind::kCounts32) {
      least = std::min<int64_t>(least, static_cast<const int32_t*>(budget.keep_counts)[i]);
    } else if (budget.kind == BudgetKind::kCounts64) {
      least = std::min(least, static_cast<const int64_t*>(budget.keep_counts)[i]);
    }
  }
  STD_TORCH_CHECK(least >= 0, "keep_count must not be negative, got ", least);
}

inline int64_t count_protected_items(const uint8_t* protect, int64_t num_items, int64_t codes_per_item) {
  int64_t count = 0;
  for (int64_t item = 0; item < num_items; ++item) {
    uint8_t is_protected = 0;
    for (int64_t token = 0; token < codes_per_item; ++token) {
      is_protected |= *protect++;
    }
    count += is_protected;
  }
  return count;
}

// kept_offsets [batch + 1]: the running sum of the kept lengths in tokens, of which it returns the last. Checks that
// sequences are whole items. `protect` [total], or null.
inline int64_t fill_kept_offsets(
    const int32_t* cu_seqlens, int64_t batch, const uint8_t* protect, const Budget& budget, int32_t* kept_offsets) {
  int64_t kept = 0;
  for (int64_t s = 0; s < batch; ++s) {
    kept_offsets[s] = static_cast<int32_t>(kept);
    const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
    STD_TORCH_CHECK(
        length % budget.codes_per_item == 0, "every sequence must be whole items of codes_per_item ", budget.codes_per_item,
        " tokens, got a sequence of ", length);
    const int64_t num_items = length / budget.codes_per_item;
    const int64_t num_protected =
        protect == nullptr ? 0 : count_protected_items(protect + cu_seqlens[s], num_items, budget.codes_per_item);
    kept += budget.codes_per_item * kept_items(budget, s, num_items, num_protected);
  }
  kept_offsets[batch] = static_cast<int32_t>(kept);
  return kept;
}

inline void check_total_kept(int64_t total_kept, int64_t kept) {
  STD_TORCH_CHECK(kept <= total_kept, "total_kept is ", total_kept, ", but the sequences keep ", kept, " tokens");
}

}  // namespace stamp
