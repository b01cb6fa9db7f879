// The plan of a selection: how many tokens each sequence keeps, where their rows go, and which threads do the work.
//
// An item is `codes_per_item` consecutive tokens, counted from the start of its sequence. A sequence of n items with p
// protected ones keeps p + min(n - p, max(min_keep, budget)) items.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/core/arguments.h"
#include "cpu/pruning/budget_arguments.h"

namespace stamp::cpu {

struct SelectionPlan {
  int64_t num_sequences;
  int64_t total;
  int64_t longest;            // the length of the longest sequence
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  const uint8_t* protect;     // [total]; null: none
  int64_t codes_per_item;

  // The results of the ops.
  Tensor cu_seqlens_kept;       // int32 [num_sequences + 1]
  Tensor indices;               // int64 [total_kept]
  Tensor inverse;               // int32 [total]
  const int32_t* kept_offsets;  // the data of cu_seqlens_kept
  int64_t* kept_rows;           // the data of indices
  int32_t* inverse_rows;        // the data of inverse
  int64_t total_kept;

  std::vector<Tensor> held;  // keeps the arguments alive
};

// Checks the arguments and their contents (RuntimeError), computes cu_seqlens_kept, and fills the tail rows of indices
// and inverse with -1.
SelectionPlan plan_selection(
    int64_t total, const Tensor& cu_seqlens, int64_t max_seqlen, const BudgetArguments& arguments);

// Calls run(first_sequence, end_sequence, scratch) for ranges of sequences with about the same number of tokens, from
// as many threads as the tokens justify, each with its own `scratch_bytes` of scratch memory.
void for_sequences(
    const SelectionPlan& plan, int64_t min_tokens_per_task, int64_t scratch_bytes,
    const std::function<void(int64_t, int64_t, char*)>& run);

}  // namespace stamp::cpu
