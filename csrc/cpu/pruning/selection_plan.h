// How many tokens every sequence keeps, where their rows go, and which threads do the work.
//
// An item is `codes_per_item` tokens from the start of its sequence on. A sequence of n items, p of them protected, keeps
// p + min(n - p, max(min_keep, budget)) of them.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "common/budget_arguments.h"
#include "cpu/core/arguments.h"

namespace stamp::cpu {

struct SelectionPlan {
  int64_t batch;
  int64_t total;
  int64_t longest;
  const int32_t* cu_seqlens;  // [batch + 1]
  const uint8_t* protect;     // [total]; null: none
  int64_t codes_per_item;

  // What the ops return, in tokens.
  Tensor cu_seqlens_kept;
  Tensor indices;
  Tensor inverse;
  const int32_t* kept_offsets;  // of cu_seqlens_kept
  int64_t* kept_rows;           // of indices
  int32_t* inverse_rows;        // of inverse
  int64_t total_kept;

  std::vector<Tensor> held;
};

// Checks contents (RuntimeError), computes cu_seqlens_kept, and fills the rest of the outputs' tails with -1.
SelectionPlan plan_selection(
    int64_t total, const Tensor& cu_seqlens, int64_t max_seqlen, const BudgetArguments& arguments);

// Calls run(first sequence, end sequence, scratch memory) for ranges of about as many tokens, from as many threads as
// are worth it, each with `scratch_bytes` of its own.
void for_sequences(
    const SelectionPlan& plan, int64_t least_tokens_per_task, int64_t scratch_bytes,
    const std::function<void(int64_t, int64_t, char*)>& run);

}  // namespace stamp::cpu
