// The importance and selection kernels of one instruction set, see cpu/core/dispatch.h.

#include "cpu/pruning/kernels.h"

#include "cpu/core/dispatch.h"
#include "cpu/pruning/importance.h"
#include "cpu/pruning/threshold.h"

namespace stamp::cpu {
namespace {

template <typename V>
constexpr PruningKernels<typename V::scalar> pruning_kernels_of() {
  PruningKernels<typename V::scalar> kernels{};
  kernels.importance_of_rows = &importance_of_rows<V>;
  kernels.find_threshold = &find_threshold<V>;
  return kernels;
}

}  // namespace

template <>
const PruningKernels<float> KernelTables<PruningKernels<float>>::STAMP_INSTRUCTION_SET =
    pruning_kernels_of<Simd<float, STAMP_FLOATS_PER_VECTOR>>();

#if STAMP_FLOATS_PER_VECTOR == 4  // the portable build
template <>
const PruningKernels<double> KernelTables<PruningKernels<double>>::portable_float64 =
    pruning_kernels_of<Simd<double, 2>>();
#endif

}  // namespace stamp::cpu
