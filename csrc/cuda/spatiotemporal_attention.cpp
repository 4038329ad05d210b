// The binding of spatiotemporal_attention: exact attention over maps (B, H, channels, tokens) of any strides.
#include <tuple>

#include "attend_launch.h"

namespace nystromgan {
namespace {

using OptionalTensor = std::optional<Tensor>;

// (B, H, channels, tokens), laid out as (B, H, tokens, channels) where token_major.
Tensor empty_maps(const Tensor& like, int64_t channels, int64_t tokens, bool token_major) {
  const int64_t batch = like.size(0), heads = like.size(1);
  if (!token_major) return empty(like, {batch, heads, channels, tokens}, like.scalar_type());
  return torch::stable::transpose(empty(like, {batch, heads, tokens, channels}, like.scalar_type()), 2, 3);
}

// Whether most operands have the tokens of a channel side by side: the others are read element by element.
bool channel_major(const Tensor& query, const Tensor& key, const Tensor& value) {
  return (query.stride(3) == 1) + (key.stride(3) == 1) + (value.stride(3) == 1) > 1;
}

Scalar scalar_of(const OptionalTensor& x) {
  if (!x) return Scalar::none;
  switch (x->scalar_type()) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    case ScalarType::Double: return Scalar::float64;
    default:
      STD_TORCH_CHECK(
          false, "gamma must be a floating-point tensor, got ", torch::headeronly::toString(x->scalar_type()));
  }
}

OptionalTensor contiguous(const OptionalTensor& mask) {
  return mask ? OptionalTensor(torch::stable::contiguous(*mask)) : mask;
}

const uint8_t* bytes_of(const OptionalTensor& mask) {
  return mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
}

const void* data_of(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_padding_mask,
    const OptionalTensor& gamma, const OptionalTensor& residual, double scale, bool token_major, bool save) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(3), dim = value.size(2);
  const OptionalTensor mask = contiguous(key_padding_mask);
  const Tensor output = empty_maps(query, dim, queries, token_major);
  const bool save_attended = save && gamma;
  Tensor attended = save_attended ? empty_maps(query, dim, queries, token_major) : empty(query, {0}, query.scalar_type());
  const Tensor logsumexp =
      save ? empty(query, {batch, heads, queries}, ScalarType::Float) : empty(query, {0}, ScalarType::Float);
  AttendForward problem{};
  problem.query = operand_of(query, 3), problem.key = operand_of(key, 3), problem.value = operand_of(value, 3);
  problem.output = operand_of(output, 3), problem.mask = bytes_of(mask);
  if (save_attended) problem.attended = operand_of(attended, 3);
  if (residual) problem.residual = operand_of(*residual, 3);
  if (save) problem.logsumexp = logsumexp.mutable_data_ptr<float>();
  problem.gamma = data_of(gamma), problem.gamma_type = scalar_of(gamma);
  if (batch * heads > 0)
    launch_attend(query, dtype(query, "query"), channel_major(query, key, value),
                  {batch, heads, queries, key.size(3), query.size(2), dim, scale}, problem);
  return {output, attended, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& key_padding_mask, const OptionalTensor& gamma, const Tensor& attended, const Tensor& logsumexp,
    double scale, bool token_major) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(3), keys = key.size(3);
  const int64_t dim = query.size(2), value_dim = value.size(2);
  const OptionalTensor mask = contiguous(key_padding_mask);
  const Tensor grad_query = empty_maps(query, dim, queries, token_major);
  const Tensor grad_key = empty_maps(query, dim, keys, token_major);
  const Tensor grad_value = empty_maps(query, value_dim, keys, token_major);
  Tensor grad_gamma = empty(query, {}, ScalarType::Float);
  const Tensor delta = empty(query, {batch, heads, queries}, ScalarType::Float);
  const bool maps = channel_major(query, key, value), any = batch * heads > 0;
  const Dtype type = dtype(query, "query");
  if (!gamma || !any) torch::stable::zero_(grad_gamma);
  if (!any) return {grad_query, grad_key, grad_value, grad_gamma};

  float* deltas = delta.mutable_data_ptr<float>();
  const Operand grads = operand_of(grad_output, 3), queried = operand_of(query, 3);
  const Operand keyed = operand_of(key, 3), valued = operand_of(value, 3);
  launch_row_dots(query, type, {grads, operand_of(attended, 3), deltas, batch * heads * queries, static_cast<int>(heads),
                                static_cast<int>(queries), static_cast<int>(value_dim), maps});
  if (gamma) launch_total(query, {deltas, batch * heads * queries, grad_gamma.mutable_data_ptr<float>()});
  AttendGradient problem{};
  problem.mask = bytes_of(mask), problem.logsumexp = const_cast<float*>(logsumexp.const_data_ptr<float>());
  problem.delta = deltas, problem.gamma = data_of(gamma), problem.gamma_type = scalar_of(gamma);
  problem.first = queried, problem.second = grads, problem.other_first = keyed, problem.other_second = valued;
  problem.grad_first = operand_of(grad_query, 3);
  launch_attend_gradient(query, type, maps, GradientOf::query, {batch, heads, queries, keys, dim, value_dim, scale}, problem);
  std::swap(problem.first, problem.other_first);
  std::swap(problem.second, problem.other_second);
  problem.grad_first = operand_of(grad_key, 3), problem.grad_second = operand_of(grad_value, 3);
  launch_attend_gradient(query, type, maps, GradientOf::key_value, {batch, heads, keys, queries, dim, value_dim, scale},
                         problem);
  return {grad_query, grad_key, grad_value, grad_gamma};
}

}  // namespace

NYSTROMGAN_BINDINGS(m) {
  m.impl("spatiotemporal_attention_native", TORCH_BOX(&forward));
  m.impl("spatiotemporal_attention_backward_native", TORCH_BOX(&backward));
}

}  // namespace nystromgan
