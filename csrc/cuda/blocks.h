// Which block of a grid a token lies in, and which landmark it has.
#pragma once

#include "device.h"
#include "landmarks.h"

namespace nystromgan {

DEVICE int divide(int n, Divisor divisor) {
  return static_cast<int>((uint64_t{static_cast<uint32_t>(n)} * divisor.factor) >> divisor.shift);
}

// The block of a token.
DEVICE int block_of(const Grid& grid, int token) {
  int block = 0, step = 1;
  for (int i = 0; i < grid.num_axes; ++i) {
    const Axis& axis = grid.axes[i];
    const int rest = divide(token, axis.by_size), position = token - rest * axis.size;
    const bool in_longer = position < axis.longer * (axis.length + 1);
    block += step * divide(in_longer ? position : position - axis.longer, in_longer ? axis.by_longer_length : axis.by_length);
    step *= axis.count;
    token = rest;
  }
  return block;
}

// The tokens of a block.
DEVICE int tokens_of(const Grid& grid, int block) {
  int tokens = 1;
  for (int i = 0; i < grid.num_axes; ++i) {
    const Axis& axis = grid.axes[i];
    tokens *= axis.length + (block % axis.count < axis.longer);
    block /= axis.count;
  }
  return tokens;
}

DEVICE int landmark_of(const Index& index, int64_t batch, int64_t head, int token) {
  return index.data ? index.data[batch * index.batch + head * index.head + token] : block_of(index.grid, token);
}

}  // namespace nystromgan
