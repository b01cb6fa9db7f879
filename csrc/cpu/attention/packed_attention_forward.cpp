// packed_attention on the CPU, forward. The maths is in cpu/attention/forward.h.

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/attention/arguments.h"
#include "cpu/attention/attention_centrality.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/plan.h"

namespace stamp::cpu {
namespace {

using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

// centrality [total_k] := the sum of centrality_by_head [num_heads_kv, total_k], of the sequences that have it.
template <typename scalar>
void sum_centrality_of_heads(
    const AttentionProblem& problem, const Tensor& centrality_by_head, const Tensor& centrality) {
  const scalar* by_head = centrality_by_head.const_data_ptr<scalar>();
  scalar* sums = centrality.mutable_data_ptr<scalar>();
  torch::stable::parallel_for(0, problem.num_sequences, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first_k = problem.cu_seqlens_k[s], end_k = problem.cu_seqlens_k[s + 1];
      if (!centrality_is_fused(problem.cu_seqlens_q[s + 1] - problem.cu_seqlens_q[s], end_k - first_k)) {
        continue;
      }
      for (int64_t j = first_k; j < end_k; ++j) {
        scalar sum = 0;
        for (int64_t head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
          sum += by_head[head_kv * problem.total_k + j];
        }
        sums[j] = sum;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& tiles_q, const OptionalTensor& tiles_k,
    bool causal, double scale, const OptionalTensor& bias_table, bool bias_bidirectional, int64_t bias_max_distance,
    const OptionalTensor& positions_q, const OptionalTensor& positions_k, const OptionalTensor& centrality_query_mask,
    double dropout_p, const OptionalTensor& dropout_seed, bool return_centrality) {
  const SequenceArguments sequences = {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k};
  const BiasArguments bias = {bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k};
  AttentionInputs inputs = attention_inputs({q, k, v, sequences, causal, scale, bias});
  AttentionProblem& problem = inputs.problem;
  set_dropout(problem, {dropout_p, dropout_seed});
  const uint8_t* query_mask = query_mask_of("centrality_query_mask", centrality_query_mask, inputs);

  const Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Tensor lse = new_empty(q, {q.size(1), q.size(0)}, compute_type(problem.dtype));
  const Tensor centrality = new_empty(lse, {return_centrality ? problem.total_k : 0});
  const Tensor centrality_by_head = new_empty(lse, {return_centrality ? problem.num_heads_kv : 0, problem.total_k});

  ForwardPass pass = {};
  pass.problem = problem;
  pass.out = head_rows(out, inputs.held);
  pass.lse = lse.mutable_data_ptr();
  pass.centrality_by_head = return_centrality ? centrality_by_head.mutable_data_ptr() : nullptr;
  pass.query_mask = query_mask;
  const std::vector<AttentionTask> tasks =
      plan_tasks(problem, SplitBy::kQueries, [](int64_t) { return kQueriesPerTask; });
  const AttentionKernels& kernels = attention_kernels(problem.dtype);
  run_tasks(tasks, kernels.forward_scratch_bytes(pass), q, [&](const AttentionTask& task, char* scratch) {
    kernels.forward(pass, task, scratch);
  });

  const int64_t end_q = problem.cu_seqlens_q[problem.num_sequences];
  zero_tail(out, end_q);
  for (int64_t head = 0; head < problem.num_heads; ++head) {
    zero_tail(torch::stable::select(lse, 0, head), end_q);
  }
  if (return_centrality) {
    if (problem.dtype == DType::kFloat64) {
      sum_centrality_of_heads<double>(problem, centrality_by_head, centrality);
    } else {
      sum_centrality_of_heads<float>(problem, centrality_by_head, centrality);
    }
    if (!centrality_is_fused(problem.longest_q, problem.longest_k)) {
      centrality_from_lse(problem, pass.lse, pass.query_mask, CentralityOf::kSequencesThatAreNotFused, centrality);
    }
    zero_tail(centrality, problem.cu_seqlens_k[problem.num_sequences]);
  }
  return {out, lse, centrality};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&stamp::cpu::packed_attention_forward));
}
