// The offsets of the kept tokens.

#pragma once

#include <cstdint>

#include <torch/headeronly/util/Exception.h>

#include "cpu/pruning/budget.h"

namespace stamp::cpu {

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

// kept_offsets [num_sequences + 1] := the running sum of the kept lengths in tokens. Returns the last one. Checks that
// every sequence is whole items. protect [total], or null.
inline int64_t fill_kept_offsets(
    const int32_t* cu_seqlens, int64_t num_sequences, const uint8_t* protect, const Budget& budget,
    int32_t* kept_offsets) {
  int64_t kept = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    kept_offsets[s] = static_cast<int32_t>(kept);
    const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
    STD_TORCH_CHECK(
        length % budget.codes_per_item == 0, "every sequence must be whole items of codes_per_item ",
        budget.codes_per_item, " tokens, got a sequence of ", length);
    const int64_t num_items = length / budget.codes_per_item;
    const int64_t num_protected =
        protect == nullptr ? 0 : count_protected_items(protect + cu_seqlens[s], num_items, budget.codes_per_item);
    kept += budget.codes_per_item * num_kept_items(budget, s, num_items, num_protected);
  }
  kept_offsets[num_sequences] = static_cast<int32_t>(kept);
  return kept;
}

}  // namespace stamp::cpu
