// The bindings of nystrom_attention, its backward and cluster_landmarks: what is launched, in which order, on what memory.
//
// Letters: B batch, H heads, N queries, S keys, M landmarks, D and E head dims, F, A, G, Z, W as in docs/notation.md. Both
// passes over tokens are attention (attend.h): of landmark queries over the keys, O = G V, and of queries over landmark
// keys with W for values, O = F W.
#include <algorithm>
#include <tuple>

#include "landmark_launch.h"
#include "pinv_launch.h"
#include "single_launch.h"

namespace nystromgan {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

struct Plan {
  OptionalTensor query_landmarks, key_landmarks, query_index, key_index, key_padding_mask, query_absent, key_absent, exact;
  Sizes query_grid, key_grid, landmark_grid;  // of the sides that have neither landmarks nor an index
};

// Whether two indices are one tensor.
bool same(const Tensor& index, const Tensor& other) {
  bool sizes = true;
  for (int64_t i = 0; i < 3; ++i) sizes &= index.size(i) == other.size(i) && index.stride(i) == other.stride(i);
  return sizes && index.const_data_ptr() == other.const_data_ptr();
}

// The tokens that one side's landmarks are the means of; none where the caller gave the landmarks.
std::optional<Index> index_of_side(const Tensor& tokens, const OptionalTensor& landmarks, const OptionalTensor& index,
                                   const Sizes& grid, const Sizes& counts) {
  if (index) return index_of(*index);
  if (landmarks) return std::nullopt;
  return Index{nullptr, 0, 0, grid_of(tokens, grid, counts)};
}

// Sizes, options and masks of a call, and its passes.
struct Call {
  Plan plan;
  Dtype type;
  int64_t batch, heads, queries, keys, landmarks, dim, value_dim;
  double scale;
  int64_t iterations;
  bool global_init;

  Call(const Tensor& query, const Tensor& value, const Plan& given, int64_t landmarks, double scale, int64_t iterations,
       bool global_init)
      : plan{given.query_landmarks, given.key_landmarks, given.query_index, given.key_index,
             contiguous(given.key_padding_mask), contiguous(given.query_absent), contiguous(given.key_absent),
             contiguous(given.exact), given.query_grid, given.key_grid, given.landmark_grid},
        type(dtype(query, "query")), batch(query.size(0)), heads(query.size(1)), queries(query.size(2)),
        keys(value.size(2)), landmarks(landmarks), dim(query.size(3)), value_dim(value.size(3)), scale(scale),
        iterations(iterations), global_init(global_init) {}

  int64_t rows() const { return batch * heads; }
  Tensor room(const Tensor& on, int64_t count) const { return empty(on, {count}, ScalarType::Float); }

  // (B, H, M, channels) float32 in the tokens' dtype, which the passes take; itself where it is.
  Tensor narrow(const Tensor& on, const Tensor& x, int64_t channels) const {
    if (type == Dtype::float32) return x;
    const Tensor out = empty(on, {batch, heads, landmarks, channels}, on.scalar_type());
    launch_convert(on, type, {floats(x), nullptr, nullptr, out.mutable_data_ptr(), x.numel(), 1});
    return out;
  }

  // A and its softmax, float32.
  Tensor core(const Tensor& on, const Tensor& query_means, const Tensor& key_means) const {
    const Tensor core = empty(on, {batch, heads, landmarks, landmarks}, ScalarType::Float);
    Matmul product = matmul(floats(core), floats(query_means), dim, floats(key_means), dim, landmarks, landmarks, dim);
    launch_matmul(on, Transposed::right, product);
    launch_core_softmax(on, {floats(core), bytes_of(plan.query_absent), bytes_of(plan.key_absent), rows() * landmarks,
                             static_cast<int>(heads), static_cast<int>(landmarks), log2_scale()});
    return core;
  }

  float log2_scale() const { return static_cast<float>(scale * 1.4426950408889634); }

  // A product of contiguous matrices of every head.
  Matmul matmul(float* out, const float* a, int64_t width_a, const float* b, int64_t width_b, int64_t rows_out,
                int64_t columns, int64_t depth) const {
    Matmul m{};
    m.out = out, m.a = a, m.b = b, m.alpha = 1.0f, m.count = rows(), m.heads = static_cast<int>(heads);
    m.rows = static_cast<int>(rows_out), m.columns = static_cast<int>(columns), m.depth = static_cast<int>(depth);
    m.row_stride_a = static_cast<int>(width_a), m.row_stride_b = static_cast<int>(width_b);
    m.stride_out = rows_out * columns, m.stride_a = landmarks * width_a, m.stride_b = landmarks * width_b;
    return m;
  }

