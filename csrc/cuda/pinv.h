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

// One iterate (BLOCK, BLOCK) to memory, which the backward reads back.
template <int BLOCK>
DEVICE void keep_rows(float* kept, Fragment (&c)[BLOCK / 8], int row) {
  for_each_element(c, row, 0, [&](int r, int column, float& x) { kept[r * BLOCK + column] = x; });
}

// `iterations` steps from the Z in s_z, which ends with the last; A is read through `a`, s_p is room for P.
// After P is made Z's rows serve their own warp alone, so V1 and V2 take their place. With KEEP, every step's Z, P, V1
// and V2 go to `iterates`.
template <int BLOCK, bool KEEP, class Left>
DEVICE void pinv_steps(const Left& a, float* s_z, float* s_p, float* iterates, int iterations) {
  constexpr int kStride = Slot<BLOCK>::kStride, kColumns = BLOCK / 8;
  const Matrix<false> z{s_z, kStride}, p{s_p, kStride};
  const int row = 16 * warp_index();
  for (int step = 0; step < iterations; ++step) {
    Fragment b_z[kColumns], b[kColumns];
    load_rows<BLOCK>(b_z, s_z, row);
    if constexpr (KEEP) keep_rows<BLOCK>(iterates, b_z, row);
    clear(b);
    multiply_rows(b, a, z, row, 0, BLOCK);
    store_rows<BLOCK>(s_p, b, row);
    if constexpr (KEEP) keep_rows<BLOCK>(iterates + BLOCK * BLOCK, b, row);
    sync_block();
    for (int v = 0; v < 3; ++v) {
      const float factor = v == 0 ? 7.0f : v == 1 ? 15.0f : 13.0f, outer = v == 2 ? 0.25f : 1.0f;
      clear(b);
      multiply_rows(b, z, p, row, 0, BLOCK);
      UNROLL
      for (int j = 0; j < kColumns; ++j) {
        UNROLL
        for (int i = 0; i < 4; ++i) b[j].x[i] = outer * (factor * b_z[j].x[i] - b[j].x[i]);
      }
      sync_warp();
      store_rows<BLOCK>(s_z, b, row);
      sync_warp();
      if constexpr (KEEP) {
        if (v < 2) keep_rows<BLOCK>(iterates + (2 + v) * BLOCK * BLOCK, b, row);
      }
    }
    if constexpr (KEEP) iterates += kPinvIterates * BLOCK * BLOCK;
    sync_block();
  }
}

// Z_0 = A^T / (|A|_1 |A|_inf) from A^T in s_z.
template <int BLOCK>
DEVICE void pinv_start(float* s_z, float* s_sums, const float* norms, int64_t count) {
  const Norms own = norms_of<BLOCK>(s_z, s_sums);
  const float scale = scale_of(norms ? largest_norms(norms, count) : own);
  for (int i = thread_index(); i < BLOCK * BLOCK; i += num_threads())
    s_z[i / BLOCK * Slot<BLOCK>::kStride + i % BLOCK] /= scale;
  sync_block();
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
    pinv_steps<BLOCK, false>(Matrix<false>{s_a, Slot<BLOCK>::kStride}, s_z, s_p, nullptr, problem.iterations);
  else
    pinv_steps<BLOCK, false>(a, s_z, s_p, nullptr, problem.iterations);
  for (int i = thread_index(); i < size * size; i += num_threads())
    problem.inverse[offset + i] = s_z[i / size * Slot<BLOCK>::kStride + i % size];
}

// Shared matrices of the backward, beside its sums: G, P, V2, V1, Z, A, X = dV2, Y = dV1 and dP.
constexpr int kPinvBackwardSlots = 9;

