#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_float16_128_maps, AttendForward, 128, 1) { attend_forward<Half, 128, 32, true>(p); }
}  // namespace nystromgan
