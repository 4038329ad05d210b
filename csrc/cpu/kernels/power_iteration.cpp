// Power iteration of many matrices at once. u = W v / |W v| needs a norm over all rows, but a norm is one scalar, so
// W^T u = W^T (W v) / |W v|: each group of rows gives its part of W v and, still in cache, its part of W^T (W v). A step
// reads W from memory once.
#include "power_iteration.h"

#include <sched.h>

#include "convert.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

constexpr int kGroup = 4;   // rows that share each load of v, and of the running sum
constexpr int kSlab = 16;   // rows gathered to fp32 at a time: a cache line of a transposed matrix
constexpr int kSpins = 1000;  // of some 40 cycles: a block takes longer, a thread's time slice far longer

NYSTROMGAN_INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Until `stage` stages of a weight are finished. The threads that are at them hold tasks taken before, so they get there.
void wait_for(const Progress& progress, int64_t stage) {
  for (int spins = 0; __atomic_load_n(&progress.finished, __ATOMIC_ACQUIRE) < stage; ++spins)
    if (spins >= kSpins) sched_yield();  // there may be fewer cores than threads
    else pause();
}

// Calls work(block, stage) for every task; whichever thread is free takes the next, so unequal ones balance. The thread
// that is the last of a weight at a stage calls finish(weight, stage), before any of the next stage starts.
template <class Work, class Finish>
void run_tasks(const Schedule& schedule, Work work, Finish finish) {
  int64_t next = 0;
  // on a thread for each block at most, as more would only wait: to wake one takes as long as a block of 100 x 100
  parallel(schedule.run, schedule.num_blocks, [&](int64_t, int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < schedule.num_tasks;) {
      const Task& task = schedule.tasks[i];
      const RowBlock& block = schedule.blocks[task.block];
      Progress& progress = schedule.progress[block.weight];
      wait_for(progress, task.stage);
      work(block, task.stage);
      if (__atomic_add_fetch(&progress.arrived, 1, __ATOMIC_ACQ_REL) < progress.num_blocks) continue;
      finish(block.weight, task.stage);
      progress.arrived = 0;
      __atomic_store_n(&progress.finished, task.stage + 1, __ATOMIC_RELEASE);
    }
  });
}

// product[r] = W[r, :] v for kRows rows.
template <int kRows>
void multiply_rows(const float* w, int64_t ld, int64_t cols, const float* v, float* product) {
  Vec sums[kRows] = {};
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    const Vec x = load(v + c);
    for (int r = 0; r < kRows; ++r) {
      if (r < kRows / 2) __builtin_prefetch(w + (kRows + r) * ld + c, 0, 2);
      sums[r] += load(w + r * ld + c) * x;
    }
  }
  if (c < cols) {
    const Vec x = load_first(v + c, cols - c);
    for (int r = 0; r < kRows; ++r) sums[r] += load_first(w + r * ld + c, cols - c) * x;
  }
  for (int r = 0; r < kRows; ++r) product[r] = reduce_add(sums[r]);
}

// sum += sum over kRows rows of product[r] W[r, :]; sum is padded to whole vectors.
template <int kRows>
void accumulate_rows(const float* w, int64_t ld, int64_t cols, const float* product, float* sum) {
  Vec factors[kRows];
  for (int r = 0; r < kRows; ++r) factors[r] = splat(product[r]);
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    Vec total = load(sum + c);
    for (int r = 0; r < kRows; ++r) {
      if (r >= kRows / 2) __builtin_prefetch(w + (kRows + r) * ld + c, 0, 2);
      total += load(w + r * ld + c) * factors[r];
    }
    store(sum + c, total);
  }
  if (c < cols) {
    Vec total = load(sum + c);
    for (int r = 0; r < kRows; ++r) total += load_first(w + r * ld + c, cols - c) * factors[r];
    store(sum + c, total);
  }
}

// Calls body(rows_fp32, ld, first_row, count) over the rows of a block in slabs: fp32 rows where they lie, others gathered.
template <class T, class Body>
void for_each_slab(const Weight& weight, const RowBlock& block, Body body) {
  const T* data = static_cast<const T*>(weight.data) + block.first_row * weight.row_stride;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (weight.col_stride == 1) return body(data, weight.row_stride, block.first_row, block.rows);
  }
  const int64_t ld = round_up(weight.cols, kLanes);
  const Scratch slab(kSlab * ld);
  for (int64_t r = 0; r < block.rows; r += kSlab) {
    const int64_t count = min(kSlab, block.rows - r);
    gather(data + r * weight.row_stride, count, weight.cols, weight.row_stride, weight.col_stride, slab, ld);
    body(slab, ld, block.first_row + r, count);
  }
}

