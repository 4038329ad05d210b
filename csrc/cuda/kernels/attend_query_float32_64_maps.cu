#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_query_float32_64_maps, AttendGradient, 64, 1) {
  attend_gradient<float, GradientOf::query, 64, 32, true>(p);
}
}  // namespace nystromgan
