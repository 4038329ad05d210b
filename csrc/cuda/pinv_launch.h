// The pseudo-inverse of `count` contiguous (M, M) float32 matrices, and its gradient, with whatever kernels fit M.
#pragma once

#include "launch.h"

namespace nystromgan {

void launch_pinv(const Tensor& on, const float* matrix, float* inverse, int64_t count, int64_t size, int64_t iterations,
                 bool global_init);

void launch_pinv_backward(const Tensor& on, const float* grad_output, const float* matrix, float* grad_matrix,
                          int64_t count, int64_t size, int64_t iterations, bool global_init);

}  // namespace nystromgan
