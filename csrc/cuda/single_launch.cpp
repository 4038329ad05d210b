#include "single_launch.h"

#include <algorithm>
#include <atomic>

DECLARE_KERNEL(nystrom_single_bfloat16_64, nystrom_single_bfloat16_64)
DECLARE_KERNEL(nystrom_single_bfloat16_128, nystrom_single_bfloat16_128)
DECLARE_KERNEL(nystrom_single_float16_64, nystrom_single_float16_64)
DECLARE_KERNEL(nystrom_single_float16_128, nystrom_single_float16_128)
DECLARE_KERNEL(nystrom_single_float32_64, nystrom_single_float32_64)

namespace nystromgan {
namespace {

constexpr int64_t kSide = kSingleLandmarks, kStages = 2, kLeastContextSplit = 128, kStep = 64;

std::atomic<int> single_allowed{1};

int64_t padded(int64_t channels) { return ceil_of(channels, 16) * 16; }

// A kernel, the keys that come by at a time, and bytes of an element.
struct Choice {
  const Kernel& kernel;
  int64_t step, bytes;

  int64_t tile(int64_t tokens, int64_t channels) const { return bytes * tokens * (channels + 16 / bytes); }
};

Choice choose(Dtype dtype, int64_t value_dim) {
  const bool wide = value_dim > 64;
  if (dtype == Dtype::float32) return {kernel_nystrom_single_float32_64, 32, 4};
  if (dtype == Dtype::bfloat16)
    return {wide ? kernel_nystrom_single_bfloat16_128 : kernel_nystrom_single_bfloat16_64, wide ? 32 : 64, 2};
  return {wide ? kernel_nystrom_single_float16_128 : kernel_nystrom_single_float16_64, wide ? 32 : 64, 2};
}

// The most that any phase lays out.
size_t shared_bytes(const Choice& choice, int64_t dim, int64_t value_dim) {
  const int64_t pool_tokens = 256 / choice.bytes, slot = kSide * (kSide + 4) * 4;
  const int64_t pool = kPoolStages * choice.tile(pool_tokens, kPoolChannels) + 4 * pool_tokens;
  static_assert(kPoolStages * 128 * 72 * 2 >= kPoolExchangeBytes && kPoolStages * 64 * 68 * 4 >= kPoolExchangeBytes);
  const int64_t core = 2 * 2 * 2 * kSide * (kSide + 8) + 4 * kSide / 16;  // Z and P in halves, and a float a warp
  const int64_t context =
      choice.tile(kSide, dim) + kStages * (choice.tile(choice.step, dim) + choice.tile(choice.step, value_dim));
  const int64_t mix = slot + 4 * kSide * (kMixColumns + 4);
  const int64_t output = 3 * choice.tile(kSide, dim) + std::max(mix, 2 * choice.tile(kSide, value_dim));
  return static_cast<size_t>(std::max({pool, core, context, output}));
}

Operand tokens_of(const Tensor& x) {
  Operand operand = operand_of(x);
  operand.wide &= operand.channel == 1;
  return operand;
}

// Hands out parts of one tensor, each at a multiple of 16 bytes; with no tensor it only counts.
struct Room {
  float* data = nullptr;
  int64_t taken = 0;

