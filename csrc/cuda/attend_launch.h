// Launches of the attention passes: which kernel takes a dtype, a layout and a number of channels, and in what shape.
#pragma once

#include "attend.h"
#include "attend_small_problems.h"
#include "launch.h"

namespace nystromgan {

// A tensor (B, H, tokens, channels), or with `token_axis` 3 (B, H, channels, tokens).
Operand operand_of(const Tensor& x, int token_axis = 2);

// Fills in the sizes of a pass by blocks of queries or keys. `splits` of the others share each row, by `split_others` of
// them each, a multiple of 64; a block takes `row_steps` times its rows.
struct AttendShape {
  int64_t batch, heads, rows, others, dim, value_dim;
  double scale;
  int64_t splits = 1, split_others = 0, row_steps = 1;
};

AttendSizes sizes_of(const AttendShape& shape, int64_t block_rows, int64_t slices);

void launch_attend(const Tensor& on, Dtype dtype, bool channel_major, const AttendShape& shape, AttendForward problem);

void launch_attend_gradient(const Tensor& on, Dtype dtype, bool channel_major, GradientOf of, const AttendShape& shape,
                            AttendGradient problem);

void launch_row_dots(const Tensor& on, Dtype dtype, const RowDots& problem);

void launch_total(const Tensor& on, const Total& problem);

}  // namespace nystromgan
