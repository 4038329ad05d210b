#include "landmark_launch.h"

#include <algorithm>

#define DECLARE_OF_DTYPES(image, name)     \
  DECLARE_KERNEL(image, name##_float32)  \
  DECLARE_KERNEL(image, name##_bfloat16) \
  DECLARE_KERNEL(image, name##_float16)
#define OF_DTYPE(dtype, name)                                  \
  ((dtype) == Dtype::float32    ? kernel_##name##_float32      \
   : (dtype) == Dtype::bfloat16 ? kernel_##name##_bfloat16     \
                                : kernel_##name##_float16)
DECLARE_OF_DTYPES(landmarks, landmark_sums)
DECLARE_OF_DTYPES(landmarks, landmark_convert)
DECLARE_KERNEL(landmarks, landmark_means)
DECLARE_KERNEL(landmarks, landmark_counts)
DECLARE_KERNEL(landmarks, landmark_grid_index)
DECLARE_KERNEL(nystrom_core, nystrom_core_softmax)
DECLARE_KERNEL(nystrom_core, nystrom_core_gradient)
DECLARE_KERNEL(nystrom_core, nystrom_merge)
DECLARE_KERNEL(nystrom_core, nystrom_reduce)
DECLARE_KERNEL(nystrom_core, nystrom_context_gradient)
DECLARE_KERNEL(nystrom_core, nystrom_matmul_nn)
DECLARE_KERNEL(nystrom_core, nystrom_matmul_nt)
DECLARE_KERNEL(nystrom_core, nystrom_matmul_tn)
DECLARE_OF_DTYPES(cluster, cluster_assign)

namespace nystromgan {
namespace {

constexpr int64_t kSplits = 32, kLeastSplit = 256;  // eight heads fill the 132 multiprocessors of an H200 twice
constexpr int64_t kSumBytes = 96 << 10;             // of one block of index sums, which leaves room for a second
constexpr int64_t kMostBlocks = 4096;               // of passes whose threads stride
constexpr int kAssignTokens = 32, kTile = 64, kTileThreads = 128;
constexpr size_t kMatmulSharedBytes = 2 * 3 * 64 * 36 * 4;

// Blocks of a pass whose threads, or warps, take one element each and go on by the grid.
Launch striding(int64_t count, int64_t of_one_block) {
  return {std::max<int64_t>(1, std::min(kMostBlocks, ceil_of(count, of_one_block))), kLandmarkThreads, 0};
}

constexpr int64_t kWarps = kLandmarkThreads / 32;

Divisor divisor_of(int64_t n) {
  uint32_t shift = 31;
  while (int64_t{1} << (shift - 31) < n) ++shift;
  return {static_cast<uint32_t>(ceil_of(int64_t{1} << shift, n)), shift};
}

}  // namespace

int64_t split_tokens(int64_t count) {
  int64_t split = kLeastSplit;
  while (split * kSplits < count) split *= 2;
  return split;
}

float* floats(const Tensor& x) { return static_cast<float*>(const_cast<void*>(x.const_data_ptr())); }

const uint8_t* bytes_of(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& mask) {
  return mask ? std::optional<Tensor>(torch::stable::contiguous(*mask)) : mask;
}

Index index_of(const Tensor& index) {
  STD_TORCH_CHECK(index.stride(2) == 1 || index.size(2) == 1, "an index must have its tokens side by side");
  return {static_cast<const int32_t*>(index.const_data_ptr()), index.size(0) == 1 ? 0 : index.stride(0),
          index.size(1) == 1 ? 0 : index.stride(1), {}};
}

Grid grid_of(const Tensor& tokens, const std::vector<int64_t>& sizes, const std::vector<int64_t>& counts) {
  check_grid(tokens, sizes, counts);
  const int axes = static_cast<int>(sizes.size());
  STD_TORCH_CHECK(axes <= kGridAxes, "a grid must have at most ", kGridAxes, " axes, got ", axes);
  Grid grid{};
  grid.num_axes = axes;
  for (int i = 0; i < axes; ++i) {
    const int64_t size = sizes[axes - 1 - i], count = counts[axes - 1 - i], length = size / count;
    grid.axes[i] = {static_cast<int>(size), static_cast<int>(count), static_cast<int>(length),
                    static_cast<int>(size % count), divisor_of(size), divisor_of(length), divisor_of(length + 1)};
  }
  return grid;
}

Tensor index_means(const Tensor& tokens, const Index& index, int64_t landmarks, const std::optional<Tensor>& fallback) {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), count = tokens.size(2), dim = tokens.size(3);
  const int64_t split = split_tokens(count), splits = ceil_of(count, split), rows = batch * heads;
  const Tensor means = empty(tokens, {batch, heads, landmarks, dim}, ScalarType::Float);
  if (rows == 0) return means;
  const Tensor sums = empty(tokens, {rows * splits * landmarks * dim}, ScalarType::Float);
  const Tensor counts = empty(tokens, {rows * splits * landmarks}, ScalarType::Float);
  int warps = kLandmarkThreads / 32;
  const int64_t warp_bytes = landmarks * (kSumChannels + 1) * sizeof(float);
  while (warps > 1 && warps * warp_bytes > kSumBytes) warps /= 2;
  const Dtype type = dtype(tokens, "tokens");
  const IndexSums problem{operand_of(tokens), index, floats(sums), floats(counts), static_cast<int>(heads),
                          static_cast<int>(count), static_cast<int>(landmarks), static_cast<int>(dim),
                          static_cast<int>(splits), static_cast<int>(split)};
  launch(OF_DTYPE(type, landmark_sums),
         {rows * splits * ceil_of(dim, kSumChannels), 32 * warps, static_cast<size_t>(warps * warp_bytes)}, &problem, tokens);
  const IndexMeans finish{floats(sums), floats(counts), fallback ? floats(*fallback) : nullptr, floats(means),
                          rows * landmarks, static_cast<int>(landmarks), static_cast<int>(dim), static_cast<int>(splits)};
  launch(kernel_landmark_means, striding(rows * landmarks * dim, kLandmarkThreads), &finish, tokens);
  return means;
}

Members members_of(const Tensor& index, int64_t landmarks) {
  const int64_t batch = index.size(0), heads = index.size(1);
  const Tensor counts = empty(index, {batch, heads, landmarks}, ScalarType::Float);
  const IndexCounts problem{index_of(index), floats(counts), static_cast<int>(heads), static_cast<int>(index.size(2)),
                            static_cast<int>(landmarks)};
  launch(kernel_landmark_counts, {batch * heads, kCountThreads, landmarks * sizeof(int)}, &problem, index);
  return {index, counts};
}

Members members_of(const Tensor& tokens, const Grid& grid, int64_t landmarks) {
  const int64_t count = tokens.size(2);
  const Members members{empty(tokens, {1, 1, count}, ScalarType::Int), empty(tokens, {1, 1, landmarks}, ScalarType::Float)};
  const GridIndex problem{grid, static_cast<int32_t*>(members.index.mutable_data_ptr()), floats(members.counts),
                          static_cast<int>(count), static_cast<int>(landmarks)};
  launch(kernel_landmark_grid_index, striding(std::max(count, landmarks), kLandmarkThreads), &problem, tokens);
  return members;
}

void launch_matmul(const Tensor& on, Transposed which, const Matmul& problem) {
  const Kernel& kernel = which == Transposed::none   ? kernel_nystrom_matmul_nn
                         : which == Transposed::left ? kernel_nystrom_matmul_tn
                                                     : kernel_nystrom_matmul_nt;
  const int64_t tiles = ceil_of(problem.rows, kTile) * ceil_of(problem.columns, kTile);
  launch(kernel, {problem.count * tiles, kTileThreads, kMatmulSharedBytes}, &problem, on);
}

void launch_convert(const Tensor& on, Dtype to, const Convert& problem) {
  launch(OF_DTYPE(to, landmark_convert), striding(problem.count, kLandmarkThreads), &problem, on);
}

void launch_core_softmax(const Tensor& on, const CoreSoftmax& problem) {
  launch(kernel_nystrom_core_softmax, striding(problem.rows, kWarps), &problem, on);
}

void launch_core_gradient(const Tensor& on, const CoreGradient& problem) {
  launch(kernel_nystrom_core_gradient, striding(problem.rows, kWarps), &problem, on);
}

void launch_merge(const Tensor& on, const Merge& problem) {
  launch(kernel_nystrom_merge, striding(problem.rows, kWarps), &problem, on);
}

void launch_reduce(const Tensor& on, const Reduce& problem) {
  launch(kernel_nystrom_reduce, striding(problem.heads * problem.size, kLandmarkThreads), &problem, on);
}

void launch_context_gradient(const Tensor& on, const ContextGradient& problem) {
  launch(kernel_nystrom_context_gradient, striding(problem.rows, kWarps), &problem, on);
}

void launch_assign(const Tensor& on, Dtype dtype, const Assign& problem) {
  const int64_t padded = ceil_of(problem.dim, 16) * 16, blocks = ceil_of(problem.num_tokens, kAssignTokens);
  const size_t bytes = sizeof(float) * (2 * kAssignTokens * (padded + 4) + kAssignTokens);
  launch(OF_DTYPE(dtype, cluster_assign), {on.size(0) * problem.heads * blocks, 2 * kAssignTokens, bytes}, &problem, on);
}

}  // namespace nystromgan
