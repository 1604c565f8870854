// Kernel launches: configuration checks, blocks over OS threads, the profile.
#pragma once
#include <algorithm>
#include <map>
#include <tuple>
#include <type_traits>

#include "block.h"
#include "memory.h"
#include "parallel.h"

namespace simt {

// ---- a crash within a kernel is reported like any other error: with the kernel, the block and the thread -------

inline void on_fault(int number, siginfo_t* info, void*) {
    signal(number, SIG_DFL);                   // whatever happens in here, once is enough
    if (!worker || !worker->current) {         // not in a kernel: as if we had never been here
        raise(number);
        return;
    }
    const char* address = (const char*)info->si_addr;
    const char* stack = worker->current->fiber->stack;
    if (number == SIGSEGV && address >= stack - kGuardBytes && address < stack)
        die_in_kernel("stack overflow: a thread has %zu KB here for its local variables and calls", kStackBytes / 1024);
    if (number == SIGSEGV || number == SIGBUS)
        die_in_kernel("segmentation fault at address %p, which is no memory (SAN=1 names the line)", (const void*)address);
    die_in_kernel(number == SIGFPE ? "integer division by zero" : "abort() was called, or an assert failed");
}

// With ASan only aborts: it has its own, better, reports of the others.
inline void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) {
        if (SIMT_ASAN && number != SIGABRT) continue;
        struct sigaction old;
        sigaction(number, nullptr, &old);
        if (old.sa_handler == SIG_DFL) sigaction(number, &action, nullptr);      // a program's own handlers stay
    }
}

// Each OS thread needs a stack to report the overflow of another on.
inline void prepare_worker() {
    if (worker) return;
    worker = new Worker;
    static bool caught = (catch_faults(), true);
    (void)caught;
    if (SIMT_ASAN) return;
    stack_t stack = {};
    stack.ss_size = 64 * 1024;
    stack.ss_sp = malloc(stack.ss_size);
    if (stack.ss_sp) sigaltstack(&stack, nullptr);
}

// ---- the profile -----------------------------------------------------------------------------------

struct Profile { double seconds = 0; uint64_t calls = 0, threads = 0, switches = 0, block = 0, shared = 0; };
inline std::map<std::string, Profile>& profiles() { static auto* m = new std::map<std::string, Profile>; return *m; }

inline void print_profile() {
    std::vector<std::pair<std::string, Profile>> rows(profiles().begin(), profiles().end());
    std::sort(rows.begin(), rows.end(), [](auto& a, auto& b) { return a.second.seconds > b.second.seconds; });
    double total = 0;
    for (auto& r : rows) total += r.second.seconds;
    fprintf(stderr, "simt: profile, %.3f s in kernels\n", total);
    fprintf(stderr, "%10s %7s %9s %13s %13s %6s %7s  %s\n", "ms", "%", "calls", "threads", "switches", "block", "shared", "kernel");
    for (auto& [name, p] : rows)
        fprintf(stderr, "%10.2f %6.1f%% %9lu %13lu %13lu %6lu %7lu  %s\n", p.seconds * 1e3, 100 * p.seconds / total, p.calls, p.threads,
                p.switches, p.block, p.shared, name.c_str());
}
// block and shared: threads and bytes of dynamic shared memory of a block, at their most
inline void add_to_profile(const std::string& name, double seconds, uint64_t threads, uint64_t switches, uint64_t block = 0, uint64_t shared = 0) {
    static bool at_exit = !atexit(print_profile);
    (void)at_exit;
    Profile& p = profiles()[name];
    p.seconds += seconds;
    p.calls++;
    p.threads += threads;
    p.switches += switches;
    p.block = std::max(p.block, block);
    p.shared = std::max(p.shared, shared);
}

// ---- launching -------------------------------------------------------------------------------------

struct Config {                        // what stands between <<< and >>>
    dim3 grid, block;
    size_t dynamic_shared;
    cudaStream_t stream;
    Config(dim3 grid, dim3 block, size_t dynamic_shared = 0, cudaStream_t stream = nullptr)
        : grid(grid), block(block), dynamic_shared(dynamic_shared), stream(stream) {}
};

constexpr size_t kSharedDefault = 48 * 1024, kSharedOptIn = 99 * 1024;   // the latter as on sm_86 and sm_89
inline std::map<const void*, size_t> dynamic_shared_limit;   // by cudaFuncSetAttribute
inline uint64_t launch_count = 0;

// The address of the kernel, if its name alone determines it: not for a template whose arguments are deduced.
struct AddressOf {
    template <class R, class... A> const void* operator()(R (*f)(A...)) const { return (const void*)f; }
};
template <class L> const void* kernel_address(const L& lambda) {
    if constexpr (std::is_invocable_v<const L&, AddressOf>) return lambda(AddressOf{});
    else return nullptr;
}

inline bool asked_for_shared(const void* kernel) {   // static shared memory then comes on top of what was asked for
    return kernel ? dynamic_shared_limit.count(kernel) : !dynamic_shared_limit.empty();
}
inline size_t largest_dynamic_shared(const void* kernel) {
    size_t most = kSharedDefault;
    for (auto& [address, bytes] : dynamic_shared_limit)
        if (!kernel || address == kernel) most = std::max(most, bytes);
    return most;
}

