// Power iteration of all weights of a network in one cooperative launch:
//     t = W v, u = t / |t|    s = W^T u, v = s / |s|, sigma = |s|
// A block takes some rows of a weight at a time: their t, and with the rows still in cache their share of W^T t. Shares are
// added in the order of the rows, whoever made them, so the result is the same from run to run.
#pragma once

#include "device.h"
#include "power_iteration.h"

namespace nystromgan {

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
DEVICE void with_dtype(Dtype dtype, Body body) {
  if (dtype == Dtype::float32)
    body(float{});
  else if (dtype == Dtype::bfloat16)
    body(BFloat16{});
  else
    body(Half{});
}

// WIDTH elements of a row of a weight, zero from `columns` on; one read where WIDTH is more than one.
template <class T, int WIDTH>
DEVICE void load_elements(float (&x)[WIDTH], const T* row, int64_t column, int64_t columns, int64_t stride) {
  if constexpr (WIDTH == 1) {
    x[0] = column < columns ? to_float(row[column * stride]) : 0.0f;
  } else {
    struct alignas(16) Chunk {
      T x[WIDTH];
    } chunk{};
    if (column < columns) chunk = *reinterpret_cast<const Chunk*>(row + column);
    UNROLL
    for (int i = 0; i < WIDTH; ++i) x[i] = to_float(chunk.x[i]);
  }
}

// t of rows [first, first + rows), one warp a row, into `s_t` and, where it is given, `t`.
template <class T, int WIDTH>
DEVICE void multiply_rows(const PowerWeight& w, const float* v, int64_t first, int rows, float* t, float* s_t) {
  for (int r = warp_index(); r < rows; r += kPowerThreads / 32) {
    const T* row = static_cast<const T*>(w.data) + (first + r) * w.row_stride;
    float sum = 0.0f;
    for (int64_t column = lane_index() * WIDTH; column < w.columns; column += 32 * WIDTH) {
      float x[WIDTH];
      load_elements<T, WIDTH>(x, row, column, w.columns, w.column_stride);
      UNROLL
      for (int i = 0; i < WIDTH; ++i) sum += column + i < w.columns ? x[i] * load_float(v + column + i) : 0.0f;
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) s_t[r] = sum;
    if (lane_index() == 0 && t) t[first + r] = sum;
  }
}

// These rows' part of W^T t.
template <class T, int WIDTH>
DEVICE void share_columns(const PowerWeight& w, int64_t first, int rows, const float* s_t, float* share) {
  for (int64_t column = thread_index() * WIDTH; column < w.columns; column += kPowerThreads * WIDTH) {
    float sums[WIDTH] = {};
    for (int r = 0; r < rows; ++r) {
      float x[WIDTH];
      const T* row = static_cast<const T*>(w.data) + (first + r) * w.row_stride;
      load_elements<T, WIDTH>(x, row, column, w.columns, w.column_stride);
      UNROLL
      for (int i = 0; i < WIDTH; ++i) sums[i] += x[i] * s_t[r];
    }
    UNROLL
    for (int i = 0; i < WIDTH; ++i)
      if (column + i < w.columns) share[column + i] = sums[i];
  }
}

// The sum over the block, in every thread.
DEVICE float block_sum(float x, float* s_parts) {
  x = warp_sum(x);
  sync_block();
  if (lane_index() == 0) s_parts[warp_index()] = x;
  sync_block();
  x = 0.0f;
  for (int i = 0; i < kPowerThreads / 32; ++i) x += s_parts[i];
  return x;
}

// The sum of `count` numbers that other blocks wrote, in every thread of the warp.
DEVICE float sum_of(const float* x, int count) {
  float sum = 0.0f;
  for (int i = lane_index(); i < count; i += 32) sum += load_float(x + i);
  return warp_sum(sum);
}

DEVICE int num_items(const PowerWeight& w) { return static_cast<int>(ceil_div(w.rows, int64_t{w.item_rows})); }

DEVICE int num_column_blocks(const PowerWeight& w) {
  return static_cast<int>(ceil_div(w.columns, int64_t{kColumnBlock}));
}

// The weight that a unit of work belongs to: the last that begins at or before it.
template <class First>
DEVICE int weight_of(int count, int unit, First first) {
  int i = 0;
  while (i + 1 < count && first(i + 1) <= unit) ++i;
  return i;
}

DEVICE void multiply_item(const PowerIteration& p, int item, float* s_t, float* s_parts) {
  const PowerWeight& w = p.weights[weight_of(p.count, item, [&](int i) { return p.weights[i].first_item; })];
  const int index = item - w.first_item;
  const int64_t first = int64_t{index} * w.item_rows;
  const int rows = static_cast<int>(minimum(int64_t{w.item_rows}, w.rows - first));
  float *t = p.uv + w.u_offset, *share = p.shares + w.share_offset + index * w.columns;
  const float* v = p.uv + w.v_offset;
  float u_before = 0.0f;  // where nothing is iterated u stays
  with_dtype(w.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWidth = 16 / sizeof(T);
    if (w.wide)
      multiply_rows<T, kWidth>(w, v, first, rows, p.iterations ? t : nullptr, s_t);
    else
      multiply_rows<T, 1>(w, v, first, rows, p.iterations ? t : nullptr, s_t);
    sync_block();
    if (p.iterations) {
      if (w.wide)
        share_columns<T, kWidth>(w, first, rows, s_t, share);
      else
        share_columns<T, 1>(w, first, rows, s_t, share);
    }
  });
  for (int r = thread_index(); r < rows; r += kPowerThreads)
    u_before += s_t[r] * (p.iterations ? s_t[r] : load_float(t + first + r));
  const float square = block_sum(u_before, s_parts);
  if (thread_index() == 0) p.squares[item] = square;
  sync_block();
}

