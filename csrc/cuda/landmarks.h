// What the passes over landmarks take that are not attention.
//
// Letters: B batch, H heads, M landmarks, D and E channels.
#pragma once

#include "attend.h"
#include "grid.h"

namespace nystromgan {

constexpr int kLandmarkThreads = 256, kCountThreads = 1024, kMostLandmarks = 512;
constexpr int kSumChannels = 32;  // of one block of index sums: one a lane

// Each token's landmark, -1 for none: as memory has it, or else its block of a grid.
struct Index {
  const int32_t* data = nullptr;  // (B|1, H|1, tokens)
  int64_t batch = 0, head = 0;    // 0 where there is one for all
  Grid grid{};
};

// Sums and counts of every landmark's tokens, by splits of the tokens.
struct IndexSums {
  Operand tokens;
  Index index;
  float* sums;    // (B H, splits, M, D)
  float* counts;  // (B H, splits, M)
  int heads, num_tokens, landmarks, dim, splits, split;
};

// Their means; of a landmark without tokens zeros, or its row of `fallback`.
struct IndexMeans {
  const float *sums, *counts;
  const float* fallback;  // (B H, M, D), null for none
  float* means;           // (B H, M, D)
  int64_t rows;           // B H M
  int landmarks, dim, splits;
};

struct IndexCounts {
  Index index;    // in memory
  float* counts;  // (B|1, H|1, M)
  int heads, num_tokens, landmarks;
};

// The index that a grid is, and its counts.
struct GridIndex {
  Grid grid;
  int32_t* index;  // (tokens)
  float* counts;   // (M)
  int num_tokens, landmarks;
};

// out = x in another dtype; where `only` is given, `other` instead in the rows of the batch that it marks, and both stored.
struct Convert {
  float* x;
  const float* other;
  const uint8_t* only;  // (B)
  void* out;            // null where x is to be corrected alone
  int64_t count, of_one_row;  // elements in all, and of one row of the batch
};

// Rows of A from its logits, in place.
struct CoreSoftmax {
  float* core;  // (B H, M, M)
  const uint8_t *query_absent, *key_absent;  // (B, M), null for none
  int64_t rows;                              // B H M
  int heads, landmarks;
  float scale_log2;
};

// dS = s A (dA - rows of A . dA), in place of dA.
struct CoreGradient {
  const float* core;
  float* grad;
  int64_t rows;
  int landmarks;
  float scale;
};

// G V from its splits, in their order, and the logarithm of its rows' sums.
struct Merge {
  const float *sums, *largest, *totals;  // (B H, splits, M, E), (B H, splits, M) twice
  const uint8_t* query_absent;           // (B, M)
  float *context, *logsumexp;            // (B H, M, E), (B H, M)
  int64_t rows;
  int heads, landmarks, dim, splits;
};

// out = base + the sum of the splits' parts, in their order.
struct Reduce {
  const float *parts, *base;  // (B H, splits, size), (B H, size); null for no base
  float* out;                 // (B H, size)
  int64_t heads, size;        // B H
  int splits;
};

// d(G V) without the rows that there are not, and its rows' products with G V.
struct ContextGradient {
  float* grad;
  const float* context;                // (B H, M, E)
  const uint8_t *query_absent, *exact;  // (B, M), (B); null for none
  float* delta;                        // (B H, M)
  int64_t rows;
  int heads, landmarks, dim;
};

// out = alpha A B + beta out of every head; zeros in the rows of the batch that `zero` marks.
struct Matmul {
  float* out;
  const float *a, *b;
  float alpha, beta;
  int64_t count, stride_out, stride_a, stride_b;  // heads, and from one to the next
  int rows, columns, depth, row_stride_a, row_stride_b;
  const uint8_t* zero;
  int heads;
};

// One Lloyd step's assignment: the largest x . m - |m|^2 / 2, the first of equals.
struct Assign {
  Operand tokens;
  Index start;
  const float* landmarks;           // (B H, M, D)
  const uint8_t *absent, *frozen;   // (B, M), (B); null for none
  int32_t* index;                   // (B H, tokens)
  int heads, num_tokens, num_landmarks, dim;
};

}  // namespace nystromgan
