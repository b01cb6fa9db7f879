#include "cpu/cross_entropy/arguments.h"

#include <cmath>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {
namespace {

Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

// A matrix [rows, columns] for all steps, or [num_steps, rows, columns].
void check_matrix(
    const char* name, const Tensor& x, int64_t num_steps, Size num_rows, Size num_columns, DTypes dtypes) {
  if (is_per_step(x, 2)) {
    check_tensor(name, x, {num_steps, num_rows, num_columns}, dtypes);
  } else {
    check_tensor(name, x, {num_rows, num_columns}, dtypes);
  }
}

void check_tensors(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias) {
  check_tensor("targets", targets, {"N", "K"}, {ScalarType::Long});
  const int64_t num_rows = targets.size(0), num_steps = targets.size(1);
  STD_TORCH_CHECK(num_steps >= 1, "targets must have at least one step (column), got shape ", sizes_of(targets));
  check_matrix("hidden", hidden, num_steps, num_rows, "D", kFloatingDTypes);
  check_matrix("weight", weight, num_steps, "V", hidden.size(hidden.dim() - 1), {hidden.scalar_type()});
  const int64_t num_classes = weight.size(weight.dim() - 2);
  STD_TORCH_CHECK(num_classes >= 1, "weight must have at least one class (row), got shape ", sizes_of(weight));
  if (bias.has_value()) {
    if (is_per_step(*bias, 1)) {
      check_tensor("bias", *bias, {num_steps, num_classes}, kFloatingDTypes);
    } else {
      check_tensor("bias", *bias, {num_classes}, kFloatingDTypes);
    }
  }
}

void check_numbers(const LossOptions& options, DType dtype) {
  STD_TORCH_CHECK(
      options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
      options.label_smoothing);
  STD_TORCH_CHECK(
      options.z_loss >= 0 && std::isfinite(in_compute_type(dtype, options.z_loss)), "z_loss must be in [0, inf), got ",
      options.z_loss);
  const double softcap = in_compute_type(dtype, options.softcap.value_or(1.0));
  STD_TORCH_CHECK(
      softcap > 0 && std::isfinite(softcap), "softcap must be in (0, inf) in the compute dtype, got ",
      options.softcap.value_or(1.0));
}

std::vector<ClassRange> checked_ranges(const LossOptions& options, int64_t num_steps, int64_t num_classes) {
  if (!options.vocab_ranges.has_value()) {
    return std::vector<ClassRange>(num_steps, {0, num_classes});
  }
  const std::vector<int64_t>& bounds = *options.vocab_ranges;
  STD_TORCH_CHECK(
      static_cast<int64_t>(bounds.size()) == 2 * num_steps,
      "vocab_ranges must have a start and an end for each of the ", num_steps, " steps, got ", bounds.size(),
      " numbers");
  std::vector<ClassRange> ranges;
  for (int64_t k = 0; k < num_steps; ++k) {
    const ClassRange range = {bounds[2 * k], bounds[2 * k + 1]};
    STD_TORCH_CHECK(
        0 <= range.start && range.start < range.end && range.end <= num_classes,
        "vocab_ranges must satisfy 0 <= start < end <= ", num_classes, " (rows of weight), got (", range.start, ", ",
        range.end, ")");
    ranges.push_back(range);
  }
  return ranges;
}

void check_targets(const CrossEntropyInputs& inputs) {
  for (int64_t row = 0; row < inputs.num_rows; ++row) {
    for (int64_t k = 0; k < inputs.num_steps; ++k) {
      const int64_t target = inputs.target(row, k);
      const ClassRange range = inputs.ranges[k];
      STD_TORCH_CHECK(
          target == inputs.ignore_index || (target >= range.start && target < range.end), "targets[", row, ", ", k,
          "] is ", target, ", which is neither in the range [", range.start, ", ", range.end, ") of step ", k,
          " nor ignore_index (", inputs.ignore_index, ")");
    }
  }
}

}  // namespace

