#include "power_steps.h"

namespace nystromgan {
KERNEL(power_iteration_steps, PowerIteration, kPowerThreads, 2) { power_iteration(p); }
KERNEL(spectral_normalize_all, SpectralNormalize, kPowerThreads, 4) { spectral_normalize(p); }
}  // namespace nystromgan
