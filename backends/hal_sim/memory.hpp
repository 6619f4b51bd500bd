// SPDX-License-Identifier: Apache-2.0
// Memory for packed operands, which is kept from one product to the next: pages that are new to a process cost more
// than what is written to them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <new>
#include <vector>

namespace hal_sim {

struct Block {
    void* data = nullptr;
    size_t size = 0;
};

// Blocks that nobody uses at the moment. Nobody ever waits for it: a process may have been forked while it was locked.
class Pool {
public:
    static Pool& of_process() {
        static Pool* pool = new Pool;  // never destroyed: threads may outlive it
        return *pool;
    }

    Block take(size_t size) {
        Block found;
        if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
            for (auto& block : blocks_) {
                if (block.size < size || block.size > 4 * size) continue;
                found = block;
                kept_ -= block.size;
                block = blocks_.back();
                blocks_.pop_back();
                return found;
            }
        }
        found = {std::aligned_alloc(64, size), size};
        if (!found.data) {  // what is kept for later may be what is missing now
            clear();
            found.data = std::aligned_alloc(64, size);
        }
        if (!found.data) throw std::bad_alloc();
        return found;
    }

    void give(Block block) {
        if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
            lock && blocks_.size() < kMostBlocks && kept_ + block.size <= kMostBytes) {
            blocks_.push_back(block);
            kept_ += block.size;
        } else {
            std::free(block.data);
        }
    }

private:
    static constexpr size_t kMostBlocks = 64, kMostBytes = size_t(64) << 20;
    Pool() { blocks_.reserve(kMostBlocks); }

    void clear() {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock) return;
        for (const auto& block : blocks_) std::free(block.data);
        blocks_.clear();
        kept_ = 0;
    }

    std::mutex mutex_;
    std::vector<Block> blocks_;
    size_t kept_ = 0;
};

// As many T as the product of some numbers. Throws std::bad_alloc if there is no memory for them, also where their size
// is none that a number of 64 bits holds: a matrix of one number repeated may have any.
template <class T>
class Buffer {
public:
    explicit Buffer(std::initializer_list<int64_t> factors)
        : block_(Pool::of_process().take((bytes(factors) + 63) / 64 * 64 + 64)) {}
    ~Buffer() { Pool::of_process().give(block_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* at(size_t index) { return static_cast<T*>(block_.data) + index; }

private:
    static size_t bytes(std::initializer_list<int64_t> factors) {
        int64_t size = sizeof(T);
        for (const int64_t factor : factors) {
            if (factor < 0 || __builtin_mul_overflow(size, factor, &size)) throw std::bad_alloc();
        }
        if (size > INT64_MAX / 2) throw std::bad_alloc();
        return size_t(size);
    }

    Block block_;
};

}  // namespace hal_sim
