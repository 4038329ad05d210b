#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_query_bfloat16_64_maps, AttendGradient, 128, 1) {
  attend_gradient<BFloat16, GradientOf::query, 64, 64, true>(p);
}
}  // namespace nystromgan
