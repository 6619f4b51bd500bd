// SPDX-License-Identifier: Apache-2.0
// Products by groups, one for each expert: of the rows of a, or of what is summed over.
#pragma once

#include "problem.hpp"

namespace hal_sim {

struct Groups {
    // What `whole` has besides: a batch of b for each group of rows; a matrix of d, one after the other, for each of sums.
    const Problem& whole;
    const int64_t (*parts)[2];  // where each begins, and its length
    int64_t count;
    bool of_rows;

    // The matrix of one group, without c.
    Problem operator[](int64_t i) const {
        const int64_t first = parts[i][0], length = parts[i][1];
        Problem of_group = whole;
        (of_rows ? of_group.m : of_group.k) = length;
        of_group.a = whole.a.after(first * (of_rows ? whole.a.row : whole.a.column));
        of_group.b = whole.b.after(of_rows ? i * whole.b.batch : first * whole.b.row);
        of_group.d = whole.d + (of_rows ? first : i * whole.m) * whole.d_row;
        return of_group;
    }
};

}  // namespace hal_sim
