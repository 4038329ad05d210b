// What the copy engine of sm_90 (TMA) needs to know of a tensor (B, H, rows, columns) whose columns are side by side.
#pragma once

#include <stdint.h>

namespace nystromgan {

// Of boxes of 64 columns and some rows of one head, with zeros beyond the tensor; make_tensor_map of launch.h makes it.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// What `opaque` holds in the emulation.
struct EmulatedMap {
  const uint16_t* data;
  int64_t row_stride, head_stride, batch_stride;
  int columns, rows, box_rows;
};

}  // namespace nystromgan
