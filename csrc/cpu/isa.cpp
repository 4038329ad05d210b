#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#if NYSTROMGAN_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nystromgan {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

// Linux gives a process the state of the AMX tiles only when it asks.
bool may_use_tiles() {
#if NYSTROMGAN_X86 && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best() {
#if NYSTROMGAN_X86
  __builtin_cpu_init();
  // These answer for the processor and for the registers that the system saves.
  const auto all = [](auto... supported) { return (supported && ...); };
  if (!all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (!all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512vl"),
           __builtin_cpu_supports("avx512dq")))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return all(__builtin_cpu_supports("amx-tile"), __builtin_cpu_supports("amx-bf16")) ? Isa::amx : Isa::avx512bf16;
#else
  return Isa::portable;
#endif
}

Isa highest_allowed() {
  const char* asked = std::getenv("NYSTROMGAN_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return Isa::amx;
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i)
    if (std::strcmp(asked, kNames[i]) == 0) return static_cast<Isa>(i);
  throw std::runtime_error(
      std::string("NYSTROMGAN_CPU_ISA must be one of portable, avx2, avx512, avx512bf16, amx, got '") + asked + "'");
}

Isa choose() {
  const Isa allowed = highest_allowed();
  const Isa chosen = best() < allowed ? best() : allowed;
  return chosen == Isa::amx && !may_use_tiles() ? Isa::avx512bf16 : chosen;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace nystromgan

// The name of the chosen instruction set; of none when the environment names one that does not exist.
extern "C" __attribute__((visibility("default"))) const char* nystromgan_cpu_isa() {
  try {
    return nystromgan::kNames[static_cast<int>(nystromgan::isa())];
  } catch (const std::runtime_error&) {
    return "";
  }
}
