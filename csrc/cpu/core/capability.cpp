#include "cpu/core/capability.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {
namespace {

Capability machine_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kPortable;
}

}  // namespace

Capability chosen_capability() {
  static const Capability best = machine_capability();
  const char* requested = std::getenv("STAMP_KERNELS_CPU_CAPABILITY");
  if (requested == nullptr) {
    return best;
  }
  const std::string name = requested;
  STD_TORCH_CHECK(
      name == "portable" || name == "avx2" || name == "avx512",
      "the environment variable STAMP_KERNELS_CPU_CAPABILITY must be portable, avx2 or avx512, got ", name);
  const Capability capability = name == "portable" ? Capability::kPortable
      : name == "avx2"                             ? Capability::kAvx2
                                                   : Capability::kAvx512;
  STD_TORCH_CHECK(capability <= best, "STAMP_KERNELS_CPU_CAPABILITY is ", name, ", which this machine does not have");
  return capability;
}

}  // namespace stamp::cpu