  AttendShape over_keys() const {
    const int64_t split = split_tokens(keys);
    return {batch, heads, landmarks, keys, dim, value_dim, scale, ceil_of(keys, split), split};
  }
  AttendShape over_queries() const {
    const int64_t split = split_tokens(queries);
    return {batch, heads, landmarks, queries, dim, value_dim, scale, ceil_of(queries, split), split};
  }
  // Blocks that keep the landmarks while they work through several times their rows.
  AttendShape of_queries() const {
    AttendShape shape{batch, heads, queries, landmarks, dim, value_dim, scale};
    shape.row_steps = queries >= 32768 ? 8 : queries >= 4096 ? 2 : 1;
    return shape;
  }
};

Tensor inverse_of(const Call& call, const Tensor& core) {
  const Tensor inverse = torch::stable::empty_like(core);
  launch_pinv(core, floats(core), floats(inverse), call.rows(), call.landmarks, call.iterations, call.global_init);
  return inverse;
}

// The landmarks as they are given, or the tokens' means, which are only made room for without `pool`.
Tensor means_of(const Tensor& tokens, const OptionalTensor& given, const std::optional<Index>& index, int64_t landmarks,
                bool pool) {
  if (!given && pool) return index_means(tokens, *index, landmarks, std::nullopt);
  Tensor means = empty(tokens, {tokens.size(0), tokens.size(1), landmarks, tokens.size(3)}, ScalarType::Float);
  if (given) torch::stable::copy_(means, *given);
  return means;
}

// The caller adds what follows F W (FUSED_EPILOGUE in library.py).
void check_no_epilogue(bool none) {
  STD_TORCH_CHECK(none, "on cuda the op takes no conv_weight, gamma or residual and writes rows of channels");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& query_landmarks,
    const OptionalTensor& key_landmarks, const OptionalTensor& query_index, const OptionalTensor& key_index,
    const OptionalTensor& key_padding_mask, const OptionalTensor& query_landmark_mask,
    const OptionalTensor& key_landmark_mask, const OptionalTensor& exact_rows, const OptionalTensor& conv_weight,
    const OptionalTensor& gamma, const OptionalTensor& residual, const Sizes& query_grid, const Sizes& key_grid,
    const Sizes& landmark_grid, int64_t num_landmarks, double scale, int64_t pinv_iterations, bool global_init,
    bool token_major, bool /*keep_iterates*/) {
  check_no_epilogue(!conv_weight && !gamma && !residual && token_major);
  const Call call(query, value,
                  {query_landmarks, key_landmarks, query_index, key_index, key_padding_mask, query_landmark_mask,
                   key_landmark_mask, exact_rows, query_grid, key_grid, landmark_grid},
                  num_landmarks, scale, pinv_iterations, global_init);
  const std::optional<Index> of_queries = index_of_side(query, query_landmarks, query_index, query_grid, landmark_grid);
  const std::optional<Index> of_keys = index_of_side(key, key_landmarks, key_index, key_grid, landmark_grid);
  const int64_t batch = call.batch, heads = call.heads, dim = call.value_dim;
  const Tensor output = empty(query, {batch, heads, call.queries, dim}, query.scalar_type());
  const Tensor context = empty(query, {batch, heads, num_landmarks, dim}, ScalarType::Float);
  const Tensor mixed = torch::stable::empty_like(context);
  const Tensor logsumexp = empty(query, {batch, heads, num_landmarks}, ScalarType::Float);
  const Tensor iterates = empty(query, {0}, ScalarType::Float);  // the backward makes them again
  const bool single = takes_single_launch(call.type, call.queries, call.keys, num_landmarks,
                                          std::max(call.dim, call.value_dim), global_init);
  const Tensor query_means = means_of(query, query_landmarks, of_queries, num_landmarks, !single);
  const Tensor key_means = means_of(key, key_landmarks, of_keys, num_landmarks, !single);
  if (call.rows() > 0 && single)
    launch_single({query, key, value, output, query_means, key_means, context, mixed, logsumexp,
                   query_landmarks ? std::nullopt : of_queries, key_landmarks ? std::nullopt : of_keys,
                   call.plan.key_padding_mask, call.plan.query_absent, call.plan.key_absent, call.plan.exact, of_keys,
                   scale, pinv_iterations});
  if (call.rows() == 0 || single) return {output, query_means, key_means, context, mixed, logsumexp, iterates};

  const Tensor inverse = inverse_of(call, call.core(query, query_means, key_means));
  const AttendShape shape = call.over_keys();
  const int64_t parts = call.rows() * shape.splits * num_landmarks;
  const Tensor sums = call.room(query, parts * dim), statistics = call.room(query, 2 * parts);
  const Tensor narrow_query = call.narrow(query, query_means, call.dim);
  AttendForward pass{};
  pass.query = operand_of(narrow_query), pass.key = operand_of(key), pass.value = operand_of(value);
  pass.mask = bytes_of(call.plan.key_padding_mask);
  pass.sums = floats(sums), pass.largest = floats(statistics), pass.totals = floats(statistics) + parts;
  launch_attend(query, call.type, false, shape, pass);
  launch_merge(query, {pass.sums, pass.largest, pass.totals, bytes_of(call.plan.query_absent), floats(context),
                       floats(logsumexp), call.rows() * num_landmarks, static_cast<int>(heads),
                       static_cast<int>(num_landmarks), static_cast<int>(dim), static_cast<int>(shape.splits)});
  launch_matmul(query, Transposed::none, call.matmul(floats(mixed), floats(inverse), num_landmarks, floats(context), dim,
                                                     num_landmarks, dim, num_landmarks));
  if (exact_rows) {  // every valid key is its own landmark there: O = F pool(V)
    const Tensor pooled = index_means(value, *of_keys, num_landmarks, std::nullopt);
    launch_convert(query, Dtype::float32, {floats(mixed), floats(pooled), bytes_of(call.plan.exact), nullptr,
                                           mixed.numel(), heads * num_landmarks * dim});
  }
  const Tensor narrow_key = call.narrow(query, key_means, call.dim), narrow_mixed = call.narrow(query, mixed, dim);
  AttendForward last{};
  last.query = operand_of(query), last.key = operand_of(narrow_key), last.value = operand_of(narrow_mixed);
  last.mask = bytes_of(call.plan.key_absent), last.output = operand_of(output);
  launch_attend(query, call.type, false, call.of_queries(), last);
  return {output, query_means, key_means, context, mixed, logsumexp, iterates};
}

// One backward call; what a pass makes lies here for the next.
struct Backward {
  const Call call;
  const Tensor &grad_output, &query, &key, &value, &query_means, &key_means, &context, &mixed, &logsumexp;
  const Tensor narrow_query = call.narrow(query, query_means, call.dim);
  const Tensor narrow_key = call.narrow(query, key_means, call.dim);
  const Tensor narrow_mixed = call.narrow(query, mixed, call.value_dim);
  const Tensor row_logsumexp = call.room(query, call.rows() * call.queries);  // of F
  const Tensor row_delta = call.room(query, call.rows() * call.queries);
  const Tensor grad_query_means = torch::stable::empty_like(query_means);
  const Tensor grad_key_means = torch::stable::empty_like(key_means);
  const Tensor grad_mixed = torch::stable::empty_like(mixed), grad_context = torch::stable::empty_like(context);
  const Tensor context_delta = torch::stable::empty_like(logsumexp);
  const std::optional<Members> of_queries = members(query, call.plan.query_landmarks, call.plan.query_index, call.plan.query_grid);
  const std::optional<Members> of_keys = keys_like_queries() ? of_queries
                                       : members(key, call.plan.key_landmarks, call.plan.key_index, call.plan.key_grid);

