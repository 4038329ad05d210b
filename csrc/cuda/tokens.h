// Tiles of tokens in shared memory, laid out as they are in memory: rows of a token's channels, or of a channel's tokens.
#pragma once

#include "attend.h"
#include "fragments.h"

namespace nystromgan {

constexpr int kChannelStep = 16;  // channels are filled up to a multiple of this with zeros

DEVICE int padded_channels(int channels) { return ceil_div(channels, kChannelStep) * kChannelStep; }

// TOKENS tokens; rows are 16 bytes longer than they need to be, so that eight of them lie in different banks.
template <class T, int TOKENS, bool CHANNEL_MAJOR>
struct Tile {
  using Element = T;
  static constexpr int kTokens = TOKENS, kPad = 16 / sizeof(T);
  static constexpr bool kChannelMajor = CHANNEL_MAJOR;
  T* data;
  int channels;  // padded

  DEVICE int stride() const { return CHANNEL_MAJOR ? TOKENS + kPad : channels + kPad; }
  DEVICE static int elements(int channels) {
    return CHANNEL_MAJOR ? channels * (TOKENS + kPad) : TOKENS * (channels + kPad);
  }
  DEVICE T* at(int row, int column) const { return data + row * stride() + column; }
  // As the left operand: tokens are rows, channels the depth.
  DEVICE Left<T> left(int token, int channel) const { return left_at<!CHANNEL_MAJOR>(data, stride(), token, channel); }
  // As the right operand of logits: tokens are columns, channels the depth.
  DEVICE Right<T> tokens(int token, int channel) const {
    return right_at<!CHANNEL_MAJOR>(data, stride(), token, channel);
  }
  // As the right operand of a weighted sum: channels are columns, tokens the depth.
  DEVICE Right<T> channels_of(int channel, int token) const {
    return right_at<CHANNEL_MAJOR>(data, stride(), channel, token);
  }
};

// One head of an operand, from channel `first_channel` on.
template <class T>
struct Head {
  const T* data;
  int64_t token, channel;
  int tokens, channels;
  bool wide;
};

template <class T>
DEVICE Head<T> head_of(const Operand& x, int64_t batch, int64_t head, int tokens, int channels, int first_channel = 0) {
  const T* data = static_cast<const T*>(x.data) + batch * x.batch + head * x.head + first_channel * x.channel;
  return {data, x.token, x.channel, tokens, channels - first_channel, x.wide};
}

// Fills a tile from token `first` on, with zeros beyond the tokens and channels and where `mask` is set, which may hold
// anything. Copies 16 bytes at a time where the head allows, and is done when copies are waited for and the block meets.
template <class Tile, class T = typename Tile::Element>
DEVICE void copy_tile(const Tile& tile, const Head<T>& x, int first, const uint8_t* mask, int thread, int threads) {
  constexpr bool kChannelMajor = Tile::kChannelMajor;
  constexpr int kChunk = 16 / sizeof(T);
  const int lane = thread % 8, group = thread / 8, groups = threads / 8;
  const int rows = kChannelMajor ? tile.channels : Tile::kTokens, columns = kChannelMajor ? Tile::kTokens : tile.channels;
  const int row_end = kChannelMajor ? x.channels : x.tokens - first;  // of what there is
  const int column_end = kChannelMajor ? x.tokens - first : x.channels;
  const int64_t row_stride = kChannelMajor ? x.channel : x.token, column_stride = kChannelMajor ? x.token : x.channel;
  const T* start = x.data + first * x.token;
  if (x.wide && !(kChannelMajor && mask)) {
    for (int row = group; row < rows; row += groups) {
      const bool inside = row < row_end && !(mask && mask[first + row]);
      for (int column = lane * kChunk; column < columns; column += 8 * kChunk) {
        const int left = inside && column < column_end ? minimum(column_end - column, kChunk) : 0;
        const T* source = left ? start + row * row_stride + column : x.data;
        copy_async(tile.at(row, column), source, left * static_cast<int>(sizeof(T)));
      }
    }
    return;
  }
  for (int row = group; row < rows; row += groups)
    for (int column = lane; column < columns; column += 8) {
      const bool inside = row < row_end && column < column_end && !(mask && mask[first + (kChannelMajor ? column : row)]);
      *tile.at(row, column) = inside ? start[row * row_stride + column * column_stride] : T{};
    }
}

// By all threads of the block.
template <class Tile, class T = typename Tile::Element>
DEVICE void copy_tile(const Tile& tile, const Head<T>& x, int first, const uint8_t* mask) {
  copy_tile(tile, x, first, mask, thread_index(), num_threads());
}

// c = rows [row, row + 16) of `left` against all tokens of `right`, over their channels.
template <class T, int ROWS, int TOKENS, bool CHANNEL_MAJOR>
DEVICE void logits(Fragment (&c)[TOKENS / 8], const Tile<T, ROWS, CHANNEL_MAJOR>& left,
                   const Tile<T, TOKENS, CHANNEL_MAJOR>& right, int row) {
  clear(c);
  for (int channel = 0; channel < left.channels; channel += 16) {
    const Left<T> a = left.left(row, channel);
    UNROLL
    for (int j = 0; j < TOKENS / 8; j += 2) multiply(c[j], c[j + 1], a, right.tokens(8 * j, channel));
  }
}

// c += weights (16 rows, all tokens of x) times the channels of x from `first` on, as many of CHANNELS as it has.
template <int CHANNELS, class T, int TOKENS, bool CHANNEL_MAJOR>
DEVICE void add_weighted(Fragment (&c)[CHANNELS / 8], const Fragment (&weights)[TOKENS / 8],
                         const Tile<T, TOKENS, CHANNEL_MAJOR>& x, int first) {
  UNROLL
  for (int token = 0; token < TOKENS; token += 16) {
    const Left<T> a = left_from<T>(weights[token / 8], weights[token / 8 + 1]);
    UNROLL
    for (int j = 0; j < CHANNELS / 8; j += 2)
      if (first + 8 * j < x.channels) multiply(c[j], c[j + 1], a, x.channels_of(first + 8 * j, token));
  }
}

// Over the four lanes that hold a row of results.
DEVICE float row_max(float x) {
  x = max_of(x, shuffle_xor(x, 1));
  return max_of(x, shuffle_xor(x, 2));
}
DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Two numbers side by side, at a multiple of their size.
template <class T>
DEVICE void store_pair(T* to, float x0, float x1) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<Two*>(to) = {{x0, x1}};
  else
    *reinterpret_cast<uint32_t*>(to) = pack<T>(x0, x1);
}

DEVICE float read_scalar(const void* x, Scalar type) {
  if (type == Scalar::none) return 1.0f;
  if (type == Scalar::float32) return *static_cast<const float*>(x);
  if (type == Scalar::bfloat16) return to_float(*static_cast<const BFloat16*>(x));
  if (type == Scalar::float16) return to_float(*static_cast<const Half*>(x));
  return static_cast<float>(*static_cast<const double*>(x));
}

}  // namespace nystromgan