// u[rows of the block] = W v, and the block's partial sum = W^T (W v) over its rows.
template <class T>
void iterate_block(const Weight& weight, const PowerState& state, const RowBlock& block) {
  float* sum = state.partials + block.index * state.partial_stride;
  memset(sum, 0, state.partial_stride * sizeof(float));
  for_each_slab<T>(weight, block, [&](const float* w, int64_t ld, int64_t first, int64_t count) {
    int64_t r = 0;
    for (; r + kGroup <= count; r += kGroup) {
      multiply_rows<kGroup>(w + r * ld, ld, weight.cols, state.v, state.u + first + r);
      accumulate_rows<kGroup>(w + r * ld, ld, weight.cols, state.u + first + r, sum);
    }
    for (; r < count; ++r) {
      multiply_rows<1>(w + r * ld, ld, weight.cols, state.v, state.u + first + r);
      accumulate_rows<1>(w + r * ld, ld, weight.cols, state.u + first + r, sum);
    }
  });
}

// The block's partial sum[0] = u^T W v over its rows.
template <class T>
void evaluate_block(const Weight& weight, const PowerState& state, const RowBlock& block) {
  float total = 0;
  for_each_slab<T>(weight, block, [&](const float* w, int64_t ld, int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      float product;
      multiply_rows<1>(w + r * ld, ld, weight.cols, state.v, &product);
      total += state.u[first + r] * product;
    }
  });
  state.partials[block.index * state.partial_stride] = total;
}

// x . y in double: squares of floats never overflow or vanish.
double dot(const float* x, const float* y, int64_t n) {
  typedef double DoubleVec __attribute__((vector_size(kLanes * 8)));
  DoubleVec sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t rest = min(kLanes, n - i);
    const Vec a = rest == kLanes ? load(x + i) : load_first(x + i, rest);
    const Vec b = rest == kLanes ? load(y + i) : load_first(y + i, rest);
    sums += __builtin_convertvector(a, DoubleVec) * __builtin_convertvector(b, DoubleVec);
  }
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += sums[i];
  return total;
}

// x / max(|x|, eps); a NaN norm stays one. Returns the divisor.
float normalize(float* x, int64_t n, float eps) {
  const double norm = __builtin_sqrt(dot(x, x, n));
  const float divisor = norm < eps ? eps : static_cast<float>(norm);
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
  return divisor;
}

// v = the sum of the partials over `divisor`.
void reduce_partials(const PowerState& state, int64_t cols, float divisor) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    Vec sum = load(state.partials + c);
    for (int64_t b = 1; b < state.num_blocks; ++b) sum += load(state.partials + b * state.partial_stride + c);
    sum /= divisor;
    if (c + kLanes <= cols) store(state.v + c, sum);
    else store_first(state.v + c, sum, cols - c);
  }
}

// From u = W v and the partials: u, v and sigma of the step.
void finish_step(const Weight& weight, const PowerState& state, float eps) {
  const float divisor = normalize(state.u, weight.rows, eps);
  reduce_partials(state, weight.cols, divisor);
  // With s = W^T u and v = s / d, d = max(|s|, eps), sigma = u^T W v = s . v = d |v|^2.
  const float norm = normalize(state.v, weight.cols, eps);
  *state.sigma = norm * static_cast<float>(dot(state.v, state.v, weight.cols));
}

void sum_sigma(const PowerState& state) {
  *state.sigma = 0;
  for (int64_t b = 0; b < state.num_blocks; ++b) *state.sigma += state.partials[b * state.partial_stride];
}

void load_vector(const Vector& buffer, float* x, int64_t n) {
  with_type(buffer.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; ++i) x[i] = to_float(static_cast<const T*>(buffer.data)[i * buffer.stride]);
  });
}

void store_vector(const float* x, const Vector& buffer, int64_t n) {
  with_type(buffer.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(buffer.data)[i * buffer.stride] = from_float<T>(x[i]);
  });
}

void load_vectors(const Weight& weight, const PowerState& state) {
  load_vector(state.u_buffer, state.u, weight.rows);
  load_vector(state.v_buffer, state.v, weight.cols);
}

void store_vectors(const Weight& weight, const PowerState& state) {
  store_vector(state.u, state.u_buffer, weight.rows);
  store_vector(state.v, state.v_buffer, weight.cols);
}

// Past the cache, as the outputs of a network's weights exceed it. output is aligned.
template <class T>
void scale_row(const T* w, T* output, int64_t cols, float factor) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) stream(output + c, load(w + c) * factor);
  if (c < cols) store_first(output + c, load_first(w + c, cols - c) * factor, cols - c);
}

// output[rows of the block] = W factor, output contiguous.
template <class T>
void scale_block(const Weight& weight, const RowBlock& block, T* output, float factor) {
  if (weight.col_stride == 1 && weight.row_stride == weight.cols) {
    const int64_t offset = block.first_row * weight.cols;
    return scale_row(static_cast<const T*>(weight.data) + offset, output + offset, block.rows * weight.cols, factor);
  }
  for_each_slab<T>(weight, block, [&](const float* w, int64_t ld, int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      T* to = output + (first + r) * weight.cols;
      int64_t c = 0;
      for (; c + kLanes <= weight.cols; c += kLanes) store(to + c, load(w + r * ld + c) * factor);
      const int64_t rest = weight.cols - c;
      if (rest > 0) store_first(to + c, load_first(w + r * ld + c, rest) * factor, rest);
    }
  });
}

