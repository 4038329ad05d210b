// Products of bfloat16 operands on AMX tiles, sums in fp32. An operand is packed into tiles of 1 KiB, 16 rows of 32
// values: a left one by [rows, k], a right one by pairs of k, [k / 2, columns, 2]; all k of 16 rows (columns) lie together.
#pragma once

#include "bf16_pairs.h"

namespace nystromgan::NYSTROMGAN_ISA {

constexpr int64_t kTileRows = 16;  // rows of A and columns of B
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileSize = kTileRows * kTileDepth;

constexpr int64_t depth_of(int64_t k) { return (k + kTileDepth - 1) / kTileDepth; }

// One tile of an operand whose rows (columns) are `major_stride` apart; zeros outside major x k.
template <bool left, class S>
NYSTROMGAN_INLINE void pack_tile(
    const S* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* tile) {
  Vec x[16];
  if (k_stride == 1) {
    for (int i = 0; i < 16; ++i) x[i] = i < major ? (Vec)load_along(src + i * major_stride, k) : Vec{};
    if (!left) transpose(x);
  } else {
    for (int i = 0; i < 16; ++i)
      x[i] = 2 * i < k ? (Vec)load_pairs(src + 2 * i * k_stride, k_stride, 2 * i + 1 < k, major) : Vec{};
    if (left) transpose(x);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kTileDepth, (__m512i)x[i]);
}

// Calls pack(from, major, k, major_stride, k_stride, tile) for tiles of an operand of any strides, those of `rows` strips of
// 16 from strip `first` on. All k of a strip lie together, each tile in `parts` of 1 KiB.
template <class S, class Pack>
inline void for_tiles(
    int64_t first, int64_t rows, const S* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride,
    BFloat16* tiles, int64_t parts, Pack pack) {
  const bool strided = major_stride != 1 && k_stride != 1;
  tiles += first * depth_of(k) * parts * kTileSize;
  for (int64_t m = first * kTileRows; m < min(major, (first + rows) * kTileRows); m += kTileRows)
    for (int64_t i = 0; i < k; i += kTileDepth, tiles += parts * kTileSize) {
      const S* from = src + m * major_stride + i * k_stride;
      const int64_t height = min(kTileRows, major - m), depth = min(kTileDepth, k - i);
      if (!strided) {
        pack(from, height, depth, major_stride, k_stride, tiles);
        continue;
      }
      S buffer[kTileSize];
      for (int64_t r = 0; r < height; ++r)
        for (int64_t d = 0; d < depth; ++d) buffer[r * kTileDepth + d] = from[r * major_stride + d * k_stride];
      pack(buffer, height, depth, kTileDepth, 1, tiles);
    }
}

template <bool left, class S>
inline void pack_tiles(
    const S* src, int64_t major, int64_t k, int64_t major_stride, int64_t k_stride, BFloat16* tiles) {
  for_tiles(0, major, src, major, k, major_stride, k_stride, tiles, 1, [](auto... tile) { pack_tile<left>(tile...); });
}

// Where the tiles of a left operand lie, in values: of 16 rows, of 32 k, of a row.
struct LeftTiles {
  const BFloat16* data;
  int64_t strip, step, row;
};

// C [16 row_tiles, 16 col_tiles], summed over `depth` tiles of k; B's tiles come in `parts` that share A's.
template <int row_tiles, int col_tiles, bool accumulate>
NYSTROMGAN_INLINE void multiply_tiles(
    LeftTiles left, const BFloat16* b, int64_t depth, int64_t parts, float* c, int64_t ldc) {
  const int64_t stride = ldc * sizeof(float), next_b = parts * depth * kTileSize, row = left.row * sizeof(BFloat16);
  const BFloat16* a = left.data;
  float* const lower = c + kTileRows * ldc;
  if constexpr (accumulate) {
    _tile_loadd(0, c, stride);
    if constexpr (col_tiles == 2) _tile_loadd(1, c + 16, stride);
    if constexpr (row_tiles == 2) _tile_loadd(2, lower, stride);
    if constexpr (row_tiles == 2 && col_tiles == 2) _tile_loadd(3, lower + 16, stride);
  } else {
    _tile_zero(0);
    if constexpr (col_tiles == 2) _tile_zero(1);
    if constexpr (row_tiles == 2) _tile_zero(2);
    if constexpr (row_tiles == 2 && col_tiles == 2) _tile_zero(3);
  }
  for (int64_t i = 0; i < depth; ++i, a += left.step) {
    _tile_loadd(4, a, row);
    if constexpr (row_tiles == 2) _tile_loadd(5, a + left.strip, row);
    for (int64_t part = 0; part < parts; ++part, b += kTileSize) {
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (row_tiles == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (col_tiles == 2) {
        _tile_loadd(7, b + next_b, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (row_tiles == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (col_tiles == 2) _tile_stored(1, c + 16, stride);
  if constexpr (row_tiles == 2) _tile_stored(2, lower, stride);
  if constexpr (row_tiles == 2 && col_tiles == 2) _tile_stored(3, lower + 16, stride);
}

struct AmxEngine {
  using Left = LeftTiles;
  struct Right {
    const BFloat16* tiles;
    int64_t parts;  // 2: a high and a low part in turn, tile by tile along k
  };
  static constexpr int64_t kRowPad = kTileRows;
  static constexpr bool kRounds = true;

  // Configures the tiles of this thread, all 16 rows of 64 bytes.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      asm volatile("" ::"r"(&config) : "memory");  // the intrinsic claims to read only 8 bytes
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
  };

  template <bool as_left, bool as_right>
  class Computed {
   public:
    Computed(float*, int64_t, int64_t rows, int64_t cols, float* left, float* right)
        : left_(reinterpret_cast<BFloat16*>(left)),
          right_(reinterpret_cast<BFloat16*>(right)),
          rows_(rows),
          cols_(cols) {
      pad();
    }
    NYSTROMGAN_INLINE void put(int64_t row, int64_t col, Vec even, Vec odd) {
      const __m512i both = round_two(even, odd);
      if constexpr (as_left) {
        BFloat16* at = left_at(row, col);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + kTileDepth), _mm512_extracti64x4_epi64(both, 1));
      }
      if constexpr (as_right) _mm512_storeu_si512(right_at(row, col), interleave_halves(both));
    }
    Left left() const { return packed(left_, cols_); }
    Right right() const { return {right_, 1}; }

   private:
    BFloat16* left_at(int64_t row, int64_t col) {
      return left_ + (row / kTileRows * depth_of(cols_) + col / kTileDepth) * kTileSize + row % kTileRows * kTileDepth +
             col % kTileDepth;
    }
    BFloat16* right_at(int64_t row, int64_t col) {
      return right_ + (col / kTileRows * depth_of(rows_) + row / kTileDepth) * kTileSize + row % kTileDepth * kTileRows;
    }
    // Zeros along k where no vector will be put.
    void pad() {
      const int64_t put_rows = round_up(rows_, 2), put_cols = round_up(cols_, kLanes);
      if (as_left && put_cols % kTileDepth != 0)
        for (int64_t r = 0; r < put_rows; ++r) memset(left_at(r, put_cols), 0, kTileRows * sizeof(BFloat16));
      if (as_right)
        for (int64_t r = put_rows; r < round_up(rows_, kTileDepth); r += 2)
          for (int64_t c = 0; c < put_cols; c += kTileRows) memset(right_at(r, c), 0, kTileDepth * sizeof(BFloat16));
    }

    BFloat16 *left_, *right_;
    int64_t rows_, cols_;
  };

  static int64_t left_size(int64_t rows, int64_t k) { return round_up(rows, kTileRows) * round_up(k, kTileDepth) / 2; }
  static int64_t right_size(int64_t k, int64_t cols) { return left_size(cols, k); }
  static int64_t right_split_size(int64_t k, int64_t cols) { return 2 * right_size(k, cols); }

  template <class S>
  static Left left(const S* src, int64_t rows, int64_t k, int64_t row_stride, int64_t k_stride, float* scratch) {
    // Whole tiles of bfloat16 rows are used where they lie, unless they are so far apart that they share sets of L1.
    constexpr int64_t kFarthest = 1024;
    if constexpr (sizeof(S) == sizeof(BFloat16))
      if (k_stride == 1 && rows % kTileRows == 0 && k % kTileDepth == 0 && row_stride <= kFarthest)
        return {src, kTileRows * row_stride, kTileDepth, row_stride};
    BFloat16* tiles = reinterpret_cast<BFloat16*>(scratch);
    pack_tiles<true>(src, rows, k, row_stride, k_stride, tiles);
    return packed(tiles, k);
  }
  template <class S>
  static Right right(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    BFloat16* tiles = reinterpret_cast<BFloat16*>(scratch);
    pack_tiles<false>(src, cols, k, col_stride, k_stride, tiles);
    return {tiles, 1};
  }
  static Right right_split(
      const BFloat16* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    return right(src, k, cols, k_stride, col_stride, scratch);
  }
  // B = high + low: two products.
  static Right right_split(
      const float* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    if (!is_split(k, cols)) return right(src, k, cols, k_stride, col_stride, scratch);
    BFloat16* tiles = reinterpret_cast<BFloat16*>(scratch);
    pack_split(src, k, cols, k_stride, col_stride, tiles);
    return {tiles, 2};
  }

  template <bool accumulate>
  static void multiply(int64_t rows, int64_t cols, int64_t k, Left a, Right b, float* c, int64_t ldc) {
    asm volatile("" ::: "memory");  // the tile intrinsics do not tell the compiler what they read
    const int64_t depth = depth_of(k);
    int64_t row = 0;
    for (; row + kTileRows < rows; row += 2 * kTileRows)
      multiply_row<2, accumulate>(cols, depth, from_row(a, row), b, c + row * ldc, ldc);
    if (row < rows) multiply_row<1, accumulate>(cols, depth, from_row(a, row), b, c + row * ldc, ldc);
    asm volatile("" ::: "memory");
  }

 private:
  static Left packed(const BFloat16* tiles, int64_t k) {
    return {tiles, depth_of(k) * kTileSize, kTileSize, kTileDepth};
  }
  static Left from_row(Left a, int64_t row) {
    a.data += row / kTileRows * a.strip;
    return a;
  }

  template <int row_tiles, bool accumulate>
  static void multiply_row(int64_t cols, int64_t depth, Left a, Right b, float* c, int64_t ldc) {
    const int64_t column_size = b.parts * depth * kTileDepth;  // of a column of B
    int64_t col = 0;
    for (; col + kTileRows < cols; col += 2 * kTileRows)
      multiply_tiles<row_tiles, 2, accumulate>(a, b.tiles + col * column_size, depth, b.parts, c + col, ldc);
    if (col < cols) multiply_tiles<row_tiles, 1, accumulate>(a, b.tiles + col * column_size, depth, b.parts, c + col, ldc);
  }

  static void pack_split(
      const float* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, BFloat16* tiles) {
    for (int64_t c = 0; c < cols; c += kTileRows)
      for (int64_t i = 0; i < k; i += kTileDepth, tiles += 2 * kTileSize) {
        const int64_t width = min(kTileRows, cols - c), depth = min(kTileDepth, k - i);
        float high[kTileSize], low[kTileSize];  // [depth, width]
        gather(src + i * k_stride + c * col_stride, depth, width, k_stride, col_stride, high, kTileRows);
        for (int64_t j = 0; j < depth * kTileRows; j += kLanes) {
          const Vec x = load(high + j);
          store(low + j, x - widen(BFloat16{}, narrow(BFloat16{}, x)));
        }
        pack_tile<false>(high, width, depth, 1, kTileRows, tiles);
        pack_tile<false>(low, width, depth, 1, kTileRows, tiles + kTileSize);
      }
  }
};

}  // namespace nystromgan::NYSTROMGAN_ISA
