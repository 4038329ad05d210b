// What the small passes beside attention take.
#pragma once

#include "attend.h"

namespace nystromgan {

// delta (B H, N) = dO . O of every query.
struct RowDots {
  Operand grad_output, output;
  float* delta;
  int64_t rows;  // B H N
  int heads, tokens, channels;
  bool channel_major;  // whether neighbouring threads take neighbouring tokens, or channels
};

struct Total {
  const float* x;
  int64_t count;
  float* sum;
};

constexpr int kSmallThreads = 256;

}  // namespace nystromgan
