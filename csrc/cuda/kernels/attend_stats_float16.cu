#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_stats_float16, AttendGradient, 128, 1) {
  attend_gradient<Half, GradientOf::stats, 16, 64, false>(p);
}
}  // namespace nystromgan
