// W = Z Y of the iterative pseudo-inverse Z of one fp32 matrix, forward and backward, without the last steps of Z.
//
// With R = I - X a step is Z <- Z r(X) and X = A Z becomes X r(X), of a polynomial whose terms have one sign:
//
//   r(X) = I + R + R^2 + R^3 / 4 = 1/4 (13 I - 15 X + 7 X^2 - X^3)
//
// So n steps of Z applied to Y are Z_k r(X_k) .. r(X_{n-1}) Y: k steps are made whole, a few X after them each from the one
// before, and Y, which has few columns, goes through r(X) by Horner's rule, t <- v + 1/4 R t, v + R t, v + R t from t = v.
// A whole step costs 2.5 products of squares, an X one. The last X is applied as A Z_{n-1}, so that its error is that of Z.
#pragma once

#include "pinv.h"
#include "pinv_plan.h"

namespace nystromgan::NYSTROMGAN_ISA {

// y [rows, e] -> dst [rows, ldd], zeros in the columns up to round_up(e, kLanes).
inline void pad_columns(int64_t rows, int64_t e, const float* y, float* dst, int64_t ldd) {
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(dst + r * ldd, y + r * e, e * sizeof(float));
    memset(dst + r * ldd + e, 0, (round_up(e, kLanes) - e) * sizeof(float));
  }
}

inline void pad_columns(int64_t rows, int64_t e, const float* y, float* dst) {
  pad_columns(rows, e, y, dst, round_up(e, kLanes));
}

// A thin matrix [m, n] within rows of ld.
struct Thin {
  float* data;
  int64_t ld;
  NYSTROMGAN_INLINE float* at(int64_t r, int64_t c) const { return data + r * ld + c; }
};

// x <- (x + x^T) / 2, a square.
inline void symmetrize(ParallelRun team, int64_t m, float* x) {
  const int64_t ld = padded_ld(m), whole = m / kLanes * kLanes;
  shared(team, (m + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kLanes; row < min(end * kLanes, whole); row += kLanes)
      for (int64_t col = 0; col <= row; col += kLanes) {
        Vec below[kLanes], above[kLanes];
        for (int r = 0; r < kLanes; ++r) below[r] = load(x + (row + r) * ld + col);
        for (int r = 0; r < kLanes; ++r) above[r] = load(x + (col + r) * ld + row);
        transpose(above);
        for (int r = 0; r < kLanes; ++r) store(x + (row + r) * ld + col, below[r] = 0.5f * (below[r] + above[r]));
        transpose(below);
        for (int r = 0; r < kLanes; ++r) store(x + (col + r) * ld + row, below[r]);
      }
    for (int64_t row = max(begin * kLanes, whole); row < min(end * kLanes, m); ++row)
      for (int64_t col = 0; col < row; ++col)
        x[row * ld + col] = x[col * ld + row] = 0.5f * (x[row * ld + col] + x[col * ld + row]);
  });
}

// What is made of A lies in `memory`, memory_size floats, and with `keep` the backward finds all there.
class PinvApply {
 public:
  PinvApply(ParallelRun team, int64_t m, int64_t e, int64_t steps, const float* a, float c, bool keep, float* memory)
      : team_(team), m_(m), e_(e), steps_(steps), a_(a), c_(c), keep_(keep), plan_(pinv_plan(m, e, steps)) {
    chain_ = memory;
    powers_ = chain_ + chain_squares(plan_, keep) * size_;
    levels_ = powers_ + plan_.power_squares() * size_;
    right_ = levels_ + plan_.powers * m * level_ld_;
    applied_ = right_ + m * run_ld_;
  }

  static int64_t memory_size(int64_t m, int64_t e, int64_t steps, bool keep) {
    const PinvPlan plan = pinv_plan(m, e, steps);
    const int64_t n = round_up(e, kLanes), runs = plan.runs() * n;
    return (chain_squares(plan, keep) + plan.power_squares()) * square_size(m) +
           m * (plan.powers * padded_ld(3 * runs) + 2 * padded_ld(runs));
  }

  // w [m, e] = Z y
  void forward(const float* y, float* w) {
    pinv_chain(team_, m_, a_, c_, plan_.whole, steps_, keep_, chain_);
    make_powers();
    pad_columns(m_, e_, y, input(0).data, input(0).ld);
    const int64_t last = plan_.runs() - 1;
    for (int64_t run = 0; run <= last; ++run) {
      apply(run);
      if (run == last) break;
      const Thin first = input(0), before = input(run);
      multiply({a_, ld_, 1}, applied(run), input(run + 1), [&](Vec x, int64_t r, int64_t c) {
        return load(first.at(r, c)) + kFactors[run] * (load(before.at(r, c)) - x);
      });
    }
    for (int64_t r = 0; r < m_; ++r) memcpy(w + r * e_, applied(last).at(r, 0), e_ * sizeof(float));
  }

