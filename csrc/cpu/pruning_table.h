// The kernels of one instruction set, as the unit that includes this compiles them.

#pragma once

#include "pruning_kernels.h"
#include "threshold.h"
#include "token_scores.h"

namespace stamp::cpu {
namespace {

template <typename V>
constexpr PruningKernels<typename V::scalar> pruning_kernels_of() {
  return {&score_rows<V>, &cut<V>};
}

}  // namespace
}  // namespace stamp::cpu
