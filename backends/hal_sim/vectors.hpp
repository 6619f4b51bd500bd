// SPDX-License-Identifier: Apache-2.0
// Vectors of the width that the processor has, in the compiler's own notation, and its floating-point environment.
#pragma once

#include <cfenv>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hal_sim {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(8 * kLanes)));

inline Ints bits(Floats x) { return (Ints)x; }
inline Floats floats(Ints x) { return (Floats)x; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Doubles doubles(Longs x) { return (Doubles)x; }

inline bool any(Ints mask) {
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= mask[i];
    return all != 0;
}

// 2^exponent, for normal doubles.
inline Doubles power_of_two(Ints exponent) {
    return doubles((__builtin_convertvector(exponent, Longs) + 1023) << 52);
}

// For magnitudes below 2^51, while rounding is to nearest.
inline Doubles rounded_down(Doubles x) {
    const Doubles nearest = (x + 0x1.8p52) - 0x1.8p52;
    return nearest > x ? nearest - 1.0 : nearest;
}

// Subnormals are kept, whatever the calling thread has asked for, and rounding is as asked for here.
class Environment {
public:
    explicit Environment(int rounding) {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);  // no flushing to zero, neither on x86 nor on ARM
        std::fesetround(rounding);
    }
    ~Environment() { std::fesetenv(&before_); }
    Environment(const Environment&) = delete;
    Environment& operator=(const Environment&) = delete;

private:
    std::fenv_t before_;
};

}  // namespace hal_sim
