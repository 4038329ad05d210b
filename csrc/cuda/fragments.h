// Tensor-core operands 16 deep of any storage type: halves as they are, float32 as two halves of tf32 (tf32.h).
#pragma once

#include "tf32.h"

namespace nystromgan {

template <class T>
struct Left {  // m16 k16
  uint32_t x[4];
};
template <>
struct Left<float> {
  SplitLeft x[2];
};

template <class T>
struct Right {  // k16, two n8
  uint32_t x[2][2];
};
template <>
struct Right<float> {
  SplitRight x[2][2];
};

// Rows [row, row + 16) of an operand at depth [depth, depth + 16). BY_ROW where its rows are rows in memory, `stride`
// elements apart; else its depths are.
template <bool BY_ROW, class T>
DEVICE Left<T> left_at(const T* s, int stride, int row, int depth) {
  Left<T> left;
  if constexpr (sizeof(T) == 4) {
    UNROLL
    for (int i = 0; i < 2; ++i) left.x[i] = left_of(Matrix<!BY_ROW>{s, stride}, row, depth + 8 * i);
  } else {
    const int r = lane_index() % 8, first = lane_index() / 8 % 2 * 8, second = lane_index() / 16 * 8;
    if constexpr (BY_ROW)
      load_matrices<false>(left.x, s + (row + first + r) * stride + depth + second);
    else
      load_matrices<true>(left.x, s + (depth + second + r) * stride + row + first);
  }
  return left;
}

// Columns [column, column + 16) of an operand at depth [depth, depth + 16). BY_COLUMN where columns are rows in memory.
template <bool BY_COLUMN, class T>
DEVICE Right<T> right_at(const T* s, int stride, int column, int depth) {
  Right<T> right;
  if constexpr (sizeof(T) == 4) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      UNROLL
      for (int i = 0; i < 2; ++i)
        right.x[j][i] = right_of(Matrix<BY_COLUMN>{s, stride}, depth + 8 * i, column + 8 * j);
    }
  } else {
    const int r = lane_index() % 8, first = lane_index() / 8 % 2 * 8, second = lane_index() / 16 * 8;
    uint32_t x[4];
    if constexpr (BY_COLUMN)
      load_matrices<false>(x, s + (column + second + r) * stride + depth + first);
    else
      load_matrices<true>(x, s + (depth + first + r) * stride + column + second);
    UNROLL
    for (int j = 0; j < 2; ++j) {
      UNROLL
      for (int i = 0; i < 2; ++i) right.x[j][i] = x[2 * j + i];
    }
  }
  return right;
}

// Two n8 results as they lie in registers, as the left operand of the next product.
template <class T>
DEVICE Left<T> left_from(const Fragment& c0, const Fragment& c1) {
  if constexpr (sizeof(T) == 4)
    return {{split_left(c0.x[0], c0.x[2], c0.x[1], c0.x[3]), split_left(c1.x[0], c1.x[2], c1.x[1], c1.x[3])}};
  else
    return {{pack<T>(c0.x[0], c0.x[1]), pack<T>(c0.x[2], c0.x[3]), pack<T>(c1.x[0], c1.x[1]), pack<T>(c1.x[2], c1.x[3])}};
}

template <class T>
DEVICE void multiply(Fragment& c0, Fragment& c1, const Left<T>& a, const Right<T>& b) {
  if constexpr (sizeof(T) == 4) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      multiply(c0, a.x[i], b.x[0][i]);
      multiply(c1, a.x[i], b.x[1][i]);
    }
  } else {
    multiply_half<T>(c0, a.x, b.x[0]);
    multiply_half<T>(c1, a.x, b.x[1]);
  }
}

}  // namespace nystromgan