DEVICE float norm_of_t(const PowerIteration& p, const PowerWeight& w) {
  return max_of(sqrtf(sum_of(p.squares + w.first_item, num_items(w))), p.eps);
}

// s = W^T u of one block of columns, into uv's v.
DEVICE void add_shares(const PowerIteration& p, int block, float* s_parts) {
  const PowerWeight& w = p.weights[weight_of(p.count, block, [&](int i) { return p.weights[i].first_block; })];
  const int64_t first = int64_t{block - w.first_block} * kColumnBlock;
  const float norm = norm_of_t(p, w);
  const int items = num_items(w);
  float square = 0.0f;
  for (int64_t column = first + thread_index(); column < minimum(first + kColumnBlock, w.columns); column += kPowerThreads) {
    float sum = 0.0f;
    for (int item = 0; item < items; ++item) sum += load_float(p.shares + w.share_offset + item * w.columns + column);
    sum /= norm;
    p.uv[w.v_offset + column] = sum;
    square += sum * sum;
  }
  square = block_sum(square, s_parts);
  if (thread_index() == 0) p.lengths[block] = square;
}

// Calls body(weight, index of the vector, whether it is u) for every element of every u and v.
template <class Body>
DEVICE void for_all_vectors(const PowerIteration& p, Body body) {
  for (int i = 0; i < p.count; ++i) {
    const PowerWeight& w = p.weights[i];
    for (int64_t k = int64_t{block_index()} * kPowerThreads + thread_index(); k < w.rows + w.columns;
         k += int64_t{num_blocks()} * kPowerThreads)
      body(w, k < w.rows ? k : k - w.rows, k < w.rows);
  }
}

// u = t / |t| and v = s / |s|, which the next step or the caller takes; and sigma = |s|.
DEVICE void divide(const PowerIteration& p, bool last) {
  for (int i = 0; i < p.count; ++i) {
    const PowerWeight& w = p.weights[i];
    const int64_t length = w.rows + w.columns, start = int64_t{block_index()} * kPowerThreads;
    if (start >= length && block_index() > 0) continue;  // the whole block: a sum below gathers its warps
    const float norm_t = norm_of_t(p, w);
    const float square = sum_of(p.lengths + w.first_block, num_column_blocks(w));
    const float norm_s = max_of(sqrtf(square), p.eps);
    if (block_index() == 0 && thread_index() == 0) p.sigma[w.place] = square / norm_s;
    for (int64_t k = start + thread_index(); k < length; k += int64_t{num_blocks()} * kPowerThreads) {
      const bool left = k < w.rows;
      float* x = left ? p.uv + w.u_offset + k : p.uv + w.v_offset + (k - w.rows);
      const float y = load_float(x) / (left ? norm_t : norm_s);
      *x = y;
      if (last)
        with_dtype(left ? w.u_dtype : w.v_dtype, [&](auto tag) {
          using T = decltype(tag);
          T* target = static_cast<T*>(left ? w.u : w.v);
          target[left ? k * w.u_stride : (k - w.rows) * w.v_stride] = from_float<T>(y);
        });
    }
  }
}

