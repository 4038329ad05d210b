// The binding of iterative_pinv: which of its kernels takes a size, and with what memory.
#include "iterative_pinv.h"

#include <algorithm>

#include "launch.h"
#include "pinv_launch.h"

namespace nystromgan {
namespace {

Tensor forward(const Tensor& matrix, int64_t iterations, bool global_init) {
  const Tensor input = torch::stable::contiguous(matrix);
  Tensor inverse = torch::stable::empty_like(input);
  if (input.numel() > 0)
    launch_pinv(
        input, static_cast<const float*>(input.const_data_ptr()), static_cast<float*>(inverse.mutable_data_ptr()),
        input.numel() / (input.size(-1) * input.size(-1)), input.size(-1), iterations, global_init);
  return inverse;
}

Tensor backward(const Tensor& grad_output, const Tensor& matrix, int64_t iterations, bool global_init) {
  const Tensor input = torch::stable::contiguous(matrix), grad = torch::stable::contiguous(grad_output);
  Tensor grad_matrix = torch::stable::empty_like(input);
  if (input.numel() > 0)
    launch_pinv_backward(
        input, static_cast<const float*>(grad.const_data_ptr()), static_cast<const float*>(input.const_data_ptr()),
        static_cast<float*>(grad_matrix.mutable_data_ptr()), input.numel() / (input.size(-1) * input.size(-1)),
        input.size(-1), iterations, global_init);
  return grad_matrix;
}

}  // namespace

NYSTROMGAN_BINDINGS(m) {
  m.impl("iterative_pinv_native", TORCH_BOX(&forward));
  m.impl("iterative_pinv_backward_native", TORCH_BOX(&backward));
}

}  // namespace nystromgan
