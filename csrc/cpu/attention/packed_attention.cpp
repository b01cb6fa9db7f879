// The attention ops on the CPU. What is computed is written in attention_forward.h and attention_backward.h; here is
// where the results go and how the work is divided.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/attention/kernels.h"
#include "cpu/attention/plan.h"
#include "cpu/attention/rows.h"

namespace {

using stamp::cpu::AttentionInputs;
using stamp::cpu::AttentionKernels;
using stamp::cpu::AttentionProblem;
using stamp::cpu::AttentionUnit;
using stamp::cpu::BackwardPass;
using stamp::cpu::BiasArguments;
using stamp::cpu::DividedBy;
using stamp::cpu::DType;
using stamp::cpu::ForwardPass;
using stamp::cpu::HeadRows;
using stamp::cpu::votes_of;
using stamp::cpu::zero_tail;
using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxBackwardParts = 8;

int64_t length(const int32_t* cu_seqlens, int64_t sequence) {
  return cu_seqlens[sequence + 1] - cu_seqlens[sequence];
}

bool is_fused(const AttentionProblem& problem, int64_t sequence) {
  return stamp::cpu::centrality_is_fused(
      length(problem.cu_seqlens_q, sequence), length(problem.cu_seqlens_k, sequence));
}

// Keys of a long sequence that one thread takes in the backward pass. More parts keep more threads busy, and each holds
// a dQ of its own.
int64_t backward_keys_per_part(int64_t num_keys) {
  using stamp::cpu::kKeysPerBlock;
  if (num_keys <= kKeysPerBlock) {
    return kKeysPerBlock;
  }
  const int64_t even = (num_keys + kMaxBackwardParts - 1) / kMaxBackwardParts;
  return std::max(2 * kKeysPerBlock, (even + kKeysPerBlock - 1) / kKeysPerBlock * kKeysPerBlock);
}

// Adds up the heads' sums, for the sequences that have them.
template <typename scalar>
void sum_heads(const AttentionInputs& inputs, const Tensor& by_head, const Tensor& centrality) {
  const AttentionProblem& problem = inputs.problem;
  const scalar* of_head = by_head.const_data_ptr<scalar>();
  scalar* sums = centrality.mutable_data_ptr<scalar>();
  torch::stable::parallel_for(0, inputs.batch, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (!is_fused(problem, s)) {
        continue;
      }
      for (int64_t j = problem.cu_seqlens_k[s]; j < problem.cu_seqlens_k[s + 1]; ++j) {
        scalar sum = 0;
        for (int64_t head = 0; head < problem.num_heads_kv; ++head) {
          sum += of_head[head * inputs.total_k + j];
        }
        sums[j] = sum;
      }
    }
  });
}

