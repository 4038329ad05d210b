// softmax(s Q K^T) V of some rows by one block, whose warps own 16 each; keys come by in steps.
//
// Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
#pragma once

#include "tokens.h"

namespace nystromgan {

// Where a block works: its head, its first row, its slice of channels, its split of the tokens that come by.
struct Place {
  int64_t batch, head, batch_head;
  int group, slice, split, first_other, end_other;
};

DEVICE Place place_of(const AttendSizes& sizes) {
  int64_t i = block_index();
  Place place;
  place.group = static_cast<int>(i % sizes.row_groups), i /= sizes.row_groups;
  place.slice = static_cast<int>(i % sizes.slices), i /= sizes.slices;
  place.split = static_cast<int>(i % sizes.splits), i /= sizes.splits;
  place.batch_head = i, place.batch = i / sizes.heads, place.head = i % sizes.heads;
  place.first_other = place.split * sizes.split_others;
  place.end_other = minimum(place.first_other + sizes.split_others, sizes.others);
  return place;
}

template <int COUNT>
struct Softmax {  // of the two rows that a lane holds
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Logits to weights, and what is there already to their scale.
  template <int CHANNELS>
  DEVICE void update(Fragment (&c)[COUNT], Fragment (&output)[CHANNELS]) {
    float old[2];
    UNROLL
    for (int h = 0; h < 2; ++h) {
      float larger = largest[h];
      UNROLL
      for (int j = 0; j < COUNT; ++j) larger = max_of(larger, max_of(c[j].x[2 * h], c[j].x[2 * h + 1]));
      larger = row_max(larger);
      const float shift = larger == -INFINITY ? 0.0f : larger;
      old[h] = exp2_of(largest[h] - shift);
      float sum = 0.0f;
      UNROLL
      for (int j = 0; j < COUNT; ++j) {
        UNROLL
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          c[j].x[i] = exp2_of(c[j].x[i] - shift);
          sum += c[j].x[i];
        }
      }
      total[h] = total[h] * old[h] + row_sum(sum);
      largest[h] = larger;
    }
    UNROLL
    for (int j = 0; j < CHANNELS; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) output[j].x[i] *= old[i / 2];
    }
  }
};

// Minus infinity where there is no key.
template <int TOKENS>
DEVICE void mask_logits(Fragment (&c)[TOKENS / 8], float scale, int first, int end, const uint8_t* mask) {
  const int t = lane_index() % 4;
  UNROLL
  for (int j = 0; j < TOKENS / 8; ++j) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int token = first + 8 * j + 2 * t + i;
      const bool inside = token < end && !(mask && mask[token]);
      c[j].x[i] = inside ? c[j].x[i] * scale : -INFINITY;
      c[j].x[2 + i] = inside ? c[j].x[2 + i] * scale : -INFINITY;
    }
  }
}

// One row of an operand in memory, from this lane's first channel on.
template <class T>
DEVICE T* row_of(const Operand& x, const Place& place, int row, int channel) {
  return static_cast<T*>(x.data) + place.batch * x.batch + place.head * x.head + row * x.token + channel * x.channel;
}

// Calls body(element of the fragments, row, channel) for what of 16 rows this lane holds and there is.
template <int COUNT, class Body>
DEVICE void for_each_inside(Fragment (&c)[COUNT], int h, int channel, int channels, Body body) {
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int i = 0; i < 2; ++i)
      if (channel + 8 * j + i < channels) body(c[j].x[2 * h + i], 8 * j + i);
  }
}

// What of 16 rows this lane holds and there is, where channels are side by side and come in pairs.
template <int COUNT, class T>
DEVICE void write_pairs(T* out, const Fragment (&c)[COUNT], int h, int channel, int channels) {
  UNROLL
  for (int j = 0; j < COUNT; ++j)
    if (channel + 8 * j < channels) store_pair(out + 8 * j, c[j].x[2 * h], c[j].x[2 * h + 1]);
}

