// Streams: when the device does what a program has asked of it.
//
// SIMT_STREAMS=eager does it at the call. The others queue it, and what is queued runs when something makes it necessary: a
// synchronisation, a call that is one, a question whether it is done, the end of the program. `late` then runs what is needed for
// that and nothing else, so that every stream is as far behind as CUDA allows. `random` runs any stream's next operation that may
// run, until what is needed has run, and some while the host goes on. Some streams are favoured for a while, and others starved: that
// finds more than a fresh choice each time. So a program that forgot to wait computes something else.
//
// An operation comes after the one before it in its stream, and after those of other streams that it names: a wait names the
// event's record, an operation in the null stream the last one of each blocking stream, and theirs the last one of the null stream.
// All of them were queued earlier: no program can make a circle of them.
#pragma once
#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "options.h"

namespace simt {
struct Operation {
    const char* what = "";                 // a kernel's name, or a call's
    Site site = {"", 0};
    cudaStream_t stream = nullptr;         // where it is queued; of an operation that is done, none
    bool done = false, collective = false;
    double time = 0;                       // when it was done
    std::vector<std::shared_ptr<Operation>> after;
    std::function<void()> work;
};
}  // namespace simt

struct CUstream_st {
    simt::Site site = {"", 0};             // of its cudaStreamCreate
    uint64_t number = 0;                   // counts them
    bool blocking = true;                  // waits for the null stream, which waits for it
    bool destroyed = false;                // and what is queued is still to be done
    std::deque<std::shared_ptr<simt::Operation>> queue;
};
struct CUevent_st {
    bool timed = true;
    std::shared_ptr<simt::Operation> record;   // the last one; none: complete
};

namespace simt {

struct Streams {
    std::recursive_mutex mutex;            // for programs with several host threads
    CUstream_st null;
    std::vector<cudaStream_t> all = {&null};
    std::shared_ptr<Operation> last_collective;
    bool running = false;                  // an operation is under way
    uint64_t created = 0;
    // In random mode: for some time, an era, one stream is ahead of another, and the device idle, as fast as the host, or faster.
    uint64_t draws = 0, era = 0;

