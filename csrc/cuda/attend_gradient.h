// The gradients of softmax(s Q K^T) V for some queries, or some keys and values, by one block, whose warps own 16 each; the
// other side comes by in steps. Weights P are made anew from the logarithms of their sums:
//     dP = dO V^T    dS = P (dP - delta), delta = P . dP    dQ = s dS K    dK = s dS^T Q    dV = P^T dO
#pragma once

#include "attend_forward.h"

namespace nystromgan {

// The logarithm of each row's sum to base 2, and delta, as all others come by.
template <int COUNT>
struct Statistics {
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f};

  DEVICE void update(const Fragment (&c)[COUNT], const Fragment (&grad)[COUNT]) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      float larger = largest[h];
      UNROLL
      for (int j = 0; j < COUNT; ++j) larger = max_of(larger, max_of(c[j].x[2 * h], c[j].x[2 * h + 1]));
      larger = row_max(larger);
      const float shift = larger == -INFINITY ? 0.0f : larger, old = exp2_of(largest[h] - shift);
      float sum = 0.0f, product = 0.0f;
      UNROLL
      for (int j = 0; j < COUNT; ++j) {
        UNROLL
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          const float weight = exp2_of(c[j].x[i] - shift);
          sum += weight;
          product += weight * grad[j].x[i];
        }
      }
      total[h] = total[h] * old + row_sum(sum);
      weighted[h] = weighted[h] * old + row_sum(product);
      largest[h] = larger;
    }
  }
};

DEVICE void write_statistics(const AttendGradient& p, int64_t offset, int row, float largest, float total, float weighted) {
  if (row >= p.sizes.rows) return;
  p.logsumexp[offset + row] = total == 0.0f ? INFINITY : (largest + log2_of(total)) * kLn2;
  p.delta[offset + row] = total == 0.0f ? 0.0f : weighted / total;
}

// Where the gradient of the mean that a token is in begins, and how many share it; null for a token in none.
struct Mean {
  const float* grad;
  float count;
};

DEVICE Mean mean_of(const Spread& spread, const Place& place, int row, int channels) {
  if (!spread.grad_means || (spread.only && !spread.only[place.batch])) return {nullptr, 1.0f};
  const int landmark = spread.index[place.batch * spread.index_batch + place.head * spread.index_head + row];
  if (landmark < 0) return {nullptr, 1.0f};
  return {spread.grad_means + place.batch_head * spread.head + int64_t{landmark} * channels,
          spread.counts[place.batch * spread.count_batch + place.head * spread.count_head + landmark]};
}

template <class T, int CHANNELS>
DEVICE void write_gradient(const AttendGradient& p, const Place& place, Fragment (&grad)[CHANNELS / 8], int first_row,
                           float factor, const Operand& out, float* sums, const Spread& spread, int channels,
                           const uint8_t* mask) {
  const int g = lane_index() / 4, t = lane_index() % 4, channel = place.slice * CHANNELS + 2 * t;
  UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + g + 8 * h;
    if (row >= p.sizes.rows) continue;
    const bool masked = mask && mask[row];
    for_each_inside(grad, h, channel, channels, [&](float& x, int) { x = masked ? 0.0f : x * factor; });
    if (sums) {
      const int64_t part = place.batch_head * p.sizes.splits + place.split;
      float* to = sums + (part * p.sizes.rows + row) * channels + channel;
      for_each_inside(grad, h, channel, channels, [&](float x, int i) { to[i] = x; });
      continue;
    }
    const Mean mean = mean_of(spread, place, row, channels);
    if (mean.grad) {
      const float* add = mean.grad + channel;
      for_each_inside(grad, h, channel, channels, [&](float& x, int i) { x += add[i] / mean.count; });
    }
    T* to = row_of<T>(out, place, row, channel);
    for_each_inside(grad, h, channel, channels, [&](float x, int i) { to[i * out.channel] = from_float<T>(x); });
  }
}

// What a gradient takes of its queries: their logarithms of sums and delta.
struct QueryTerms {
  const float *logsumexp, *delta;  // of one head
  float lift;

  DEVICE float lse_log2(int query) const { return logsumexp[query] * kLog2e - lift; }
};

// Of queries that a lane owns: those of its two rows, infinity where there is no query.
struct RowTerms {
  float lse[2] = {INFINITY, INFINITY}, delta[2] = {0.0f, 0.0f};

  DEVICE void read(const QueryTerms& terms, int row, int rows) {
    UNROLL
    for (int h = 0; h < 2; ++h)
      if (row + 8 * h < rows) lse[h] = terms.lse_log2(row + 8 * h), delta[h] = terms.delta[row + 8 * h];
  }
};

// From logits and dP to weights P and P (dP - delta), zero for others that are masked or at `end` and beyond; the queries
// are the others with OF_KEYS and the rows without.
template <bool OF_KEYS, int COUNT>
DEVICE void weigh(Fragment (&c)[COUNT], Fragment (&grad)[COUNT], const QueryTerms& terms, const RowTerms& rows,
                  float scale_log2, int first_other, int end, const uint8_t* mask) {
  UNROLL
  for (int j = 0; j < COUNT; ++j) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const int other = first_other + 8 * j + 2 * (lane_index() % 4) + i;
      const bool inside = other < end && !(mask && mask[other]);
      const float lse = OF_KEYS && inside ? terms.lse_log2(other) : INFINITY;
      const float delta = OF_KEYS && inside ? terms.delta[other] : 0.0f;
      UNROLL
      for (int h = 0; h < 2; ++h) {
        const float weight = exp2_of(c[j].x[2 * h + i] * scale_log2 - (OF_KEYS ? lse : rows.lse[h]));
        c[j].x[2 * h + i] = inside ? weight : 0.0f;
        const float difference = grad[j].x[2 * h + i] - (OF_KEYS ? delta : rows.delta[h]);
        grad[j].x[2 * h + i] = inside ? weight * difference : 0.0f;
      }
    }
  }
}

