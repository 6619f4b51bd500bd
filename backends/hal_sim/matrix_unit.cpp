// SPDX-License-Identifier: Apache-2.0
// d = c + a b as a matrix unit computes it, for matrices and batches of them. Compiled at first use (build.py).
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "general.hpp"
#include "reference.hpp"
#include "vectors.hpp"

namespace hal_sim {

// `batch` matrices with any strides, in elements. c may be null, which is zero; d is d[i * d_row + j].
struct Problem {
    int64_t batch, m, n, k;
    const float *a, *b, *c;
    float* d;
    int64_t a_batch, a_row, a_column;
    int64_t b_batch, b_row, b_column;
    int64_t c_batch, c_row, c_column;
    int64_t d_batch, d_row;

    float c_at(int64_t batch_index, int64_t i, int64_t j) const {
        return c ? c[batch_index * c_batch + i * c_row + j * c_column] : 0.0f;
    }
};

template <class T>
class Buffer {
public:
    explicit Buffer(size_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* at(size_t index) { return data_ + index; }

private:
    T* data_;
};

// Calls `work(i)` for every i below `count`, on `threads` threads, each with the environment that the rule needs.
template <class Work>
void in_parallel(int threads, int64_t count, int rounding, Work work) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        const Environment environment(rounding);
        for (int64_t i; (i = next++) < count;) work(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) others.emplace_back(loop);
    loop();
    for (auto& other : others) other.join();
}

void by_reference(const Unit& unit, const Problem& p, int threads) {
    in_parallel(threads, p.batch * p.m, FE_TONEAREST, [&](int64_t row) {
        const int64_t at = row / p.m, i = row % p.m;
        for (int64_t j = 0; j < p.n; ++j) {
            p.d[at * p.d_batch + i * p.d_row + j] =
                dot(unit, p.a + at * p.a_batch + i * p.a_row, p.a_column, p.b + at * p.b_batch + j * p.b_column,
                    p.b_row, p.k, p.c_at(at, i, j));
        }
    });
}

// Rows in tiles of kRows and columns in panels of kLanes, split into significands and exponents.
class Packed {
public:
    Packed(const Unit& unit, const Problem& p)
        : unit_(unit), p_(p), tiles_((p.m + kRows - 1) / kRows), panels_((p.n + kLanes - 1) / kLanes),
          a_(p.batch * tiles_ * p.k * kRows), b_(p.batch * panels_ * p.k * kLanes),
          a_exponents_(p.batch * tiles_ * p.k * kRows), b_exponents_(p.batch * panels_ * p.k * kLanes),
          special_rows_(p.batch * tiles_), special_columns_(p.batch * panels_) {}

    int64_t pieces() const { return p_.batch * (tiles_ + panels_); }

    void pack(int64_t piece) {
        if (piece < p_.batch * tiles_) {
            const float* from = p_.a + piece / tiles_ * p_.a_batch;
            const int64_t first = piece % tiles_ * kRows, at = piece * p_.k * kRows;
            *special_rows_.at(piece) = fill(from, p_.a_row, p_.a_column, first, p_.m, kRows, unit_.min_exponent_a,
                                            a_.at(at), a_exponents_.at(at));
        } else {
            piece -= p_.batch * tiles_;
            const float* from = p_.b + piece / panels_ * p_.b_batch;
            const int64_t first = piece % panels_ * kLanes, at = piece * p_.k * kLanes;
            *special_columns_.at(piece) = fill(from, p_.b_column, p_.b_row, first, p_.n, kLanes, unit_.min_exponent_b,
                                               b_.at(at), b_exponents_.at(at));
        }
    }

    int64_t tasks() const { return p_.batch * panels_ * chunks(); }

    void multiply(int64_t task) {
        const int64_t chunk = task % chunks(), panel = task / chunks() % panels_, at = task / chunks() / panels_;
        const int64_t last = std::min(tiles_, (chunk + 1) * kTilesOfAChunk);
        for (int64_t tile = chunk * kTilesOfAChunk; tile < last; ++tile) {
            const int64_t row = tile * kRows, column = panel * kLanes;
            const int rows = int(std::min<int64_t>(kRows, p_.m - row));
            const int columns = int(std::min<int64_t>(kLanes, p_.n - column));
            if (*special_rows_.at(at * tiles_ + tile) || *special_columns_.at(at * panels_ + panel) ||
                !of_tile(at, tile, panel, rows, columns)) {
                one_by_one(at, row, column, rows, columns);
            }
        }
    }

private:
    static constexpr int64_t kTilesOfAChunk = 16;
    int64_t chunks() const { return (tiles_ + kTilesOfAChunk - 1) / kTilesOfAChunk; }

