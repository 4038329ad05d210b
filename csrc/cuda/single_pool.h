// Phase 1 of nystrom_single.h: sums of tokens over their landmarks, as a product of the one-hot index and the tokens.
#pragma once

#include "nystrom_single.h"
#include "tokens.h"

namespace nystromgan {

template <class T>
using PoolTile = Tile<T, kPoolTokens<T>, false>;

DEVICE int pool_slices(const Pooled& p) { return ceil_div(p.dim, kPoolChannels); }

DEVICE int64_t pool_units(const Pooled& p, int64_t rows) { return p.sums ? rows * kPoolSplits * pool_slices(p) : 0; }

// Sets the tokens without a landmark, which may hold anything, to zero: zero times infinity is none.
template <class T>
DEVICE void clear_outside(const PoolTile<T>& tile, int landmark) {
  if (thread_index() >= kPoolTokens<T> || landmark >= 0) return;
  for (int channel = 0; channel < tile.channels; ++channel) tile.data[thread_index() * tile.stride() + channel] = T{};
}

// Adds a tile's tokens to this warp's 16 landmarks, and counts them.
template <class T>
DEVICE void add_tile(Fragment (&sums)[kPoolChannels / 8], float (&counts)[2], const PoolTile<T>& tile, const int* s_index) {
  const int landmark = 16 * warp_index() + lane_index() / 4, t = lane_index() % 4;
  for (int token = 0; token < kPoolTokens<T>; token += 16) {
    Fragment one_hot[2];
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const bool own = s_index[token + 8 * (i / 4) + 2 * t + i % 2] == landmark + 8 * (i / 2 % 2);
      one_hot[i / 4].x[i % 4] = own ? 1.0f : 0.0f;
      counts[i / 2 % 2] += own ? 1.0f : 0.0f;
    }
    add_weighted<kPoolChannels>(sums, one_hot, Tile<T, 16, false>{tile.data + token * tile.stride(), tile.channels}, 0);
  }
}

// One head's split and 32 channels.
template <class T>
DEVICE void pool_unit(const Pooled& p, int heads, int landmarks, int64_t unit) {
  const int slices = pool_slices(p), dim = padded_channels(p.dim);
  const int slice = static_cast<int>(unit % slices), first_channel = slice * kPoolChannels;
  const int64_t part = unit / slices, batch_head = part / kPoolSplits;
  const int64_t batch = batch_head / heads, head = batch_head % heads;
  if (p.only && !p.only[batch]) return;
  const int each = ceil_div(p.num_tokens, kPoolSplits), first = static_cast<int>(part % kPoolSplits) * each;
  const int end = minimum(first + each, p.num_tokens), steps = end > first ? ceil_div(end - first, kPoolTokens<T>) : 0;
  const Head<T> tokens = head_of<T>(p.tokens, batch, head, end, p.dim, first_channel);
  const int32_t* index = p.index.data + batch * p.index.batch + head * p.index.head;
  T* s = reinterpret_cast<T*>(shared_memory());
  int* s_index = reinterpret_cast<int*>(s + kPoolStages * PoolTile<T>::elements(kPoolChannels));
  auto tile = [&](int step) {
    return PoolTile<T>{s + step % kPoolStages * PoolTile<T>::elements(kPoolChannels),
                       minimum(dim - first_channel, kPoolChannels)};
  };
  auto landmark_at = [&](int step) {
    const int token = first + step * kPoolTokens<T> + thread_index();
    return thread_index() < kPoolTokens<T> && token < end ? index[token] : -1;
  };
  Fragment sums[kPoolChannels / 8];
  float counts[2] = {0.0f, 0.0f};
  clear(sums);
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
      add_tile<T>(sums, counts, tile(step), s_index);
      sync_block();
    }
    const int later = step + kPoolStages;
    if (later < steps) copy_tile(tile(later), tokens, first + later * kPoolTokens<T>, nullptr);
    commit_copies();
  }
  wait_copies<0>();
  for_each_element(sums, 16 * warp_index(), first_channel, [&](int row, int channel, float x) {
    if (row < landmarks && channel < dim) p.sums[(part * landmarks + row) * dim + channel] = x;
  });
  UNROLL
  for (int h = 0; h < 2; ++h) {
    const float count = row_sum(counts[h]);
    const int row = 16 * warp_index() + lane_index() / 4 + 8 * h;
    if (slice == 0 && lane_index() % 4 == 0 && row < landmarks) p.counts[part * landmarks + row] = count;
  }
}

struct LandmarkSum {
  Four sum;
  float count;
};

// Channels [channel, channel + 4) of one landmark, of its DP, from its splits where tokens were pooled, or as they were given.
// Beyond the landmarks the last one's: every thread reads, so that no read waits for a branch.
template <bool POOLED>
DEVICE LandmarkSum sum_of(const Pooled& p, int64_t batch_head, int landmarks, int row, int channel) {
  row = minimum(row, landmarks - 1);
  LandmarkSum all{{{0.0f, 0.0f, 0.0f, 0.0f}}, 0.0f};
  if constexpr (POOLED) {
    const int dim = padded_channels(p.dim);
    UNROLL
    for (int split = 0; split < kPoolSplits; ++split) {
      const int64_t part = (batch_head * kPoolSplits + split) * landmarks + row;
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
  return all;
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
    LandmarkSum sums[kAhead];
    UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int i = start + k * kSingleThreads;
      sums[k] = sum_of<POOLED>(p, batch_head, landmarks, i / across, first + i % across * 4);
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
