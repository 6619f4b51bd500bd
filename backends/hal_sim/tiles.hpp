// SPDX-License-Identifier: Apache-2.0
// One matrix by the fast kernels, tile by tile; and which tiles are left for the slower ones.
#pragma once

#include <atomic>

#include "fast.hpp"
#include "memory.hpp"
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
    if (group == 16) return heavy ? truncated<16, 2> : truncated<16, 1>;
    if (group == 32 && unit.fraction_bits > 23) return heavy ? nullptr : truncated<32, 2>;
    if (group == 32) return truncated<32, 1>;
    return group == 4 ? truncated<4, 1> : group == 8 ? truncated<8, 1> : nullptr;
}

class Tiles {
public:
    Tiles(const Unit& unit, const Problem& problem)
        : unit_(unit), p_(problem), tiles_((p_.m + kRows - 1) / kRows), panels_((p_.n + kColumns - 1) / kColumns),
          padded_((p_.k + unit.group - 1) / unit.group * unit.group), kernel_(kernel_of(unit, false)),
          heavy_kernel_(kernel_of(unit, true)), aligned_(unit.kind == kTruncated || unit.kind == kFloored),
          a_({tiles_, padded_, kRows}), b_({panels_, padded_, kColumns}),
          a_codes_({aligned_ ? tiles_ : 0, padded_, kRows}), b_codes_({aligned_ ? panels_ : 0, padded_, kLanes}),
          rows_({tiles_}), columns_({panels_}), left_({tiles_, panels_}) {}

    // Turns to a matrix of the batch. All of its pieces must be packed before its first task.
    void start(int64_t at) { at_ = at, any_left_ = false; }

    int64_t pieces() const { return kernel_ ? tiles_ + panels_ : 0; }

    void pack(int64_t piece) {
        if (piece < tiles_) {
            const int64_t first = at_ * p_.a.batch + piece * kRows * p_.a.row, to = piece * padded_ * kRows;
            p_.a.from(first, [&](auto from) {
                *rows_.at(piece) = packed<kRows>(from, p_.a.row, p_.a.column, p_.m - piece * kRows,
                                                 unit_.min_exponent_a, a_.at(to), a_codes_.at(to));
            });
        } else {
            piece -= tiles_;
            const int64_t first = at_ * p_.b.batch + piece * kColumns * p_.b.column;
            p_.b.from(first, [&](auto from) {
                *columns_.at(piece) = packed<kColumns>(from, p_.b.column, p_.b.row, p_.n - piece * kColumns,
                                                       unit_.min_exponent_b, b_.at(piece * padded_ * kColumns),
                                                       b_codes_.at(piece * padded_ * kLanes));
            });
        }
    }

    int64_t tasks() const { return panels_ * chunks(); }

