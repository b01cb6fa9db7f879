// Attention for x86 with AVX2; setup.py gives this file its instruction set.

#if defined(__x86_64__)

#include "attention_table.h"

namespace stamp::cpu {

const AttentionKernels kAttentionAvx2 = kernels_of<Simd<float, 8>>();

}  // namespace stamp::cpu

#endif
