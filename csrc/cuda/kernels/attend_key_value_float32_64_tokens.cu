#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_key_value_float32_64_tokens, AttendGradient, 64, 1) {
  attend_gradient<float, GradientOf::key_value, 64, 32, false>(p);
}
}  // namespace nystromgan
