// attention_centrality on the CPU. The maths is in cpu/attention/centrality.h.

#include "cpu/attention/attention_centrality.h"

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/attention/kernels.h"
#include "cpu/attention/plan.h"

namespace stamp::cpu {

void centrality_from_lse(
    const AttentionProblem& problem, const void* lse, const uint8_t* query_mask, CentralityOf sequences,
    const Tensor& centrality) {
  CentralityPass pass = {};
  pass.problem = problem;
  pass.lse = lse;
  pass.query_mask = query_mask;
  pass.centrality = centrality.mutable_data_ptr();
  pass.skip_fused = sequences == CentralityOf::kSequencesThatAreNotFused;
  const std::vector<AttentionTask> tasks =
      plan_tasks(problem, SplitBy::kKeysOfAllHeads, [](int64_t) { return kKeysPerBlock; });
  const AttentionKernels& kernels = attention_kernels(problem.dtype);
  run_tasks(tasks, kernels.centrality_scratch_bytes(pass), centrality, [&](const AttentionTask& task, char* scratch) {
    kernels.centrality(pass, task, scratch);
  });
}

namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor attention_centrality(
    const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& tiles_q, const OptionalTensor& tiles_k,
    bool causal, double scale, const OptionalTensor& bias_table, bool bias_bidirectional, int64_t bias_max_distance,
    const OptionalTensor& positions_q, const OptionalTensor& positions_k, const OptionalTensor& query_mask) {
  const SequenceArguments sequences = {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k};
  const BiasArguments bias = {bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k};
  AttentionInputs inputs = attention_inputs({q, k, std::nullopt, sequences, causal, scale, bias});
  const AttentionProblem& problem = inputs.problem;
  const void* lse_data = lse_of(lse, inputs);
  const uint8_t* mask = query_mask_of("query_mask", query_mask, inputs);

  const Tensor centrality = torch::stable::new_empty(lse, {problem.total_k});
  centrality_from_lse(problem, lse_data, mask, CentralityOf::kAllSequences, centrality);
  zero_tail(centrality, problem.cu_seqlens_k[problem.num_sequences]);
  return centrality;
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("attention_centrality", TORCH_BOX(&stamp::cpu::attention_centrality));
}
