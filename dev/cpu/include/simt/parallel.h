// Work for several OS threads: parallel(n, f) calls f(0) .. f(n - 1), in no particular order.
//
// This began as `#pragma omp parallel for schedule(dynamic)`. But the threads of an OpenMP team all meet at the end of every loop,
// and wait for each other there by spinning, for milliseconds. On a machine with something else to do, a training step of 260 ms
// took 1,290 ms. Here nobody waits for a helper that has not even woken up: the caller works too, and when nothing is left to begin
// it waits for what is under way. OMP_NUM_THREADS still says how many threads there are.
#pragma once
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "options.h"

namespace simt {

constexpr int kMaxOsThreads = 16;       // each may map 1,024 stacks, and Linux allows a process 65,530 mappings

inline int thread_count() {
    static const int count = [] {
        cpu_set_t cpus;
        int n = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
        if (const char* value = getenv("OMP_NUM_THREADS")) {
            char* end;
            long wanted = strtol(value, &end, 10);          // a list, 4,2, says what loops within loops get
            if (wanted < 1 || (*end && *end != ',')) bad_option("OMP_NUM_THREADS", value, "a positive number");
            n = wanted < kMaxOsThreads ? wanted : kMaxOsThreads;
        }
        return n < kMaxOsThreads ? n : kMaxOsThreads;
    }();
    return count;
}

class Helpers {
    static constexpr double kSpin = 20e-6;      // seconds to look for the next job before sleeping

    std::atomic<bool> busy{false};              // another host thread's job is under way
    std::mutex mutex;
    std::condition_variable new_job, job_done;
    std::atomic<uint64_t> jobs{0};              // counts them; a helper waits for it to change
    bool open = false;                          // may a helper still join?
    std::atomic<int> inside{0};                 // helpers that joined and have not left
    void (*call)(const void*, int64_t) = nullptr;
    const void* body = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};

    template <class Condition> static void spin_until(Condition condition) {
        for (double end = seconds() + kSpin; !condition() && seconds() < end;) std::this_thread::yield();
    }
    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) call(body, i);
    }
    void help() {
        in_parallel = true;
        for (uint64_t seen = 0;;) {
            spin_until([&] { return jobs.load(std::memory_order_acquire) != seen; });
            {
                std::unique_lock<std::mutex> lock(mutex);
                new_job.wait(lock, [&] { return jobs != seen; });
                seen = jobs;
                if (!open) continue;
                inside++;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex);
            if (--inside == 0) job_done.notify_one();
        }
    }

public:
    static inline __thread bool in_parallel;    // a loop within a loop runs on its own thread alone

    Helpers() {
        int started = 1;                        // the caller
        try {
            for (; started < thread_count(); started++) std::thread([this] { help(); }).detach();
        } catch (const std::system_error& e) {  // results do not depend on their number
            fprintf(stderr, "simt: %d of %d threads could be started (%s; see ulimit -u and -v): this takes longer\n", started,
                    thread_count(), e.what());
        }
    }
    // False, and nothing done, if another host thread has the helpers.
    bool run(int64_t n, void (*function)(const void*, int64_t), const void* argument) {
        if (busy.exchange(true)) return false;
        {
            std::lock_guard<std::mutex> lock(mutex);
            call = function, body = argument, count = n, next = 0;
            open = true;
            jobs++;
        }
        new_job.notify_all();
        in_parallel = true;
        work();
        in_parallel = false;
        {
            std::lock_guard<std::mutex> lock(mutex);
            open = false;
        }
        spin_until([&] { return inside == 0; });
        std::unique_lock<std::mutex> lock(mutex);
        job_done.wait(lock, [&] { return inside == 0; });
        busy = false;
        return true;
    }
};

inline Helpers& helpers() {
    static Helpers* h = new Helpers;            // never freed: its threads run to the end of the program
    return *h;
}

template <class F> void parallel(int64_t n, const F& f) {
    auto call = [](const void* f, int64_t i) { (*(const F*)f)(i); };
    if (n > 1 && thread_count() > 1 && !Helpers::in_parallel && helpers().run(n, call, &f)) return;
    for (int64_t i = 0; i < n; i++) f(i);
}

}  // namespace simt
