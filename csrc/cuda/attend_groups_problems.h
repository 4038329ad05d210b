// What the attention kernels take whose products are those of groups of warps.
#pragma once

#include "attend.h"
#include "tensor_map.h"

namespace nystromgan {

constexpr int kMapDim = 32;    // channels of maps' queries and keys, filled up with zeros
constexpr int kTokenDim = 64;  // of tokens', and of their values
constexpr int kMostMapConsumers = 2, kTokenConsumers = 1;  // groups of a block that compute, 64 rows each
constexpr int kMapCopiers = 128, kTokenCopiers = 32;       // its other threads
constexpr int kTokenBlocks = 3;                            // that a multiprocessor has registers for
constexpr int kMostStages = 4;

struct GroupForward {
  AttendForward pass;
  int consumers;
  bool boxes;  // whether the copy engine brings everything
  TensorMap query, key, value;
};

struct GroupGradient {
  AttendGradient pass;
  int consumers;
  bool boxes;
  TensorMap first, second, other_first, other_second;
};

}  // namespace nystromgan