// From dZ of the last iterate in s_grad to that of Z_0, there, and A's through the products, back through every step:
//     dV2 = -dZ P^T / 4   dV1 = -dV2 P^T   dP = -V2^T dZ / 4 - V1^T dV2 - Z^T dV1
//     dZ <- 13/4 dZ + 15 dV2 + 7 dV1 - dV1 P^T + A^T dP   dA += dP Z^T
template <int BLOCK>
DEVICE void pinv_steps_backward(float* s_slots, const float* iterates, Fragment (&grad_a)[BLOCK / 8], int iterations) {
  constexpr int kStride = Slot<BLOCK>::kStride, kFloats = Slot<BLOCK>::kFloats, kColumns = BLOCK / 8;
  float *s_grad = s_slots, *s_kept[kPinvIterates], *s_a = s_slots + 5 * kFloats;
  for (int i = 0; i < kPinvIterates; ++i) s_kept[i] = s_slots + (1 + i) * kFloats;  // Z, P, V1, V2
  float *s_x = s_slots + 6 * kFloats, *s_y = s_slots + 7 * kFloats, *s_grad_p = s_slots + 8 * kFloats;
  const Matrix<false> grad{s_grad, kStride}, x{s_x, kStride}, y{s_y, kStride}, grad_p{s_grad_p, kStride};
  const Matrix<true> z_t{s_kept[0], kStride}, p_t{s_kept[1], kStride}, v1_t{s_kept[2], kStride},
      v2_t{s_kept[3], kStride}, a_t{s_a, kStride};
  const int row = 16 * warp_index();
  for (int step = iterations - 1; step >= 0; --step) {
    const float* kept = iterates + static_cast<int64_t>(step) * kPinvIterates * BLOCK * BLOCK;
    for (int i = 4 * thread_index(); i < kPinvIterates * BLOCK * BLOCK; i += 4 * num_threads()) {
      const int matrix = i / (BLOCK * BLOCK), element = i % (BLOCK * BLOCK);
      copy_async(s_kept[0] + matrix * kFloats + element / BLOCK * kStride + element % BLOCK, kept + i, 16);
    }
    commit_copies();
    wait_copies<0>();
    sync_block();
    Fragment b[kColumns], b_p[kColumns], b_next[kColumns];
    clear(b);
    multiply_rows(b, grad, p_t, row, 0, BLOCK);
    clear(b_p);
    multiply_rows(b_p, v2_t, grad, row, 0, BLOCK);
    load_rows<BLOCK>(b_next, s_grad, row);
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        b[j].x[i] *= -0.25f;
        b_p[j].x[i] *= 0.25f;
        b_next[j].x[i] = 3.25f * b_next[j].x[i] + 15.0f * b[j].x[i];
      }
    }
    store_rows<BLOCK>(s_x, b, row);
    sync_block();
    clear(b);
    multiply_rows(b, x, p_t, row, 0, BLOCK);
    multiply_rows(b_p, v1_t, x, row, 0, BLOCK);
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        b[j].x[i] = -b[j].x[i];
        b_next[j].x[i] += 7.0f * b[j].x[i];
      }
    }
    store_rows<BLOCK>(s_y, b, row);
    sync_block();
    multiply_rows(b_p, z_t, y, row, 0, BLOCK);
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) b_p[j].x[i] = -b_p[j].x[i];
    }
    store_rows<BLOCK>(s_grad_p, b_p, row);
    clear(b);
    multiply_rows(b, y, p_t, row, 0, BLOCK);
    sync_block();
    multiply_rows(grad_a, grad_p, z_t, row, 0, BLOCK);
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) b_next[j].x[i] -= b[j].x[i];
    }
    multiply_rows(b_next, a_t, grad_p, row, 0, BLOCK);
    store_rows<BLOCK>(s_grad, b_next, row);
    sync_block();
  }
}

template <int BLOCK>
DEVICE void pinv_chip_backward(const PinvChip& problem) {
  constexpr int kStride = Slot<BLOCK>::kStride, kFloats = Slot<BLOCK>::kFloats;
  float* s_slots = reinterpret_cast<float*>(shared_memory());
  float *s_grad = s_slots, *s_z = s_slots + kFloats, *s_p = s_slots + 2 * kFloats, *s_a = s_slots + 5 * kFloats;
  const int size = problem.size, row = 16 * warp_index();
  const int64_t offset = static_cast<int64_t>(block_index()) * size * size;
  float* iterates = problem.iterates + static_cast<int64_t>(block_index()) * kPinvIterates * problem.iterations * BLOCK * BLOCK;
  load_matrix<BLOCK>(Bounded{problem.matrix + offset, size}, s_z, s_a);
  pinv_start<BLOCK>(s_z, s_p, problem.norms, problem.count);
  pinv_steps<BLOCK, true>(Matrix<false>{s_a, kStride}, s_z, s_p, iterates, problem.iterations);
  const Bounded grad_output{problem.grad_output + offset, size};
  for (int i = thread_index(); i < BLOCK * BLOCK; i += num_threads())
    s_grad[i / BLOCK * kStride + i % BLOCK] = grad_output.at(i / BLOCK, i % BLOCK);
  sync_block();
  Fragment grad_a[BLOCK / 8];
  clear(grad_a);
  pinv_steps_backward<BLOCK>(s_slots, iterates, grad_a, problem.iterations);
  for_each_element(grad_a, row, 0, [&](int r, int column, float& x) {
    if (r < size && column < size) problem.grad_matrix[offset + r * size + column] = x;
  });
  for (int i = thread_index(); i < size * size; i += num_threads())
    problem.grad_start[offset + i] = s_grad[i / size * kStride + i % size];
}

}  // namespace nystromgan
