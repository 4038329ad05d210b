#include "pinv.h"

namespace nystromgan {
KERNEL(pinv_chip_128, PinvChip, 256, 1) { pinv_chip<128>(p); }
}  // namespace nystromgan
