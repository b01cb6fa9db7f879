// From the arguments of an attention op to kernels' input and units of work, and the threads that do the work.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/attention/kernels.h"
#include "cpu/core/arguments.h"

namespace stamp::cpu {

using torch::stable::Tensor;

// The bias arguments of an attention op.
struct BiasArguments {
  std::optional<Tensor> table;  // [num_buckets, num_heads]
  bool bidirectional;
  int64_t max_distance;
  std::optional<Tensor> positions_q;
  std::optional<Tensor> positions_k;
};

// A problem and the tensors that its pointers point into.
struct AttentionInputs {
  AttentionProblem problem;
  int64_t batch;
  int64_t total_k;
  std::vector<Tensor> held;
};

// Checks contents (RuntimeError) and fills in the problem; v is null for centrality, dropout is filled in by
// `set_dropout`.
AttentionInputs attention_inputs(
    const Tensor& q, const Tensor& k, const Tensor* v, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale,
    const BiasArguments& bias);

void set_dropout(AttentionProblem& problem, double dropout_p, const std::optional<Tensor>& dropout_seed);

torch::headeronly::ScalarType compute_type(const AttentionProblem& problem);

// Rows of a [rows, heads, head_dim] tensor, of a contiguous copy in `held` where the last dimension is not contiguous.
HeadRows head_rows(const Tensor& x, std::vector<Tensor>& held);

// Which rows long sequences are divided by. `rows_per_part` says into how many rows each a sequence of that many is
// divided. Units with keys of all heads add up over the heads (centrality); others may have a single key head.
enum class DividedBy { kQueries, kKeys, kKeysOfAllHeads };
std::vector<AttentionUnit> plan_units(
    const AttentionInputs& inputs, DividedBy divided_by, const std::function<int64_t(int64_t num_rows)>& rows_per_part);

// Calls run(unit, scratch memory) for every unit, from as many threads as are worth it, each with memory of its
// own. The units should come longest first.
void run_units(
    const std::vector<AttentionUnit>& units, int64_t scratch_bytes, const Tensor& like,
    const std::function<void(const AttentionUnit&, char*)>& run);

// Centrality from the lse, of all sequences or of those that the forward pass has not served.
void centrality_from_lse(
    const AttentionInputs& inputs, const Tensor& lse, const uint8_t* query_mask, const Tensor& centrality,
    bool without_fused);

// A mask of queries as kernels read it; null: every query votes.
const uint8_t* votes_of(const std::optional<Tensor>& query_mask, std::vector<Tensor>& held);

}  // namespace stamp::cpu
