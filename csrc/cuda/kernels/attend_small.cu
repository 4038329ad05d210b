#include "attend_small.h"

namespace nystromgan {
KERNEL(attend_row_dots_float32, RowDots, kSmallThreads, 1) { row_dots<float>(p); }
KERNEL(attend_row_dots_bfloat16, RowDots, kSmallThreads, 1) { row_dots<BFloat16>(p); }
KERNEL(attend_row_dots_float16, RowDots, kSmallThreads, 1) { row_dots<Half>(p); }
KERNEL(attend_total, Total, kSmallThreads, 1) { total(p); }
}  // namespace nystromgan
