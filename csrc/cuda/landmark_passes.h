// Means over an index, and what stands between the passes over tokens: softmax of A, splits put together, small products.
#pragma once

#include "blocks.h"
#include "landmarks.h"
#include "matmul.h"

namespace nystromgan {

// One block a head, split and 32 channels, one of which each lane adds up. A warp takes tokens that follow each other and
// keeps its sum in a register while their landmark stays the same, as it mostly does.
template <class T>
DEVICE void index_sums(const IndexSums& p) {
  const int warps = num_threads() / 32, chunks = ceil_div(p.dim, kSumChannels);
  const int chunk = block_index() % chunks;
  const int64_t unit = block_index() / chunks, batch_head = unit / p.splits;
  const int split = static_cast<int>(unit % p.splits), channel = chunk * kSumChannels + lane_index();
  float* s_sums = reinterpret_cast<float*>(shared_memory());
  float* s_counts = s_sums + warps * p.landmarks * kSumChannels;
  for (int i = thread_index(); i < warps * p.landmarks * (kSumChannels + 1); i += num_threads()) s_sums[i] = 0.0f;
  sync_block();
  const int each = ceil_div(p.split, warps);
  const int first = split * p.split + warp_index() * each;
  const int end = minimum(minimum(first + each, (split + 1) * p.split), p.num_tokens);
  const int64_t batch = batch_head / p.heads, head = batch_head % p.heads;
  const T* tokens = static_cast<const T*>(p.tokens.data) + batch * p.tokens.batch + head * p.tokens.head;
  float* own = s_sums + warp_index() * p.landmarks * kSumChannels + lane_index();
  float* own_counts = s_counts + warp_index() * p.landmarks;
  constexpr int kAhead = 8;
  int current = -1;
  float sum = 0.0f, count = 0.0f;
  auto leave = [&] {
    if (current < 0) return;
    own[current * kSumChannels] += sum;
    if (lane_index() == 0) own_counts[current] += count;
  };
  int of_lane = -1;  // the landmark of this lane's token of 32
  for (int token = first; token < end; token += kAhead) {
    const int place = (token - first) % 32;
    if (place == 0) of_lane = token + lane_index() < end ? landmark_of(p.index, batch, head, token + lane_index()) : -1;
    int landmark[kAhead];
    float x[kAhead];
    UNROLL
    for (int i = 0; i < kAhead; ++i) landmark[i] = shuffle(of_lane, place + i);
    UNROLL
    for (int i = 0; i < kAhead; ++i)
      x[i] = landmark[i] >= 0 && channel < p.dim ? to_float(tokens[(token + i) * p.tokens.token + channel * p.tokens.channel])
                                                 : 0.0f;
    UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (landmark[i] != current) {
        leave();
        current = landmark[i], sum = 0.0f, count = 0.0f;
      }
      sum += x[i], count += 1.0f;
    }
  }
  leave();
  sync_block();
  const int64_t row = unit * p.landmarks;
  for (int i = thread_index(); i < p.landmarks * kSumChannels; i += num_threads()) {
    const int to = chunk * kSumChannels + i % kSumChannels;
    float all = 0.0f;
    for (int w = 0; w < warps; ++w) all += s_sums[w * p.landmarks * kSumChannels + i];
    if (to < p.dim) p.sums[(row + i / kSumChannels) * p.dim + to] = all;
  }
  for (int i = thread_index(); i < p.landmarks && chunk == 0; i += num_threads()) {
    float all = 0.0f;
    for (int w = 0; w < warps; ++w) all += s_counts[w * p.landmarks + i];
    p.counts[row + i] = all;
  }
}

// Calls body(i) for this thread's share of `count`.
template <class Body>
DEVICE void for_each_of(int64_t count, Body body) {
  for (int64_t i = int64_t{block_index()} * num_threads() + thread_index(); i < count; i += int64_t{num_blocks()} * num_threads())
    body(i);
}

// Calls body(row) for this warp's share of `rows`.
template <class Body>
DEVICE void for_each_row(int64_t rows, Body body) {
  const int warps = num_threads() / 32;
  for (int64_t row = int64_t{block_index()} * warps + warp_index(); row < rows; row += int64_t{num_blocks()} * warps) body(row);
}

DEVICE void index_means(const IndexMeans& p) {
  for_each_of(p.rows * p.dim, [&](int64_t i) {
    const int64_t row = i / p.dim, batch_head = row / p.landmarks, landmark = row % p.landmarks;
    float sum = 0.0f, count = 0.0f;
    for (int split = 0; split < p.splits; ++split) {
      const int64_t part = (batch_head * p.splits + split) * p.landmarks + landmark;
      sum += p.sums[part * p.dim + i % p.dim];
      count += p.counts[part];
    }
    p.means[i] = count == 0.0f && p.fallback ? p.fallback[i] : sum / max_of(count, 1.0f);
  });
}

DEVICE void index_counts(const IndexCounts& p) {
  int* s_counts = reinterpret_cast<int*>(shared_memory());
  for (int i = thread_index(); i < p.landmarks; i += num_threads()) s_counts[i] = 0;
  sync_block();
  const int64_t batch = block_index() / p.heads, head = block_index() % p.heads;
  const int32_t* index = p.index.data + batch * p.index.batch + head * p.index.head;
  constexpr int kAhead = 8;  // reads on their way: there is one block for all tokens
  for (int start = thread_index(); start < p.num_tokens; start += kAhead * num_threads()) {
    int landmark[kAhead];
    UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int token = start + i * num_threads();
      landmark[i] = token < p.num_tokens ? index[token] : -1;
    }
    UNROLL
    for (int i = 0; i < kAhead; ++i)
      if (landmark[i] >= 0) add_to_counter(s_counts + landmark[i], 1);
  }
  sync_block();
  for (int i = thread_index(); i < p.landmarks; i += num_threads())
    p.counts[int64_t{block_index()} * p.landmarks + i] = static_cast<float>(s_counts[i]);
}

