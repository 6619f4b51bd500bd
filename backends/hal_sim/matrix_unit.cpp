// SPDX-License-Identifier: Apache-2.0
// d = c + a b as a matrix unit computes it, for matrices and batches of them. Compiled at first use (build.py).
#include <limits>

#include "general_tiles.hpp"
#include "groups.hpp"
#include "problem.hpp"
#include "reference.hpp"
#include "tiles.hpp"
#include "workers.hpp"

namespace hal_sim {

// A matrix by all threads: first all pieces of the operands, then all of the product.
template <class Matrix>
void together(Matrix& matrix, int64_t threads) {
    std::atomic<int64_t> next_piece{0}, packed{0}, next_task{0};
    on_threads(std::min(threads, std::max(matrix.pieces(), matrix.tasks())), [&] {
        const Environment environment = matrix.environment();
        for (int64_t i; (i = next_piece++) < matrix.pieces(); ++packed) matrix.pack(i);
        while (packed < matrix.pieces()) std::this_thread::yield();
        for (int64_t i; (i = next_task++) < matrix.tasks();) matrix.multiply(i);
    });
}

void one_matrix(const Unit& unit, const Problem& problem, Tiles& tiles, int64_t at, int64_t threads) {
    tiles.start(at);
    together(tiles, threads);
    if (!tiles.any_left()) return;
    GeneralTiles rest(unit, problem, tiles, at);
    together(rest, threads);
}

// How many threads are worth it: one costs as much to wake as about this many products.
int64_t threads_for(double products, int64_t threads) {
    constexpr double kWorthAThread = 1 << 22;
    return std::min(threads, 1 + int64_t(products / kWorthAThread));
}

void multiply(const Unit& unit, const Problem& problem, int64_t threads) {
    threads = threads_for(problem.products(), threads);
    if (problem.batch < 4 * threads && threads > 1) {
        Tiles tiles(unit, problem);
        for (int64_t at = 0; at < problem.batch; ++at) one_matrix(unit, problem, tiles, at, threads);
        return;
    }
    std::atomic<int64_t> next{0};
    on_threads(threads, [&] {
        Tiles tiles(unit, problem);
        for (int64_t at; (at = next++) < problem.batch;) one_matrix(unit, problem, tiles, at, 1);
    });
}

void multiply_groups(const Unit& unit, const Groups& groups, int64_t threads) {
    double products = 0;
    for (int64_t i = 0; i < groups.count; ++i) products += groups[i].products();
    threads = threads_for(products, threads);
    const bool few = groups.count < 4 * threads && threads > 1;
    std::atomic<int64_t> next{0};
    on_threads(few ? 1 : threads, [&] {
        for (int64_t i; (i = next++) < groups.count;) {
            const Problem problem = groups[i];
            if (problem.m == 0 || problem.n == 0) continue;
            if (problem.k == 0) {
                std::memset(problem.d, 0, size_t(problem.m * problem.d_row) * sizeof(float));
                continue;
            }
            Tiles tiles(unit, problem);
            one_matrix(unit, problem, tiles, 0, few ? threads_for(problem.products(), threads) : 1);
        }
    });
}

void by_reference(const Unit& unit, const Problem& problem, int threads) {
    in_parallel(threads, problem.batch * problem.m, [&](int64_t row) {
        for (int64_t j = 0; j < problem.n; ++j) problem.by_reference(unit, row / problem.m, row % problem.m, j);
    });
}

void fused_float64(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* d, int threads) {
    in_parallel(threads, m, [=](int64_t i) {
        for (int64_t l = 0; l < k; ++l) {
            for (int64_t j = 0; j < n; ++j) d[i * n + j] = __builtin_fma(a[i * k + l], b[l * n + j], d[i * n + j]);
        }
        for (int64_t j = 0; j < n; ++j) {
            if (std::isnan(d[i * n + j])) d[i * n + j] = std::numeric_limits<double>::quiet_NaN();  // see nan_of
        }
    });
}

// Returns 0, or 1 if there is no memory: nothing may be thrown at a caller that is not C++.
template <class Work>
int status_of(Work work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace hal_sim

using hal_sim::Problem;
using hal_sim::Unit;

// A chain of fused multiply-adds in float64: d [m, n] holds c, all matrices are contiguous.
extern "C" int hal_sim_fused_float64(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* d,
                                     int threads) {
    return hal_sim::status_of([=] { hal_sim::fused_float64(m, n, k, a, b, d, threads); });
}

extern "C" int hal_sim_reference(const Unit* unit, const Problem* problem, int threads) {
    return hal_sim::status_of([=] { hal_sim::by_reference(*unit, *problem, threads); });
}

// The groups' rows of d must lie one after the other.
extern "C" int hal_sim_multiply_groups(const Unit* unit, const Problem* whole, const int64_t (*parts)[2], int64_t count,
                                       int of_rows, int threads) {
    return hal_sim::status_of([=] {
        hal_sim::multiply_groups(*unit, {*whole, parts, count, of_rows != 0}, threads);
    });
}

extern "C" int hal_sim_multiply(const Unit* unit, const Problem* problem, int threads) {
    return hal_sim::status_of([=] {
        if (unit->result == hal_sim::kFloat16) {  // of an instruction that no library's product uses
            hal_sim::by_reference(*unit, *problem, threads);
        } else {
            hal_sim::multiply(*unit, *problem, threads);
        }
    });
}
