// SPDX-License-Identifier: Apache-2.0
// The compiled core where memory, or a number's range, ends. test_failures.py compiles it and calls it with the name of
// a check, which ends with status 0 if all is well.
#include "matrix_unit.cpp"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>

static std::atomic<long> left{-1};  // allocations until one fails

void* operator new(size_t size) {
    if (left >= 0 && left-- == 0) throw std::bad_alloc();
    void* found = std::malloc(size);
    if (!found) throw std::bad_alloc();
    return found;
}
void operator delete(void* at) noexcept { std::free(at); }
void operator delete(void* at, size_t) noexcept { std::free(at); }

constexpr int kSize = 256;
static float a[kSize * kSize], b[kSize * kSize], d[kSize * kSize];
static double x[kSize * kSize], y[kSize * kSize], z[kSize * kSize];

static Problem square() {
    constexpr int64_t n = kSize, all = n * n;
    return {1, n, n, n, {a, nullptr, 0, all, n, 1}, {b, nullptr, 0, all, n, 1}, nullptr, d, 0, 0, 0, all, n};
}

static Problem of_one_number(int64_t m, int64_t k) {  // all strides are 0: only packed copies need memory
    return {1, m, 1, k, {a, nullptr, 0, 0, 0, 0}, {b, nullptr, 0, 0, 0, 0}, nullptr, d, 0, 0, 0, m, 1};
}

static int call(int function) {
    const Unit unit{hal_sim::kTruncated, 16, 25, 0, -133, 0, -126, -126};
    const Problem problem = square();
    if (function == 0) return hal_sim_multiply(&unit, &problem, 4);
    if (function == 1) return hal_sim_reference(&unit, &problem, 4);
    const int64_t halves[][2] = {{0, kSize / 2}, {kSize / 2, kSize / 2}};
    if (function == 2) return hal_sim_multiply_groups(&unit, &problem, halves, 2, true, 4);
    return hal_sim_fused_float64(kSize, 64, 64, x, y, z, 4);
}

// Whichever allocation fails, the call returns, with a product or without memory.
static int any_allocation() {
    int wrong = 0;
    for (int function = 0; function < 4; ++function) {
        for (long failing = 0; failing < 10; ++failing) {
            const pid_t child = fork();
            if (!child) {
                left = failing;
                _exit(call(function) & ~1);
            }
            int status = -1;
            waitpid(child, &status, 0);
            if (status) std::printf("function %d, allocation %ld: status %d\n", function, failing, status);
            wrong += status != 0;
        }
    }
    return wrong;
}

// What earlier products have left in the pool is given back before a later one is refused.
static int pool() {
    const Unit unit{hal_sim::kFused, 1, 0, 0, INT_MIN, 0, -126, -126};
    for (int64_t k : {1 << 15, 1 << 16, 3 << 15}) {
        const Problem warm = of_one_number(4, k);
        if (hal_sim_multiply(&unit, &warm, 1)) return 1;
    }
    rlimit limit{size_t(104) << 20, size_t(104) << 20};  // of which the product needs 80, and 16 at most
    setrlimit(RLIMIT_DATA, &limit);
    const Problem problem = of_one_number(320, 1 << 16);
    return hal_sim_multiply(&unit, &problem, 1);
}

// Sizes beyond 64 bits are no memory, not a little of it.
static int sizes() {
    const Unit unit{hal_sim::kFused, 1, 0, 0, INT_MIN, 0, -126, -126};
    int wrong = 0;
    for (int m : {1, 64}) {
        for (int power = 48; power < 63; ++power) {
            for (int64_t off : {-1, 0, 1}) {
                const Problem problem = of_one_number(m, (int64_t(1) << power) + off);
                wrong += hal_sim_multiply(&unit, &problem, 1) != 1;
            }
        }
    }
    const Problem longest = of_one_number(1, INT64_MAX);
    return wrong + (hal_sim_multiply(&unit, &longest, 1) != 1);
}

// Zero has no exponent, whatever the format's least one.
static int zero() {
    for (int least : {-149, -126, 0, 127}) {
        const hal_sim::Number plus(0.0f, least), minus(-0.0f, least);
        if (plus.significand || minus.significand || plus.exponent != least || minus.exponent != least) return 1;
    }
    return 0;
}

int main(int, char** arguments) {
    const std::string name = arguments[1];
    for (int i = 0; i < kSize * kSize; ++i) a[i] = b[i] = 1, x[i] = y[i] = z[i] = 1;
    if (name == "any allocation") return any_allocation() != 0;
    if (name == "pool") return pool() != 0;
    if (name == "sizes") return sizes() != 0;
    if (name == "zero") return zero() != 0;
    return 2;
}
