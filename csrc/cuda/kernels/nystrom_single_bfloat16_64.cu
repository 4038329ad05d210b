#include "single_forward.h"

namespace nystromgan {
KERNEL(nystrom_single_bfloat16_64, NystromSingle, kSingleThreads, 2) { nystrom_single<BFloat16, 64, 64>(p); }
}  // namespace nystromgan