  float* take(int64_t count) {
    float* part = data ? data + taken : nullptr;
    taken += ceil_of(count, 4) * 4;
    return part;
  }
};

Pooled pooled(const Tensor& tokens, const std::optional<Index>& index, float* means, int64_t landmarks, Room& room) {
  const int64_t rows = tokens.size(0) * tokens.size(1), dim = tokens.size(3);
  Pooled side{};
  side.tokens = tokens_of(tokens), side.means = means;
  side.num_tokens = static_cast<int>(tokens.size(2)), side.dim = static_cast<int>(dim);
  if (!index) return side;
  side.index = *index;
  side.splits = tokens.size(2) > kSingleTokens / 2 ? 2 * kPoolSplits : kPoolSplits;
  side.sums = room.take(rows * side.splits * landmarks * padded(dim));
  side.counts = room.take(rows * side.splits * landmarks);
  return side;
}

AttendSizes sizes_of(const SingleCall& call, int64_t rows, int64_t others, int64_t value_dim) {
  AttendSizes sizes{};
  sizes.heads = static_cast<int>(call.query.size(1)), sizes.rows = static_cast<int>(rows);
  sizes.others = static_cast<int>(others), sizes.dim = static_cast<int>(call.query.size(3));
  sizes.value_dim = static_cast<int>(value_dim), sizes.stages = kStages, sizes.splits = 1;
  sizes.scale_log2 = static_cast<float>(call.scale * 1.4426950408889634);
  return sizes;
}

// Everything but what the number of blocks decides. Memory comes from `room`.
NystromSingle problem_of(const SingleCall& call, Room& room) {
  const int64_t landmarks = call.mixed.size(2), rows = call.query.size(0) * call.query.size(1), keys = call.key.size(2);
  const int64_t dim = call.query.size(3), value_dim = call.value.size(3), wide = padded(value_dim);
  const int64_t narrow_bytes = static_cast<int64_t>(call.query.element_size());
  NystromSingle p{};
  p.query = pooled(call.query, call.query_index, floats(call.query_means), landmarks, room);
  p.key = pooled(call.key, call.key_index, floats(call.key_means), landmarks, room);
  if (call.exact) p.value = pooled(call.value, call.value_index, nullptr, landmarks, room);
  p.value.only = bytes_of(call.exact);
  p.keys.sizes = sizes_of(call, landmarks, keys, wide);
  const int64_t most = std::min<int64_t>(kContextSplits, ceil_of(keys, kLeastContextSplit));
  const int64_t split = ceil_of(ceil_of(keys, most), kStep) * kStep, splits = ceil_of(keys, split);
  p.keys.sizes.splits = static_cast<int>(splits), p.keys.sizes.split_others = static_cast<int>(split);
  p.keys.key = tokens_of(call.key), p.keys.value = tokens_of(call.value), p.keys.mask = bytes_of(call.key_padding_mask);
  const int64_t parts = rows * splits * landmarks;
  p.keys.sums = room.take(parts * wide), p.keys.largest = room.take(parts), p.keys.totals = room.take(parts);
  p.queries.sizes = sizes_of(call, call.query.size(2), landmarks, value_dim);
  p.queries.query = tokens_of(call.query), p.queries.output = tokens_of(call.output);
  p.queries.mask = bytes_of(call.key_absent);
  p.query_absent = bytes_of(call.query_absent), p.inverse = room.take(rows * kSide * kSide);
  p.context = floats(call.context), p.mixed = floats(call.mixed), p.logsumexp = floats(call.logsumexp);
  p.narrow_key = room.take(ceil_of(rows * landmarks * padded(dim) * narrow_bytes, 4));
  p.narrow_mixed = room.take(ceil_of(rows * landmarks * wide * narrow_bytes, 4));
  p.rows = rows, p.heads = static_cast<int>(call.query.size(1)), p.landmarks = static_cast<int>(landmarks);
  p.dim = static_cast<int>(dim), p.value_dim = static_cast<int>(value_dim), p.iterations = static_cast<int>(call.iterations);
  return p;
}

// How many groups the queries of a head make, so that every block has one where there are enough blocks.
void group_queries(NystromSingle& p, int64_t blocks) {
  const int64_t tiles = ceil_of(p.queries.sizes.rows, kSide);
  const int64_t wanted = std::clamp<int64_t>(blocks / p.rows, 1, tiles);
  p.group_tiles = static_cast<int>(ceil_of(tiles, wanted));
  p.row_groups = static_cast<int>(ceil_of(tiles, p.group_tiles));
}

}  // namespace

// M is what four warps hold in registers, 16 rows each; D and E what two blocks of a multiprocessor hold in registers and
// shared memory; a start from the whole batch's norms would need one more meeting of all blocks; and with more tokens than
// kSingleTokens the passes over them take the time, which have their own grids in launches of their own. B and H do not
// enter: a row's bits must not depend on what else is in the batch. Unmeasured: that it is one launch in the place of 11 to
// 15, of 1 to 3 us each where they are short, is why it is taken.
bool takes_single_launch(Dtype dtype, int64_t queries, int64_t keys, int64_t landmarks, int64_t widest, bool global_init) {
  const int64_t tokens = std::max(queries, keys);
  return landmarks <= kSide && widest <= (dtype == Dtype::float32 ? 64 : 128) && !global_init &&
         (single_allowed > 1 || (single_allowed && tokens <= kSingleTokens));
}

void launch_single(const SingleCall& call) {
  Room count;
  problem_of(call, count);
  const Tensor work = empty(call.query, {count.taken}, ScalarType::Float);
  Room room{floats(work)};
  NystromSingle p = problem_of(call, room);
  const Choice choice = choose(dtype(call.query, "query"), p.value_dim);
  const size_t bytes = shared_bytes(choice, padded(p.dim), padded(p.value_dim));
  const int64_t resident = resident_blocks(choice.kernel, kSingleThreads, bytes, call.query);
  group_queries(p, resident);
  int64_t pools = 0;
  for (const Pooled* side : {&p.query, &p.key, &p.value}) pools += p.rows * side->splits * ceil_of(side->dim, kPoolChannels);
  const int64_t units = std::max({pools, p.rows * (1 + p.keys.sizes.splits), p.rows * p.row_groups,
                                  p.rows * p.keys.sizes.value_dim / kMixColumns});
  launch(choice.kernel, {std::min(resident, units), kSingleThreads, bytes, true}, &p, call.query);
}

}  // namespace nystromgan

// Whether nystrom_attention may take the single launch: 0 never, 1 as it does by itself, 2 of any number of tokens. For
// measurements and tests, which compare the two paths.
extern "C" __attribute__((visibility("default"))) void nystromgan_cuda_allow_single_launch(int allowed) {
  nystromgan::single_allowed = allowed;
}
