// The kernels of a family exist once for each instruction set, and the processor decides at run time which ones serve.
//
// setup.py compiles <family>/kernels.cpp once for each instruction set, with its compiler flags and two macros:
// STAMP_INSTRUCTION_SET is the member of KernelTables that the unit defines, STAMP_FLOATS_PER_VECTOR the number of
// floats in its vectors. A table is plain data and function pointers, so that code compiled for AVX-512 shares nothing
// else with the portable code.

#pragma once

#include "cpu/core/capability.h"

namespace stamp::cpu {

template <typename Kernels>
struct KernelTables {
  static const Kernels portable;
  static const Kernels avx2;
  static const Kernels avx512;
  // float64 is there for gradcheck: for any processor, without wide vectors.
  static const Kernels portable_float64;
};

// The kernels for float32, float16 and bfloat16 on this machine, see chosen_capability().
template <typename Kernels>
const Kernels& kernels_of_machine() {
  [[maybe_unused]] const Capability capability = chosen_capability();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) {
    return KernelTables<Kernels>::avx512;
  }
  if (capability == Capability::kAvx2) {
    return KernelTables<Kernels>::avx2;
  }
#endif
  return KernelTables<Kernels>::portable;
}

}  // namespace stamp::cpu
