// packed_attention on the CPU, backward. The maths is in cpu/attention/backward.h.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/attention/arguments.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/plan.h"
#include "cpu/attention/relative_bias.h"
#include "cpu/attention/rows.h"

namespace stamp::cpu {
namespace {

using torch::stable::new_empty;
using OptionalTensor = std::optional<Tensor>;

// Each split has a dQ of its own, so more splits keep more threads busy and take more memory.
constexpr int64_t kMaxKeySplits = 8;

int64_t keys_per_split(int64_t num_keys) {
  if (num_keys <= kKeysPerBlock) {
    return kKeysPerBlock;
  }
  return std::max(2 * kKeysPerBlock, round_up(divide_up(num_keys, kMaxKeySplits), kKeysPerBlock));
}

int64_t num_key_splits(int64_t num_keys) {
  return divide_up(num_keys, keys_per_split(num_keys));
}

int64_t length(const int32_t* cu_seqlens, int64_t sequence) {
  return cu_seqlens[sequence + 1] - cu_seqlens[sequence];
}

// offsets[s] := the first element of sequence s in pass.dq_splits. Returns the number of elements of all sequences.
int64_t fill_dq_splits_offsets(const AttentionProblem& problem, std::vector<int64_t>& offsets) {
  int64_t size = 0;
  for (int64_t s = 0; s < problem.num_sequences; ++s) {
    const int64_t num_k = length(problem.cu_seqlens_k, s);
    offsets[s] = size;
    if (num_k > kKeysPerBlock) {
      size += num_key_splits(num_k) * length(problem.cu_seqlens_q, s) * problem.num_heads * problem.head_dim;
    }
  }
  return size;
}

// dQ of the sequences with several blocks of keys: the sum over their splits, in the order of the splits.
template <typename scalar>
void sum_dq_splits(const BackwardPass& pass) {
  const AttentionProblem& problem = pass.problem;
  const int64_t row_size = problem.num_heads * problem.head_dim;
  for (int64_t s = 0; s < problem.num_sequences; ++s) {
    const int64_t num_q = length(problem.cu_seqlens_q, s), num_k = length(problem.cu_seqlens_k, s);
    if (num_k <= kKeysPerBlock) {
      continue;
    }
    const int64_t num_splits = num_key_splits(num_k);
    scalar* splits = static_cast<scalar*>(pass.dq_splits) + pass.dq_splits_offset[s];
    torch::stable::parallel_for(0, num_q, 64, [&](int64_t begin, int64_t end) {
      for (int64_t query = begin; query < end; ++query) {
        scalar* sum = splits + query * row_size;
        for (int64_t split = 1; split < num_splits; ++split) {
          const scalar* of_split = splits + (split * num_q + query) * row_size;
          for (int64_t d = 0; d < row_size; ++d) {
            sum[d] += of_split[d];
          }
        }
        for (int64_t head = 0; head < problem.num_heads; ++head) {
          store_row<scalar>(
              pass.dq, problem.dtype, problem.cu_seqlens_q[s] + query, head, problem.head_dim,
              sum + head * problem.head_dim, 1);
        }
      }
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& tiles_q, const OptionalTensor& tiles_k, bool causal, double scale,
    const OptionalTensor& bias_table, bool bias_bidirectional, int64_t bias_max_distance,
    const OptionalTensor& positions_q, const OptionalTensor& positions_k, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) {
  const SequenceArguments sequences = {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k};
  const BiasArguments bias = {bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k};
  AttentionInputs inputs = attention_inputs({q, k, v, sequences, causal, scale, bias});
  AttentionProblem& problem = inputs.problem;
  set_dropout(problem, {dropout_p, dropout_seed});
  STD_TORCH_CHECK(bias_table.has_value() || !need_dbias, "need_dbias needs a bias_table");
  BackwardPass pass = {};
  pass.out = rows_like_q("out", out, q, inputs.held);
  pass.grad_out = rows_like_q("grad_out", grad_out, q, inputs.held);
  pass.lse = lse_of(lse, inputs);
  pass.problem = problem;
  const std::vector<AttentionTask> tasks = plan_tasks(problem, SplitBy::kKeys, keys_per_split);

  // The gradient of x, or an empty tensor where it is not needed.
  const auto new_gradient = [&](bool is_needed, const Tensor& x, HeadRows& rows) {
    if (!is_needed) {
      return new_empty(x, {0});
    }
    const Tensor dx = new_empty(x, {x.size(0), x.size(1), x.size(2)});
    rows = head_rows(dx, inputs.held);
    return dx;
  };
  const Tensor dq = new_gradient(need_dq, q, pass.dq);
  const Tensor dk = new_gradient(need_dk, k, pass.dk);
  const Tensor dv = new_gradient(need_dv, v, pass.dv);

  std::vector<int64_t> dq_splits_offset(problem.num_sequences);
  const int64_t dq_splits_size = need_dq ? fill_dq_splits_offsets(problem, dq_splits_offset) : 0;
  const Tensor dq_splits = new_empty(lse, {dq_splits_size});
  pass.dq_splits = dq_splits.mutable_data_ptr();
  pass.dq_splits_offset = dq_splits_offset.data();

  int64_t num_dbias_heads = 0;
  for (const AttentionTask& task : tasks) {
    num_dbias_heads += (task.end_head_kv - task.first_head_kv) * problem.gqa_group_size;
  }
  const Tensor dbias_by_task =
      new_empty(lse, {need_dbias ? num_dbias_heads : 0, problem.bias.num_buckets}, ScalarType::Double);
  pass.dbias_by_task = need_dbias ? dbias_by_task.mutable_data_ptr<double>() : nullptr;

  const AttentionKernels& kernels = attention_kernels(problem.dtype);
  run_tasks(tasks, kernels.backward_scratch_bytes(pass), q, [&](const AttentionTask& task, char* scratch) {
    kernels.backward(pass, task, scratch);
  });

  if (need_dq) {
    if (problem.dtype == DType::kFloat64) {
      sum_dq_splits<double>(pass);
    } else {
      sum_dq_splits<float>(pass);
    }
    zero_tail(dq, problem.cu_seqlens_q[problem.num_sequences]);
  }
  if (need_dk) {
    zero_tail(dk, problem.cu_seqlens_k[problem.num_sequences]);
  }
  if (need_dv) {
    zero_tail(dv, problem.cu_seqlens_k[problem.num_sequences]);
  }
  const Tensor dbias_table = need_dbias ? sum_dbias(problem, tasks, dbias_by_task, *bias_table) : new_empty(q, {0});
  return {dq, dk, dv, dbias_table};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("packed_attention_backward", TORCH_BOX(&stamp::cpu::packed_attention_backward));
}
