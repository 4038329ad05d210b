#include "pinv_launch.h"

#include <algorithm>
#include <atomic>

#include "iterative_pinv.h"

DECLARE_KERNEL(pinv_chip_32, pinv_chip_32)
DECLARE_KERNEL(pinv_chip_64, pinv_chip_64)
DECLARE_KERNEL(pinv_chip_128, pinv_chip_128)
DECLARE_KERNEL(pinv_chip_backward_32, pinv_chip_backward_32)
DECLARE_KERNEL(pinv_chip_backward_64, pinv_chip_backward_64)
DECLARE_KERNEL(pinv_cluster_64, pinv_cluster_64)
DECLARE_KERNEL(pinv_cluster_128, pinv_cluster_128)
DECLARE_KERNEL(pinv_cluster_256, pinv_cluster_256)
DECLARE_KERNEL(pinv_tiled, pinv_tiled_forward)
DECLARE_KERNEL(pinv_tiled_backward, pinv_tiled_gradient)
DECLARE_KERNEL(pinv_start, pinv_norms_of)
DECLARE_KERNEL(pinv_start, pinv_dots)
DECLARE_KERNEL(pinv_start, pinv_start_grad)

namespace nystromgan {
namespace {

constexpr int kTileThreads = 128, kStartThreads = 256, kTile = 64;
constexpr size_t kMatmulSharedBytes = 2 * 3 * 64 * 36 * 4, kMostStartBytes = 2 * 512 * 4;
constexpr int64_t kMostChip = 128, kMostChipBackward = 64;

constexpr int kClusterThreads = 256;
constexpr int64_t kClusterRows = 32, kLeastCluster = 33, kMostCluster = 256;

std::atomic<bool> clusters_allowed{true};

int64_t cluster_side(int64_t size) { return size <= 64 ? 64 : size <= 128 ? 128 : 256; }

const Kernel& cluster_kernel(int64_t size) {
  return size <= 64 ? kernel_pinv_cluster_64 : size <= 128 ? kernel_pinv_cluster_128 : kernel_pinv_cluster_256;
}

// What a block of a cluster lays out: five matrices of its rows, each in two halves, and a float a warp beside a scale.
size_t cluster_bytes(int64_t side) { return static_cast<size_t>(5 * 2 * 2 * kClusterRows * (side + 8) + 64); }

// 512 rows are more than eight blocks hold, and 32 are done by one before others have come. Unmeasured: a cluster has two to
// eight times the tensor cores of the one block that it replaces, which need half the time for a product; on 256 rows two
// meetings of eight blocks a step replace four of all blocks.
bool takes_cluster(const Tensor& on, int64_t size) {
  return clusters_allowed && size >= kLeastCluster && size <= kMostCluster &&
         has_clusters(cluster_kernel(size), cluster_bytes(cluster_side(size)), on);
}

int64_t block_of(int64_t size) { return size <= 32 ? 32 : size <= 64 ? 64 : 128; }

size_t slots(int64_t count, int64_t block) { return count * block * (block + 4) * sizeof(float); }

float* room(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor floats(const Tensor& on, int64_t count) { return empty(on, {count}, ScalarType::Float); }

Tensor norms_of(const Tensor& on, const float* matrix, int64_t count, int64_t size) {
  const Tensor norms = floats(on, 2 * count);
  const PinvNorms problem{matrix, room(norms), count, static_cast<int>(size)};
  launch(kernel_pinv_norms_of, {count, kStartThreads, kMostStartBytes}, &problem, on);
  return norms;
}

// A launch of as many blocks as there are tiles, or as fit at once.
void launch_tiled(const Kernel& kernel, PinvTiled problem, const Tensor& on) {
  const int64_t tiles = (problem.padded_size + kTile - 1) / kTile;
  const int64_t resident = resident_blocks(kernel, kTileThreads, kMatmulSharedBytes, on);
  const int64_t blocks = std::min(resident, problem.count * tiles * tiles);
  launch(kernel, {blocks, kTileThreads, kMatmulSharedBytes, true}, &problem, on);
}

PinvTiled tiled(const float* matrix, const Tensor& norms, int64_t count, int64_t size, int64_t iterations, bool global) {
  PinvTiled problem{};
  problem.matrix = matrix, problem.norms = room(norms), problem.count = count, problem.global_init = global;
  problem.size = static_cast<int>(size), problem.padded_size = static_cast<int>((size + 15) / 16 * 16);
  problem.iterations = static_cast<int>(iterations);
  return problem;
}

}  // namespace

void launch_pinv(const Tensor& on, const float* matrix, float* inverse, int64_t count, int64_t size, int64_t iterations,
                 bool global_init) {
  if (takes_cluster(on, size)) {
    const int64_t side = cluster_side(size), blocks = side / kClusterRows;
    const Tensor norms = global_init ? norms_of(on, matrix, count, size) : floats(on, 0);
    PinvTiled problem = tiled(matrix, norms, count, size, iterations, global_init);
    problem.inverse = inverse;
    const Launch shape{count * blocks, kClusterThreads, cluster_bytes(side), false, static_cast<int>(blocks)};
    return launch(cluster_kernel(size), shape, &problem, on);
  }
  if (size > kMostChip) {
    const Tensor norms = norms_of(on, matrix, count, size);
    PinvTiled problem = tiled(matrix, norms, count, size, iterations, global_init);
    const int64_t floats_each = static_cast<int64_t>(problem.padded_size) * problem.padded_size;
    const Tensor work = floats(on, count * floats_each * kPinvMatrices);
    problem.inverse = inverse, problem.work = room(work);
    return launch_tiled(kernel_pinv_tiled_forward, problem, on);
  }
  const Tensor norms = global_init ? norms_of(on, matrix, count, size) : floats(on, 0);
  PinvChip problem{};
  problem.matrix = matrix, problem.norms = global_init ? room(norms) : nullptr, problem.inverse = inverse;
  problem.count = count, problem.size = static_cast<int>(size), problem.iterations = static_cast<int>(iterations);
  const int64_t block = block_of(size);
  const Kernel& kernel = block == 32 ? kernel_pinv_chip_32 : block == 64 ? kernel_pinv_chip_64 : kernel_pinv_chip_128;
  launch(kernel, {count, static_cast<int>(2 * block), slots(block <= 64 ? 3 : 2, block)}, &problem, on);
}

void launch_pinv_backward(const Tensor& on, const float* grad_output, const float* matrix, float* grad_matrix,
                          int64_t count, int64_t size, int64_t iterations, bool global_init) {
  const Tensor inverse = floats(on, count * size * size);
  const bool chip = size <= kMostChipBackward;
  const Tensor norms = chip && !global_init ? floats(on, 0) : norms_of(on, matrix, count, size);
  if (chip) {
    const int64_t block = block_of(size);
    PinvChip problem{};
    problem.matrix = matrix, problem.norms = global_init ? room(norms) : nullptr, problem.grad_output = grad_output;
    problem.inverse = room(inverse), problem.grad_matrix = grad_matrix;
    problem.count = count, problem.size = static_cast<int>(size), problem.iterations = static_cast<int>(iterations);
    const Kernel& kernel = block == 32 ? kernel_pinv_chip_backward_32 : kernel_pinv_chip_backward_64;
    launch(kernel, {count, static_cast<int>(2 * block), slots(6, block)}, &problem, on);
  } else {
    PinvTiled problem = tiled(matrix, norms, count, size, iterations, global_init);
    const int64_t floats_each = static_cast<int64_t>(problem.padded_size) * problem.padded_size;
    const Tensor work = floats(on, count * floats_each * 2 * kPinvMatrices);
    problem.inverse = room(inverse), problem.work = room(work);
    problem.grad_output = grad_output, problem.grad_matrix = grad_matrix;
    launch_tiled(kernel_pinv_tiled_gradient, problem, on);
  }
  const Tensor dots = floats(on, count);
  const PinvStart start{matrix, room(norms), grad_output, room(inverse), room(dots), grad_matrix, count,
                        static_cast<int>(size), global_init};
  if (global_init) launch(kernel_pinv_dots, {count, kStartThreads, kMostStartBytes}, &start, on);
  launch(kernel_pinv_start_grad, {count, kStartThreads, kMostStartBytes}, &start, on);
}

}  // namespace nystromgan

// Whether iterative_pinv may take clusters of blocks, which measurements and tests turn off to see the other path.
extern "C" __attribute__((visibility("default"))) void nystromgan_cuda_allow_clusters(int allowed) {
  nystromgan::clusters_allowed = allowed != 0;
}
