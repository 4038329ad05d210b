#include "attend_launch.h"

#include <algorithm>

#include "attend_groups_launch.h"

#define DECLARE_PASSES(dtype, channels, major)                                                   \
  DECLARE_KERNEL(attend_forward_##dtype##_##channels##_##major, attend_forward_##dtype##_##channels##_##major)       \
  DECLARE_KERNEL(attend_query_##dtype##_##channels##_##major, attend_query_##dtype##_##channels##_##major)           \
  DECLARE_KERNEL(attend_key_value_##dtype##_##channels##_##major, attend_key_value_##dtype##_##channels##_##major)
#define DECLARE_DTYPE(dtype)                      \
  DECLARE_PASSES(dtype, 64, tokens)               \
  DECLARE_PASSES(dtype, 64, maps)                 \
  DECLARE_KERNEL(attend_stats_##dtype, attend_stats_##dtype) \
  DECLARE_KERNEL(attend_small, attend_row_dots_##dtype)
DECLARE_DTYPE(float32)
DECLARE_DTYPE(bfloat16)
DECLARE_DTYPE(float16)
DECLARE_PASSES(bfloat16, 128, tokens)
DECLARE_PASSES(bfloat16, 128, maps)
DECLARE_PASSES(float16, 128, tokens)
DECLARE_PASSES(float16, 128, maps)
DECLARE_KERNEL(attend_small, attend_total)

namespace nystromgan {
namespace {

// One kernel's tiles: channels of a result, tokens that come by at a time, rows of a block.
struct Tiles {
  const Kernel& kernel;
  int64_t channels, step, rows, bytes;
};

enum class Pass { forward, query, key_value };

#define CHOOSE_PASS(dtype, channels, major)                                                   \
  (pass == Pass::forward ? kernel_attend_forward_##dtype##_##channels##_##major               \
   : pass == Pass::query ? kernel_attend_query_##dtype##_##channels##_##major                 \
                         : kernel_attend_key_value_##dtype##_##channels##_##major)

Tiles tiles_of(Pass pass, Dtype dtype, bool maps, int64_t widest) {
  if (dtype == Dtype::float32)
    return {maps ? CHOOSE_PASS(float32, 64, maps) : CHOOSE_PASS(float32, 64, tokens), 64, 32, 32, 4};
  const bool wide = widest > 64, bfloat16 = dtype == Dtype::bfloat16;
  const Kernel& narrow = bfloat16 ? (maps ? CHOOSE_PASS(bfloat16, 64, maps) : CHOOSE_PASS(bfloat16, 64, tokens))
                                  : (maps ? CHOOSE_PASS(float16, 64, maps) : CHOOSE_PASS(float16, 64, tokens));
  const Kernel& broad = bfloat16 ? (maps ? CHOOSE_PASS(bfloat16, 128, maps) : CHOOSE_PASS(bfloat16, 128, tokens))
                                 : (maps ? CHOOSE_PASS(float16, 128, maps) : CHOOSE_PASS(float16, 128, tokens));
  // With two results, steps of 64 take more registers than there are.
  return wide ? Tiles{broad, 128, 32, 64, 2} : Tiles{narrow, 64, pass == Pass::key_value ? 32 : 64, 64, 2};
}

Tiles stats_tiles(Dtype dtype) {
  if (dtype == Dtype::float32) return {kernel_attend_stats_float32, 16, 32, 32, 4};
  return {dtype == Dtype::bfloat16 ? kernel_attend_stats_bfloat16 : kernel_attend_stats_float16, 16, 64, 64, 2};
}

// Bytes of a tile of `tokens`, as tokens.h lays it out.
int64_t tile_bytes(const Tiles& tiles, bool maps, int64_t tokens, int64_t channels) {
  const int64_t padded = ceil_of(channels, 16) * 16, pad = 16 / tiles.bytes;
  return tiles.bytes * (maps ? padded * (tokens + pad) : tokens * (padded + pad));
}

// With two stages of what comes by where shared memory has room.
template <class Problem>
void launch_pass(const Tensor& on, const Tiles& tiles, const AttendShape& shape, int64_t own, int64_t stage, Problem& problem) {
  const int64_t limit = static_cast<int64_t>(shared_limit(on));
  problem.sizes.stages = own + 2 * stage <= limit ? 2 : 1;
  const int64_t bytes = own + problem.sizes.stages * stage;
  STD_TORCH_CHECK(bytes <= limit, "nystromgan: a block of ", tiles.kernel.name, " needs ", bytes,
                  " bytes of shared memory, the device gives ", limit);
  const AttendSizes& sizes = problem.sizes;
  const int64_t blocks = shape.batch * shape.heads * sizes.row_groups * sizes.slices * sizes.splits;
  launch(tiles.kernel, {blocks, static_cast<int>(2 * tiles.rows), static_cast<size_t>(bytes)}, &problem, on);
}

bool reads_wide(const Operand& x, int64_t bytes) {
  const int64_t width = 16 / bytes, across = x.channel == 1 ? x.token : x.channel;
  return (x.channel == 1 || x.token == 1) && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && across % width == 0 &&
         x.batch % width == 0 && x.head % width == 0;
}

}  // namespace

AttendSizes sizes_of(const AttendShape& shape, int64_t block_rows, int64_t slices) {
  AttendSizes sizes{};
  sizes.heads = static_cast<int>(shape.heads), sizes.rows = static_cast<int>(shape.rows);
  sizes.others = static_cast<int>(shape.others), sizes.dim = static_cast<int>(shape.dim);
  sizes.value_dim = static_cast<int>(shape.value_dim), sizes.row_steps = static_cast<int>(shape.row_steps);
  sizes.row_groups = static_cast<int>(ceil_of(shape.rows, block_rows * shape.row_steps));
  sizes.slices = static_cast<int>(slices), sizes.splits = static_cast<int>(shape.splits);
  sizes.split_others = static_cast<int>(shape.splits > 1 ? shape.split_others : shape.others);
  sizes.scale_log2 = static_cast<float>(shape.scale * 1.4426950408889634);
  return sizes;
}

Operand operand_of(const Tensor& x, int token_axis) {
  Operand operand{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(token_axis),
                  x.stride(5 - token_axis), false};
  operand.wide = reads_wide(operand, x.element_size());
  return operand;
}

void launch_attend(const Tensor& on, Dtype dtype, bool channel_major, const AttendShape& shape, AttendForward problem) {
  if (launch_attend_groups(on, dtype, channel_major, shape, problem)) return;
  const Tiles tiles = tiles_of(Pass::forward, dtype, channel_major, shape.value_dim);
  problem.sizes = sizes_of(shape, tiles.rows, ceil_of(shape.value_dim, tiles.channels));
  for (Operand* x : {&problem.query, &problem.key, &problem.value}) x->wide &= (channel_major ? x->token : x->channel) == 1;
  const int64_t value_tile = std::min(shape.value_dim, tiles.channels);
  launch_pass(on, tiles, shape, tile_bytes(tiles, channel_major, tiles.rows, shape.dim),
              tile_bytes(tiles, channel_major, tiles.step, shape.dim) +
                  tile_bytes(tiles, channel_major, tiles.step, value_tile),
              problem);
}

void launch_attend_gradient(const Tensor& on, Dtype dtype, bool channel_major, GradientOf of, const AttendShape& shape,
                            AttendGradient problem) {
  problem.scale = static_cast<float>(shape.scale);
  if (channel_major && launch_attend_groups_gradient(on, dtype, of, shape, problem)) return;
  const bool of_keys = of == GradientOf::key_value, of_stats = of == GradientOf::stats;
  const int64_t widest = of_keys ? std::max(shape.dim, shape.value_dim) : shape.dim;
  const Tiles tiles = of_stats ? stats_tiles(dtype)
                               : tiles_of(of_keys ? Pass::key_value : Pass::query, dtype, channel_major, widest);
  problem.sizes = sizes_of(shape, tiles.rows, of_stats ? 1 : ceil_of(widest, tiles.channels));
  for (Operand* x : {&problem.first, &problem.second, &problem.other_first, &problem.other_second})
    x->wide &= (channel_major ? x->token : x->channel) == 1;
  auto pair = [&](int64_t tokens) {
    return tile_bytes(tiles, channel_major, tokens, shape.dim) + tile_bytes(tiles, channel_major, tokens, shape.value_dim);
  };
  launch_pass(on, tiles, shape, pair(tiles.rows), pair(tiles.step), problem);
}

void launch_row_dots(const Tensor& on, Dtype dtype, const RowDots& problem) {
  const Kernel& kernel = dtype == Dtype::float32    ? kernel_attend_row_dots_float32
                         : dtype == Dtype::bfloat16 ? kernel_attend_row_dots_bfloat16
                                                    : kernel_attend_row_dots_float16;
  const int64_t threads = problem.rows * (problem.channel_major ? 1 : 32);
  launch(kernel, {ceil_of(threads, kSmallThreads), kSmallThreads, 0}, &problem, on);
}

void launch_total(const Tensor& on, const Total& problem) {
  launch(kernel_attend_total, {1, kSmallThreads, 64}, &problem, on);
}

}  // namespace nystromgan
