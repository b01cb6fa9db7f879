// The tables of the relative position bias, and the gradient of the bias table.

#pragma once

#include <vector>

#include "cpu/attention/arguments.h"

namespace stamp::cpu {

// Fills in the problem's bias from a table that is given. Needs the problem's lengths and positions.
void set_relative_bias(AttentionInputs& inputs, const BiasArguments& arguments);

// dbias_table from dbias_by_task [query heads of all tasks, num_buckets], summed in the order of the tasks.
Tensor sum_dbias(
    const AttentionProblem& problem, const std::vector<AttentionTask>& tasks, const Tensor& dbias_by_task,
    const Tensor& bias_table);

}  // namespace stamp::cpu
