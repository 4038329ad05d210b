#include "attend_gradient.h"

namespace nystromgan {
KERNEL(attend_key_value_float16_128_maps, AttendGradient, 128, 1) {
  attend_gradient<Half, GradientOf::key_value, 128, 32, true>(p);
}
}  // namespace nystromgan
