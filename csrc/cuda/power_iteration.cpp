// The binding of power_iteration and spectral_normalize: weights to plain pointers, and matrices to units of work.
#include "power_iteration.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include "launch.h"

DECLARE_KERNEL(power_iteration, power_iteration_steps)
DECLARE_KERNEL(power_iteration, spectral_normalize_all)
DECLARE_KERNEL(power_iteration, spectral_normalize_dots)
DECLARE_KERNEL(power_iteration, spectral_normalize_gradient)

namespace nystromgan {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kLeastItemRows = 16, kMostItems = 128;  // of a weight: each item's share is written and read once
constexpr size_t kSharedBytes = (kMostItemRows + kPowerThreads / 32) * sizeof(float);

int64_t item_rows(int64_t rows) { return std::max(kLeastItemRows, ceil_of(rows, kMostItems)); }

bool reads_wide(const Tensor& x) {
  const int64_t width = 16 / static_cast<int64_t>(x.element_size());
  return x.stride(1) == 1 && x.stride(0) % width == 0 && x.size(1) % width == 0 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// One launch: weights [first, first + count), their u and v at the places of a call of all.
void launch_group(const Tensors& weights, const Tensors& u, const Tensors& v, const std::vector<int64_t>& u_offsets,
                  const std::vector<int64_t>& v_offsets, int64_t first, int64_t iterations, double eps, Tensor uv,
                  Tensor sigma) {
  const int64_t count = std::min<int64_t>(kMostWeights, weights.size() - first);
  const auto problem = std::make_unique<PowerIteration>();
  int64_t shares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[first + i], &left = u[first + i], &right = v[first + i];
    const int64_t rows = weight.size(0), columns = weight.size(1), each = item_rows(rows);
    STD_TORCH_CHECK(each <= kMostItemRows, "weights must have at most ", kMostItems * kMostItemRows, " rows, got ", rows);
    PowerWeight& w = problem->weights[i];
    w.data = weight.const_data_ptr(), w.u = left.mutable_data_ptr(), w.v = right.mutable_data_ptr();
    w.rows = rows, w.columns = columns, w.row_stride = weight.stride(0), w.column_stride = weight.stride(1);
    w.u_stride = left.stride(0), w.v_stride = right.stride(0);
    w.u_offset = u_offsets[first + i], w.v_offset = v_offsets[first + i], w.share_offset = shares;
    w.first_item = problem->items, w.item_rows = static_cast<int>(each), w.first_block = problem->blocks;
    w.place = static_cast<int>(first + i), w.wide = reads_wide(weight);
    w.dtype = dtype(weight, "weights"), w.u_dtype = dtype(left, "u"), w.v_dtype = dtype(right, "v");
    problem->items += static_cast<int>(ceil_of(rows, each));
    problem->blocks += static_cast<int>(ceil_of(columns, kColumnBlock));
    shares += ceil_of(rows, each) * columns;
  }
  const Tensor work = empty(uv, {shares + problem->items + problem->blocks}, ScalarType::Float);
  problem->uv = uv.mutable_data_ptr<float>(), problem->sigma = sigma.mutable_data_ptr<float>();
  problem->shares = work.mutable_data_ptr<float>(), problem->squares = problem->shares + shares;
  problem->lengths = problem->squares + problem->items;
  problem->eps = static_cast<float>(eps), problem->iterations = static_cast<int>(iterations);
  problem->count = static_cast<int>(count);
  const int64_t resident = resident_blocks(kernel_power_iteration_steps, kPowerThreads, kSharedBytes, uv);
  const int64_t blocks = std::min<int64_t>(resident, problem->items);
  launch(kernel_power_iteration_steps, {blocks, kPowerThreads, kSharedBytes, true}, problem.get(), uv);
}

std::tuple<Tensor, Tensor> iterate(Tensors weights, Tensors u, Tensors v, int64_t iterations, double eps) {
  std::vector<int64_t> u_offsets, v_offsets;
  int64_t length = 0;
  for (const Tensor& x : u) u_offsets.push_back(length), length += x.size(0);
  for (const Tensor& x : v) v_offsets.push_back(length), length += x.size(0);
  const Tensor sigma = empty(weights[0], {static_cast<int64_t>(weights.size())}, ScalarType::Float);
  const Tensor uv = empty(weights[0], {length}, ScalarType::Float);
  for (size_t first = 0; first < weights.size(); first += kMostWeights)
    launch_group(weights, u, v, u_offsets, v_offsets, first, iterations, eps, uv, sigma);
  return {sigma, uv};
}

void normalize(Tensors weights, Tensor sigma, Tensors outputs) {
  for (size_t first = 0; first < weights.size(); first += kMostWeights) {
    const auto problem = std::make_unique<SpectralNormalize>();
    problem->sigma = sigma.const_data_ptr<float>();
    problem->count = static_cast<int>(std::min<size_t>(kMostWeights, weights.size() - first));
    int64_t blocks = 0;
    for (int i = 0; i < problem->count; ++i) {
      const Tensor& weight = weights[first + i];
      const int64_t rows = weight.size(0), columns = weight.size(1);
      problem->weights[i] = {weight.const_data_ptr(), outputs[first + i].mutable_data_ptr(), rows, columns,
                             weight.stride(0), weight.stride(1), static_cast<int>(blocks), static_cast<int>(first + i),
                             dtype(weight, "weights"), weight.stride(1) == 1 && weight.stride(0) == columns};
      blocks += ceil_of(rows * columns, kNormalizeBlock);
    }
    launch(kernel_spectral_normalize_all, {blocks, kPowerThreads, 0}, problem.get(), sigma);
  }
}

// Two launches for up to kMostWeights; all matrices are contiguous.
void normalize_backward(Tensors grad_outputs, Tensors outputs, Tensor sigma, Tensor uv, Tensors grad_weights) {
  int64_t u_offset = 0, v_offset = 0;
  for (const Tensor& output : outputs) v_offset += output.size(0);
  for (size_t first = 0; first < outputs.size(); first += kMostWeights) {
    const auto problem = std::make_unique<NormalizeGradient>();
    problem->sigma = sigma.const_data_ptr<float>(), problem->uv = uv.const_data_ptr<float>();
    problem->count = static_cast<int>(std::min<size_t>(kMostWeights, outputs.size() - first));
    int64_t blocks = 0;
    for (int i = 0; i < problem->count; ++i) {
      const Tensor &grad = grad_outputs[first + i], &output = outputs[first + i];
      STD_TORCH_CHECK(grad.is_contiguous() && output.is_contiguous(), "gradients must be contiguous");
      const int64_t rows = output.size(0), columns = output.size(1);
      problem->weights[i] = {grad.const_data_ptr(), output.const_data_ptr(), grad_weights[first + i].mutable_data_ptr(),
                             rows, columns, u_offset, v_offset, static_cast<int>(blocks), static_cast<int>(first + i),
                             dtype(output, "outputs")};
      blocks += ceil_of(rows * columns, kNormalizeBlock);
      u_offset += rows, v_offset += columns;
    }
    const Tensor dots = empty(uv, {blocks}, ScalarType::Float);
    problem->dots = dots.mutable_data_ptr<float>();
    launch(kernel_spectral_normalize_dots, {blocks, kPowerThreads, kPowerThreads / 32 * sizeof(float)}, problem.get(), sigma);
    launch(kernel_spectral_normalize_gradient, {blocks, kPowerThreads, 0}, problem.get(), sigma);
  }
}

}  // namespace

NYSTROMGAN_BINDINGS(m) {
  m.impl("power_iteration_native", TORCH_BOX(&iterate));
  m.impl("spectral_normalize_native", TORCH_BOX(&normalize));
  m.impl("spectral_normalize_backward_native", TORCH_BOX(&normalize_backward));
}

}  // namespace nystromgan