template <class T, GradientOf OF, int CHANNELS, int STEP, bool CHANNEL_MAJOR>
DEVICE void attend_gradient(const AttendGradient& p) {
  constexpr bool kOfKeys = OF == GradientOf::key_value, kOfStats = OF == GradientOf::stats;
  const AttendSizes& sizes = p.sizes;
  const Place place = place_of(sizes);
  const int dim = padded_channels(sizes.dim), value_dim = padded_channels(sizes.value_dim);
  using Rows = Tile<T, kBlockRows<T>, CHANNEL_MAJOR>;
  using Others = Tile<T, STEP, CHANNEL_MAJOR>;
  T* s = reinterpret_cast<T*>(shared_memory());
  const Rows first{s, dim}, second{s + Rows::elements(dim), value_dim};
  s = second.data + Rows::elements(value_dim);
  const int stage_elements = Others::elements(dim) + Others::elements(value_dim);
  const Head<T> firsts = head_of<T>(p.first, place.batch, place.head, sizes.rows, sizes.dim);
  const Head<T> seconds = head_of<T>(p.second, place.batch, place.head, sizes.rows, sizes.value_dim);
  const Head<T> other_firsts = head_of<T>(p.other_first, place.batch, place.head, place.end_other, sizes.dim);
  const Head<T> other_seconds = head_of<T>(p.other_second, place.batch, place.head, place.end_other, sizes.value_dim);
  const uint8_t* mask = p.mask ? p.mask + place.batch * (kOfKeys ? sizes.rows : sizes.others) : nullptr;
  const uint8_t *row_mask = kOfKeys ? mask : nullptr, *other_mask = kOfKeys ? nullptr : mask;
  const int64_t first_query = place.batch_head * (kOfKeys ? sizes.others : sizes.rows);
  const QueryTerms terms{p.logsumexp + first_query, p.delta + first_query, p.lift};
  const int steps = ceil_div(place.end_other - place.first_other, STEP);
  auto first_tile = [&](int step) { return Others{s + step % sizes.stages * stage_elements, dim}; };
  auto second_tile = [&](int step) { return Others{first_tile(step).data + Others::elements(dim), value_dim}; };
  auto copy_step = [&](int step) {
    if (step < steps) {
      copy_tile(first_tile(step), other_firsts, place.first_other + step * STEP, other_mask);
      copy_tile(second_tile(step), other_seconds, place.first_other + step * STEP, other_mask);
    }
  };
  const int g = lane_index() / 4, t = lane_index() % 4, own_row = 16 * warp_index();
  for (int row_step = 0; row_step < sizes.row_steps; ++row_step) {
    const int block_row = (place.group * sizes.row_steps + row_step) * kBlockRows<T>;
    if (block_row >= sizes.rows) break;
    copy_tile(first, firsts, block_row, row_mask);
    copy_tile(second, seconds, block_row, row_mask);
    const bool here = row_step > 0 && steps <= sizes.stages;  // all others are, from the rows before
    const int row = block_row + own_row + g;
    RowTerms row_terms;
    if constexpr (OF == GradientOf::query) row_terms.read(terms, row, sizes.rows);
    Statistics<STEP / 8> statistics;
    Fragment grad_first[CHANNELS / 8], grad_second[CHANNELS / 8];
    clear(grad_first);
    clear(grad_second);
    for (int step = -sizes.stages; step < steps; ++step) {
      if (step >= 0) {
        if (sizes.stages == 2)
          wait_copies<1>();
        else
          wait_copies<0>();
        sync_block();
        const int first_other = place.first_other + step * STEP;
        Fragment c[STEP / 8], grad[STEP / 8];
        logits(c, first, first_tile(step), own_row);
        logits(grad, second, second_tile(step), own_row);
        if constexpr (kOfStats) {
          mask_logits<STEP>(c, sizes.scale_log2, first_other, place.end_other, other_mask);
          statistics.update(c, grad);
        } else {
          weigh<kOfKeys>(c, grad, terms, row_terms, sizes.scale_log2, first_other, place.end_other, other_mask);
          const int first_channel = place.slice * CHANNELS;
          if constexpr (kOfKeys) add_weighted<CHANNELS>(grad_second, c, second_tile(step), first_channel);
          add_weighted<CHANNELS>(grad_first, grad, first_tile(step), first_channel);
        }
        sync_block();
      }
      if (!here) copy_step(step + sizes.stages);
      commit_copies();
    }
    if constexpr (kOfStats) {
      UNROLL
      for (int h = 0; h < 2; ++h)
        if (t == 0)
          write_statistics(p, place.batch_head * sizes.rows, row + 8 * h, statistics.largest[h], statistics.total[h],
                           statistics.weighted[h]);
    } else {
      const float factor = read_scalar(p.gamma, p.gamma_type) * exp2_of(-p.lift);
      write_gradient<T, CHANNELS>(p, place, grad_first, block_row + own_row, factor * p.scale, p.grad_first, p.sums_first,
                                  p.spread_first, sizes.dim, row_mask);
      if constexpr (kOfKeys)
        write_gradient<T, CHANNELS>(p, place, grad_second, block_row + own_row, factor, p.grad_second, p.sums_second,
                                    p.spread_second, sizes.value_dim, row_mask);
    }
  }
}

}  // namespace nystromgan
