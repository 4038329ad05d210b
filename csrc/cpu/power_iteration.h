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

// Rows [first_row, first_row + rows) of a weight, the unit of parallel work: a function of the shapes alone, so that
// sums keep their order whatever the number of threads.
struct RowBlock {
  int64_t weight, index, first_row, rows;
};

// The blocks of all weights, and the order in which threads take them: a block's task at a stage starts once every block
// of its weight has been through the stages before. Where a task waits, those that it waits for come before it.
struct Task {
  int64_t block, stage;
};

// How far a weight is.
struct Progress {
  int64_t num_blocks;
  int64_t arrived;   // blocks that are through the stage at hand
  int64_t finished;  // stages that every block is through
};

struct Schedule {
  ParallelRun run;
  const RowBlock* blocks;
  const Task* tasks;
  int64_t num_blocks, num_tasks;
  Progress* progress;  // [num_weights]
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

// Stages: each iteration, or without any the evaluation of sigma; then W / sigma where outputs are given.
struct PowerIteration {
  Schedule schedule;
  int64_t iterations;
  float eps;
  bool stores_vectors;  // whether u and v go back to the caller's
  const Weight* weights;
  const PowerState* states;
  int64_t num_weights;
  void* const* outputs;  // W / sigma, contiguous, in the weights' dtypes, or nullptr
};

// One stage.
struct SpectralNormalize {
  Schedule schedule;
  const Weight* weights;
  const float* sigma;    // [num_weights]
  void* const* outputs;  // contiguous, in the weights' dtypes
};

// dW = (dW_sn - <dW_sn, W_sn> u v^T) / sigma. Stages: the product; the gradient.
struct SpectralNormalizeBackward {
  Schedule schedule;
  const Weight* grad_outputs;   // dW_sn
  const void* const* outputs;   // W_sn, contiguous, in the dtypes of grad_outputs, as are grad_weights
  const float* sigma;           // [num_weights]
  const float* const* u;        // [rows] each
  const float* const* v;        // [cols] each
  void* const* grad_weights;    // dW
  double* const* products;      // [num_blocks] each: every row block's share of <dW_sn, W_sn>
};

}  // namespace nystromgan
