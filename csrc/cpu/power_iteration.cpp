// The binding of power_iteration, spectral_normalize and its backward: tensors to plain pointers, and matrices to row blocks.
#include "power_iteration.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "binding.h"

namespace nystromgan {

NYSTROMGAN_KERNEL(power_iteration, PowerIteration)
NYSTROMGAN_KERNEL(spectral_normalize, SpectralNormalize)
NYSTROMGAN_KERNEL(spectral_normalize_backward, SpectralNormalizeBackward)

namespace {

using Tensors = std::vector<Tensor>;

// A block of this many elements stays in L2 and keeps the partial sums, one row a block, to a few percent of the traffic.
constexpr int64_t kBlockElements = 1 << 18;
constexpr int64_t kMinBlockRows = 16;
constexpr int64_t kLineFloats = 16;
constexpr int64_t kBlocksPerThread = 2;  // of a group: one is in work while the others wait in cache

int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

int64_t block_rows(int64_t cols) {
  const int64_t rows = std::max(kMinBlockRows, kBlockElements / cols);
  return rows - rows % kMinBlockRows;
}

std::vector<Weight> weights_of(const Tensors& tensors) {
  std::vector<Weight> weights;
  for (const Tensor& t : tensors)
    weights.push_back({t.const_data_ptr(), dtype(t, "weights"), t.size(0), t.size(1), t.stride(0), t.stride(1)});
  return weights;
}

Vector vector_of(const Tensor& t, const char* name) { return {t.mutable_data_ptr(), dtype(t, name), t.stride(0)}; }

// The row blocks of all weights, and the tasks of every stage in the order that serves the caches.
class Plan {
 public:
  Plan(const std::vector<Weight>& weights, int64_t stages) : progress_(weights.size()) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t rows = block_rows(weights[i].cols);
      progress_[i].num_blocks = ceil_div(weights[i].rows, rows);
      for (int64_t index = 0, first = 0; first < weights[i].rows; ++index, first += rows)
        blocks_.push_back({static_cast<int64_t>(i), index, first, std::min(rows, weights[i].rows - first)});
    }
    add_tasks(stages);
  }

  int64_t num_blocks(int64_t weight) const { return progress_[weight].num_blocks; }

  // Of one call.
  Schedule schedule() {
    const int64_t num_blocks = blocks_.size(), num_tasks = tasks_.size();
    return {run_parallel, blocks_.data(), tasks_.data(), num_blocks, num_tasks, progress_.data()};
  }

 private:
  // Weights in groups, each through all stages while it is in cache. The last stage of a group, which writes to memory,
  // goes by turns with the first stage of the next, which reads from it.
  void add_tasks(int64_t stages) {
    int64_t end = 0, last_begin = 0, last_end = 0;  // of this group and of the one before
    const int64_t num_blocks = blocks_.size();
    while (end < num_blocks) {
      const int64_t begin = std::exchange(end, stages > 1 ? group_end(end) : num_blocks);
      for (int64_t i = begin, j = last_begin; i < end || j < last_end;) {
        if (i < end) tasks_.push_back({i++, 0});
        if (j < last_end) tasks_.push_back({j++, stages - 1});
      }
      for (int64_t stage = 1; stage < stages - 1; ++stage)
        for (int64_t i = begin; i < end; ++i) tasks_.push_back({i, stage});
      if (stages > 1) last_begin = begin, last_end = end;
    }
    for (int64_t j = last_begin; j < last_end; ++j) tasks_.push_back({j, stages - 1});
  }

  // Where the group ends that begins with a weight's first block: after whole weights, with work for every thread.
  int64_t group_end(int64_t begin) const {
    const int64_t least = kBlocksPerThread * torch::stable::get_num_threads(), num_blocks = blocks_.size();
    int64_t end = begin;
    while (end < num_blocks && end - begin < least) end += num_blocks_of(end);
    return end;
  }

  int64_t num_blocks_of(int64_t block) const { return num_blocks(blocks_[block].weight); }

  std::vector<RowBlock> blocks_;
  std::vector<Task> tasks_;
  std::vector<Progress> progress_;
};

std::vector<void*> pointers_to(const Tensors& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(t.mutable_data_ptr());
  return pointers;
}

