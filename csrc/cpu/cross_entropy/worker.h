// The pass over one softmax: carries out a plan (plan.h) with the kernels of this machine (kernels.h).

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/core/arithmetic.h"
#include "cpu/cross_entropy/arguments.h"
#include "cpu/cross_entropy/plan.h"

namespace stamp::cpu {

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

// The width in whole vectors.
int64_t padded_width(const CrossEntropyInputs& inputs);

void run_softmax(
    const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
    const CrossEntropyOutputs& outputs);

}  // namespace stamp::cpu
