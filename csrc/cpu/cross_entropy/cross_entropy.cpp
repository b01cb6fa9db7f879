// The ops of the multi-token cross-entropy: the loss of K steps of prediction from hidden states.
//
//   loss = sum_k step_weights[k] * sum_i losses[i, k] / (mean: rows with a target at step k, sum: 1)
//
// An op checks its arguments (arguments.h), plans and runs the softmaxes (plan.h, worker.h), and reduces the losses.
// Rows are only computed where they have a target.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/cross_entropy/arguments.h"
#include "cpu/cross_entropy/plan.h"
#include "cpu/cross_entropy/worker.h"

namespace stamp::cpu {
namespace {

Tensor zeros(const CrossEntropyInputs& inputs, std::vector<int64_t> shape) {
  return torch::stable::new_zeros(inputs.hidden, shape, compute_type(inputs.dtype));
}

std::vector<int64_t> shape_of(const Tensor& x) {
  return std::vector<int64_t>(x.sizes().begin(), x.sizes().end());
}

bool all_steps_share_a_softmax(const CrossEntropyInputs& inputs) {
  const bool share_tensors = !is_per_step(inputs.hidden, 2) && !is_per_step(inputs.weight, 2) &&
      !(inputs.bias.has_value() && is_per_step(*inputs.bias, 1));
  return share_tensors && std::all_of(inputs.ranges.begin(), inputs.ranges.end(), [&](ClassRange range) {
           return range.start == inputs.ranges[0].start && range.end == inputs.ranges[0].end;
         });
}

Softmax softmax_of_steps(const CrossEntropyInputs& inputs, int64_t first_step, int64_t num_steps) {
  Softmax softmax = {first_step, num_steps, inputs.ranges[first_step], {}};
  for (int64_t row = 0; row < inputs.num_rows; ++row) {
    bool has_target = false;
    for (int64_t step = first_step; step < first_step + num_steps && !has_target; ++step) {
      has_target = inputs.has_target(row, step);
    }
    if (has_target) {
      softmax.rows.push_back(row);
    }
  }
  return softmax;
}

// Plans and runs all softmaxes.
void run(const CrossEntropyInputs& inputs, const CrossEntropyOutputs& outputs) {
  const int64_t steps_per_softmax = all_steps_share_a_softmax(inputs) ? inputs.num_steps : 1;
  for (int64_t step = 0; step < inputs.num_steps; step += steps_per_softmax) {
    const Softmax softmax = softmax_of_steps(inputs, step, steps_per_softmax);
    SoftmaxSizes sizes = {};
    sizes.num_rows = static_cast<int64_t>(softmax.rows.size());
    sizes.num_classes = softmax.classes.end - softmax.classes.start;
    sizes.padded_width = padded_width(inputs);
    sizes.scalar_bytes = static_cast<int64_t>(inputs.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
    sizes.needs_gradients = outputs.gradients != nullptr;
    sizes.has_lse = outputs.known_lse != nullptr;
    run_softmax(inputs, softmax, plan_cross_entropy(sizes), outputs);
  }
}

CrossEntropyGradients zero_gradients(const CrossEntropyInputs& inputs, const NeededGradients& needed) {
  check_needed(inputs, needed);
  CrossEntropyGradients gradients;
  if (needed.hidden) {
    gradients.hidden = zeros(inputs, shape_of(inputs.hidden));
  }
  if (needed.weight) {
    std::vector<int64_t> shape = shape_of(inputs.weight);
    shape.back() = padded_width(inputs);
    gradients.weight = zeros(inputs, shape);
  }
  if (needed.bias) {
    gradients.bias = zeros(inputs, shape_of(*inputs.bias));
  }
  return gradients;
}

// Gradients without padding, in the compute type; an empty tensor where not needed.
struct Gradients {
  Tensor hidden;
  Tensor weight;
  Tensor bias;
};

Gradients unpadded(const CrossEntropyInputs& inputs, const CrossEntropyGradients& gradients) {
  const auto or_empty = [&](const OptionalTensor& gradient) { return gradient ? *gradient : zeros(inputs, {0}); };
  Tensor weight = or_empty(gradients.weight);
  if (gradients.weight.has_value() && weight.size(weight.dim() - 1) != inputs.width) {
    weight = torch::stable::contiguous(torch::stable::narrow(weight, weight.dim() - 1, 0, inputs.width));
  }
  return {or_empty(gradients.hidden), weight, or_empty(gradients.bias)};
}

// The factor of a row's loss at each step, in the step's loss and in the loss of all steps.
struct StepScales {
  std::vector<double> unweighted;  // mean: 1 / rows with a target; sum: 1
  std::vector<double> weighted;    // times the step's weight
};

StepScales step_scales(const CrossEntropyInputs& inputs, const std::vector<double>& weights, int64_t reduction) {
  StepScales scales;
  for (int64_t k = 0; k < inputs.num_steps; ++k) {
    int64_t num_targets = 0;
    for (int64_t row = 0; row < inputs.num_rows; ++row) {
      num_targets += inputs.has_target(row, k);
    }
    scales.unweighted.push_back(
        reduction == kMean ? 1.0 / static_cast<double>(std::max<int64_t>(num_targets, 1)) : 1.0);
    scales.weighted.push_back(scales.unweighted.back() * weights[k]);
  }
  return scales;
}

// A tensor of these values in the compute type.
Tensor tensor_of(const CrossEntropyInputs& inputs, const std::vector<double>& values, std::vector<int64_t> shape) {
  const Tensor x = torch::stable::new_empty(inputs.hidden, shape, compute_type(inputs.dtype));
  if (inputs.dtype == DType::kFloat64) {
    std::copy(values.begin(), values.end(), x.mutable_data_ptr<double>());
  } else {
    std::transform(values.begin(), values.end(), x.mutable_data_ptr<float>(), [](double value) {
      return static_cast<float>(value);
    });
  }
  return x;
}

struct ReducedLosses {
  Tensor loss;         // scalar []
  Tensor step_losses;  // scalar [K]
};

template <typename scalar>
ReducedLosses reduce_as(const CrossEntropyInputs& inputs, const Tensor& losses, const StepScales& scales) {
  std::vector<double> step_losses;
  double total = 0;
  const scalar* loss = losses.const_data_ptr<scalar>();
  for (int64_t k = 0; k < inputs.num_steps; ++k) {
    double sum = 0;
    for (int64_t row = 0; row < inputs.num_rows; ++row) {
      sum += *loss++;
    }
    step_losses.push_back(sum * scales.unweighted[k]);
    total += sum * scales.weighted[k];
  }
  return {tensor_of(inputs, {total}, {}), tensor_of(inputs, step_losses, {inputs.num_steps})};
}

// From the losses [K, N].
ReducedLosses reduce(const CrossEntropyInputs& inputs, const Tensor& losses, const StepScales& scales) {
  return inputs.dtype == DType::kFloat64 ? reduce_as<double>(inputs, losses, scales)
                                         : reduce_as<float>(inputs, losses, scales);
}

// The ops. Their signatures are those of the schemas in ops/cross_entropy/multi_token_cross_entropy.py.

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const std::optional<std::vector<double>>& step_weights, const OptionalTensor& step_weights_tensor,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, int64_t reduction) {
  const CrossEntropyInputs inputs =
      checked_inputs(hidden, weight, targets, bias, {vocab_ranges, ignore_index, label_smoothing, z_loss, softcap});
  check_reduction(reduction);
  const std::vector<double> weights = checked_step_weights(inputs, {step_weights, step_weights_tensor});
  const Tensor losses = zeros(inputs, {inputs.num_steps, inputs.num_rows});
  const Tensor lse = zeros(inputs, {inputs.num_steps, inputs.num_rows});
  CrossEntropyOutputs outputs;
  outputs.losses = losses.mutable_data_ptr();
  outputs.lse = lse.mutable_data_ptr();
  run(inputs, outputs);
  if (reduction == kNone) {
    const Tensor losses_by_row = torch::stable::contiguous(torch::stable::transpose(losses, 0, 1));
    return {losses_by_row, zeros(inputs, {0}), zeros(inputs, {0}), lse};
  }
  const StepScales scales = step_scales(inputs, weights, reduction);
  const auto [loss, step_losses] = reduce(inputs, losses, scales);
  return {loss, step_losses, tensor_of(inputs, scales.weighted, {inputs.num_steps}), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_loss, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const OptionalTensor& bias, const Tensor& lse, const Tensor& step_scale,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, bool need_hidden, bool need_weight, bool need_bias) {
  const CrossEntropyInputs inputs =
      checked_inputs(hidden, weight, targets, bias, {vocab_ranges, ignore_index, label_smoothing, z_loss, softcap});
  const ForwardResults results = checked_results(inputs, grad_loss, lse, step_scale);
  const double* grad = results.grad_loss.const_data_ptr<double>();
  const double* scale = results.scale.const_data_ptr<double>();
  const CrossEntropyGradients gradients = zero_gradients(inputs, {need_hidden, need_weight, need_bias});
  CrossEntropyOutputs outputs;
  outputs.gradients = &gradients;
  outputs.loss_scale = [&](int64_t row, int64_t step) {
    return results.is_reduced ? *grad * scale[step] : grad[row * inputs.num_steps + step];
  };
  outputs.known_lse = results.lse.const_data_ptr();
  run(inputs, outputs);
  const auto [grad_hidden, grad_weight, grad_bias] = unpadded(inputs, gradients);
  return {
      torch::stable::to(grad_hidden, hidden.scalar_type()), torch::stable::to(grad_weight, weight.scalar_type()),
      torch::stable::to(grad_bias, bias.has_value() ? bias->scalar_type() : hidden.scalar_type())};
}

// The loss and its gradients in one pass, which computes the logits once. The gradients wait for the upstream gradient,
// so they stay in the compute type: a rounding, or an overflow, before that product would be one too many.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const std::optional<std::vector<double>>& step_weights, const OptionalTensor& step_weights_tensor,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, int64_t reduction, bool need_hidden, bool need_weight,
    bool need_bias) {
  const CrossEntropyInputs inputs =
      checked_inputs(hidden, weight, targets, bias, {vocab_ranges, ignore_index, label_smoothing, z_loss, softcap});
  check_reduction(reduction);
  STD_TORCH_CHECK(
      reduction != kNone, "reduction must be 1 (mean) or 2 (sum) for gradients in the forward pass, got ", reduction);
  const StepScales scales =
      step_scales(inputs, checked_step_weights(inputs, {step_weights, step_weights_tensor}), reduction);
  const Tensor losses = zeros(inputs, {inputs.num_steps, inputs.num_rows});
  const CrossEntropyGradients gradients = zero_gradients(inputs, {need_hidden, need_weight, need_bias});
  CrossEntropyOutputs outputs;
  outputs.losses = losses.mutable_data_ptr();
  outputs.gradients = &gradients;
  outputs.loss_scale = [&](int64_t, int64_t step) { return scales.weighted[step]; };
  run(inputs, outputs);
  const auto [loss, step_losses] = reduce(inputs, losses, scales);
  const auto [grad_hidden, grad_weight, grad_bias] = unpadded(inputs, gradients);
  return {loss, step_losses, grad_hidden, grad_weight, grad_bias};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("multi_token_cross_entropy_forward", TORCH_BOX(&stamp::cpu::forward));
  m.impl("multi_token_cross_entropy_backward", TORCH_BOX(&stamp::cpu::backward));
  m.impl("multi_token_cross_entropy_with_gradients", TORCH_BOX(&stamp::cpu::with_gradients));
}
