// What the selection kernels read and write, and what they know about one sequence.
//
// An item is codes_per_item consecutive tokens, counted from the start of its sequence.

#pragma once

#include <cstdint>

#include "common/budget.h"

namespace stamp::cuda {

struct SelectionProblem {
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int32_t num_sequences;
  int64_t total;           // rows, tail rows included
  int64_t total_kept;      // rows of the result, tail rows included
  int32_t codes_per_item;  // budget.codes_per_item in 32 bits
  Budget budget;
  const uint8_t* protect;        // [total]; null: nothing is protected
  const int32_t* num_protected;  // items of each sequence [num_sequences]; null with protect
  int32_t* cu_seqlens_kept;      // [num_sequences + 1]
  int64_t* indices;              // [total_kept], -1 on tail rows
  int32_t* inverse;              // [total], -1 where a row is dropped
  int32_t* index_in_sequence;    // [total_kept], 0 on tail rows; null: not needed
};

// One sequence, in items.
struct SequenceItems {
  int32_t first_row;
  int32_t num_rows;
  int32_t num_items;  // tokens after the last whole item are dropped
  int32_t num_kept;   // items
};

__device__ inline SequenceItems items_of_sequence(const SelectionProblem& problem, int32_t sequence) {
  const int32_t first_row = __ldg(problem.cu_seqlens + sequence);
  const int32_t num_rows = __ldg(problem.cu_seqlens + sequence + 1) - first_row;
  const int32_t num_items = problem.codes_per_item == 1 ? num_rows : num_rows / problem.codes_per_item;
  const int64_t num_protected = problem.num_protected == nullptr ? 0 : __ldg(problem.num_protected + sequence);
  const int64_t kept = num_kept_items(problem.budget, sequence, num_items, num_protected);
  return {first_row, num_rows, num_items, static_cast<int32_t>(kept)};
}

__device__ inline bool item_is_protected(const SelectionProblem& problem, int64_t first_token) {
  bool is_protected = false;
#pragma unroll 1  // items are short, and this code is in many places
  for (int32_t token = 0; token < problem.codes_per_item; ++token) {
    is_protected |= __ldg(problem.protect + first_token + token) != 0;
  }
  return is_protected;
}

}  // namespace stamp::cuda
