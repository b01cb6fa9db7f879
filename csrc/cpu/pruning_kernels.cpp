#include "pruning_kernels.h"

#include "capability.h"

namespace stamp::cpu {

template <>
const PruningKernels<float>& pruning_kernels<float>() {
  [[maybe_unused]] const Capability capability = chosen_capability();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) {
    return kPruningAvx512;
  }
  if (capability == Capability::kAvx2) {
    return kPruningAvx2;
  }
#endif
  return kPruningPortable;
}

template <>
const PruningKernels<double>& pruning_kernels<double>() {
  return kPruningPortableFloat64;
}

}  // namespace stamp::cpu
