// The phases of nystrom_single.h. A unit of work goes to whichever block comes to it in steps of the grid, and its sums do
// not depend on which: so neither the number of blocks nor what else is in the batch changes a row's bits.
#pragma once

#include "single_passes.h"

namespace nystromgan {

// Calls body(unit) for this block's share of `count` units.
template <class Body>
DEVICE void for_each_unit(int64_t count, Body body) {
  for (int64_t unit = block_index(); unit < count; unit += num_blocks()) body(unit);
}

template <class T, int CHANNELS, int STEP>
DEVICE void nystrom_single(const NystromSingle& p) {
  const int64_t of_query = pool_units(p.query, p.rows), of_both = of_query + pool_units(p.key, p.rows);
  const int64_t of_all = of_both + pool_units(p.value, p.rows);
  for_each_unit(of_all, [&](int64_t unit) {
    const Pooled& side = unit < of_query ? p.query : unit < of_both ? p.key : p.value;
    pool_unit<T>(side, p.heads, p.landmarks, unit - (unit < of_query ? 0 : unit < of_both ? of_query : of_both));
  });
  if (of_all > 0) sync_grid();
  // The inverses take longest, so they come first: G V hides behind them.
  for_each_unit(p.rows * (1 + p.keys.sizes.splits), [&](int64_t unit) {
    if (unit < p.rows)
      core_unit(p, unit);
    else
      context_unit<T, CHANNELS, STEP>(p, unit - p.rows);
  });
  sync_grid();
  using Output = OutputUnit<T, CHANNELS, STEP>;
  const int64_t outputs = p.rows * p.row_groups;
  if (block_index() < outputs) Output(p, block_index()).start();
  float* s_mix = reinterpret_cast<float*>(Output(p, 0).values().data);
  for_each_unit(p.rows * mix_slices(p), [&](int64_t unit) { mix_unit<T>(p, unit, s_mix); });
  sync_grid();
  for_each_unit(outputs, [&](int64_t unit) {
    const Output output(p, unit);
    if (unit != block_index()) {
      sync_block();  // the unit before may still read
      output.start();
    }
    output.run();
  });
}

}  // namespace nystromgan
