#include "cpu/attention/plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/arguments.h"
#include "cpu/core/dispatch.h"
#include "cpu/core/tasks.h"

namespace stamp::cpu {

namespace {

using torch::headeronly::ScalarType;

// In multiply-adds of one product: sequences are joined until they cost this much, and no thread is started for less;
constexpr int64_t kCostPerUnit = 1 << 17;
// a sequence of this cost in one head is a unit head by head.
constexpr int64_t kCostOfOneHead = 1 << 20;

// log, as torch computes it: the rounding decides which bucket a distance falls into.
Tensor log_of(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::log", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The buckets of the distances 0 to max_distance in one direction, as stamp_kernels.relative_position counts them.
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
  const float all = static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(num_exact)));
  std::vector<int32_t> buckets(largest_distance + 1);
  for (int64_t d = 0; d <= largest_distance; ++d) {
    const int64_t logarithmic =
        num_exact + static_cast<int64_t>(octaves[d] / all * static_cast<float>(num_buckets - num_exact));
    buckets[d] = static_cast<int32_t>(d < num_exact ? d : std::min(logarithmic, num_buckets - 1));
  }
  return buckets;
}

// The largest distance between a query and a key that the batch can have.
int64_t largest_distance(const AttentionProblem& problem, int64_t valid_q, int64_t valid_k) {
  int64_t largest_q = std::max<int64_t>(problem.longest_q - 1, 0), smallest_q = 0;
  int64_t largest_k = std::max<int64_t>(problem.longest_k - 1, 0), smallest_k = 0;
  if (problem.positions_q != nullptr && valid_q > 0) {
    const auto [smallest, largest] = std::minmax_element(problem.positions_q, problem.positions_q + valid_q);
    smallest_q = *smallest, largest_q = *largest;
  }
  if (problem.positions_k != nullptr && valid_k > 0) {
    const auto [smallest, largest] = std::minmax_element(problem.positions_k, problem.positions_k + valid_k);
    smallest_k = *smallest, largest_k = *largest;
  }
  return std::max<int64_t>({largest_k - smallest_q, largest_q - smallest_k, 1});
}

template <typename scalar>
void fill_bias_of_distance(const AttentionProblem& problem, const Tensor& table, Tensor& bias) {
  const scalar* weights = table.const_data_ptr<scalar>();
  scalar* entry = bias.mutable_data_ptr<scalar>();
  for (int64_t head = 0; head < problem.num_heads; ++head) {
    for (int64_t x = 0; x <= 2 * problem.max_distance; ++x) {
      *entry++ = weights[problem.bucket_of_distance[x] * problem.num_heads + head];
    }
  }
}

void set_bias(AttentionInputs& inputs, const BiasArguments& arguments) {
  AttentionProblem& problem = inputs.problem;
  if (!arguments.table.has_value()) {
    return;
  }
  const Tensor& table = *arguments.table;
  problem.num_buckets = table.size(0);
  const int64_t valid_q = problem.cu_seqlens_q[inputs.batch], valid_k = problem.cu_seqlens_k[inputs.batch];
  const int64_t largest = largest_distance(problem, valid_q, valid_k);
  STD_TORCH_CHECK(
      largest <= INT32_MAX / 2, "positions_q and positions_k must lie at most ", INT32_MAX / 2,
      " apart, got a distance of ", largest);
  // From max_distance on all distances have the last bucket, and none is larger than the batch's largest.
  problem.max_distance = std::min(arguments.max_distance, largest);
  const int64_t num_distances = 2 * problem.max_distance + 1;

  const int64_t directions = arguments.bidirectional ? 2 : 1;
  const std::vector<int32_t> backwards = buckets_of_one_direction(
      table, problem.num_buckets / directions, arguments.max_distance, problem.max_distance);
  inputs.held.push_back(torch::stable::new_empty(table, {num_distances}, ScalarType::Int));
  int32_t* buckets = inputs.held.back().mutable_data_ptr<int32_t>();
  for (int64_t distance = -problem.max_distance; distance <= problem.max_distance; ++distance) {
    int32_t bucket = backwards[std::max<int64_t>(-distance, 0)];
    if (arguments.bidirectional && distance > 0) {
      bucket = static_cast<int32_t>(problem.num_buckets / 2 + backwards[distance]);
    }
    buckets[distance + problem.max_distance] = bucket;
  }
  problem.bucket_of_distance = buckets;

  const Tensor weights = torch::stable::contiguous(torch::stable::to(table, compute_type(problem)));
  inputs.held.push_back(torch::stable::new_empty(weights, {problem.num_heads, num_distances}));
  Tensor& bias = inputs.held.back();
  if (problem.dtype == DType::kFloat64) {
    fill_bias_of_distance<double>(problem, weights, bias);
  } else {
    fill_bias_of_distance<float>(problem, weights, bias);
  }
  problem.bias_of_distance = bias.const_data_ptr();
}

}  // namespace

