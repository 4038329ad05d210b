#include "pinv.h"

namespace nystromgan {
KERNEL(pinv_chip_32, PinvChip, 64, 1) { pinv_chip<32>(p); }
}  // namespace nystromgan
