// The bindings of nystrom_attention, its backward and cluster_landmarks.
#include "nystrom_attention.h"

#include <tuple>

#include "binding.h"
#include "pinv_plan.h"

namespace nystromgan {

NYSTROMGAN_KERNEL(nystrom_forward, NystromForward)
NYSTROMGAN_KERNEL(nystrom_backward, NystromBackward)
NYSTROMGAN_KERNEL(cluster_landmarks, ClusterProblem)

namespace {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

Tokens tokens_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

float* floats(const Tensor& x) { return static_cast<float*>(const_cast<void*>(x.const_data_ptr())); }

// (1, 1, tokens) int32: each token's block of a grid.
Tensor grid_index(const Tensor& tokens, const Sizes& grid, const Sizes& counts) {
  check_grid(tokens, grid, counts);
  const Tensor index = empty(tokens, {1, 1, tokens.size(2)}, ScalarType::Int);
  index_grid(grid, counts, static_cast<int32_t*>(index.mutable_data_ptr()));
  return index;
}

// Contiguous tensors behind optional arguments, which must outlive the kernel's run.
struct Plan {
  Plan(const OptionalTensor& query_index, const OptionalTensor& key_index, const OptionalTensor& key_padding_mask,
       const OptionalTensor& query_landmark_mask, const OptionalTensor& key_landmark_mask,
       const OptionalTensor& exact_rows)
      : query_index(contiguous(query_index)),
        key_index(contiguous(key_index)),
        key_padding_mask(contiguous(key_padding_mask)),
        query_landmark_mask(contiguous(query_landmark_mask)),
        key_landmark_mask(contiguous(key_landmark_mask)),
        exact_rows(contiguous(exact_rows)) {}

  static OptionalTensor contiguous(const OptionalTensor& x) {
    return x ? OptionalTensor(torch::stable::contiguous(*x)) : x;
  }
  static const bool* mask(const OptionalTensor& x) {
    return x ? static_cast<const bool*>(x->const_data_ptr()) : nullptr;
  }
  static LandmarkIndex index(const OptionalTensor& x) {
    if (!x) return {};
    return {
        static_cast<const int32_t*>(x->const_data_ptr()), x->size(0) == 1 ? 0 : x->stride(0),
        x->size(1) == 1 ? 0 : x->stride(1)};
  }

  OptionalTensor query_index, key_index, key_padding_mask, query_landmark_mask, key_landmark_mask, exact_rows;
};

// What follows F W, the weight of the convolution as float32; it must outlive the kernel's run.
struct Epilogue {
  Epilogue(const OptionalTensor& conv_weight, const OptionalTensor& gamma)
      : gamma(gamma ? read_scalar(*gamma) : 1.0f), taps(conv_weight ? conv_weight->size(1) : 0) {
    if (!conv_weight) return;
    weight = empty(*conv_weight, {conv_weight->size(0), taps}, ScalarType::Float);
    torch::stable::copy_(*weight, *conv_weight);
  }

