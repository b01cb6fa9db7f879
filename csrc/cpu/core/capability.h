// The instruction set whose kernels run.

#pragma once

namespace stamp::cpu {

enum class Capability { kPortable, kAvx2, kAvx512 };

// The best set that this machine has, or the one that STAMP_KERNELS_CPU_CAPABILITY names. The variable is read on every
// call, so that one process can compare the sets.
Capability chosen_capability();

}  // namespace stamp::cpu
