#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_stats_bfloat16, AttendGradient, 128, 1) {
  attend_gradient<BFloat16, GradientOf::stats, 16, 64, false>(p);
}
}  // namespace nystromgan
