// Attention for any machine, with what the compiler may assume of it, and for float64, which is there for gradcheck.

#include "attention_table.h"

namespace stamp::cpu {

const AttentionKernels kAttentionPortable = kernels_of<Simd<float, 4>>();
const AttentionKernels kAttentionPortableFloat64 = kernels_of<Simd<double, 2>>();

}  // namespace stamp::cpu
