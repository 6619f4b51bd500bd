// SPDX-License-Identifier: Apache-2.0
// The rules "pairwise" and "fused", which are plain arithmetic, for tiles of kRows rows and kColumns columns.
#pragma once

#include "tile.hpp"

namespace hal_sim {

// Vectors of columns side by side: enough additions that do not wait for one another, in the registers that there are.
#if defined(__AVX512F__)
constexpr int kChains = 4;
#else
constexpr int kChains = 2;
#endif

// Whether the environment does what "pairwise" asks for: results and operands below 2^-126 are zeros of their sign.
#if defined(__x86_64__)
constexpr bool kFlushes = true;
#else
constexpr bool kFlushes = false;
#endif

inline Floats flushed(Floats x) {
    if (kFlushes) return x;
    const Ints small = (bits(x) & 0x7f800000) == 0;
    return floats(small ? bits(x) & INT32_MIN : bits(x));
}

// The sum of products of one row and one vector of columns: neighbours first.
template <int kWidth>
inline Floats sum_of_pairs(const float* a, const float* b) {
    if constexpr (kWidth == 1) {
        return flushed(load<Floats>(b) * *a);
    } else {
        constexpr int kHalf = kWidth / 2;
        return flushed(sum_of_pairs<kHalf>(a, b) + sum_of_pairs<kHalf>(a + kHalf * kRows, b + kHalf * kColumns));
    }
}

// The operands' subnormals are zeros already. Signs of zeros among the terms do not matter, since 0 is added to c, too:
// which is what the unit makes of -0. Must run in an environment that flushes, where there is one.
template <int kGroup>
void pairwise(const Unit&, const Group& in, int64_t k, int vectors, Tile& c) {
    for (int64_t start = 0; start < k; start += kGroup) {
        for (int q = 0; q < vectors; ++q) {
            for (int r = 0; r < kRows; ++r) {
                const Floats sum = sum_of_pairs<kGroup>(in.a + start * kRows + r, in.b + start * kColumns + q * kLanes);
                c[r][q] = flushed(flushed(c[r][q]) + 0.0f + sum);
            }
        }
    }
}

inline void fused_chain(const Unit&, const Group& in, int64_t k, int vectors, Tile& c) {
    for (int q = 0; q < vectors; q += kChains) {
        Floats sum[kRows][kChains];
        for (int r = 0; r < kRows; ++r) {
            for (int w = 0; w < kChains; ++w) sum[r][w] = c[r][q + w];
        }
        for (int64_t i = 0; i < k; ++i) {
            for (int r = 0; r < kRows; ++r) {
                for (int w = 0; w < kChains; ++w) {
                    const Floats b_i = load<Floats>(in.b + i * kColumns + (q + w) * kLanes);
                    sum[r][w] = fused(b_i, all(in.a[i * kRows + r]), sum[r][w]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int w = 0; w < kChains; ++w) c[r][q + w] = sum[r][w];
        }
    }
}

}  // namespace hal_sim
