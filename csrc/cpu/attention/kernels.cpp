// The attention kernels of one instruction set, see cpu/core/dispatch.h.

#include "cpu/attention/kernels.h"

#include "cpu/attention/backward.h"
#include "cpu/attention/centrality.h"
#include "cpu/attention/forward.h"
#include "cpu/core/dispatch.h"

namespace stamp::cpu {
namespace {

template <typename V>
constexpr AttentionKernels attention_kernels_of() {
  return {
      &forward_scratch_bytes<V>,  &forward<V>,                  &backward_scratch_bytes<V>,
      &backward<V>,               &centrality_scratch_bytes<V>, &centrality<V>,
  };
}

}  // namespace

template <>
const AttentionKernels KernelTables<AttentionKernels>::STAMP_INSTRUCTION_SET =
    attention_kernels_of<Simd<float, STAMP_FLOATS_PER_VECTOR>>();

#if STAMP_FLOATS_PER_VECTOR == 4  // the portable unit
template <>
const AttentionKernels KernelTables<AttentionKernels>::portable_float64 = attention_kernels_of<Simd<double, 2>>();
#endif

}  // namespace stamp::cpu
