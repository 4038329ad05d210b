// The assignment of a Lloyd step: each token to its nearest landmark, by products to float32's digits whatever its dtype.
#pragma once

#include "landmarks.h"
#include "tokens.h"

namespace nystromgan {

constexpr int kAssignTokens = 32;  // of a block, and landmarks that come by at a time

// Rows of any dtype as a float32 tile, zeros outside.
template <class T>
DEVICE void fill_tile(const Tile<float, kAssignTokens, false>& tile, const Head<T>& x, int first) {
  for (int i = thread_index(); i < kAssignTokens * tile.channels; i += num_threads()) {
    const int row = i / tile.channels, channel = i % tile.channels;
    const bool inside = first + row < x.tokens && channel < x.channels;
    tile.data[row * tile.stride() + channel] =
        inside ? to_float(x.data[(first + row) * x.token + channel * x.channel]) : 0.0f;
  }
}

template <class T>
DEVICE void assign(const Assign& p) {
  using Rows = Tile<float, kAssignTokens, false>;
  const int blocks = ceil_div(p.num_tokens, kAssignTokens), dim = padded_channels(p.dim);
  const int64_t batch_head = block_index() / blocks, batch = batch_head / p.heads, head = batch_head % p.heads;
  const int first = block_index() % blocks * kAssignTokens;
  float* s = reinterpret_cast<float*>(shared_memory());
  const Rows tokens{s, dim}, landmarks{s + Rows::elements(dim), dim};
  float* s_half_squares = landmarks.data + Rows::elements(dim);
  fill_tile<T>(tokens, head_of<T>(p.tokens, batch, head, p.num_tokens, p.dim), first);
  const Head<float> means{p.landmarks + batch_head * p.num_landmarks * p.dim, p.dim, 1, p.num_landmarks, p.dim, false};
  const uint8_t* absent = p.absent ? p.absent + batch * p.num_landmarks : nullptr;
  float best[2] = {-INFINITY, -INFINITY}, place[2] = {0.0f, 0.0f};  // places are exact: there are at most 512
  for (int start = 0; start < p.num_landmarks; start += kAssignTokens) {
    sync_block();
    fill_tile<float>(landmarks, means, start);
    sync_block();
    for (int row = warp_index(); row < kAssignTokens; row += num_threads() / 32) {
      float square = 0.0f;
      for (int channel = lane_index(); channel < dim; channel += 32) {
        const float x = landmarks.data[row * landmarks.stride() + channel];
        square += x * x;
      }
      square = warp_sum(square);
      if (lane_index() == 0) s_half_squares[row] = 0.5f * square;
    }
    sync_block();
    Fragment c[kAssignTokens / 8];
    logits(c, tokens, landmarks, 16 * warp_index());
    UNROLL
    for (int j = 0; j < kAssignTokens / 8; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * j + 2 * (lane_index() % 4) + i % 2, landmark = start + column;
        const bool there = landmark < p.num_landmarks && !(absent && absent[landmark]);
        const float score = there ? c[j].x[i] - s_half_squares[column] : -INFINITY;
        if (score > best[i / 2]) best[i / 2] = score, place[i / 2] = static_cast<float>(landmark);
      }
    }
  }
  UNROLL
  for (int h = 0; h < 2; ++h) {
    const float largest = row_max(best[h]);
    const float nearest = -row_max(best[h] == largest ? -place[h] : -INFINITY);
    const int token = first + 16 * warp_index() + lane_index() / 4 + 8 * h;
    if (lane_index() % 4 || token >= p.num_tokens) continue;
    const int start = p.start.data[batch * p.start.batch + head * p.start.head + token];
    const bool stays = start < 0 || (p.frozen && p.frozen[batch]);
    p.index[batch_head * p.num_tokens + token] = stays ? start : static_cast<int>(nearest);
  }
}

}  // namespace nystromgan
