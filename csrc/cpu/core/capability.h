// The instruction set whose kernels run.

#pragma once

#include <string>

namespace stamp::cpu {

enum class Capability { kPortable, kAvx2, kAvx512 };

// The best set that this machine has, or the one that STAMP_KERNELS_CPU_CAPABILITY named when the library was loaded,
// or the one that use_capability has named since. Raises if the environment variable is wrong.
Capability chosen_capability();

// Makes the kernels of this set run in the whole process. Returns the name of the set that ran so far.
std::string use_capability(const std::string& name);

}  // namespace stamp::cpu
