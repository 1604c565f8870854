// What the files of this folder share: device memory that tells when it was not written, or written beside; comparison
// with bounds; a digest of every result; the clock. Include it after the trainer.
#pragma once

#include <inttypes.h>

#include <cmath>

// ---- arguments

struct Arguments {
    uint64_t seed = 1337;
    bool bench = false, large = false;
};
Arguments parse_arguments(int argc, char** argv, const char* what) {
    Arguments o;
    program_name = argv[0];
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        char* end = nullptr;
        if (a == "--bench") o.bench = true;
        else if (a == "--large") o.large = true;
        else if (a == "--seed" && i + 1 < argc && (o.seed = strtoull(argv[++i], &end, 10), end != argv[i] && *end == 0))
            continue;
        else if (a == "--help" || a == "-h") {
            printf("%s\n  without arguments it tests, and exits with 0 or 1\n"
                   "  --bench     bytes moved, time and bandwidth of each version instead\n"
                   "  --seed N    of the test's random numbers (1337)\n"
                   "  --large     tests with 2^31 elements even where that is slow or memory may be short\n", what);
            exit(0);
        } else fail_usage("%s: expected --bench, --seed N, --large or --help", a.c_str());
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
void digest(const void* p, size_t bytes) {      // FNV-1a, over words of 8 bytes
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const uint8_t*)p + i, std::min(bytes - i, (size_t)8));
        digest_state = (digest_state ^ word) * 0x100000001b3ull;
        digest_state ^= digest_state >> 29;
    }
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

// A statement about many numbers, and the first cases that contradict it.
struct Property {
    const char *what, *bound_text;
    size_t compared = 0, wrong = 0;
    double largest_error = 0, largest_share = 0;

    Property(const char* what, const char* bound_text = "") : what(what), bound_text(bound_text) {}
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
    void equal(size_t i, double ours, double reference) {   // any NaN equals any other; zeros have signs
        compared++;
        bool same =
            std::isnan(reference) ? std::isnan(ours) : ours == reference && std::signbit(ours) == std::signbit(reference);
        if (!same) contradict(i, ours, reference, 0);
    }
    void is(bool fine, const char* otherwise) {
        compared++;
        if (!fine && ++wrong <= 3) printf("       %s: %s\n", case_name.c_str(), otherwise);
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

constexpr double EPS32 = 0x1p-24;                       // half a unit in the last place of fp32, relative
constexpr double EPS16 = 0x1p-8;                        // and of bf16, which has 8 bits, the first of them implied
constexpr double EPSX = kFP32 ? EPS32 : EPS16;          // what storing a result may cost
// How many additions stand one behind the other in a column sum: a warp's rows, the 8 warps, the slices, and the gradient that
// was there. Each rounds the sum so far, which is at most the sum of absolute values.
inline double colsum_depth(int rows) { return ceil_div(rows, colsum_slices(rows) * 8) + 8 + colsum_slices(rows) + 1; }

int finish(const Arguments& o) {
    printf("checksum %016" PRIx64 " (seed %" PRIu64 ")\n%s\n", digest_state, o.seed, failures ? "FAILED" : "all is well");
    return failures != 0;
}

// ---- random numbers

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
};
inline std::vector<float> floats(const std::vector<floatX>& v) { return std::vector<float>(v.begin(), v.end()); }

// ---- device memory

// n elements between two guards. What nobody has written is NaN (all bits set), in fp32 and in bf16.
template <class T>
struct Buffer {
    static constexpr size_t GUARD = 256;   // bytes; keeps cudaMalloc's alignment
    T* p = nullptr;
    size_t n;
    uint8_t* base = nullptr;

    explicit Buffer(size_t n) : n(n) {
        cudaCheck(cudaMalloc((void**)&base, bytes() + 2 * GUARD));
        cudaCheck(cudaMemset(base, 0xa5, bytes() + 2 * GUARD));
        p = (T*)(base + GUARD);
        cudaCheck(cudaMemset(p, 0xff, bytes()));
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { write(v); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(base); }

    size_t bytes() const { return n * sizeof(T); }
    void write(const std::vector<T>& v) { cudaCheck(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> read() const {   // waits for what runs; looks at the guards; adds to the digest
        std::vector<T> v(n);
        cudaCheck(cudaDeviceSynchronize());
        cudaCheck(cudaMemcpy(v.data(), p, bytes(), cudaMemcpyDeviceToHost));
        uint8_t guard[2 * GUARD];
        cudaCheck(cudaMemcpy(guard, base, GUARD, cudaMemcpyDeviceToHost));
        cudaCheck(cudaMemcpy(guard + GUARD, (uint8_t*)p + bytes(), GUARD, cudaMemcpyDeviceToHost));
        for (uint8_t g : guard)
            if (g != 0xa5) fail("%s: something was written beside a tensor of %zu elements", case_name.c_str(), n);
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

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// ---- the benchmark

__global__ void copy_kernel(floatX* out, const floatX* inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) *reinterpret_cast<Vec*>(out + i) = *reinterpret_cast<const Vec*>(inp + i);
}

// Milliseconds on the device: the median of 20 runs after 5.
template <class F>
float measure_ms(F&& run) {
    cudaEvent_t from, to;
    cudaCheck(cudaEventCreate(&from));
    cudaCheck(cudaEventCreate(&to));
    std::vector<float> times;
    for (int i = 0; i < 25; i++) {
        cudaCheck(cudaEventRecord(from, 0));
        run();
        cudaCheck(cudaEventRecord(to, 0));
        cudaCheck(cudaEventSynchronize(to));
        float ms;
        cudaCheck(cudaEventElapsedTime(&ms, from, to));
        if (i >= 5) times.push_back(ms);
    }
    cudaCheck(cudaEventDestroy(from));
    cudaCheck(cudaEventDestroy(to));
    std::nth_element(times.begin(), times.begin() + 10, times.end());
    return times[10];
}

// One table: what each version moves to and from memory for an element, and on a GPU how fast it does so. Bytes are counted
// from the shapes, a tensor once for each kernel that reads or writes it: what a kernel reads twice in a row, a cache holds.
struct BenchTable {
    bool timed;
    size_t n;
    double copy = 0;   // GB/s

    BenchTable(const char* title, size_t n) : timed(!on_cpu_backend()), n(n) {
        printf("\n%s\n  %-62s %9s", title, "", "B/element");
        if (timed) {
            Buffer<floatX> a(n), b(n);
            copy =
                2.0 * sizeof(floatX) * n / 1e6 / measure_ms([&] { copy_kernel<<<ceil_div(n, 256 * VEC), 256>>>(a.p, b.p, n); });
            printf(" %9s %8s %7s", "ms", "GB/s", "of copy");
        }
        printf("\n");
        if (timed) print("a copy, 16 bytes a thread", 2 * sizeof(floatX), 2.0 * sizeof(floatX) * n / 1e6 / copy);
    }
    void print(const char* name, double bytes, double ms) {
        printf("  %-62s %9.2f", name, bytes);
        if (timed) printf(" %9.3f %8.0f %6.0f%%", ms, bytes * n / 1e6 / ms, 100 * bytes * n / 1e6 / ms / copy);
        printf("\n");
    }
    template <class F>
    void row(const char* name, double bytes, F&& run) {
        print(name, bytes, timed ? measure_ms(run) : 0);
    }
};

void bench_device() {
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, 0));
    printf("%s, %s\n", p.name, dtype_name(FLOATX));
    if (on_cpu_backend())
        printf("Times mean nothing on the CPU backend: here are the bytes that each version moves, counted from the shapes.\n");
}