  // From memory: a grid is worked out once, not in the two passes whose registers are taken.
  std::optional<Members> members(const Tensor& tokens, const OptionalTensor& landmarks, const OptionalTensor& index,
                                 const Sizes& grid) const {
    if (call.rows() == 0) return std::nullopt;
    if (index) return members_of(*index, call.landmarks);
    if (landmarks) return std::nullopt;
    return members_of(tokens, grid_of(tokens, grid, call.plan.landmark_grid), call.landmarks);
  }
  // As in self-attention.
  bool keys_like_queries() const {
    const Plan& plan = call.plan;
    if (plan.query_index && plan.key_index) return same(*plan.query_index, *plan.key_index);
    const bool grids = !plan.query_landmarks && !plan.key_landmarks && !plan.query_index && !plan.key_index;
    return grids && plan.query_grid == plan.key_grid;
  }

  // Of F: queries as rows, landmarks as others.
  AttendGradient through_f() const {
    AttendGradient pass{};
    pass.first = operand_of(query), pass.second = operand_of(grad_output);
    pass.other_first = operand_of(narrow_key), pass.other_second = operand_of(narrow_mixed);
    pass.mask = bytes_of(call.plan.key_absent), pass.logsumexp = floats(row_logsumexp), pass.delta = floats(row_delta);
    return pass;
  }

