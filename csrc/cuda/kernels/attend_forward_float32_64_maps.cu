#include "attend_forward.h"

namespace nystromgan {
KERNEL(attend_forward_float32_64_maps, AttendForward, 64, 1) { attend_forward<float, 64, 32, true>(p); }
}  // namespace nystromgan
