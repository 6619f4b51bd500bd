// SPDX-License-Identifier: Apache-2.0
// The rules "truncated" and "floored" for tiles of kRows rows and kColumns columns, on strips whose exponents are not
// too far apart. Everything here is scaled so that no exponent of a product is above 0.
//
// A product is exact in a float, its exponent is shifted by an integer addition, and the conversion to an integer is
// what the unit does: it cuts toward zero. The time goes into these four instructions for kLanes products: multiply,
// add, convert, add.
#pragma once

#include "tile.hpp"

namespace hal_sim {

// Vectors of columns that are summed side by side: as many as there are registers for sums and shifts.
#if defined(__AVX512F__)
constexpr int kWide = 2;
#else
constexpr int kWide = 1;
#endif

constexpr int kExponent = 0x7f800000;  // the bits of a float's exponent
constexpr int kOne = 1 << 23;          // of an exponent, in a float

using Sums = Ints[kRows][kWide];

// The largest exponent among products of k in [first, first + kGroup), every kStep-th, plus 127: one byte for each
// column, as in the codes of b.
template <int kGroup, int kStep = 1>
inline void largest(const Group& in, int first, Ints exponents[kRows]) {
    Bytes most[kRows];
    for (int r = 0; r < kRows; ++r) most[r] = (Bytes)(Ints{} + (kNothing + 2 * kBias) * 0x01010101);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; i += kStep) {
        const Ints b = load<Ints>(in.b_codes + (first + i) * kLanes);
        for (int r = 0; r < kRows; ++r) {
            most[r] = larger_bytes(most[r], (Bytes)(b + in.a_codes[(first + i) * kRows + r]));
        }
    }
    for (int r = 0; r < kRows; ++r) exponents[r] = (Ints)most[r] - (2 * kBias - 127) * 0x01010101;
}

// Byte q of each lane as the exponent of a float.
inline Ints exponent_at(Ints bytes, int q) { return (q == 3 ? bytes >> 1 : bytes << (23 - 8 * q)) & kExponent; }

// Adds the products of k in [first, first + kGroup), every kStep-th, of kWide vectors of columns from `column` on.
template <int kGroup, int kStep = 1>
inline void add_products(const Group& in, int first, int column, const Sums& shifts, Sums& sums) {
    Ints shift[kRows][kWide], sum[kRows][kWide];  // copies, since compilers keep them in registers then
    std::memcpy(shift, shifts, sizeof shift);
    std::memcpy(sum, sums, sizeof sum);
    for (int i = 0; i < kGroup; i += kStep) {
        const float* a = in.a + (first + i) * kRows;
        const float* b = in.b + (first + i) * kColumns + column;
        for (int r = 0; r < kRows; ++r) {
            for (int w = 0; w < kWide; ++w) {
                sum[r][w] += cut(floats(bits(load<Floats>(b + w * kLanes) * a[r]) + shift[r][w]));
                in_this_order(sum[r][w]);
            }
        }
    }
    std::memcpy(sums, sum, sizeof sum);
}

// c becomes c plus the products of all groups. kHalves is 2 where the sum of a group may leave the range of an int32. A
// half of truncated<32, 2> has 16 products, which fit with c in units of 2^-25 unless a strip is heavy, and none of FP8
// is: its significands are at most 1.875. Heavy ones of wider formats are not for it (kernel_of).
// Must run with rounding toward zero.
template <int kGroup, int kHalves>
void truncated(const Unit& unit, const Group& strips, int64_t k, int vectors, Tile& c) {
    const int fraction = unit.fraction_bits * kOne, kept = unit.result == kFloat32With13Bits ? ~0x3ff : ~0;
    for (int64_t start = 0; start < k; start += kGroup) {
        const Group in = strips.at(start);
        Ints exponents[kRows];
        largest<kGroup>(in, 0, exponents);
        for (int q = 0; q < vectors; q += kWide) {
            Sums shift, sum, other{};
            Ints exponent[kRows][kWide];
            for (int r = 0; r < kRows; ++r) {
                for (int w = 0; w < kWide; ++w) {
                    const Ints of_c = bits(c[r][q + w]) & kExponent;
                    exponent[r][w] = larger(exponent_at(exponents[r], q + w), of_c);
                    shift[r][w] = fraction + 127 * kOne - exponent[r][w];
                    sum[r][w] = cut(floats(bits(c[r][q + w]) + shift[r][w]));
                }
            }
            add_products<kGroup / kHalves>(in, 0, q * kLanes, shift, sum);
            if (kHalves == 2) add_products<kGroup / kHalves>(in, kGroup / kHalves, q * kLanes, shift, other);
            for (int r = 0; r < kRows; ++r) {
                for (int w = 0; w < kWide; ++w) {
                    Floats total = converted(sum[r][w]);
                    if (kHalves == 2) {
                        total = __builtin_convertvector(__builtin_convertvector(sum[r][w], Doubles) +
                                                            __builtin_convertvector(other[r][w], Doubles),
                                                        Floats);
                    }
                    const Floats unit_of_sum = floats(exponent[r][w] - fraction);
                    c[r][q + w] = floats(bits(total * unit_of_sum) & kept);
                }
            }
        }
    }
}

