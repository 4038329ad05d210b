#include "single_forward.h"

namespace nystromgan {
KERNEL(nystrom_single_float16_64, NystromSingle, kSingleThreads, 2) { nystrom_single<Half, 64, 64>(p); }
}  // namespace nystromgan
