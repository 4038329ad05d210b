// Products of bfloat16 operands by AVX-512's dot products of pairs, sums in fp32: twice the rate of fp32, on processors
// that have no tiles. A left operand is read by pairs of k, wherever rows and pairs lie; a right one is packed in strips of
// 16 columns, each [k / 2, 16, 2]. An odd k ends with a zero.
#pragma once

#include "bf16_pairs.h"

namespace nystromgan::NYSTROMGAN_ISA {

constexpr int64_t kPairLanes = 16;              // pairs in a vector
constexpr int64_t kPairVector = 2 * kPairLanes; // values in it

constexpr int64_t pairs_of(int64_t k) { return (k + 1) / 2; }

NYSTROMGAN_INLINE void store_pairs(BFloat16* to, __m512i x) { _mm512_storeu_si512(to, x); }

// 16 rows (columns), `width` of them there, whose pairs of k become vectors `pair` values apart.
template <class S>
NYSTROMGAN_INLINE void pack_strip(
    const S* src, int64_t width, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* to, int64_t pair) {
  if (major_stride == 1) {
    for (int64_t i = 0; i < k; i += 2)
      store_pairs(to + i / 2 * pair, load_pairs(src + i * k_stride, k_stride, i + 1 < k, width));
    return;
  }
  for (int64_t i = 0; i < k; i += kPairVector) {
    const S* from = src + i * k_stride;
    const int64_t depth = min(kPairVector, k - i);
    S buffer[kPairLanes * kPairVector];
    if (k_stride != 1)
      for (int64_t r = 0; r < width; ++r)
        for (int64_t d = 0; d < depth; ++d) buffer[r * kPairVector + d] = from[r * major_stride + d * k_stride];
    Vec x[kPairLanes];
    for (int64_t r = 0; r < kPairLanes; ++r) {
      const S* along = k_stride != 1 ? buffer + r * kPairVector : from + r * major_stride;
      x[r] = r < width ? (Vec)load_along(along, depth) : Vec{};
    }
    transpose(x);
    for (int64_t j = 0; j < pairs_of(depth); ++j) store_pairs(to + (i / 2 + j) * pair, (__m512i)x[j]);
  }
}

// All strips of an operand of any strides, `strip` values apart.
template <class S>
inline void pack_pairs(
    const S* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* to, int64_t strip,
    int64_t pair) {
  for (int64_t m = 0; m < major; m += kPairLanes, to += strip)
    pack_strip(src + m * major_stride, min(kPairLanes, major - m), k, major_stride, k_stride, to, pair);
}

// Where the pairs of a left operand lie: distances of rows and of pairs, in values.
struct LeftPairs {
  const BFloat16* data;
  int64_t row, pair;
};

template <int rows, int vectors, bool accumulate>
NYSTROMGAN_INLINE void dot_tile(
    LeftPairs a,                      // [rows, pairs]
    const BFloat16* b, int64_t strip, // [vectors][pairs, 16, 2]
    int64_t pairs, float* c, int64_t ldc) {
  Vec sum[rows][vectors] = {};
  const BFloat16* left = a.data;
  for (int64_t i = 0; i < pairs; ++i, b += kPairVector, left += a.pair) {
    __m512bh right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * strip);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      int32_t both;
      memcpy(&both, left + r * a.row, sizeof both);
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], right[v], pair);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * ldc + v * kLanes;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// All rows of a panel of columns: tiles of `tile` rows, then of fewer, down to one.
template <int tile, int vectors, bool accumulate>
NYSTROMGAN_INLINE void dot_panel(
    int64_t row, int64_t rows, LeftPairs a, const BFloat16* b, int64_t strip, int64_t pairs, float* c, int64_t ldc) {
  for (; row + tile <= rows; row += tile)
    dot_tile<tile, vectors, accumulate>(
        {a.data + row * a.row, a.row, a.pair}, b, strip, pairs, c + row * ldc, ldc);
  constexpr int kNext = tile == 6 ? 4 : tile / 2;
  if constexpr (tile > 1) dot_panel<kNext, vectors, accumulate>(row, rows, a, b, strip, pairs, c, ldc);
}

struct DotEngine {
  using Left = LeftPairs;
  struct Right {
    const BFloat16* data;
    int64_t strip;
    const BFloat16* low = nullptr;  // what rounding has left of the operand, in strips of its own, or none
  };
  struct Session {
    Session() {}
    ~Session() {}  // not trivial, so that no compiler calls the variable unused
  };
  static constexpr int64_t kRowPad = 2;  // Computed puts rows in pairs
  static constexpr bool kRounds = true;

