// Batched iterative pseudo-inverse, forward and backward.
#include "iterative_pinv.h"

#include "isa.h"
#include "pinv.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

// [m, m] -> square [m, ld]
void load_square(int64_t m, const float* src, float* dst) {
  const int64_t ld = padded_ld(m);
  for (int64_t r = 0; r < m; ++r) {
    memcpy(dst + r * ld, src + r * m, m * sizeof(float));
    memset(dst + r * ld + m, 0, (ld - m) * sizeof(float));
  }
}

void store_square(int64_t m, const float* src, float* dst) {
  for (int64_t r = 0; r < m; ++r) memcpy(dst + r * m, src + r * padded_ld(m), m * sizeof(float));
}

// |A|_1 and |A|_inf of every matrix, or with global_init the batch's largest, each with the matrix that attains it.
struct BatchNorms {
  explicit BatchNorms(const PinvForward& p) : columns(p.batch), rows(p.batch), global(p.global_init) {
    const int64_t m = p.size;
    parallel(p.run, p.batch, [&](int64_t begin, int64_t end) {
      Scratch square(square_size(m)), line(padded_ld(m));
      for (int64_t i = begin; i < end; ++i) {
        load_square(m, p.matrix + i * m * m, square);
        const Norms norm = norms(m, square, line);
        columns[i] = norm.column, rows[i] = norm.row;
      }
    });
    for (int64_t i = 1; i < p.batch; ++i) {
      if (larger(columns[i], columns[column_matrix])) column_matrix = i;
      if (larger(rows[i], rows[row_matrix])) row_matrix = i;
    }
  }
  float column(int64_t i) const { return columns[global ? column_matrix : i]; }
  float row(int64_t i) const { return rows[global ? row_matrix : i]; }

  Scratch columns, rows;
  bool global;
  int64_t column_matrix = 0, row_matrix = 0;
};

void forward(const PinvForward& p) {
  const int64_t m = p.size, size = square_size(m);
  const BatchNorms norm(p);
  for_each_matrix(p.run, p.threads, p.batch, m, [&](int64_t i, ParallelRun team) {
    Scratch a(size), chain(8 * size);
    load_square(m, p.matrix + i * m * m, a);
    const float c = initial_scale(norm.column(i), norm.row(i));
    store_square(m, pinv_chain(team, m, a, c, p.iterations, p.iterations, false, chain), p.inverse + i * m * m);
  });
}

void backward(const PinvBackward& p) {
  const int64_t m = p.forward.size, size = square_size(m), steps = p.forward.iterations;
  const BatchNorms norm(p.forward);
  Scratch grad_scale(p.forward.batch);  // d c of every matrix
  auto add_norms = [&](int64_t i, const float* a, float grad_c, bool column, bool row, float* grad) {
    if (norm.column(i) * norm.row(i) == 0.0f) return;
    Scratch line(padded_ld(m));
    const Norms own = norms(m, a, line);
    if (column) add_norm_gradient(m, a, grad_c * norm.row(i), own.column_index, true, grad);
    if (row) add_norm_gradient(m, a, grad_c * norm.column(i), own.row_index, false, grad);
  };
  for_each_matrix(p.forward.run, p.forward.threads, p.forward.batch, m, [&](int64_t i, ParallelRun team) {
    Scratch a(size), chain((4 * steps + 1) * size), scratch(5 * size), grad_z(size), grad_a(size), grad(size);
    load_square(m, p.forward.matrix + i * m * m, a);
    load_square(m, p.grad_output + i * m * m, grad);
    scaled_transpose(m, m, 1.0f, grad, padded_ld(m), grad_z, padded_ld(m));
    memset(grad_a, 0, size * sizeof(float));
    const float c = initial_scale(norm.column(i), norm.row(i));
    pinv_chain(team, m, a, c, steps, steps, true, chain);
    grad_scale[i] = pinv_chain_backward(team, m, a, c, steps, steps, chain, grad_z, grad_a, scratch);
    scaled_transpose(m, m, 1.0f, grad_a, padded_ld(m), grad, padded_ld(m));
    if (!p.forward.global_init) add_norms(i, a, grad_scale[i], true, true, grad);
    store_square(m, grad, p.grad_matrix + i * m * m);
  });
  if (!p.forward.global_init) return;
  float total = 0;
  for (int64_t i = 0; i < p.forward.batch; ++i) total += grad_scale[i];
  auto add_global = [&](int64_t i, bool column, bool row) {
    Scratch a(size), grad(size);
    load_square(m, p.forward.matrix + i * m * m, a);
    load_square(m, p.grad_matrix + i * m * m, grad);
    add_norms(i, a, total, column, row, grad);
    store_square(m, grad, p.grad_matrix + i * m * m);
  };
  add_global(norm.column_matrix, true, false);
  add_global(norm.row_matrix, false, true);
}

}  // namespace

void iterative_pinv(const PinvForward& p) { forward(p); }
void iterative_pinv_backward(const PinvBackward& p) { backward(p); }

}  // namespace nystromgan::NYSTROMGAN_ISA