  // After a forward that keeps: from grad_w [m, e] gives grad_y [m, e], and adds to grad_a (transposed). Returns d c.
  float backward(const float* grad_w, float* grad_y, float* grad_a) {
    const int64_t last = plan_.runs() - 1;
    Scratch levels(plan_.powers * m_ * level_ld_), left(m_ * run_ld_), outer(m_ * run_ld_);
    const Gradients of{levels, left, outer};
    Scratch grad(m_ * n_), back(m_ * n_), sum(m_ * n_);
    pad_columns(m_, e_, grad_w, of_applied(of, last).data, run_ld_);
    apply_backward(of, last, {grad, n_});
    memcpy(sum, grad, m_ * n_ * sizeof(float));
    for (int64_t run = last - 1; run >= 0; --run) {
      const float factor = kFactors[run];
      const Thin through{outer + run * n_, run_ld_};
      each([&](int64_t r, int64_t c) { store(through.at(r, c), -factor * load(grad + r * n_ + c)); });
      multiply({a_, 1, ld_}, through, of_applied(of, run), [](Vec x, int64_t, int64_t) { return x; });
      apply_backward(of, run, {back, n_});
      each([&](int64_t r, int64_t c) {
        const int64_t at = r * n_ + c;
        const Vec total = factor * load(grad + at) + load(back + at);
        store(grad + at, total);
        store(sum + at, load(sum + at) + total);
      });
    }
    for (int64_t r = 0; r < m_; ++r) memcpy(grad_y + r * e_, sum + r * n_, e_ * sizeof(float));
    Scratch grad_z(size_), scratch(5 * size_);
    matrices_backward(of, grad_z, grad_a, scratch);
    return pinv_chain_backward(team_, m_, a_, c_, plan_.whole, steps_, chain_, grad_z, grad_a, scratch);
  }

 private:
  static constexpr float kFactors[3] = {0.25f, 1.0f, 1.0f};  // of R, from the inside of Horner's rule

  // Laid out as what they belong to: of t within r(X), with the right side's, and of Z's results and of A's.
  struct Gradients {
    float *levels, *applied, *through_a;
  };

  static int64_t chain_squares(PinvPlan plan, bool keep) { return keep ? 4 * plan.whole + 1 : 8; }

  float* z() const { return pinv_step(chain_, m_, keep_ ? plan_.whole : plan_.whole % 2).z; }
  float* x(int64_t i) const { return powers_ + 2 * i * size_; }
  float* squared(int64_t i) const { return x(i) + size_; }  // of all X but the last
  Thin level(float* levels, int64_t i, int64_t run, int64_t t) const {
    return {levels + i * m_ * level_ld_ + (3 * run + t) * n_, level_ld_};
  }
  Thin right(int64_t run) const { return {right_ + run * n_, run_ld_}; }  // what Z is applied to
  Thin applied(int64_t run) const { return {applied_ + run * n_, run_ld_}; }
  Thin of_applied(Gradients of, int64_t run) const { return {of.applied + run * n_, run_ld_}; }
  Thin input(int64_t run) const { return plan_.powers > 0 ? level(levels_, plan_.powers - 1, run, 0) : right(run); }

  template <class Body>
  void each(Body body) const {
    for (int64_t r = 0; r < m_; ++r)
      for (int64_t c = 0; c < n_; c += kLanes) body(r, c);
  }

