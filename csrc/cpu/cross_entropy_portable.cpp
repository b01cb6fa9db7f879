// Cross-entropy for any machine, with what the compiler may assume of it, and for float64.

#include "cross_entropy_tiles.h"

namespace stamp::cpu {

const CrossEntropyKernels kCrossEntropyPortable = cross_entropy_kernels_of<Simd<float, 4>>();
const CrossEntropyKernels kCrossEntropyPortableFloat64 = cross_entropy_kernels_of<Simd<double, 2>>();

}  // namespace stamp::cpu
