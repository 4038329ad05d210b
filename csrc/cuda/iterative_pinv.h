// What the iterative_pinv binding hands to its kernels.
//
// M is the side of a matrix. The steps are evaluated from the left, so that three products share their right operand:
//     P = A Z    V1 = 7 Z - Z P    V2 = 15 Z - V1 P    Z <- (13 Z - V2 P) / 4
//
// The backward goes forward too, and needs no earlier step. While c of Z_0 = A^T / c stays, Z^T is the gradient in A of a
// number (Z = A^T f(A A^T) for a polynomial f), so its derivative is its own adjoint: for a gradient G of Z, dA = (Z')^T,
// where Z' is the derivative of Z as A moves along A' = G^T. And Z(t A, t^2 c) = Z(A, c) / t gives
//     d c = -(<G, Z> + <A, dA>) / 2c.
#pragma once

#include <stdint.h>

namespace nystromgan {

// One block a matrix, which it keeps in shared memory.
struct PinvChip {
  const float* matrix;       // (count, M, M)
  const float* norms;        // (count, 2): |A|_1 and |A|_inf, whose largest start every matrix; null: each its own
  float* inverse;            // (count, M, M)
  const float* grad_output;  // (count, M, M): of the backward, as is
  float* grad_matrix;        // (count, M, M): while c stays
  int64_t count;
  int size, iterations;
};

// Tiles of all matrices shared by all blocks of a cooperative launch, through memory; or, of the forward, each matrix by a
// cluster of blocks, which needs no room, and `norms` only of a start that is shared.
struct PinvTiled {
  const float* matrix;       // (count, M, M)
  const float* norms;        // (count, 2)
  float* inverse;            // (count, M, M)
  const float* grad_output;  // (count, M, M): of the backward, as is
  float* grad_matrix;        // (count, M, M): while c stays
  float* work;               // (count, kPinvMatrices, PADDED, PADDED), of the backward twice as many
  int64_t count;
  int size, padded_size, iterations;  // M filled up to a multiple of 16
  bool global_init;
};

constexpr int kPinvMatrices = 5;  // A, Z, P, V1 and V2; then their derivatives

struct PinvNorms {
  const float* matrix;  // (count, M, M)
  float* norms;         // (count, 2)
  int64_t count;
  int size;
};

// Adds to A's gradient what comes through c = |A|_1 |A|_inf.
struct PinvStart {
  const float* matrix;       // (count, M, M)
  const float* norms;        // (count, 2)
  const float* grad_output;  // (count, M, M): G
  const float* inverse;      // (count, M, M): Z
  float* dots;               // (count): c (<G, Z> + <A, dA>) / 2
  float* grad_matrix;        // (count, M, M)
  int64_t count;
  int size;
  bool global_init;
};

}  // namespace nystromgan
