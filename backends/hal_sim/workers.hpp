// SPDX-License-Identifier: Apache-2.0
// Threads that wait for the next product: to start one costs as much as a small product, and so does waking it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "vectors.hpp"

namespace hal_sim {

// Those of one process. A child that was forked has none of its parent's, and makes its own.
class Workers {
public:
    static Workers& of_process() {
        static std::atomic<Workers*> current{nullptr};  // never destroyed: its threads may outlive all else
        Workers* found = current.load();
        while (!found || found->process_ != getpid()) {
            Workers* made = new Workers;
            if (current.compare_exchange_strong(found, made)) return *made;
            delete made;
        }
        return *found;
    }

    // Calls work(context) on this thread and on up to `others` more, each once, and returns when all have ended. Those
    // that have not begun by then are not waited for: one thread must be able to do all of it.
    void call(int64_t others, void (*work)(void*), void* context) {
        // Nobody waits for a turn: another thread's product has the processors busy, and this one computes alone.
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return work(context);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work, context_ = context;
            open_ = std::min(others, have(others));
        }
        others == 1 ? wake_.notify_one() : wake_.notify_all();
        work(context);
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = 0;
        lock.unlock();
        soon([&] { return running_ == 0; });
        lock.lock();
        ended_.wait(lock, [&] { return running_ == 0; });
    }

private:
    Workers() = default;

    // Looks for a while whether something is so, before a thread sleeps: products come one after the other. The processor
    // is left to whoever else wants it.
    template <class Condition>
    static void soon(Condition condition) {
        const auto last = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        while (!condition() && std::chrono::steady_clock::now() < last) std::this_thread::yield();
    }

    // Starts what is missing of `wanted` threads, and returns how many there are: a process may have no more.
    int64_t have(int64_t wanted) {
        try {
            for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
        } catch (const std::bad_alloc&) {
        }
        return threads_;
    }

    void serve() {
        for (;;) {
            soon([&] { return open_ > 0; });
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return open_ > 0; });
            --open_, ++running_;
            const auto work = work_;
            const auto context = context_;
            lock.unlock();
            work(context);
            lock.lock();
            if (--running_ == 0) ended_.notify_one();
        }
    }

    const pid_t process_ = getpid();
    std::mutex turn_, mutex_;
    std::condition_variable wake_, ended_;
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;
    int64_t threads_ = 0;
    std::atomic<int64_t> open_{0}, running_{0};  // changed under the lock only
};

// Calls `work` on the caller's thread and on up to `threads` - 1 others, once on each.
//
// Throws std::bad_alloc if one of them does, after all have ended.
template <class Work>
void on_threads(int64_t threads, Work work) {
    if (threads <= 1) return work();
    struct Guarded {
        Work& work;
        std::atomic<bool> failed{false};
    } guarded{work};
    Workers::of_process().call(threads - 1, [](void* context) {
        Guarded& guarded = *static_cast<Guarded*>(context);
        try {
            guarded.work();
        } catch (const std::bad_alloc&) {
            guarded.failed = true;
        }
    }, &guarded);
    if (guarded.failed) throw std::bad_alloc();
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
