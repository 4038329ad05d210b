// The depthwise convolution of tokens along a sequence, y[n] = sum_t weight[t] x[n + t - taps / 2], as products with a
// band: of six rows, row r has the weight from column r on. Its transpose is the same with the weight in reverse.
#pragma once

#include "nystrom.h"

namespace nystromgan::NYSTROMGAN_ISA {

constexpr int64_t kBandRows = 6;

// The weight of one head times a factor, between zeros.
class Band {
 public:
  Band(const float* weight, int64_t taps, float factor, bool reverse, Workspace& workspace)
      : taps_(taps), data_(workspace.take(taps + 2 * (kBandRows - 1))) {
    for (int64_t i = 0; i < kBandRows - 1; ++i) data_[i] = data_[kBandRows - 1 + taps + i] = 0.0f;
    for (int64_t t = 0; t < taps; ++t) data_[kBandRows - 1 + t] = factor * weight[reverse ? taps - 1 - t : t];
  }

  // y [rows, ld] += the convolution of window [rows + taps - 1, window_ld], both padded to whole vectors.
  void add(int64_t rows, int64_t dim, const float* window, int64_t window_ld, float* y, int64_t ld) const {
    for (int64_t r = 0; r < rows; r += kBandRows) {
      const int64_t count = min(kBandRows, rows - r);
      multiply_float<true>(
          count, dim, taps_ + count - 1, {data_ + kBandRows - 1, -1, 1}, window + r * window_ld, window_ld, y + r * ld, ld);
    }
  }

 private:
  int64_t taps_;
  float* data_;
};

// fp32 rows, ld apart.
struct Rows {
  const float* data;
  int64_t ld;
};

// The tokens [first, first + rows) of x at (b, h), of which some lie in [0, tokens): zero outside, where masked, and up to
// whole vectors. What lies so in memory is taken there, the rest copied to scratch.
template <class T>
inline Rows rows_of(
    const Tokens& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t tokens, int64_t dim, const bool* mask,
    float* scratch) {
  const int64_t ld = round_up(dim, kLanes), begin = max(first, int64_t{0}), end = min(first + rows, tokens);
  if constexpr (sizeof(T) == sizeof(float))
    if (x.channel == 1 && ld == dim && end - begin == rows && mask == nullptr) return {row<T>(x, b, h, first), x.token};
  memset(scratch, 0, (begin - first) * ld * sizeof(float));
  memset(scratch + (end - first) * ld, 0, (first + rows - end) * ld * sizeof(float));
  gather(row<T>(x, b, h, begin), end - begin, dim, x.token, x.channel, scratch + (begin - first) * ld, ld);
  for (int64_t n = begin; mask != nullptr && n < end; ++n)
    if (mask[n]) memset(scratch + (n - first) * ld, 0, ld * sizeof(float));
  return {scratch, ld};
}

template <int taps>
NYSTROMGAN_INLINE void add_tap_products(int64_t rows, int64_t columns, Rows x, Rows window, float* to, int64_t step) {
  Vec sum[taps] = {};
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; ++r) {
      const Vec own = load(x.data + r * x.ld + c);
      for (int t = 0; t < taps; ++t) sum[t] += own * load(window.data + (r + t) * window.ld + c);
    }
  for (int t = 0; t < taps; ++t) to[t * step] += reduce_add(sum[t]);
}

// to [taps] += the sums over r of x[r] . window[r + taps - 1 - t]: the weight's gradient, of values x beside a window of
// the output's gradient.
inline void add_tap_products(int64_t rows, int64_t dim, int64_t taps, Rows x, Rows window, float* to) {
  constexpr int kTogether = 8;
  const int64_t columns = round_up(dim, kLanes);
  int64_t t = 0;
  for (; t + kTogether <= taps; t += kTogether)
    add_tap_products<kTogether>(rows, columns, x, {window.data + t * window.ld, window.ld}, to + taps - 1 - t, -1);
  for (; t < taps; ++t)
    add_tap_products<1>(rows, columns, x, {window.data + t * window.ld, window.ld}, to + taps - 1 - t, -1);
}

}  // namespace nystromgan::NYSTROMGAN_ISA
