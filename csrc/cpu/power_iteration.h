// What the grouped power iteration's kernels take from their binding. Strides are in elements.
#pragma once

#include "../common/types.h"

namespace nystromgan {

struct Vector {
  void* data;
  Dtype dtype;
  int64_t stride;
};

// One weight matrix W [rows, cols].
struct Weight {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;
};

// What one weight's iteration reads and writes beside the weight. The fp32 vectors are those that the call works with.
struct PowerState {
  Vector u_buffer, v_buffer;  // [rows], [cols]: the caller's
  float* u;                   // [rows]
  float* v;                   // [cols]
  float* sigma;               // [1]
  float* partials;            // [num_blocks, partial_stride]: every row block's share of W^T W v
  int64_t num_blocks, partial_stride;
};

// Rows [first_row, first_row + rows) of a weight, the unit of parallel work: a function of the shapes alone, so that
// sums keep their order whatever the number of threads.
struct RowBlock {
  int64_t weight, index, first_row, rows;
};

struct PowerIteration {
  ParallelRun run;
  int64_t iterations;
  float eps;
  const Weight* weights;
  const PowerState* states;
  int64_t num_weights;
  const RowBlock* blocks;
  int64_t num_blocks;
};

struct SpectralNormalize {
  ParallelRun run;
  const Weight* weights;
  const float* sigma;    // [num_weights]
  void* const* outputs;  // contiguous, in the weights' dtypes
  const RowBlock* blocks;
  int64_t num_blocks;
};

// dW = (dW_sn - <dW_sn, W_sn> u v^T) / sigma.
struct SpectralNormalizeBackward {
  ParallelRun run;
  const Weight* grad_outputs;   // dW_sn
  const void* const* outputs;   // W_sn, contiguous, in the dtypes of grad_outputs, as are grad_weights
  const float* sigma;           // [num_weights]
  const float* const* u;        // [rows] each
  const float* const* v;        // [cols] each
  void* const* grad_weights;    // dW
  double* products;             // [num_blocks]: every row block's share of <dW_sn, W_sn>
  float* alongs;                // [num_weights]: <dW_sn, W_sn>
  const RowBlock* blocks;
  int64_t num_weights, num_blocks;
};

}  // namespace nystromgan