    void multiply(int64_t task) {
        const int64_t panel = task / chunks(), first = task % chunks() * kTilesOfAChunk;
        const int count = int(std::min(tiles_ - first, kTilesOfAChunk));
        Tile c[kTilesOfAChunk];
        bool fast[kTilesOfAChunk];
        for (int i = 0; i < count; ++i) fast[i] = kernel_at(first + i) && begin(first + i, panel, c[i]);
        const int vectors = (columns_of(panel) + kLanes - 1) / kLanes;
        for (int64_t k = 0; k < padded_; k += kPart) {
            for (int i = 0; i < count; ++i) {
                fast[i] = fast[i] && (k == 0 || is_small(c[i]));
                if (!fast[i]) continue;
                const Kernel kernel = kernel_at(first + i);
                kernel(unit_, strips(first + i, panel).at(k), std::min(kPart, padded_ - k), vectors, c[i]);
            }
        }
        for (int i = 0; i < count; ++i) {
            *left_.at((first + i) * panels_ + panel) = !fast[i];
            fast[i] ? end(first + i, panel, c[i]) : void(any_left_ = true);
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
    static constexpr int64_t kPart = 128;     // of k: so much of a strip of b stays in the nearest cache
    static constexpr int kMost = 120;         // of an exponent: nothing comes near infinity
    static constexpr int kMostBitsOfK = 20;
    int64_t chunks() const { return (tiles_ + kTilesOfAChunk - 1) / kTilesOfAChunk; }

    template <int kWidth, class Stored>
    Strip packed(Stored from, int64_t stride, int64_t k_stride, int64_t lines, int min_exponent, float* values,
                 int32_t* codes) const {
        gather<kWidth>(from, stride, k_stride, int(std::min<int64_t>(kWidth, lines)), p_.k, padded_, values);
        Strip strip;
        if (aligned_) {
            strip = kWidth == kRows ? code_rows(values, padded_, min_exponent, codes)
                                    : code_columns(values, padded_, min_exponent, codes);
            strip.heavy = kWidth == kRows && unit_.group >= 16 && is_heavy(values, padded_);
        } else if (unit_.kind == kPairwise) {
            const float least = std::ldexp(1.0f, min_exponent);
            for (int64_t i = 0; i < padded_ * kWidth; ++i) values[i] = std::fabs(values[i]) < least ? 0.0f : values[i];
        }
        return strip;
    }

    int rows_of(int64_t tile) const { return int(std::min<int64_t>(kRows, p_.m - tile * kRows)); }
    int columns_of(int64_t panel) const { return int(std::min<int64_t>(kColumns, p_.n - panel * kColumns)); }

    Kernel kernel_at(int64_t tile) { return kernel_ && rows_.at(tile)->heavy ? heavy_kernel_ : kernel_; }

    Group strips(int64_t tile, int64_t panel) {
        return {a_.at(tile * padded_ * kRows), a_codes_.at(tile * padded_ * kRows), b_.at(panel * padded_ * kColumns),
                b_codes_.at(panel * padded_ * kLanes)};
    }

    // The exponent that the product of two strips was scaled by.
    int scale(int64_t tile, int64_t panel) { return rows_.at(tile)->highest + columns_.at(panel)->highest; }

    // Begins a tile with c, scaled. Returns false where the fast kernels could be wrong.
    bool begin(int64_t tile, int64_t panel, Tile& sums) {
        if (aligned_ && !(fits(*rows_.at(tile), *columns_.at(panel)) && c_fits(tile, panel))) return false;
        std::memset(&sums, 0, sizeof sums);
        if (!p_.c) return true;
        const float down = std::ldexp(1.0f, -scale(tile, panel));
        for (int r = 0; r < rows_of(tile); ++r) {
            float row[kColumns] = {};
            for (int j = 0; j < columns_of(panel); ++j) {
                row[j] = p_.c_at(at_, tile * kRows + r, panel * kColumns + j) * down;
            }
            std::memcpy(&sums[r], row, sizeof row);
        }
        return true;
    }

    void end(int64_t tile, int64_t panel, const Tile& sums) {
        const float up = std::ldexp(1.0f, scale(tile, panel)), nan = nan_of(unit_);
        for (int r = 0; r < rows_of(tile); ++r) {
            Floats row[4];
            for (int q = 0; q < 4; ++q) row[q] = sums[r][q] == sums[r][q] ? sums[r][q] * up : all(nan);
            std::memcpy(&p_.d_at(at_, tile * kRows + r, panel * kColumns), row, columns_of(panel) * sizeof(float));
        }
    }

    // Whether the kernels' range holds the products of two strips, with what they sum up to.
    bool fits(const Strip& row, const Strip& column) const {
        if (row.special || column.special || row.wide || column.wide) return false;
        // The floor of E does not show, and every sum is a multiple of float32's least number, so that it is no matter
        // whether it is a subnormal: it is none here, being scaled.
        const int kept = unit_.kind == kTruncated ? unit_.fraction_bits : 31;
        const int least = std::max({unit_.exponent_floor, kept - 149, -kMost});
        if (row.lowest + column.lowest < least || row.highest + column.highest > kMost - 2 - kMostBitsOfK) return false;
        return p_.k <= int64_t(1) << kMostBitsOfK;
    }

    // Whether sums are still so small that the next part's exponents do not pass F: a shift to the unit's grid must not
    // be negative, lest it makes something of a zero.
    bool is_small(const Tile& sums) const {
        if (unit_.kind != kTruncated) return true;
        const Floats limit = Floats{} + std::ldexp(1.0f, unit_.fraction_bits - 1);  // products: at most 4 kPart = 2^9
        Ints beyond{};
        for (const auto& row : sums) {
            for (const Floats x : row) beyond |= (x > limit) | (x < -limit);
        }
        return !any(beyond);
    }

    // Whether c does so, too: zero, or with an exponent that is at least that of a group of zeros.
    bool c_fits(int64_t tile, int64_t panel) {
        if (!p_.c) return true;
        const int scale = this->scale(tile, panel);
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
    const bool aligned_;  // whether exponents matter
    Buffer<float> a_, b_;
    Buffer<int32_t> a_codes_, b_codes_;
    Buffer<Strip> rows_, columns_;
    Buffer<bool> left_;
    int64_t at_ = 0;
    std::atomic<bool> any_left_{false};
};

}  // namespace hal_sim
