#include "pinv.h"

namespace nystromgan {
KERNEL(pinv_chip_64, PinvChip, 128, 1) { pinv_chip<64>(p); }
}  // namespace nystromgan
