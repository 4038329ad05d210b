#include "attend_groups.h"

namespace nystromgan {
#if HAS_GROUPS
KERNEL(attend_forward_float16_tokens_groups, GroupForward, kTokenConsumers * kGroupThreads + kTokenCopiers, kTokenBlocks) {
  group_forward<Half, false, kTokenDim, kTokenDim>(p);
}
KERNEL(attend_stream_float16_tokens_groups, GroupForward, kTokenConsumers * kGroupThreads + kTokenCopiers, kTokenBlocks) {
  group_stream<Half, kTokenDim, kTokenDim>(p);
}
#else  // so few threads tell the launches that there is nothing to run
KERNEL(attend_forward_float16_tokens_groups, GroupForward, 32, 1) { stop(); }
KERNEL(attend_stream_float16_tokens_groups, GroupForward, 32, 1) { stop(); }
#endif
}  // namespace nystromgan
