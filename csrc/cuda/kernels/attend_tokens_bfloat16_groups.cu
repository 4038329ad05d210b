#include "attend_groups.h"

namespace nystromgan {
#if HAS_GROUPS
KERNEL(attend_forward_bfloat16_tokens_groups, GroupForward, kTokenConsumers * kGroupThreads + kTokenCopiers, kTokenBlocks) {
  group_forward<BFloat16, false, kTokenDim, kTokenDim>(p);
}
KERNEL(attend_stream_bfloat16_tokens_groups, GroupForward, kTokenConsumers * kGroupThreads + kTokenCopiers, kTokenBlocks) {
  group_stream<BFloat16, kTokenDim, kTokenDim>(p);
}
#else  // so few threads tell the launches that there is nothing to run
KERNEL(attend_forward_bfloat16_tokens_groups, GroupForward, 32, 1) { stop(); }
KERNEL(attend_stream_bfloat16_tokens_groups, GroupForward, 32, 1) { stop(); }
#endif
}  // namespace nystromgan
