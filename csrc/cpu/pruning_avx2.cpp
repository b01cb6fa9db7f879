// Scoring and selection for x86 with AVX2; setup.py gives this file its instruction set.

#if defined(__x86_64__)

#include "pruning_table.h"

namespace stamp::cpu {

const PruningKernels<float> kPruningAvx2 = pruning_kernels_of<Simd<float, 8>>();

}  // namespace stamp::cpu

#endif