// A sum of products in units of 2^(of_sum - 24), and c: one rounded down to a multiple of 2^(E - 31), the other of
// 2^(E - 24), E being the larger exponent; their sum to nearest. In float64, where all of this fits.
[[gnu::noinline]] inline Floats floored_sum_in_float64(Ints sum, Ints of_sum, Floats c, bool interleaved) {
    const Ints field_of_c = (bits(c) & kExponent) >> 23, field = of_sum >> 23;
    const Ints both = larger(field, field_of_c);
    Doubles addend = rounded_down(__builtin_convertvector(c, Doubles) * power_of_two(24 + 127 - both));
    if (interleaved) addend = __builtin_convertvector(field_of_c < both - 25, Longs) ? Doubles{} : addend;
    const Doubles total = rounded_down(__builtin_convertvector(sum, Doubles) * power_of_two(field - both + 7));
    return __builtin_convertvector((total + addend * 128) * power_of_two(both - (127 + 31)), Floats);
}

// The same in integers, in units of 2^(of_sum - 24), or of 2^(E - 26) if that is larger. What the shift to these drops
// matters for the rounding only in whether there is any of it above 2^(E - 31): that is put into the last bit. At
// shifts above 31 the sum is so far below c that it does not matter at all.
template <bool kInterleaved>
inline Floats floored_sum(Ints sum, Ints of_sum, Floats c) {
    const Ints of_c = bits(c) & kExponent;
    const Ints both = larger(of_sum, of_c);
    const Ints of_unit = larger(of_sum, both - 2 * kOne);
    const Ints shift = smaller((of_unit - of_sum) >> 23, Ints{} + 31);
    const Ints dropped = (sum << (31 - shift)) & 0x7c000000;
    const Ints last_bit = dropped != 0 ? Ints{} + 1 : Ints{};
    Ints addend = floor_of(c * floats((24 + 127) * kOne - both + 127 * kOne));
    if (kInterleaved) addend = of_c < both - 25 * kOne ? Ints{} : addend;
    const Ints total = ((sum >> shift) | last_bit) + (addend << ((both - of_unit) >> 23));
    // Below 2^25 a last bit is no longer beyond the rounding.
    const Ints close = last_bit & ((Unsigned)(total + (1 << 25)) < 1u << 26);
    if (__builtin_expect(any(close), 0)) return floored_sum_in_float64(sum, of_sum, c, kInterleaved);
    return converted(total) * floats(of_unit - 24 * kOne);
}

// Must run with rounding to nearest.
template <int kGroup, bool kInterleaved>
void floored(const Unit&, const Group& strips, int64_t k, int vectors, Tile& c) {
    constexpr int kHalves = kInterleaved ? 2 : 1;
    for (int64_t start = 0; start < k; start += kGroup) {
        const Group in = strips.at(start);
        Ints exponents[kHalves][kRows];
        for (int half = 0; half < kHalves; ++half) largest<kGroup, kHalves>(in, half, exponents[half]);
        for (int q = 0; q < vectors; q += kWide) {
            Sums shift, sum[kHalves] = {};
            for (int half = 0; half < kHalves; ++half) {
                for (int r = 0; r < kRows; ++r) {
                    for (int w = 0; w < kWide; ++w) {
                        shift[r][w] = (24 + 127) * kOne - exponent_at(exponents[half][r], q + w);
                    }
                }
                add_products<kGroup, kHalves>(in, half, q * kLanes, shift, sum[half]);
            }
            for (int r = 0; r < kRows; ++r) {
                for (int w = 0; w < kWide; ++w) {
                    Ints exponent = exponent_at(exponents[0][r], q + w), total = sum[0][r][w];
                    if (kInterleaved) {
                        const Ints even = exponent, odd = exponent_at(exponents[kHalves - 1][r], q + w);
                        exponent = larger(even, odd);
                        total = (total >> smaller((exponent - even) >> 23, Ints{} + 31)) +
                                (sum[kHalves - 1][r][w] >> smaller((exponent - odd) >> 23, Ints{} + 31));
                    }
                    c[r][q + w] = floored_sum<kInterleaved>(total, exponent, c[r][q + w]);
                }
            }
        }
    }
}

}  // namespace hal_sim
