// Phase 1 of nystrom_single.h: sums of tokens over their landmarks, as a product of the one-hot index and the tokens.
#pragma once

#include "blocks.h"
#include "nystrom_single.h"
#include "tokens.h"

namespace nystromgan {

template <class T>
using PoolTile = Tile<T, kPoolTokens<T>, false>;

DEVICE int pool_slices(const Pooled& p) { return ceil_div(p.dim, kPoolChannels); }

DEVICE int64_t pool_units(const Pooled& p, int64_t rows) { return p.sums ? rows * p.splits * pool_slices(p) : 0; }

// Sets the tokens without a landmark, which may hold anything, to zero: zero times infinity is none.
template <class T>
DEVICE void clear_outside(const PoolTile<T>& tile, int landmark) {
  if (thread_index() >= kPoolTokens<T> || landmark >= 0) return;
  for (int channel = 0; channel < tile.channels; ++channel) tile.data[thread_index() * tile.stride() + channel] = T{};
}

// A warp's sums and counts of its tokens, by 16 landmarks.
struct PoolSums {
  static constexpr int kGroups = kSingleLandmarks / 16;
  Fragment sums[kGroups][kPoolChannels / 8];
  float counts[kGroups][2];
};

// Adds this warp's tokens of a tile, 16 at a time. Most of those are of one group of landmarks, and the others are left out.
template <class T>
DEVICE void add_tile(PoolSums& own, const PoolTile<T>& tile, const int* s_index) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int token = 16 * warp_index(); token < kPoolTokens<T>; token += 16 * kSingleThreads / 32) {
    int landmark[4];
    UNROLL
    for (int i = 0; i < 4; ++i) landmark[i] = s_index[token + 8 * (i / 2) + 2 * t + i % 2];
    UNROLL
    for (int group = 0; group < PoolSums::kGroups; ++group) {
      bool here = false;
      UNROLL
      for (int i = 0; i < 4; ++i) here |= landmark[i] >> 4 == group;
      if (!any_of(here)) continue;
      Fragment one_hot[2];
      UNROLL
      for (int i = 0; i < 8; ++i) {
        const bool mine = landmark[i / 4 * 2 + i % 2] == 16 * group + g + 8 * (i / 2 % 2);
        one_hot[i / 4].x[i % 4] = mine ? 1.0f : 0.0f;
        own.counts[group][i / 2 % 2] += mine ? 1.0f : 0.0f;
      }
      const Tile<T, 16, false> tokens{tile.data + token * tile.stride(), tile.channels};
      add_weighted<kPoolChannels>(own.sums[group], one_hot, tokens, 0);
    }
  }
}

// Adds the warps' sums in their order, each warp those of 16 landmarks, and writes them. Shared memory holds half of them.
DEVICE void write_sums(const Pooled& p, PoolSums& own, int64_t part, int first_channel, int landmarks) {
  constexpr int kWarps = kSingleThreads / 32, kHalf = kPoolChannels / 16, kEach = PoolSums::kGroups * kHalf * 4;
  static_assert(kWarps == PoolSums::kGroups, "a warp for every 16 landmarks");
  float* s_sums = reinterpret_cast<float*>(shared_memory());
  float* s_counts = s_sums + kWarps * kEach * 32;
  const int g = lane_index() / 4, t = lane_index() % 4, dim = padded_channels(p.dim), warp = warp_index();
  auto place = [&](int of_warp, int element, int count) { return (of_warp * count + element) * 32 + lane_index(); };
  UNROLL
  for (int half = 0; half < 2; ++half) {
    sync_block();
    UNROLL
    for (int group = 0; group < PoolSums::kGroups; ++group) {
      UNROLL
      for (int i = 0; i < 4 * kHalf; ++i)
        s_sums[place(warp, group * 4 * kHalf + i, kEach)] = own.sums[group][half * kHalf + i / 4].x[i % 4];
      UNROLL
      for (int h = 0; h < 2 && half == 0; ++h) s_counts[place(warp, 2 * group + h, 2 * kWarps)] = own.counts[group][h];
    }
    sync_block();
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + g + 8 * h;
      float count = 0.0f;
      for (int w = 0; w < kWarps && half == 0; ++w) count += s_counts[place(w, 2 * warp + h, 2 * kWarps)];
      count = row_sum(count);
      if (half == 0 && first_channel == 0 && t == 0 && row < landmarks) p.counts[part * landmarks + row] = count;
      UNROLL
      for (int j = 0; j < kHalf; ++j) {
        const int channel = first_channel + 8 * (half * kHalf + j) + 2 * t;
        Two sum{{0.0f, 0.0f}};
        UNROLL
        for (int w = 0; w < kWarps; ++w) {
          UNROLL
          for (int i = 0; i < 2; ++i) sum.x[i] += s_sums[place(w, (warp * kHalf + j) * 4 + 2 * h + i, kEach)];
        }
        float* to = p.sums + (part * landmarks + row) * dim + channel;
        if (row < landmarks && channel < dim) *reinterpret_cast<Two*>(to) = sum;
      }
    }
  }
}

