#include "single_forward.h"

namespace nystromgan {
KERNEL(nystrom_single_bfloat16_128, NystromSingle, kSingleThreads, 2) { nystrom_single<BFloat16, 128, 32>(p); }
}  // namespace nystromgan
