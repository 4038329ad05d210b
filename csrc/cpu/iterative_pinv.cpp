// The binding of iterative_pinv.
#include "iterative_pinv.h"

#include "binding.h"

namespace nystromgan {

NYSTROMGAN_KERNEL(iterative_pinv, PinvForward)
NYSTROMGAN_KERNEL(iterative_pinv_backward, PinvBackward)

namespace {

PinvForward problem(const Tensor& matrix, int64_t iterations, bool global_init, float* inverse) {
  const int64_t size = matrix.size(-1), batch = matrix.numel() / (size * size);
  return {batch, size, iterations, global_init, static_cast<const float*>(matrix.const_data_ptr()), inverse, run_parallel,
          torch::stable::get_num_threads()};
}

Tensor forward(const Tensor& matrix, int64_t iterations, bool global_init) {
  const Tensor input = torch::stable::contiguous(matrix);
  Tensor inverse = torch::stable::empty_like(input);
  if (input.numel() > 0)
    iterative_pinv(problem(input, iterations, global_init, static_cast<float*>(inverse.mutable_data_ptr())));
  return inverse;
}

Tensor backward(const Tensor& grad_output, const Tensor& matrix, int64_t iterations, bool global_init) {
  const Tensor input = torch::stable::contiguous(matrix), grad = torch::stable::contiguous(grad_output);
  Tensor grad_matrix = torch::stable::empty_like(input);
  if (input.numel() > 0)
    iterative_pinv_backward(
        {problem(input, iterations, global_init, nullptr), static_cast<const float*>(grad.const_data_ptr()),
         static_cast<float*>(grad_matrix.mutable_data_ptr())});
  return grad_matrix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) {
  m.impl("iterative_pinv_native", TORCH_BOX(&forward));
  m.impl("iterative_pinv_backward_native", TORCH_BOX(&backward));
}

}  // namespace nystromgan
