// The other units of nystrom_single.h: G V of some keys, W from all of them, O of some queries.
#pragma once

#include "single_core.h"

namespace nystromgan {

template <class T>
using LandmarkTile = Tile<T, kSingleLandmarks, false>;

// One head's landmarks to where they belong in memory.
template <class T>
DEVICE void write_landmarks(const NystromSingle& p, int64_t batch_head) {
  const int dim = padded_channels(p.dim);
  T* narrow = static_cast<T*>(p.narrow_key) + batch_head * p.landmarks * dim;
  for (int of_key = 0; of_key < 2; ++of_key) {
    const Pooled& side = of_key ? p.key : p.query;
    float* means = side.means + batch_head * p.landmarks * p.dim;
    for_each_mean(side, batch_head, p.landmarks, 0, dim, [&](int row, int channel, const Four& mean) {
      if (row >= p.landmarks) return;
      UNROLL
      for (int i = 0; i < 4; ++i) {
        if (side.sums && channel + i < p.dim) means[row * p.dim + channel + i] = mean.x[i];
        if (of_key) narrow[row * dim + channel + i] = from_float<T>(mean.x[i]);
      }
    });
  }
}

// G V of one split of the keys, not normalised; the first also writes the landmarks, for which the inverse has no time.
template <class T, int CHANNELS, int STEP>
DEVICE void context_unit(const NystromSingle& p, int64_t unit) {
  const AttendSizes& sizes = p.keys.sizes;
  Place place{};
  place.split = static_cast<int>(unit % sizes.splits), place.batch_head = unit / sizes.splits;
  place.batch = place.batch_head / p.heads, place.head = place.batch_head % p.heads;
  const int first = place.split * sizes.split_others, end = minimum(first + sizes.split_others, sizes.others);
  const int dim = padded_channels(p.dim), own_row = 16 * warp_index();
  T* s = reinterpret_cast<T*>(shared_memory());
  const LandmarkTile<T> query{s, dim};
  const Passing<T, CHANNELS, STEP, false> passing{
      s + LandmarkTile<T>::elements(dim),
      head_of<T>(p.keys.key, place.batch, place.head, end, p.dim),
      head_of<T>(p.keys.value, place.batch, place.head, end, p.value_dim),
      p.keys.mask ? p.keys.mask + place.batch * sizes.others : nullptr,
      dim,
      sizes.value_dim,
      sizes.stages,
      first,
      end,
      sizes.scale_log2};
  sync_block();  // another unit may still read
  for_each_mean(p.query, place.batch_head, p.landmarks, 0, dim, [&](int row, int channel, const Four& mean) {
    UNROLL
    for (int i = 0; i < 4; ++i) query.data[row * query.stride() + channel + i] = from_float<T>(mean.x[i]);
  });
  Softmax<STEP / 8> softmax;
  Fragment output[CHANNELS / 8];
  clear(output);
  passing.attend(softmax, output, query, own_row, false);
  write_output<T, CHANNELS>(p.keys, place, output, softmax.largest, softmax.total, own_row);
  if (place.split == 0) write_landmarks<T>(p, place.batch_head);
}

// Four columns of one row of G V from its splits, in their order, and the logarithm of the row's sum.
DEVICE Four merged(const NystromSingle& p, int64_t batch_head, int row, int column, float& logsumexp) {
  const AttendSizes& sizes = p.keys.sizes;
  auto part = [&](int split) { return (batch_head * sizes.splits + split) * p.landmarks + row; };
  float factor[kContextSplits], totals[kContextSplits], largest = -INFINITY, total = 0.0f;
  Four sums[kContextSplits];
  UNROLL
  for (int split = 0; split < kContextSplits; ++split) {  // all are read before the first is used
    const int64_t place = part(minimum(split, sizes.splits - 1));
    factor[split] = load_float(p.keys.largest + place);
    sums[split] = load_four(p.keys.sums + place * sizes.value_dim + column);
    totals[split] = load_float(p.keys.totals + place);
    largest = max_of(largest, factor[split]);
  }
  const float shift = largest == -INFINITY ? 0.0f : largest;
  Four all{{0.0f, 0.0f, 0.0f, 0.0f}};
  UNROLL
  for (int split = 0; split < kContextSplits; ++split) {
    factor[split] = split < sizes.splits ? exp2_of(factor[split] - shift) : 0.0f;
    total += totals[split] * factor[split];
    UNROLL
    for (int i = 0; i < 4; ++i) all.x[i] += sums[split].x[i] * factor[split];
  }
  const bool absent = p.query_absent && p.query_absent[batch_head / p.heads * p.landmarks + row];
  const bool empty = total == 0.0f || absent;
  logsumexp = empty ? INFINITY : (largest + log2_of(total)) * kLn2;
  UNROLL
  for (int i = 0; i < 4; ++i) all.x[i] = empty ? 0.0f : all.x[i] * (1.0f / total);
  return all;
}

DEVICE int mix_slices(const NystromSingle& p) { return p.keys.sizes.value_dim / kMixColumns; }

// Eight columns of W = Z (G V) of one head, and of G V itself; in shared memory from `s` on.
template <class T>
DEVICE void mix_unit(const NystromSingle& p, int64_t unit, float* s) {
  constexpr int kStride = CoreSlot::kStride, kNarrow = kMixColumns + 4, kSide = kSingleLandmarks;
  static_assert(kSingleThreads == 2 * kSide && kMixColumns == 8, "two threads a row take four columns each");
  float *s_z = s, *s_context = s + CoreSlot::kFloats;
  const int slices = mix_slices(p), width = p.keys.sizes.value_dim;
  const int64_t batch_head = unit / slices, batch = batch_head / p.heads;
  const int first = static_cast<int>(unit % slices) * kMixColumns;
  const int row = thread_index() / 2, column = first + thread_index() % 2 * 4;
  sync_block();  // another unit may still read
  const float* inverse = p.inverse + batch_head * kSide * kSide;
  for (int i = 4 * thread_index(); i < kSide * kSide; i += 4 * kSingleThreads)
    copy_async(s_z + i / kSide * kStride + i % kSide, inverse + i, 16);
  commit_copies();
  Four own{{0.0f, 0.0f, 0.0f, 0.0f}};
  if (row < p.landmarks) {
    float logsumexp;
    own = merged(p, batch_head, row, column, logsumexp);
    const int64_t place = batch_head * p.landmarks + row;
    if (column == 0) p.logsumexp[place] = logsumexp;
    UNROLL
    for (int i = 0; i < 4; ++i)
      if (column + i < p.value_dim) p.context[place * p.value_dim + column + i] = own.x[i];
  }
  UNROLL
  for (int i = 0; i < 4; ++i) s_context[row * kNarrow + column - first + i] = own.x[i];
  auto write = [&](int r, int k, float x) {
    if (r >= p.landmarks) return;
    const int64_t place = batch_head * p.landmarks + r;
    if (k < p.value_dim) p.mixed[place * p.value_dim + k] = x;
    static_cast<T*>(p.narrow_mixed)[place * width + k] = from_float<T>(x);
  };
  wait_copies<0>();
  sync_block();
  if (p.value.sums && p.value.only[batch]) {  // every valid key is its own landmark there: O = F pool(V)
    LandmarkSum sum{};
    for (int split = 0; split < p.value.splits; split += kPoolSplits)
      add_splits<true>(sum, p.value, batch_head, split, p.landmarks, row, column);
    const Four mean = mean_of(sum, true);
    UNROLL
    for (int i = 0; i < 4; ++i) write(row, column + i, mean.x[i]);
    return;
  }
  Fragment c[1];
  clear(c);
  multiply_rows(c, Matrix<false>{s_z, kStride}, Matrix<false>{s_context, kNarrow}, 16 * warp_index(), 0, kSide);
  for_each_element(c, 16 * warp_index(), first, write);
}

// Phase 4: O of the queries of one group, whose landmarks stay; queries come by in two buffers.
template <class T, int CHANNELS, int STEP>
struct OutputUnit {
  const NystromSingle& p;
  int dim, value_dim;
  Place place;

