// SPDX-License-Identifier: Apache-2.0
// One matrix by the fast kernels, tile by tile; and which tiles are left for the slower ones.
#pragma once

#include "fast.hpp"
#include "plain.hpp"
#include "problem.hpp"

namespace hal_sim {

using Kernel = void (*)(const Unit&, const Group&, int64_t k, int vectors, Tile&);

// The kernel for a unit, or null. `heavy` asks for one whose sums may be larger; see is_heavy.
inline Kernel kernel_of(const Unit& unit, bool heavy) {
    const int group = unit.group;
    if (unit.kind == kFused) return fused_chain;
    if (unit.kind == kPairwise) return group == 4 ? pairwise<4> : nullptr;
    if (unit.kind == kFloored) {
        if (unit.fraction_bits != 24) return nullptr;
        if (unit.interleaved) return group == 16 ? floored<16, true> : nullptr;
        return group == 4 ? floored<4, false> : group == 8 ? floored<8, false> : nullptr;
    }
    if (fits_apart(unit)) return group == 16 ? truncated_apart<16> : group == 32 ? truncated_apart<32> : nullptr;
    if (group == 16) return heavy ? truncated<16, 2> : truncated<16, 1>;
    if (group == 32) return unit.fraction_bits > 23 ? truncated<32, 2> : truncated<32, 1>;
    return group == 4 ? truncated<4, 1> : group == 8 ? truncated<8, 1> : nullptr;
}

class Tiles {
public:
    Tiles(const Unit& unit, const Problem& problem)
        : unit_(unit), p_(problem), tiles_((p_.m + kRows - 1) / kRows), panels_((p_.n + kColumns - 1) / kColumns),
          padded_((p_.k + unit.group - 1) / unit.group * unit.group), kernel_(kernel_of(unit, false)),
          heavy_kernel_(kernel_of(unit, true)),
          aligned_(unit.kind == kTruncated || unit.kind == kFloored), apart_(kernel_ && fits_apart(unit)),
          a_of_strip_(padded_ * kRows), b_of_strip_(padded_ * kColumns * (apart_ ? 2 : 1)), a_(tiles_ * a_of_strip_),
          b_(panels_ * b_of_strip_), a_codes_(aligned_ ? tiles_ * padded_ * kRows : 0),
          b_codes_(aligned_ ? panels_ * padded_ * kLanes : 0), a_signs_(apart_ ? tiles_ * padded_ * kRows : 0),
          rows_(tiles_), columns_(panels_), left_(tiles_ * panels_) {}

    // Turns to a matrix of the batch. All of its pieces must be packed before its first task.
    void start(int64_t at) { at_ = at, any_left_ = false; }

    int64_t pieces() const { return kernel_ ? tiles_ + panels_ : 0; }

    void pack(int64_t piece) {
        if (piece < tiles_) {
            const float* from = p_.a + at_ * p_.a_batch + piece * kRows * p_.a_row;
            float* values = a_.at(piece * a_of_strip_);
            *rows_.at(piece) = packed<kRows>(from, p_.a_row, p_.a_column, p_.m - piece * kRows, unit_.min_exponent_a,
                                             values, a_codes_.at(piece * padded_ * kRows));
            if (apart_) part_rows(values, padded_, a_signs_.at(piece * padded_ * kRows));
        } else {
            piece -= tiles_;
            const float* from = p_.b + at_ * p_.b_batch + piece * kColumns * p_.b_column;
            float* values = b_.at(piece * b_of_strip_);
            *columns_.at(piece) =
                packed<kColumns>(from, p_.b_column, p_.b_row, p_.n - piece * kColumns, unit_.min_exponent_b, values,
                                 b_codes_.at(piece * padded_ * kLanes));
            if (apart_) part_columns(values, padded_);
        }
    }

    int64_t tasks() const { return panels_ * chunks(); }

    void multiply(int64_t task) {
        const int64_t chunk = task % chunks(), panel = task / chunks();
        const int64_t last = std::min(tiles_, (chunk + 1) * kTilesOfAChunk);
        for (int64_t tile = chunk * kTilesOfAChunk; tile < last; ++tile) {
            const bool done = kernel_ && of_tile(tile, panel);
            *left_.at(tile * panels_ + panel) = !done;
            if (!done) any_left_ = true;
        }
    }

    bool any_left() const { return any_left_; }
    bool is_left(int64_t i, int64_t j) { return *left_.at(i / kRows * panels_ + j / kColumns); }

    // The rounding that the kernels need, and whether they want subnormals flushed.
    Environment environment() const {
        return Environment(unit_.kind == kTruncated ? FE_TOWARDZERO : FE_TONEAREST, unit_.kind == kPairwise);
    }

private:
    static constexpr int64_t kTilesOfAChunk = 16;
    static constexpr int kMost = 120;         // of an exponent, so that nothing comes near infinity
    static constexpr int kMostBitsOfK = 20;
    int64_t chunks() const { return (tiles_ + kTilesOfAChunk - 1) / kTilesOfAChunk; }

