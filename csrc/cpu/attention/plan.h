// The plan of work of an attention op: which task does what, and which thread runs it.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/attention/kernels.h"

namespace stamp::cpu {

using torch::stable::Tensor;

// The rows by which a long sequence is split. A task of kKeysOfAllHeads has all KV heads, since it sums over the heads
// (centrality); a task of the other kinds may have a single one.
enum class SplitBy { kQueries, kKeys, kKeysOfAllHeads };

// The tasks of all sequences, the most expensive first. A sequence of n rows is split every rows_per_split(n) rows.
std::vector<AttentionTask> plan_tasks(
    const AttentionProblem& problem, SplitBy split_by, const std::function<int64_t(int64_t num_rows)>& rows_per_split);

// Calls run(task, scratch) for every task, from as many threads as the cost justifies, each with its own
// `scratch_bytes` of scratch memory. `like` is any tensor on the CPU.
void run_tasks(
    const std::vector<AttentionTask>& tasks, int64_t scratch_bytes, const Tensor& like,
    const std::function<void(const AttentionTask&, char*)>& run);

}  // namespace stamp::cpu
