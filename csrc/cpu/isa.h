// The instruction set that kernels run on, chosen once: the best that the processor and the system allow, at most
// NYSTROMGAN_CPU_ISA. Every kernel exists once for each, in the namespace of its name.
#pragma once

namespace nystromgan {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

Isa isa();  // throws for an unknown NYSTROMGAN_CPU_ISA

#if NYSTROMGAN_X86
#define NYSTROMGAN_WIDER(name, Arguments)               \
  namespace avx2 { void name(const Arguments&); }       \
  namespace avx512 { void name(const Arguments&); }     \
  namespace avx512bf16 { void name(const Arguments&); } \
  namespace amx { void name(const Arguments&); }
#define NYSTROMGAN_CHOOSE_WIDER(name, arguments)            \
  case Isa::avx2: return avx2::name(arguments);             \
  case Isa::avx512: return avx512::name(arguments);         \
  case Isa::avx512bf16: return avx512bf16::name(arguments); \
  case Isa::amx: return amx::name(arguments);
#else
#define NYSTROMGAN_WIDER(name, Arguments)
#define NYSTROMGAN_CHOOSE_WIDER(name, arguments) default:
#endif

// In namespace nystromgan: declares the kernel `name` of every instruction set, and `name`, which calls the chosen one.
#define NYSTROMGAN_KERNEL(name, Arguments)                       \
  namespace portable { void name(const Arguments&); }            \
  NYSTROMGAN_WIDER(name, Arguments)                              \
  inline void name(const Arguments& arguments) {                 \
    switch (isa()) {                                             \
      NYSTROMGAN_CHOOSE_WIDER(name, arguments)                   \
      case Isa::portable: return portable::name(arguments);      \
    }                                                            \
  }

}  // namespace nystromgan
