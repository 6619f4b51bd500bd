// SPDX-License-Identifier: Apache-2.0
// What the fast kernels leave of one matrix: any finite operands in the general way, and the rest one by one.
#pragma once

#include "general.hpp"
#include "memory.hpp"
#include "problem.hpp"
#include "tiles.hpp"

namespace hal_sim {

class GeneralTiles {
public:
    // What is left of the matrix that `fast` was at.
    GeneralTiles(const Unit& unit, const Problem& problem, Tiles& fast, int64_t at)
        : unit_(unit), wide_a_({problem.m, problem.k}), wide_b_({problem.k, problem.n}),
          p_(widened(problem, at)), fast_(fast), at_(at), tiles_((p_.m + kRows - 1) / kRows),
          panels_((p_.n + kLanes - 1) / kLanes), aligned_(unit.kind == kTruncated || unit.kind == kFloored),
          a_({tiles_, p_.k, kRows}), b_({panels_, p_.k, kLanes}), a_exponents_({tiles_, p_.k, kRows}),
          b_exponents_({panels_, p_.k, kLanes}), special_rows_({tiles_}), special_columns_({panels_}) {}

    int64_t pieces() const { return aligned_ ? tiles_ + panels_ : 0; }

    void pack(int64_t piece) {
        if (piece < tiles_) {
            const int64_t first = piece * kRows, at = first * p_.k;
            *special_rows_.at(piece) = fill(wide_a_.at(0), p_.a.row, p_.a.column, first, p_.m, kRows,
                                            unit_.min_exponent_a, a_.at(at), a_exponents_.at(at));
        } else {
            piece -= tiles_;
            const int64_t first = piece * kLanes, at = first * p_.k;
            *special_columns_.at(piece) = fill(wide_b_.at(0), p_.b.column, p_.b.row, first, p_.n, kLanes,
                                               unit_.min_exponent_b, b_.at(at), b_exponents_.at(at));
        }
    }

    int64_t tasks() const { return panels_ * tiles_; }

    void multiply(int64_t task) {
        const int64_t tile = task % tiles_, panel = task / tiles_;
        const int64_t row = tile * kRows, column = panel * kLanes;
        if (!fast_.is_left(row, column)) return;
        const int rows = int(std::min<int64_t>(kRows, p_.m - row));
        const int columns = int(std::min<int64_t>(kLanes, p_.n - column));
        if (!aligned_ || *special_rows_.at(tile) || *special_columns_.at(panel) ||
            !of_tile(tile, panel, rows, columns)) {
            const Environment environment(FE_TONEAREST);
            for (int r = 0; r < rows; ++r) {
                for (int j = 0; j < columns; ++j) p_.by_reference(unit_, at_, row + r, column + j);
            }
        }
    }

    Environment environment() const { return Environment(unit_.kind == kTruncated ? FE_TOWARDZERO : FE_TONEAREST); }

private:
    // Returns the problem with this matrix of each operand in float32.
    Problem widened(const Problem& problem, int64_t at) {
        Problem wide = problem;
        wide.a = problem.a.widened(at, problem.m, problem.k, wide_a_.at(0));
        wide.b = problem.b.widened(at, problem.k, problem.n, wide_b_.at(0));
        return wide;
    }

    // Returns whether there is a NaN or an infinity.
    bool fill(const float* from, int64_t stride, int64_t k_stride, int64_t first, int64_t count, int width,
              int min_exponent, float* significands, int32_t* exponents) {
        bool special = false;
        for (int64_t k = 0; k < p_.k; ++k) {
            for (int i = 0; i < width; ++i) {
                const float x = first + i < count ? from[(first + i) * stride + k * k_stride] : 0.0f;
                special |= !std::isfinite(x);
                split(x, min_exponent, significands + k * width + i, exponents + k * width + i);
            }
        }
        return special;
    }

    // Returns false where only the reference knows the answer: something may be infinite.
    bool of_tile(int64_t tile, int64_t panel, int rows, int columns) {
        Floats c[kRows] = {};
        for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < columns; ++j) c[r][j] = p_.c_at(at_, tile * kRows + r, panel * kLanes + j);
        }
        if (!finite(c)) return false;
        for (int64_t k = 0; k < p_.k; k += unit_.group) {
            const int64_t a_at = (tile * p_.k + k) * kRows, b_at = (panel * p_.k + k) * kLanes;
            const Operands in{a_.at(a_at), a_exponents_.at(a_at), b_.at(b_at), b_exponents_.at(b_at)};
            const int count = int(std::min<int64_t>(unit_.group, p_.k - k));
            const bool done = unit_.kind == kTruncated ? truncated(unit_, in, count, c) : floored(unit_, in, count, c);
            if (!done) return false;
        }
        for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < columns; ++j) p_.d_at(at_, tile * kRows + r, panel * kLanes + j) = c[r][j];
        }
        return true;
    }

    static bool finite(const Floats c[kRows]) {
        Ints all{};
        for (int r = 0; r < kRows; ++r) all |= (bits(c[r]) & 0x7f800000) == 0x7f800000;
        return !any(all);
    }

    const Unit& unit_;
    Buffer<float> wide_a_, wide_b_;
    const Problem p_;
    Tiles& fast_;
    const int64_t at_, tiles_, panels_;
    const bool aligned_;
    Buffer<float> a_, b_;
    Buffer<int32_t> a_exponents_, b_exponents_;
    Buffer<bool> special_rows_, special_columns_;
};

}  // namespace hal_sim
