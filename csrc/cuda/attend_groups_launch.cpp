#include "attend_groups_launch.h"

#include <algorithm>
#include <atomic>

#include "attend_groups_problems.h"

#define DECLARE_GROUPS(pass, dtype)                                                     \
  DECLARE_KERNEL(attend_##pass##_##dtype##_groups, attend_##pass##_##dtype##_64_groups) \
  DECLARE_KERNEL(attend_##pass##_##dtype##_groups, attend_##pass##_##dtype##_128_groups)
#define DECLARE_DTYPE(dtype)                                                               \
  DECLARE_GROUPS(forward, dtype)                                                           \
  DECLARE_GROUPS(query, dtype)                                                             \
  DECLARE_GROUPS(key_value, dtype)                                                         \
  DECLARE_KERNEL(attend_tokens_##dtype##_groups, attend_forward_##dtype##_tokens_groups)   \
  DECLARE_KERNEL(attend_tokens_##dtype##_groups, attend_stream_##dtype##_tokens_groups)
DECLARE_DTYPE(bfloat16)
DECLARE_DTYPE(float16)

#define OF_DTYPE(pass, suffix) \
  (dtype == Dtype::bfloat16 ? kernel_attend_##pass##_bfloat16_##suffix : kernel_attend_##pass##_float16_##suffix)
#define OF_CHANNELS(pass) (wide ? OF_DTYPE(pass, 128_groups) : OF_DTYPE(pass, 64_groups))

namespace nystromgan {
namespace {

// 0 never; 1 where the copy engine can bring the operands; 2 wherever the kernels can. Unmeasured.
std::atomic<int> groups_allowed{1};

constexpr int64_t kGroupRows = 64, kGroupThreads = 128, kTokens = 64, kSwizzleBytes = 1024, kBytes = 2;
constexpr int64_t kMostLandmarks = 256;  // that a block keeps while rows come by

// Bytes of a tile of 64 tokens with so many channels in all.
int64_t tile_bytes(int64_t channels) { return kBytes * kTokens * channels; }

// Whether the device has groups of warps: where it has none, a kernel is compiled as one that takes fewer threads.
bool has_groups(const Tensor& on, const Kernel& kernel) { return most_threads(kernel, on) >= kGroupThreads; }

// As many groups as share what comes by, and all multiprocessors get.
int64_t map_consumers(const Tensor& on, const AttendShape& shape) {
  const int64_t heads = shape.batch * shape.heads;
  int64_t consumers = kMostMapConsumers;
  while (consumers > 1 && heads * ceil_of(shape.rows, kGroupRows * consumers) < multiprocessors(on)) --consumers;
  return consumers;
}

// Stages of a ring in `limit` bytes of shared memory beside what a block keeps, and the bytes of all that.
struct RingBytes {
  int64_t stages, bytes;
};

RingBytes ring_bytes(int64_t own, int64_t stage, int64_t limit) {
  const int64_t fixed = kSwizzleBytes + own + 8 * (1 + 2 * kMostStages);  // to begin where swizzles do; barriers
  const int64_t stages = std::min<int64_t>(kMostStages, (limit - fixed) / stage);
  return {stages, fixed + stages * stage};
}

// A pass over maps whose blocks own `own` channels of each token, and `stage` come by.
template <class Problem>
bool launch_over_maps(const Tensor& on, const Kernel& kernel, const AttendShape& shape, int64_t own, int64_t stage,
                      Problem& problem) {
  problem.consumers = static_cast<int>(map_consumers(on, shape));
  const RingBytes ring = ring_bytes(problem.consumers * tile_bytes(own), tile_bytes(stage), shared_limit(on));
  if (ring.stages < 2) return false;
  const int64_t rows = kGroupRows * problem.consumers;
  problem.pass.sizes = sizes_of(shape, rows, 1);
  problem.pass.sizes.stages = static_cast<int>(ring.stages);
  launch(kernel,
         {shape.batch * shape.heads * problem.pass.sizes.row_groups,
          static_cast<int>(problem.consumers * kGroupThreads + kMapCopiers), static_cast<size_t>(ring.bytes)},
         &problem, on);
  return true;
}

// A pass over tokens: rows that a block owns stay while others come by, or others that a block keeps while rows do.
bool launch_over_tokens(const Tensor& on, const Kernel& kernel, AttendShape shape, bool rows_come, GroupForward& problem) {
  const int64_t heads = shape.batch * shape.heads, row = tile_bytes(kTokenDim), other = tile_bytes(2 * kTokenDim);
  if (rows_come) {
    const int64_t tiles = ceil_of(shape.rows, kGroupRows);
    shape.row_steps = std::max<int64_t>(1, heads * tiles / (kTokenBlocks * multiprocessors(on)));
  }
  const int64_t own = rows_come ? ceil_of(shape.others, kTokens) * other : row;
  const RingBytes ring = ring_bytes(own, rows_come ? row : other, shared_limit(on));
  if (ring.stages < 2) return false;
  problem.consumers = kTokenConsumers;
  problem.pass.sizes = sizes_of(shape, kGroupRows, 1);
  problem.pass.sizes.stages = static_cast<int>(ring.stages);
  launch(kernel,
         {heads * problem.pass.sizes.row_groups * problem.pass.sizes.splits,
          static_cast<int>(kTokenConsumers * kGroupThreads + kTokenCopiers), static_cast<size_t>(ring.bytes)},
         &problem, on);
  return true;
}

// Makes the maps of one pass's operands; `all` while the copy engine can bring each.
struct Maps {
  const Tensor& on;
  Dtype dtype;
  bool channel_major;
  const AttendShape& shape;
  bool all = true;

  void add(TensorMap* map, const Operand& x, int64_t tokens, int64_t channels, int64_t box_channels) {
    const MapOf maps{x.data, tokens, channels, shape.heads, shape.batch, x.channel, x.head, x.batch, box_channels};
    const MapOf rows{x.data, channels, tokens, shape.heads, shape.batch, x.token, x.head, x.batch, kTokens};
    all = all && x.wide && make_tensor_map(map, channel_major ? maps : rows, dtype, on);
  }
};

bool takes_maps(Dtype dtype, const AttendShape& shape) {
  return groups_allowed && dtype != Dtype::float32 && shape.dim <= kMapDim && shape.value_dim <= 128 && shape.splits == 1 &&
         shape.row_steps == 1;
}

bool takes_tokens(Dtype dtype, const AttendShape& shape) {
  return groups_allowed && dtype != Dtype::float32 && shape.dim <= kTokenDim && shape.value_dim <= kTokenDim;
}

}  // namespace

bool launch_attend_groups(const Tensor& on, Dtype dtype, bool channel_major, const AttendShape& shape, AttendForward pass) {
  if (!(channel_major ? takes_maps(dtype, shape) : takes_tokens(dtype, shape))) return false;
  const bool wide = shape.value_dim > 64;
  const bool rows_come = !channel_major && shape.splits == 1 && shape.others <= kMostLandmarks && shape.rows > shape.others;
  const Kernel& kernel = channel_major ? OF_CHANNELS(forward)
                         : rows_come   ? OF_DTYPE(stream, tokens_groups)
                                       : OF_DTYPE(forward, tokens_groups);
  if (!has_groups(on, kernel)) return false;
  for (Operand* x : {&pass.query, &pass.key, &pass.value}) x->wide &= (channel_major ? x->token : x->channel) == 1;
  const int64_t dim = channel_major ? kMapDim : kTokenDim, channels = wide ? 128 : 64;
  GroupForward problem{pass, 0, false, {}, {}, {}};
  Maps maps{on, dtype, channel_major, shape, !pass.mask};
  maps.add(&problem.query, pass.query, shape.rows, shape.dim, dim);
  maps.add(&problem.key, pass.key, shape.others, shape.dim, dim);
  maps.add(&problem.value, pass.value, shape.others, shape.value_dim, channels);
  problem.boxes = maps.all;
  if (!maps.all && (groups_allowed < 2 || rows_come)) return false;
  return channel_major ? launch_over_maps(on, kernel, shape, dim, dim + channels, problem)
                       : launch_over_tokens(on, kernel, shape, rows_come, problem);
}

bool launch_attend_groups_gradient(const Tensor& on, Dtype dtype, GradientOf of, const AttendShape& shape, AttendGradient pass) {
  if (of == GradientOf::stats || !takes_maps(dtype, shape)) return false;
  const bool wide = shape.value_dim > 64;
  const Kernel& kernel = of == GradientOf::query ? OF_CHANNELS(query) : OF_CHANNELS(key_value);
  if (!has_groups(on, kernel)) return false;
  for (Operand* x : {&pass.first, &pass.second, &pass.other_first, &pass.other_second}) x->wide &= x->token == 1;
  const int64_t channels = wide ? 128 : 64;
  GroupGradient problem{pass, 0, false, {}, {}, {}, {}};
  Maps maps{on, dtype, true, shape, !pass.mask};
  maps.add(&problem.first, pass.first, shape.rows, shape.dim, kMapDim);
  maps.add(&problem.second, pass.second, shape.rows, shape.value_dim, channels);
  maps.add(&problem.other_first, pass.other_first, shape.others, shape.dim, kMapDim);
  maps.add(&problem.other_second, pass.other_second, shape.others, shape.value_dim, channels);
  problem.boxes = maps.all;
  if (!maps.all && groups_allowed < 2) return false;
  return launch_over_maps(on, kernel, shape, kMapDim + channels, kMapDim + channels, problem);
}

}  // namespace nystromgan

// Which products of groups of warps may be taken, as groups_allowed says; 1 at first. For measurements beside those of warps.
extern "C" __attribute__((visibility("default"))) void nystromgan_cuda_allow_groups(int allowed) {
  nystromgan::groups_allowed = allowed;
}
