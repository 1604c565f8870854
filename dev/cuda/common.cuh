// What the files of this folder share: device memory that tells when it was not written, or written beside; comparison with
// tolerances; tests that are the same for every kernel; a digest of every result; the benchmark. Include it after the trainer.
#pragma once

#include <inttypes.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cmath>

// With the sanitizers, which look at each access, a part of the cases is enough, and all would take long.
#if defined(SIMT_ASAN) && SIMT_ASAN
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif

// ---- arguments

struct Arguments {
    uint64_t seed = 1337;
    bool bench = false, large = false;
    std::string misuse;   // see test_misuse
};
bool small_only = false;    // no tensors of more than 2^31 elements
bool bench_json = false;    // a line of JSON for each row of the benchmark, instead of tables
size_t guard_bytes = 256;   // on either side of a tensor (cudaMalloc's alignment)
Arguments parse_arguments(int argc, char** argv, const char* what) {
    Arguments o;
    program_name = argv[0];
    if (SANITIZED) guard_bytes = 0;   // the sanitizer has guards of its own, and they catch reading too
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        char* end = nullptr;
        if (a == "--bench") o.bench = true;
        else if (a == "--json") o.bench = bench_json = true;
        else if (a == "--large") o.large = true;
        else if (a == "--small") small_only = true;
        else if (a == "--tight") guard_bytes = 0;
        else if (a == "--misuse" && i + 1 < argc) o.misuse = argv[++i];   // by test_misuse alone
        else if (a == "--seed" && i + 1 < argc && (o.seed = strtoull(argv[++i], &end, 10), end != argv[i] && *end == 0)) continue;
        else if (a == "--help" || a == "-h") {
            printf("%s\n  without arguments it tests, and exits with 0 or 1\n"
                   "  --bench     bytes moved, time and bandwidth of each version instead; --json: one line of JSON per row\n"
                   "  --seed N    of the test's random numbers (1337)\n"
                   "  --large     what is slow too: attention over 1000 positions\n"
                   "  --small     leaves out index arithmetic beyond 2^31, which takes much memory on a GPU\n"
                   "  --tight     no guards around tensors, so that compute-sanitizer sees their ends\n", what);
            exit(0);
        } else fail_usage("%s: expected --bench, --json, --seed N, --large, --small, --tight or --help", a.c_str());
    }
    return o;
}

bool on_cpu_backend() {
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, 0));
    return strcmp(p.name, "CPU backend") == 0;
}
size_t free_memory() {
    size_t free, total;
    cudaCheck(cudaMemGetInfo(&free, &total));
    return free;
}

// ---- checks

int failures = 0;
uint64_t digest_state = 0xcbf29ce484222325ull;   // of every bit of every result, so that two runs can be compared by one number
void digest(const void* p, size_t bytes) {       // FNV-1a, over words of 8 bytes
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const uint8_t*)p + i, std::min(bytes - i, (size_t)8));
        digest_state = (digest_state ^ word) * 0x100000001b3ull;
        digest_state ^= digest_state >> 29;
    }
}
int finish(const Arguments& o) {
    printf("checksum %016" PRIx64 " (seed %" PRIu64 ")\n%s\n", digest_state, o.seed, failures ? "FAILED" : "all is well");
    return failures != 0;
}

std::string case_name;   // which case a failure belongs to
__attribute__((format(printf, 1, 2))) void set_case(const char* format, ...) {
    char text[200];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    case_name = text;
}

constexpr double EPS32 = 0x1p-24;                // half a unit in the last place of fp32, relative
constexpr double EPS16 = 0x1p-8;                 // and of bf16, which has 8 bits, the first of them implied
constexpr double EPSX = kFP32 ? EPS32 : EPS16;   // what storing a result may cost
inline double store_of(DType type) { return type == F32 ? EPS32 : EPS16; }
// How far a result may be from its reference: 32 roundings of the sum of the absolute values of all that is added up on the way,
// which is more than the result where they cancel; and what storing it costs if it is rounded. Cutting it off costs up to twice as
// much, so that is noticed.
constexpr double ROUNDINGS = 32 * EPS32;
inline double tolerance(double reference, double terms, double store = EPSX) {
    return store * fabs(reference) + ROUNDINGS * terms + 0x1p-126;
}

