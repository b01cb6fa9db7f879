// The arguments of the attention ops: their checks, and what the kernels read of them.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/attention/kernels.h"
#include "cpu/core/arguments.h"

namespace stamp::cpu {

struct SequenceArguments {
  Tensor cu_seqlens_q;                 // int32 [num_sequences + 1]
  std::optional<Tensor> cu_seqlens_k;  // nullopt: self-attention
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  std::optional<Tensor> tiles_q;  // int32 [N, 2], the tile lists of the GPU's kernels: checked, not read
  std::optional<Tensor> tiles_k;
};

struct BiasArguments {
  std::optional<Tensor> table;  // [num_buckets, num_heads]
  bool bidirectional;
  int64_t max_distance;
  std::optional<Tensor> positions_q;  // int32 [total_q]
  std::optional<Tensor> positions_k;  // int32 [total_k]
};

struct AttentionArguments {
  Tensor q;                 // [total_q, num_heads, head_dim]
  Tensor k;                 // [total_k, num_heads_kv, head_dim]
  std::optional<Tensor> v;  // [total_k, num_heads_kv, head_dim]; nullopt for centrality
  SequenceArguments sequences;
  bool causal;
  double scale;
  BiasArguments bias;
};

struct DropoutArguments {
  double p;                    // in [0, 1)
  std::optional<Tensor> seed;  // int64 [1]; needed if p > 0
};

// A problem, and the tensors that its pointers point into.
struct AttentionInputs {
  AttentionProblem problem;
  std::vector<Tensor> held;
};

// Every function below checks its arguments: shapes, dtypes, storage, ranges and contents (RuntimeError).

// The problem without dropout.
AttentionInputs attention_inputs(const AttentionArguments& arguments);

void set_dropout(AttentionProblem& problem, const DropoutArguments& arguments);

// The rows of x [rows, heads, head_dim], or of a contiguous copy in `held` where the last dimension is not contiguous.
HeadRows head_rows(const Tensor& x, std::vector<Tensor>& held);

// The same of out or its gradient, which must be like q.
HeadRows rows_like_q(const char* name, const Tensor& x, const Tensor& q, std::vector<Tensor>& held);

// lse [num_heads, total_q] in the compute type.
const void* lse_of(const Tensor& lse, AttentionInputs& inputs);

// The query mask [total_q] as kernels read it; null: every query counts.
const uint8_t* query_mask_of(const char* name, const std::optional<Tensor>& query_mask, AttentionInputs& inputs);

}  // namespace stamp::cpu
