#include "cpu/attention/arguments.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/attention/relative_bias.h"

namespace stamp::cpu {

HeadRows head_rows(const Tensor& x, std::vector<Tensor>& held) {
  const Tensor x_rows = x.stride(2) == 1 ? x : held_contiguous(x, held);
  HeadRows rows;
  rows.data = const_cast<void*>(x_rows.const_data_ptr());
  rows.row_stride = x_rows.stride(0);
  rows.head_stride = x_rows.stride(1);
  return rows;
}

const uint8_t* query_mask_of(const std::optional<Tensor>& query_mask, std::vector<Tensor>& held) {
  if (!query_mask.has_value()) {
    return nullptr;
  }
  return static_cast<const uint8_t*>(held_contiguous(*query_mask, held).const_data_ptr());
}

AttentionInputs attention_inputs(const AttentionArguments& arguments) {
  const Tensor& q = arguments.q;
  const Tensor& k = arguments.k;
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q and k must have shape [total, num_heads, head_dim]");
  STD_TORCH_CHECK(
      q.scalar_type() == k.scalar_type() && q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "q and k must have the same dtype and head_dim, and num_heads_kv must divide num_heads_q");
  AttentionInputs inputs = {};
  AttentionProblem& problem = inputs.problem;
  problem.dtype = dtype_of("q", q);
  problem.head_dim = q.size(2);
  problem.num_heads = q.size(1);
  problem.num_heads_kv = k.size(1);
  problem.gqa_group_size = q.size(1) / k.size(1);
  problem.total_q = q.size(0);
  problem.total_k = k.size(0);
  problem.q = head_rows(q, inputs.held);
  problem.k = head_rows(k, inputs.held);
  if (arguments.v.has_value()) {
    problem.v = head_rows(*arguments.v, inputs.held);
  }
  problem.causal = arguments.causal;
  problem.scale = arguments.scale;

  const SequenceArguments& sequences = arguments.sequences;
  const BiasArguments& bias = arguments.bias;
  problem.num_sequences = sequences.cu_seqlens_q.size(0) - 1;
  const Tensor cu_seqlens_q = held_contiguous(sequences.cu_seqlens_q, inputs.held);
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, problem.total_q, sequences.max_seqlen_q);
  problem.cu_seqlens_q = problem.cu_seqlens_k = cu_seqlens_q.const_data_ptr<int32_t>();
  if (bias.positions_q.has_value()) {
    problem.bias.positions_q = held_contiguous(*bias.positions_q, inputs.held).const_data_ptr<int32_t>();
  }
  if (sequences.cu_seqlens_k.has_value()) {
    const Tensor cu_seqlens_k = held_contiguous(*sequences.cu_seqlens_k, inputs.held);
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, problem.total_k, sequences.max_seqlen_k);
    problem.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  } else {
    problem.bias.positions_k = problem.bias.positions_q;
  }
  if (bias.positions_k.has_value()) {
    problem.bias.positions_k = held_contiguous(*bias.positions_k, inputs.held).const_data_ptr<int32_t>();
  }
  problem.longest_q = longest(problem.cu_seqlens_q, problem.num_sequences);
  problem.longest_k = longest(problem.cu_seqlens_k, problem.num_sequences);
  if (bias.table.has_value()) {
    set_relative_bias(inputs, bias);
  }
  return inputs;
}

void set_dropout(AttentionProblem& problem, const DropoutArguments& arguments) {
  if (arguments.p == 0) {
    return;
  }
  STD_TORCH_CHECK(arguments.seed.has_value(), "dropout_p ", arguments.p, " needs a dropout_seed");
  const uint64_t seed = static_cast<uint64_t>(*arguments.seed->const_data_ptr<int64_t>());
  problem.dropout.is_active = true;
  problem.dropout.threshold = static_cast<uint32_t>(arguments.p * 4294967296.0);
  problem.dropout.seed_low = static_cast<uint32_t>(seed);
  problem.dropout.seed_high = static_cast<uint32_t>(seed >> 32);
  problem.dropout.keep_scale = 1.0 / (1.0 - arguments.p);
}

}  // namespace stamp::cpu