// A statement about many numbers, and the first cases that contradict it.
struct Property {
    const char *what, *bound_text;
    size_t compared = 0, wrong = 0;
    double largest_error = 0, largest_share = 0;

    Property(const char* what = "", const char* bound_text = "") : what(what), bound_text(bound_text) {}
    void contradict(size_t i, double ours, double reference, double bound) {
        if (++wrong <= 3)
            printf("       %s: element %zu is %.9g, expected %.9g within %.3g\n", case_name.c_str(), i, ours, reference, bound);
    }
    void within(size_t i, double ours, double reference, double bound) {   // a NaN is within nothing
        double error = fabs(ours - reference);
        compared++;
        if (!(error <= bound)) contradict(i, ours, reference, bound);
        if (error > largest_error) largest_error = error;
        if (bound > 0 && error / bound > largest_share) largest_share = error / bound;
    }
    void close(size_t i, double ours, double reference, double terms, double store = EPSX) {
        within(i, ours, reference, tolerance(reference, terms, store));
    }
    void equal(size_t i, double ours, double reference) {   // any NaN equals any other; zeros have signs
        compared++;
        bool same = std::isnan(reference) ? std::isnan(ours) : ours == reference && std::signbit(ours) == std::signbit(reference);
        if (!same) contradict(i, ours, reference, 0);
    }
    void is(bool fine, const std::string& otherwise) {
        compared++;
        if (!fine && ++wrong <= 3) printf("       %s: %s\n", case_name.c_str(), otherwise.c_str());
    }
};
void report(std::initializer_list<Property*> properties) {
    for (Property* p : properties) {
        printf("  %s %s: %zu", p->wrong ? "FAIL" : "ok  ", p->what, p->compared);
        if (p->wrong) printf(", %zu wrong", p->wrong);
        if (p->largest_error > 0) printf(", error up to %.3g, %.2f of the bound", p->largest_error, p->largest_share);
        printf("%s%s%s\n", *p->bound_text ? " (" : "", p->bound_text, *p->bound_text ? ")" : "");
        failures += p->wrong > 0;
    }
}

// Where a number that is none goes: `reach` tells for each element whether it must become none, may become none, or has to keep the
// bits that it has without.
enum Reach : char { NOT, MUST, MAY };   // a bool will do for the first two
template <class T, class F>
void check_reach(Property& p, const std::vector<T>& ours, const std::vector<T>& clean, F&& reach, const char* what) {
    bool fine = ours.size() == clean.size();
    for (size_t i = 0; i < ours.size() && fine; i++) {
        const Reach r = (Reach)reach(i);
        const bool none = !std::isfinite((float)ours[i]), same = memcmp(&ours[i], &clean[i], sizeof(T)) == 0;
        fine = r == MUST ? none : r == MAY ? none || same : same;
    }
    p.is(fine, std::string(what) + ": a NaN too many or too few, or other bits");
}

// Calls that a launcher must refuse: the program runs itself again for each, because refusing ends it. `call` must fail before it
// touches the GPU. Call this first in main.
struct Misuse {
    std::string name, expected;   // without apostrophes: it passes through a shell; a part of the message
    std::function<void()> call;
};
// Of launchers whose threads take 8 neighbours: `what` is as check_vec has it, "act_forward: OC", and `call` makes it 12.
inline Misuse refuses_12(const std::string& what, std::function<void()> call) {
    return {what, what + " is 12: expected a multiple of 8", call};
}
void test_misuse(const Arguments& o, const std::vector<Misuse>& cases) {
    if (!o.misuse.empty()) {
        for (const Misuse& m : cases)
            if (o.misuse == m.name) m.call();
        exit(0);   // was not refused
    }
    Property p("what the kernels cannot do is refused, with a message and status 1");
    for (const Misuse& m : cases) {
        set_case("%s", m.name.c_str());
        std::string said, command = "'" + std::string(program_name) + "' --misuse '" + m.name + "' 2>&1";
        FILE* f = popen(command.c_str(), "r");
        if (f == nullptr) fail("could not run %s", command.c_str());
        for (int c; (c = fgetc(f)) != EOF;) said += (char)c;
        int status = pclose(f);
        p.is(WIFEXITED(status) && WEXITSTATUS(status) == 1, "expected exit status 1");
        p.is(said.find(m.expected) != std::string::npos, "expected \"" + m.expected + "\", it said: " + said);
    }
    report({&p});
}

