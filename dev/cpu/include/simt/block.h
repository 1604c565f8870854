// One block on one OS thread: its threads are fibers, and this schedules them.
//
// A thread runs until it exits or has to wait: at a block barrier, or in a warp collective (a shuffle,
// a vote, __syncwarp, a tensor-core instruction) for the other lanes. Then the next thread runs. So a
// kernel without barriers never switches: its threads run one after the other on one fiber.
//
// Where a thread waits is known by its source line (__builtin_LINE as a default argument of the
// intrinsics). Return addresses would not do: the compiler inlines and unrolls.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared.h"
#include "types.h"

namespace simt {

constexpr int kMaxThreads = 1024, kMaxWarps = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Launch {
    const char* kernel;
    Site site;
    dim3 grid, block;
    size_t dynamic_shared;             // bytes
    size_t shared_limit;               // for static and dynamic together
    uint64_t number;                   // 0, 1, 2, ... in the program
    int64_t first_block, last_block;   // of the grid, those to run
    void (*run)(const void*);          // calls the kernel as the current thread
    const void* kernel_and_arguments;  // what `run` is given
};

struct alignas(64) Thread {
    uint3 index;
    Fiber* fiber;
    const char* waits_in;              // the intrinsic it was last suspended in
    Site site;
};

// Where the lanes of one mask meet. Values are exchanged in slots, of which there are two sets used in turn: a lane may be through
// the next collective before another has read this one's result, but not through the one after, since that needs all of them.
constexpr int kSlotBytes = 64;
struct alignas(64) Rendezvous {
    uint32_t mask;                     // the lanes named
    uint32_t arrived;                  // the lanes waiting here
    uint32_t unread;                   // the lanes released that have not looked at the result yet
    uint32_t generation;               // its lowest bit picks the set of slots
    uint32_t participants[2];          // per set: the lanes that did take part
    const char* what;                  // the intrinsic
    void (*finish)(void* slots, uint32_t participants);   // computes a result in the slots, once for all
    alignas(64) char slots[2][32 * kSlotBytes];
};
constexpr int kMaxRendezvous = 33;     // 32 disjoint masks and the full one

struct Warp {
    uint32_t alive;                    // lanes that have not exited
    uint32_t runnable;                 // lanes that could run now
    uint32_t unstarted;                // those of them that have not begun
    uint32_t at_barrier;               // lanes waiting in __syncthreads
    int open;                          // rendezvous with lanes waiting
    int count;                         // rendezvous in use
    Rendezvous* rendezvous;            // [kMaxRendezvous], allocated at the first use
};

struct AsyncCopy { char* to; const char* from; int bytes, source_bytes; unsigned group; };   // cp.async, see ptx.h
struct AsyncCopies { std::vector<AsyncCopy> pending; unsigned committed = 0; };

struct Worker {                        // what an OS thread needs to run a block
    const Launch* launch = nullptr;
    uint64_t serial = 0;               // counts the blocks this OS thread has run: tells shared() a new one began
    uint3 block = {0, 0, 0};
    int threads_in_block = 0, warps_in_block = 0;
    int alive = 0;                     // threads that have not exited
    uint32_t work = 0;                 // warps with a runnable lane
    int warp = 0;                      // the warp scheduled last
    Thread* current = nullptr;

    int at_barrier = 0;                // threads waiting in __syncthreads
    Site barrier_site = {nullptr, 0};

    uint8_t warp_order[kMaxWarps];     // priority order: warps, highest first
    uint32_t lane_xor = 0, lane_rotate = 0;   // and lanes: number in the warp -> rank

    Arena arena;
    char* dynamic_shared = nullptr;
    std::vector<AsyncCopies> async;    // per thread, if the kernel uses cp.async

