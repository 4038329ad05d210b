#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_forward_bfloat16_64_groups, GroupForward, kMapThreads, 1, group_forward<BFloat16, true, kMapDim, 64>(p))
GROUP_KERNEL(attend_forward_bfloat16_128_groups, GroupForward, kMapThreads, 1, group_forward<BFloat16, true, kMapDim, 128>(p))
}  // namespace nystromgan
