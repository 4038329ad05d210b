// What the nystrom_attention binding hands to its kernels, free of torch and of any instruction set.
//
// B batch, H heads, N query tokens, S key tokens, M landmarks, D query/key head dim, E value head dim.
#pragma once

#include "../common/types.h"

namespace nystromgan {

// A tensor (B, H, tokens, channels) of any strides, in elements.
struct Tokens {
  void* data;
  int64_t batch, head, token, channel;
};

// The landmark of each token, int32 (B|1, H|1, tokens), -1 for none; strides in elements, 0 where there is one for all.
struct LandmarkIndex {
  const int32_t* data = nullptr;
  int64_t batch = 0, head = 0;
};

struct NystromProblem {
  int64_t batch, heads, queries, keys, landmarks, head_dim, value_dim;
  float scale;
  int64_t pinv_iterations;
  bool global_init;
  Dtype dtype;
  ParallelRun run;
  int64_t threads;  // of run
  Tokens query, key, value;
  LandmarkIndex query_index, key_index;
  const bool *key_padding_mask, *query_landmark_mask, *key_landmark_mask;  // [B, S], [B, M], [B, M]; null for none
  const bool* exact_rows;                                                  // [B]; null for none
  const float* conv_weight;                                                // [H, taps]; null for none, with 0 taps
  int64_t taps;
  float gamma;  // 1 for none
  // Kept for the backward, and what it reads:
  float *query_means, *key_means;  // [B, H, M, D]
  float *context, *mixed;          // G V and Z (G V), [B, H, M, E]
  float* logsumexp;                // of G's rows, [B, H, M]
  float* iterates;                 // what PinvApply keeps, [B, H, iterates_size]; null where it is made again
};

struct NystromForward {
  NystromProblem problem;
  bool pool_query, pool_key;  // whether the means are to be made, or are given
  Tokens residual;            // null for none
  Tokens output;              // gamma (F W + convolution) + residual
};

struct NystromBackward {
  NystromProblem problem;
  Tokens grad_output, grad_query, grad_key, grad_value;
  float *grad_query_means, *grad_key_means;  // [B, H, M, D]
  float *grad_conv_weight, *grad_gamma;      // [H, taps], []; null for none
};

struct ClusterProblem {
  int64_t batch, heads, tokens, landmarks, dim, iterations;
  Dtype dtype;
  ParallelRun run;
  Tokens x;
  LandmarkIndex start;
  const bool *landmark_mask, *frozen_rows;  // [B, M], [B]; null for none
  float* means;                             // [B, H, M, D]
  int32_t* index;                           // [B, H, tokens]
};

}  // namespace nystromgan
