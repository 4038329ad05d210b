#include "landmark_passes.h"

namespace nystromgan {
KERNEL(landmark_sums_float32, IndexSums, kLandmarkThreads, 1) { index_sums<float>(p); }
KERNEL(landmark_sums_bfloat16, IndexSums, kLandmarkThreads, 1) { index_sums<BFloat16>(p); }
KERNEL(landmark_sums_float16, IndexSums, kLandmarkThreads, 1) { index_sums<Half>(p); }
KERNEL(landmark_means, IndexMeans, kLandmarkThreads, 1) { index_means(p); }
KERNEL(landmark_counts, IndexCounts, kCountThreads, 1) { index_counts(p); }
KERNEL(landmark_grid_index, GridIndex, kLandmarkThreads, 1) { grid_index(p); }
KERNEL(landmark_convert_float32, Convert, kLandmarkThreads, 1) { convert<float>(p); }
KERNEL(landmark_convert_bfloat16, Convert, kLandmarkThreads, 1) { convert<BFloat16>(p); }
KERNEL(landmark_convert_float16, Convert, kLandmarkThreads, 1) { convert<Half>(p); }
}  // namespace nystromgan
