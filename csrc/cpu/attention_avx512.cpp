// Attention for x86 with AVX-512; setup.py gives this file its instruction set.

#if defined(__x86_64__)

#include "attention_table.h"

namespace stamp::cpu {

const AttentionKernels kAttentionAvx512 = kernels_of<Simd<float, 16>>();

}  // namespace stamp::cpu

#endif
