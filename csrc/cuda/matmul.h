// Products of float32 matrices in memory, one 64 x 64 tile of the result a block of four warps.
#pragma once

#include "tf32.h"

namespace nystromgan {

constexpr int kTile = 64, kTileDepth = 32, kTileStages = 3, kTileThreads = 128;
constexpr int kTileStride = kTile + 4, kDepthStride = kTileDepth + 4;
constexpr int kTileFloats = kTile * kDepthStride > kTileDepth * kTileStride ? kTile * kDepthStride
                                                                            : kTileDepth * kTileStride;
constexpr int kMatmulSharedBytes = 2 * kTileStages * kTileFloats * 4;

// A matrix in memory or its transpose; read 16 bytes at a time where every row starts at a multiple of them.
template <bool TRANSPOSED>
struct Source {
  const float* data;
  int rows, columns;  // as it is read, transposed or not
  int stride;         // from one row in memory to the next
};

// Copies rows [row, row + ROWS) and columns [column, column + COLUMNS) as they lie in memory, zeros outside.
template <int ROWS, int COLUMNS, bool TRANSPOSED>
DEVICE void copy_panel(float* target, const Source<TRANSPOSED>& x, int row, int column) {
  constexpr int kHigh = TRANSPOSED ? COLUMNS : ROWS, kWide = TRANSPOSED ? ROWS : COLUMNS, kChunks = kWide / 4;
  const int first_high = TRANSPOSED ? column : row, first_wide = TRANSPOSED ? row : column;
  const int high_end = TRANSPOSED ? x.columns : x.rows, wide_end = TRANSPOSED ? x.rows : x.columns;
  if (x.stride % 4 || reinterpret_cast<uintptr_t>(x.data) % 16) {
    for (int i = thread_index(); i < kHigh * kWide; i += kTileThreads) {
      const int high = i / kWide, wide = i % kWide;
      const bool inside = first_high + high < high_end && first_wide + wide < wide_end;
      const int64_t offset = static_cast<int64_t>(first_high + high) * x.stride + first_wide + wide;
      target[high * (kWide + 4) + wide] = inside ? x.data[offset] : 0.0f;
    }
    return;
  }
  for (int i = thread_index(); i < kHigh * kChunks; i += kTileThreads) {
    const int high = i / kChunks, wide = i % kChunks * 4;
    const int left = first_high + high < high_end ? minimum(wide_end - first_wide - wide, 4) : 0;
    const int64_t offset = static_cast<int64_t>(first_high + high) * x.stride + first_wide + wide;
    copy_async(target + high * (kWide + 4) + wide, left > 0 ? x.data + offset : x.data, left > 0 ? 4 * left : 0);
  }
}

// This warp's 32 x 32 part of rows [row, row + 64) and columns [column, column + 64) of a product.
struct TilePart {
  Fragment x[2][4];
};

DEVICE int part_row() { return warp_index() / 2 * 32; }
DEVICE int part_column() { return warp_index() % 2 * 32; }

template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
DEVICE void add_tile(TilePart& c, const Source<LEFT_TRANSPOSED>& a, const Source<RIGHT_TRANSPOSED>& b, int row,
                          int column) {
  float* s_a = reinterpret_cast<float*>(shared_memory());
  float* s_b = s_a + kTileStages * kTileFloats;
  const int steps = ceil_div(a.columns, kTileDepth);
  auto copy_step = [&](int step) {
    if (step < steps) {
      const int stage = step % kTileStages * kTileFloats;
      copy_panel<kTile, kTileDepth>(s_a + stage, a, row, step * kTileDepth);
      copy_panel<kTileDepth, kTile>(s_b + stage, b, step * kTileDepth, column);
    }
    commit_copies();
  };
  sync_block();  // another product may still read
  for (int step = 0; step < kTileStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kTileStages - 2>();
    sync_block();
    copy_step(step + kTileStages - 1);
    const int stage = step % kTileStages * kTileFloats;
    const Matrix<LEFT_TRANSPOSED> left{s_a + stage, LEFT_TRANSPOSED ? kTileStride : kDepthStride};
    const Matrix<RIGHT_TRANSPOSED> right{s_b + stage, RIGHT_TRANSPOSED ? kDepthStride : kTileStride};
    UNROLL
    for (int k = 0; k < kTileDepth; k += 8) {
      const SplitLeft l[2] = {left_of(left, part_row(), k), left_of(left, part_row() + 16, k)};
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const SplitRight r = right_of(right, k, part_column() + 8 * j);
        UNROLL
        for (int i = 0; i < 2; ++i) multiply(c.x[i][j], l[i], r);
      }
    }
  }
  wait_copies<0>();
}

template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
DEVICE void multiply_tile(TilePart& c, const Source<LEFT_TRANSPOSED>& a, const Source<RIGHT_TRANSPOSED>& b, int row,
                          int column) {
  UNROLL
  for (int i = 0; i < 2; ++i) clear(c.x[i]);
  add_tile(c, a, b, row, column);
}

// Calls body(row, column, x) for every element of the tile that this lane holds.
template <class Body>
DEVICE void for_each_element(TilePart& c, int row, int column, Body body) {
  UNROLL
  for (int i = 0; i < 2; ++i) for_each_element(c.x[i], row + part_row() + 16 * i, column + part_column(), body);
}

}  // namespace nystromgan
