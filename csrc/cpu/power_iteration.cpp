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

std::vector<RowBlock> blocks_of(const std::vector<Weight>& weights) {
  std::vector<RowBlock> blocks;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = block_rows(weights[i].cols);
    for (int64_t index = 0, first = 0; first < weights[i].rows; ++index, first += rows)
      blocks.push_back({static_cast<int64_t>(i), index, first, std::min(rows, weights[i].rows - first)});
  }
  return blocks;
}

std::tuple<Tensor, Tensor> iterate(Tensors matrices, Tensors u, Tensors v, int64_t iterations, double eps) {
  const std::vector<Weight> weights = weights_of(matrices);
  const std::vector<RowBlock> blocks = blocks_of(weights);
  const int64_t num_weights = weights.size();
  int64_t rows = 0, cols = 0, num_partials = 0;
  std::vector<PowerState> states;
  for (const Weight& weight : weights) {
    PowerState& state = states.emplace_back();
    state.num_blocks = ceil_div(weight.rows, block_rows(weight.cols));
    state.partial_stride = ceil_div(weight.cols, kLineFloats) * kLineFloats;
    rows += weight.rows;
    cols += weight.cols;
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
  call.run = run_parallel;
  call.iterations = iterations, call.eps = static_cast<float>(eps);
  call.weights = weights.data(), call.states = states.data(), call.num_weights = num_weights;
  call.blocks = blocks.data(), call.num_blocks = blocks.size();
  power_iteration(call);
  return {sigma, uv};
}

std::vector<void*> pointers_to(const Tensors& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(t.mutable_data_ptr());
  return pointers;
}

void normalize(Tensors matrices, Tensor sigma, Tensors outputs) {
  const std::vector<Weight> weights = weights_of(matrices);
  const std::vector<RowBlock> blocks = blocks_of(weights);
  const std::vector<void*> pointers = pointers_to(outputs);
  SpectralNormalize call{};
  call.run = run_parallel;
  call.weights = weights.data(), call.outputs = pointers.data();
  call.sigma = sigma.const_data_ptr<float>();
  call.blocks = blocks.data(), call.num_blocks = blocks.size();
  spectral_normalize(call);
}

void normalize_backward(Tensors grad_outputs, Tensors outputs, Tensor sigma, Tensor uv, Tensors grad_weights) {
  const std::vector<Weight> grads = weights_of(grad_outputs);
  const std::vector<RowBlock> blocks = blocks_of(grads);
  const std::vector<void*> to = pointers_to(grad_weights);
  std::vector<const void*> from;
  for (const Tensor& output : outputs) from.push_back(output.const_data_ptr());
  std::vector<const float*> u, v;
  const float* next = uv.const_data_ptr<float>();
  for (const Weight& grad : grads) u.push_back(std::exchange(next, next + grad.rows));
  for (const Weight& grad : grads) v.push_back(std::exchange(next, next + grad.cols));
  std::vector<double> products(blocks.size());
  std::vector<float> alongs(grads.size());
  SpectralNormalizeBackward call{};
  call.run = run_parallel;
  call.grad_outputs = grads.data(), call.outputs = from.data();
  call.sigma = sigma.const_data_ptr<float>();
  call.u = u.data(), call.v = v.data(), call.grad_weights = to.data();
  call.products = products.data(), call.alongs = alongs.data();
  call.blocks = blocks.data(), call.num_weights = grads.size(), call.num_blocks = blocks.size();
  spectral_normalize_backward(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) {
  m.impl("power_iteration_native", TORCH_BOX(&iterate));
  m.impl("spectral_normalize_native", TORCH_BOX(&normalize));
  m.impl("spectral_normalize_backward_native", TORCH_BOX(&normalize_backward));
}

}  // namespace nystromgan