// The sum of the lanes, in double.
double sum_lanes(Vec x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// x . y over one row, in float by parts: those of a row of 4608 have 72 terms a lane.
template <class T>
double multiply_row(const float* x, const T* y, int64_t n) {
  constexpr int kSums = 4;
  Vec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) sums[s] += load(x + i + s * kLanes) * load(y + i + s * kLanes);
  for (; i + kLanes <= n; i += kLanes) sums[0] += load(x + i) * load(y + i);
  if (i < n) sums[1] += load_first(x + i, n - i) * load_first(y + i, n - i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// to = x factor + y other.
template <class T>
void combine_rows(const float* x, float factor, const float* y, float other, T* to, int64_t n) {
  // Past the cache where the rows keep the alignment of the matrix.
  const bool aligned = reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(float)) == 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec sum = load(x + i) * factor + load(y + i) * other;
    if (aligned) stream(to + i, sum);
    else store(to + i, sum);
  }
  if (i < n) store_first(to + i, load_first(x + i, n - i) * factor + load_first(y + i, n - i) * other, n - i);
}

// The block's share of <dW_sn, W_sn>.
template <class T>
double multiply_block(const Weight& grad, const RowBlock& block, const T* output) {
  double total = 0;
  for_each_slab<T>(grad, block, [&](const float* g, int64_t ld, int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) total += multiply_row(g + r * ld, output + (first + r) * grad.cols, grad.cols);
  });
  return total;
}

// The block's rows of dW, with scale = 1 / sigma and along = <dW_sn, W_sn>.
template <class T>
void project_block(
    const Weight& grad, const RowBlock& block, const float* u, const float* v, float scale, float along, T* grad_weight) {
  for_each_slab<T>(grad, block, [&](const float* g, int64_t ld, int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r)
      combine_rows(g + (r - first) * ld, scale, v, -along * scale * u[r], grad_weight + r * grad.cols, grad.cols);
  });
}

}  // namespace

void power_iteration(const PowerIteration& call) {
  for (int64_t i = 0; i < call.num_weights; ++i) load_vectors(call.weights[i], call.states[i]);
  const int64_t last = call.iterations > 0 ? call.iterations : 1;  // the stage of W / sigma
  const auto work = [&](const RowBlock& block, int64_t stage) {
    const Weight& weight = call.weights[block.weight];
    const PowerState& state = call.states[block.weight];
    with_type(weight.dtype, [&](auto type) {
      using T = decltype(type);
      if (stage == last) scale_block<T>(weight, block, static_cast<T*>(call.outputs[block.weight]), 1 / *state.sigma);
      else if (call.iterations > 0) iterate_block<T>(weight, state, block);
      else evaluate_block<T>(weight, state, block);
    });
  };
  run_tasks(call.schedule, work, [&](int64_t i, int64_t stage) {
    if (stage == last) return;
    if (call.iterations > 0) finish_step(call.weights[i], call.states[i], call.eps);
    else sum_sigma(call.states[i]);
  });
  if (call.iterations == 0 || !call.stores_vectors) return;
  for (int64_t i = 0; i < call.num_weights; ++i) store_vectors(call.weights[i], call.states[i]);
}

void spectral_normalize(const SpectralNormalize& call) {
  const auto work = [&](const RowBlock& block, int64_t) {
    const Weight& weight = call.weights[block.weight];
    with_type(weight.dtype, [&](auto type) {
      using T = decltype(type);
      scale_block<T>(weight, block, static_cast<T*>(call.outputs[block.weight]), 1 / call.sigma[block.weight]);
    });
  };
  run_tasks(call.schedule, work, [](int64_t, int64_t) {});
}

void spectral_normalize_backward(const SpectralNormalizeBackward& call) {
  const auto work = [&](const RowBlock& block, int64_t stage) {
    const int64_t w = block.weight;
    double* products = call.products[w];
    with_type(call.grad_outputs[w].dtype, [&](auto type) {
      using T = decltype(type);
      if (stage == 0) {
        products[block.index] = multiply_block<T>(call.grad_outputs[w], block, static_cast<const T*>(call.outputs[w]));
      } else {
        T* to = static_cast<T*>(call.grad_weights[w]);
        const float along = static_cast<float>(products[0]);
        project_block<T>(call.grad_outputs[w], block, call.u[w], call.v[w], 1 / call.sigma[w], along, to);
      }
    });
  };
  run_tasks(call.schedule, work, [&](int64_t w, int64_t stage) {
    if (stage > 0) return;
    double* products = call.products[w];
    for (int64_t b = 1; b < call.schedule.progress[w].num_blocks; ++b) products[0] += products[b];
  });
}

}  // namespace nystromgan::NYSTROMGAN_ISA