  float gamma;
  int64_t taps;
  OptionalTensor weight;  // (H, taps)
};

// What the forward saves, in the order of its results.
struct Saved {
  Tensor query_means, key_means, context, mixed, logsumexp, iterates;
};

NystromProblem problem(
    const Tensor& query, const Tensor& key, const Tensor& value, const Saved& saved, const Plan& plan,
    const Epilogue& epilogue, int64_t num_landmarks, double scale, int64_t pinv_iterations, bool global_init) {
  NystromProblem p{};
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.keys = key.size(2);
  p.landmarks = num_landmarks, p.head_dim = query.size(3), p.value_dim = value.size(3);
  p.scale = static_cast<float>(scale), p.pinv_iterations = pinv_iterations, p.global_init = global_init;
  p.dtype = dtype(query, "query"), p.run = run_parallel, p.threads = torch::stable::get_num_threads();
  p.query = tokens_of(query), p.key = tokens_of(key), p.value = tokens_of(value);
  p.query_index = Plan::index(plan.query_index), p.key_index = Plan::index(plan.key_index);
  p.key_padding_mask = Plan::mask(plan.key_padding_mask);
  p.query_landmark_mask = Plan::mask(plan.query_landmark_mask);
  p.key_landmark_mask = Plan::mask(plan.key_landmark_mask);
  p.exact_rows = Plan::mask(plan.exact_rows);
  p.conv_weight = epilogue.weight ? floats(*epilogue.weight) : nullptr;
  p.taps = epilogue.taps, p.gamma = epilogue.gamma;
  p.query_means = floats(saved.query_means), p.key_means = floats(saved.key_means);
  p.context = floats(saved.context), p.mixed = floats(saved.mixed), p.logsumexp = floats(saved.logsumexp);
  p.iterates = saved.iterates.numel() > 0 ? floats(saved.iterates) : nullptr;
  return p;
}

// (B, H, tokens, dim), laid out as (B, H, dim, tokens) where not token_major.
Tensor empty_tokens(const Tensor& like, int64_t tokens, int64_t dim, bool token_major) {
  const int64_t batch = like.size(0), heads = like.size(1);
  if (token_major) return empty_recycled(like, {batch, heads, tokens, dim});
  return torch::stable::transpose(empty_recycled(like, {batch, heads, dim, tokens}), 2, 3);
}

// A float32 copy of the landmarks given, or room for the means.
Tensor means_of(const Tensor& tokens, const OptionalTensor& landmarks, int64_t num_landmarks) {
  Tensor means =
      empty(tokens, {tokens.size(0), tokens.size(1), num_landmarks, tokens.size(3)}, ScalarType::Float);
  if (landmarks) torch::stable::copy_(means, *landmarks);
  return means;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& query_landmarks,
    const OptionalTensor& key_landmarks, const OptionalTensor& query_index, const OptionalTensor& key_index,
    const OptionalTensor& key_padding_mask, const OptionalTensor& query_landmark_mask,
    const OptionalTensor& key_landmark_mask, const OptionalTensor& exact_rows, const OptionalTensor& conv_weight,
    const OptionalTensor& gamma, const OptionalTensor& residual, const Sizes& query_grid, const Sizes& key_grid,
    const Sizes& landmark_grid, int64_t num_landmarks, double scale, int64_t pinv_iterations, bool global_init,
    bool token_major, bool keep_iterates) {
  const int64_t batch = query.size(0), heads = query.size(1), value_dim = value.size(3);
  const std::vector<int64_t> small{batch, heads, num_landmarks, value_dim};
  const std::vector<int64_t> kept{batch, heads, iterates_size(num_landmarks, value_dim, pinv_iterations)};
  const Plan plan(
      query_landmarks || query_index ? query_index : grid_index(query, query_grid, landmark_grid),
      key_landmarks || key_index ? key_index : grid_index(key, key_grid, landmark_grid), key_padding_mask,
      query_landmark_mask, key_landmark_mask, exact_rows);
  const Tensor logsumexp = empty(query, {batch, heads, num_landmarks}, ScalarType::Float);
  const Saved saved{
      means_of(query, query_landmarks, num_landmarks), means_of(key, key_landmarks, num_landmarks),
      empty(query, small, ScalarType::Float), empty(query, small, ScalarType::Float),
      logsumexp, empty_recycled(logsumexp, keep_iterates ? kept : std::vector<int64_t>{0})};
  const Epilogue epilogue(conv_weight, gamma);
  const Tensor output = empty_tokens(query, query.size(2), value_dim, token_major);
  if (batch * heads > 0)
    nystrom_forward(
        {problem(query, key, value, saved, plan, epilogue, num_landmarks, scale, pinv_iterations, global_init),
         !query_landmarks, !key_landmarks, residual ? tokens_of(*residual) : Tokens{}, tokens_of(output)});
  return {
      output, saved.query_means, saved.key_means, saved.context, saved.mixed, saved.logsumexp, saved.iterates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_means,
    const Tensor& key_means, const Tensor& context, const Tensor& mixed, const Tensor& logsumexp,
    const Tensor& iterates, const OptionalTensor& query_landmarks, const OptionalTensor& key_landmarks, const OptionalTensor& query_index,
    const OptionalTensor& key_index, const OptionalTensor& key_padding_mask, const OptionalTensor& query_landmark_mask,
    const OptionalTensor& key_landmark_mask, const OptionalTensor& exact_rows, const OptionalTensor& conv_weight,
    const OptionalTensor& gamma, const Sizes& query_grid, const Sizes& key_grid, const Sizes& landmark_grid,
    int64_t num_landmarks, double scale, int64_t pinv_iterations, bool global_init, bool token_major,
    bool /*keep_iterates*/) {
  const Plan plan(
      query_landmarks || query_index ? query_index : grid_index(query, query_grid, landmark_grid),
      key_landmarks || key_index ? key_index : grid_index(key, key_grid, landmark_grid), key_padding_mask,
      query_landmark_mask, key_landmark_mask, exact_rows);
  const Saved saved{query_means, key_means, context, mixed, logsumexp, iterates};
  auto like = [](const Tensor& x, bool rows) { return empty_tokens(x, x.size(2), x.size(3), rows); };
  auto none = [&] { return empty(query, {0}, ScalarType::Float); };  // one each: outputs of an op must not alias
  const Epilogue epilogue(conv_weight, gamma);
  const Tensor grad_query = like(query, token_major), grad_key = like(key, token_major);
  const Tensor grad_value = like(value, token_major);
  const Tensor grad_query_means = like(query_means, true), grad_key_means = like(key_means, true);
  Tensor grad_weight = conv_weight ? empty(query, {query.size(1), epilogue.taps}, ScalarType::Float) : none();
  Tensor grad_gamma = gamma ? empty(query, {}, ScalarType::Float) : none();
  if (query.size(0) * query.size(1) > 0) {
    nystrom_backward(
        {problem(query, key, value, saved, plan, epilogue, num_landmarks, scale, pinv_iterations, global_init),
         tokens_of(grad_output), tokens_of(grad_query), tokens_of(grad_key), tokens_of(grad_value),
         floats(grad_query_means), floats(grad_key_means), conv_weight ? floats(grad_weight) : nullptr,
         gamma ? floats(grad_gamma) : nullptr});
  } else {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_gamma);
  }
  const bool query_given = query_landmarks && !query_index, key_given = key_landmarks && !key_index;
  return {
      grad_query, grad_key, grad_value, query_given ? grad_query_means : none(), key_given ? grad_key_means : none(),
      grad_weight, grad_gamma};
}

std::tuple<Tensor, Tensor> cluster(
    const Tensor& tokens, const Tensor& index, const OptionalTensor& landmark_mask, const OptionalTensor& frozen_rows,
    int64_t num_landmarks, int64_t iterations) {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), count = tokens.size(2), dim = tokens.size(3);
  const OptionalTensor start = Plan::contiguous(index), absent = Plan::contiguous(landmark_mask);
  const OptionalTensor frozen = Plan::contiguous(frozen_rows);
  const Tensor means = empty(tokens, {batch, heads, num_landmarks, dim}, ScalarType::Float);
  const Tensor result = empty(tokens, {batch, heads, count}, ScalarType::Int);
  if (batch * heads > 0)
    cluster_landmarks(
        {batch, heads, count, num_landmarks, dim, iterations, dtype(tokens, "tokens"), run_parallel, tokens_of(tokens),
         Plan::index(start), Plan::mask(absent), Plan::mask(frozen), floats(means),
         static_cast<int32_t*>(const_cast<void*>(result.const_data_ptr()))});
  return {means, result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) {
  m.impl("nystrom_attention_native", TORCH_BOX(&forward));
  m.impl("nystrom_attention_backward_native", TORCH_BOX(&backward));
  m.impl("cluster_landmarks_native", TORCH_BOX(&cluster));
}

}  // namespace nystromgan
