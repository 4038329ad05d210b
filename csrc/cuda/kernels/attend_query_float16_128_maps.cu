#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_query_float16_128_maps, AttendGradient, 128, 1) {
  attend_gradient<Half, GradientOf::query, 128, 32, true>(p);
}
}  // namespace nystromgan
