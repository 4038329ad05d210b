// The small passes beside attention: rows of dO . O, and the sum of many numbers.
#pragma once

#include "attend_small_problems.h"
#include "device.h"

namespace nystromgan {

template <class T>
DEVICE void row_dots(const RowDots& p) {
  const bool by_warp = !p.channel_major;
  const int64_t index = int64_t{block_index()} * num_threads() + thread_index();
  const int64_t row = by_warp ? index / 32 : index;
  const int64_t batch_head = row / p.tokens, token = row % p.tokens;
  const int64_t batch = batch_head / p.heads, head = batch_head % p.heads;
  float sum = 0.0f;
  if (row < p.rows) {
    const Operand &a = p.grad_output, &b = p.output;
    const T* x = static_cast<const T*>(a.data) + batch * a.batch + head * a.head + token * a.token;
    const T* y = static_cast<const T*>(b.data) + batch * b.batch + head * b.head + token * b.token;
    for (int channel = by_warp ? lane_index() : 0; channel < p.channels; channel += by_warp ? 32 : 1)
      sum += to_float(x[channel * a.channel]) * to_float(y[channel * b.channel]);
  }
  if (by_warp) sum = warp_sum(sum);
  if (row < p.rows && (!by_warp || lane_index() == 0)) p.delta[row] = sum;
}

// By one block, in an order that the count alone fixes.
DEVICE void total(const Total& p) {
  float* s_parts = reinterpret_cast<float*>(shared_memory());
  float sum = 0.0f;
  for (int64_t i = thread_index(); i < p.count; i += num_threads()) sum += p.x[i];
  sum = warp_sum(sum);
  if (lane_index() == 0) s_parts[warp_index()] = sum;
  sync_block();
  if (thread_index()) return;
  sum = 0.0f;
  for (int i = 0; i < num_threads() / 32; ++i) sum += s_parts[i];
  *p.sum = sum;
}

}  // namespace nystromgan
