// The pass over one softmax: carries out a plan (plan.h) with the kernels of this machine (kernels.h).

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "common/arithmetic.h"
#include "cpu/core/arguments.h"
#include "cpu/core/dtypes.h"
#include "cpu/cross_entropy/plan.h"

namespace stamp::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// The rows of one hidden against the classes of one range of one weight. Steps that share hidden, weight, bias and
// range share a softmax, and a row then has a target for each of them.
struct Softmax {
  int64_t first_step;
  int64_t num_steps;
  ClassRange classes;
  std::vector<int64_t> rows;  // those with a target, in rising order
};

// In the compute type; every pass adds to them. Without a value: not needed.
struct CrossEntropyGradients {
  OptionalTensor hidden;  // [(K,) N, D]
  OptionalTensor weight;  // [(K,) V, padded_width]
  OptionalTensor bias;    // [(K,) V]
};

// What a pass computes, and what its gradients need. Null: not needed.
struct CrossEntropyOutputs {
  void* losses = nullptr;  // scalar [K, N]; entries without a target are left as they are
  void* lse = nullptr;     // scalar [K, N], likewise
  const CrossEntropyGradients* gradients = nullptr;
  std::function<double(int64_t row, int64_t step)> loss_scale;  // d (result of the op) / d (loss of the row and step)
  const void* known_lse = nullptr;  // scalar [K, N], from an earlier pass; null: this pass computes it
};

// Whether x has a leading dimension for the steps.
inline bool is_per_step(const Tensor& x, int64_t shared_dims) {
  return x.dim() > shared_dims;
}

// The width in whole vectors.
int64_t padded_width(const CrossEntropyInputs& inputs);

void run_softmax(
    const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
    const CrossEntropyOutputs& outputs);

}  // namespace stamp::cpu
