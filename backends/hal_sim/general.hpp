// SPDX-License-Identifier: Apache-2.0
// The rules "truncated" and "floored" for vectors of columns and tiles of rows, of any finite operands, whatever their
// exponents.
//
// An operand is a significand of its format, a float of at most 12 bits, and an exponent. The product of two of them is
// exact in a float, so that shifting it to the unit's grid is a multiplication by a power of two, and cutting it off
// there the conversion to an integer. Sums of 16 of these fit an int32: 16 * 3.999 * 2^25 < 2^31.
#pragma once

#include "reference.hpp"
#include "strips.hpp"
#include "vectors.hpp"

namespace hal_sim {

constexpr int kZeroExponent = -4096;  // of an operand that is zero: never the largest
constexpr int kNoProduct = -1024;     // smaller than the exponent of any product but zero
constexpr int kTerms = 16;            // that an int32 holds

// Operands of one group: `significands[k][lane]` and `exponents[k][lane]` of the columns, `[k][row]` of the rows.
struct Operands {
    const float* a;
    const int32_t* a_exponents;
    const float* b;
    const int32_t* b_exponents;
};

inline void split(float x, int min_exponent, float* significand, int32_t* exponent) {
    const Number number(x, min_exponent);
    *significand = float(number.significand) * 0x1p-23f;
    *exponent = number.significand ? number.exponent : kZeroExponent;
}

// The largest exponent among products of k in [first, count), every `step`-th, for each row.
inline void largest(const Operands& in, int first, int step, int count, Ints exponent[kRows]) {
    for (int r = 0; r < kRows; ++r) exponent[r] = Ints{} + 2 * kZeroExponent;
    for (int k = first; k < count; k += step) {
        const Ints b = load<Ints>(in.b_exponents + k * kLanes);
        for (int r = 0; r < kRows; ++r) exponent[r] = larger(exponent[r], b + in.a_exponents[k * kRows + r]);
    }
}

// The sum of the products, each cut to a multiple of 2^(exponent - bits), in that unit.
inline void aligned_sum(const Operands& in, int first, int step, int count, int bits_kept, const Ints exponent[kRows],
                        Doubles sum[kRows]) {
    for (int r = 0; r < kRows; ++r) sum[r] = Doubles{};
    for (int start = first; start < count; start += kTerms * step) {
        Ints part[kRows] = {};
        const int end = count < start + kTerms * step ? count : start + kTerms * step;
        for (int k = start; k < end; k += step) {
            const Floats b = load<Floats>(in.b + k * kLanes);
            const Ints b_exponent = load<Ints>(in.b_exponents + k * kLanes) + (bits_kept + 127);
            for (int r = 0; r < kRows; ++r) {
                // Below 2^-60 all is cut off anyway, and zero comes out as zero.
                const Ints power = larger(b_exponent + in.a_exponents[k * kRows + r] - exponent[r], Ints{} + 67);
                part[r] += __builtin_convertvector(b * in.a[k * kRows + r] * floats(power << 23), Ints);
            }
        }
        for (int r = 0; r < kRows; ++r) sum[r] += __builtin_convertvector(part[r], Doubles);
    }
}

// The exponent of each c as float32 has it; what a zero's is, is for the caller to say.
inline Ints exponent_of(Floats c, int of_zero) {
    const Ints field = (bits(c) >> 23) & 0xff;
    const Ints magnitude = bits(c) & 0x7fffffff;
    return magnitude == 0 ? Ints{} + of_zero : larger(field, Ints{} + 1) - 127;
}

// Both return false where a product or the sum may be infinite, which is not for them to say: 2^120 times the 33 terms
// below 4 of the largest unit is below 2^128.
constexpr int kMostExponent = 120;

// Must run with rounding toward zero.
inline bool truncated(const Unit& unit, const Operands& in, int count, Floats c[kRows]) {
    Ints exponent[kRows];
    Doubles sum[kRows];
    largest(in, 0, 1, count, exponent);
    Ints zero[kRows], beyond{};
    const int floor = std::max(unit.exponent_floor, kNoProduct);
    for (int r = 0; r < kRows; ++r) {
        exponent[r] = larger(exponent[r], exponent_of(c[r], 2 * kZeroExponent));
        zero[r] = exponent[r] < kNoProduct;
        exponent[r] = larger(exponent[r], Ints{} + floor);
    }
    aligned_sum(in, 0, 1, count, unit.fraction_bits, exponent, sum);
    for (int r = 0; r < kRows; ++r) {
        const Ints scale = zero[r] ? Ints{} : exponent[r] - unit.fraction_bits;
        const Doubles addend = __builtin_convertvector(c[r], Doubles) * power_of_two(-scale);
        sum[r] += __builtin_convertvector(__builtin_convertvector(addend, Ints), Doubles);
        const Doubles value = sum[r] * power_of_two(scale);
        Ints kept = bits(__builtin_convertvector(value, Floats));  // toward zero
        if (unit.result == kFloat32With13Bits) kept &= ~0x3ff;
        c[r] = floats((kept & INT32_MAX) == 0 ? Ints{} : kept);  // no sum is -0
        beyond |= exponent[r] > kMostExponent;
    }
    return !any(beyond);
}

inline bool floored(const Unit& unit, const Operands& in, int count, Floats c[kRows]) {
    Ints exponent[kRows];
    Doubles sum[kRows];
    const int halves = unit.interleaved ? 2 : 1;
    largest(in, 0, halves, count, exponent);
    aligned_sum(in, 0, halves, count, unit.fraction_bits, exponent, sum);
    if (unit.interleaved) {
        Ints odd_exponent[kRows];
        Doubles odd_sum[kRows];
        largest(in, 1, 2, count, odd_exponent);
        aligned_sum(in, 1, 2, count, unit.fraction_bits, odd_exponent, odd_sum);
        for (int r = 0; r < kRows; ++r) {
            const Ints both = larger(exponent[r], odd_exponent[r]);
            // A half of nothing but zeros has the sum zero, however far it is shifted.
            sum[r] = rounded_down(sum[r] * power_of_two(larger(exponent[r] - both, Ints{} + kNoProduct + 24))) +
                     rounded_down(odd_sum[r] * power_of_two(larger(odd_exponent[r] - both, Ints{} + kNoProduct + 24)));
            exponent[r] = both;
        }
    }
    Ints beyond{};
    for (int r = 0; r < kRows; ++r) {
        const Ints of_c = exponent_of(c[r], -126);
        const Ints both = larger(exponent[r], of_c);
        const Ints down = larger(exponent[r] - both, Ints{} + kNoProduct + 24) + (31 - unit.fraction_bits);
        Doubles addend = rounded_down(__builtin_convertvector(c[r], Doubles) * power_of_two(24 - both));
        if (unit.interleaved) {
            addend = __builtin_convertvector(of_c < both - 25, Longs) ? Doubles{} : addend;
        }
        const Doubles value = (rounded_down(sum[r] * power_of_two(down)) + addend * 128) * power_of_two(both - 31);
        const Floats result = __builtin_convertvector(value, Floats);
        c[r] = exponent[r] < kNoProduct ? c[r] + 0.0f : result;
        beyond |= both > kMostExponent;
    }
    return !any(beyond);
}

}  // namespace hal_sim
