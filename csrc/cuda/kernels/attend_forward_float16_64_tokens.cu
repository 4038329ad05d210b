#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_float16_64_tokens, AttendForward, 128, 1) { attend_forward<Half, 64, 64, false>(p); }
}  // namespace nystromgan