    uint64_t switches = 0;
    Fiber os_fiber;                    // the OS thread's own stack
    std::vector<Fiber*> free_fibers;
    int fiber_count = 0;
    Thread threads[kMaxThreads];
    Warp warps[kMaxWarps] = {};
};
inline __thread Worker* worker;        // of this OS thread; created at its first block, kept

inline int current_id(const Worker& w) { return (int)(w.current - w.threads); }

// ---- reports ---------------------------------------------------------------------------------------

inline std::string describe(const Thread& t) {
    char s[64];
    snprintf(s, sizeof s, "(%u,%u,%u)", t.index.x, t.index.y, t.index.z);
    return s;
}

// Who is where, threads in the same state on one line.
inline std::string who_waits(const Worker& w) {
    std::map<std::string, std::pair<int, std::string>> groups;     // state: how many, and the first of them
    for (int i = 0; i < w.threads_in_block; i++) {
        const Thread& t = w.threads[i];
        const Warp& warp = w.warps[i / 32];
        uint32_t bit = 1u << i % 32;
        std::string state = "running";
        if (!(warp.alive & bit)) state = "exited";
        else if (warp.unstarted & bit) state = "not started yet";
        else if (&t != w.current)
            state = std::string(warp.runnable & bit ? "ready to go on after " : "waiting in ") + t.waits_in + " at " + t.site.file +
                    ":" + std::to_string(t.site.line);
        auto& [count, members] = groups[state];
        bool known_index = (warp.alive & bit) && !(warp.unstarted & bit);
        if (known_index && count < 5) members += count < 4 ? " " + describe(t) : " ...";
        count++;
    }
    std::string out;
    for (auto& [state, group] : groups)
        out += "\n    " + std::to_string(group.first) + (group.first == 1 ? " thread " : " threads ") + state +
               (group.second.empty() ? "" : ":" + group.second);
    return out;
}

[[noreturn]] inline __attribute__((format(printf, 1, 2), noinline)) void die_in_kernel(const char* format, ...) {
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    const Worker& w = *worker;
    const Launch& l = *w.launch;
    die("%s\n  in kernel %s, launched at %s:%d, block (%u,%u,%u) of (%u,%u,%u)%s%s%s", message, l.kernel, l.site.file,
        l.site.line, w.block.x, w.block.y, w.block.z, l.grid.x, l.grid.y, l.grid.z,
        w.current ? ", thread " : "", w.current ? describe(*w.current).c_str() : "", who_waits(w).c_str());
}

// ---- scheduling ------------------------------------------------------------------------------------

inline void make_runnable(Worker& w, int warp, uint32_t lanes) {
    if (!lanes) return;
    w.warps[warp].runnable |= lanes;
    w.work |= 1u << warp;
}

// Rank r of the priority order is lane (r rotated, then xored): put a mask of lanes in order of rank.
inline uint32_t lanes_to_ranks(uint32_t mask, uint32_t x, uint32_t rotate) {
    constexpr uint32_t kEven[5] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
    for (int b = 0; b < 5; b++)
        if (x >> b & 1) mask = (mask >> (1 << b) & kEven[b]) | (mask & kEven[b]) << (1 << b);
    return mask >> rotate | (uint32_t)((uint64_t)mask << (32 - rotate));
}

inline int pick_by_priority(Worker& w) {
    if (!w.work) return -1;
    int i = 0;
    while (!(w.work >> w.warp_order[i] & 1)) i++;
    int warp = w.warp_order[i];
    uint32_t ranks = lanes_to_ranks(w.warps[warp].runnable, w.lane_xor, w.lane_rotate);
    return warp * 32 + (((__builtin_ctz(ranks) + w.lane_rotate) & 31) ^ w.lane_xor);
}

// The thread to run next, or -1. Forward and reverse stay in a warp while one of its lanes can run.
inline int pick(Worker& w) {
    if (__builtin_expect(options.order == kPriority, 0)) return pick_by_priority(w);
    bool reverse = options.order == kReverse;
    if (!(w.work >> w.warp & 1)) {
        if (!w.work) return -1;
        uint32_t above = w.work & ~(((uint32_t)2 << w.warp) - 1), below = w.work & (((uint32_t)1 << w.warp) - 1);
        w.warp = reverse ? 31 - __builtin_clz(below ? below : w.work) : __builtin_ctz(above ? above : w.work);
    }
    uint32_t lanes = w.warps[w.warp].runnable;
    return w.warp * 32 + (reverse ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes));
}

