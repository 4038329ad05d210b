#include "power_steps.h"

namespace nystromgan {
KERNEL(power_iteration_steps, PowerIteration, kPowerThreads, 2) { power_iteration(p); }
KERNEL(spectral_normalize_all, SpectralNormalize, kPowerThreads, 4) { spectral_normalize(p); }
KERNEL(spectral_normalize_dots, NormalizeGradient, kPowerThreads, 4) { normalize_dots(p); }
KERNEL(spectral_normalize_gradient, NormalizeGradient, kPowerThreads, 4) { normalize_gradient(p); }
}  // namespace nystromgan
