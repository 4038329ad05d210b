// The iterative pseudo-inverse of one matrix by a cluster of blocks, for what is too large for one: each owns 32 rows of
// every matrix, in float16 parts (pinv_halves.h), and reads the others' from their shared memory while it multiplies.
//
// Rows of Z have their block's scale: what a product takes of another block's Z is brought to one scale as it is added.
#pragma once

#include "iterative_pinv.h"
#include "pinv_halves.h"

namespace nystromgan {

constexpr int kClusterRows = 32, kClusterThreads = 256;  // warps: two of 16 rows, by four of a quarter of the columns

template <int SIDE>
using ClusterSlot = HalvesSlot<kClusterRows, SIDE>;

// A, Z, P, two that others' rows are brought to, and a float a warp beside the scale.
template <int SIDE>
constexpr int kClusterBytes = 5 * ClusterSlot<SIDE>::kBytes + 64;

template <int SIDE>
struct ClusterPinv {
  static constexpr int kBlocks = SIDE / kClusterRows, kColumns = SIDE / 32;  // of a warp, of eight each
  using Slot = ClusterSlot<SIDE>;
  using Part = Fragment[kColumns];
  int rank, row, column;  // where this warp's part is in the block's rows
  Slot a, z, p, passing[2];
  float *s_back, *s_largest;  // from the scale of z to that of Z

  DEVICE ClusterPinv() : rank(cluster_rank()), row(warp_index() / 4 * 16), column(warp_index() % 4 * (SIDE / 4)) {
    Half* s = reinterpret_cast<Half*>(shared_memory());
    Slot* slots[5] = {&a, &z, &p, &passing[0], &passing[1]};
    UNROLL
    for (int i = 0; i < 5; ++i) slots[i]->high = s + 2 * i * Slot::kElements;
    s_back = reinterpret_cast<float*>(s + 10 * Slot::kElements), s_largest = s_back + 4;
  }

  // Of the whole matrix, whose rows of this block begin at `first_row`: the blocks tell each other their columns' sums.
  DEVICE Norms norms(const Bounded& matrix, int first_row) const {
    constexpr int kGroups = kClusterThreads / SIDE, kEach = kClusterRows / kGroups, kWarps = kClusterThreads / 32;
    float* s_parts = reinterpret_cast<float*>(passing[0].high);  // (kGroups, SIDE)
    float* s_told = s_parts + kClusterThreads;                   // (SIDE), and the largest of the rows' sums
    const int own_column = thread_index() % SIDE, group = thread_index() / SIDE;
    float sum = 0.0f, largest = 0.0f;
    UNROLL
    for (int r = 0; r < kEach; ++r) sum += fabsf(matrix.at(first_row + group * kEach + r, own_column));
    s_parts[thread_index()] = sum;
    UNROLL
    for (int r = 0; r < kClusterRows / kWarps; ++r) {
      sum = 0.0f;
      UNROLL
      for (int k = 0; k < SIDE; k += 32) sum += fabsf(matrix.at(first_row + warp_index() + r * kWarps, k + lane_index()));
      largest = max_of(largest, warp_sum(sum));
    }
    if (lane_index() == 0) s_largest[warp_index()] = largest;
    sync_block();
    if (thread_index() < SIDE) {
      sum = 0.0f;
      for (int i = 0; i < kGroups; ++i) sum += s_parts[i * SIDE + thread_index()];
      s_told[thread_index()] = sum;
    }
    if (thread_index() == 0) {
      for (int i = 0; i < kWarps; ++i) largest = max_of(largest, s_largest[i]);
      s_told[SIDE] = largest;
    }
    sync_cluster();
    Norms all{0.0f, 0.0f};
    Four columns{{0.0f, 0.0f, 0.0f, 0.0f}};
    UNROLL
    for (int other = 0; other < kBlocks; ++other) {
      const Four told = load_remote(s_told + 4 * (thread_index() % (SIDE / 4)), other);
      all.row = max_of(all.row, load_remote(s_told + SIDE, other).x[0]);
      UNROLL
      for (int i = 0; i < 4; ++i) columns.x[i] += told.x[i];
    }
    UNROLL
    for (int i = 0; i < 4; ++i) all.column = max_of(all.column, columns.x[i]);
    all.column = warp_max(all.column);
    if (lane_index() == 0) s_largest[warp_index()] = all.column;
    sync_block();
    for (int i = 0; i < kWarps; ++i) all.column = max_of(all.column, s_largest[i]);
    sync_block();
    return all;
  }

