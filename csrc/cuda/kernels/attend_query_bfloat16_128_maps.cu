#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_query_bfloat16_128_maps, AttendGradient, 128, 1) {
  attend_gradient<BFloat16, GradientOf::query, 128, 32, true>(p);
}
}  // namespace nystromgan
