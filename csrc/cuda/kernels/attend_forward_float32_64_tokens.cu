#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_float32_64_tokens, AttendForward, 64, 1) { attend_forward<float, 64, 32, false>(p); }
}  // namespace nystromgan
