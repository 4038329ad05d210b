#include "pinv.h"

namespace nystromgan {
KERNEL(pinv_chip_backward_64, PinvChip, 128, 1) { pinv_chip_backward<64>(p); }
}  // namespace nystromgan
