// Products of float32 matrices in shared memory to float32's digits, on tensor cores.
//
// x = high + low, each cut to tf32's 11 bits: a b = low high + high low + high high, and low low is below rounding.
// Depth runs through a step of eight in the order 0 2 4 6 1 3 5 7, the same for both operands: then what a product leaves
// in registers is, as it lies, the left operand of the next.
#pragma once

#include "device.h"

namespace nystromgan {

struct Split {
  uint32_t high, low;
};

DEVICE Split split(float x) {
  const uint32_t high = tf32_of(x);
  return {high, tf32_of(x - float_of(high))};
}

struct SplitLeft {  // (row g, depth 2t), (g + 8, 2t), (g, 2t + 1), (g + 8, 2t + 1)
  uint32_t high[4], low[4];
};

struct SplitRight {  // (depth 2t, column g), (2t + 1, g)
  uint32_t high[2], low[2];
};

DEVICE SplitLeft split_left(float x0, float x1, float x2, float x3) {
  const Split s[4] = {split(x0), split(x1), split(x2), split(x3)};
  return {{s[0].high, s[1].high, s[2].high, s[3].high}, {s[0].low, s[1].low, s[2].low, s[3].low}};
}

DEVICE SplitRight split_right(float x0, float x1) {
  const Split s[2] = {split(x0), split(x1)};
  return {{s[0].high, s[1].high}, {s[0].low, s[1].low}};
}

// c += a b, m16n8k8.
DEVICE void multiply(Fragment& c, const SplitLeft& a, const SplitRight& b) {
  multiply_tf32(c, a.low, b.high);
  multiply_tf32(c, a.high, b.low);
  multiply_tf32(c, a.high, b.high);
}

// A float32 matrix, or its transpose, with `stride` elements from one row in memory to the next.
template <bool TRANSPOSED>
struct Matrix {
  const float* data;
  int stride;

  DEVICE float at(int row, int column) const {
    return TRANSPOSED ? data[column * stride + row] : data[row * stride + column];
  }
};

template <bool TRANSPOSED>
DEVICE SplitLeft left_of(const Matrix<TRANSPOSED>& x, int row, int depth) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  row += g, depth += 2 * t;
  return split_left(x.at(row, depth), x.at(row + 8, depth), x.at(row, depth + 1), x.at(row + 8, depth + 1));
}

template <bool TRANSPOSED>
DEVICE SplitRight right_of(const Matrix<TRANSPOSED>& x, int depth, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  return split_right(x.at(depth + 2 * t, column + g), x.at(depth + 2 * t + 1, column + g));
}

// c += rows [row, row + 16) of a times columns [column, column + 8 COLUMNS) of b, over `depth` in steps of 8.
template <int COLUMNS, class Left, class Right>
DEVICE void multiply_rows(Fragment (&c)[COLUMNS], const Left& a, const Right& b, int row, int column, int depth) {
#if !NYSTROMGAN_EMULATION
#pragma unroll 2
#endif
  for (int k = 0; k < depth; k += 8) {
    const SplitLeft left = left_of(a, row, k);
    UNROLL
    for (int j = 0; j < COLUMNS; ++j) multiply(c[j], left, right_of(b, k, column + 8 * j));
  }
}

template <int COUNT>
DEVICE void clear(Fragment (&c)[COUNT]) {
  UNROLL
  for (int j = 0; j < COUNT; ++j) c[j] = {{0.0f, 0.0f, 0.0f, 0.0f}};
}

// Calls body(row, column, x) for every element of 16 rows of results that this lane holds.
template <int COLUMNS, class Body>
DEVICE void for_each_element(Fragment (&c)[COLUMNS], int row, int column, Body body) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  UNROLL
  for (int j = 0; j < COLUMNS; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) body(row + g + 8 * (i / 2), column + 8 * j + 2 * t + i % 2, c[j].x[i]);
  }
}

}  // namespace nystromgan