// Make thread `id` the current one. True if it has not begun, and so needs a fiber.
inline bool make_current(Worker& w, int id) {
    Warp& warp = w.warps[id / 32];
    uint32_t bit = 1u << id % 32;
    Thread& t = w.threads[id];
    bool fresh = warp.unstarted & bit;
    warp.runnable &= ~bit;
    if (!warp.runnable) w.work &= ~(1u << id / 32);
    if (fresh) {
        warp.unstarted &= ~bit;
        const dim3& d = w.launch->block;
        if (d.y * d.z == 1) t.index = {(unsigned)id, 0, 0};
        else t.index = {id % d.x, id / d.x % d.y, id / d.x / d.y};
    }
    w.current = &t;
    ::threadIdx = t.index;
    return fresh;
}

void fiber_main();
inline Fiber* take_fiber(Worker& w) {
    if (w.free_fibers.empty()) return new_fiber<fiber_main>(w.fiber_count++);
    Fiber* f = w.free_fibers.back();
    w.free_fibers.pop_back();
    return f;
}

[[noreturn]] inline __attribute__((noinline)) void deadlock(Worker& w) {
    w.current = nullptr;
    die_in_kernel("deadlock: no thread of the block can go on (a barrier or a collective that some threads never reach)");
}

// The current thread cannot go on. Returns when it can.
inline __attribute__((noinline)) void suspend(const char* what, Site site) {
    Worker& w = *worker;
    Thread* me = w.current;
    me->waits_in = what;
    me->site = site;
    int next = pick(w);
    if (next < 0) deadlock(w);
    bool fresh = make_current(w, next);
    Thread* t = w.current;
    if (t == me) return;
    if (fresh) t->fiber = take_fiber(w);
    w.switches++;
    switch_fiber(me->fiber, t->fiber);
}

// What a release does to the thread that caused it: it goes on, except in priority order, where one of
// those released may come first.
inline void after_release(Worker& w, const char* what, Site site) {
    if (__builtin_expect(options.order != kPriority, 1)) return;
    int id = current_id(w);
    make_runnable(w, id / 32, 1u << id % 32);
    suspend(what, site);
}

// ---- the block barrier -----------------------------------------------------------------------------

inline void release_barrier(Worker& w) {
    w.at_barrier = 0;
    for (int i = 0; i < w.warps_in_block; i++) {
        make_runnable(w, i, w.warps[i].at_barrier);
        w.warps[i].at_barrier = 0;
    }
}

// Threads that have exited count as arrived, as in hardware.
inline void block_barrier(const char* what, Site site) {
    Worker& w = *worker;
    if (w.at_barrier == 0) w.barrier_site = site;
    else if (__builtin_expect(!same_place(w.barrier_site, site), 0))
        die_in_kernel("divergent barrier: this thread is in %s at %s:%d while others wait in one at %s:%d", what,
                      site.file, site.line, w.barrier_site.file, w.barrier_site.line);
    if (++w.at_barrier == w.alive) {
        release_barrier(w);
        after_release(w, what, site);
    } else {
        int id = current_id(w);
        w.warps[id / 32].at_barrier |= 1u << id % 32;
        suspend(what, site);
    }
}

// ---- warp collectives ------------------------------------------------------------------------------

inline void complete(Worker& w, int warp, Rendezvous& r, uint32_t self) {
    unsigned set = r.generation++ & 1;
    r.participants[set] = r.unread = r.arrived;
    if (r.finish) r.finish(r.slots[set], r.arrived);
    uint32_t waiting = r.arrived & ~self;
    r.arrived = 0;
    w.warps[warp].open--;
    make_runnable(w, warp, waiting);
}

