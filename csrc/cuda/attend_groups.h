// Attention of half precision by products of groups of warps (sm_90a). Some threads of a block copy into a ring of buffers,
// the others own 64 rows a group and compute: each goes through the ring at its own pace, so that one has the tensor cores
// while another takes exponentials.
//
// Source: Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
#pragma once

#include "attend_gradient.h"
#include "attend_groups_problems.h"
#include "group_tiles.h"
#include "ring.h"

namespace nystromgan {

constexpr int kMapThreads = kMostMapConsumers * kGroupThreads + kMapCopiers;
constexpr int kTokenThreads = kTokenConsumers * kGroupThreads + kTokenCopiers;

#if HAS_GROUPS

// One head of an operand as either kind of copy takes it.
template <class T, bool CHANNEL_MAJOR>
struct Source {
  using Tile = GroupTile<T, CHANNEL_MAJOR>;
  const TensorMap* map;
  Head<T> head;
  const uint8_t* mask;

  DEVICE void bring(const Ring<T>& ring, const Tile& tile, int token, const Place& place, uint64_t* barrier) const {
    if (!ring.boxes)
      copy_tile(tile, head, token, mask, ring.copier(), ring.copiers());
    else if constexpr (CHANNEL_MAJOR)
      copy_box(tile.data, map, token, 0, place.head, place.batch, barrier);
    else
      for (int channel = 0; channel < tile.channels; channel += Tile::kColumns)
        copy_box(tile.at(0, channel), map, channel, token, place.head, place.batch, barrier);
  }
};

// Two tiles that lie together: tokens with DIM channels of one operand and CHANNELS of another, which may be 0.
template <class T, bool CHANNEL_MAJOR, int DIM, int CHANNELS>
struct TilePair {
  using Tile = GroupTile<T, CHANNEL_MAJOR>;
  static constexpr int kElements = Tile::elements(DIM + CHANNELS);
  T* data;

