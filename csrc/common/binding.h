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

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
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
