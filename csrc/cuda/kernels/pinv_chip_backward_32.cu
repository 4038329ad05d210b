#include "pinv.h"

namespace nystromgan {
KERNEL(pinv_chip_backward_32, PinvChip, 64, 1) { pinv_chip_backward<32>(p); }
}  // namespace nystromgan
