// What the power_iteration binding hands to its kernels. A weight has O rows and I columns.
#pragma once

#include <stdint.h>

#include "../common/types.h"

namespace nystromgan {

constexpr int kMostWeights = 128;  // of one launch: they travel as its arguments, of which a GPU takes 32 KiB
constexpr int kPowerThreads = 256, kMostItemRows = 4096, kColumnBlock = 1024;
constexpr int64_t kNormalizeBlock = 8192;

// A weight (O, I) of any strides, its vectors, and its places in what all weights share.
struct PowerWeight {
  const void* data;
  void *u, *v;         // [O], [I]: the caller's
  int64_t rows, columns, row_stride, column_stride, u_stride, v_stride;
  int64_t u_offset, v_offset;  // in uv
  int64_t share_offset;        // in shares
  int32_t first_item, item_rows;       // blocks of rows, a unit of work
  int32_t first_block;                 // blocks of columns, another
  int32_t place;                       // in sigma
  Dtype dtype, u_dtype, v_dtype;
  bool wide;  // whether 16 bytes of a row can be read at once
};

struct PowerIteration {
  float* uv;       // every u and then every v, as the call works with them
  float* shares;   // of each block of rows: its part of W^T t
  float* squares;  // (items): of each block of rows: its part of |t|^2, or of u^T t where nothing is iterated
  float* lengths;  // (blocks): of each block of columns: its part of |s|^2
  float* sigma;
  float eps;
  int32_t iterations, count, items, blocks;
  PowerWeight weights[kMostWeights];
};

struct NormalizeWeight {
  const void* data;
  void* output;  // contiguous
  int64_t rows, columns, row_stride, column_stride;
  int32_t first_block, place;
  Dtype dtype;
  bool contiguous;
};

struct SpectralNormalize {
  const float* sigma;
  int32_t count;
  NormalizeWeight weights[kMostWeights];
};

// W / sigma's gradient and the weight's, both contiguous as W / sigma is; u and v are in uv.
struct GradientWeight {
  const void *grad, *normalized;
  void* grad_weight;
  int64_t rows, columns, u_offset, v_offset;
  int32_t first_block, place;
  Dtype dtype;
};

struct NormalizeGradient {
  const float *sigma, *uv;
  float* dots;  // (blocks): each block's part of <dW_sn, W_sn>
  int32_t count;
  GradientWeight weights[kMostWeights];
};

}  // namespace nystromgan