DEVICE void power_iteration(const PowerIteration& p) {
  float* s_t = reinterpret_cast<float*>(shared_memory());
  float* s_parts = s_t + kMostItemRows;
  for_all_vectors(p, [&](const PowerWeight& w, int64_t k, bool left) {
    with_dtype(left ? w.u_dtype : w.v_dtype, [&](auto tag) {
      const auto* source = static_cast<const decltype(tag)*>(left ? w.u : w.v);
      p.uv[(left ? w.u_offset : w.v_offset) + k] = to_float(source[k * (left ? w.u_stride : w.v_stride)]);
    });
  });
  sync_grid();
  for (int step = 0; step < p.iterations; ++step) {
    for (int item = block_index(); item < p.items; item += num_blocks()) multiply_item(p, item, s_t, s_parts);
    sync_grid();
    for (int block = block_index(); block < p.blocks; block += num_blocks()) add_shares(p, block, s_parts);
    sync_grid();
    divide(p, step + 1 == p.iterations);
    sync_grid();
  }
  if (p.iterations > 0) return;
  for (int item = block_index(); item < p.items; item += num_blocks()) multiply_item(p, item, s_t, s_parts);
  sync_grid();
  for (int i = block_index(); i < p.count; i += num_blocks()) {
    const float sigma = sum_of(p.squares + p.weights[i].first_item, num_items(p.weights[i]));
    if (thread_index() == 0) p.sigma[p.weights[i].place] = sigma;
  }
}

// W / sigma, contiguous.
DEVICE void spectral_normalize(const SpectralNormalize& p) {
  const NormalizeWeight& w =
      p.weights[weight_of(p.count, block_index(), [&](int i) { return p.weights[i].first_block; })];
  const int64_t first = int64_t{block_index() - w.first_block} * kNormalizeBlock, size = w.rows * w.columns;
  const float sigma = p.sigma[w.place];
  with_dtype(w.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* data = static_cast<const T*>(w.data);
    T* output = static_cast<T*>(w.output);
    for (int64_t i = first + thread_index(); i < minimum(first + kNormalizeBlock, size); i += kPowerThreads) {
      const int64_t source = w.contiguous ? i : i / w.columns * w.row_stride + i % w.columns * w.column_stride;
      output[i] = from_float<T>(to_float(data[source]) / sigma);
    }
  });
}

// Calls body(weight, element type, first element, end) for this block's share of a gradient.
template <class Body>
DEVICE void for_my_gradient(const NormalizeGradient& p, Body body) {
  const GradientWeight& w =
      p.weights[weight_of(p.count, block_index(), [&](int i) { return p.weights[i].first_block; })];
  const int64_t first = int64_t{block_index() - w.first_block} * kNormalizeBlock;
  const int64_t end = minimum(first + kNormalizeBlock, w.rows * w.columns);
  with_dtype(w.dtype, [&](auto tag) { body(w, tag, first, end); });
}

DEVICE void normalize_dots(const NormalizeGradient& p) {
  for_my_gradient(p, [&](const GradientWeight& w, auto tag, int64_t first, int64_t end) {
    using T = decltype(tag);
    const T *grad = static_cast<const T*>(w.grad), *normalized = static_cast<const T*>(w.normalized);
    float sum = 0.0f;
    for (int64_t i = first + thread_index(); i < end; i += kPowerThreads) sum += to_float(grad[i]) * to_float(normalized[i]);
    sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
    if (thread_index() == 0) p.dots[block_index()] = sum;
  });
}

// dW = (dW_sn - <dW_sn, W_sn> u v^T) / sigma.
DEVICE void normalize_gradient(const NormalizeGradient& p) {
  for_my_gradient(p, [&](const GradientWeight& w, auto tag, int64_t first, int64_t end) {
    using T = decltype(tag);
    const T* grad = static_cast<const T*>(w.grad);
    T* grad_weight = static_cast<T*>(w.grad_weight);
    const int parts = static_cast<int>(ceil_div(w.rows * w.columns, kNormalizeBlock));
    const float along = sum_of(p.dots + w.first_block, parts), sigma = p.sigma[w.place];
    for (int64_t i = first + thread_index(); i < end; i += kPowerThreads) {
      const float outer = p.uv[w.u_offset + i / w.columns] * p.uv[w.v_offset + i % w.columns];
      grad_weight[i] = from_float<T>((to_float(grad[i]) - along * outer) / sigma);
    }
  });
}

}  // namespace nystromgan