  DEVICE Tile first() const { return {data, DIM}; }
  DEVICE Tile second() const { return {data + Tile::elements(DIM), CHANNELS}; }
  template <class Source>
  DEVICE void bring(const Ring<T>& ring, const Source& x, const Source& y, int token, const Place& place,
                    uint64_t* barrier) const {
    x.bring(ring, first(), token, place, barrier);
    if constexpr (CHANNELS > 0) y.bring(ring, second(), token, place, barrier);
  }
};

DEVICE int steps_of(const Place& place) { return ceil_div(place.end_other - place.first_other, 64); }

// The first row of this warp, of the block's rows from `block_row` on.
template <class T>
DEVICE int own_row(const Ring<T>& ring, int block_row) {
  return block_row + ring.consumer() * kGroupRows + warp_index() % 4 * 16;
}

template <class T, bool CHANNEL_MAJOR, int DIM, int CHANNELS>
DEVICE void group_forward(const GroupForward& problem) {
  using Own = TilePair<T, CHANNEL_MAJOR, DIM, 0>;
  using Others = TilePair<T, CHANNEL_MAJOR, DIM, CHANNELS>;
  using From = Source<T, CHANNEL_MAJOR>;
  const AttendForward& p = problem.pass;
  const AttendSizes& sizes = p.sizes;
  const Place place = place_of(sizes);
  const Ring<T> ring(problem.consumers * Own::kElements, Others::kElements, problem.consumers, sizes.stages, problem.boxes);
  const int block_row = place.group * problem.consumers * kGroupRows;
  const uint8_t* mask = p.mask ? p.mask + place.batch * sizes.others : nullptr;
  auto own = [&](int i) { return Own{ring.data + i * Own::kElements}; };
  auto others = [&](int step) { return Others{ring.stage(step)}; };
  auto other = [&](int step) { return place.first_other + 64 * step; };
  if (ring.copier() >= 0) {
    if constexpr (CHANNEL_MAJOR) give_registers();
    const From query{&problem.query, head_of<T>(p.query, place.batch, place.head, sizes.rows, sizes.dim), nullptr};
    const From key{&problem.key, head_of<T>(p.key, place.batch, place.head, place.end_other, sizes.dim), mask};
    const From value{&problem.value, head_of<T>(p.value, place.batch, place.head, place.end_other, sizes.value_dim), mask};
    ring.fill(
        steps_of(place),
        [&](uint64_t* barrier) {
          for (int i = 0; i < ring.consumers; ++i)
            own(i).bring(ring, query, query, block_row + i * kGroupRows, place, barrier);
        },
        [&](int step, uint64_t* barrier) { others(step).bring(ring, key, value, other(step), place, barrier); });
  } else {
    if constexpr (CHANNEL_MAJOR) take_registers();
    Softmax<8> softmax;
    Fragment output[CHANNELS / 8];
    clear(output);
    ring.wait_for_own();
    for (int step = 0; step < steps_of(place); ++step) {
      ring.wait_for_step(step);
      Fragment c[8];
      logits<DIM>(c, own(ring.consumer()).first(), others(step).first());
      mask_logits<64>(c, sizes.scale_log2, other(step), place.end_other, mask);
      softmax.update(c, output);
      add_weighted<CHANNELS>(output, c, others(step).second());
      ring.release(step);
    }
    write_output<T, CHANNELS>(p, place, output, softmax.largest, softmax.total, own_row(ring, block_row));
  }
}

// The same where the others are few, so that a block keeps them all, and rows come by: of tokens, one group, by the copy
// engine alone.
template <class T, int DIM, int CHANNELS>
DEVICE void group_stream(const GroupForward& problem) {
  using Rows = TilePair<T, false, DIM, 0>;
  using Others = TilePair<T, false, DIM, CHANNELS>;
  using From = Source<T, false>;
  const AttendForward& p = problem.pass;
  const AttendSizes& sizes = p.sizes;
  const Place place = place_of(sizes);
  const int tiles = ceil_div(sizes.others, 64), first_row = place.group * sizes.row_steps * kGroupRows;
  const int steps = minimum(sizes.row_steps, ceil_div(sizes.rows - first_row, kGroupRows));
  const Ring<T> ring(tiles * Others::kElements, Rows::kElements, kTokenConsumers, sizes.stages, true);
  auto others = [&](int i) { return Others{ring.data + i * Others::kElements}; };
  auto rows = [&](int step) { return Rows{ring.stage(step)}; };
  if (ring.copier() >= 0) {
    const From query{&problem.query, {}, nullptr}, key{&problem.key, {}, nullptr}, value{&problem.value, {}, nullptr};
    ring.fill(
        steps,
        [&](uint64_t* barrier) {
          for (int i = 0; i < tiles; ++i) others(i).bring(ring, key, value, 64 * i, place, barrier);
        },
        [&](int step, uint64_t* barrier) {
          rows(step).bring(ring, query, query, first_row + step * kGroupRows, place, barrier);
        });
  } else {
    ring.wait_for_own();
    for (int step = 0; step < steps; ++step) {
      ring.wait_for_step(step);
      Softmax<8> softmax;
      Fragment output[CHANNELS / 8];
      clear(output);
      for (int i = 0; i < tiles; ++i) {
        Fragment c[8];
        logits<DIM>(c, rows(step).first(), others(i).first());
        if (i == tiles - 1) ring.release(step);
        mask_logits<64>(c, sizes.scale_log2, 64 * i, sizes.others, nullptr);
        softmax.update(c, output);
        add_weighted<CHANNELS>(output, c, others(i).second());
      }
      write_output<T, CHANNELS>(p, place, output, softmax.largest, softmax.total,
                                own_row(ring, first_row + step * kGroupRows));
    }
  }
}

// Of maps.
template <class T, GradientOf OF, int DIM, int CHANNELS>
DEVICE void group_gradient(const GroupGradient& problem) {
  constexpr bool kOfKeys = OF == GradientOf::key_value;
  using Tiles = TilePair<T, true, DIM, CHANNELS>;
  using From = Source<T, true>;
  const AttendGradient& p = problem.pass;
  const AttendSizes& sizes = p.sizes;
  const Place place = place_of(sizes);
  const Ring<T> ring(problem.consumers * Tiles::kElements, Tiles::kElements, problem.consumers, sizes.stages, problem.boxes);
  const int block_row = place.group * problem.consumers * kGroupRows;
  const uint8_t* mask = p.mask ? p.mask + place.batch * (kOfKeys ? sizes.rows : sizes.others) : nullptr;
  const uint8_t *row_mask = kOfKeys ? mask : nullptr, *other_mask = kOfKeys ? nullptr : mask;
  auto own = [&](int i) { return Tiles{ring.data + i * Tiles::kElements}; };
  auto others = [&](int step) { return Tiles{ring.stage(step)}; };
  auto other = [&](int step) { return place.first_other + 64 * step; };
  if (ring.copier() >= 0) {
    give_registers();
    auto from = [&](const TensorMap& map, const Operand& x, int tokens, int channels, const uint8_t* its_mask) {
      return From{&map, head_of<T>(x, place.batch, place.head, tokens, channels), its_mask};
    };
    const From first = from(problem.first, p.first, sizes.rows, sizes.dim, row_mask);
    const From second = from(problem.second, p.second, sizes.rows, sizes.value_dim, row_mask);
    const From other_first = from(problem.other_first, p.other_first, place.end_other, sizes.dim, other_mask);
    const From other_second = from(problem.other_second, p.other_second, place.end_other, sizes.value_dim, other_mask);
    ring.fill(
        steps_of(place),
        [&](uint64_t* barrier) {
          for (int i = 0; i < ring.consumers; ++i)
            own(i).bring(ring, first, second, block_row + i * kGroupRows, place, barrier);
        },
        [&](int step, uint64_t* barrier) {
          others(step).bring(ring, other_first, other_second, other(step), place, barrier);
        });
  } else {
    take_registers();
    const int64_t first_query = place.batch_head * (kOfKeys ? sizes.others : sizes.rows);
    const QueryTerms terms{p.logsumexp + first_query, p.delta + first_query, p.lift};
    const int first_row = own_row(ring, block_row);
    RowTerms rows;
    if constexpr (!kOfKeys) rows.read(terms, first_row + lane_index() / 4, sizes.rows);
    Fragment grad_first[DIM / 8], grad_second[CHANNELS / 8];
    clear(grad_first);
    clear(grad_second);
    const Tiles mine = own(ring.consumer());
    ring.wait_for_own();
    for (int step = 0; step < steps_of(place); ++step) {
      ring.wait_for_step(step);
      Fragment c[8], grad[8];
      logits<DIM>(c, mine.first(), others(step).first());
      logits<CHANNELS>(grad, mine.second(), others(step).second());
      weigh<kOfKeys>(c, grad, terms, rows, sizes.scale_log2, other(step), place.end_other, other_mask);
      if constexpr (kOfKeys) add_weighted<CHANNELS>(grad_second, c, others(step).second());
      add_weighted<DIM>(grad_first, grad, others(step).first());
      ring.release(step);
    }
    const float factor = read_scalar(p.gamma, p.gamma_type) * exp2_of(-p.lift);
    write_gradient<T, DIM>(p, place, grad_first, first_row, factor * p.scale, p.grad_first, p.sums_first, p.spread_first,
                           sizes.dim, row_mask);
    if constexpr (kOfKeys)
      write_gradient<T, CHANNELS>(p, place, grad_second, first_row, factor, p.grad_second, p.sums_second, p.spread_second,
                                  sizes.value_dim, row_mask);
  }
}

#endif

}  // namespace nystromgan
