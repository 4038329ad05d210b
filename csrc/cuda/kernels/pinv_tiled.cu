#include "pinv_tiled.h"

namespace nystromgan {
KERNEL(pinv_tiled_forward, PinvTiled, kTileThreads, 2) { pinv_tiled(p); }
}  // namespace nystromgan