inline __attribute__((noinline)) Rendezvous& find_rendezvous(Warp& warp, uint32_t mask) {
    if (!warp.rendezvous)
        warp.rendezvous = (Rendezvous*)aligned_alloc(alignof(Rendezvous), kMaxRendezvous * sizeof(Rendezvous));
    if (!warp.rendezvous) out_of_host_memory("cannot allocate what the lanes of a warp meet in");
    Rendezvous* r = nullptr;
    for (int i = 0; i < warp.count; i++)
        if (warp.rendezvous[i].mask == mask) return warp.rendezvous[i];
    if (warp.count < kMaxRendezvous) r = &warp.rendezvous[warp.count++];
    else
        for (int i = 0; i < warp.count; i++)
            if (!warp.rendezvous[i].arrived && !warp.rendezvous[i].unread) r = &warp.rendezvous[i];
    if (!r) die_in_kernel("more than %d different masks in use by the collectives of one warp", kMaxRendezvous);
    r->mask = mask;
    r->arrived = r->unread = r->generation = 0;
    return *r;
}

template <class T> struct Gathered { T* slots; uint32_t participants; int lane; };

// Leave `value` in this lane's slot and wait until all lanes of the mask that are alive have done so.
// `finish`, if any, is then run once on the slots. The result may be read until the lane's next collective.
template <class T>
inline Gathered<T> gather(uint32_t mask, const T& value, const char* what, Site site, void (*finish)(void*, uint32_t) = nullptr) {
    static_assert(sizeof(T) <= kSlotBytes && __is_trivially_copyable(T), "a warp exchanges plain values of up to 64 bytes");
    Worker& w = *worker;
    int id = current_id(w), lane = id % 32;
    uint32_t bit = 1u << lane;
    Warp& warp = w.warps[id / 32];
    if (__builtin_expect(!(mask & bit), 0))
        die_in_kernel("lane %d calls %s at %s:%d with mask 0x%08x, which does not name it", lane, what, site.file, site.line, mask);
    Rendezvous& r = warp.count && warp.rendezvous[0].mask == mask ? warp.rendezvous[0] : find_rendezvous(warp, mask);
    if (!r.arrived) {
        r.what = what;
        r.finish = finish;
        warp.open++;
    } else if (__builtin_expect(r.what != what, 0))
        die_in_kernel("lanes of one warp meet in different collectives: lane %d in %s at %s:%d, others in %s (mask 0x%08x)",
                      lane, what, site.file, site.line, r.what, mask);
    unsigned set = r.generation & 1;
    T* slots = (T*)r.slots[set];
    slots[lane] = value;
    r.arrived |= bit;
    if (!(mask & warp.alive & ~r.arrived)) {
        complete(w, id / 32, r, bit);
        after_release(w, what, site);
    } else
        suspend(what, site);
    r.unread &= ~bit;
    return {slots, r.participants[set], lane};
}

// ---- the life of a thread, and of a block ----------------------------------------------------------

// The current thread has returned from the kernel: those who wait for everybody who is alive may go on.
inline void exit_thread(Worker& w) {
    int id = current_id(w);
    Warp& warp = w.warps[id / 32];
    warp.alive &= ~(1u << id % 32);
    w.alive--;
    for (int i = 0; warp.open && i < warp.count; i++) {
        Rendezvous& r = warp.rendezvous[i];
        if (r.arrived && !(r.mask & warp.alive & ~r.arrived)) complete(w, id / 32, r, 0);
    }
    if (w.at_barrier && w.at_barrier == w.alive) release_barrier(w);
}

inline void fiber_main() {
    Worker& w = *worker;                       // a fiber stays on its OS thread
    arrive(w.current->fiber);
    for (;;) {
        w.launch->run(w.launch->kernel_and_arguments);
        Fiber* self = w.current->fiber;
        exit_thread(w);
        int next = pick(w);
        if (next >= 0 && make_current(w, next)) {
            w.current->fiber = self;           // a thread that has not begun runs on this very fiber: no switch
            continue;
        }
        w.free_fibers.push_back(self);
        if (next < 0 && w.alive) deadlock(w);
        if (next >= 0) w.switches++;
        switch_fiber(self, next < 0 ? &w.os_fiber : w.current->fiber);
        // here again when take_fiber gave this fiber to a thread that has not begun
    }
}

