// Tiles of 64 tokens for products by groups of warps, as the copy engine lays them out: rows of 128 bytes, swizzled.
#pragma once

#include "group.h"
#include "tokens.h"

namespace nystromgan {

// Of maps, where CHANNEL_MAJOR, a channel is a row; of tokens a token is, in a panel for every 64 channels.
template <class T, bool CHANNEL_MAJOR>
struct GroupTile {
  using Element = T;
  static constexpr int kTokens = 64, kColumns = 64, kPanel = kTokens * kColumns;
  static constexpr bool kChannelMajor = CHANNEL_MAJOR;
  T* data;
  int channels;  // a multiple of 16, or of 64 where tokens are rows

  DEVICE static constexpr int elements(int channels) { return kTokens * channels; }
  DEVICE T* at(int row, int column) const {
    return data + column / kColumns * kPanel + kColumns * row + ((column % kColumns / 8 ^ row % 8) * 8 + column % 8);
  }
  // Channels [channel, channel + 16) as the depth of logits; tokens [token, token + 16) as that of a weighted sum.
  DEVICE uint64_t from_channel(int channel) const {
    if constexpr (CHANNEL_MAJOR) return shared_operand(data + kColumns * channel);
    return shared_operand(data + channel / kColumns * kPanel + channel % kColumns);
  }
  DEVICE uint64_t from_token(int token) const {
    return shared_operand(data + (CHANNEL_MAJOR ? token : kColumns * token));
  }
};

#if HAS_GROUPS

// c = all tokens of `left` against all of `right`, over CHANNELS; each warp gets its 16 rows.
template <int CHANNELS, class T, bool CHANNEL_MAJOR>
DEVICE void logits(Fragment (&c)[8], const GroupTile<T, CHANNEL_MAJOR>& left, const GroupTile<T, CHANNEL_MAJOR>& right) {
  clear(c);
  begin_products(c);
  UNROLL
  for (int channel = 0; channel < CHANNELS; channel += 16)
    multiply_shared<T, CHANNEL_MAJOR>(c, left.from_channel(channel), right.from_channel(channel));
  finish_products(c);
}

// c += weights (each warp's 16 rows, all tokens of x) times the channels of x.
template <int CHANNELS, class T, bool CHANNEL_MAJOR>
DEVICE void add_weighted(Fragment (&c)[CHANNELS / 8], const Fragment (&weights)[8], const GroupTile<T, CHANNEL_MAJOR>& x) {
  Left<T> left[4];
  UNROLL
  for (int i = 0; i < 4; ++i) left[i] = left_from<T>(weights[2 * i], weights[2 * i + 1]);
  begin_products(c);
  UNROLL
  for (int i = 0; i < 4; ++i) multiply_shared<T, CHANNELS, !CHANNEL_MAJOR>(c, left[i], x.from_token(16 * i));
  finish_products(c);
}

#endif

}  // namespace nystromgan
