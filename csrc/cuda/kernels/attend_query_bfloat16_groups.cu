#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_query_bfloat16_64_groups, GroupGradient, kMapThreads, 1, group_gradient<BFloat16, GradientOf::query, kMapDim, 64>(p))
GROUP_KERNEL(attend_query_bfloat16_128_groups, GroupGradient, kMapThreads, 1, group_gradient<BFloat16, GradientOf::query, kMapDim, 128>(p))
}  // namespace nystromgan