inline void run_block(const Launch& launch, uint64_t number) {
    Worker& w = *worker;
    w.launch = &launch;
    w.serial++;
    w.block = {(unsigned)(number % launch.grid.x), (unsigned)(number / launch.grid.x % launch.grid.y),
               (unsigned)(number / launch.grid.x / launch.grid.y)};
    int n = launch.block.x * launch.block.y * launch.block.z;
    w.threads_in_block = w.alive = n;
    w.warps_in_block = (n + 31) / 32;
    w.at_barrier = 0;
    w.warp = options.order == kReverse ? w.warps_in_block - 1 : 0;
    w.work = kAllLanes >> (32 - w.warps_in_block);
    for (int i = 0; i < w.warps_in_block; i++) {
        int lanes = n - i * 32 < 32 ? n - i * 32 : 32;
        Warp& warp = w.warps[i];
        warp.alive = warp.runnable = warp.unstarted = kAllLanes >> (32 - lanes);
        warp.at_barrier = 0;
        warp.open = warp.count = 0;
    }
    if (options.order == kPriority) {
        uint64_t random = mix(options.seed ^ mix(launch.number ^ mix(number)));
        w.lane_xor = random & 31;
        w.lane_rotate = random >> 5 & 31;
        for (int i = 0; i < w.warps_in_block; i++) {         // a random permutation, built up
            random = mix(random);
            int j = random % (i + 1);
            w.warp_order[i] = w.warp_order[j];
            w.warp_order[j] = i;
        }
    }
    w.dynamic_shared = w.arena.allocate("dynamic shared memory", launch.site.file, launch.site.line, launch.dynamic_shared, 1024);
    ::blockIdx = w.block;
    ::blockDim = launch.block;
    ::gridDim = launch.grid;

    make_current(w, pick(w));
    w.current->fiber = take_fiber(w);
    switch_fiber(&w.os_fiber, w.current->fiber);

    w.current = nullptr;
    size_t where;
    if (const Arena::Array* a = w.arena.overflow(&where))
        die_in_kernel("write past the end of shared memory: '%s' (%s:%d) has %zu bytes, and byte %zu was written", a->name,
                      a->file, a->line, a->bytes, a->bytes + where);
    for (AsyncCopies& a : w.async) {
        if (!a.pending.empty()) die_in_kernel("cp.async: the block ends, and nobody has waited for a copy of %d bytes", a.pending[0].bytes);
        a.committed = 0;
    }
    w.arena.clear();
}

// ---- what cu2cpp.py makes of __shared__ ------------------------------------------------------------

// The block's one object of type S, which holds one __shared__ variable. Each S has its place
// remembered per OS thread, good for one block.
template <class S> inline S& shared(const char* name, const char* file, int line) {
    struct Place { S* object; uint64_t serial; };
    static thread_local Place place = {nullptr, 0};
    Worker& w = *worker;
    if (__builtin_expect(place.serial != w.serial, 0)) {
        place.object = (S*)w.arena.allocate(name, file, line, sizeof(S), alignof(S) > 16 ? alignof(S) : 16);
        if (!place.object || w.arena.total > w.launch->shared_limit)
            die_in_kernel("too much shared memory: with '%s' (%s:%d) the block uses %zu bytes, static and dynamic together, "
                          "of %zu", name, file, line, w.arena.total, w.launch->shared_limit);
        place.serial = w.serial;
    }
    return *place.object;
}
template <class T> inline T* dynamic_shared() { return (T*)worker->dynamic_shared; }
// In front of each declaration: a function takes it as a statement, and outside of one it "does not name a type".
inline const struct InFunction { void operator=(int) const {} } must_be_in_a_function = {};

}  // namespace simt