// sigma and uv. W / sigma goes to outputs, u and v to the caller's, where they are asked for.
std::tuple<Tensor, Tensor> iterate(
    const Tensors& matrices, const Tensors& u, const Tensors& v, int64_t iterations, double eps, bool stores_vectors,
    const Tensors& outputs) {
  const std::vector<Weight> weights = weights_of(matrices);
  const std::vector<void*> to = pointers_to(outputs);
  Plan plan(weights, std::max<int64_t>(iterations, 1) + !to.empty());
  const int64_t num_weights = weights.size();
  int64_t rows = 0, cols = 0, num_partials = 0;
  std::vector<PowerState> states;
  for (int64_t i = 0; i < num_weights; ++i) {
    PowerState& state = states.emplace_back();
    state.num_blocks = plan.num_blocks(i);
    state.partial_stride = ceil_div(weights[i].cols, kLineFloats) * kLineFloats;
    rows += weights[i].rows;
    cols += weights[i].cols;
    num_partials += state.num_blocks * state.partial_stride;
  }
  const Tensor sigma = empty(matrices[0], {num_weights}, ScalarType::Float);
  const Tensor uv = empty(matrices[0], {rows + cols}, ScalarType::Float);
  const Tensor partials = empty(matrices[0], {num_partials}, ScalarType::Float);
  float* next_u = uv.mutable_data_ptr<float>();
  float* next_v = next_u + rows;
  float* next_partials = partials.mutable_data_ptr<float>();
  for (int64_t i = 0; i < num_weights; ++i) {
    PowerState& state = states[i];
    state.u_buffer = vector_of(u[i], "u");
    state.v_buffer = vector_of(v[i], "v");
    state.u = std::exchange(next_u, next_u + weights[i].rows);
    state.v = std::exchange(next_v, next_v + weights[i].cols);
    state.partials = std::exchange(next_partials, next_partials + state.num_blocks * state.partial_stride);
    state.sigma = sigma.mutable_data_ptr<float>() + i;
  }
  PowerIteration call{};
  call.schedule = plan.schedule();
  call.iterations = iterations, call.eps = static_cast<float>(eps), call.stores_vectors = stores_vectors;
  call.weights = weights.data(), call.states = states.data(), call.num_weights = num_weights;
  call.outputs = to.empty() ? nullptr : to.data();
  power_iteration(call);
  return {sigma, uv};
}

std::tuple<Tensor, Tensor> update(Tensors matrices, Tensors u, Tensors v, int64_t iterations, double eps) {
  return iterate(matrices, u, v, iterations, eps, true, {});
}

std::tuple<Tensor, Tensor> step(
    Tensors matrices, Tensors u, Tensors v, int64_t iterations, double eps, Tensors outputs) {
  return iterate(matrices, u, v, iterations, eps, false, outputs);
}

void normalize(Tensors matrices, Tensor sigma, Tensors outputs) {
  const std::vector<Weight> weights = weights_of(matrices);
  const std::vector<void*> to = pointers_to(outputs);
  Plan plan(weights, 1);
  SpectralNormalize call{};
  call.schedule = plan.schedule();
  call.weights = weights.data(), call.outputs = to.data();
  call.sigma = sigma.const_data_ptr<float>();
  spectral_normalize(call);
}

void normalize_backward(Tensors grad_outputs, Tensors outputs, Tensor sigma, Tensor uv, Tensors grad_weights) {
  const std::vector<Weight> grads = weights_of(grad_outputs);
  const std::vector<void*> to = pointers_to(grad_weights);
  Plan plan(grads, 2);
  std::vector<const void*> from;
  for (const Tensor& output : outputs) from.push_back(output.const_data_ptr());
  std::vector<const float*> u, v;
  const float* next = uv.const_data_ptr<float>();
  for (const Weight& grad : grads) u.push_back(std::exchange(next, next + grad.rows));
  for (const Weight& grad : grads) v.push_back(std::exchange(next, next + grad.cols));
  std::vector<std::vector<double>> sums;
  for (size_t i = 0; i < grads.size(); ++i) sums.emplace_back(plan.num_blocks(i));
  std::vector<double*> products;
  for (std::vector<double>& sum : sums) products.push_back(sum.data());
  SpectralNormalizeBackward call{};
  call.schedule = plan.schedule();
  call.grad_outputs = grads.data(), call.outputs = from.data();
  call.sigma = sigma.const_data_ptr<float>();
  call.u = u.data(), call.v = v.data(), call.grad_weights = to.data();
  call.products = products.data();
  spectral_normalize_backward(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) {
  m.impl("power_iteration_native", TORCH_BOX(&update));
  m.impl("spectral_step_native", TORCH_BOX(&step));
  m.impl("spectral_normalize_native", TORCH_BOX(&normalize));
  m.impl("spectral_normalize_backward_native", TORCH_BOX(&normalize_backward));
}

}  // namespace nystromgan
