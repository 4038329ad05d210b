// Launches of attention by groups of warps, where the device has them and the sizes are theirs.
#pragma once

#include "attend_launch.h"

namespace nystromgan {

// Whether the pass was launched.
bool launch_attend_groups(const Tensor& on, Dtype dtype, bool channel_major, const AttendShape& shape, AttendForward pass);

// Of maps.
bool launch_attend_groups_gradient(const Tensor& on, Dtype dtype, GradientOf of, const AttendShape& shape, AttendGradient pass);

}  // namespace nystromgan
