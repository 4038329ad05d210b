// The norms of matrices, and the gradient of the start Z_0 = A^T / (|A|_1 |A|_inf), whose maxima pass theirs on to the
// first line that has them; where a batch shares its largest norms, to all matrices that have them, in equal parts.
#pragma once

#include "pinv.h"

namespace nystromgan {

constexpr int kStartThreads = 256;
constexpr int kMostPinv = 512;

// Sums of magnitudes of the columns, into s_sums[0, M), and of the rows, into s_sums[M, 2 M).
DEVICE void line_sums(const Bounded& a, float* s_sums) {
  const int size = a.size;
  for (int column = thread_index(); column < size; column += num_threads()) {
    float sum = 0.0f;
    for (int row = 0; row < size; ++row) sum += fabsf(a.at(row, column));
    s_sums[column] = sum;
  }
  for (int row = warp_index(); row < size; row += num_threads() / 32) {
    float sum = 0.0f;
    for (int column = lane_index(); column < size; column += 32) sum += fabsf(a.at(row, column));
    sum = warp_sum(sum);
    if (lane_index() == 0) s_sums[size + row] = sum;
  }
  sync_block();
}

struct Largest {
  float value;
  int first;
};

// The largest of `count` numbers, and the first place that has it; the same in every lane of a warp.
DEVICE Largest largest_of(const float* x, int count) {
  float value = 0.0f;
  for (int i = lane_index(); i < count; i += 32) value = max_of(value, x[i]);
  value = warp_max(value);
  float first = static_cast<float>(count);  // exact: there are at most 512
  for (int i = lane_index(); i < count; i += 32)
    if (x[i] == value) first = first < static_cast<float>(i) ? first : static_cast<float>(i);
  return {value, static_cast<int>(-warp_max(-first))};
}

DEVICE void pinv_norms(const PinvNorms& p) {
  float* s_sums = reinterpret_cast<float*>(shared_memory());
  const int64_t matrix = block_index();
  line_sums({p.matrix + matrix * p.size * p.size, p.size}, s_sums);
  const float column = largest_of(s_sums, p.size).value, row = largest_of(s_sums + p.size, p.size).value;
  if (thread_index() == 0) p.norms[2 * matrix] = column, p.norms[2 * matrix + 1] = row;
}

// What `dots` has of one matrix, by its block: of all others it is needed too where they share a start.
DEVICE float start_dot(const PinvStart& p, int64_t matrix, float scale, float* s_parts) {
  const int64_t offset = matrix * p.size * p.size;
  float sum = 0.0f;
  for (int64_t i = offset + thread_index(); i < offset + p.size * p.size; i += num_threads())
    sum += p.grad_output[i] * p.inverse[i] + p.matrix[i] * p.grad_matrix[i];
  sum = warp_sum(sum);
  if (lane_index() == 0) s_parts[warp_index()] = sum;
  sync_block();
  sum = 0.0f;
  for (int i = 0; i < num_threads() / 32; ++i) sum += s_parts[i];
  sync_block();
  return 0.5f * scale * sum;
}

DEVICE void pinv_start_dots(const PinvStart& p) {
  const float scale = scale_of(largest_norms(p.norms, p.count));
  const float dot = start_dot(p, block_index(), scale, reinterpret_cast<float*>(shared_memory()));
  if (thread_index() == 0) p.dots[block_index()] = dot;
}

// A batch's share in the gradient of its largest norms: the sum of all dots, and how many have each maximum.
struct Shared {
  float dot, column_ties, row_ties;
};

DEVICE Shared shared_start(const PinvStart& p, Norms largest) {
  Shared all{0.0f, 0.0f, 0.0f};
  for (int64_t i = lane_index(); i < p.count; i += 32) {
    all.dot += p.dots[i];
    all.column_ties += p.norms[2 * i] == largest.column ? 1.0f : 0.0f;
    all.row_ties += p.norms[2 * i + 1] == largest.row ? 1.0f : 0.0f;
  }
  return {warp_sum(all.dot), warp_sum(all.column_ties), warp_sum(all.row_ties)};
}

DEVICE void pinv_start_gradient(const PinvStart& p) {
  float* s_sums = reinterpret_cast<float*>(shared_memory());
  const int64_t matrix = block_index(), offset = matrix * p.size * p.size;
  const int size = p.size;
  line_sums({p.matrix + offset, size}, s_sums);
  const Largest column = largest_of(s_sums, size), row = largest_of(s_sums + size, size);
  Norms norms{column.value, row.value};
  sync_block();  // before the sums give way
  Shared all{p.global_init ? 0.0f : start_dot(p, matrix, scale_of(norms), s_sums), 1.0f, 1.0f};
  if (p.global_init) {
    norms = largest_norms(p.norms, p.count);
    all = shared_start(p, norms);
    all.column_ties = column.value == norms.column ? all.column_ties : INFINITY;
    all.row_ties = row.value == norms.row ? all.row_ties : INFINITY;
  }
  const float scale = scale_of(norms);
  const float grad_scale = norms.column * norms.row == 0.0f ? 0.0f : -all.dot / scale / scale;
  const float to_column = grad_scale * norms.row / all.column_ties, to_row = grad_scale * norms.column / all.row_ties;
  for (int i = thread_index(); i < size * size; i += num_threads()) {
    const int r = i / size, c = i % size;
    const float a = p.matrix[offset + i], sign = a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : 0.0f;
    const float picked = (c == column.first ? to_column : 0.0f) + (r == row.first ? to_row : 0.0f);
    p.grad_matrix[offset + i] += sign * picked;
  }
}

}  // namespace nystromgan
