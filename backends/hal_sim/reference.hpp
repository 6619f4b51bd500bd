// SPDX-License-Identifier: Apache-2.0
// The arithmetic of hal/matrix_unit.py, one dot product at a time and as plainly as it is written there. Everything
// faster is held against it, and hands it what does not fit: NaN, infinities, exponents too far apart.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hal_sim {

enum Kind : int32_t { kTruncated, kFloored, kPairwise, kFused };
enum Result : int32_t { kFloat32, kFloat32With13Bits, kFloat16 };

struct Unit {
    int32_t kind, group, fraction_bits, result;
    int32_t exponent_floor;  // INT_MIN: none
    int32_t interleaved;
    int32_t min_exponent_a, min_exponent_b;  // of the formats of the operands
};

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// A finite float as significand 2^(exponent - 23), the exponent being at least that of the format's subnormals.
struct Number {
    int64_t significand;
    int exponent;

    Number(float x, int min_exponent) : significand(0), exponent(min_exponent) {
        const uint32_t bits = bits_of(x);
        const int field = (bits >> 23) & 0xff;
        int64_t magnitude = bits & 0x7fffff;
        if (!field && !magnitude) return;
        int found = -126;
        if (field) {
            magnitude |= 1 << 23;
            found = field - 127;
        }
        if (magnitude && found > min_exponent) {  // float32's own subnormals are those of every format with 8 bits
            exponent = found;
        } else {
            magnitude >>= std::min(min_exponent - found, 63);  // exact: x is a number of the format
        }
        significand = bits >> 31 ? -magnitude : magnitude;
    }
};

inline int64_t shifted_toward_zero(int64_t value, int right) {
    if (right < 0) return value * (int64_t(1) << -right);
    if (right > 62) return 0;
    return value < 0 ? -(-value >> right) : value >> right;
}

inline int64_t shifted_down(int64_t value, int right) {
    if (right < 0) return value * (int64_t(1) << -right);
    return value >> std::min(right, 63);
}

// A multiple of a power of two that a double holds exactly, as the unit puts it out.
inline float rounded(double value, int result) {
    const double magnitude = std::fabs(value);
    if (magnitude == 0) return 0.0f;
    double kept;
    if (result == kFloat16) {
        const double ulp = std::ldexp(1.0, std::max(std::ilogb(magnitude), -14) - 10);
        kept = std::nearbyint(magnitude / ulp) * ulp;
        if (kept >= 65536.0) kept = INFINITY;
    } else {
        const int fraction = result == kFloat32 ? 23 : 13;
        const double ulp = std::ldexp(1.0, std::max(std::ilogb(magnitude), -126) - fraction);
        kept = std::trunc(magnitude / ulp) * ulp;
        if (kept >= 0x1p128) kept = INFINITY;
    }
    if (kept == 0) return 0.0f;
    return static_cast<float>(value < 0 ? -kept : kept);
}

// The one NaN that the unit puts out: 0x7fffffff is NVIDIA's. Plain arithmetic on a CPU would have others, of which the
// operands and the kind of processor decide.
inline float nan_of(const Unit& unit) {
    if (unit.kind != kTruncated) return float_of(0x7fc00000);
    return float_of(unit.result == kFloat16 ? 0x7fffe000 : 0x7fffffff);
}

// What a sum with NaN or infinities among its terms is. Returns whether there are any.
template <class A, class B>
bool is_special(const Unit& unit, A a, B b, int count, float c, float* d) {
    bool special = !std::isfinite(c), nan = std::isnan(c);
    bool up = special && !nan && c > 0, down = special && !nan && c < 0;
    for (int k = 0; k < count; ++k) {
        const double product = double(a(k)) * double(b(k));
        const bool beyond = unit.kind == kFloored && std::fabs(product) >= 0x1p128;
        if (std::isfinite(product) && !beyond) continue;
        special = true;
        nan |= std::isnan(product);
        up |= product > 0;
        down |= product < 0;
    }
    if (!special) return false;
    if (nan || (up && down)) {
        *d = nan_of(unit);
    } else {
        *d = up ? INFINITY : -INFINITY;
    }
    return true;
}

// The products from `first`, every `step`-th, aligned to their largest exponent and cut to `fraction_bits`.
struct Aligned {
    int64_t sum = 0;
    int exponent = INT_MIN;  // all products are zero

    template <class A, class B>
    Aligned(const Unit& unit, A a, B b, int first, int step, int count) {
        for (int k = first; k < count; k += step) {
            if (a(k) == 0 || b(k) == 0) continue;
            exponent = std::max(exponent, Number(a(k), unit.min_exponent_a).exponent +
                                              Number(b(k), unit.min_exponent_b).exponent);
        }
        if (exponent != INT_MIN) add(unit, a, b, first, step, count);
    }

