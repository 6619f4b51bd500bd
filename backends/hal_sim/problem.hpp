// SPDX-License-Identifier: Apache-2.0
// What is asked for: matrices in memory; and threads to compute with.
#pragma once

#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "reference.hpp"
#include "stored.hpp"
#include "vectors.hpp"

namespace hal_sim {

// `batch` matrices. c may be null, which is zero, and has any strides, in elements; d is d[i * d_row + j].
struct Problem {
    int64_t batch, m, n, k;
    Operand a, b;
    const float* c;
    float* d;
    int64_t c_batch, c_row, c_column;
    int64_t d_batch, d_row;

    float c_at(int64_t at, int64_t i, int64_t j) const {
        return c ? c[at * c_batch + i * c_row + j * c_column] : 0.0f;
    }
    float& d_at(int64_t at, int64_t i, int64_t j) const { return d[at * d_batch + i * d_row + j]; }

    // One element of operands in float32, as plainly as can be.
    void by_reference(const Unit& unit, int64_t at, int64_t i, int64_t j) const {
        const float* row = static_cast<const float*>(a.data) + at * a.batch + i * a.row;
        const float* column = static_cast<const float*>(b.data) + at * b.batch + j * b.column;
        d_at(at, i, j) = dot(unit, row, a.column, column, b.row, k, c_at(at, i, j));
    }
};

// Calls `work` once on each of `threads` threads, the caller's among them, or on fewer if there are no more.
//
// Throws std::bad_alloc if one of them does, after all have ended.
template <class Work>
void on_threads(int64_t threads, Work work) {
    std::atomic<bool> failed{false};
    auto guarded = [&] {
        try {
            work();
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    try {
        if (threads > 1) others.reserve(size_t(threads - 1));
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(guarded);
    } catch (const std::system_error&) {  // the process may have no more
    } catch (const std::bad_alloc&) {     // nor memory for one: those that run must not be left alone
    }
    guarded();
    for (auto& other : others) other.join();
    if (failed) throw std::bad_alloc();
}

// Calls `work(i)` for every i below `count`, with rounding to nearest.
template <class Work>
void in_parallel(int threads, int64_t count, Work work) {
    std::atomic<int64_t> next{0};
    on_threads(std::min<int64_t>(threads, count), [&] {
        const Environment environment(FE_TONEAREST);
        for (int64_t i; (i = next++) < count;) work(i);
    });
}

}  // namespace hal_sim
