// The iterative pseudo-inverse through memory: the tiles of every product are shared by all blocks of a cooperative
// launch, which wait for each other after it.
#pragma once

#include "iterative_pinv.h"
#include "matmul.h"
#include "pinv.h"

#if NYSTROMGAN_EMULATION
#define CALLED inline
#else
#define CALLED __device__ __noinline__
#endif

namespace nystromgan {

// out = alpha A B + beta add of every matrix, all (PADDED, PADDED); out may be add.
template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
struct Product {
  float* out;
  float alpha;
  const float *a, *b;
  float beta;
  const float* add;
  int64_t stride_out, stride_a, stride_b, stride_add;  // from one matrix to the next
};

// Called and not inlined: beside the pointers of all phases its registers would spill.
template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
CALLED void multiply_all(const Product<LEFT_TRANSPOSED, RIGHT_TRANSPOSED>& p, int64_t count, int size) {
  const int tiles = ceil_div(size, kTile);
  for (int64_t item = block_index(); item < count * tiles * tiles; item += num_blocks()) {
    const int64_t matrix = item / (tiles * tiles);
    const int row = static_cast<int>(item / tiles % tiles) * kTile, column = static_cast<int>(item % tiles) * kTile;
    TilePart c;
    multiply_tile(c, Source<LEFT_TRANSPOSED>{p.a + matrix * p.stride_a, size, size, size},
                  Source<RIGHT_TRANSPOSED>{p.b + matrix * p.stride_b, size, size, size}, row, column);
    for_each_element(c, row, column, [&](int r, int k, float x) {
      if (r < size && k < size) {
        const int64_t element = static_cast<int64_t>(r) * size + k;
        x *= p.alpha;
        if (p.add) x += p.beta * p.add[matrix * p.stride_add + element];
        p.out[matrix * p.stride_out + element] = x;
      }
    });
  }
}

// Calls body(matrix, row, column) for every element of `count` matrices of `size` rows.
template <class Body>
DEVICE void for_all_elements(int64_t count, int size, Body body) {
  const int64_t total = count * size * size;
  for (int64_t i = static_cast<int64_t>(block_index()) * num_threads() + thread_index(); i < total;
       i += static_cast<int64_t>(num_blocks()) * num_threads()) {
    const int64_t row = i / size;
    body(row / size, static_cast<int>(row % size), static_cast<int>(i % size));
  }
}

// A with its padding, and Z_0.
DEVICE void start_all(const PinvTiled& p, float* z, int64_t stride) {
  const int size = p.padded_size, inside = p.size;
  const Norms largest = p.global_init ? largest_norms(p.norms, p.count) : Norms{0.0f, 0.0f};
  for_all_elements(p.count, size, [&](int64_t matrix, int row, int column) {
    const bool in = row < inside && column < inside;
    const float x = in ? p.matrix[(matrix * inside + row) * inside + column] : 0.0f;
    const float scale =
        scale_of(p.global_init ? largest : Norms{p.norms[2 * matrix], p.norms[2 * matrix + 1]});
    p.padded[(matrix * size + row) * size + column] = x;
    z[matrix * stride + static_cast<int64_t>(column) * size + row] = x / scale;
  });
}

// The steps from the first of `iterates`, which lie `step_size` after each other: (Z, P, V1, V2) of every step kept where
// that is 4 matrices, overwritten where it is 0. Gives where the last Z is.
DEVICE float* steps_all(const PinvTiled& p, int64_t stride, int64_t step_size) {
  const int size = p.padded_size;
  const int64_t matrix = static_cast<int64_t>(size) * size;
  float* z = p.iterates;
  for (int step = 0; step < p.iterations; ++step, z += step_size) {
    for (int v = 0; v < kPinvIterates; ++v) {  // P, V1, V2 and the next Z
      const float factor = v == 1 ? 7.0f : v == 2 ? 15.0f : 3.25f;
      float* out = v == 3 ? z + step_size : z + (v + 1) * matrix;
      const float* left = v == 0 ? p.padded : v == 1 ? z : z + v * matrix;
      multiply_all(
          Product<false, false>{out, v == 0 ? 1.0f : v == 3 ? -0.25f : -1.0f, left, v == 0 ? z : z + matrix, factor,
                                v == 0 ? nullptr : z, stride, v == 0 ? matrix : stride, stride, stride},
          p.count, size);
      sync_grid();
    }
  }
  return z;
}

DEVICE void pinv_tiled(const PinvTiled& p) {
  const int64_t matrix = static_cast<int64_t>(p.padded_size) * p.padded_size, stride = kPinvIterates * matrix;
  start_all(p, p.iterates, stride);
  sync_grid();
  const float* z = steps_all(p, stride, 0);
  for_all_elements(p.count, p.size, [&](int64_t i, int row, int column) {
    p.inverse[(i * p.size + row) * p.size + column] = z[i * stride + static_cast<int64_t>(row) * p.padded_size + column];
  });
}

// As pinv_steps_backward; `work` of every matrix is dZ, the next dZ, X = dV2, Y = dV1, dP and dA.
DEVICE void pinv_tiled_backward(const PinvTiled& p) {
  const int size = p.padded_size;
  const int64_t m = static_cast<int64_t>(size) * size, stride = (kPinvIterates * p.iterations + 1) * m, w = 6 * m;
  float *grad = p.work, *next = grad + m, *x = grad + 2 * m, *y = grad + 3 * m, *grad_p = grad + 4 * m, *grad_a = grad + 5 * m;
  start_all(p, p.iterates, stride);
  for_all_elements(p.count, size, [&](int64_t i, int row, int column) {
    const int64_t element = i * w + static_cast<int64_t>(row) * size + column;
    const bool inside = row < p.size && column < p.size;
    grad[element] = inside ? p.grad_output[(i * p.size + row) * p.size + column] : 0.0f;
    grad_a[element] = 0.0f;
  });
  sync_grid();
  steps_all(p, stride, kPinvIterates * m);
  for (int step = p.iterations - 1; step >= 0; --step) {
    const float *z = p.iterates + step * kPinvIterates * m, *product = z + m;
    for (int phase = 0; phase < 4; ++phase) {
      const float alpha = phase == 0 ? -0.25f : phase == 3 ? 1.0f : -1.0f;
      // dV2, dV1, what dV1 passes on through P, and dA
      float* out = phase == 0 ? x : phase == 1 ? y : phase == 2 ? next : grad_a;
      const float* left = phase == 0 ? grad : phase == 1 ? x : phase == 2 ? y : grad_p;
      multiply_all(Product<false, true>{out, alpha, left, phase == 3 ? z : product, 1.0f, phase == 3 ? grad_a : nullptr,
                                        w, w, stride, w}, p.count, size);
      // dP three times, and what dP passes on through A
      out = phase == 3 ? next : grad_p;
      left = phase == 3 ? p.padded : phase == 0 ? z + 3 * m : phase == 1 ? z + 2 * m : z;
      const float* right = phase == 0 ? grad : phase == 1 ? x : phase == 2 ? y : grad_p;
      multiply_all(Product<true, false>{out, alpha, left, right, 1.0f, phase == 0 ? nullptr : out,
                                        w, phase == 3 ? m : stride, w, w}, p.count, size);
      if (phase == 1 || phase == 2)
        for_all_elements(p.count, size, [&](int64_t i, int row, int column) {
          const int64_t element = i * w + static_cast<int64_t>(row) * size + column;
          grad[element] = phase == 1 ? 3.25f * grad[element] + 15.0f * x[element] : grad[element] + 7.0f * y[element];
        });
      sync_grid();
    }
    for_all_elements(p.count, size, [&](int64_t i, int row, int column) {
      const int64_t element = i * w + static_cast<int64_t>(row) * size + column;
      grad[element] += next[element];
    });
    sync_grid();
  }
  for_all_elements(p.count, p.size, [&](int64_t i, int row, int column) {
    const int64_t to = (i * p.size + row) * p.size + column, from = i * w + static_cast<int64_t>(row) * size + column;
    p.grad_matrix[to] = grad_a[from];
    p.grad_start[to] = grad[from];
  });
}

}  // namespace nystromgan