  // to = finish(left from)
  template <class Finish>
  void multiply(StridedMatrix left, Thin from, Thin to, Finish finish) const {
    product<false>(team_, m_, n_, m_, left, from.data, from.ld, to.data, to.ld, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r)
        for (int64_t c = 0; c < n_; c += kLanes) store(to.at(r, c), finish(load(to.at(r, c)), r, c));
    });
  }

  // 7 X - X^2 - 15 I of row r, whose product with X^2 is that of the next X.
  void next_factor(int64_t i, int64_t r, float* to) const {
    for (int64_t c = r * ld_; c < (r + 1) * ld_; c += kLanes) store(to + c, 7.0f * load(x(i) + c) - load(squared(i) + c));
    to[r * ld_ + r] -= 15.0f;
  }

  void make_powers() const {
    if (plan_.powers == 0) return;
    Scratch factor(size_);
    square_product(team_, m_, a_, z(), true, x(0), [](int64_t, int64_t) {});
    for (int64_t i = 0; i + 1 < plan_.powers; ++i) {
      square_product(team_, m_, x(i), x(i), true, squared(i), [&](int64_t first, int64_t rows) {
        for (int64_t r = first; r < first + rows; ++r) next_factor(i, r, factor);
      });
      mirror(team_, m_, factor);
      square_product(team_, m_, squared(i), factor, true, x(i + 1), [&](int64_t first, int64_t rows) {
        for (int64_t c = first * ld_; c < (first + rows) * ld_; c += kLanes)
          store(x(i + 1) + c, 3.25f * load(x(i) + c) + 0.25f * load(x(i + 1) + c));
      });
    }
  }

  // applied(run) = Z r(X_k) .. input(run)
  void apply(int64_t run) const {
    for (int64_t i = plan_.powers - 1; i >= 0; --i)
      for (int64_t t = 0; t < 3; ++t) {
        const Thin first = level(levels_, i, run, 0), before = level(levels_, i, run, t);
        const Thin next = t < 2 ? level(levels_, i, run, t + 1) : i > 0 ? level(levels_, i - 1, run, 0) : right(run);
        multiply({x(i), ld_, 1}, before, next, [&](Vec x, int64_t r, int64_t c) {
          return load(first.at(r, c)) + kFactors[t] * (load(before.at(r, c)) - x);
        });
      }
    multiply({z(), ld_, 1}, right(run), applied(run), [](Vec x, int64_t, int64_t) { return x; });
  }

  // result = the gradient of input(run) from that of applied(run), keeping those in between: of R t the factor of t^T.
  void apply_backward(Gradients of, int64_t run, Thin result) const {
    auto next = [&](int64_t i) { return i < plan_.powers ? level(of.levels, i, run, 2) : result; };
    multiply({z(), 1, ld_}, of_applied(of, run), next(0), [](Vec x, int64_t, int64_t) { return x; });
    for (int64_t i = 0; i < plan_.powers; ++i) {
      const Thin third = level(of.levels, i, run, 2), second = level(of.levels, i, run, 1);
      const Thin first = level(of.levels, i, run, 0);
      const StridedMatrix x_i{x(i), ld_, 1};
      multiply(x_i, third, second, [&](Vec x, int64_t r, int64_t c) { return load(third.at(r, c)) - x; });
      multiply(x_i, second, first, [&](Vec x, int64_t r, int64_t c) { return 0.25f * (load(second.at(r, c)) - x); });
      multiply(x_i, first, next(i + 1), [&](Vec x, int64_t r, int64_t c) {
        return load(third.at(r, c)) + load(second.at(r, c)) + 5.0f * load(first.at(r, c)) - x;
      });
    }
  }

  // grad_z (transposed), and what grad_a (transposed) gains, but for A's part in Z. `scratch` holds four squares.
  void matrices_backward(Gradients of, float* grad_z, float* grad_a, float* scratch) const {
    const int64_t runs = plan_.runs() * n_, columns = 3 * runs;
    Scratch transposed(max(columns, runs) * ld_), grad_x(max(int64_t{1}, plan_.powers) * size_);
    for (int64_t i = plan_.powers - 1; i >= 0; --i) {
      float* const grad = grad_x + i * size_;
      scaled_transpose(m_, columns, -1.0f, levels_ + i * m_ * level_ld_, level_ld_, transposed, ld_);
      product<false>(team_, m_, m_, columns, {of.levels + i * m_ * level_ld_, level_ld_, 1}, transposed, ld_, grad, ld_);
      symmetrize(team_, m_, grad);
      if (i + 1 < plan_.powers) add_through_power(i, grad_x + (i + 1) * size_, grad, scratch);
    }
    scaled_transpose(m_, runs, 1.0f, of.applied, run_ld_, transposed, ld_);
    product<false>(team_, m_, ld_, runs, {right_, run_ld_, 1}, transposed, ld_, grad_z, ld_);
    if (plan_.through_a) {
      scaled_transpose(m_, runs - n_, 1.0f, of.through_a, run_ld_, transposed, ld_);
      product<true>(team_, m_, ld_, runs - n_, {applied_, run_ld_, 1}, transposed, ld_, grad_a, ld_);
    }
    if (plan_.powers == 0) return;  // of X = A Z
    product<true>(team_, m_, m_, m_, {z(), ld_, 1}, grad_x, ld_, grad_a, ld_);
    product<true>(team_, m_, m_, m_, {grad_x, ld_, 1}, a_, ld_, grad_z, ld_);
  }

  // grad of X_i gains what that of X_{i+1} = 1/4 (13 X + S (7 X - S - 15 I)), S = X^2, gives: all are symmetric, and the
  // derivative is its own adjoint.
  void add_through_power(int64_t i, const float* next, float* grad, float* scratch) const {
    float *square = scratch, *factor = scratch + size_, *of_factor = scratch + 2 * size_, *sum = scratch + 3 * size_;
    sum_of_products(team_, m_, x(i), next, next, x(i), true, square, [](int64_t, int64_t) {});
    shared(team_, m_, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) next_factor(i, r, factor);
      for (int64_t c = begin * ld_; c < end * ld_; c += kLanes)
        store(of_factor + c, 7.0f * load(next + c) - load(square + c));
    });
    sum_of_products(team_, m_, square, factor, squared(i), of_factor, true, sum, [](int64_t, int64_t) {});
    shared(team_, m_, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * ld_; c < end * ld_; c += kLanes)
        store(grad + c, load(grad + c) + 3.25f * load(next + c) + 0.25f * load(sum + c));
    });
  }

  ParallelRun team_;
  int64_t m_, e_, steps_;
  const float* a_;
  float c_;
  bool keep_;
  PinvPlan plan_;
  int64_t n_ = round_up(e_, kLanes), ld_ = padded_ld(m_), size_ = square_size(m_);
  // Of all runs: t of r(X), for each X; what Z is applied to, and the result. [m, ld]
  int64_t run_ld_ = padded_ld(plan_.runs() * n_), level_ld_ = padded_ld(3 * plan_.runs() * n_);
  float *chain_, *powers_, *levels_, *right_, *applied_;
};

}  // namespace nystromgan::NYSTROMGAN_ISA
