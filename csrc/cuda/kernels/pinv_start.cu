#include "pinv_start.h"

namespace nystromgan {
KERNEL(pinv_norms_of, PinvNorms, kStartThreads, 1) { pinv_norms(p); }
KERNEL(pinv_dots, PinvStart, kStartThreads, 1) { pinv_start_dots(p); }
KERNEL(pinv_start_grad, PinvStart, kStartThreads, 1) { pinv_start_gradient(p); }
}  // namespace nystromgan
