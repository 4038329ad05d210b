// A head's Z by one block, in phase 2 of nystrom_single.h: A of its landmarks, and the steps of the inverse, all on chip.
#pragma once

#include "attend_forward.h"
#include "pinv_halves.h"
#include "single_pool.h"

namespace nystromgan {

using CoreSlot = Slot<kSingleLandmarks>;

// Channels [first, first + channels) of one side's landmarks into a slot.
DEVICE void load_landmarks(const NystromSingle& p, const Pooled& side, int64_t batch_head, int first, int channels,
                           float* slot) {
  for_each_mean(side, batch_head, p.landmarks, first, channels, [&](int row, int channel, const Four& mean) {
    *reinterpret_cast<Four*>(slot + row * CoreSlot::kStride + channel - first) = mean;
  });
}

// This warp's 16 rows of A from their logits.
DEVICE void core_rows(const NystromSingle& p, Fragment (&c)[kSingleLandmarks / 8], int64_t batch, int first_row) {
  Softmax<kSingleLandmarks / 8> softmax;
  Fragment nothing[1];
  clear(nothing);
  mask_logits<kSingleLandmarks>(c, p.queries.sizes.scale_log2, 0, p.landmarks,
                                p.queries.mask ? p.queries.mask + batch * p.landmarks : nullptr);
  softmax.update(c, nothing);
  UNROLL
  for (int h = 0; h < 2; ++h) {
    const float factor = 1.0f / softmax.total[h];
    const int row = first_row + lane_index() / 4 + 8 * h;
    const bool none = row >= p.landmarks || softmax.total[h] == 0.0f ||
                      (p.query_absent && p.query_absent[batch * p.landmarks + row]);
    UNROLL
    for (int j = 0; j < kSingleLandmarks / 8; ++j) {
      UNROLL
      for (int i = 2 * h; i < 2 * h + 2; ++i) c[j].x[i] = none ? 0.0f : c[j].x[i] * factor;
    }
  }
}

DEVICE void core_unit(const NystromSingle& p, int64_t batch_head) {
  constexpr int kSide = kSingleLandmarks, kStride = CoreSlot::kStride;
  using Halves = HalvesSlot<kSide>;
  float *s_first = reinterpret_cast<float*>(shared_memory()), *s_second = s_first + CoreSlot::kFloats;
  const int dim = padded_channels(p.dim), row = 16 * warp_index();
  Fragment c[kSide / 8];
  clear(c);
  for (int first = 0; first < dim; first += kSide) {
    const int channels = minimum(dim - first, kSide);
    sync_block();
    load_landmarks(p, p.query, batch_head, first, channels, s_first);
    load_landmarks(p, p.key, batch_head, first, channels, s_second);
    sync_block();
    multiply_rows(c, Matrix<false>{s_first, kStride}, Matrix<true>{s_second, kStride}, row, 0, channels);
  }
  core_rows(p, c, batch_head / p.heads, row);
  sync_block();
  for_each_element(c, row, 0, [&](int r, int column, float& x) {
    s_first[column * kStride + r] = x;
    x *= kHalvesUnit;
  });
  HalvesLeft a[kSide / 16];
  halves_left<kSide>(a, c);
  sync_block();
  const float factor = 1.0f / scale_of(norms_of<kSide>(s_first, s_second));
  for_each_element(c, row, 0, [&](int r, int column, float& x) { x = s_first[r * kStride + column] * factor; });
  Half* s_halves = reinterpret_cast<Half*>(shared_memory());
  const Halves z{s_halves}, product{s_halves + 2 * Halves::kElements};
  float* s_largest = reinterpret_cast<float*>(s_halves + 4 * Halves::kElements);
  pinv_steps_halves<kSide>(a, c, z, product, s_largest, p.iterations);
  float* inverse = p.inverse + batch_head * kSide * kSide + (row + lane_index() / 4) * kSide + lane_index() % 4 * 2;
  UNROLL
  for (int j = 0; j < kSide / 8; ++j) {
    UNROLL
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<Two*>(inverse + 8 * h * kSide + 8 * j) = {{c[j].x[2 * h], c[j].x[2 * h + 1]}};
  }
}

}  // namespace nystromgan