    uint64_t draw() { return mix(options.streams_seed ^ mix(draws++)); }
    uint64_t priority(cudaStream_t s) { return mix(options.streams_seed ^ mix(era ^ mix(s->number))); }
    uint64_t operations_meanwhile() { return draw() % (2 * (mix(options.streams_seed ^ mix(~era)) % 3) + 1); }
    cudaStream_t find(cudaStream_t s) {    // nullptr: there is no such stream
        if (!s) return &null;
        auto i = std::find(all.begin(), all.end(), s);
        return i != all.end() && !s->destroyed ? s : nullptr;
    }
    void remove(cudaStream_t s) {
        all.erase(std::find(all.begin(), all.end(), s));
        delete s;
    }
};
inline Streams& streams() {
    static Streams* s = new Streams;       // never freed: the end of the program comes by here
    return *s;
}
inline bool streams_queue() { return __builtin_expect(options.streams != kEager, 0); }

inline std::string describe(const Operation& o) { return std::string(o.what) + " at " + o.site.file + ":" + std::to_string(o.site.line); }
inline const Operation* waits_for(const Operation& o) {    // the first of those that are not done
    for (auto& a : o.after)
        if (!a->done) return a.get();
    return nullptr;
}

[[noreturn]] inline void stream_deadlock() {
    std::string where;
    for (cudaStream_t s : streams().all) {
        if (s->queue.empty()) continue;
        const Operation &head = *s->queue.front(), *other = waits_for(head);
        std::string made = std::string(s->site.file) + ":" + std::to_string(s->site.line);
        where += "\n  " + (s == &streams().null ? "the null stream" : "the stream from " + made) + ": " + describe(head) +
                 (other ? " waits for " + describe(*other) : "");
    }
    die("deadlock: no stream can go on%s", where.c_str());
}

// A stream whose next operation may run. In `late`, one without which `wanted` cannot.
inline cudaStream_t pick_stream(const Operation& wanted) {
    Streams& all = streams();
    if (options.streams == kRandom) {
        if (all.draw() % 4 == 0) all.era++;
        cudaStream_t picked = nullptr;
        for (cudaStream_t s : all.all)
            if (!s->queue.empty() && !waits_for(*s->queue.front()) && (!picked || all.priority(s) > all.priority(picked))) picked = s;
        if (!picked) stream_deadlock();
        return picked;
    }
    const Operation* o = &wanted;
    for (size_t hops = 0; o->stream && hops < all.all.size(); hops++) {     // a longer way is a circle
        cudaStream_t s = o->stream;
        o = waits_for(*s->queue.front());
        if (!o) return s;
    }
    stream_deadlock();
}

inline void run_next(cudaStream_t s) {
    Streams& all = streams();
    std::shared_ptr<Operation> o = s->queue.front();
    all.running = true;
    if (o->work) o->work();
    all.running = false;
    o->time = seconds();
    o->done = true;
    o->stream = nullptr;
    o->work = nullptr;                     // with what it keeps: bytes that were staged, and other operations
    o->after.clear();
    s->queue.pop_front();
    if (s->destroyed && s->queue.empty()) all.remove(s);
}

inline void force(const std::shared_ptr<Operation>& o) {
    streams().era++;
    while (o && !o->done) run_next(pick_stream(*o));
}

// The last operation of each stream of which this is true
template <class F> std::vector<std::shared_ptr<Operation>> last_of(const F& wanted) {
    std::vector<std::shared_ptr<Operation>> last;
    for (cudaStream_t s : streams().all)
        if (!s->queue.empty() && wanted(*s)) last.push_back(s->queue.back());
    return last;
}
// What a synchronisation with the stream waits for. The null stream stands for all that are blocking.
inline std::vector<std::shared_ptr<Operation>> last_of_stream(cudaStream_t s) {
    return last_of([&](const CUstream_st& other) { return s == &streams().null ? other.blocking : &other == s; });
}
inline void force(const std::vector<std::shared_ptr<Operation>>& operations) { for (auto& o : operations) force(o); }

inline cudaError_t no_such_stream(const char* what, Site site) {
    fprintf(stderr, "simt: %s at %s:%d: there is no such stream, or it is destroyed already (%s)\n", what, site.file, site.line,
            cudaGetErrorName(cudaErrorInvalidResourceHandle));
    return set_error(cudaErrorInvalidResourceHandle);
}

// At the end of a stream; nullptr, and the error is set, if there is no such stream. `after`: a record of any stream's.
inline std::shared_ptr<Operation> enqueue(cudaStream_t stream, const char* what, Site site, std::function<void()> work,
                                          const std::shared_ptr<Operation>& after = nullptr, bool collective = false) {
    Streams& all = streams();
    std::lock_guard<std::recursive_mutex> lock(all.mutex);
    cudaStream_t s = all.find(stream);
    if (!s) { no_such_stream(what, site); return nullptr; }
    auto o = std::make_shared<Operation>();
    o->what = what, o->site = site, o->stream = s, o->collective = collective, o->work = std::move(work);
    if (s == &all.null) o->after = last_of([&](const CUstream_st& other) { return other.blocking && &other != s; });
    else if (s->blocking && !all.null.queue.empty()) o->after.push_back(all.null.queue.back());
    if (after) o->after.push_back(after);
    if (collective) {                      // all ranks come to them in one order, whatever their streams
        if (all.last_collective) o->after.push_back(all.last_collective);
        all.last_collective = o;
    }
    s->queue.push_back(o);
    if (options.streams == kRandom)
        for (uint64_t n = all.operations_meanwhile(); n > 0; n--)
            if (auto left = last_of([](const CUstream_st&) { return true; }); !left.empty()) run_next(pick_stream(*left[0]));
    return o;
}
// What every call does that gives a stream work
template <class F> cudaError_t submit(cudaStream_t stream, const char* what, Site site, F&& work, bool collective = false) {
    if (!streams_queue()) { work(); return cudaSuccess; }
    return enqueue(stream, what, site, std::forward<F>(work), nullptr, collective) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

inline void synchronize(const std::shared_ptr<Operation>& o) {
    if (!streams_queue()) return;
    std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    force(o);
}
inline void synchronize_device() {
    if (!streams_queue()) return;
    std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    force(last_of([](const CUstream_st&) { return true; }));
}
inline cudaError_t synchronize_stream(cudaStream_t stream, const char* what, Site site) {
    if (!streams_queue()) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    cudaStream_t s = streams().find(stream);
    if (!s) return no_such_stream(what, site);
    force(last_of_stream(s));
    return cudaSuccess;
}
// Whoever asks again and again gets there in the end: one operation further each time.
inline cudaError_t are_done(const std::vector<std::shared_ptr<Operation>>& operations) {
    for (auto& o : operations)
        if (!o->done) {
            run_next(pick_stream(*o));
            return set_error(cudaErrorNotReady);
        }
    return cudaSuccess;
}

// At exit nobody waits any more; a GPU finishes what it has. But other ranks may be gone.
inline void finish_streams() {
    if (!streams_queue() || streams().running || !streams().mutex.try_lock()) return;
    for (bool more = true; more;) {
        more = false;
        for (auto& o : last_of([](const CUstream_st& s) { return !waits_for(*s.queue.front()) && !s.queue.front()->collective; })) {
            run_next(o->stream);
            more = true;
        }
    }
    streams().mutex.unlock();
}

}  // namespace simt
