// What the bindings share: from torch's stable tensors to the raw pointers and strides that kernels take.
#pragma once

#include <array>

#include "../common/binding.h"
#include "isa.h"

namespace nystromgan {

// `empty` of like's dtype, from 1 MiB on in memory of an earlier call (nystromgan/_recycled.py). A forward over 16384 tokens is
// 1.27 times as fast with it in fp32 (32 MiB), and over 4 times 2048 tokens (2 MiB) where the heap gives its end back.
inline Tensor empty_recycled(const Tensor& like, const std::vector<int64_t>& shape) {
  constexpr int64_t least = int64_t{1} << 20;
  int64_t bytes = like.element_size();
  for (const int64_t size : shape) bytes *= size;
  if (bytes < least) return empty(like, shape, like.scalar_type());
  std::array<StableIValue, 2> stack{torch::stable::detail::from(like), torch::stable::detail::from(shape)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("nystromgan::empty_recycled", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Each token's block of a grid, row-major; the first size mod count blocks of an axis are longer.
inline void index_grid(const std::vector<int64_t>& grid, const std::vector<int64_t>& counts, int32_t* blocks) {
  int64_t filled = 1;
  blocks[0] = 0;
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    const int64_t size = grid[axis], count = counts[axis], length = size / count, longer = size % count;
    std::vector<int32_t> block;  // of each position of the axis
    for (int64_t i = 0; i < count; ++i) block.insert(block.end(), length + (i < longer), static_cast<int32_t>(i));
    for (int64_t i = filled - 1; i >= 0; --i) {  // from the end, so that it happens in place
      const int32_t before = blocks[i] * static_cast<int32_t>(count);
      for (int64_t j = 0; j < size; ++j) blocks[i * size + j] = before + block[j];
    }
    filled *= size;
  }
}

// A scalar tensor of any floating-point dtype.
inline float read_scalar(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return static_cast<float>(*static_cast<const double*>(data));
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::BFloat16: return *static_cast<const c10::BFloat16*>(data);
    case ScalarType::Half: return *static_cast<const c10::Half*>(data);
    default:
      STD_TORCH_CHECK(
          false, "gamma must be a floating-point tensor, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// ParallelRun on torch's threads.
inline void run_parallel(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* arg), void* arg) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(begin, end, arg); });
}

}  // namespace nystromgan
