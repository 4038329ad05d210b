#include "single_forward.h"

namespace nystromgan {
KERNEL(nystrom_single_float32_64, NystromSingle, kSingleThreads, 2) { nystrom_single<float, 64, 32>(p); }
}  // namespace nystromgan
