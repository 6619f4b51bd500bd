// SPDX-License-Identifier: Apache-2.0
// Operands as they lie in memory: float32, or numbers of 16 or 8 bits, which become float32 as they are read.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.hpp"

namespace hal_sim {

enum Storage : int32_t { kStoredFloat32, kStoredBFloat16, kStoredFloat16, kStoredTable };

// Where numbers of one kind lie. `one` reads the i-th, `four` it and the three that follow.
struct StoredFloat32 {
    const float* at;

    float one(int64_t i) const { return at[i]; }
    Four four(int64_t i) const { return load<Four>(at + i); }
};

typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint16_t FourShorts __attribute__((vector_size(8)));

struct StoredBFloat16 {
    const uint16_t* at;

    float one(int64_t i) const {
        const uint32_t bits = uint32_t(at[i]) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    Four four(int64_t i) const {
        return (Four)(__builtin_convertvector(load<FourShorts>(at + i), FourInts) << 16);
    }
};

struct StoredFloat16 {
    const uint16_t* at;

    float one(int64_t i) const {
        const Four all = widened(FourShorts{at[i]});
        return all[0];
    }
    Four four(int64_t i) const { return widened(load<FourShorts>(at + i)); }

private:
    static Four widened(FourShorts x) {
#if defined(__F16C__)
        return (Four)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&x)));
#else
        const FourInts bits = __builtin_convertvector(x, FourInts), magnitude = bits & 0x7fff;
        // A subnormal's bits are those that follow the leading one of a number from 2^-14 on, which is taken off again.
        const Four least = (Four)(FourInts{} + (113 << 23)), beside = (Four)((magnitude << 13) | (113 << 23));
        FourInts found = magnitude < 0x400 ? (FourInts)(beside - least) : (magnitude << 13) + (112 << 23);
        found = magnitude >= 0x7c00 ? ((magnitude & 0x3ff) << 13) | 0x7f800000 : found;
        return (Four)(found | (bits & 0x8000) << 16);
#endif
    }
};

// Numbers of 8 bits, of which a table says what they are.
struct StoredTable {
    const uint8_t* at;
    const float* table;

    float one(int64_t i) const { return table[at[i]]; }
    Four four(int64_t i) const { return Four{one(i), one(i + 1), one(i + 2), one(i + 3)}; }
};

// One operand: a batch of matrices with any strides, in elements.
struct Operand {
    const void* data;
    const float* table;  // of 256 numbers, for kStoredTable
    int64_t storage, batch, row, column;

    // Calls `read` with what lies at an element and after it.
    template <class Read>
    void from(int64_t element, Read read) const {
        switch (storage) {
            case kStoredFloat32: return read(StoredFloat32{static_cast<const float*>(data) + element});
            case kStoredBFloat16: return read(StoredBFloat16{static_cast<const uint16_t*>(data) + element});
            case kStoredFloat16: return read(StoredFloat16{static_cast<const uint16_t*>(data) + element});
            default: return read(StoredTable{static_cast<const uint8_t*>(data) + element, table});
        }
    }

    // The operand that begins so many elements later.
    Operand after(int64_t elements) const {
        const int64_t size = storage == kStoredFloat32 ? 4 : storage == kStoredTable ? 1 : 2;
        return {static_cast<const char*>(data) + elements * size, table, storage, batch, row, column};
    }

    // Writes the matrix `at` as float32, row after row, and returns it as an operand.
    Operand widened(int64_t at, int64_t rows, int64_t columns, float* to) const {
        from(at * batch, [&](auto stored) {
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = stored.one(i * row + j * column);
            }
        });
        return {to, nullptr, kStoredFloat32, 0, columns, 1};
    }
};

}  // namespace hal_sim
