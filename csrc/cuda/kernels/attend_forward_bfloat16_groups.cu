#include "attend_groups.h"

namespace nystromgan {
#if HAS_GROUPS
KERNEL(attend_forward_bfloat16_64_groups, GroupForward, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_forward<BFloat16, true, kMapDim, 64>(p);
}
KERNEL(attend_forward_bfloat16_128_groups, GroupForward, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_forward<BFloat16, true, kMapDim, 128>(p);
}
#else  // so few threads tell the launches that there is nothing to run
KERNEL(attend_forward_bfloat16_64_groups, GroupForward, 32, 1) { stop(); }
KERNEL(attend_forward_bfloat16_128_groups, GroupForward, 32, 1) { stop(); }
#endif
}  // namespace nystromgan
