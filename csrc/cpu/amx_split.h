// fp32 products on AMX tiles: x = high + middle + low, three bfloat16 that hold its 24 bits, and of the nine products
// of parts the six that reach them. What is left out is at most 2^-22 of |a| |b|, on average 2^-24.5: less than sums in
// fp32 round. Twice the rate of AVX-512 where packing is repaid: blocks of 128, but not of 64. An infinite operand gives
// NaN.
#pragma once

#include "amx.h"
#include "float_engine.h"

namespace nystromgan::NYSTROMGAN_ISA {

constexpr int64_t kParts = 3;

// Slot j of a tile's row holds k = j and k = j + 16, so that packing needs no shuffle; any order of k serves when both
// operands have the same.
struct SplitPair {
  __m512i part[kParts];
};

NYSTROMGAN_INLINE SplitPair split(Vec first, Vec second) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  SplitPair pair;
  for (int i = 0; i < kParts; ++i) {
    const __m512i a = (__m512i)first, b = (__m512i)second;
    pair.part[i] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, top, 0xf8);  // a >> 16 | (b & top)
    if (i + 1 == kParts) break;
    first -= (Vec)_mm512_and_si512(a, top);
    second -= (Vec)_mm512_and_si512(b, top);
  }
  return pair;
}

// A row of one tile of each part.
NYSTROMGAN_INLINE void put_parts(BFloat16* row, SplitPair pair) {
  for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(row + i * kTileSize, pair.part[i]);
}

// One tile of each part of an operand whose rows (columns) are `major_stride` apart; zeros outside major x k.
template <bool left>
NYSTROMGAN_INLINE void split_tile(
    const float* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* tiles) {
  Vec first[16], second[16];  // a row's k = 0..15 and 16..31 (left), or all rows' k = i and i + 16
  if (k_stride == 1) {
    for (int i = 0; i < 16; ++i) {
      first[i] = i < major ? load_masked(src + i * major_stride, k) : Vec{};
      second[i] = i < major && k > 16 ? load_masked(src + i * major_stride + 16, k - 16) : Vec{};
    }
    if (!left) transpose(first), transpose(second);
  } else {
    for (int i = 0; i < 16; ++i) {
      first[i] = i < k ? load_masked(src + i * k_stride, major) : Vec{};
      second[i] = i + 16 < k ? load_masked(src + (i + 16) * k_stride, major) : Vec{};
    }
    if (left) transpose(first), transpose(second);
  }
  for (int i = 0; i < 16; ++i) put_parts(tiles + i * kTileDepth, split(first[i], second[i]));
}

// Packs `rows` strips of 16 of an operand of any strides from strip `first` on.
template <bool left>
inline void split_tiles(
    int64_t first, int64_t rows, const float* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride,
    BFloat16* tiles) {
  for_tiles(
      first, rows, src, major, k, major_stride, k_stride, tiles, kParts, [](auto... tile) { split_tile<left>(tile...); });
}

template <bool left>
inline void split_tiles(
    const float* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* tiles) {
  split_tiles<left>(0, major, src, major, k, major_stride, k_stride, tiles);
}

// C [16 row_tiles, 16 col_tiles], summed over `depth` tiles of k, of each the small products first. The strips of A and B
// are `next_a` and `next_b` apart.
template <int row_tiles, int col_tiles>
NYSTROMGAN_INLINE void multiply_split_tiles(
    const BFloat16* a, const BFloat16* b, int64_t depth, int64_t next_a, int64_t next_b, float* c, int64_t ldc) {
  const int64_t stride = ldc * sizeof(float);
  _tile_zero(0);
  if constexpr (col_tiles == 2) _tile_zero(1);
  if constexpr (row_tiles == 2) _tile_zero(2);
  if constexpr (row_tiles == 2 && col_tiles == 2) _tile_zero(3);
#define NYSTROMGAN_LOAD_A(part)                \
  _tile_loadd(4, a + part * kTileSize, 64);    \
  if constexpr (row_tiles == 2) _tile_loadd(5, a + next_a + part * kTileSize, 64)
#define NYSTROMGAN_LOAD_B(part)                \
  _tile_loadd(6, b + part * kTileSize, 64);    \
  if constexpr (col_tiles == 2) _tile_loadd(7, b + next_b + part * kTileSize, 64)
#define NYSTROMGAN_MULTIPLY                                        \
  _tile_dpbf16ps(0, 4, 6);                                         \
  if constexpr (row_tiles == 2) _tile_dpbf16ps(2, 5, 6);           \
  if constexpr (col_tiles == 2) _tile_dpbf16ps(1, 4, 7);           \
  if constexpr (row_tiles == 2 && col_tiles == 2) _tile_dpbf16ps(3, 5, 7)
  for (int64_t i = 0; i < depth; ++i, a += kParts * kTileSize, b += kParts * kTileSize) {
    NYSTROMGAN_LOAD_A(2);
    NYSTROMGAN_LOAD_B(0);
    NYSTROMGAN_MULTIPLY;
    NYSTROMGAN_LOAD_A(1);
    NYSTROMGAN_MULTIPLY;
    NYSTROMGAN_LOAD_B(1);
    NYSTROMGAN_MULTIPLY;
    NYSTROMGAN_LOAD_A(0);
    NYSTROMGAN_MULTIPLY;
    NYSTROMGAN_LOAD_B(2);
    NYSTROMGAN_MULTIPLY;
    NYSTROMGAN_LOAD_B(0);
    NYSTROMGAN_MULTIPLY;
  }
#undef NYSTROMGAN_LOAD_A
#undef NYSTROMGAN_LOAD_B
#undef NYSTROMGAN_MULTIPLY
  _tile_stored(0, c, stride);
  if constexpr (col_tiles == 2) _tile_stored(1, c + 16, stride);
  if constexpr (row_tiles == 2) _tile_stored(2, c + kTileRows * ldc, stride);
  if constexpr (row_tiles == 2 && col_tiles == 2) _tile_stored(3, c + kTileRows * ldc + 16, stride);
}

