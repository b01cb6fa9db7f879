// Scoring and selection for x86 with AVX-512; setup.py gives this file its instruction set.

#if defined(__x86_64__)

#include "pruning_table.h"

namespace stamp::cpu {

const PruningKernels<float> kPruningAvx512 = pruning_kernels_of<Simd<float, 16>>();

}  // namespace stamp::cpu

#endif
