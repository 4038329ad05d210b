// What the bindings share: from torch's stable tensors to the raw pointers and strides that kernels take.
#pragma once

#include "../common/binding.h"
#include "isa.h"

namespace nystromgan {

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
