// The whole forward of nystrom_attention in one launch, where it applies.
#pragma once

#include "landmark_launch.h"
#include "nystrom_single.h"

namespace nystromgan {

// What one call works on. Tensors are float32 but for the tokens and `output`; landmarks are to be made where an index is
// given for them, and lie in `query_means` and `key_means` otherwise.
struct SingleCall {
  const Tensor &query, &key, &value, &output, &query_means, &key_means, &context, &mixed, &logsumexp;
  std::optional<Index> query_index, key_index;
  const std::optional<Tensor> &key_padding_mask, &query_absent, &key_absent, &exact;
  const std::optional<Index>& value_index;  // of the exact rows' keys
  double scale;
  int64_t iterations;
};

// Whether the sizes of one head, which alone decide, are those of a single launch.
bool takes_single_launch(Dtype dtype, int64_t queries, int64_t keys, int64_t landmarks, int64_t widest, bool global_init);

void launch_single(const SingleCall& call);

}  // namespace nystromgan
