// How many items each sequence keeps.

#pragma once

#include <cstdint>

namespace stamp::cpu {

enum class BudgetKind : int32_t { kRatio, kCount, kCounts32, kCounts64 };

struct Budget {
  BudgetKind kind = BudgetKind::kRatio;
  int64_t ratio_q32 = 0;              // kRatio: keep_ratio * 2^32
  int64_t keep_count = 0;             // kCount
  const void* keep_counts = nullptr;  // [num_sequences], kCounts32 and kCounts64
  int64_t min_keep = 0;
  int64_t codes_per_item = 1;
};

// p + min(n, max(min_keep, budget)) items, for a sequence with p protected items and n others.
inline int64_t num_kept_items(const Budget& budget, int64_t sequence, int64_t num_items, int64_t num_protected) {
  const int64_t num_unprotected = num_items - num_protected;
  int64_t count = 0;
  switch (budget.kind) {
    case BudgetKind::kRatio:  // ceil(keep_ratio * num_unprotected)
      count = (budget.ratio_q32 * num_unprotected - num_unprotected + 0xffffffffLL) >> 32;
      break;
    case BudgetKind::kCount:
      count = budget.keep_count;
      break;
    case BudgetKind::kCounts32:
      count = static_cast<const int32_t*>(budget.keep_counts)[sequence];
      break;
    case BudgetKind::kCounts64:
      count = static_cast<const int64_t*>(budget.keep_counts)[sequence];
      break;
  }
  count = count < budget.min_keep ? budget.min_keep : count;
  return num_protected + (num_unprotected < count ? num_unprotected : count);
}

}  // namespace stamp::cpu
