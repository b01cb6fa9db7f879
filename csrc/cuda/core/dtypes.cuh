// Loads of numbers in the compute type of their dtype.

#pragma once

#include "common/dtypes.h"

namespace stamp::cuda {

// One number, through the read-only cache: no running kernel may write it.
__device__ inline float load_number(const float* from) {
  return __ldg(from);
}

__device__ inline double load_number(const double* from) {
  return __ldg(from);
}

template <typename T>
__device__ inline float load_number(const T* from) {
  return to_float(T{__ldg(&from->bits)});
}

}  // namespace stamp::cuda
