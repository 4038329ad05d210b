#include "landmark_passes.h"

namespace nystromgan {
KERNEL(nystrom_core_softmax, CoreSoftmax, kLandmarkThreads, 1) { core_softmax(p); }
KERNEL(nystrom_core_gradient, CoreGradient, kLandmarkThreads, 1) { core_gradient(p); }
KERNEL(nystrom_merge, Merge, kLandmarkThreads, 1) { merge(p); }
KERNEL(nystrom_reduce, Reduce, kLandmarkThreads, 1) { reduce(p); }
KERNEL(nystrom_context_gradient, ContextGradient, kLandmarkThreads, 1) { context_gradient(p); }
KERNEL(nystrom_matmul_nn, Matmul, kTileThreads, 2) { matmul<false, false>(p); }
KERNEL(nystrom_matmul_nt, Matmul, kTileThreads, 2) { matmul<false, true>(p); }
KERNEL(nystrom_matmul_tn, Matmul, kTileThreads, 2) { matmul<true, false>(p); }
}  // namespace nystromgan
