#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_key_value_float16_64_groups, GroupGradient, kMapThreads, 1, group_gradient<Half, GradientOf::key_value, kMapDim, 64>(p))
GROUP_KERNEL(attend_key_value_float16_128_groups, GroupGradient, kMapThreads, 1, group_gradient<Half, GradientOf::key_value, kMapDim, 128>(p))
}  // namespace nystromgan