// The same limits, and the same error codes, as a GPU's. The reason goes to stderr, since the code says little.
inline cudaError_t check_config(const char* kernel, Site site, const Config& c, size_t shared_limit) {
    auto refuse = [&](cudaError_t code, const std::string& why) {
        fprintf(stderr, "simt: launch of %s at %s:%d refused: %s (%s)\n", kernel, site.file, site.line, why.c_str(), cudaGetErrorName(code));
        return set_error(code);
    };
    auto show = [](const dim3& d) { return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")"; };
    auto empty = [](const dim3& d) { return d.x == 0 || d.y == 0 || d.z == 0; };
    const dim3 &g = c.grid, &b = c.block;
    if (empty(g) || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return refuse(cudaErrorInvalidConfiguration, "a grid of " + show(g) + "; it must be (1,1,1) to (2147483647,65535,65535)");
    if (empty(b) || b.x > 1024 || b.y > 1024 || b.z > 64 || (uint64_t)b.x * b.y * b.z > 1024)
        return refuse(cudaErrorInvalidConfiguration, "a block of " + show(b) + "; it must have 1 to 1024 threads, at most 64 in z");
    if (c.dynamic_shared > shared_limit)
        return refuse(cudaErrorInvalidValue, std::to_string(c.dynamic_shared) + " bytes of dynamic shared memory; this kernel may have " +
                      std::to_string(shared_limit) + ", and up to " + std::to_string(kSharedOptIn) + " after cudaFuncSetAttribute(kernel, "
                      "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)");
    return cudaSuccess;
}

// To share a grid out among OS threads costs some microseconds, more than many small grids take in all. So
// each place of launch remembers what a block cost there, and only what looks worth it is shared.
// Blocks have no order among themselves on a GPU either, so this cannot change a correct program's results.
constexpr double kWorthSharing = 20e-6;     // seconds

// A test may run a few blocks of a grid that is too large to run: where in a tensor of 2^31 elements a block reads and writes
// depends on its number, not on the other blocks.
inline int64_t first_block_to_run = 0, last_block_to_run = INT64_MAX;
inline void run_only_blocks(int64_t first, int64_t last) { first_block_to_run = first, last_block_to_run = last; }
inline void run_all_blocks() { run_only_blocks(0, INT64_MAX); }

inline void run_grid(const Launch& launch, double* seconds_per_block) {
    const int64_t offset = launch.first_block;
    const int64_t blocks = std::min((int64_t)launch.grid.x * launch.grid.y * launch.grid.z - 1, launch.last_block) + 1 - offset;
    last_kernel = launch.kernel;
    if (blocks <= 0) return;
    // The i-th block to run is number (first + i * step) mod blocks, counted from the offset.
    int64_t first = 0, step = 1;
    if (options.order == kReverse) first = blocks - 1, step = blocks - 1;
    if (options.order == kPriority) {
        uint64_t random = mix(options.seed ^ mix(~launch.number));
        first = random % blocks;
        step = mix(random) % blocks + 1;
        while (std::__gcd(step, blocks) != 1) step++;      // so that every block has its turn
    }
    std::atomic<uint64_t> switches{0};
    auto run = [&](int64_t i) {
        prepare_worker();
        uint64_t before = worker->switches;
        run_block(launch, offset + (int64_t)((first + (__int128)i * step) % blocks));
        if (options.profile) switches += worker->switches - before;
    };
    double start = seconds();
    int64_t done = 0;
    if (*seconds_per_block == 0) {                         // the first time here: try it out
        while (done < blocks && seconds() - start < kWorthSharing) run(done++);
        *seconds_per_block = (seconds() - start) / done;
    }
    bool share = *seconds_per_block * (blocks - done) > kWorthSharing;
    if (share) parallel(blocks - done, [&](int64_t i) { run(done + i); });
    else
        for (int64_t i = done; i < blocks; i++) run(i);
    double elapsed = seconds() - start;
    *seconds_per_block = elapsed * (share ? std::min((int64_t)thread_count(), blocks) : 1) / blocks;
    uint64_t block = (uint64_t)launch.block.x * launch.block.y * launch.block.z;
    if (options.profile) add_to_profile(launch.kernel, elapsed, blocks * block, switches, block, launch.dynamic_shared);
}

// What cu2cpp.py makes of kernel<<<config>>>(arguments): `call` calls the kernel, `address` yields its
// address. The kernel is called through a pointer to a function that knows the arguments' types. All that the stream needs to run
// it later is copied here, as on a GPU.
template <class Call, class Address, class... Arguments>
void launch(const char* kernel, const char* file, int line, const Config& c, const Call& call, const Address& address,
            const Arguments&... arguments) {
    static double seconds_per_block = 0;
    if (worker && worker->current) die_in_kernel("a kernel launches the kernel %s: the CPU backend cannot do that", kernel);
    size_t limit = largest_dynamic_shared(kernel_address(address));
    if (check_config(kernel, {file, line}, c, limit) != cudaSuccess) return;
    using KernelAndArguments = std::tuple<Call, std::decay_t<const Arguments>...>;
    auto run = [](const void* p) {
        std::apply([](const Call& call, const auto&... arguments) { call(arguments...); }, *(const KernelAndArguments*)p);
    };
    size_t with_static = asked_for_shared(kernel_address(address)) ? kSharedOptIn : kSharedDefault;
    const KernelAndArguments kernel_and_arguments(call, arguments...);
    Launch l = {kernel, {file, line}, c.grid, c.block, c.dynamic_shared, with_static, launch_count++,
                first_block_to_run, last_block_to_run, run, &kernel_and_arguments};
    if (!streams_queue()) return run_grid(l, &seconds_per_block);
    submit(c.stream, kernel, l.site, [l, kernel_and_arguments]() mutable {
        l.kernel_and_arguments = &kernel_and_arguments;
        run_grid(l, &seconds_per_block);
    });
}

}  // namespace simt
