#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_bfloat16_64_tokens, AttendForward, 128, 1) { attend_forward<BFloat16, 64, 64, false>(p); }
}  // namespace nystromgan
