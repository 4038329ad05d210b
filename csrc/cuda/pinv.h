// The iterative pseudo-inverse of one matrix by one block, whose warps own 16 rows each of every matrix.
#pragma once

#include "iterative_pinv.h"
#include "tf32.h"

namespace nystromgan {

// A matrix of BLOCK rows in shared memory: rows start four banks apart, which the right operand reads without conflict.
template <int BLOCK>
struct Slot {
  static constexpr int kStride = BLOCK + 4, kFloats = BLOCK * kStride;
};

// A contiguous (M, M) matrix in memory, zero outside.
struct Bounded {
  const float* data;
  int size;

  DEVICE float at(int row, int column) const {
    return row < size && column < size ? data[static_cast<int64_t>(row) * size + column] : 0.0f;
  }
};

DEVICE SplitLeft left_of(const Bounded& x, int row, int depth) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  row += g, depth += 2 * t;
  return split_left(x.at(row, depth), x.at(row + 8, depth), x.at(row, depth + 1), x.at(row + 8, depth + 1));
}

// Largest sums of magnitudes of the rows of A and of A^T, which is `transposed` in shared memory: (|A|_1, |A|_inf).
// Needs 2 BLOCK floats of `sums`. Every thread gets both.
struct Norms {
  float column, row;
};

template <int BLOCK>
DEVICE Norms norms_of(const float* transposed, float* sums) {
  constexpr int kStride = Slot<BLOCK>::kStride;
  for (int i = thread_index(); i < 2 * BLOCK; i += num_threads()) {
    float sum = 0.0f;
    const int line = i % BLOCK;
    for (int k = 0; k < BLOCK; ++k) sum += fabsf(transposed[i < BLOCK ? line * kStride + k : k * kStride + line]);
    sums[i] = sum;
  }
  sync_block();
  Norms norms{0.0f, 0.0f};
  for (int k = lane_index(); k < BLOCK; k += 32) {
    norms.column = max_of(norms.column, sums[k]);
    norms.row = max_of(norms.row, sums[BLOCK + k]);
  }
  norms = {warp_max(norms.column), warp_max(norms.row)};
  sync_block();
  return norms;
}

// The largest of all matrices' norms; every thread gets both.
DEVICE Norms largest_norms(const float* norms, int64_t count) {
  Norms largest{0.0f, 0.0f};
  for (int64_t i = lane_index(); i < count; i += 32) {
    largest.column = max_of(largest.column, norms[2 * i]);
    largest.row = max_of(largest.row, norms[2 * i + 1]);
  }
  return {warp_max(largest.column), warp_max(largest.row)};
}

DEVICE float scale_of(Norms norms) {
  const float scale = norms.column * norms.row;
  return scale == 0.0f ? 1.0f : scale;
}

// Writes this warp's 16 rows.
template <int BLOCK>
DEVICE void store_rows(float* slot, Fragment (&c)[BLOCK / 8], int row) {
  for_each_element(c, row, 0, [&](int r, int column, float& x) { slot[r * Slot<BLOCK>::kStride + column] = x; });
}

template <int BLOCK>
DEVICE void load_rows(Fragment (&c)[BLOCK / 8], const float* slot, int row) {
  for_each_element(c, row, 0, [&](int r, int column, float& x) { x = slot[r * Slot<BLOCK>::kStride + column]; });
}

// c = factor (of Z's rows) - c, and a quarter of that in the last product of a step.
template <int COUNT>
DEVICE void combine(Fragment (&c)[COUNT], const Fragment (&z)[COUNT], int v) {
  const float factor = v == 0 ? 7.0f : v == 1 ? 15.0f : 13.0f, outer = v == 2 ? 0.25f : 1.0f;
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int i = 0; i < 4; ++i) c[j].x[i] = outer * (factor * z[j].x[i] - c[j].x[i]);
  }
}

// `iterations` steps from the Z in s_z, which ends with the last; A is read through `a`, s_p is room for P.
// After P is made Z's rows serve their own warp alone, so V1 and V2 take their place.
template <int BLOCK, class Left>
DEVICE void pinv_steps(const Left& a, float* s_z, float* s_p, int iterations) {
  constexpr int kStride = Slot<BLOCK>::kStride, kColumns = BLOCK / 8;
  const Matrix<false> z{s_z, kStride}, p{s_p, kStride};
  const int row = 16 * warp_index();
  for (int step = 0; step < iterations; ++step) {
    Fragment b_z[kColumns], b[kColumns];
    load_rows<BLOCK>(b_z, s_z, row);
    clear(b);
    multiply_rows(b, a, z, row, 0, BLOCK);
    store_rows<BLOCK>(s_p, b, row);
    sync_block();
    for (int v = 0; v < 3; ++v) {
      clear(b);
      multiply_rows(b, z, p, row, 0, BLOCK);
      combine(b, b_z, v);
      sync_warp();
      store_rows<BLOCK>(s_z, b, row);
      sync_warp();
    }
    sync_block();
  }
}

