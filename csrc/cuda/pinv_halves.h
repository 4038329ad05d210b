// The iterative pseudo-inverse of a matrix whose rows are weights, in float16 parts: half the tensor-core work of tf32.h.
//
// x = high + low, each a float16, after x is scaled by a power of two: 22 bits, as three products of tf32 have, but at twice
// their rate. Entries of A and P = A Z are at most about 1 (P is symmetric but for rounding, with eigenvalues in [0, 1]);
// those of Z grow from step to step, and its scale follows their largest. What is 2^-33 of the largest is lost.
//
// A warp owns 16 rows of every matrix. Its rows of A, Z, V1 and V2 stay in registers: as a left operand they lie there as
// the product before left them. Only Z and P, the right operands, are shared.
#pragma once

#include "fragments.h"
#include "pinv.h"

namespace nystromgan {

constexpr float kHalvesUnit = 4096.0f;  // of A and P
constexpr int kHalvesExponent = 8;      // of Z's largest entry: V2 may be 71 times as large, and float16 ends at 2^16

// A matrix in shared memory, as float16 parts of its scaled elements.
template <int ROWS, int COLUMNS = ROWS>
struct HalvesSlot {
  static constexpr int kStride = COLUMNS + 8, kElements = ROWS * kStride, kBytes = 2 * kElements * 2;
  Half* high;

  DEVICE Half* low() const { return high + kElements; }
};

// 16 rows of a left operand, at BLOCK / 16 depths.
struct HalvesLeft {
  Left<Half> high, low;
};

struct HalvesPair {
  uint32_t high, low;
};

DEVICE HalvesPair halves_of(float x0, float x1) {
  const uint32_t high = pack<Half>(x0, x1);
  const float rest0 = x0 - to_float(Half{static_cast<uint16_t>(high)});
  const float rest1 = x1 - to_float(Half{static_cast<uint16_t>(high >> 16)});
  return {high, pack<Half>(rest0, rest1)};
}

template <int BLOCK>
DEVICE void halves_left(HalvesLeft (&left)[BLOCK / 16], const Fragment (&c)[BLOCK / 8]) {
  UNROLL
  for (int j = 0; j < BLOCK / 8; ++j) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const HalvesPair pair = halves_of(c[j].x[2 * h], c[j].x[2 * h + 1]);
      left[j / 2].high.x[j % 2 * 2 + h] = pair.high, left[j / 2].low.x[j % 2 * 2 + h] = pair.low;
    }
  }
}

// Writes 16 rows from (row, column) on.
template <int COUNT, class Slot>
DEVICE void store_halves(const Slot& slot, const Fragment (&c)[COUNT], int row, int column) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const HalvesPair pair = halves_of(c[j].x[2 * h], c[j].x[2 * h + 1]);
      const int place = (row + g + 8 * h) * Slot::kStride + column + 8 * j + 2 * t;
      *reinterpret_cast<uint32_t*>(slot.high + place) = pair.high;
      *reinterpret_cast<uint32_t*>(slot.low() + place) = pair.low;
    }
  }
}

// c += left times 16 rows of `right` from (depth, column) on. Each of the three products goes over all columns before the
// next: an accumulator rests while the others are added to.
template <int COUNT, class Slot>
DEVICE void add_halves(Fragment (&c)[COUNT], const HalvesLeft& left, const Slot& right, int depth, int column) {
  Right<Half> high[COUNT / 2], low[COUNT / 2];
  UNROLL
  for (int j = 0; j < COUNT / 2; ++j) {
    high[j] = right_at<false>(right.high, Slot::kStride, column + 16 * j, depth);
    low[j] = right_at<false>(right.low(), Slot::kStride, column + 16 * j, depth);
  }
  UNROLL
  for (int j = 0; j < COUNT / 2; ++j) multiply(c[2 * j], c[2 * j + 1], left.low, high[j]);
  UNROLL
  for (int j = 0; j < COUNT / 2; ++j) multiply(c[2 * j], c[2 * j + 1], left.high, low[j]);
  UNROLL
  for (int j = 0; j < COUNT / 2; ++j) multiply(c[2 * j], c[2 * j + 1], left.high, high[j]);
}

// c = left times all of `right`.
template <int BLOCK>
DEVICE void multiply_halves(Fragment (&c)[BLOCK / 8], const HalvesLeft (&left)[BLOCK / 16], const HalvesSlot<BLOCK>& right) {
  clear(c);
  UNROLL
  for (int k = 0; k < BLOCK / 16; ++k) add_halves(c, left[k], right, 16 * k, 0);
}

// The power of two that brings `largest` to [2^kHalvesExponent, 2^(kHalvesExponent + 1)); 1 for zero.
DEVICE float halves_scale(float largest) {
  const int exponent = static_cast<int>(bits_of(largest) >> 23 & 0xff), wanted = 254 + kHalvesExponent - exponent;
  return exponent == 0 ? 1.0f : float_of(static_cast<uint32_t>(minimum(wanted, 254)) << 23);
}

// Scales what all warps of a block hold alike, for the largest of its elements. `s_largest` is room for a number a warp,
// which no one may read any more; gives the factor.
template <int COUNT>
DEVICE float rescale(Fragment (&c)[COUNT], float* s_largest) {
  float largest = 0.0f;
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) largest = max_of(largest, fabsf(c[j].x[i]));
  }
  largest = warp_max(largest);
  if (lane_index() == 0) s_largest[warp_index()] = largest;
  sync_block();
  for (int i = 0; i < num_threads() / 32; ++i) largest = max_of(largest, s_largest[i]);
  const float factor = halves_scale(largest);
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) c[j].x[i] *= factor;
  }
  return factor;
}

// From this warp's rows of Z_0 in b_z to those of the last Z; `a` are those of A, times kHalvesUnit.
template <int BLOCK>
DEVICE void pinv_steps_halves(const HalvesLeft (&a)[BLOCK / 16], Fragment (&b_z)[BLOCK / 8], const HalvesSlot<BLOCK>& z,
                              const HalvesSlot<BLOCK>& p, float* s_largest, int iterations) {
  const int row = 16 * warp_index();
  float back = 1.0f;  // from the scale of b_z
  for (int step = 0; step < iterations; ++step) {
    back /= rescale(b_z, s_largest);
    store_halves(z, b_z, row, 0);
    sync_block();
    Fragment b[BLOCK / 8];
    multiply_halves<BLOCK>(b, a, z);
    UNROLL
    for (int j = 0; j < BLOCK / 8; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) b[j].x[i] *= back;
    }
    store_halves(p, b, row, 0);
    HalvesLeft left[BLOCK / 16];
    halves_left<BLOCK>(left, b_z);
    sync_block();
    for (int v = 0; v < 3; ++v) {
      const float factor = v == 0 ? 7.0f : v == 1 ? 15.0f : 13.0f, outer = v == 2 ? 0.25f : 1.0f;
      multiply_halves<BLOCK>(b, left, p);
      UNROLL
      for (int j = 0; j < BLOCK / 8; ++j) {
        UNROLL
        for (int i = 0; i < 4; ++i) b[j].x[i] = outer * (factor * b_z[j].x[i] - b[j].x[i] / kHalvesUnit);
      }
      if (v < 2) halves_left<BLOCK>(left, b);
    }
    UNROLL
    for (int j = 0; j < BLOCK / 8; ++j) b_z[j] = b[j];
  }
  UNROLL
  for (int j = 0; j < BLOCK / 8; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) b_z[j].x[i] *= back;
  }
}

}  // namespace nystromgan