  template <bool as_left, bool as_right>
  class Computed {
   public:
    Computed(float*, int64_t, int64_t rows, int64_t cols, float* left, float* right)
        : left_(reinterpret_cast<BFloat16*>(left)),
          right_(reinterpret_cast<BFloat16*>(right)),
          ld_(round_up(cols, kPairVector)),
          strip_(pairs_of(rows) * kPairVector) {}
    NYSTROMGAN_INLINE void put(int64_t row, int64_t col, Vec even, Vec odd) {
      const __m512i both = round_two(even, odd);
      if constexpr (as_left) {
        BFloat16* at = left_ + row * ld_ + col;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + ld_), _mm512_extracti64x4_epi64(both, 1));
      }
      if constexpr (as_right)
        store_pairs(right_ + col / kPairLanes * strip_ + row / 2 * kPairVector, interleave_halves(both));
    }
    Left left() const { return {left_, ld_, 2}; }
    Right right() const { return {right_, strip_}; }

   private:
    BFloat16 *left_, *right_;
    int64_t ld_, strip_;
  };

  static int64_t left_size(int64_t rows, int64_t k) { return round_up(rows, kPairLanes) * round_up(k, kPairVector) / 2; }
  static int64_t right_size(int64_t k, int64_t cols) { return round_up(cols, kPairLanes) * pairs_of(k); }
  static int64_t right_split_size(int64_t k, int64_t cols) { return 2 * right_size(k, cols) + k * cols; }

  // bfloat16 rows of whole pairs are used where they lie.
  template <class S>
  static Left left(const S* src, int64_t rows, int64_t k, int64_t row_stride, int64_t k_stride, float* scratch) {
    if constexpr (sizeof(S) == sizeof(BFloat16))
      if (k_stride == 1 && k % 2 == 0) return {src, row_stride, 2};
    BFloat16* const to = reinterpret_cast<BFloat16*>(scratch);
    if (k_stride == 1) {
      const int64_t ld = round_up(k, kPairVector);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < k; i += kPairVector)
          store_pairs(to + r * ld + i, load_along(src + r * row_stride + i, k - i));
      return {to, ld, 2};
    }
    const int64_t pair = 2 * round_up(rows, kPairLanes);
    pack_pairs(src, rows, k, row_stride, k_stride, to, kPairVector, pair);
    return {to, 2, pair};
  }
  template <class S>
  static Right right(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(scratch);
    const int64_t strip = pairs_of(k) * kPairVector;
    pack_pairs(src, cols, k, col_stride, k_stride, to, strip, kPairVector);
    return {to, strip};
  }
  template <class S>
  static Right right_split(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    return right(src, k, cols, k_stride, col_stride, scratch);
  }
  // B = high + low: two products.
  static Right right_split(
      const float* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    Right split = right(src, k, cols, k_stride, col_stride, scratch);
    if (!is_split(k, cols)) return split;
    float *const rest = scratch + right_size(k, cols), *const low = rest + k * cols;  // [k, cols]
    for (int64_t i = 0; i < k; ++i)
      for (int64_t c = 0; c < cols; ++c) {
        const float x = src[i * k_stride + c * col_stride];
        rest[i * cols + c] = x - to_float(from_float<BFloat16>(x));
      }
    split.low = right(static_cast<const float*>(rest), k, cols, cols, 1, low).data;
    return split;
  }

  template <bool accumulate>
  static void multiply(int64_t rows, int64_t cols, int64_t k, Left a, Right b, float* c, int64_t ldc) {
    multiply_part<accumulate>(rows, cols, k, a, b.data, b.strip, c, ldc);
    if (b.low != nullptr) multiply_part<true>(rows, cols, k, a, b.low, b.strip, c, ldc);
  }

 private:
  template <bool accumulate>
  static void multiply_part(
      int64_t rows, int64_t cols, int64_t k, Left a, const BFloat16* b, int64_t strip, float* c, int64_t ldc) {
    constexpr int64_t kPanel = 4 * kPairLanes;
    const int64_t padded = round_up(cols, kPairLanes), pairs = pairs_of(k);
    int64_t col = 0;
    for (; col + kPanel <= padded; col += kPanel, b += 4 * strip)
      dot_panel<6, 4, accumulate>(0, rows, a, b, strip, pairs, c + col, ldc);
    switch ((padded - col) / kPairLanes) {
      case 1: return dot_panel<12, 1, accumulate>(0, rows, a, b, strip, pairs, c + col, ldc);
      case 2: return dot_panel<12, 2, accumulate>(0, rows, a, b, strip, pairs, c + col, ldc);
      case 3: return dot_panel<8, 3, accumulate>(0, rows, a, b, strip, pairs, c + col, ldc);
    }
  }
};

}  // namespace nystromgan::NYSTROMGAN_ISA
