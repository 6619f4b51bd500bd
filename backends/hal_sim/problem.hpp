// SPDX-License-Identifier: Apache-2.0
// What is asked for: matrices in memory.
#pragma once

#include "reference.hpp"
#include "stored.hpp"
#include "vectors.hpp"

namespace hal_sim {

// `batch` matrices. c may be null, which is zero, and has any strides, in elements; d is d[i * d_row + j].
struct Problem {
    int64_t batch, m, n, k;
    Operand a, b;
    const float* c;
    float* d;
    int64_t c_batch, c_row, c_column;
    int64_t d_batch, d_row;

    double products() const { return double(batch) * double(m) * double(n) * double(k); }

    float c_at(int64_t at, int64_t i, int64_t j) const {
        return c ? c[at * c_batch + i * c_row + j * c_column] : 0.0f;
    }
    float& d_at(int64_t at, int64_t i, int64_t j) const { return d[at * d_batch + i * d_row + j]; }

    // One element of operands in float32, as plainly as can be.
    void by_reference(const Unit& unit, int64_t at, int64_t i, int64_t j) const {
        const float* row = static_cast<const float*>(a.data) + at * a.batch + i * a.row;
        const float* column = static_cast<const float*>(b.data) + at * b.batch + j * b.column;
        d_at(at, i, j) = dot(unit, row, a.column, column, b.row, k, c_at(at, i, j));
    }
};

}  // namespace hal_sim
