// SPDX-License-Identifier: Apache-2.0
// Vectors of the width that the processor has, in the compiler's own notation, and its floating-point environment.
#pragma once

#include <cfenv>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hal_sim {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(8 * kLanes)));

// Sums and shifts of Ints pass the sign bit, which is undefined without -fwrapv (build.py): the fourth of the codes
// that are added at a time lies there, and a zero's exponent is shifted to no matter where.
inline Ints bits(Floats x) { return (Ints)x; }
inline Floats floats(Ints x) { return (Floats)x; }
inline Floats converted(Ints x) { return __builtin_convertvector(x, Floats); }  // as the environment rounds
inline Ints cut(Floats x) { return __builtin_convertvector(x, Ints); }          // toward zero
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Bytes larger_bytes(Bytes a, Bytes b) { return a > b ? a : b; }
inline Floats all(float x) { return x - Floats{}; }  // 0 + x would make 0 of -0, and be an instruction

template <class Vector>
Vector load(const void* from) {  // which may lie anywhere
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class Vector>
void store(Vector x, void* to) {
    std::memcpy(to, &x, sizeof x);
}
inline Doubles doubles(Longs x) { return (Doubles)x; }

// Four numbers, whatever the processor's width.
typedef float Four __attribute__((vector_size(16)));

template <int kFirst, int kSecond, int kThird, int kFourth>
Four picked(Four x, Four y) {  // of the eight
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, y, kFirst, kSecond, kThird, kFourth);
#else
    typedef int32_t Places __attribute__((vector_size(16)));
    return __builtin_shuffle(x, y, Places{kFirst, kSecond, kThird, kFourth});
#endif
}

inline void transpose(Four (&x)[4]) {
    const Four front = picked<0, 4, 1, 5>(x[0], x[1]), back = picked<2, 6, 3, 7>(x[0], x[1]);
    const Four other_front = picked<0, 4, 1, 5>(x[2], x[3]), other_back = picked<2, 6, 3, 7>(x[2], x[3]);
    x[0] = picked<0, 1, 4, 5>(front, other_front);
    x[1] = picked<2, 3, 6, 7>(front, other_front);
    x[2] = picked<0, 1, 4, 5>(back, other_back);
    x[3] = picked<2, 3, 6, 7>(back, other_back);
}

inline bool any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= mask[i];
    return all != 0;
#endif
}

// No instruction: it keeps the compiler from reordering a chain of additions, which would take more registers than
// there are.
template <class Vector>
void in_this_order(Vector& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// The largest integer that is not above x.
inline Ints floor_of(Floats x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvt_roundps_epi32((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return cut((Floats)_mm256_floor_ps((__m256)x));
#else
    const Ints toward_zero = cut(x);
    return toward_zero + (converted(toward_zero) > x);
#endif
}

inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
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
    explicit Environment(int rounding, bool flush = false) {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);  // no flushing to zero, neither on x86 nor on ARM
        std::fesetround(rounding);
#if defined(__x86_64__)
        if (flush) _mm_setcsr(_mm_getcsr() | 0x8040);  // results and operands
#endif
    }
    ~Environment() { std::fesetenv(&before_); }
    Environment(const Environment&) = delete;
    Environment& operator=(const Environment&) = delete;

private:
    std::fenv_t before_;
};

}  // namespace hal_sim
