#include "cpu/attention/plan.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "cpu/core/dispatch.h"
#include "cpu/core/tasks.h"

namespace stamp::cpu {
namespace {

// Costs are the multiply-adds of one product. Sequences are joined to a task until it costs this much, and no thread is
// started for less.
constexpr int64_t kMinTaskCost = 1 << 17;
// A sequence that costs this much in one KV head has a task for each KV head.
constexpr int64_t kMinCostPerHead = 1 << 20;

// The cost of a sequence in one KV head: the product of the scores, the loads of q, k, v and out, and a constant.
int64_t cost_per_head_kv(const AttentionProblem& problem, int64_t num_q, int64_t num_k) {
  return problem.gqa_group_size * problem.head_dim * (num_q * num_k + 4 * (num_q + num_k) + 32);
}

}  // namespace

const AttentionKernels& attention_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? KernelTables<AttentionKernels>::portable_float64
                                  : kernels_of_machine<AttentionKernels>();
}

std::vector<AttentionTask> plan_tasks(
    const AttentionProblem& problem, SplitBy split_by, const std::function<int64_t(int64_t num_rows)>& rows_per_split) {
  const int64_t num_heads_kv = problem.num_heads_kv;
  std::vector<AttentionTask> tasks;
  bool is_open = false;  // the last task takes another whole sequence
  for (int64_t s = 0; s < problem.num_sequences; ++s) {
    const int64_t num_q = problem.cu_seqlens_q[s + 1] - problem.cu_seqlens_q[s];
    const int64_t num_k = problem.cu_seqlens_k[s + 1] - problem.cu_seqlens_k[s];
    const int64_t num_rows = split_by == SplitBy::kQueries ? num_q : num_k;
    const int64_t step = rows_per_split(num_rows);
    const int64_t cost = cost_per_head_kv(problem, num_q, num_k);
    if (num_rows <= step && cost < kMinCostPerHead) {
      // One task has all heads: the heads of a row are neighbours in memory.
      if (!is_open) {
        AttentionTask task = {};
        task.first_sequence = s;
        task.end_head_kv = num_heads_kv;
        task.end = INT64_MAX;
        tasks.push_back(task);
      }
      tasks.back().end_sequence = s + 1;
      tasks.back().cost += num_heads_kv * cost;
      is_open = tasks.back().cost < kMinTaskCost;
      continue;
    }
    is_open = false;
    const int64_t heads_per_task = split_by == SplitBy::kKeysOfAllHeads ? num_heads_kv : 1;
    for (int64_t head_kv = 0; head_kv < num_heads_kv; head_kv += heads_per_task) {
      for (int64_t split = 0; split == 0 || split * step < num_rows; ++split) {
        AttentionTask task = {};
        task.first_sequence = s;
        task.end_sequence = s + 1;
        task.first_head_kv = head_kv;
        task.end_head_kv = head_kv + heads_per_task;
        task.begin = split * step;
        task.end = std::min(task.begin + step, num_rows);
        task.split = split;
        task.cost = heads_per_task * cost * (task.end - task.begin) / std::max<int64_t>(num_rows, 1);
        tasks.push_back(task);
      }
    }
  }
  std::stable_sort(
      tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
  int64_t num_dbias_heads = 0;
  for (AttentionTask& task : tasks) {
    task.first_dbias_head = num_dbias_heads;
    num_dbias_heads += (task.end_head_kv - task.first_head_kv) * problem.gqa_group_size;
  }
  return tasks;
}

void run_tasks(
    const std::vector<AttentionTask>& tasks, int64_t scratch_bytes, const Tensor& like,
    const std::function<void(const AttentionTask&, char*)>& run) {
  int64_t cost = 0;
  for (const AttentionTask& task : tasks) {
    cost += task.cost;
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t num_threads = std::min<int64_t>({torch::stable::get_num_threads(), num_tasks, cost / kMinTaskCost + 1});
  const Tensor scratch = torch::stable::new_empty(
      like, {num_threads * scratch_of_thread(scratch_bytes)}, torch::headeronly::ScalarType::Byte);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  for_tasks(num_tasks, num_threads, memory, scratch_bytes, [&](int64_t task, char* of_thread) {
    run(tasks[task], of_thread);
  });
}

}  // namespace stamp::cpu
