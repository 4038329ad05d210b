// What the attention kernels of both ops take.
//
// B batch, H heads, N queries, S keys, D and E channels of a head. A landmark is a query of the pass over the keys, and a
// key of the pass over the queries.
#pragma once

#include <stdint.h>

#include "../common/types.h"

namespace nystromgan {

// Rows of one block, 16 a warp: of float32 half as many, since they take twice the shared memory.
template <class T>
constexpr int kBlockRows = sizeof(T) == 4 ? 32 : 64;

// A tensor (B, H, tokens, channels) of any strides, in elements; `wide` where 16 bytes can be read at once.
struct Operand {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, channel = 0;
  bool wide = false;
};

// The numbers of a call that every pass shares.
struct AttendSizes {
  int heads, rows, others;  // `rows` are the tokens that a block owns, `others` those that it runs through
  int dim, value_dim;       // D and E
  int row_groups, row_steps, slices, splits, split_others, stages;
  float scale_log2;  // s log2(e)
};

enum class Scalar { none, float32, bfloat16, float16, float64 };

struct AttendForward {
  AttendSizes sizes;
  Operand query, key, value;
  const uint8_t* mask;  // (B, S), nonzero = ignore; null for none
  Operand output;       // of the splits instead, where there are several:
  float *sums, *largest, *totals;  // (B H, splits, N, E), (B H, splits, N) twice; unnormalised, maxima to base 2
  Operand attended, residual;      // the result before gamma, and what is added; null for none
  float* logsumexp;                // (B H, N), natural; infinite for a row without a key; null for none
  const void* gamma;
  Scalar gamma_type;
};

// What a token gets of the gradient of the mean that it is in.
struct Spread {
  const float* grad_means;  // (B H, M, channels), from one head to the next by `head`; null for none
  int64_t head;
  const int32_t* index;  // (B|1, H|1, tokens), -1 for none
  int64_t index_batch, index_head;
  const float* counts;  // (B|1, H|1, M)
  int64_t count_batch, count_head;
  const uint8_t* only;  // (B): the rows of the batch that get it; null for all
};

enum class GradientOf { stats, query, key_value };

// Own tokens have channels `first` (D) and `second` (E); of a query these are the query and dO, of a key the key and value.
struct AttendGradient {
  AttendSizes sizes;
  Operand first, second, other_first, other_second;
  const uint8_t* mask;  // (B, S)
  float *logsumexp, *delta;  // (B H, N), natural: of the queries; what GradientOf::stats makes
  float lift;                // weights are made 2^lift times as large, so that half precision holds those of long rows
  const void* gamma;
  Scalar gamma_type;
  float scale;
  Operand grad_first, grad_second;    // of the splits instead, where there are several:
  float *sums_first, *sums_second;    // (B H, splits, tokens, channels)
  Spread spread_first, spread_second;
};

}  // namespace nystromgan
