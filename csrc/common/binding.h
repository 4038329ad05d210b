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

}  // namespace nystromgan
