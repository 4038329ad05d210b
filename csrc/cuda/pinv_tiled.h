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

// out = alpha (a b + other_a other_b) + beta add of every matrix, all (PADDED, PADDED); out may be add.
struct Product {
  float* out;
  float alpha;
  const float *a, *b, *other_a, *other_b;  // the other two null for none
  float beta;
  const float* add;  // null for none
};

// Called and not inlined: beside the pointers of all phases its registers would spill.
CALLED void multiply_all(const Product& p, int64_t count, int size, int64_t stride) {
  const int tiles = ceil_div(size, kTile);
  auto source = [&](const float* x, int64_t matrix) { return Source<false>{x + matrix * stride, size, size, size}; };
  for (int64_t item = block_index(); item < count * tiles * tiles; item += num_blocks()) {
    const int64_t matrix = item / (tiles * tiles);
    const int row = static_cast<int>(item / tiles % tiles) * kTile, column = static_cast<int>(item % tiles) * kTile;
    TilePart c;
    multiply_tile(c, source(p.a, matrix), source(p.b, matrix), row, column);
    if (p.other_a) add_tile(c, source(p.other_a, matrix), source(p.other_b, matrix), row, column);
    for_each_element(c, row, column, [&](int r, int k, float x) {
      if (r < size && k < size) {
        const int64_t element = matrix * stride + static_cast<int64_t>(r) * size + k;
        x *= p.alpha;
        if (p.add) x += p.beta * p.add[element];
        p.out[element] = x;
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

// A with its padding, and Z_0; with DERIVATIVE also A' = G^T and Z_0'.
template <bool DERIVATIVE>
DEVICE void start_all(const PinvTiled& p) {
  const int size = p.padded_size, inside = p.size;
  const int64_t m = static_cast<int64_t>(size) * size, stride = (DERIVATIVE ? 2 : 1) * kPinvMatrices * m;
  const Norms largest = p.global_init ? largest_norms(p.norms, p.count) : Norms{0.0f, 0.0f};
  for_all_elements(p.count, size, [&](int64_t matrix, int row, int column) {
    const bool in = row < inside && column < inside;
    const float scale =
        scale_of(p.global_init ? largest : Norms{p.norms[2 * matrix], p.norms[2 * matrix + 1]});
    const int64_t source = (matrix * inside + row) * inside + column;
    float* own = p.work + matrix * stride;
    const int64_t here = static_cast<int64_t>(row) * size + column, transposed = static_cast<int64_t>(column) * size + row;
    const float x = in ? p.matrix[source] : 0.0f;
    own[here] = x, own[m + transposed] = x / scale;
    if constexpr (DERIVATIVE) {
      const float grad = in ? p.grad_output[source] : 0.0f;
      own += kPinvMatrices * m;
      own[transposed] = grad, own[m + here] = grad / scale;
    }
  });
}

// All steps, after which Z is where Z_0 was, and with DERIVATIVE Z' where Z_0' was.
template <bool DERIVATIVE>
DEVICE void steps_all(const PinvTiled& p) {
  const int size = p.padded_size;
  const int64_t m = static_cast<int64_t>(size) * size, moved = kPinvMatrices * m, stride = (DERIVATIVE ? 2 : 1) * moved;
  float *const a = p.work, *const z = a + m, *const product = a + 2 * m;
  for (int step = 0; step < p.iterations; ++step) {
    for (int v = 0; v < 4; ++v) {  // P, V1, V2 and the next Z
      float* const out = v == 0 ? product : v == 3 ? z : a + (2 + v) * m;
      float* const left = v == 0 ? a : v == 1 ? z : a + (1 + v) * m;
      float* const right = v == 0 ? z : product;
      const float alpha = v == 0 ? 1.0f : v == 3 ? -0.25f : -1.0f, beta = v == 1 ? 7.0f : v == 2 ? 15.0f : 3.25f;
      const float* const add = v == 0 ? nullptr : z;
      multiply_all({out, alpha, left, right, nullptr, nullptr, beta, add}, p.count, size, stride);
      if constexpr (DERIVATIVE)
        multiply_all({out + moved, alpha, left + moved, right, left, right + moved, beta, add ? add + moved : nullptr},
                     p.count, size, stride);
      sync_grid();
    }
  }
}

DEVICE void pinv_tiled(const PinvTiled& p) {
  const int64_t m = static_cast<int64_t>(p.padded_size) * p.padded_size;
  start_all<false>(p);
  sync_grid();
  steps_all<false>(p);
  for_all_elements(p.count, p.size, [&](int64_t i, int row, int column) {
    p.inverse[(i * p.size + row) * p.size + column] =
        p.work[(i * kPinvMatrices + 1) * m + static_cast<int64_t>(row) * p.padded_size + column];
  });
}

// Z once more, and dA = (Z')^T.
DEVICE void pinv_tiled_backward(const PinvTiled& p) {
  const int64_t m = static_cast<int64_t>(p.padded_size) * p.padded_size;
  start_all<true>(p);
  sync_grid();
  steps_all<true>(p);
  for_all_elements(p.count, p.size, [&](int64_t i, int row, int column) {
    const float* z = p.work + (2 * i * kPinvMatrices + 1) * m + static_cast<int64_t>(row) * p.padded_size + column;
    p.inverse[(i * p.size + row) * p.size + column] = z[0];
    p.grad_matrix[(i * p.size + column) * p.size + row] = z[kPinvMatrices * m];
  });
}

}  // namespace nystromgan