  // dW and what dK~ gets through F.
  void query_sums() const {
    launch_attend_gradient(query, call.type, false, GradientOf::stats, call.of_queries(), through_f());
    const AttendShape shape = call.over_queries();
    const int64_t parts = call.rows() * shape.splits * call.landmarks;
    const Tensor keyed = call.room(query, parts * call.dim), valued = call.room(query, parts * call.value_dim);
    AttendGradient pass = through_f();
    std::swap(pass.first, pass.other_first);
    std::swap(pass.second, pass.other_second);
    pass.sums_first = floats(keyed), pass.sums_second = floats(valued);
    launch_attend_gradient(query, call.type, false, GradientOf::key_value, shape, pass);
    const int splits = static_cast<int>(shape.splits);
    launch_reduce(query, {pass.sums_first, nullptr, floats(grad_key_means), call.rows(), call.landmarks * call.dim, splits});
    launch_reduce(query, {pass.sums_second, nullptr, floats(grad_mixed), call.rows(), call.landmarks * call.value_dim, splits});
  }

  // From dW and G V through Z, its steps and A's softmax to the landmarks.
  void core() const {
    const int64_t m = call.landmarks, d = call.dim, e = call.value_dim;
    const Tensor core = call.core(query, query_means, key_means), inverse = inverse_of(call, core);
    launch_matmul(query, Transposed::left,
                  call.matmul(floats(grad_context), floats(inverse), m, floats(grad_mixed), e, m, e, m));
    launch_context_gradient(query, {floats(grad_context), floats(context), bytes_of(call.plan.query_absent),
                                    bytes_of(call.plan.exact), floats(context_delta), call.rows() * m,
                                    static_cast<int>(call.heads), static_cast<int>(m), static_cast<int>(e)});
    const Tensor grad_inverse = torch::stable::empty_like(core), grad_core = torch::stable::empty_like(core);
    Matmul product = call.matmul(floats(grad_inverse), floats(grad_mixed), e, floats(context), e, m, m, e);
    product.zero = bytes_of(call.plan.exact);
    launch_matmul(query, Transposed::right, product);
    launch_pinv_backward(core, floats(grad_inverse), floats(core), floats(grad_core), call.rows(), m, call.iterations,
                         call.global_init);
    launch_core_gradient(query, {floats(core), floats(grad_core), call.rows() * m, static_cast<int>(m),
                                 static_cast<float>(call.scale)});
    launch_matmul(query, Transposed::none,
                  call.matmul(floats(grad_query_means), floats(grad_core), m, floats(key_means), d, m, d, m));
    product = call.matmul(floats(grad_key_means), floats(grad_core), m, floats(query_means), d, m, d, m);
    product.beta = 1.0f;
    launch_matmul(query, Transposed::left, product);
  }

  Spread spread(const Tensor& grad, int64_t channels, const std::optional<Members>& members) const {
    if (!members) return {};
    const Index place = index_of(members->index);
    const bool per_batch = members->index.size(0) > 1, per_head = members->index.size(1) > 1;
    const int64_t m = call.landmarks;
    return {floats(grad), m * channels, place.data, place.batch, place.head, floats(members->counts),
            per_batch ? members->index.size(1) * m : 0, per_head ? m : 0, nullptr};
  }

  // dK and dV; and dQ~ complete.
  void keys(const Tensor& grad_key, const Tensor& grad_value) const {
    const Tensor narrow_context = call.narrow(query, grad_context, call.value_dim);
    AttendGradient pass{};
    pass.first = operand_of(key), pass.second = operand_of(value);
    pass.other_first = operand_of(narrow_query), pass.other_second = operand_of(narrow_context);
    pass.mask = bytes_of(call.plan.key_padding_mask), pass.logsumexp = floats(logsumexp);
    pass.delta = floats(context_delta);
    // Weights of a row of G are about 1 / S, below what float16 holds well: they are lifted by a power of two.
    int lift = 0;
    while (call.type == Dtype::float16 && (int64_t{2} << 2 * lift) <= call.keys / 2) ++lift;
    pass.lift = static_cast<float>(lift);
    AttendGradient to_landmarks = pass;
    pass.grad_first = operand_of(grad_key), pass.grad_second = operand_of(grad_value);
    pass.spread_first = spread(grad_key_means, call.dim, of_keys);
    if (call.plan.exact) {
      pass.spread_second = spread(grad_mixed, call.value_dim, of_keys);
      pass.spread_second.only = bytes_of(call.plan.exact);
    }
    launch_attend_gradient(query, call.type, false, GradientOf::key_value,
                           {call.batch, call.heads, call.keys, call.landmarks, call.dim, call.value_dim, call.scale}, pass);
    const AttendShape shape = call.over_keys();
    const Tensor parts = call.room(query, call.rows() * shape.splits * call.landmarks * call.dim);
    std::swap(to_landmarks.first, to_landmarks.other_first);
    std::swap(to_landmarks.second, to_landmarks.other_second);
    to_landmarks.sums_first = floats(parts);
    launch_attend_gradient(query, call.type, false, GradientOf::query, shape, to_landmarks);
    launch_reduce(query, {floats(parts), floats(grad_query_means), floats(grad_query_means), call.rows(),
                          call.landmarks * call.dim, static_cast<int>(shape.splits)});
  }