void zero_tail_of_rows_by_head(const Tensor& x, int64_t first_tail_row) {
  for (int64_t head = 0; head < x.size(0); ++head) {
    zero_tail(torch::stable::select(x, 0, head), first_tail_row);
  }
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale, const OptionalTensor& bias_table,
    bool bias_bidirectional, int64_t bias_max_distance, const OptionalTensor& positions_q,
    const OptionalTensor& positions_k, const OptionalTensor& query_mask, double dropout_p,
    const OptionalTensor& dropout_seed, bool return_centrality) {
  AttentionInputs inputs = attention_inputs(
      q, k, &v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
      BiasArguments{bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k});
  AttentionProblem& problem = inputs.problem;
  set_dropout(problem, dropout_p, dropout_seed);

  const Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Tensor lse = new_empty(q, {q.size(1), q.size(0)}, compute_type(problem));
  const Tensor centrality = new_empty(lse, {return_centrality ? inputs.total_k : 0});
  const Tensor by_head = new_empty(lse, {return_centrality ? problem.num_heads_kv : 0, inputs.total_k});

  ForwardPass pass = {problem, stamp::cpu::head_rows(out, inputs.held), lse.mutable_data_ptr(), nullptr,
                      inputs.total_k, votes_of(query_mask, inputs.held)};
  if (return_centrality) {
    pass.centrality_by_head = by_head.mutable_data_ptr();
  }
  const std::vector<AttentionUnit> units =
      plan_units(inputs, DividedBy::kQueries, [](int64_t) { return stamp::cpu::kQueriesPerUnit; });
  const AttentionKernels& kernels = attention_kernels(problem.dtype);
  run_units(units, kernels.forward_scratch_bytes(pass), q, [&](const AttentionUnit& unit, char* scratch) {
    kernels.forward(pass, unit, scratch);
  });
  zero_tail(out, problem.cu_seqlens_q[inputs.batch]);
  zero_tail_of_rows_by_head(lse, problem.cu_seqlens_q[inputs.batch]);

  if (return_centrality) {
    if (problem.dtype == DType::kFloat64) {
      sum_heads<double>(inputs, by_head, centrality);
    } else {
      sum_heads<float>(inputs, by_head, centrality);
    }
    if (!stamp::cpu::centrality_is_fused(problem.longest_q, problem.longest_k)) {
      centrality_from_lse(inputs, lse, pass.query_mask, centrality, true);
    }
    zero_tail(centrality, problem.cu_seqlens_k[inputs.batch]);
  }
  return {out, lse, centrality};
}

// dQ of the sequences that have several blocks of keys: the sum of what their parts hold, in the parts' order.
template <typename scalar>
void sum_query_gradients(const AttentionInputs& inputs, const BackwardPass& pass) {
  const AttentionProblem& problem = inputs.problem;
  const int64_t row_size = problem.num_heads * problem.head_dim;
  for (int64_t s = 0; s < inputs.batch; ++s) {
    const int64_t num_q = length(problem.cu_seqlens_q, s), num_k = length(problem.cu_seqlens_k, s);
    if (num_k <= stamp::cpu::kKeysPerBlock) {
      continue;
    }
    const int64_t keys_per_part = backward_keys_per_part(num_k);
    const int64_t num_parts = (num_k + keys_per_part - 1) / keys_per_part;
    scalar* parts = static_cast<scalar*>(pass.dq_parts) + pass.dq_parts_offset[s];
    torch::stable::parallel_for(0, num_q, 64, [&](int64_t begin, int64_t end) {
      for (int64_t query = begin; query < end; ++query) {
        scalar* sum = parts + query * row_size;
        for (int64_t part = 1; part < num_parts; ++part) {
          const scalar* of_part = parts + (part * num_q + query) * row_size;
          for (int64_t d = 0; d < row_size; ++d) {
            sum[d] += of_part[d];
          }
        }
        for (int64_t head = 0; head < problem.num_heads; ++head) {
          stamp::cpu::store_row<scalar>(
              pass.dq, problem.dtype, problem.cu_seqlens_q[s] + query, head, problem.head_dim,
              sum + head * problem.head_dim, 1);
        }
      }
    });
  }
}

