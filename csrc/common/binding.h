// What all bindings share: torch's stable tensors, their dtypes, and new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "types.h"

namespace nystromgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default:
      STD_TORCH_CHECK(
          false, name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Contiguous. Past torch::stable::new_empty, which goes through the dispatcher twice: for seven outputs that took 9 us.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype, device, index, &tensor));
  return Tensor(tensor);
}

// Whether a grid has these tokens, and along every axis from one block to one for each position.
inline void check_grid(const Tensor& tokens, const std::vector<int64_t>& grid, const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(grid.size() == counts.size(), "a grid of ", grid.size(), " axes must have as many counts, got ", counts.size());
  int64_t positions = 1;
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    positions *= grid[axis];
    STD_TORCH_CHECK(1 <= counts[axis] && counts[axis] <= grid[axis], "landmarks along an axis must be from 1 to its size, ",
                    grid[axis], ", got ", counts[axis]);
  }
  STD_TORCH_CHECK(positions == tokens.size(2), "a grid must have as many positions as there are tokens, ", tokens.size(2),
                  ", got ", positions);
}

}  // namespace nystromgan