  DEVICE OutputUnit(const NystromSingle& p, int64_t unit)
      : p(p), dim(padded_channels(p.dim)), value_dim(p.keys.sizes.value_dim), place{} {
    place.group = static_cast<int>(unit % p.row_groups), place.batch_head = unit / p.row_groups;
    place.batch = place.batch_head / p.heads, place.head = place.batch_head % p.heads;
  }

  DEVICE const uint8_t* mask() const { return p.queries.mask ? p.queries.mask + place.batch * p.landmarks : nullptr; }
  DEVICE T* tile(int i) const { return reinterpret_cast<T*>(shared_memory()) + i * LandmarkTile<T>::elements(dim); }
  DEVICE LandmarkTile<T> keys() const { return {tile(0), dim}; }
  DEVICE LandmarkTile<T> queries(int i) const { return {tile(1 + i % 2), dim}; }
  DEVICE LandmarkTile<T> values() const { return {tile(3), value_dim}; }
  DEVICE LandmarkTile<T> results() const { return {tile(3) + LandmarkTile<T>::elements(value_dim), value_dim}; }

  // What one head's rows of a landmark tensor in the tokens' dtype are to copy_tile.
  DEVICE Head<T> landmarks(const void* data, int channels) const {
    const T* rows = static_cast<const T*>(data) + place.batch_head * p.landmarks * channels;
    return {rows, channels, 1, p.landmarks, channels, true};
  }
  DEVICE int first_row(int i) const { return (place.group * p.group_tiles + i) * kSingleLandmarks; }
  DEVICE int tiles() const {
    return minimum(p.group_tiles, ceil_div(p.queries.sizes.rows - first_row(0), kSingleLandmarks));
  }
  DEVICE void copy_queries(int i) const {
    const Head<T> all = head_of<T>(p.queries.query, place.batch, place.head, p.queries.sizes.rows, p.dim);
    if (i < tiles()) copy_tile(queries(i), all, first_row(i), nullptr);
    commit_copies();
  }