// ---- numbers

struct Random {
    uint64_t seed, stream, i = 0;
    Random(uint64_t seed, uint64_t stream) : seed(seed), stream(stream) {}
    uint64_t bits() { return hash64(seed, stream, i++); }
    float uniform() { return hash_uniform(bits()); }
    float normal() {   // Box and Muller
        float u = uniform();
        return sqrtf(-2 * logf(u)) * cosf(6.2831853f * uniform());
    }
    std::vector<floatX> normals(size_t n, float mean = 0, float std = 1) {
        std::vector<floatX> v(n);
        for (floatX& x : v) x = (floatX)(mean + std * normal());
        return v;
    }
    std::vector<float> grads(size_t n, float std = 10) {   // as a gradient of either type can hold them
        std::vector<float> v(n);
        for (float& x : v) x = (float)(__nv_bfloat16)(std * normal());
        return v;
    }
};
// (B, T) where each token's document begins in its row: at 0, and at any token with a chance of 1 in `mean`
inline std::vector<int> documents(Random& random, int B, int T, int mean) {
    std::vector<int> document((size_t)B * T, 0);
    for (int i = 0; i < B * T; i++)
        if (i % T > 0) document[i] = random.bits() % mean == 0 ? i % T : document[i - 1];
    return document;
}
inline std::vector<float> floats(const std::vector<floatX>& v) { return std::vector<float>(v.begin(), v.end()); }

using Doubles = std::vector<double>;
template <class T> Doubles doubles(const std::vector<T>& v) {
    Doubles d(v.size());
    for (size_t i = 0; i < v.size(); i++) d[i] = (float)v[i];
    return d;
}
template <class T> bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// ---- device memory

// Values for a benchmark. Equal ones would flatter: where few bits change from one to the next a GPU takes less power, and clocks
// rise.
template <class T> __global__ void fill_kernel(T* p, size_t n, float low, float high) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) p[i] = (T)(low + (high - low) * hash_uniform(hash64(1337, 0, i)));
}
template <class T> void fill_random(T* p, size_t n, float low = -0.05f, float high = 0.05f) {
    fill_kernel<<<ceil_div(n, 256), 256>>>(p, n, low, high);
}
void wait() {   // and find the errors of what was launched
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaDeviceSynchronize());
}

