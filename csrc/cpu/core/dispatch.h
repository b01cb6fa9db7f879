// The choice of kernels at run time: those of a family exist once for each instruction set, and the processor decides
// which ones run.
//
// setup.py compiles <family>/kernels.cpp once for each instruction set, with its compiler flags and two macros:
// STAMP_INSTRUCTION_SET is the member of KernelTables that the object file defines, and STAMP_FLOATS_PER_VECTOR is the
// number of floats in its vectors. A table holds only function pointers and numbers, so that code compiled for AVX-512
// and portable code share nothing else.

#pragma once

#include "cpu/core/capability.h"

namespace stamp::cpu {

template <typename Kernels>
struct KernelTables {
  static const Kernels portable;
  static const Kernels avx2;
  static const Kernels avx512;
  // float64 serves gradcheck, so its kernels are compiled once, for any processor.
  static const Kernels portable_float64;
};

// The kernels for float32, float16 and bfloat16 that run on this machine, see chosen_capability().
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