    // Returns whether there is a NaN or an infinity.
    bool fill(const float* from, int64_t stride, int64_t k_stride, int64_t first, int64_t count, int width,
              int min_exponent, float* significands, int32_t* exponents) {
        bool special = false;
        for (int64_t k = 0; k < p_.k; ++k) {
            for (int i = 0; i < width; ++i) {
                const float x = first + i < count ? from[(first + i) * stride + k * k_stride] : 0.0f;
                if (unit_.kind == kTruncated || unit_.kind == kFloored) {
                    special |= !std::isfinite(x);
                    split(x, min_exponent, significands + k * width + i, exponents + k * width + i);
                } else {
                    const bool zero = unit_.kind == kPairwise && std::fabs(x) < std::ldexp(1.0f, min_exponent);
                    significands[k * width + i] = zero ? 0.0f : x;
                }
            }
        }
        return special;
    }

    // Returns false where only the reference knows the answer: something may be infinite.
    bool of_tile(int64_t at, int64_t tile, int64_t panel, int rows, int columns) {
        Floats c[kRows] = {};
        for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < columns; ++j) c[r][j] = p_.c_at(at, tile * kRows + r, panel * kLanes + j);
        }
        if ((unit_.kind == kTruncated || unit_.kind == kFloored) && !finite(c)) return false;
        const int64_t a_at = (at * tiles_ + tile) * p_.k * kRows, b_at = (at * panels_ + panel) * p_.k * kLanes;
        for (int64_t k = 0; k < p_.k; k += unit_.group) {
            const Operands in{a_.at(a_at + k * kRows), a_exponents_.at(a_at + k * kRows), b_.at(b_at + k * kLanes),
                              b_exponents_.at(b_at + k * kLanes)};
            const int count = int(std::min<int64_t>(unit_.group, p_.k - k));
            switch (unit_.kind) {
                case kTruncated:
                    if (!truncated(unit_, in, count, c)) return false;
                    break;
                case kFloored:
                    if (!floored(unit_, in, count, c)) return false;
                    break;
                case kPairwise:
                    pairwise(unit_, in, count, c);
                    break;
                default:
                    fused(in, c);
            }
        }
        for (int r = 0; r < rows; ++r) {
            float* d = p_.d + at * p_.d_batch + (tile * kRows + r) * p_.d_row + panel * kLanes;
            for (int j = 0; j < columns; ++j) d[j] = c[r][j];
        }
        return true;
    }

    static bool finite(const Floats c[kRows]) {
        Ints all{};
        for (int r = 0; r < kRows; ++r) all |= (bits(c[r]) & 0x7f800000) == 0x7f800000;
        return !any(all);
    }

    void one_by_one(int64_t at, int64_t row, int64_t column, int rows, int columns) {
        const Environment environment(FE_TONEAREST);
        for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < columns; ++j) {
                const int64_t i = row + r, l = column + j;
                p_.d[at * p_.d_batch + i * p_.d_row + l] =
                    dot(unit_, p_.a + at * p_.a_batch + i * p_.a_row, p_.a_column,
                        p_.b + at * p_.b_batch + l * p_.b_column, p_.b_row, p_.k, p_.c_at(at, i, l));
            }
        }
    }

    const Unit& unit_;
    const Problem& p_;
    const int64_t tiles_, panels_;
    Buffer<float> a_, b_;
    Buffer<int32_t> a_exponents_, b_exponents_;
    Buffer<bool> special_rows_, special_columns_;
};

}  // namespace hal_sim

using hal_sim::Problem;
using hal_sim::Unit;

// A chain of fused multiply-adds in float64: d [m, n] holds c, all matrices are contiguous.
extern "C" int hal_sim_fused_float64(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* d,
                                     int threads) {
    hal_sim::in_parallel(threads, m, FE_TONEAREST, [=](int64_t i) {
        for (int64_t l = 0; l < k; ++l) {
            for (int64_t j = 0; j < n; ++j) d[i * n + j] = __builtin_fma(a[i * k + l], b[l * n + j], d[i * n + j]);
        }
    });
    return 0;
}

extern "C" int hal_sim_reference(const Unit* unit, const Problem* problem, int threads) {
    hal_sim::by_reference(*unit, *problem, threads);
    return 0;
}

// Returns 0, or 1 if there is no memory.
extern "C" int hal_sim_multiply(const Unit* unit, const Problem* problem, int threads) {
    try {
        if (unit->result == hal_sim::kFloat16) {  // of an instruction that no library's product uses
            hal_sim::by_reference(*unit, *problem, threads);
            return 0;
        }
        hal_sim::Packed packed(*unit, *problem);
        hal_sim::in_parallel(threads, packed.pieces(), FE_TONEAREST, [&](int64_t i) { packed.pack(i); });
        const int rounding = unit->kind == hal_sim::kTruncated ? FE_TOWARDZERO : FE_TONEAREST;
        hal_sim::in_parallel(threads, packed.tasks(), rounding, [&](int64_t i) { packed.multiply(i); });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
