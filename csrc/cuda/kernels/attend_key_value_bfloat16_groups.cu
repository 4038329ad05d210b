#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_key_value_bfloat16_64_groups, GroupGradient, kMapThreads, 1, group_gradient<BFloat16, GradientOf::key_value, kMapDim, 64>(p))
GROUP_KERNEL(attend_key_value_bfloat16_128_groups, GroupGradient, kMapThreads, 1, group_gradient<BFloat16, GradientOf::key_value, kMapDim, 128>(p))
}  // namespace nystromgan