// One head's split and 64 channels.
template <class T>
DEVICE void pool_unit(const Pooled& p, int heads, int landmarks, int64_t unit) {
  const int slices = pool_slices(p), dim = padded_channels(p.dim);
  const int slice = static_cast<int>(unit % slices), first_channel = slice * kPoolChannels;
  const int64_t part = unit / slices, batch_head = part / p.splits;
  const int64_t batch = batch_head / heads, head = batch_head % heads;
  if (p.only && !p.only[batch]) return;
  const int each = ceil_div(p.num_tokens, p.splits), first = static_cast<int>(part % p.splits) * each;
  const int end = minimum(first + each, p.num_tokens), steps = end > first ? ceil_div(end - first, kPoolTokens<T>) : 0;
  const Head<T> tokens = head_of<T>(p.tokens, batch, head, end, p.dim, first_channel);
  T* s = reinterpret_cast<T*>(shared_memory());
  int* s_index = reinterpret_cast<int*>(s + kPoolStages * PoolTile<T>::elements(kPoolChannels));
  auto tile = [&](int step) {
    return PoolTile<T>{s + step % kPoolStages * PoolTile<T>::elements(kPoolChannels),
                       minimum(dim - first_channel, kPoolChannels)};
  };
  auto landmark_at = [&](int step) {
    const int token = first + step * kPoolTokens<T> + thread_index();
    return thread_index() < kPoolTokens<T> && token < end ? landmark_of(p.index, batch, head, token) : -1;
  };
  PoolSums own;
  UNROLL
  for (int group = 0; group < PoolSums::kGroups; ++group) {
    clear(own.sums[group]);
    own.counts[group][0] = own.counts[group][1] = 0.0f;
  }
  int next = landmark_at(0);
  sync_block();  // another unit may still read
  for (int step = -kPoolStages; step < steps; ++step) {
    if (step >= 0) {
      wait_copies<kPoolStages - 1>();
      sync_block();
      const int landmark = next;
      next = landmark_at(step + 1);
      if (thread_index() < kPoolTokens<T>) s_index[thread_index()] = landmark;
      clear_outside<T>(tile(step), landmark);
      sync_block();
      add_tile<T>(own, tile(step), s_index);
      sync_block();
    }
    const int later = step + kPoolStages;
    if (later < steps) copy_tile(tile(later), tokens, first + later * kPoolTokens<T>, nullptr);
    commit_copies();
  }
  wait_copies<0>();
  write_sums(p, own, part, first_channel, landmarks);
}

struct LandmarkSum {
  Four sum;
  float count;
};

// Adds channels [channel, channel + 4) of one landmark, of its DP, from kPoolSplits splits where tokens were pooled, or as it
// was given. Beyond the landmarks it is the last one's: every thread reads, so that no read waits for a branch.
template <bool POOLED>
DEVICE void add_splits(LandmarkSum& all, const Pooled& p, int64_t batch_head, int first_split, int landmarks, int row,
                       int channel) {
  row = minimum(row, landmarks - 1);
  if constexpr (POOLED) {
    const int dim = padded_channels(p.dim);
    UNROLL
    for (int split = 0; split < kPoolSplits; ++split) {
      const int64_t part = (batch_head * p.splits + first_split + split) * landmarks + row;
      const Four sum = load_four(p.sums + part * dim + channel);
      all.count += load_float(p.counts + part);
      UNROLL
      for (int i = 0; i < 4; ++i) all.sum.x[i] += sum.x[i];
    }
  } else {
    const float* given = p.means + (batch_head * landmarks + row) * p.dim;
    UNROLL
    for (int i = 0; i < 4; ++i) all.sum.x[i] = channel + i < p.dim ? given[channel + i] : 0.0f;
  }
}

DEVICE Four mean_of(const LandmarkSum& all, bool inside) {
  const float factor = 1.0f / max_of(all.count, 1.0f);
  Four mean;
  UNROLL
  for (int i = 0; i < 4; ++i) mean.x[i] = inside ? all.sum.x[i] * factor : 0.0f;
  return mean;
}

// Calls body(row, channel, mean) for this thread's share of channels [first, first + channels) of 64 landmarks, four
// channels at a time; `channels` is a multiple of 16. Several are read before the first is used.
template <bool POOLED, class Body>
DEVICE void for_each_mean_of(const Pooled& p, int64_t batch_head, int landmarks, int first, int channels, Body body) {
  constexpr int kAhead = 4;
  const int across = channels / 4, count = kSingleLandmarks * across;
  for (int start = thread_index(); start < count; start += kAhead * kSingleThreads) {
    LandmarkSum sums[kAhead]{};
    for (int split = 0; split < (POOLED ? p.splits : 1); split += kPoolSplits) {
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int i = start + k * kSingleThreads;
        add_splits<POOLED>(sums[k], p, batch_head, split, landmarks, i / across, first + i % across * 4);
      }
    }
    UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int i = start + k * kSingleThreads, row = i / across;
      if (i < count) body(row, first + i % across * 4, mean_of(sums[k], row < landmarks));
    }
  }
}

template <class Body>
DEVICE void for_each_mean(const Pooled& p, int64_t batch_head, int landmarks, int first, int channels, Body body) {
  if (p.sums)
    for_each_mean_of<true>(p, batch_head, landmarks, first, channels, body);
  else
    for_each_mean_of<false>(p, batch_head, landmarks, first, channels, body);
}

}  // namespace nystromgan
