// Which of the instruction sets that kernels are compiled for is used.

#pragma once

namespace stamp::cpu {

enum class Capability { kPortable, kAvx2, kAvx512 };

// What this machine can do, or less where the environment asks for it. Read anew each time, so that a process can
// compare them.
Capability chosen_capability();

}  // namespace stamp::cpu