template <class T, int CHANNELS>
DEVICE void write_output(const AttendForward& p, const Place& place, Fragment (&output)[CHANNELS / 8],
                         const float (&largest)[2], const float (&total)[2], int first_row) {
  const AttendSizes& sizes = p.sizes;
  const int g = lane_index() / 4, t = lane_index() % 4, channel = place.slice * CHANNELS + 2 * t;
  const float gamma = read_scalar(p.gamma, p.gamma_type);
  UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + g + 8 * h;
    if (row >= sizes.rows) continue;
    const float sum = total[h];
    const bool first = t == 0 && place.slice == 0;
    if (p.sums) {
      const int64_t place_of_row = (place.batch_head * sizes.splits + place.split) * sizes.rows + row;
      if (first) p.largest[place_of_row] = largest[h], p.totals[place_of_row] = sum;
      float* out = p.sums + place_of_row * sizes.value_dim + channel;
      if (sizes.value_dim % 2 == 0)
        write_pairs(out, output, h, channel, sizes.value_dim);
      else
        for_each_inside(output, h, channel, sizes.value_dim, [&](float x, int i) { out[i] = x; });
      continue;
    }
    if (first && p.logsumexp)
      p.logsumexp[place.batch_head * sizes.rows + row] = sum == 0.0f ? INFINITY : (largest[h] + log2_of(sum)) * kLn2;
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    for_each_inside(output, h, channel, sizes.value_dim, [&](float& x, int) { x = sum == 0.0f ? 0.0f : x * factor; });
    if (p.attended.data) {
      T* out = row_of<T>(p.attended, place, row, channel);
      for_each_inside(output, h, channel, sizes.value_dim, [&](float x, int i) { out[i * p.attended.channel] = from_float<T>(x); });
    }
    if (p.gamma) for_each_inside(output, h, channel, sizes.value_dim, [&](float& x, int) { x *= gamma; });
    if (p.residual.data) {
      const T* add = row_of<T>(p.residual, place, row, channel);
      for_each_inside(output, h, channel, sizes.value_dim, [&](float& x, int i) { x += to_float(add[i * p.residual.channel]); });
    }
    T* out = row_of<T>(p.output, place, row, channel);
    if (p.output.wide && p.output.channel == 1 && sizes.value_dim % 2 == 0)
      write_pairs(out, output, h, channel, sizes.value_dim);
    else
      for_each_inside(output, h, channel, sizes.value_dim, [&](float x, int i) { out[i * p.output.channel] = from_float<T>(x); });
  }
}

// Keys and values that come by, STEP tokens at a time through `stages` buffers of shared memory.
template <class T, int CHANNELS, int STEP, bool CHANNEL_MAJOR>
struct Passing {
  using Others = Tile<T, STEP, CHANNEL_MAJOR>;
  T* buffers;
  Head<T> keys, values;
  const uint8_t* mask;         // of one row of the batch
  int dim, value_dim, stages;  // channels, padded
  int first, end;              // tokens
  float scale_log2;

  DEVICE int steps() const { return ceil_div(end - first, STEP); }
  DEVICE Others key(int step) const {
    return {buffers + step % stages * (Others::elements(dim) + Others::elements(value_dim)), dim};
  }
  DEVICE Others value(int step) const { return {key(step).data + Others::elements(dim), value_dim}; }
  DEVICE void copy(int step) const {
    if (step >= steps()) return;
    copy_tile(key(step), keys, first + step * STEP, mask);
    copy_tile(value(step), values, first + step * STEP, mask);
  }

  // Rows [row, row + 16) of `query` over all of them, which are `here` where buffers already hold them.
  template <int ROWS>
  DEVICE void attend(Softmax<STEP / 8>& softmax, Fragment (&output)[CHANNELS / 8],
                     const Tile<T, ROWS, CHANNEL_MAJOR>& query, int row, bool here) const {
    for (int step = -stages; step < steps(); ++step) {
      if (step >= 0) {
        if (stages == 2)
          wait_copies<1>();
        else
          wait_copies<0>();
        sync_block();
        Fragment c[STEP / 8];
        logits(c, query, key(step), row);
        mask_logits<STEP>(c, scale_log2, first + step * STEP, end, mask);
        softmax.update(c, output);
        add_weighted<CHANNELS>(output, c, value(step), 0);
        sync_block();
      }
      if (!here) copy(step + stages);
      commit_copies();
    }
  }
};

template <class T, int CHANNELS, int STEP, bool CHANNEL_MAJOR>
DEVICE void attend_forward(const AttendForward& p) {
  const AttendSizes& sizes = p.sizes;
  const Place place = place_of(sizes);
  const int dim = padded_channels(sizes.dim), first_channel = place.slice * CHANNELS;
  using Rows = Tile<T, kBlockRows<T>, CHANNEL_MAJOR>;
  T* s = reinterpret_cast<T*>(shared_memory());
  const Rows query{s, dim};
  const Head<T> queries = head_of<T>(p.query, place.batch, place.head, sizes.rows, sizes.dim);
  const Passing<T, CHANNELS, STEP, CHANNEL_MAJOR> passing{
      s + Rows::elements(dim),
      head_of<T>(p.key, place.batch, place.head, place.end_other, sizes.dim),
      head_of<T>(p.value, place.batch, place.head, place.end_other, sizes.value_dim, first_channel),
      p.mask ? p.mask + place.batch * sizes.others : nullptr,
      dim,
      minimum(padded_channels(sizes.value_dim - first_channel), CHANNELS),
      sizes.stages,
      place.first_other,
      place.end_other,
      sizes.scale_log2};
  for (int row_step = 0; row_step < sizes.row_steps; ++row_step) {
    const int block_row = (place.group * sizes.row_steps + row_step) * kBlockRows<T>, own_row = 16 * warp_index();
    if (block_row >= sizes.rows) break;
    copy_tile(query, queries, block_row, nullptr);
    Softmax<STEP / 8> softmax;
    Fragment output[CHANNELS / 8];
    clear(output);
    passing.attend(softmax, output, query, own_row, row_step > 0 && passing.steps() <= sizes.stages);
    write_output<T, CHANNELS>(p, place, output, softmax.largest, softmax.total, block_row + own_row);
  }
}

}  // namespace nystromgan
