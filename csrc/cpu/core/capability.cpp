#include "cpu/core/capability.h"

#include <atomic>
#include <cstdlib>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {
namespace {

const char* const kVariable = "STAMP_KERNELS_CPU_CAPABILITY";

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

// `source` names in error messages where the name comes from.
Capability capability_named(const std::string& name, const char* source) {
  STD_TORCH_CHECK(
      name == "portable" || name == "avx2" || name == "avx512", source, " must be portable, avx2 or avx512, got ",
      name);
  const Capability capability = name == "portable" ? Capability::kPortable
      : name == "avx2"                             ? Capability::kAvx2
                                                   : Capability::kAvx512;
  STD_TORCH_CHECK(capability <= machine_capability(), source, " is ", name, ", which this machine does not have");
  return capability;
}

const char* name_of(Capability capability) {
  return capability == Capability::kPortable ? "portable" : capability == Capability::kAvx2 ? "avx2" : "avx512";
}

std::optional<std::string> read_environment() {
  const char* value = std::getenv(kVariable);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

// Read once, when the library is loaded: getenv must not run beside a write of the environment, and Python's os.environ
// writes it at any time, in any thread. Checked at the first use, since an exception here would end the process.
const std::optional<std::string> requested_by_environment = read_environment();

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

}  // namespace

Capability chosen_capability() {
  int capability = chosen.load(std::memory_order_relaxed);
  if (capability == kUndecided) {
    capability = static_cast<int>(
        requested_by_environment.has_value() ? capability_named(*requested_by_environment, kVariable)
                                             : machine_capability());
    // Unless another thread has chosen meanwhile.
    int expected = kUndecided;
    if (!chosen.compare_exchange_strong(expected, capability)) {
      capability = expected;
    }
  }
  return static_cast<Capability>(capability);
}

std::string use_capability(const std::string& name) {
  const Capability capability = capability_named(name, "the instruction set");
  const std::string previous = name_of(chosen_capability());
  chosen = static_cast<int>(capability);
  return previous;
}

}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CompositeExplicitAutograd, m) {
  m.impl("_use_cpu_capability", TORCH_BOX(&stamp::cpu::use_capability));
}
