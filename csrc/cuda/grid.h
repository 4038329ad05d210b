// Blocks of a grid of tokens, row-major: the first size mod count blocks of an axis have a token more than the others.
#pragma once

#include <stdint.h>

namespace nystromgan {

constexpr int kGridAxes = 3;

// n / divisor = n factor / 2^shift for n < 2^31: a division takes two dozen instructions on a GPU, this takes two.
struct Divisor {
  uint32_t factor, shift;
};

struct Axis {
  int size, count;     // positions and blocks
  int length, longer;  // tokens of a shorter block, and how many blocks are longer
  Divisor by_size, by_length, by_longer_length;
};

struct Grid {
  Axis axes[kGridAxes];  // the last one first
  int num_axes;
};

}  // namespace nystromgan
