#include "pinv_cluster.h"

namespace nystromgan {
KERNEL(pinv_cluster_64, PinvTiled, kClusterThreads, 1) {
#if HAS_CLUSTERS
  pinv_cluster<64>(p);
#else
  stop();  // it is there for the table of kernels alone
#endif
}
}  // namespace nystromgan