CrossEntropyInputs checked_inputs(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const LossOptions& options) {
  check_tensors(hidden, weight, targets, bias);
  CrossEntropyInputs inputs = {};
  inputs.dtype = dtype_of(hidden);
  check_numbers(options, inputs.dtype);
  inputs.hidden = with_contiguous_rows(hidden);
  inputs.weight = with_contiguous_rows(weight);
  if (bias.has_value()) {
    inputs.bias = contiguous_as(*bias, compute_type(inputs.dtype));
  }
  inputs.targets = torch::stable::contiguous(targets);
  inputs.targets_data = inputs.targets.const_data_ptr<int64_t>();
  inputs.num_rows = targets.size(0);
  inputs.num_steps = targets.size(1);
  inputs.num_classes = weight.size(weight.dim() - 2);
  inputs.width = hidden.size(hidden.dim() - 1);
  inputs.ranges = checked_ranges(options, inputs.num_steps, inputs.num_classes);
  inputs.ignore_index = options.ignore_index;
  inputs.label_smoothing = options.label_smoothing;
  inputs.z_loss = options.z_loss;
  inputs.softcap = options.softcap.value_or(0.0);
  check_targets(inputs);
  return inputs;
}

std::vector<double> checked_step_weights(const CrossEntropyInputs& inputs, const StepWeights& step_weights) {
  STD_TORCH_CHECK(
      !(step_weights.floats.has_value() && step_weights.tensor.has_value()),
      "at most one of step_weights and step_weights_tensor may be given");
  if (step_weights.floats.has_value()) {
    STD_TORCH_CHECK(
        static_cast<int64_t>(step_weights.floats->size()) == inputs.num_steps,
        "step_weights must have one weight for each of the ", inputs.num_steps, " steps, got ",
        step_weights.floats->size());
    return *step_weights.floats;
  }
  if (!step_weights.tensor.has_value()) {
    return std::vector<double>(inputs.num_steps, 1.0);
  }
  check_tensor("step_weights_tensor", *step_weights.tensor, {inputs.num_steps}, kFloatingDTypes);
  const Tensor doubles = contiguous_as(*step_weights.tensor, ScalarType::Double);
  const double* data = doubles.const_data_ptr<double>();
  return std::vector<double>(data, data + inputs.num_steps);
}

ForwardResults checked_results(
    const CrossEntropyInputs& inputs, const Tensor& grad_loss, const Tensor& lse, const Tensor& step_scale) {
  check_tensor("step_scale", step_scale, {"K or 0"}, kFloatingDTypes);
  const int64_t num_scales = step_scale.size(0);
  const bool is_reduced = num_scales > 0;
  STD_TORCH_CHECK(
      !is_reduced || num_scales == inputs.num_steps, "step_scale must have one entry for each of the ",
      inputs.num_steps, " steps, or none, got ", num_scales);
  if (is_reduced) {
    check_tensor("grad_loss", grad_loss, {}, kFloatingDTypes);
  } else {
    check_tensor("grad_loss", grad_loss, {inputs.num_rows, inputs.num_steps}, kFloatingDTypes);
  }
  check_tensor("lse", lse, {inputs.num_steps, inputs.num_rows}, {compute_type(inputs.dtype)});
  return {
      contiguous_as(grad_loss, ScalarType::Double), contiguous_as(step_scale, ScalarType::Double),
      torch::stable::contiguous(lse), is_reduced};
}

void check_reduction(int64_t reduction) {
  STD_TORCH_CHECK(
      reduction == kNone || reduction == kMean || reduction == kSum,
      "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

void check_needed(const CrossEntropyInputs& inputs, const NeededGradients& needed) {
  STD_TORCH_CHECK(inputs.bias.has_value() || !needed.bias, "need_bias needs a bias");
}

}  // namespace stamp::cpu
