#include "pinv_tiled.h"

namespace nystromgan {
KERNEL(pinv_tiled_gradient, PinvTiled, kTileThreads, 2) { pinv_tiled_backward(p); }
}  // namespace nystromgan
