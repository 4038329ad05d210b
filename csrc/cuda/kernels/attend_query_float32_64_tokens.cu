#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_query_float32_64_tokens, AttendGradient, 64, 1) {
  attend_gradient<float, GradientOf::query, 64, 32, false>(p);
}
}  // namespace nystromgan
