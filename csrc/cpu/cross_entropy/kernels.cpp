// The cross-entropy kernels of one instruction set, see cpu/core/dispatch.h.

#include "cpu/cross_entropy/kernels.h"

#include "cpu/core/dispatch.h"
#include "cpu/cross_entropy/tiles.h"

namespace stamp::cpu {

template <>
const CrossEntropyKernels KernelTables<CrossEntropyKernels>::STAMP_INSTRUCTION_SET =
    cross_entropy_kernels_of<Simd<float, STAMP_FLOATS_PER_VECTOR>>();

#if STAMP_FLOATS_PER_VECTOR == 4  // the portable unit
template <>
const CrossEntropyKernels KernelTables<CrossEntropyKernels>::portable_float64 =
    cross_entropy_kernels_of<Simd<double, 2>>();
#endif

}  // namespace stamp::cpu