// The same with the derivative of every matrix, which lies `moved` floats behind it: of A B it is A' B + A B'.
template <int BLOCK>
DEVICE void pinv_steps_moved(const float* s_a, float* s_z, float* s_p, int moved, int iterations) {
  constexpr int kStride = Slot<BLOCK>::kStride, kColumns = BLOCK / 8;
  const Matrix<false> a{s_a, kStride}, z{s_z, kStride}, p{s_p, kStride};
  const Matrix<false> moved_a{s_a + moved, kStride}, moved_z{s_z + moved, kStride}, moved_p{s_p + moved, kStride};
  const int row = 16 * warp_index();
  for (int step = 0; step < iterations; ++step) {
    Fragment b_z[kColumns], b_moved_z[kColumns], b[kColumns], b_moved[kColumns];
    load_rows<BLOCK>(b_z, s_z, row);
    load_rows<BLOCK>(b_moved_z, s_z + moved, row);
    clear(b);
    multiply_rows(b, a, z, row, 0, BLOCK);
    clear(b_moved);
    multiply_rows(b_moved, moved_a, z, row, 0, BLOCK);
    multiply_rows(b_moved, a, moved_z, row, 0, BLOCK);
    store_rows<BLOCK>(s_p, b, row);
    store_rows<BLOCK>(s_p + moved, b_moved, row);
    sync_block();
    for (int v = 0; v < 3; ++v) {
      clear(b);
      multiply_rows(b, z, p, row, 0, BLOCK);
      clear(b_moved);
      multiply_rows(b_moved, moved_z, p, row, 0, BLOCK);
      multiply_rows(b_moved, z, moved_p, row, 0, BLOCK);
      combine(b, b_z, v);
      combine(b_moved, b_moved_z, v);
      sync_warp();
      store_rows<BLOCK>(s_z, b, row);
      store_rows<BLOCK>(s_z + moved, b_moved, row);
      sync_warp();
    }
    sync_block();
  }
}

// Z_0 = A^T / (|A|_1 |A|_inf) from A^T in s_z; gives the divisor.
template <int BLOCK>
DEVICE float pinv_start(float* s_z, float* s_sums, const float* norms, int64_t count) {
  const Norms own = norms_of<BLOCK>(s_z, s_sums);
  const float scale = scale_of(norms ? largest_norms(norms, count) : own);
  for (int i = thread_index(); i < BLOCK * BLOCK; i += num_threads())
    s_z[i / BLOCK * Slot<BLOCK>::kStride + i % BLOCK] /= scale;
  sync_block();
  return scale;
}

// A^T of a contiguous (M, M) matrix, and A itself where `s_a` is given, into shared memory with zeros around.
template <int BLOCK>
DEVICE void load_matrix(const Bounded& a, float* s_transposed, float* s_a) {
  constexpr int kStride = Slot<BLOCK>::kStride;
  for (int i = thread_index(); i < BLOCK * BLOCK; i += num_threads()) {
    const int row = i / BLOCK, column = i % BLOCK;
    const float x = a.at(row, column);
    s_transposed[column * kStride + row] = x;
    if (s_a) s_a[row * kStride + column] = x;
  }
  sync_block();
}

template <int BLOCK>
DEVICE void pinv_chip(const PinvChip& problem) {
  constexpr bool kHoldsA = BLOCK <= 64;  // three matrices of 128 rows are more than sm_80 holds
  float* s_z = reinterpret_cast<float*>(shared_memory());
  float* s_p = s_z + Slot<BLOCK>::kFloats;
  float* s_a = kHoldsA ? s_p + Slot<BLOCK>::kFloats : nullptr;
  const int size = problem.size;
  const int64_t offset = static_cast<int64_t>(block_index()) * size * size;
  const Bounded a{problem.matrix + offset, size};
  load_matrix<BLOCK>(a, s_z, s_a);
  pinv_start<BLOCK>(s_z, s_p, problem.norms, problem.count);
  if constexpr (kHoldsA)
    pinv_steps<BLOCK>(Matrix<false>{s_a, Slot<BLOCK>::kStride}, s_z, s_p, problem.iterations);
  else
    pinv_steps<BLOCK>(a, s_z, s_p, problem.iterations);
  for (int i = thread_index(); i < size * size; i += num_threads())
    problem.inverse[offset + i] = s_z[i / size * Slot<BLOCK>::kStride + i % size];
}

// Z once more, and dA = (Z')^T. Shared matrices are A, Z and P, and then their derivatives.
template <int BLOCK>
DEVICE void pinv_chip_backward(const PinvChip& problem) {
  constexpr int kStride = Slot<BLOCK>::kStride, kFloats = Slot<BLOCK>::kFloats, kMoved = 3 * kFloats;
  float *s_a = reinterpret_cast<float*>(shared_memory()), *s_z = s_a + kFloats, *s_p = s_a + 2 * kFloats;
  const int size = problem.size;
  const int64_t offset = static_cast<int64_t>(block_index()) * size * size;
  load_matrix<BLOCK>(Bounded{problem.matrix + offset, size}, s_z, s_a);
  const float scale = pinv_start<BLOCK>(s_z, s_p, problem.norms, problem.count);
  const Bounded grad{problem.grad_output + offset, size};
  for (int i = thread_index(); i < BLOCK * BLOCK; i += num_threads()) {
    const int row = i / BLOCK, column = i % BLOCK;
    const float x = grad.at(row, column);
    s_a[kMoved + column * kStride + row] = x;
    s_z[kMoved + row * kStride + column] = x / scale;
  }
  sync_block();
  pinv_steps_moved<BLOCK>(s_a, s_z, s_p, kMoved, problem.iterations);
  for (int i = thread_index(); i < size * size; i += num_threads()) {
    problem.inverse[offset + i] = s_z[i / size * kStride + i % size];
    problem.grad_matrix[offset + i] = s_z[kMoved + i % size * kStride + i / size];
  }
}

}  // namespace nystromgan
