#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_float16_64_maps, AttendForward, 128, 1) { attend_forward<Half, 64, 64, true>(p); }
}  // namespace nystromgan
