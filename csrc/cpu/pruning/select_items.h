// The best items of one sequence, in their original order. The importance becomes integer keys of the same order
// (keys.h), a kernel finds the threshold of what is kept (threshold.h), and one pass over the keys lists the kept
// items.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/core/scratch.h"
#include "cpu/pruning/kernels.h"
#include "cpu/pruning/keys.h"
#include "cpu/pruning/selection_plan.h"

namespace stamp::cpu {
namespace {

// Selects among the items of one sequence after the other, in the scratch memory of one thread.
template <typename scalar>
struct ItemSelector {
  using Key = typename KeyOf<scalar>::type;

  const PruningKernels<scalar>& kernels;
  scalar* importance;  // [longest], memory for the importance of a sequence's tokens
  Key* keys;           // [longest + kKeysPerVector], of its items
  int32_t* kept;       // [longest + 1], the items that are kept
  int64_t bytes;       // of the scratch memory

  // The caller looks up the kernels before threads start: an exception loses its message inside a worker thread.
  ItemSelector(const SelectionPlan& plan, const PruningKernels<scalar>& kernels, char* base) : kernels(kernels) {
    Scratch scratch(base);
    importance = scratch.take<scalar>(plan.longest);
    keys = scratch.take<Key>(plan.longest + kKeysPerVector);
    kept = scratch.take<int32_t>(plan.longest + 1);
    bytes = scratch.size();
  }

  // Writes the plan's indices and inverse of one sequence, from the importance of its tokens.
  void select(const SelectionPlan& plan, int64_t sequence, const scalar* token_importance) {
    const int64_t first_row = plan.cu_seqlens[sequence];
    const int64_t codes_per_item = plan.codes_per_item;
    const int64_t num_items = (plan.cu_seqlens[sequence + 1] - first_row) / codes_per_item;
    const int64_t first_kept = plan.kept_offsets[sequence];
    const int64_t num_kept = (plan.kept_offsets[sequence + 1] - first_kept) / codes_per_item;
    int32_t* inverse = plan.inverse_rows + first_row;
    std::fill(inverse, inverse + num_items * codes_per_item, -1);
    if (num_kept == 0) {
      return;
    }
    if (num_kept == num_items) {
      std::iota(kept, kept + num_items, 0);
    } else {
      fill_keys(plan, first_row, num_items, token_importance);
      list_kept(num_items, num_kept);
    }
    for (int64_t i = 0; i < num_kept; ++i) {
      for (int64_t token = 0; token < codes_per_item; ++token) {
        const int64_t kept_row = first_kept + i * codes_per_item + token, row = kept[i] * codes_per_item + token;
        plan.kept_rows[kept_row] = first_row + row;
        inverse[row] = static_cast<int32_t>(kept_row);
      }
    }
  }

 private:
  void fill_keys(const SelectionPlan& plan, int64_t first_row, int64_t num_items, const scalar* token_importance) {
    const int64_t codes_per_item = plan.codes_per_item;
    if (codes_per_item == 1) {
      for (int64_t i = 0; i < num_items; ++i) {
        keys[i] = key_of(token_importance[i]);
      }
    } else {
      for (int64_t i = 0; i < num_items; ++i) {
        scalar sum = token_importance[i * codes_per_item];
        for (int64_t token = 1; token < codes_per_item; ++token) {
          sum += token_importance[i * codes_per_item + token];
        }
        keys[i] = key_of(sum);
      }
    }
    if (plan.protect != nullptr) {
      const uint8_t* protect = plan.protect + first_row;
      for (int64_t i = 0; i < num_items * codes_per_item; ++i) {
        if (protect[i] != 0) {
          keys[i / codes_per_item] = KeyOf<scalar>::highest;
        }
      }
    }
  }

  // kept [num_kept] := the items that are kept, in rising order.
  void list_kept(int64_t num_items, int64_t num_kept) {
    std::fill(keys + num_items, keys + num_items + kKeysPerVector, KeyOf<scalar>::lowest);
    Threshold<Key> threshold = kernels.find_threshold(keys, num_items, num_kept);
    int64_t count = 0;
    // No branches, since they would be unpredictable: the next item overwrites an item that is not kept.
    if (threshold.num_ties == num_items) {  // nearly always: every key that reaches the threshold is kept
      for (int64_t i = 0; i < num_items; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += keys[i] >= threshold.key;
      }
      return;
    }
    for (int64_t i = 0; i < num_items; ++i) {
      const int64_t ties = (keys[i] == threshold.key) & (threshold.num_ties > 0);
      threshold.num_ties -= ties;
      kept[count] = static_cast<int32_t>(i);
      count += (keys[i] > threshold.key) | ties;
    }
  }
};

}  // namespace
}  // namespace stamp::cpu
