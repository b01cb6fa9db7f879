// The kernels of one instruction set, as the unit that includes this compiles them.

#pragma once

#include "attention_backward.h"
#include "attention_centrality.h"
#include "attention_forward.h"
#include "attention_kernels.h"

namespace stamp::cpu {
namespace {

template <typename V>
constexpr AttentionKernels kernels_of() {
  return {
      &forward_scratch_bytes<V>,  &forward<V>,                  &backward_scratch_bytes<V>,
      &backward<V>,               &centrality_scratch_bytes<V>, &centrality<V>,
  };
}

}  // namespace
}  // namespace stamp::cpu
