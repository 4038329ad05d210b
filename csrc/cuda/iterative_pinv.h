// What the iterative_pinv binding hands to its kernels.
//
// M is the side of a matrix. The steps are evaluated from the left, so that three products share their right operand:
//     P = A Z    V1 = 7 Z - Z P    V2 = 15 Z - V1 P    Z <- (13 Z - V2 P) / 4
#pragma once

#include <stdint.h>

namespace nystromgan {

constexpr int kPinvIterates = 4;  // Z, P, V1 and V2 of a step, which the backward reads

// One block a matrix, which it keeps in shared memory.
struct PinvChip {
  const float* matrix;       // (count, M, M)
  const float* norms;        // (count, 2): |A|_1 and |A|_inf, whose largest start every matrix; null: each its own
  float* inverse;            // (count, M, M)
  const float* grad_output;  // (count, M, M): of the backward
  float* iterates;           // (count, 4 iterations, BLOCK, BLOCK): of the backward
  float* grad_matrix;        // (count, M, M): through the products alone
  float* grad_start;         // (count, M, M): of Z_0
  int64_t count;
  int size, iterations;
};

// Tiles of all matrices shared by all blocks of a cooperative launch, through memory; or, of the forward, each matrix by a
// cluster of blocks, which needs neither `padded` nor room for iterates, and `norms` only of a start that is shared.
struct PinvTiled {
  const float* matrix;       // (count, M, M)
  const float* norms;        // (count, 2)
  float* inverse;            // (count, M, M): of the forward
  const float* grad_output;  // (count, M, M): of the backward, as are
  float* grad_matrix;        // (count, M, M)
  float* grad_start;         // (count, M, M)
  float* padded;             // (count, PADDED, PADDED): A, its rows and columns filled up to a multiple of 16
  float* iterates;           // (count, 4 iterations + 1, PADDED, PADDED), or the 4 that a forward alone needs
  float* work;               // (count, 6, PADDED, PADDED): of the backward
  int64_t count;
  int size, padded_size, iterations;
  bool global_init;
};

struct PinvNorms {
  const float* matrix;  // (count, M, M)
  float* norms;         // (count, 2)
  int64_t count;
  int size;
};

// Adds to A's gradient what comes through Z_0 = A^T / (|A|_1 |A|_inf).
struct PinvStart {
  const float* matrix;      // (count, M, M)
  const float* norms;       // (count, 2)
  const float* grad_start;  // (count, M, M)
  float* dots;              // (count): of grad_start and A^T
  float* grad_matrix;       // (count, M, M)
  int64_t count;
  int size;
  bool global_init;
};

}  // namespace nystromgan
