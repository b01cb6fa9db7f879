// Cross-entropy for x86 with AVX-512; setup.py gives this file its instruction set.

#if defined(__x86_64__)

#include "cross_entropy_tiles.h"

namespace stamp::cpu {

const CrossEntropyKernels kCrossEntropyAvx512 = cross_entropy_kernels_of<Simd<float, 16>>();

}  // namespace stamp::cpu

#endif
