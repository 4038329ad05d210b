// Blocks of a grid of tokens, row-major: the first size mod count blocks of an axis have a token more than the others.
#pragma once

#include <stdint.h>

#include "device.h"

namespace nystromgan {

constexpr int kGridAxes = 3;

// n / divisor = n factor / 2^shift for n < 2^31: a division takes two dozen instructions on a GPU, this takes two.
struct Divisor {
  uint32_t factor, shift;
};

struct Axis {
  int size, count;            // positions and blocks
  int length, longer;         // tokens of a shorter block, and how many blocks are longer
  Divisor by_size, by_length, by_longer_length;
};

struct Grid {
  Axis axes[kGridAxes];  // the last one first
  int num_axes;
};

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

}  // namespace nystromgan
