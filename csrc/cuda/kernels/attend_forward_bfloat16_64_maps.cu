#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_bfloat16_64_maps, AttendForward, 128, 1) { attend_forward<BFloat16, 64, 64, true>(p); }
}  // namespace nystromgan
