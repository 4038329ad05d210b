#include "single_forward.h"

namespace nystromgan {
KERNEL(nystrom_single_float16_128, NystromSingle, kSingleThreads, 2) { nystrom_single<Half, 128, 32>(p); }
}  // namespace nystromgan
