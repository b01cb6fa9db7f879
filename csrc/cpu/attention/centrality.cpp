// attention_centrality on the CPU: the column sums of the softmax, from the lse of an attention that has been computed.
// What is computed is written in cpu/attention/centrality.h.

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/attention/kernels.h"
#include "cpu/attention/plan.h"

namespace stamp::cpu {

void centrality_from_lse(
    const AttentionInputs& inputs, const Tensor& lse, const uint8_t* query_mask, const Tensor& centrality,
    bool without_fused) {
  const CentralityPass pass = {
      inputs.problem, lse.const_data_ptr(), query_mask, centrality.mutable_data_ptr(), without_fused};
  const std::vector<AttentionUnit> units =
      plan_units(inputs, DividedBy::kKeysOfAllHeads, [](int64_t) { return kKeysPerBlock; });
  const AttentionKernels& kernels = attention_kernels(inputs.problem.dtype);
  run_units(units, kernels.centrality_scratch_bytes(pass), lse, [&](const AttentionUnit& unit, char* scratch) {
    kernels.centrality(pass, unit, scratch);
  });
}

const uint8_t* votes_of(const std::optional<Tensor>& query_mask, std::vector<Tensor>& held) {
  if (!query_mask.has_value()) {
    return nullptr;
  }
  held.push_back(torch::stable::contiguous(*query_mask));
  return static_cast<const uint8_t*>(held.back().const_data_ptr());
}

namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor attention_centrality(
    const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale, const OptionalTensor& bias_table,
    bool bias_bidirectional, int64_t bias_max_distance, const OptionalTensor& positions_q,
    const OptionalTensor& positions_k, const OptionalTensor& query_mask) {
  AttentionInputs inputs = attention_inputs(
      q, k, nullptr, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
      BiasArguments{bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k});
  const Tensor centrality = torch::stable::new_empty(lse, {inputs.total_k});
  const uint8_t* votes = votes_of(query_mask, inputs.held);
  centrality_from_lse(inputs, torch::stable::contiguous(lse), votes, centrality, false);
  zero_tail(centrality, inputs.problem.cu_seqlens_k[inputs.batch]);
  return centrality;
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("attention_centrality", TORCH_BOX(&stamp::cpu::attention_centrality));
}
