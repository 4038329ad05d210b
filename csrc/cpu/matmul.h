// Products of small fp32 matrices from registers: C = A B or C += A B, with A [rows, k] of any strides, B [k, cols] in
// rows padded to kLanes columns.
#pragma once

#include "simd.h"

namespace nystromgan::NYSTROMGAN_ISA {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kPanelVectors = 2;  // 6 x 2 accumulators of 16 registers
#endif

struct StridedMatrix {
  const float* data;
  int64_t row_stride, k_stride;
};

template <int rows, int vectors, bool accumulate>
NYSTROMGAN_INLINE void multiply_tile(
    const float* __restrict a, int64_t row_stride, int64_t k_stride,  // [rows, k]
    const float* __restrict b, int64_t ldb,                           // [k, vectors * kLanes]
    float* __restrict c, int64_t ldc,                                 // [rows, vectors * kLanes]
    int64_t k) {
  Vec sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec bv[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) bv[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec ar = splat(a[r * row_stride + i * k_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += ar * bv[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * ldc + v * kLanes;
      // added at the end: one long chain of sums over many blocks of k would round twice as badly
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// All rows of one panel of columns: tiles of `tile` rows, then of two thirds as many, down to one; each_tile() comes before
// each. Of 64 rows the last 4 so go at once: as 3 and 1, with few sums to work on, they took a twentieth of the product.
template <int tile, int vectors, bool accumulate, class EachTile>
NYSTROMGAN_INLINE void multiply_panel(
    int64_t row, int64_t rows, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
    EachTile each_tile) {
  for (; row + tile <= rows; row += tile) {
    each_tile();
    multiply_tile<tile, vectors, accumulate>(
        a.data + row * a.row_stride, a.row_stride, a.k_stride, b, ldb, c + row * ldc, ldc, k);
  }
  if constexpr (tile > 1) multiply_panel<tile * 2 / 3, vectors, accumulate>(row, rows, k, a, b, ldb, c, ldc, each_tile);
}

// Few vectors a row need more rows a tile to keep both multipliers busy.
template <int vectors, bool accumulate, class EachTile>
inline void multiply_panel(
    int64_t rows, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c, int64_t ldc, EachTile each_tile) {
  constexpr int tile = vectors == kPanelVectors ? 6 : vectors == 3 ? 8 : 12;
  multiply_panel<tile, vectors, accumulate>(0, rows, k, a, b, ldb, c, ldc, each_tile);
}

// each_tile() is called before every tile of C.
template <bool accumulate, class EachTile>
inline void multiply_float(
    int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
    EachTile each_tile) {
  constexpr int64_t kPanel = kPanelVectors * kLanes;
  const int64_t padded = round_up(cols, kLanes);
  int64_t col = 0;
  for (; col + kPanel <= padded; col += kPanel)
    multiply_panel<kPanelVectors, accumulate>(rows, k, a, b + col, ldb, c + col, ldc, each_tile);
  switch ((padded - col) / kLanes) {
    case 1: return multiply_panel<1, accumulate>(rows, k, a, b + col, ldb, c + col, ldc, each_tile);
#if defined(__AVX512F__)
    case 2: return multiply_panel<2, accumulate>(rows, k, a, b + col, ldb, c + col, ldc, each_tile);
    case 3: return multiply_panel<3, accumulate>(rows, k, a, b + col, ldb, c + col, ldc, each_tile);
#endif
  }
}

template <bool accumulate>
inline void multiply_float(
    int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  multiply_float<accumulate>(rows, cols, k, a, b, ldb, c, ldc, [] {});
}

}  // namespace nystromgan::NYSTROMGAN_ISA