  void queries(const Tensor& grad_query) const {
    AttendGradient pass = through_f();
    pass.grad_first = operand_of(grad_query);
    pass.spread_first = spread(grad_query_means, call.dim, of_queries);
    launch_attend_gradient(query, call.type, false, GradientOf::query, call.of_queries(), pass);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_means,
    const Tensor& key_means, const Tensor& context, const Tensor& mixed, const Tensor& logsumexp,
    const Tensor& /*iterates*/, const OptionalTensor& query_landmarks, const OptionalTensor& key_landmarks, const OptionalTensor& query_index,
    const OptionalTensor& key_index, const OptionalTensor& key_padding_mask, const OptionalTensor& query_landmark_mask,
    const OptionalTensor& key_landmark_mask, const OptionalTensor& exact_rows, const OptionalTensor& conv_weight,
    const OptionalTensor& gamma, const Sizes& query_grid, const Sizes& key_grid, const Sizes& landmark_grid,
    int64_t num_landmarks, double scale, int64_t pinv_iterations, bool global_init, bool token_major,
    bool /*keep_iterates*/) {
  check_no_epilogue(!conv_weight && !gamma && token_major);
  auto like = [](const Tensor& x) { return empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type()); };
  const Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value);
  auto none = [&] { return empty(query, {0}, ScalarType::Float); };  // one each: outputs of an op must not alias
  const bool query_given = query_landmarks && !query_index, key_given = key_landmarks && !key_index;
  const Backward pass{
      Call(query, value,
           {query_landmarks, key_landmarks, query_index, key_index, key_padding_mask, query_landmark_mask,
            key_landmark_mask, exact_rows, query_grid, key_grid, landmark_grid},
           num_landmarks, scale, pinv_iterations, global_init),
      grad_output, query, key, value, query_means, key_means, context, mixed, logsumexp};
  if (pass.call.rows() > 0) {
    pass.query_sums();
    pass.core();
    pass.keys(grad_key, grad_value);
    pass.queries(grad_query);
  }
  return {grad_query, grad_key, grad_value, query_given ? pass.grad_query_means : none(),
          key_given ? pass.grad_key_means : none(), none(), none()};
}

std::tuple<Tensor, Tensor> cluster(
    const Tensor& tokens, const Tensor& index, const OptionalTensor& landmark_mask, const OptionalTensor& frozen_rows,
    int64_t num_landmarks, int64_t iterations) {
  const int64_t batch = tokens.size(0), heads = tokens.size(1), count = tokens.size(2), dim = tokens.size(3);
  const OptionalTensor absent = contiguous(landmark_mask), frozen = contiguous(frozen_rows);
  const Tensor assigned = empty(tokens, {batch, heads, count}, ScalarType::Int);
  if (batch * heads == 0 || iterations == 0) {
    Tensor copy = assigned;
    torch::stable::copy_(copy, index);
    return {index_means(tokens, index_of(index), num_landmarks, std::nullopt), copy};
  }
  Tensor landmarks = index_means(tokens, index_of(index), num_landmarks, std::nullopt);
  for (int64_t step = 0; step < iterations; ++step) {
    launch_assign(tokens, dtype(tokens, "tokens"),
                  {operand_of(tokens), index_of(index), floats(landmarks), bytes_of(absent), bytes_of(frozen),
                   static_cast<int32_t*>(assigned.mutable_data_ptr()), static_cast<int>(heads), static_cast<int>(count),
                   static_cast<int>(num_landmarks), static_cast<int>(dim)});
    landmarks = index_means(tokens, index_of(assigned), num_landmarks, landmarks);
  }
  return {landmarks, assigned};
}

}  // namespace

NYSTROMGAN_BINDINGS(m) {
  m.impl("nystrom_attention_native", TORCH_BOX(&forward));
  m.impl("nystrom_attention_backward_native", TORCH_BOX(&backward));
  m.impl("cluster_landmarks_native", TORCH_BOX(&cluster));
}

}  // namespace nystromgan
