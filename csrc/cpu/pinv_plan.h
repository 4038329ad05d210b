// How W = Z Y is made, free of torch and of any instruction set; csrc/cpu/pinv_apply.h explains it.
#pragma once

#include <stdint.h>

// Kernels of every instruction set use these: inlined, so that the linker finds no copy of one for another.
#define NYSTROMGAN_SHARED inline __attribute__((always_inline))

namespace nystromgan {

// Which of the pseudo-inverse's steps are made how.
struct PinvPlan {
  int64_t whole;   // steps of Z
  int64_t powers;  // X after them that are made and applied
  bool through_a;  // whether the last is applied as A Z

  // How often Z is applied.
  NYSTROMGAN_SHARED int64_t runs() const { return through_a ? 4 : 1; }
  // X and, of all but the last, X^2.
  NYSTROMGAN_SHARED int64_t power_squares() const { return powers > 0 ? 2 * powers - 1 : 0; }
  // These, each step's four, and Z.
  NYSTROMGAN_SHARED int64_t kept_squares() const { return 4 * whole + 1 + power_squares(); }
};

// Y with fewer columns than m over the first goes through A Z, over the second through two X more: products of squares saved
// against products with Y. A third X would save as much again and have 1.7 times the error where A has no null space.
constexpr int64_t kThinRatio = 3, kVeryThinRatio = 8;

// Of fewer steps no powers are taken: gradients would be off by 2e-6 where 0.5e-6 are to be had.
constexpr int64_t kLeastSteps = 4;

// From this many rows on half of a symmetric product is made. Of 64, a forward over 2048 tokens would take
// 0.96 to 1 of the time, by processor.
constexpr int64_t kSymmetricSize = 96;

// Of Y [m, e] and `steps` steps; `_iterates_shape` in nystromgan/ops/nystrom_attention/library.py says the same.
NYSTROMGAN_SHARED PinvPlan pinv_plan(int64_t m, int64_t e, int64_t steps) {
  if (steps == 0 || kThinRatio * e >= m) return {steps, 0, false};
  const bool takes_powers = steps >= kLeastSteps && m >= kSymmetricSize && kVeryThinRatio * e <= m;
  const int64_t powers = takes_powers ? 2 : 0;
  return {steps - 1 - powers, powers, true};
}

// Floats, in whole cache lines, that hold what PinvApply keeps on any instruction set.
NYSTROMGAN_SHARED int64_t iterates_size(int64_t m, int64_t e, int64_t steps) {
  const PinvPlan plan = pinv_plan(m, e, steps);
  const int64_t thin = plan.runs() * ((e + 15) / 16 * 16);
  return m * (plan.kept_squares() * ((m + 31) / 16 * 16) + plan.powers * (3 * thin + 16) + 2 * (thin + 16));
}

}  // namespace nystromgan