    template <int kWidth>
    Strip packed(const float* from, int64_t stride, int64_t k_stride, int64_t lines, int min_exponent, float* values,
                 int32_t* codes) const {
        gather<kWidth>(from, stride, k_stride, int(std::min<int64_t>(kWidth, lines)), p_.k, padded_, values);
        Strip strip;
        if (aligned_) {
            strip = kWidth == kRows ? code_rows(values, padded_, min_exponent, codes)
                                    : code_columns(values, padded_, min_exponent, codes);
            strip.heavy = kWidth == kRows && unit_.group == 16 && is_heavy(values, padded_);
        } else if (unit_.kind == kPairwise) {
            const float least = std::ldexp(1.0f, min_exponent);
            for (int64_t i = 0; i < padded_ * kWidth; ++i) values[i] = std::fabs(values[i]) < least ? 0.0f : values[i];
        }
        return strip;
    }

    // Returns false, and leaves d alone, where the fast kernels could be wrong.
    bool of_tile(int64_t tile, int64_t panel) {
        const Strip &row = *rows_.at(tile), &column = *columns_.at(panel);
        const int scale = row.highest + column.highest;
        if (aligned_ && !(fits(row, column) && c_fits(tile, panel, scale))) return false;
        const int rows = int(std::min<int64_t>(kRows, p_.m - tile * kRows));
        const int columns = int(std::min<int64_t>(kColumns, p_.n - panel * kColumns));
        const int vectors = (columns + kLanes - 1) / kLanes;
        alignas(64) float c[kRows][kColumns] = {};
        if (p_.c) {
            const float down = std::ldexp(1.0f, -scale);
            for (int r = 0; r < rows; ++r) {
                for (int j = 0; j < columns; ++j) c[r][j] = p_.c_at(at_, tile * kRows + r, panel * kColumns + j) * down;
            }
        }
        const Group strips{a_.at(tile * a_of_strip_), a_codes_.at(tile * padded_ * kRows), b_.at(panel * b_of_strip_),
                           b_codes_.at(panel * padded_ * kLanes),
                           apart_ ? a_signs_.at(tile * padded_ * kRows) : nullptr};
        Tile& sums = *reinterpret_cast<Tile*>(c);
        (row.heavy ? heavy_kernel_ : kernel_)(unit_, strips, padded_, vectors, sums);
        const float up = std::ldexp(1.0f, scale);
        for (int r = 0; r < rows; ++r) {
            float* d = &p_.d_at(at_, tile * kRows + r, panel * kColumns);
            for (int j = 0; j < columns; ++j) d[j] = c[r][j] * up;
        }
        return true;
    }

    // Whether the kernels' range holds the products of two strips, with what they sum up to.
    bool fits(const Strip& row, const Strip& column) const {
        if (row.special || column.special || row.wide || column.wide) return false;
        // The floor of E does not show, and every sum is a multiple of float32's least number, so that it is no matter
        // whether it is a subnormal: it is none here, being scaled.
        const int kept = unit_.kind == kTruncated ? unit_.fraction_bits : 31;
        const int least = std::max({unit_.exponent_floor, kept - 149, -kMost});
        if (row.lowest + column.lowest < least || row.highest + column.highest > kMost - 2 - kMostBitsOfK) return false;
        // A shift to the unit's grid must not be negative, lest zeros become something else: E <= F.
        const int bits_of_k = apart_ || unit_.kind == kFloored ? kMostBitsOfK : unit_.fraction_bits - 3;
        return p_.k <= int64_t(1) << std::min(bits_of_k, kMostBitsOfK);
    }

    // Whether c does so, too: zero, or with an exponent that is at least that of a group of zeros.
    bool c_fits(int64_t tile, int64_t panel, int scale) const {
        if (!p_.c) return true;
        const int lowest = std::max(scale + kNothing, -100), highest = std::min(scale + unit_.fraction_bits - 2, kMost);
        for (int64_t i = tile * kRows; i < std::min(p_.m, (tile + 1) * kRows); ++i) {
            for (int64_t j = panel * kColumns; j < std::min(p_.n, (panel + 1) * kColumns); ++j) {
                const float c = p_.c_at(at_, i, j);
                const int exponent = int(bits_of(c) >> 23 & 0xff) - 127;
                if (c != 0 && (exponent < lowest || exponent > highest)) return false;
            }
        }
        return true;
    }

    const Unit& unit_;
    const Problem& p_;
    const int64_t tiles_, panels_, padded_;
    const Kernel kernel_, heavy_kernel_;
    const bool aligned_, apart_;  // whether exponents matter; whether signs are kept apart
    const int64_t a_of_strip_, b_of_strip_;
    Buffer<float> a_, b_;
    Buffer<int32_t> a_codes_, b_codes_, a_signs_;
    Buffer<Strip> rows_, columns_;
    Buffer<bool> left_;
    int64_t at_ = 0;
    std::atomic<bool> any_left_{false};
};

}  // namespace hal_sim
