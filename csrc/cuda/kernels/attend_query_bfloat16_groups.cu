#include "attend_groups.h"

namespace nystromgan {
#if HAS_GROUPS
KERNEL(attend_query_bfloat16_64_groups, GroupGradient, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_gradient<BFloat16, GradientOf::query, kMapDim, 64>(p);
}
KERNEL(attend_query_bfloat16_128_groups, GroupGradient, kMostMapConsumers * kGroupThreads + kMapCopiers, 1) {
  group_gradient<BFloat16, GradientOf::query, kMapDim, 128>(p);
}
#else  // so few threads tell the launches that there is nothing to run
KERNEL(attend_query_bfloat16_64_groups, GroupGradient, 32, 1) { stop(); }
KERNEL(attend_query_bfloat16_128_groups, GroupGradient, 32, 1) { stop(); }
#endif
}  // namespace nystromgan
