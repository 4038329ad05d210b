#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_key_value_bfloat16_128_tokens, AttendGradient, 128, 1) {
  attend_gradient<BFloat16, GradientOf::key_value, 128, 32, false>(p);
}
}  // namespace nystromgan
