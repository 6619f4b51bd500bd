// SPDX-License-Identifier: Apache-2.0
// Operands as the fast kernels read them: strips of kRows rows of a or kColumns columns of b, all of k after another.
//
// A strip is scaled by a power of two so that its largest exponent is 0. Beside every number lies a code of its
// exponent, one byte; the code of a product is the sum of two, which is never above 190, so that four of them are added
// at a time in 32 bits. Zero has the code 0: its products have none above that of kNothing. Strips with exponents below
// kLeast are not for the fast kernels.
#pragma once

#include <cstring>

#include "reference.hpp"
#include "stored.hpp"
#include "vectors.hpp"

namespace hal_sim {

constexpr int kRows = 4;
constexpr int kColumns = 4 * kLanes;  // one register of codes
constexpr int kBias = 95;             // the code of exponent 0
constexpr int kLeast = -44;           // of a number's exponents, so that those of products go down to -88
// Stands for the exponent of a group whose products are all zero. Then c must come out as it was: its last bit is at
// least 2^(-88 - 31), and "floored" keeps 24 bits below -95. And a zero
// whose exponent is shifted by 95 + F stays below 1.
constexpr int kNothing = -95;

// What is known about a strip: exponents are those of its numbers other than zero, before they are scaled.
struct Strip {
    int highest = 0, lowest = 0;
    bool special = false;  // there is a NaN or an infinity
    bool wide = false;     // exponents more than -kLeast apart
    bool heavy = false;    // so many significands near 2 that sums of 16 products and c do not fit an int32
};

// Copies `count` lines of `k` numbers to to[k][kWidth] and fills it up with zeros.
template <int kWidth, class Stored>
void gather(Stored from, int64_t stride, int64_t k_stride, int count, int64_t k, int64_t padded, float* to) {
    constexpr int64_t kBlock = 16;  // of k: the lines of to[] that are written to stay in the cache
    const int64_t filled = count < kWidth ? 0 : k;
    std::memset(to + filled * kWidth, 0, size_t(padded - filled) * kWidth * sizeof(float));
    if (stride == 1) {
        const int fours = count / 4 * 4;
        for (int64_t i = 0; i < k; ++i) {
            const int64_t at = i * k_stride;
            // A number of steps that the compiler knows is unrolled.
            if (count == kWidth) {
                for (int line = 0; line < kWidth; line += 4) store(from.four(at + line), to + i * kWidth + line);
                continue;
            }
            for (int line = 0; line < fours; line += 4) store(from.four(at + line), to + i * kWidth + line);
            for (int line = fours; line < count; ++line) to[i * kWidth + line] = from.one(at + line);
        }
        return;
    }
    for (int64_t first = 0; first < k; first += kBlock) {
        const int64_t last = std::min(k, first + kBlock);
        int line = 0;
        for (; k_stride == 1 && last - first == kBlock && line + 4 <= count; line += 4) {
            for (int64_t i = first; i < last; i += 4) {
                Four block[4];
                for (int r = 0; r < 4; ++r) block[r] = from.four((line + r) * stride + i);
                transpose(block);
                for (int r = 0; r < 4; ++r) store(block[r], to + (i + r) * kWidth + line);
            }
        }
        for (; line < count; ++line) {
            for (int64_t i = first; i < last; ++i) to[i * kWidth + line] = from.one(line * stride + i * k_stride);
        }
    }
}

// The field of the exponent in a float, raised to that of the format's subnormals.
inline Ints field_of(Ints magnitude, int min_exponent) {
    return larger(magnitude >> 23, Ints{} + (min_exponent + 127));
}

// Scans `size` gathered numbers.
inline Strip scanned(const float* from, int64_t size, int min_exponent) {
    Ints largest{}, least = Ints{} + INT32_MAX;
    for (int64_t i = 0; i < size; i += kLanes) {
        const Ints magnitude = load<Ints>(from + i) & INT32_MAX;
        largest = larger(largest, magnitude);
        least = smaller(least, magnitude == 0 ? Ints{} + INT32_MAX : magnitude);
    }
    largest = largest == 0 ? Ints{} : field_of(largest, min_exponent);
    least = least == INT32_MAX ? least : field_of(least, min_exponent);
    int highest = 0, lowest = INT32_MAX;
    for (int i = 0; i < kLanes; ++i) {
        highest = std::max(highest, largest[i]);
        lowest = std::min(lowest, least[i]);
    }
    Strip strip;
    if (highest == 0) return strip;  // nothing but zeros
    strip.special = highest == 255;
    strip.highest = highest - 127;
    strip.lowest = lowest - 127;
    strip.wide = lowest - highest < kLeast;
    return strip;
}

// Scales numbers in place and returns the codes of their exponents. This is exact in strips that the kernels read. In
// others, which are wide or special, numbers may be lost and codes be none.
inline Ints scaled(float* at, const Strip& strip, float scale, int min_exponent) {
    const Floats x = load<Floats>(at);
    const Ints magnitude = bits(x) & INT32_MAX;
    store(x * scale, at);
    return magnitude == 0 ? Ints{} : field_of(magnitude, min_exponent) - (127 + strip.highest - kBias);
}

// Scales a gathered strip of a and writes the codes, each of them four times.
inline Strip code_rows(float* values, int64_t padded, int min_exponent, int32_t* codes) {
    const Strip strip = scanned(values, padded * kRows, min_exponent);
    const float scale = std::ldexp(1.0f, -strip.highest);
    for (int64_t i = 0; i < padded * kRows; i += kLanes) {
        store(scaled(values + i, strip, scale, min_exponent) * 0x01010101, codes + i);
    }
    return strip;
}

// Scales a gathered strip of b and writes the codes: byte q of lane j is that of column kLanes q + j.
inline Strip code_columns(float* values, int64_t padded, int min_exponent, int32_t* codes) {
    const Strip strip = scanned(values, padded * kColumns, min_exponent);
    const float scale = std::ldexp(1.0f, -strip.highest);
    for (int64_t i = 0; i < padded; ++i) {
        Ints code{};
        for (int q = 0; q < 4; ++q) {
            code |= scaled(values + i * kColumns + q * kLanes, strip, scale, min_exponent) << (8 * q);
        }
        store(code, codes + i * kLanes);
    }
    return strip;
}

// Whether 16 products and c may leave the range of an int32 in units of 2^-25: for that the products' significands have
// to sum up to 62, and so those of a, times 2, which is more than any of b. Sums of fewer than 16, lane by lane, are
// simpler to take and nearly as telling.
inline bool is_heavy(const float* values, int64_t padded) {
    constexpr int kAtOnce = kLanes / kRows;  // values of k in a vector
    for (int64_t i = 0; i < padded * kRows; i += 16 * kRows) {
        Floats sum{};
        for (int part = 0; part < 16 * kRows; part += kLanes) {
            sum += floats((load<Ints>(values + i + part) & 0x7fffff) | 0x3f800000);
        }
        if (any(sum > 31.0f / kAtOnce)) return true;
    }
    return false;
}

}  // namespace hal_sim