DEVICE void grid_index(const GridIndex& p) {
  for_each_of(p.num_tokens, [&](int64_t i) { p.index[i] = block_of(p.grid, static_cast<int>(i)); });
  for_each_of(p.landmarks, [&](int64_t i) { p.counts[i] = static_cast<float>(tokens_of(p.grid, static_cast<int>(i))); });
}

template <class T>
DEVICE void convert(const Convert& p) {
  for_each_of(p.count, [&](int64_t i) {
    float x = p.x[i];
    if (p.only && p.only[i / p.of_one_row]) p.x[i] = x = p.other[i];
    if (p.out) static_cast<T*>(p.out)[i] = from_float<T>(x);
  });
}

DEVICE void core_softmax(const CoreSoftmax& p) {
  for_each_row(p.rows, [&](int64_t row) {
    const int64_t batch = row / p.landmarks / p.heads;
    float* x = p.core + row * p.landmarks;
    const uint8_t* absent = p.key_absent ? p.key_absent + batch * p.landmarks : nullptr;
    const bool none = p.query_absent && p.query_absent[batch * p.landmarks + row % p.landmarks];
    float largest = -INFINITY, total = 0.0f;
    for (int i = lane_index(); i < p.landmarks; i += 32)
      if (!(absent && absent[i])) largest = max_of(largest, x[i] * p.scale_log2);
    largest = warp_max(largest);
    for (int i = lane_index(); i < p.landmarks; i += 32) {
      const float weight = absent && absent[i] ? 0.0f : exp2_of(x[i] * p.scale_log2 - largest);
      x[i] = weight;
      total += weight;
    }
    total = warp_sum(total);
    for (int i = lane_index(); i < p.landmarks; i += 32) x[i] = none || total == 0.0f ? 0.0f : x[i] / total;
  });
}

DEVICE void core_gradient(const CoreGradient& p) {
  for_each_row(p.rows, [&](int64_t row) {
    const float* a = p.core + row * p.landmarks;
    float* grad = p.grad + row * p.landmarks;
    float dot = 0.0f;
    for (int i = lane_index(); i < p.landmarks; i += 32) dot += a[i] * grad[i];
    dot = warp_sum(dot);
    for (int i = lane_index(); i < p.landmarks; i += 32) grad[i] = a[i] * (grad[i] - dot) * p.scale;
  });
}

DEVICE void merge(const Merge& p) {
  for_each_row(p.rows, [&](int64_t row) {
    const int64_t batch_head = row / p.landmarks, landmark = row % p.landmarks;
    auto part = [&](int split) { return (batch_head * p.splits + split) * p.landmarks + landmark; };
    float largest = -INFINITY, total = 0.0f;
    for (int split = 0; split < p.splits; ++split) largest = max_of(largest, p.largest[part(split)]);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    for (int split = 0; split < p.splits; ++split) total += p.totals[part(split)] * exp2_of(p.largest[part(split)] - shift);
    const bool empty = total == 0.0f || (p.query_absent && p.query_absent[batch_head / p.heads * p.landmarks + landmark]);
    if (lane_index() == 0) p.logsumexp[row] = empty ? INFINITY : (largest + log2_of(total)) * kLn2;
    for (int channel = lane_index(); channel < p.dim; channel += 32) {
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split)
        sum += p.sums[part(split) * p.dim + channel] * exp2_of(p.largest[part(split)] - shift);
      p.context[row * p.dim + channel] = empty ? 0.0f : sum / total;
    }
  });
}

DEVICE void reduce(const Reduce& p) {
  for_each_of(p.heads * p.size, [&](int64_t i) {
    const int64_t head = i / p.size;
    float sum = p.base ? p.base[i] : 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += p.parts[(head * p.splits + split) * p.size + i % p.size];
    p.out[i] = sum;
  });
}

DEVICE void context_gradient(const ContextGradient& p) {
  for_each_row(p.rows, [&](int64_t row) {
    const int64_t batch = row / p.landmarks / p.heads;
    const bool none = (p.query_absent && p.query_absent[batch * p.landmarks + row % p.landmarks]) || (p.exact && p.exact[batch]);
    float dot = 0.0f;
    for (int i = lane_index(); i < p.dim; i += 32) {
      float& grad = p.grad[row * p.dim + i];
      grad = none ? 0.0f : grad;
      dot += grad * p.context[row * p.dim + i];
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) p.delta[row] = dot;
  });
}

template <bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
DEVICE void matmul(const Matmul& p) {
  const int tiles = ceil_div(p.rows, kTile) * ceil_div(p.columns, kTile);
  const int64_t matrix = block_index() / tiles;
  const int tile = block_index() % tiles, across = ceil_div(p.columns, kTile);
  const int row = tile / across * kTile, column = tile % across * kTile;
  TilePart c;
  multiply_tile(c, Source<LEFT_TRANSPOSED>{p.a + matrix * p.stride_a, p.rows, p.depth, p.row_stride_a},
                Source<RIGHT_TRANSPOSED>{p.b + matrix * p.stride_b, p.depth, p.columns, p.row_stride_b}, row, column);
  const bool zero = p.zero && p.zero[matrix / p.heads];
  float* out = p.out + matrix * p.stride_out;
  for_each_element(c, row, column, [&](int r, int k, float x) {
    if (r >= p.rows || k >= p.columns) return;
    float& to = out[static_cast<int64_t>(r) * p.columns + k];
    x *= p.alpha;
    to = zero ? 0.0f : p.beta == 0.0f ? x : x + p.beta * to;
  });
}

}  // namespace nystromgan
