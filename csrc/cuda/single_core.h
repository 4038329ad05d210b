// A head's Z by one block, in phase 2 of nystrom_single.h: A of its landmarks, and the steps of the inverse, all on chip.
#pragma once

#include "attend_forward.h"
#include "pinv.h"
#include "single_pool.h"

namespace nystromgan {

using CoreSlot = Slot<kSingleLandmarks>;

// Channels [first, first + channels) of one side's landmarks into a slot, and where they belong in memory.
template <class T>
DEVICE void load_landmarks(const NystromSingle& p, const Pooled& side, int64_t batch_head, int first, int channels,
                           float* slot, T* narrow) {
  const int dim = padded_channels(side.dim);
  for_each_mean(side, batch_head, p.landmarks, first, channels, [&](int row, int channel, const Four& mean) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      slot[row * CoreSlot::kStride + channel - first + i] = mean.x[i];
      if (row >= p.landmarks) continue;
      const int64_t place = batch_head * p.landmarks + row;
      if (side.sums && channel + i < side.dim) side.means[place * side.dim + channel + i] = mean.x[i];
      if (narrow) narrow[place * dim + channel + i] = from_float<T>(mean.x[i]);
    }
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
    const int row = first_row + lane_index() / 4 + 8 * h;
    const bool none = row >= p.landmarks || softmax.total[h] == 0.0f ||
                      (p.query_absent && p.query_absent[batch * p.landmarks + row]);
    UNROLL
    for (int j = 0; j < kSingleLandmarks / 8; ++j) {
      UNROLL
      for (int i = 2 * h; i < 2 * h + 2; ++i) c[j].x[i] = none ? 0.0f : c[j].x[i] / softmax.total[h];
    }
  }
}

template <class T>
DEVICE void core_unit(const NystromSingle& p, int64_t batch_head) {
  constexpr int kStride = CoreSlot::kStride, kChunk = kSingleLandmarks;
  float* s_z = reinterpret_cast<float*>(shared_memory());
  float *s_p = s_z + CoreSlot::kFloats, *s_a = s_p + CoreSlot::kFloats;
  const int dim = padded_channels(p.dim), row = 16 * warp_index();
  Fragment c[kSingleLandmarks / 8];
  clear(c);
  for (int first = 0; first < dim; first += kChunk) {
    const int channels = minimum(dim - first, kChunk);
    sync_block();
    load_landmarks<T>(p, p.query, batch_head, first, channels, s_z, nullptr);
    load_landmarks<T>(p, p.key, batch_head, first, channels, s_p, static_cast<T*>(p.narrow_key));
    sync_block();
    multiply_rows(c, Matrix<false>{s_z, kStride}, Matrix<true>{s_p, kStride}, row, 0, channels);
  }
  core_rows(p, c, batch_head / p.heads, row);
  sync_block();
  for_each_element(c, row, 0, [&](int r, int column, float x) {
    s_a[r * kStride + column] = x;
    s_z[column * kStride + r] = x;
  });
  sync_block();
  pinv_start<kSingleLandmarks>(s_z, s_p, nullptr, 1);
  pinv_steps<kSingleLandmarks, false>(Matrix<false>{s_a, kStride}, s_z, s_p, nullptr, p.iterations);
  float* inverse = p.inverse + batch_head * kSingleLandmarks * kSingleLandmarks;
  for (int i = thread_index(); i < kSingleLandmarks * kSingleLandmarks; i += kSingleThreads)
    inverse[i] = s_z[i / kSingleLandmarks * kStride + i % kSingleLandmarks];
}

}  // namespace nystromgan
