// What the iterative_pinv binding hands to its kernels, free of torch and of any instruction set.
#pragma once

#include "../common/types.h"

namespace nystromgan {

struct PinvForward {
  int64_t batch, size;  // matrices, rows of each
  int64_t iterations;
  bool global_init;
  const float* matrix;  // [batch, size, size]
  float* inverse;       // [batch, size, size]
  ParallelRun run;
  int64_t threads;  // of run
};

struct PinvBackward {
  PinvForward forward;       // as it ran; its inverse is not read
  const float* grad_output;  // [batch, size, size]
  float* grad_matrix;        // [batch, size, size]
};

}  // namespace nystromgan