  // Calls use(rows, rank of their block) for what every block of the cluster has in `own`. The next come while these serve.
  template <class Use>
  DEVICE void for_each_block(const Slot& own, Use use) const {
    constexpr int kChunks = Slot::kBytes / 16, kAhead = (kChunks + kClusterThreads - 1) / kClusterThreads;
    Four ahead[kAhead];
    auto fetch = [&](int i) {
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int chunk = minimum(k * kClusterThreads + thread_index(), kChunks - 1);
        ahead[k] = load_remote(own.high + 8 * chunk, (rank + i) % kBlocks);
      }
    };
    fetch(1);
    use(own, rank);
    for (int i = 1; i < kBlocks; ++i) {
      const Slot to{passing[0].high + i % 2 * 2 * Slot::kElements};
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int chunk = k * kClusterThreads + thread_index();
        if (chunk < kChunks) *reinterpret_cast<Four*>(to.high + 8 * chunk) = ahead[k];
      }
      sync_block();
      if (i + 1 < kBlocks) fetch(i + 1);
      use(to, (rank + i) % kBlocks);
    }
    sync_block();  // what passed may be overwritten, and so may the left operand
  }

  // c += rows of `left` times 32 rows of the right operand, of block `other`.
  DEVICE void add(Part& c, const Slot& left, const Slot& right, int other) const {
    UNROLL
    for (int k = 0; k < kClusterRows; k += 16) {
      const int depth = other * kClusterRows + k;
      const HalvesLeft rows{left_at<true>(left.high, Slot::kStride, row, depth),
                            left_at<true>(left.low(), Slot::kStride, row, depth)};
      add_halves(c, rows, right, k, column);
    }
  }

  // P = A Z; `unit` is A's scale.
  DEVICE void multiply_a(Part& c, float unit) const {
    clear(c);
    for_each_block(z, [&](const Slot& rows, int other) {
      const float back = load_remote(s_back, other).x[0];
      Part part;
      clear(part);
      add(part, a, rows, other);
      UNROLL
      for (int j = 0; j < kColumns; ++j) {
        UNROLL
        for (int i = 0; i < 4; ++i) c[j].x[i] += part[j].x[i] * back;
      }
    });
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) c[j].x[i] *= kHalvesUnit / unit;
    }
  }

  // All steps, from this warp's part of Z_0 to that of the last Z. V1 and V2 take the place of Z, which after P is made
  // serves its own block alone.
  DEVICE void steps(Part& b_z, float unit, int iterations) {
    float back = 1.0f;
    for (int step = 0; step < iterations; ++step) {
      back /= rescale(b_z, s_largest);
      store_halves(z, b_z, row, column);
      if (thread_index() == 0) *s_back = back;
      sync_cluster();
      Part b;
      multiply_a(b, unit);
      store_halves(p, b, row, column);
      sync_cluster();
      for (int v = 0; v < 3; ++v) {
        const float factor = v == 0 ? 7.0f : v == 1 ? 15.0f : 13.0f, outer = v == 2 ? 0.25f : 1.0f;
        clear(b);
        for_each_block(p, [&](const Slot& rows, int other) { add(b, z, rows, other); });
        UNROLL
        for (int j = 0; j < kColumns; ++j) {
          UNROLL
          for (int i = 0; i < 4; ++i) b[j].x[i] = outer * (factor * b_z[j].x[i] - b[j].x[i] / kHalvesUnit);
        }
        if (v == 2) break;
        store_halves(z, b, row, column);
        sync_block();
      }
      UNROLL
      for (int j = 0; j < kColumns; ++j) b_z[j] = b[j];
    }
    UNROLL
    for (int j = 0; j < kColumns; ++j) {
      UNROLL
      for (int i = 0; i < 4; ++i) b_z[j].x[i] *= back;
    }
    sync_cluster();  // no block may leave while another reads its rows
  }
};

template <int SIDE>
DEVICE void pinv_cluster(const PinvTiled& problem) {
  using Pinv = ClusterPinv<SIDE>;
  Pinv pinv;
  const int64_t matrix = block_index() / Pinv::kBlocks, offset = matrix * problem.size * problem.size;
  const int first_row = pinv.rank * kClusterRows;
  const Bounded a{problem.matrix + offset, problem.size};
  const Norms own = pinv.norms(a, first_row);
  // As large as A can be made whose rows' sums of magnitudes, and so its elements, then end below kHalvesUnit.
  const float unit = halves_scale(own.row) * (kHalvesUnit / (2 << kHalvesExponent));
  UNROLL
  for (int k = 0; k < kClusterRows * SIDE / 2 / kClusterThreads; ++k) {
    const int i = k * kClusterThreads + thread_index(), row = i / (SIDE / 2), column = i % (SIDE / 2) * 2;
    const HalvesPair pair = halves_of(unit * a.at(first_row + row, column), unit * a.at(first_row + row, column + 1));
    const int place = row * Pinv::Slot::kStride + column;
    *reinterpret_cast<uint32_t*>(pinv.a.high + place) = pair.high;
    *reinterpret_cast<uint32_t*>(pinv.a.low() + place) = pair.low;
  }
  const float scale = scale_of(problem.global_init ? largest_norms(problem.norms, problem.count) : own);
  typename Pinv::Part c;
  for_each_element(c, first_row + pinv.row, pinv.column,
                   [&](int row, int column, float& x) { x = a.at(column, row) / scale; });
  pinv.steps(c, unit, problem.iterations);
  for_each_element(c, first_row + pinv.row, pinv.column, [&](int row, int column, float x) {
    if (row < problem.size && column < problem.size) problem.inverse[offset + row * problem.size + column] = x;
  });
}

}  // namespace nystromgan
