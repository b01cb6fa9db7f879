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
  AttentionKernels kernels{};
  kernels.forward_scratch_bytes = &forward_scratch_bytes<V>;
  kernels.forward = &forward<V>;
  kernels.backward_scratch_bytes = &backward_scratch_bytes<V>;
  kernels.backward = &backward<V>;
  kernels.centrality_scratch_bytes = &centrality_scratch_bytes<V>;
  kernels.centrality = &centrality<V>;
  return kernels;
}

}  // namespace

template <>
const AttentionKernels KernelTables<AttentionKernels>::STAMP_INSTRUCTION_SET =
    attention_kernels_of<Simd<float, STAMP_FLOATS_PER_VECTOR>>();

#if STAMP_FLOATS_PER_VECTOR == 4  // the portable build
template <>
const AttentionKernels KernelTables<AttentionKernels>::portable_float64 = attention_kernels_of<Simd<double, 2>>();
#endif

}  // namespace stamp::cpu