const AttentionKernels& attention_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? KernelTables<AttentionKernels>::portable_float64
                                  : kernels_of_machine<AttentionKernels>();
}

ScalarType compute_type(const AttentionProblem& problem) {
  return problem.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

HeadRows head_rows(const Tensor& x, std::vector<Tensor>& held) {
  const Tensor rows = x.stride(2) == 1 ? x : held_contiguous(x, held);
  return {const_cast<void*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1)};
}

AttentionInputs attention_inputs(
    const Tensor& q, const Tensor& k, const Tensor* v, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale,
    const BiasArguments& bias) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q and k must have shape [total, num_heads, head_dim]");
  STD_TORCH_CHECK(
      q.scalar_type() == k.scalar_type() && q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "q and k must have the same dtype and head_dim, and num_heads_kv must divide num_heads_q");
  AttentionInputs inputs = {};
  inputs.batch = cu_seqlens_q.size(0) - 1;
  inputs.total_k = k.size(0);
  AttentionProblem& problem = inputs.problem;
  problem.dtype = dtype_of("q", q);
  problem.head_dim = q.size(2);
  problem.num_heads = q.size(1);
  problem.num_heads_kv = k.size(1);
  problem.total_q = q.size(0);
  problem.q = head_rows(q, inputs.held);
  problem.k = head_rows(k, inputs.held);
  problem.v = v == nullptr ? HeadRows{} : head_rows(*v, inputs.held);
  problem.causal = causal;
  problem.scale = scale;

  const Tensor offsets_q = held_contiguous(cu_seqlens_q, inputs.held);
  check_cu_seqlens("cu_seqlens_q", offsets_q, problem.total_q, max_seqlen_q);
  problem.cu_seqlens_q = problem.cu_seqlens_k = offsets_q.const_data_ptr<int32_t>();
  if (bias.positions_q.has_value()) {
    problem.positions_q = held_contiguous(*bias.positions_q, inputs.held).const_data_ptr<int32_t>();
  }
  if (cu_seqlens_k.has_value()) {
    const Tensor offsets_k = held_contiguous(*cu_seqlens_k, inputs.held);
    check_cu_seqlens("cu_seqlens_k", offsets_k, inputs.total_k, max_seqlen_k);
    problem.cu_seqlens_k = offsets_k.const_data_ptr<int32_t>();
  } else {
    problem.positions_k = problem.positions_q;
  }
  if (bias.positions_k.has_value()) {
    problem.positions_k = held_contiguous(*bias.positions_k, inputs.held).const_data_ptr<int32_t>();
  }
  problem.longest_q = longest(problem.cu_seqlens_q, inputs.batch);
  problem.longest_k = longest(problem.cu_seqlens_k, inputs.batch);
  set_bias(inputs, bias);
  return inputs;
}

