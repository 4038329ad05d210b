#include "cluster.h"

namespace nystromgan {
KERNEL(cluster_assign_float32, Assign, 2 * kAssignTokens, 1) { assign<float>(p); }
KERNEL(cluster_assign_bfloat16, Assign, 2 * kAssignTokens, 1) { assign<BFloat16>(p); }
KERNEL(cluster_assign_float16, Assign, 2 * kAssignTokens, 1) { assign<Half>(p); }
}  // namespace nystromgan
