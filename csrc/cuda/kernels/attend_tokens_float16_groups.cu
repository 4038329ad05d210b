#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_forward_float16_tokens_groups, GroupForward, kTokenThreads, kTokenBlocks,
             group_forward<Half, false, kTokenDim, kTokenDim>(p))
GROUP_KERNEL(attend_stream_float16_tokens_groups, GroupForward, kTokenThreads, kTokenBlocks,
             group_stream<Half, kTokenDim, kTokenDim>(p))
}  // namespace nystromgan