void set_dropout(AttentionProblem& problem, double dropout_p, const std::optional<Tensor>& dropout_seed) {
  if (dropout_p == 0) {
    return;
  }
  STD_TORCH_CHECK(dropout_seed.has_value(), "dropout_p ", dropout_p, " wants a dropout_seed");
  const uint64_t seed = static_cast<uint64_t>(*dropout_seed->const_data_ptr<int64_t>());
  problem.dropout = true;
  problem.dropout_threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  problem.seed_low = static_cast<uint32_t>(seed);
  problem.seed_high = static_cast<uint32_t>(seed >> 32);
  problem.keep_scale = 1.0 / (1.0 - dropout_p);
}

std::vector<AttentionUnit> plan_units(
    const AttentionInputs& inputs, DividedBy divided_by,
    const std::function<int64_t(int64_t num_rows)>& rows_per_part) {
  const AttentionProblem& problem = inputs.problem;
  const int64_t num_heads_kv = problem.num_heads_kv, gqa_group_size = problem.num_heads / num_heads_kv;
  const auto cost_per_key_head = [&](int64_t num_q, int64_t num_k) {
    return gqa_group_size * problem.head_dim * (num_q * num_k + 4 * (num_q + num_k) + 32);
  };
  std::vector<AttentionUnit> units;
  bool is_open = false;  // the last unit takes another whole sequence
  for (int64_t s = 0; s < inputs.batch; ++s) {
    const int64_t num_q = problem.cu_seqlens_q[s + 1] - problem.cu_seqlens_q[s];
    const int64_t num_k = problem.cu_seqlens_k[s + 1] - problem.cu_seqlens_k[s];
    const int64_t num_rows = divided_by == DividedBy::kQueries ? num_q : num_k;
    const int64_t step = rows_per_part(num_rows);
    const int64_t cost = cost_per_key_head(num_q, num_k);
    if (num_rows <= step && cost < kCostOfOneHead) {
      // All heads at once: what the next head reads lies beside what this one reads.
      if (!is_open) {
        units.push_back({s, s, 0, num_heads_kv, 0, INT64_MAX, 0, 0, 0});
      }
      units.back().end_sequence = s + 1;
      units.back().cost += num_heads_kv * cost;
      is_open = units.back().cost < kCostPerUnit;
      continue;
    }
    is_open = false;
    const int64_t heads_at_once = divided_by == DividedBy::kKeysOfAllHeads ? num_heads_kv : 1;
    for (int64_t head_kv = 0; head_kv < num_heads_kv; head_kv += heads_at_once) {
      for (int64_t part = 0; part == 0 || part * step < num_rows; ++part) {
        const int64_t begin = part * step, end = std::min(begin + step, num_rows);
        const int64_t part_cost = heads_at_once * cost * (end - begin) / std::max<int64_t>(num_rows, 1);
        units.push_back({s, s + 1, head_kv, head_kv + heads_at_once, begin, end, part, 0, part_cost});
      }
    }
  }
  std::stable_sort(units.begin(), units.end(), [](const AttentionUnit& a, const AttentionUnit& b) {
    return a.cost > b.cost;
  });
  int64_t first_head = 0;
  for (AttentionUnit& unit : units) {
    unit.first_head = first_head;
    first_head += (unit.end_head_kv - unit.first_head_kv) * gqa_group_size;
  }
  return units;
}

void run_units(
    const std::vector<AttentionUnit>& units, int64_t scratch_bytes, const Tensor& like,
    const std::function<void(const AttentionUnit&, char*)>& run) {
  int64_t cost = 0;
  for (const AttentionUnit& unit : units) {
    cost += unit.cost;
  }
  const int64_t num_units = static_cast<int64_t>(units.size());
  const int64_t num_threads =
      std::min<int64_t>({torch::stable::get_num_threads(), num_units, cost / kCostPerUnit + 1});
  const Tensor scratch = torch::stable::new_empty(
      like, {num_threads * scratch_of_thread(scratch_bytes)}, torch::headeronly::ScalarType::Byte);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  for_tasks(num_units, num_threads, memory, scratch_bytes, [&](int64_t unit, char* of_thread) {
    run(units[unit], of_thread);
  });
}

}  // namespace stamp::cpu
