#include "attend_groups.h"

namespace nystromgan {
GROUP_KERNEL(attend_forward_bfloat16_tokens_groups, GroupForward, kTokenThreads, kTokenBlocks,
             group_forward<BFloat16, false, kTokenDim, kTokenDim>(p))
GROUP_KERNEL(attend_stream_bfloat16_tokens_groups, GroupForward, kTokenThreads, kTokenBlocks,
             group_stream<BFloat16, kTokenDim, kTokenDim>(p))
}  // namespace nystromgan
