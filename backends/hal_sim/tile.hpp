// SPDX-License-Identifier: Apache-2.0
// What a kernel works on: kRows rows and kColumns columns of the product, and where in the strips it is.
#pragma once

#include "strips.hpp"

namespace hal_sim {

using Tile = Floats[kRows][4];

// Where a group begins in a strip of each.
struct Group {
    const float* a;
    const int32_t* a_codes;
    const float* b;
    const int32_t* b_codes;

    Group at(int64_t k) const { return {a + k * kRows, a_codes + k * kRows, b + k * kColumns, b_codes + k * kLanes}; }
};

}  // namespace hal_sim
