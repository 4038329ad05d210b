#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_stats_float32, AttendGradient, 64, 1) {
  attend_gradient<float, GradientOf::stats, 16, 32, false>(p);
}
}  // namespace nystromgan