// One block of at most 32 x 32 of C, no further rows touched.
template <bool accumulate>
inline void multiply_split_block(
    int64_t rows, int64_t cols, const BFloat16* a, const BFloat16* b, int64_t depth, int64_t next_a, int64_t next_b, float* c,
    int64_t ldc) {
  constexpr int64_t kBlock = 2 * kTileRows;
  alignas(64) float block[kBlock * kBlock];
  const bool tall = rows > kTileRows, wide = cols > kTileRows, aside = accumulate || rows % kTileRows != 0;
  float* const to = aside ? block : c;
  const int64_t ld = aside ? kBlock : ldc;
  if (tall && wide) multiply_split_tiles<2, 2>(a, b, depth, next_a, next_b, to, ld);
  else if (tall) multiply_split_tiles<2, 1>(a, b, depth, next_a, next_b, to, ld);
  else if (wide) multiply_split_tiles<1, 2>(a, b, depth, next_a, next_b, to, ld);
  else multiply_split_tiles<1, 1>(a, b, depth, next_a, next_b, to, ld);
  if (!aside) return;
  asm volatile("" ::: "memory");
  // added at the end: each product of parts would round C
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < (wide ? kBlock : kTileRows); j += kLanes) {
      const Vec sum = load(block + i * kBlock + j);
      store(c + i * ldc + j, accumulate ? load(c + i * ldc + j) + sum : sum);
    }
}

// C = A B or C += A B of packed operands, of which all k of 16 rows (columns) lie `next_a` (`next_b`) apart.
template <bool accumulate>
inline void multiply_split(
    int64_t rows, int64_t cols, int64_t k, const BFloat16* a, const BFloat16* b, int64_t next_a, int64_t next_b, float* c,
    int64_t ldc) {
  constexpr int64_t kBlock = 2 * kTileRows;
  const int64_t depth = depth_of(k);
  asm volatile("" ::: "memory");  // the tile intrinsics do not tell the compiler what they read
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t s = 0; s < cols; s += kBlock)
      multiply_split_block<accumulate>(
          min(kBlock, rows - r), cols - s, a + r / kTileRows * next_a, b + s / kTileRows * next_b, depth, next_a, next_b,
          c + r * ldc + s, ldc);
  asm volatile("" ::: "memory");
}

template <bool accumulate>
inline void multiply_split(
    int64_t rows, int64_t cols, int64_t k, const BFloat16* a, const BFloat16* b, float* c, int64_t ldc) {
  const int64_t next = depth_of(k) * kParts * kTileSize;
  multiply_split<accumulate>(rows, cols, k, a, b, next, next, c, ldc);
}

// Products of few k stay in fp32: half a tile of k is a third of the work of a whole one, and packing is not repaid.
struct SplitEngine {
  using Float = FloatEngine<float>;
  static constexpr int64_t kShort = 16;
  struct Left {
    StridedMatrix rows;
    const BFloat16* tiles;
  };
  struct Right {
    Float::Right rows;
    const BFloat16* tiles;
  };
  using Session = AmxEngine::Session;
  static constexpr int64_t kRowPad = 1;

  // Kept in fp32 where it is computed, and packed when it is asked for.
  template <bool as_left, bool as_right>
  class Computed : public Float::Computed<as_left, as_right> {
   public:
    Computed(float* data, int64_t ld, int64_t rows, int64_t cols, float* left, float* right)
        : Float::Computed<as_left, as_right>(data, ld, rows, cols, left, right),
          data_(data), left_(left), right_(right), ld_(ld), rows_(rows), cols_(cols) {}
    Left left() const { return SplitEngine::left(data_, rows_, cols_, ld_, 1, left_); }
    Right right() const { return SplitEngine::right(data_, rows_, cols_, ld_, 1, right_); }

   private:
    const float* data_;
    float *left_, *right_;
    int64_t ld_, rows_, cols_;
  };

  static int64_t left_size(int64_t rows, int64_t k) {
    return k <= kShort ? 0 : round_up(rows, kTileRows) * round_up(k, kTileDepth) / 2 * kParts;
  }
  static int64_t right_size(int64_t k, int64_t cols) {
    return k <= kShort ? Float::right_size(k, cols) : left_size(cols, k);
  }

  static Left left(const float* src, int64_t rows, int64_t k, int64_t row_stride, int64_t k_stride, float* scratch) {
    BFloat16* tiles = reinterpret_cast<BFloat16*>(scratch);
    if (k > kShort) split_tiles<true>(src, rows, k, row_stride, k_stride, tiles);
    return {{src, row_stride, k_stride}, tiles};
  }
  static Right right(const float* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    BFloat16* tiles = reinterpret_cast<BFloat16*>(scratch);
    if (k <= kShort) return {Float::right(src, k, cols, k_stride, col_stride, scratch), tiles};
    split_tiles<false>(src, cols, k, col_stride, k_stride, tiles);
    return {{}, tiles};
  }
  template <bool accumulate>
  static void multiply(int64_t rows, int64_t cols, int64_t k, Left a, Right b, float* c, int64_t ldc) {
    if (k <= kShort) Float::multiply<accumulate>(rows, cols, k, a.rows, b.rows, c, ldc);
    else multiply_split<accumulate>(rows, cols, k, a.tiles, b.tiles, c, ldc);
  }
};

}  // namespace nystromgan::NYSTROMGAN_ISA
