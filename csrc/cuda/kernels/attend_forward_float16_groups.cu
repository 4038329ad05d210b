#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_forward_float16_64_groups, GroupForward, kMapThreads, 1, group_forward<Half, true, kMapDim, 64>(p))
GROUP_KERNEL(attend_forward_float16_128_groups, GroupForward, kMapThreads, 1, group_forward<Half, true, kMapDim, 128>(p))
}  // namespace nystromgan
