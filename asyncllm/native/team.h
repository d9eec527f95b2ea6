// A team of threads that walks through a function's phases together, each taking the next piece of work that is left.
//
// Pieces are claimed rather than dealt out, so a thread whose core the event loop takes for a while holds up no more than
// the piece it is at; and the caller never waits for a thread to wake up, which takes longer than a small step's phase.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

// One phase: pieces claimed and pieces done. On a cache line of its own.
struct alignas(64) Phase {
    std::atomic<int> next{0}, done{0};
};

// A thread's way through the phases of one call; all threads of a call walk through the same ones.
class Walk {
  public:
    // `spent`: nanoseconds by kind of phase, added to; null on all threads but the caller's.
    Walk(Phase *phases, int thread, int64_t *spent)
        : phases_(phases), thread_(thread), spent_(spent), since_(spent ? nanoseconds() : 0) {}

    int thread() const { return thread_; }  // of the team, the caller's is 0

    // Runs body(i) for each i in [0, num_pieces) on some thread; returns once all of them are done.
    template <class Body> void each(int kind, int num_pieces, Body &&body) {
        walk_through(num_pieces, body);
        if (!spent_) return;
        const int64_t now = nanoseconds();
        spent_[kind] += now - since_;
        since_ = now;
    }

  private:
    static constexpr int MAX_SPINS = 2000;

    static int64_t nanoseconds() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
    }

    template <class Body> void walk_through(int num_pieces, Body &&body) {
        Phase &phase = phases_[at_++];
        int num_mine = 0;
        for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < num_pieces; ++num_mine) body(i);
        if (num_mine) phase.done.fetch_add(num_mine, std::memory_order_acq_rel);
        for (int spins = 0; phase.done.load(std::memory_order_acquire) < num_pieces; ++spins) {
            if (spins < MAX_SPINS) _mm_pause();
            else sched_yield();  // whoever holds the last piece may want this core
        }
    }

    Phase *phases_;
    int thread_;
    int64_t *spent_;
    int64_t since_;
    int at_ = 0;
};

class Team {
  public:
    // Makes do with fewer threads where the system grants no more.
    explicit Team(int num_threads) {
        threads_.reserve(num_threads);
        try {
            for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
        } catch (const std::system_error &) {
        }
    }

    ~Team() {
        stopping_.store(true);
        calls_.fetch_add(1);
        calls_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    // Calls body(walk) on the caller's thread and on whichever others come in time. At most `max_phases` in body.
    template <class Body> void run(int max_phases, int64_t *spent, Body &&body) {
        if (max_phases > num_phases_) {
            phases_ = std::make_unique<Phase[]>(max_phases);
            num_phases_ = max_phases;
        }
        for (int i = 0; i < max_phases; ++i) {
            phases_[i].next.store(0, std::memory_order_relaxed);
            phases_[i].done.store(0, std::memory_order_relaxed);
        }
        body_ = &body;
        call_ = [](void *what, Walk &walk) { (*static_cast<std::remove_reference_t<Body> *>(what))(walk); };
        if (!threads_.empty()) {
            inside_.store(0, std::memory_order_release);
            calls_.fetch_add(1, std::memory_order_release);
            calls_.notify_all();
        }
        Walk walk(phases_.get(), 0, spent);
        body(walk);
        if (threads_.empty()) return;
        // Late ones may still be on their way through phases in which nothing is left.
        for (int nobody = 0; !inside_.compare_exchange_weak(nobody, CLOSED, std::memory_order_acq_rel); nobody = 0) _mm_pause();
    }

    int num_threads() const { return 1 + (int)threads_.size(); }  // the caller's among them

  private:
    static constexpr int CLOSED = -1;

    void serve(int thread) {
        for (unsigned seen = 0;;) {
            calls_.wait(seen, std::memory_order_acquire);
            seen = calls_.load(std::memory_order_acquire);
            if (stopping_.load(std::memory_order_acquire)) return;
            int inside = inside_.load(std::memory_order_acquire);
            while (inside != CLOSED && !inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) {}
            if (inside == CLOSED) continue;
            Walk walk(phases_.get(), thread, nullptr);
            call_(body_, walk);
            inside_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::unique_ptr<Phase[]> phases_;
    int num_phases_ = 0;
    void *body_ = nullptr;
    void (*call_)(void *, Walk &) = nullptr;
    std::atomic<unsigned> calls_{0};
    std::atomic<int> inside_{CLOSED};  // threads of the team within the current call
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;
};
