// The best items of one sequence, in their original order: scores become integer keys of the same order, a kernel finds
// the cut between what stays and what goes (threshold.h), and one pass over the keys says where every row goes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/core/numbers.h"
#include "cpu/pruning/kernels.h"
#include "cpu/pruning/selection_plan.h"

namespace stamp::cpu {
namespace {

// NaN is the lowest key and -0.0 that of 0.0. The highest key is left for protected items.
template <typename scalar>
typename KeyOf<scalar>::type key_of(scalar score) {
  using Key = typename KeyOf<scalar>::type;
  const Key bits = bits_as<Key>(score + scalar{0});  // -0.0 + 0.0 is 0.0
  // Negative numbers have the sign bit and a magnitude that falls as they rise.
  const Key ordered = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & KeyOf<scalar>::highest);
  return score == score ? ordered : KeyOf<scalar>::lowest;
}

// The items of one sequence and the memory to select among them.
template <typename scalar>
struct ItemSelector {
  using Key = typename KeyOf<scalar>::type;

  const PruningKernels<scalar>& kernels;
  scalar* scores;  // [longest], memory for the scores of a sequence's tokens
  Key* keys;       // [longest, rounded up], of its items
  int32_t* kept;   // [longest + 1], its items that stay

  static int64_t num_keys(const SelectionPlan& plan) {
    return plan.longest + kKeysPerVector;
  }

  static int64_t scratch_bytes(const SelectionPlan& plan) {
    return num_keys(plan) * (sizeof(scalar) + sizeof(Key) + sizeof(int32_t));
  }

  // The kernels are the caller's to look up, before threads start: what they throw would lose its text there.
  ItemSelector(const SelectionPlan& plan, const PruningKernels<scalar>& kernels, char* scratch)
      : kernels(kernels),
        scores(reinterpret_cast<scalar*>(scratch)),
        keys(reinterpret_cast<Key*>(scores + num_keys(plan))),
        kept(reinterpret_cast<int32_t*>(keys + num_keys(plan))) {}

  // Writes the sequence's part of the plan's indices and inverse, from the scores of its tokens.
  void select(const SelectionPlan& plan, int64_t sequence, const scalar* token_scores) {
    const int64_t first_row = plan.cu_seqlens[sequence], length = plan.codes_per_item;
    const int64_t num_items = (plan.cu_seqlens[sequence + 1] - first_row) / length;
    const int64_t first_kept = plan.kept_offsets[sequence];
    const int64_t num_kept = (plan.kept_offsets[sequence + 1] - first_kept) / length;
    int32_t* inverse = plan.inverse_rows + first_row;
    std::fill(inverse, inverse + num_items * length, -1);
    if (num_kept == 0) {
      return;
    }
    if (num_kept == num_items) {
      std::iota(kept, kept + num_items, 0);
    } else {
      fill_keys(plan, first_row, num_items, token_scores);
      list_kept(num_items, num_kept);
    }
    for (int64_t i = 0; i < num_kept; ++i) {
      for (int64_t token = 0; token < length; ++token) {
        const int64_t kept_row = first_kept + i * length + token, row = kept[i] * length + token;
        plan.kept_rows[kept_row] = first_row + row;
        inverse[row] = static_cast<int32_t>(kept_row);
      }
    }
  }

 private:
  void fill_keys(const SelectionPlan& plan, int64_t first_row, int64_t num_items, const scalar* token_scores) {
    const int64_t length = plan.codes_per_item;
    if (length == 1) {
      for (int64_t i = 0; i < num_items; ++i) {
        keys[i] = key_of(token_scores[i]);
      }
    } else {
      for (int64_t i = 0; i < num_items; ++i) {
        scalar sum = token_scores[i * length];
        for (int64_t token = 1; token < length; ++token) {
          sum += token_scores[i * length + token];
        }
        keys[i] = key_of(sum);
      }
    }
    if (plan.protect != nullptr) {
      const uint8_t* protect = plan.protect + first_row;
      for (int64_t i = 0; i < num_items * length; ++i) {
        if (protect[i] != 0) {
          keys[i / length] = KeyOf<scalar>::highest;
        }
      }
    }
  }

  // kept := the items that stay, rising.
  void list_kept(int64_t num_items, int64_t num_kept) {
    std::fill(keys + num_items, keys + num_items + kKeysPerVector, KeyOf<scalar>::lowest);
    Cut<Key> cut = kernels.cut(keys, num_items, num_kept);
    int64_t count = 0;
    // Without branches, which nobody could predict: an item that goes is overwritten by the next one.
    if (cut.num_ties == num_items) {  // whatever reaches the threshold stays, as nearly always
      for (int64_t i = 0; i < num_items; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += keys[i] >= cut.threshold;
      }
      return;
    }
    for (int64_t i = 0; i < num_items; ++i) {
      const int64_t ties = (keys[i] == cut.threshold) & (cut.num_ties > 0);
      cut.num_ties -= ties;
      kept[count] = static_cast<int32_t>(i);
      count += (keys[i] > cut.threshold) | ties;
    }
  }
};

}  // namespace
}  // namespace stamp::cpu
