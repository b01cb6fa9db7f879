// Scoring and selection for any machine, with what the compiler may assume of it, and for float64.

#include "pruning_table.h"

namespace stamp::cpu {

const PruningKernels<float> kPruningPortable = pruning_kernels_of<Simd<float, 4>>();
const PruningKernels<double> kPruningPortableFloat64 = pruning_kernels_of<Simd<double, 2>>();

}  // namespace stamp::cpu
