#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_key_value_float16_64_tokens, AttendGradient, 128, 1) {
  attend_gradient<Half, GradientOf::key_value, 64, 32, false>(p);
}
}  // namespace nystromgan