  // What phase 3 does not make; it shows in shared memory after `run` has waited.
  DEVICE void start() const {
    copy_tile(keys(), landmarks(p.narrow_key, dim), 0, mask());
    copy_queries(0);
  }

  DEVICE void run() const {
    copy_tile(values(), landmarks(p.narrow_mixed, value_dim), 0, mask());
    commit_copies();
    for (int i = 0; i < tiles(); ++i) {
      wait_copies<0>();
      sync_block();
      copy_queries(i + 1);
      Softmax<STEP / 8> softmax;
      Fragment output[CHANNELS / 8];
      clear(output);
      for (int first = 0; first < p.landmarks; first += STEP) {
        Fragment c[STEP / 8];
        const Tile<T, STEP, false> key{keys().data + first * keys().stride(), dim};
        logits(c, queries(i), key, 16 * warp_index());
        mask_logits<STEP>(c, p.queries.sizes.scale_log2, first, p.landmarks, mask());
        softmax.update(c, output);
        add_weighted<CHANNELS>(output, c, Tile<T, STEP, false>{values().data + first * values().stride(), value_dim}, 0);
      }
      write(output, softmax.total, first_row(i));
    }
    wait_copies<0>();
  }

  // This warp's 16 rows through shared memory, so that a row leaves in pieces of 16 bytes side by side.
  DEVICE void write(const Fragment (&output)[CHANNELS / 8], const float (&total)[2], int tile_row) const {
    constexpr int kChunk = 16 / sizeof(T);
    const LandmarkTile<T> s = results();
    const int own_row = 16 * warp_index(), t = lane_index() % 4, channels = p.value_dim;
    sync_warp();  // the rows before have left
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const float factor = total[h] == 0.0f ? 0.0f : 1.0f / total[h];
      T* to = s.data + (own_row + lane_index() / 4 + 8 * h) * s.stride() + 2 * t;
      UNROLL
      for (int j = 0; j < CHANNELS / 8; ++j)
        if (8 * j < value_dim) store_pair(to + 8 * j, output[j].x[2 * h] * factor, output[j].x[2 * h + 1] * factor);
    }
    sync_warp();
    const Operand& out = p.queries.output;  // its channels are side by side, and its rows
    const int across = ceil_div(channels, kChunk);
    for (int i = lane_index(); i < 16 * across; i += 32) {
      const int row = tile_row + own_row + i / across, channel = i % across * kChunk;
      if (row >= p.queries.sizes.rows) continue;
      const T* from = s.data + (own_row + i / across) * s.stride() + channel;
      T* to = row_of<T>(out, place, row, channel);
      if (out.wide)
        *reinterpret_cast<Four*>(to) = *reinterpret_cast<const Four*>(from);
      else
        for (int k = 0; k < minimum(kChunk, channels - channel); ++k) to[k] = from[k];
    }
  }
};

}  // namespace nystromgan