    template <class A, class B>
    void add(const Unit& unit, A a, B b, int first, int step, int count) {
        for (int k = first; k < count; k += step) {
            if (a(k) == 0 || b(k) == 0) continue;
            const Number x(a(k), unit.min_exponent_a), y(b(k), unit.min_exponent_b);
            sum += shifted_toward_zero(x.significand * y.significand,
                                       46 - unit.fraction_bits + exponent - x.exponent - y.exponent);
        }
    }
};

template <class A, class B>
float truncated(const Unit& unit, A a, B b, int count, float c) {
    Aligned terms(unit, a, b, 0, 1, count);
    const Number addend(c, -126);
    const int of_products = terms.exponent;
    if (addend.significand) terms.exponent = std::max(terms.exponent, addend.exponent);
    if (terms.exponent == INT_MIN) return 0.0f;
    terms.exponent = std::max(terms.exponent, unit.exponent_floor);
    if (terms.exponent != of_products) {
        terms.sum = 0;
        terms.add(unit, a, b, 0, 1, count);
    }
    terms.sum += shifted_toward_zero(addend.significand, 23 - unit.fraction_bits + terms.exponent - addend.exponent);
    return rounded(std::ldexp(double(terms.sum), terms.exponent - unit.fraction_bits), unit.result);
}

template <class A, class B>
float floored(const Unit& unit, A a, B b, int count, float c) {
    Aligned products(unit, a, b, 0, unit.interleaved ? 2 : 1, count);
    if (unit.interleaved) {
        const Aligned odd(unit, a, b, 1, 2, count);
        if (products.exponent == INT_MIN) {
            products = odd;
        } else if (odd.exponent != INT_MIN) {
            const int both = std::max(products.exponent, odd.exponent);
            products.sum = shifted_down(products.sum, both - products.exponent) +
                           shifted_down(odd.sum, both - odd.exponent);
            products.exponent = both;
        }
    }
    if (products.exponent == INT_MIN) return c + 0.0f;
    const Number addend(c, -126);
    const int exponent = std::max(products.exponent, addend.exponent);
    int64_t sum = shifted_down(products.sum, unit.fraction_bits - 31 + exponent - products.exponent);
    if (!unit.interleaved || addend.exponent >= exponent - 25) {
        sum += shifted_down(addend.significand, exponent - addend.exponent - 1) * 128;
    }
    return static_cast<float>(std::ldexp(double(sum), exponent - 31));
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <class A, class B>
float pairwise(const Unit& unit, A a, B b, int first, int width, int count) {
    if (width > 1) {
        const int half = width / 2;
        return flushed(pairwise(unit, a, b, first, half, count) + pairwise(unit, a, b, first + half, half, count));
    }
    if (first >= count) return 0.0f;
    const float x = a(first), y = b(first);
    const float least_x = std::ldexp(1.0f, unit.min_exponent_a), least_y = std::ldexp(1.0f, unit.min_exponent_b);
    return flushed(std::fma(std::fabs(x) < least_x ? 0.0f : x, std::fabs(y) < least_y ? 0.0f : y, 0.0f));
}

// One step of the unit: c and the products of at most `unit.group` pairs. `a` and `b` return the operands of k.
template <class A, class B>
float step(const Unit& unit, A a, B b, int count, float c) {
    float d;
    switch (unit.kind) {
        case kTruncated:
            return is_special(unit, a, b, count, c, &d) ? d : truncated(unit, a, b, count, c);
        case kFloored:
            return is_special(unit, a, b, count, c, &d) ? d : floored(unit, a, b, count, c);
        case kPairwise:
            return flushed((std::fabs(c) < 0x1p-126f ? 0.0f : c) + pairwise(unit, a, b, 0, unit.group, count));
        default:
            return std::fma(a(0), b(0), c);
    }
}

// One element: rows and columns may lie with any stride.
inline float dot(const Unit& unit, const float* a, int64_t stride_a, const float* b, int64_t stride_b, int64_t count,
                 float c) {
    for (int64_t k = 0; k < count; k += unit.group) {
        const int left = int(std::min<int64_t>(unit.group, count - k));
        c = step(
            unit, [=](int i) { return a[(k + i) * stride_a]; }, [=](int i) { return b[(k + i) * stride_b]; }, left, c);
    }
    return std::isnan(c) ? nan_of(unit) : c;
}

}  // namespace hal_sim