// n elements between two guards. What nobody has written is NaN (all bits set), in fp32 and in bf16.
template <class T> struct Buffer {
    T* p = nullptr;
    size_t n, guard = guard_bytes;
    uint8_t* base = nullptr;

    explicit Buffer(size_t n) : n(n) {
        cudaCheck(cudaMalloc((void**)&base, bytes() + 2 * guard));
        if (guard > 0) cudaCheck(cudaMemset(base, 0xa5, bytes() + 2 * guard));
        p = (T*)(base + guard);
        cudaCheck(cudaMemset(p, 0xff, bytes()));
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { write(v); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(base); }

    size_t bytes() const { return n * sizeof(T); }
    void fill(float low = -0.05f, float high = 0.05f) { fill_random(p, n, low, high); }
    void write(const std::vector<T>& v) { cudaCheck(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> read() const {   // waits for what runs; looks at the guards; adds to the digest
        std::vector<T> v(n);
        std::vector<uint8_t> all(bytes() + 2 * guard);
        wait();
        cudaCheck(cudaMemcpy(all.data(), base, all.size(), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < guard; i++)
            if (all[i] != 0xa5 || all[all.size() - 1 - i] != 0xa5)
                fail("%s: something was written beside a tensor of %zu elements", case_name.c_str(), n);
        if (n > 0) memcpy((void*)v.data(), all.data() + guard, bytes());
        digest(v.data(), bytes());
        return v;
    }
};

// A gradient of either type, seen as fp32 from the host.
struct GradBuffer {
    DType type;
    size_t n;
    Buffer<uint8_t> memory;
    GradBuffer(size_t n, DType type) : type(type), n(n), memory(n * dtype_size(type)) {}
    Grad grad() const { return {memory.p, type}; }
    void fill() { type == F32 ? fill_random((float*)memory.p, n) : fill_random((__nv_bfloat16*)memory.p, n); }
    void write(const std::vector<float>& v) {   // rounds to the type
        std::vector<uint8_t> raw(memory.n);
        for (size_t i = 0; i < n; i++) {
            if (type == F32) ((float*)raw.data())[i] = v[i];
            else ((__nv_bfloat16*)raw.data())[i] = (__nv_bfloat16)v[i];
        }
        memory.write(raw);
    }
    std::vector<float> read() const {
        std::vector<uint8_t> raw = memory.read();
        std::vector<float> v(n);
        for (size_t i = 0; i < n; i++) v[i] = type == F32 ? ((float*)raw.data())[i] : (float)((__nv_bfloat16*)raw.data())[i];
        return v;
    }
};

// ---- index arithmetic beyond 2^31

// A tensor of n elements of which a test touches a few. On the CPU it is address space that nobody has filled (and reads as 0); on
// a GPU it is memory, if there is so much.
template <class T> struct FarBuffer {
    T* p = nullptr;   // null: no room
    size_t n;
    explicit FarBuffer(size_t n) : n(n) {
        if (small_only) {
        } else if (on_cpu_backend()) {
            void* m = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (m != MAP_FAILED) p = (T*)m;
        } else if (free_memory() > bytes() + ((size_t)1 << 30)) {
            cudaCheck(cudaMalloc((void**)&p, bytes()));
            cudaCheck(cudaMemset(p, 0, bytes()));
        }
        if (p == nullptr) printf("  skipped: %s wants %.1f GB\n", case_name.c_str(), bytes() / 1e9);
    }
    FarBuffer(const FarBuffer&) = delete;
    FarBuffer& operator=(const FarBuffer&) = delete;
    ~FarBuffer() {
        if (p == nullptr) return;
        if (on_cpu_backend()) munmap(p, bytes());
        else cudaFree(p);
    }
    size_t bytes() const { return n * sizeof(T); }
    static void copy(void* to, const void* from, size_t bytes) {
        if (on_cpu_backend()) memcpy(to, from, bytes);
        else cudaCheck(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    }
    void write(size_t at, const std::vector<T>& v) { copy(p + at, v.data(), v.size() * sizeof(T)); }
    std::vector<T> read(size_t at, size_t count) const {   // waits for what runs; adds to the digest
        std::vector<T> v(count);
        wait();
        copy((void*)v.data(), p + at, count * sizeof(T));
        digest(v.data(), count * sizeof(T));
        return v;
    }
};
// Launches what `launch` launches: a GPU all of it, once; the CPU, one after the other, only these blocks of each grid (numbered x
// fastest, then y, z).
template <class F> void run_blocks(const std::vector<int64_t>& blocks, F&& launch) {
#ifdef __CUDACC__
    (void)blocks;
    launch();
#else
    for (int64_t b : blocks) {
        simt::run_only_blocks(b, b);
        launch();
    }
    simt::run_all_blocks();
#endif
}

// The test: a launch over large tensors, in each of which a window holds numbers, must make of them the bits that it makes of the
// same numbers alone, in small tensors. A window is (planes, rows, columns); its columns are neighbours.
struct FarTensor {
    virtual bool there() const = 0;
    virtual void write() = 0;
    virtual bool same() const = 0;
};
template <class T> struct Far : FarTensor {
    std::vector<T> values;   // what it holds before the launch: NaN if nothing is said
    FarBuffer<T> far;
    Buffer<T> near;
    size_t columns, row_step, plane_rows, plane_step;   // of the large tensor: elements from row to row, and plane to plane
    size_t at = 0;                                      // of the large tensor: where the window begins,
    size_t rows;                                        // and how many of each plane's rows it has, from the first

    Far(size_t n, std::vector<T> v, size_t columns, size_t row_step, size_t planes = 1, size_t plane_step = 0)
        : values(v), far(n), near(v), columns(columns), row_step(row_step), plane_rows(v.size() / columns / planes),
          plane_step(plane_step), rows(plane_rows) {}
    Far(size_t n, size_t count, size_t columns, size_t row_step, size_t planes = 1, size_t plane_step = 0)
        : Far(n, Buffer<T>(count).read(), columns, row_step, planes, plane_step) {}
    T* p(bool is_far) const { return is_far ? far.p : near.p; }
    bool there() const override { return far.p != nullptr; }
    template <class F>
    void each_row(F&& f) const {   // f(where it is far, and near)
        for (size_t i = 0; i < values.size() / columns; i++)
            if (i % plane_rows < rows) f(at + i / plane_rows * plane_step + i % plane_rows * row_step, i * columns);
    }
    void write() override {
        near.write(values);
        each_row([&](size_t to, size_t i) { far.write(to, {values.begin() + i, values.begin() + i + columns}); });
    }
    bool same() const override {
        const std::vector<T> v = near.read();
        bool same = true;
        each_row([&](size_t from, size_t i) {
            same &= same_bits(far.read(from, columns), {v.begin() + i, v.begin() + i + columns});
        });
        return same;
    }
};
// launch(false) takes the small tensors, launch(true) the large ones; `blocks` are those of the latter that have to do with the
// windows. False if there is no room.
template <class F>
bool check_far(Property& p, const std::vector<FarTensor*>& tensors, const std::vector<int64_t>& blocks, F&& launch) {
    for (FarTensor* t : tensors)
        if (!t->there()) return false;
    for (FarTensor* t : tensors) t->write();
    launch(false);
    run_blocks(blocks, [&] { launch(true); });
    for (size_t i = 0; i < tensors.size(); i++)
        p.is(tensors[i]->same(), "tensor " + std::to_string(i) + " of the list has other bits");
    return true;
}

// ---- what several files call

struct MatmulSession {   // cuBLASLt
    MatmulSession() {
        cublasCheck(cublasLtCreate(&matmul_state.handle));
        matmul_state.workspace_bytes = MATMUL_WORKSPACE;
        cudaCheck(cudaMalloc(&matmul_state.workspace, MATMUL_WORKSPACE));
    }
    ~MatmulSession() {
        cudaFree(matmul_state.workspace);
        cublasLtDestroy(matmul_state.handle);
    }
};

// The bias gradient as one writes it first: one thread per column. matmul.cu says what is wrong with that.
__global__ void bias_backward_1_kernel(Grad dbias, const floatX* dout, bool accumulate, int rows, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += (float)dout[(size_t)r * OC + c];
    grad_store(dbias, c, sum, accumulate);
}
inline void bias_backward_1(Grad dbias, const floatX* dout, bool accumulate, int rows, int OC) {
    bias_backward_1_kernel<<<ceil_div(OC, 128), 128>>>(dbias, dout, accumulate, rows, OC);
}

// ---- the benchmark

__global__ void copy_kernel(floatX* out, const floatX* inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) *reinterpret_cast<Vec*>(out + i) = *reinterpret_cast<const Vec*>(inp + i);
}

// Milliseconds on the device: the median of 20 runs after 5; of 4 after 1 where one takes longer than 20 ms.
template <class F> float measure_ms(F&& run) {
    cudaEvent_t from, to;
    cudaCheck(cudaEventCreate(&from));
    cudaCheck(cudaEventCreate(&to));
    std::vector<float> times;
    for (size_t runs = 25; times.size() < runs; ) {
        float ms;
        cudaCheck(cudaEventRecord(from, 0));
        run();
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaEventRecord(to, 0));
        cudaCheck(cudaEventSynchronize(to));
        cudaCheck(cudaEventElapsedTime(&ms, from, to));
        times.push_back(ms);
        if (ms > 20 && times.size() == 1) runs = 5;
    }
    cudaCheck(cudaEventDestroy(from));
    cudaCheck(cudaEventDestroy(to));
    const size_t warmup = times.size() / 5, middle = warmup + (times.size() - warmup) / 2;
    std::nth_element(times.begin() + warmup, times.begin() + middle, times.end());
    return times[middle];
}

// Tables of versions. A kernel that moves memory is held against a copy on the same GPU, one that multiplies against cuBLASLt's
// matmul of two 8192 x 8192 matrices. Bytes and flops are counted from the shapes, a tensor once for each kernel that reads or
// writes it: what a kernel reads twice in a row, a cache holds. On the CPU backend that is all that is printed.
struct BenchTable {
    enum Unit { BYTES, FLOPS };
    char title[200];
    Unit unit;
    size_t n;            // elements that bytes and flops are given per
    bool timed;
    double best = 0;     // the device's: GB/s of a copy, or TFLOP/s of a matmul

    __attribute__((format(printf, 4, 5))) BenchTable(size_t n, Unit unit, const char* format, ...)
        : unit(unit), n(n), timed(!on_cpu_backend()) {
        va_list args;
        va_start(args, format);
        vsnprintf(title, sizeof title, format, args);
        va_end(args);
        const bool bytes = unit == BYTES;
        if (timed) best = bytes ? copy_rate() : matmul_rate();
        if (bench_json) return;
        printf("\n%s\n  %-62s %11s", title, "", bytes ? "B/element" : "flop/element");
        if (timed) {
            printf(" %9s %8s %9s\n", "ms", bytes ? "GB/s" : "TFLOP/s", bytes ? "of copy" : "of matmul");
            printf("  %-62s %11s %9s %8.0f %8.0f%%", bytes ? "a copy, 16 bytes per thread" : "cuBLASLt, 8192 x 8192 x 8192", "",
                   "", best, 100.0);
        }
        printf("\n");
    }
    // of a tensor of `all` elements, those that there are: without a GPU nothing runs, and one row is enough
    size_t here(size_t all, size_t row) const { return timed ? all : row; }
    static double copy_rate() {
        static double rate = 0;
        const size_t n = (size_t)1 << 28;   // beyond any cache
        if (rate > 0) return rate;
        Buffer<floatX> a(n), b(n);
        b.fill();
        const double ms = measure_ms([&] { copy_kernel<<<ceil_div(n, 256 * VEC), 256>>>(a.p, b.p, n); });
        return rate = 2.0 * sizeof(floatX) * n / 1e6 / ms;
    }
    static double matmul_rate() {
        static double rate = 0;
        const int N = 8192;
        if (rate > 0) return rate;
        Buffer<floatX> a((size_t)N * N), b((size_t)N * N), d((size_t)N * N);
        for (Buffer<floatX>* x : {&a, &b}) x->fill();
        return rate = 2.0 * N * N * N / 1e9 / measure_ms([&] { matmul_forward(d.p, a.p, b.p, nullptr, N, N, N, 0); });
    }
    // One version: bytes it moves (or flops it makes) for an element, and how to run it.
    template <class F>
    void row(const std::string& name, double per_element, F&& run) {
        const double ms = timed ? measure_ms(run) : 0, rate = timed ? per_element * n / ms / (unit == BYTES ? 1e6 : 1e9) : 0;
        if (bench_json) {
            const char* slash = strrchr(program_name, '/');
            printf("{\"program\": \"%s\", \"case\": \"%s\", \"version\": \"%s\", \"%s_per_element\": %.4g",
                   slash ? slash + 1 : program_name, title, name.c_str(), unit == BYTES ? "bytes" : "flops", per_element);
            if (timed)
                printf(", \"ms\": %.4f, \"%s\": %.1f, \"share\": %.4f", ms, unit == BYTES ? "gb_s" : "tflop_s", rate,
                       rate / best);
        } else {
            printf("  %-62s %11.2f", name.c_str(), per_element);
            if (timed) printf(" %9.3f %8.0f %8.0f%%", ms, rate, 100 * rate / best);
        }
        printf(bench_json ? "}\n" : "\n");
    }
};

void bench_device() {
    if (bench_json) return;
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, 0));
    printf("%s, %s\n", p.name, dtype_name(FLOATX));
    if (on_cpu_backend())
        printf("Times mean nothing on the CPU backend: here are the bytes that each version moves, or the flops that it makes,\n"
               "counted from the shapes.\n");
}
// The models of the trainer's family that a benchmark has its shapes of.
struct BenchModel {
    const char* name;
    int B, T, C, NH, NKV, HS, F;
    int rows() const { return B * T; }
};
const BenchModel BENCH_MODELS[2][2] = {
    {{"GPT-2 124M, B 64, T 1024", 64, 1024, 768, 12, 12, 64, 3072}, {"GPT-2 1558M, B 8, T 1024", 8, 1024, 1600, 25, 25, 64, 6400}},
    {{"SmolLM2 135M, B 64, T 1024", 64, 1024, 576, 9, 3, 64, 1536}, {"Llama 3.1 8B, B 1, T 8192", 1, 8192, 4096, 32, 8, 128, 14336}}};
// bench(model) for both of them, or bench(model's name, positions, C).
template <class F> int bench_models(F&& bench) {
    bench_device();
    for (const BenchModel& m : BENCH_MODELS[kRMSNorm])
        if constexpr (std::is_invocable_v<F, BenchModel>) bench(m);
        else bench(m.name, m.rows(), m.C);
    return 0;
}
