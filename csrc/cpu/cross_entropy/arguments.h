// The arguments of the cross-entropy's ops: their checks, and what the passes read of them.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/core/arguments.h"

namespace stamp::cpu {

using OptionalTensor = std::optional<Tensor>;

// The numbers of at::Reduction.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The options that all ops have.
struct LossOptions {
  const std::optional<std::vector<int64_t>>& vocab_ranges;  // start and end of each step; none: all classes
  int64_t ignore_index;
  double label_smoothing;         // in [0, 1]
  double z_loss;                  // in [0, inf)
  std::optional<double> softcap;  // in (0, inf), also in the compute type
};

// step_weights as floats or as a tensor; neither: all 1.
struct StepWeights {
  const std::optional<std::vector<double>>& floats;
  const OptionalTensor& tensor;
};

// Which gradients are needed.
struct NeededGradients {
  bool hidden;
  bool weight;
  bool bias;
};

// The classes [start, end) of a step.
struct ClassRange {
  int64_t start;
  int64_t end;
};

// N rows, K steps, D features, V classes. `scalar` is the compute type: double for float64, otherwise float.
struct CrossEntropyInputs {
  DType dtype;
  Tensor hidden;        // [N, D] or [K, N, D], rows contiguous
  Tensor weight;        // [V, D] or [K, V, D], rows contiguous
  OptionalTensor bias;  // scalar [V] or [K, V], contiguous
  Tensor targets;       // int64 [N, K], contiguous
  const int64_t* targets_data;
  std::vector<ClassRange> ranges;  // K
  int64_t num_rows;
  int64_t num_steps;
  int64_t num_classes;
  int64_t width;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none

  int64_t target(int64_t row, int64_t step) const {
    return targets_data[row * num_steps + step];
  }
  bool has_target(int64_t row, int64_t step) const {
    return target(row, step) != ignore_index;
  }
};

// What the backward reads of an earlier forward.
struct ForwardResults {
  Tensor grad_loss;  // double [], or [N, K] where the losses are not reduced; contiguous
  Tensor scale;      // double [K], or [0] where the losses are not reduced; contiguous
  Tensor lse;        // scalar [K, N], contiguous
  bool is_reduced;
};

// Whether x has a leading dimension for the steps.
inline bool is_per_step(const Tensor& x, int64_t shared_dims) {
  return x.dim() > shared_dims;
}

// Every function below checks its arguments: shapes, dtypes, storage, ranges and contents (RuntimeError).

CrossEntropyInputs checked_inputs(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const LossOptions& options);

// The weight of each step.
std::vector<double> checked_step_weights(const CrossEntropyInputs& inputs, const StepWeights& step_weights);

ForwardResults checked_results(
    const CrossEntropyInputs& inputs, const Tensor& grad_loss, const Tensor& lse, const Tensor& step_scale);

void check_reduction(int64_t reduction);

void check_needed(const CrossEntropyInputs& inputs, const NeededGradients& needed);

}  // namespace stamp::cpu
