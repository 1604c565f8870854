// D = epilogue(alpha op(A) op(B) + beta C), column-major, by OpenBLAS.
//
// OpenBLAS sums in another order with another number of threads. So it gets one thread per call, each call is a tile of D whose
// size depends on the shape alone, and the tiles are shared out: the result has the same bits on any number of threads. bf16 inputs
// are widened once into scratch; sums are fp32 throughout, and the epilogue works on a tile while it is in the cache.
#pragma once
#include <cblas.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include "../cuda_bf16.h"
#include "parallel.h"

namespace simt {

struct Matrix {
    void* data = nullptr;
    bool bf16 = false;             // or fp32
    int64_t rows = 0, cols = 0, ld = 0;
    size_t element() const { return bf16 ? 2 : 4; }
    char* at(int64_t row, int64_t col) const { return (char*)data + (col * ld + row) * (int64_t)element(); }
};

struct Matmul {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    float alpha, beta;
    Matrix a, b, c, d, bias, aux;
    // the epilogue, in this order
    bool add_bias = false;         // v += bias[row]
    bool gelu = false;             // aux = v, v = gelu(v)
    bool dgelu = false;            // v *= gelu'(aux)
};

// n elements between memory of either type and floats
inline void load(float* to, const char* from, bool bf16, int64_t n) {
    if (!bf16) { memcpy(to, from, n * 4); return; }
    const unsigned short* p = (const unsigned short*)from;
    for (int64_t i = 0; i < n; i++) to[i] = bf16_widen(p[i]);
}
inline void store(char* to, const float* from, bool bf16, int64_t n) {
    if (!bf16) { memcpy(to, from, n * 4); return; }
    unsigned short* p = (unsigned short*)to;
    for (int64_t i = 0; i < n; i++) p[i] = bf16_round(from[i]);
}

// cuBLASLt's GELU is the tanh form
constexpr float kGeluScale = 0.7978845608028654f, kGeluCubic = 0.044715f;
inline float gelu(float x) { return 0.5f * x * (1 + tanhf(kGeluScale * (x + kGeluCubic * x * x * x))); }
inline float gelu_slope(float x) {
    float t = tanhf(kGeluScale * (x + kGeluCubic * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kGeluScale * (1 + 3 * kGeluCubic * x * x);
}

// Buffers that only grow, so that a training step allocates nothing.
struct Scratch {
    float* p = nullptr;
    size_t capacity = 0;
    float* get(size_t n) {
        if (n > capacity) {
            free(p);
            capacity = n;
            p = (float*)aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
            if (!p) out_of_host_memory("cannot allocate %zu MiB of matmul scratch", n * sizeof(float) >> 20);
        }
        return p;
    }
};

// OpenBLAS starts threads of its own when it is loaded, each with a buffer of 128 MiB, and whoever calls it takes one
// more. Where the memory for a buffer is not to be had it tries again for ever, at the load as in a call, and at exit it
// waits for threads that do. So it is loaded here, after it has been told to start none, and takes the buffers for our
// threads at once, each after we have seen that there is room for it.
struct OpenBlas {
    static constexpr size_t kBuffer = (128 << 20) + (64 << 10);
    decltype(&cblas_sgemm) sgemm;
    OpenBlas() {
        setenv("OPENBLAS_NUM_THREADS", "1", 1);
        need(kBuffer + (64 << 20), "load");   // its code, and in newer versions a first buffer
        void* library = dlopen("libopenblas.so.0", RTLD_NOW);
        if (!library) library = dlopen("libopenblas.so", RTLD_NOW);
        if (!library) missing();
        sgemm = (decltype(sgemm))dlsym(library, "cblas_sgemm");
        auto set_threads = (decltype(&openblas_set_num_threads))dlsym(library, "openblas_set_num_threads");
        if (!sgemm || !set_threads) missing();
        set_threads(1);                        // if it was loaded before
        auto take = (void* (*)(int))dlsym(library, "blas_memory_alloc");
        auto give_back = (void (*)(void*))dlsym(library, "blas_memory_free");
        if (!take || !give_back) { need(kBuffer * thread_count(), "run"); return; }
        void* buffers[kMaxOsThreads];
        for (int i = 0; i < thread_count(); i++) {
            need(kBuffer, "run");
            buffers[i] = take(0);
        }
        for (int i = 0; i < thread_count(); i++) give_back(buffers[i]);
    }
    static void need(size_t bytes, const char* what) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            out_of_host_memory("cannot %s OpenBLAS, which takes 128 MiB of address space for each of %d threads", what,
                               thread_count());
        munmap(p, bytes);
    }
    [[noreturn]] static void missing() {
        fprintf(stderr, "simt error: cannot load OpenBLAS: %s\n  Install it: apt-get install libopenblas-dev\n", dlerror());
        exit(1);
    }
};
inline const OpenBlas& openblas() {
    static OpenBlas* b = new OpenBlas;
    return *b;
}

constexpr int64_t kTile = 256;     // at most, on a side

// Few tiles would leave OS threads idle; many small ones would have OpenBLAS copy its inputs more often.
inline void tile_size(const Matmul& p, int64_t* rows, int64_t* cols) {
    *rows = *cols = kTile;
    auto tiles = [&] { return (p.m + *rows - 1) / *rows * ((p.n + *cols - 1) / *cols); };
    // The side that is longer in truth is halved, as long as that leaves it worth a call.
    while (tiles() < 16 && std::max(std::min(*rows, p.m), std::min(*cols, p.n)) > 64) {
        if (std::min(*rows, p.m) >= std::min(*cols, p.n)) *rows /= 2;
        else *cols /= 2;
    }
}

// `tile` holds alpha op(A) op(B) for rows x cols elements of D from (row, col) on
inline void tile_epilogue(const Matmul& p, int64_t row, int64_t col, int64_t rows, int64_t cols, float* tile) {
    float other[kTile], bias[kTile];
    const float off = 1 + options.gelu_error;      // as another implementation would be
    if (p.add_bias) load(bias, p.bias.at(row, 0), p.bias.bf16, rows);
    for (int64_t j = 0; j < cols; j++) {
        float* v = tile + j * rows;
        if (p.beta != 0) {
            load(other, p.c.at(row, col + j), p.c.bf16, rows);
            for (int64_t i = 0; i < rows; i++) v[i] += p.beta * other[i];
        }
        if (p.add_bias) for (int64_t i = 0; i < rows; i++) v[i] += bias[i];
        if (p.gelu) {
            store(p.aux.at(row, col + j), v, p.aux.bf16, rows);
            for (int64_t i = 0; i < rows; i++) v[i] = off * gelu(v[i]);
        }
        if (p.dgelu) {
            load(other, p.aux.at(row, col + j), p.aux.bf16, rows);
            for (int64_t i = 0; i < rows; i++) v[i] *= off * gelu_slope(other[i]);
        }
        store(p.d.at(row, col + j), v, p.d.bf16, rows);
    }
}

inline void matmul(const Matmul& p) {
    static const auto sgemm = openblas().sgemm;
    static Scratch scratch_a, scratch_b;
    static thread_local Scratch scratch_tile;
    double start = seconds();

    const bool worth_sharing = 2.0 * p.m * p.n * p.k > 1e6;       // 10 microseconds
    auto for_each = [&](int64_t n, const auto& f) {
        if (worth_sharing) parallel(n, f);
        else
            for (int64_t i = 0; i < n; i++) f(i);
    };
    constexpr int64_t kColumns = 32;               // widened at a time
    auto pieces = [](const Matrix& x) { return x.bf16 ? (x.cols + kColumns - 1) / kColumns : 0; };
    auto widened = [](const Matrix& x, Scratch& scratch) {
        return x.bf16 ? Matrix{scratch.get(x.rows * x.cols), false, x.rows, x.cols, x.rows} : x;
    };
    const Matrix a = widened(p.a, scratch_a), b = widened(p.b, scratch_b);       // as floats: the originals, or copies
    for_each(pieces(p.a) + pieces(p.b), [&](int64_t i) {
        const bool first = i < pieces(p.a);
        const Matrix &from = first ? p.a : p.b, &to = first ? a : b;
        int64_t begin = (first ? i : i - pieces(p.a)) * kColumns;
        for (int64_t j = begin; j < std::min(begin + kColumns, from.cols); j++)
            load((float*)to.at(0, j), from.at(0, j), true, to.rows);
    });

    int64_t tile_rows, tile_cols;
    tile_size(p, &tile_rows, &tile_cols);
    int64_t down = (p.m + tile_rows - 1) / tile_rows, across = (p.n + tile_cols - 1) / tile_cols;
    // With nothing to do per element, OpenBLAS writes straight into D
    bool plain = !p.add_bias && !p.gelu && !p.dgelu, direct = plain && !p.d.bf16 && (p.beta == 0 || p.c.data == p.d.data);
    for_each(down * across, [&](int64_t t) {
        int64_t row = t % down * tile_rows, col = t / down * tile_cols;
        int64_t rows = std::min(tile_rows, p.m - row), cols = std::min(tile_cols, p.n - col);
        float* out = direct ? (float*)p.d.at(row, col) : scratch_tile.get(kTile * kTile);
        sgemm(CblasColMajor, p.transpose_a ? CblasTrans : CblasNoTrans, p.transpose_b ? CblasTrans : CblasNoTrans, rows, cols, p.k, p.alpha,
              (const float*)(p.transpose_a ? a.at(0, row) : a.at(row, 0)), a.ld,
              (const float*)(p.transpose_b ? b.at(col, 0) : b.at(0, col)), b.ld, direct ? p.beta : 0.0f, out, direct ? p.d.ld : rows);
        if (!direct) tile_epilogue(p, row, col, rows, cols, out);
    });
    if (options.profile) add_to_profile("[matmul]", seconds() - start, 0, 0);
}

}  // namespace simt
