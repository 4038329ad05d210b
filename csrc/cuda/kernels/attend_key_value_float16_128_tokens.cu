#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_key_value_float16_128_tokens, AttendGradient, 128, 1) {
  attend_gradient<Half, GradientOf::key_value, 128, 32, false>(p);
}
}  // namespace nystromgan
