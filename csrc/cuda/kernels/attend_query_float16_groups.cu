#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_query_float16_64_groups, GroupGradient, kMapThreads, 1, group_gradient<Half, GradientOf::query, kMapDim, 64>(p))
GROUP_KERNEL(attend_query_float16_128_groups, GroupGradient, kMapThreads, 1, group_gradient<Half, GradientOf::query, kMapDim, 128>(p))
}  // namespace nystromgan