// The table's gradient from the units' sums, in the units' order.
Tensor sum_bias_gradients(
    const AttentionProblem& problem, const std::vector<AttentionUnit>& units, const Tensor& by_unit,
    const Tensor& bias_table) {
  const int64_t gqa_group_size = problem.num_heads / problem.num_heads_kv;
  const double* of_unit = by_unit.const_data_ptr<double>();
  const Tensor sums = torch::stable::new_zeros(by_unit, {problem.num_buckets, problem.num_heads});
  double* sum = sums.mutable_data_ptr<double>();
  for (const AttentionUnit& unit : units) {
    for (int64_t head = unit.first_head_kv * gqa_group_size; head < unit.end_head_kv * gqa_group_size; ++head) {
      for (int64_t bucket = 0; bucket < problem.num_buckets; ++bucket) {
        sum[bucket * problem.num_heads + head] += *of_unit++;
      }
    }
  }
  return torch::stable::to(sums, bias_table.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    bool causal, double scale, const OptionalTensor& bias_table, bool bias_bidirectional, int64_t bias_max_distance,
    const OptionalTensor& positions_q, const OptionalTensor& positions_k, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) {
  AttentionInputs inputs = attention_inputs(
      q, k, &v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
      BiasArguments{bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k});
  AttentionProblem& problem = inputs.problem;
  set_dropout(problem, dropout_p, dropout_seed);
  const std::vector<AttentionUnit> units = plan_units(inputs, DividedBy::kKeys, backward_keys_per_part);

  // A gradient like x, or an empty one where it is not needed.
  const auto gradient = [&](bool needed, const Tensor& x, HeadRows& rows) {
    if (!needed) {
      return new_empty(x, {0});
    }
    const Tensor dx = new_empty(x, {x.size(0), x.size(1), x.size(2)});
    rows = stamp::cpu::head_rows(dx, inputs.held);
    return dx;
  };
  BackwardPass pass = {};
  const Tensor dq = gradient(need_dq, q, pass.dq);
  const Tensor dk = gradient(need_dk, k, pass.dk);
  const Tensor dv = gradient(need_dv, v, pass.dv);
  pass.problem = problem;
  pass.out = stamp::cpu::head_rows(out, inputs.held);
  pass.grad_out = stamp::cpu::head_rows(grad_out, inputs.held);
  const Tensor lse_contiguous = torch::stable::contiguous(lse);
  pass.lse = lse_contiguous.const_data_ptr();

  std::vector<int64_t> dq_parts_offset(inputs.batch);
  int64_t dq_parts_size = 0;
  for (int64_t s = 0; s < inputs.batch && need_dq; ++s) {
    const int64_t num_k = length(problem.cu_seqlens_k, s);
    dq_parts_offset[s] = dq_parts_size;
    if (num_k > stamp::cpu::kKeysPerBlock) {
      const int64_t keys_per_part = backward_keys_per_part(num_k);
      const int64_t num_parts = (num_k + keys_per_part - 1) / keys_per_part;
      dq_parts_size +=
          num_parts * length(problem.cu_seqlens_q, s) * problem.num_heads * problem.head_dim;
    }
  }
  const Tensor dq_parts = new_empty(lse, {dq_parts_size});
  pass.dq_parts = dq_parts.mutable_data_ptr();
  pass.dq_parts_offset = dq_parts_offset.data();

  int64_t heads_of_units = 0;
  for (const AttentionUnit& unit : units) {
    heads_of_units += (unit.end_head_kv - unit.first_head_kv) * (problem.num_heads / problem.num_heads_kv);
  }
  const Tensor dbias_by_unit =
      new_empty(lse, {need_dbias ? heads_of_units : 0, problem.num_buckets}, ScalarType::Double);
  if (need_dbias) {
    pass.dbias_by_unit = dbias_by_unit.mutable_data_ptr<double>();
  }

  const AttentionKernels& kernels = attention_kernels(problem.dtype);
  run_units(units, kernels.backward_scratch_bytes(pass), q, [&](const AttentionUnit& unit, char* scratch) {
    kernels.backward(pass, unit, scratch);
  });

  if (need_dq) {
    if (problem.dtype == DType::kFloat64) {
      sum_query_gradients<double>(inputs, pass);
    } else {
      sum_query_gradients<float>(inputs, pass);
    }
    zero_tail(dq, problem.cu_seqlens_q[inputs.batch]);
  }
  if (need_dk) {
    zero_tail(dk, problem.cu_seqlens_k[inputs.batch]);
  }
  if (need_dv) {
    zero_tail(dv, problem.cu_seqlens_k[inputs.batch]);
  }
  const Tensor dbias =
      need_dbias ? sum_bias_gradients(problem, units, dbias_by_unit, *bias_table) : new_empty(q, {0});
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}
