#include "cpu/attention/relative_bias.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {
namespace {

using torch::headeronly::ScalarType;

// torch's own log: its rounding decides which bucket a distance falls into.
Tensor log_of(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::log", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The buckets of the distances 0 to largest_distance in one direction, exactly those of the reference in Python.
std::vector<int32_t> buckets_of_one_direction(
    const Tensor& like, int64_t num_buckets, int64_t max_distance, int64_t largest_distance) {
  const int64_t num_exact = num_buckets / 2;
  const Tensor ratio = torch::stable::new_empty(like, {largest_distance + 1}, ScalarType::Float);
  float* ratios = ratio.mutable_data_ptr<float>();
  for (int64_t d = 0; d <= largest_distance; ++d) {
    ratios[d] = static_cast<float>(std::max<int64_t>(d, 1)) / static_cast<float>(num_exact);
  }
  const Tensor octave = log_of(ratio);
  const float* octaves = octave.const_data_ptr<float>();
  const float max_octave =
      static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(num_exact)));
  std::vector<int32_t> buckets(largest_distance + 1);
  for (int64_t d = 0; d <= largest_distance; ++d) {
    const int64_t logarithmic =
        num_exact + static_cast<int64_t>(octaves[d] / max_octave * static_cast<float>(num_buckets - num_exact));
    buckets[d] = static_cast<int32_t>(d < num_exact ? d : std::min(logarithmic, num_buckets - 1));
  }
  return buckets;
}

// An upper bound of the distance between a query and a key in the batch.
int64_t largest_possible_distance(const AttentionProblem& problem) {
  const int64_t valid_q = problem.cu_seqlens_q[problem.num_sequences];
  const int64_t valid_k = problem.cu_seqlens_k[problem.num_sequences];
  int64_t largest_q = std::max<int64_t>(problem.longest_q - 1, 0), smallest_q = 0;
  int64_t largest_k = std::max<int64_t>(problem.longest_k - 1, 0), smallest_k = 0;
  if (problem.bias.positions_q != nullptr && valid_q > 0) {
    const auto [smallest, largest] = std::minmax_element(problem.bias.positions_q, problem.bias.positions_q + valid_q);
    smallest_q = *smallest, largest_q = *largest;
  }
  if (problem.bias.positions_k != nullptr && valid_k > 0) {
    const auto [smallest, largest] = std::minmax_element(problem.bias.positions_k, problem.bias.positions_k + valid_k);
    smallest_k = *smallest, largest_k = *largest;
  }
  return std::max<int64_t>({largest_k - smallest_q, largest_q - smallest_k, 1});
}

template <typename scalar>
void fill_bias_of_distance(const AttentionProblem& problem, const Tensor& table, Tensor& bias) {
  const scalar* weights = table.const_data_ptr<scalar>();
  scalar* entry = bias.mutable_data_ptr<scalar>();
  for (int64_t head = 0; head < problem.num_heads; ++head) {
    for (int64_t x = 0; x <= 2 * problem.bias.max_distance; ++x) {
      *entry++ = weights[problem.bias.bucket_of_distance[x] * problem.num_heads + head];
    }
  }
}

}  // namespace

void set_relative_bias(AttentionInputs& inputs, const BiasArguments& arguments) {
  AttentionProblem& problem = inputs.problem;
  const Tensor& table = *arguments.table;
  problem.bias.num_buckets = table.size(0);
  const int64_t largest = largest_possible_distance(problem);
  STD_TORCH_CHECK(
      largest <= INT32_MAX / 2, "positions_q and positions_k must lie at most ", INT32_MAX / 2,
      " apart, got a distance of ", largest);
  // All distances from the argument max_distance on share the last bucket, and the batch has none above `largest`.
  problem.bias.max_distance = std::min(arguments.max_distance, largest);
  const int64_t num_distances = 2 * problem.bias.max_distance + 1;

  const int64_t directions = arguments.bidirectional ? 2 : 1;
  const std::vector<int32_t> of_direction = buckets_of_one_direction(
      table, problem.bias.num_buckets / directions, arguments.max_distance, problem.bias.max_distance);
  inputs.held.push_back(torch::stable::new_empty(table, {num_distances}, ScalarType::Int));
  int32_t* buckets = inputs.held.back().mutable_data_ptr<int32_t>();
  for (int64_t distance = -problem.bias.max_distance; distance <= problem.bias.max_distance; ++distance) {
    int32_t bucket = of_direction[std::max<int64_t>(-distance, 0)];
    if (arguments.bidirectional && distance > 0) {
      bucket = static_cast<int32_t>(problem.bias.num_buckets / 2 + of_direction[distance]);
    }
    buckets[distance + problem.bias.max_distance] = bucket;
  }
  problem.bias.bucket_of_distance = buckets;

  const Tensor weights = torch::stable::contiguous(torch::stable::to(table, compute_type(problem.dtype)));
  inputs.held.push_back(torch::stable::new_empty(weights, {problem.num_heads, num_distances}));
  Tensor& bias = inputs.held.back();
  if (problem.dtype == DType::kFloat64) {
    fill_bias_of_distance<double>(problem, weights, bias);
  } else {
    fill_bias_of_distance<float>(problem, weights, bias);
  }
  problem.bias.of_distance = bias.const_data_ptr();
}

Tensor sum_dbias(
    const AttentionProblem& problem, const std::vector<AttentionTask>& tasks, const Tensor& dbias_by_task,
    const Tensor& bias_table) {
  const int64_t gqa_group_size = problem.gqa_group_size;
  const double* of_task = dbias_by_task.const_data_ptr<double>();
  const Tensor sums = torch::stable::new_zeros(dbias_by_task, {problem.bias.num_buckets, problem.num_heads});
  double* sum = sums.mutable_data_ptr<double>();
  for (const AttentionTask& task : tasks) {
    for (int64_t head = task.first_head_kv * gqa_group_size; head < task.end_head_kv * gqa_group_size; ++head) {
      for (int64_t bucket = 0; bucket < problem.bias.num_buckets; ++bucket) {
        sum[bucket * problem.num_heads + head] += *of_task++;
      }
    }
  }
  return torch::stable::to(sums, bias_table.scalar_type());
}

}  // namespace stamp::cpu
