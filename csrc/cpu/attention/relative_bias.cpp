#include "cpu/attention/relative_bias.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {
namespace {

// A table of distances has at most as many entries as this or as the batch has rows, so that its cost is bounded by the
// batch. Beyond, each pair of rows looks for its bucket.
constexpr int64_t kMinTableSize = 1 << 13;

// torch's own log: its rounding decides which bucket a distance falls into.
Tensor log_of(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::log", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The buckets of one direction.
struct Buckets {
  Tensor like;  // any tensor on the CPU
  int64_t num_buckets;
  int64_t max_distance;

  // The buckets of some distances >= 0, exactly those of the reference in Python.
  std::vector<int32_t> of(const std::vector<int64_t>& distances) const {
    const int64_t num_exact = num_buckets / 2, count = static_cast<int64_t>(distances.size());
    const Tensor ratio = torch::stable::new_empty(like, {count}, ScalarType::Float);
    float* ratios = ratio.mutable_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      ratios[i] = static_cast<float>(std::max<int64_t>(distances[i], 1)) / static_cast<float>(num_exact);
    }
    const Tensor octave = log_of(ratio);
    const float* octaves = octave.const_data_ptr<float>();
    const float max_octave =
        static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(num_exact)));
    std::vector<int32_t> buckets(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t logarithmic =
          num_exact + static_cast<int64_t>(octaves[i] / max_octave * static_cast<float>(num_buckets - num_exact));
      buckets[i] =
          static_cast<int32_t>(distances[i] < num_exact ? distances[i] : std::min(logarithmic, num_buckets - 1));
    }
    return buckets;
  }

  // The first distance of each bucket, largest_distance + 1 if it has none: all bisections at once. The bucket never
  // falls with the distance.
  std::vector<int32_t> first_distances(int64_t largest_distance) const {
    std::vector<int64_t> low(num_buckets, 0), high(num_buckets, largest_distance + 1), middle(num_buckets);
    for (bool is_done = false; !is_done;) {
      for (int64_t b = 0; b < num_buckets; ++b) {
        middle[b] = (low[b] + high[b]) / 2;
      }
      const std::vector<int32_t> buckets = of(middle);
      is_done = true;
      for (int64_t b = 0; b < num_buckets; ++b) {
        if (low[b] == high[b]) {
          continue;
        }
        if (buckets[b] >= b) {
          high[b] = middle[b];
        } else {
          low[b] = middle[b] + 1;
        }
        is_done = is_done && low[b] == high[b];
      }
    }
    return std::vector<int32_t>(low.begin(), low.end());
  }
};

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

// An int32 tensor of these values, which `held` keeps alive.
const int32_t* held_integers(const std::vector<int32_t>& values, const Tensor& like, std::vector<Tensor>& held) {
  held.push_back(torch::stable::new_empty(like, {static_cast<int64_t>(values.size())}, ScalarType::Int));
  int32_t* data = held.back().mutable_data_ptr<int32_t>();
  std::copy(values.begin(), values.end(), data);
  return data;
}

// The bucket of every distance from -max_distance to max_distance.
std::vector<int32_t> buckets_of_distances(const Buckets& direction, int64_t max_distance, bool is_bidirectional) {
  std::vector<int64_t> distances(max_distance + 1);
  std::iota(distances.begin(), distances.end(), 0);
  const std::vector<int32_t> of_direction = direction.of(distances);
  std::vector<int32_t> buckets(2 * max_distance + 1);
  for (int64_t distance = -max_distance; distance <= max_distance; ++distance) {
    int32_t bucket = of_direction[std::max<int64_t>(-distance, 0)];
    if (is_bidirectional && distance > 0) {
      bucket = static_cast<int32_t>(direction.num_buckets + of_direction[distance]);
    }
    buckets[distance + max_distance] = bucket;
  }
  return buckets;
}

template <typename scalar>
void fill_bias_of_entry(const AttentionProblem& problem, const Tensor& table, Tensor& bias) {
  const scalar* weights = table.const_data_ptr<scalar>();
  scalar* entry = bias.mutable_data_ptr<scalar>();
  for (int64_t head = 0; head < problem.num_heads; ++head) {
    for (int64_t x = 0; x < problem.bias.num_entries; ++x) {
      *entry++ = weights[problem.bias.bucket_of_entry[x] * problem.num_heads + head];
    }
  }
}

}  // namespace

void set_relative_bias(AttentionInputs& inputs, const BiasArguments& arguments) {
  AttentionProblem& problem = inputs.problem;
  RelativeBias& bias = problem.bias;
  const Tensor& table = *arguments.table;
  bias.num_buckets = table.size(0);
  const int64_t largest = largest_possible_distance(problem);
  STD_TORCH_CHECK(
      largest <= INT32_MAX / 2, "positions_q and positions_k must lie at most ", INT32_MAX / 2,
      " apart, got a distance of ", largest);
  // All distances from the argument max_distance on share the last bucket, and the batch has none above `largest`.
  bias.max_distance = std::min(arguments.max_distance, largest);
  bias.is_bidirectional = arguments.bidirectional;
  bias.num_buckets_of_direction = bias.num_buckets / (arguments.bidirectional ? 2 : 1);
  const Buckets direction = {table, bias.num_buckets_of_direction, arguments.max_distance};

  std::vector<int32_t> buckets;
  if (2 * bias.max_distance + 1 <= std::max(kMinTableSize, 2 * (problem.total_q + problem.total_k))) {
    buckets = buckets_of_distances(direction, bias.max_distance, arguments.bidirectional);
  } else {
    bias.first_distance_of_bucket = held_integers(direction.first_distances(largest), table, inputs.held);
    buckets.resize(bias.num_buckets);
    std::iota(buckets.begin(), buckets.end(), 0);
  }
  bias.num_entries = static_cast<int64_t>(buckets.size());
  bias.bucket_of_entry = held_integers(buckets, table, inputs.held);

  const Tensor weights = torch::stable::contiguous(torch::stable::to(table, compute_type(problem.dtype)));
  inputs.held.push_back(torch::stable::new_empty(weights, {problem.num_heads, bias.num_entries}));
  Tensor& of_entry = inputs.held.back();
  if (problem.dtype == DType::kFloat64) {
    fill_bias_of_entry<double>(problem, weights, of_entry);
  } else {
    fill_bias_of_entry<float>(problem, weights, of_entry);
  }
  bias.of_entry = of_entry.const_data_ptr();
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
