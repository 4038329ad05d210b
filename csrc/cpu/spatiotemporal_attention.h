// What the kernels of spatiotemporal_attention take. Notation: B batch, H heads, N queries, S keys, C and E channels.
#pragma once

#include "../common/types.h"

namespace nystromgan {

// (B, H, channels, tokens) in the storage type of the call; strides in elements. `data` is null where it is absent.
struct Maps {
  void* data;
  int64_t batch_stride, head_stride, channel_stride, token_stride;
};

struct AttentionForward {
  ParallelRun run;
  Dtype dtype;
  int64_t batch, heads, queries, keys, channels, value_channels;  // B, H, N, S, C, E
  const int64_t* key_counts;                                      // [B]: the first keys that a sample really has
  Maps query, key, value, residual;
  float gamma, scale;
  Maps output, attended;
  float* logsumexp;  // [B, H, N], natural; null: not wanted
};

struct AttentionBackward {
  ParallelRun run;
  Dtype dtype;
  int64_t batch, heads, queries, keys, channels, value_channels;
  const int64_t* key_counts;  // [B]
  Maps grad_output, query, key, value, attended;
  const float* logsumexp;  // [B, H, N]
  float gamma, scale;
  Maps grad_query, grad_key, grad_value;  // of the keys past key_counts, nothing is written
  float* grad_gamma;                      // [1]
};

}  // namespace nystromgan
