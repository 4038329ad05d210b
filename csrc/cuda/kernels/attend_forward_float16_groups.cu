#include "attend_groups.h"

namespace nystromgan {
#if HAS_GROUPS
KERNEL(attend_forward_float16_64_groups, GroupForward, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_forward<Half, true, kMapDim, 64>(p);
}
KERNEL(attend_forward_float16_128_groups, GroupForward, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_forward<Half, true, kMapDim, 128>(p);
}
#else  // so few threads tell the launches that there is nothing to run
KERNEL(attend_forward_float16_64_groups, GroupForward, 32, 1) { stop(); }
KERNEL(attend_forward_float16_128_groups, GroupForward, 32, 1) { stop(); }
#endif
}  // namespace nystromgan
