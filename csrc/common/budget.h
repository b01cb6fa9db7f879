// How many items of a sequence stay: the same on every device.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define STAMP_HOST_DEVICE __host__ __device__
#else
#define STAMP_HOST_DEVICE
#endif

namespace stamp {

enum class BudgetKind : int32_t { kRatio, kCount, kCounts32, kCounts64 };

struct Budget {
  BudgetKind kind;
  int64_t ratio_q32;   // kRatio: keep_ratio * 2^32
  int64_t keep_count;  // kCount
  const void* keep_counts;  // [batch], kCounts32 and kCounts64
  int64_t min_keep;
  int64_t codes_per_item;
};

// p + min(n, max(min_keep, budget)) items, p of a sequence's items being protected and n not.
STAMP_HOST_DEVICE inline int64_t kept_items(
    const Budget& budget, int64_t sequence, int64_t num_items, int64_t num_protected) {
  const int64_t unprotected = num_items - num_protected;
  int64_t wanted = 0;
  switch (budget.kind) {
    case BudgetKind::kRatio:  // the ceiling of the ratio
      wanted = (budget.ratio_q32 * unprotected - unprotected + 0xffffffffLL) >> 32;
      break;
    case BudgetKind::kCount:
      wanted = budget.keep_count;
      break;
    case BudgetKind::kCounts32:
      wanted = static_cast<const int32_t*>(budget.keep_counts)[sequence];
      break;
    case BudgetKind::kCounts64:
      wanted = static_cast<const int64_t*>(budget.keep_counts)[sequence];
      break;
  }
  wanted = wanted < budget.min_keep ? budget.min_keep : wanted;
  return num_protected + (unprotected < wanted ? unprotected : wanted);
}

}  // namespace stamp
