// D = epilogue(alpha op(A) op(B) + beta C), column-major, by OpenBLAS.
//
// OpenBLAS sums in another order with another number of threads. So it gets one thread per call, each call
// is a tile of D whose size depends on the shape alone, and the tiles are shared out: the result has the same
// bits on any number of threads. bf16 inputs are widened once into scratch; sums are fp32 throughout, and
// the epilogue works on a tile while it is in the cache.
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
    int64_t batch_stride = 0;      // elements
    size_t element() const { return bf16 ? 2 : 4; }
    char* at(int64_t batch, int64_t row, int64_t col) const {
        return (char*)data + (batch * batch_stride + col * ld + row) * (int64_t)element();
    }
};

struct Matmul {
    int64_t m, n, k, batch;
    bool transpose_a, transpose_b;
    float alpha, beta;
    Matrix a, b, c, d;
    // the epilogue, in this order
    bool add_bias = false;         // v += bias[row]
    bool store_aux = false;        // aux = v
    bool gelu = false;             // v = gelu(v)
    bool dgelu = false;            // v *= gelu'(aux)
    bool sum_rows = false;         // bias[row] = sum over columns of v
    bool sum_a = false, sum_b = false;   // bias = sum over k of op(A), of op(B)
    Matrix aux, bias;
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
    auto tiles = [&] { return (p.m + *rows - 1) / *rows * ((p.n + *cols - 1) / *cols) * p.batch; };
    // The side that is longer in truth is halved, as long as that leaves it worth a call.
    while (tiles() < 16 && std::max(std::min(*rows, p.m), std::min(*cols, p.n)) > 64) {
        if (std::min(*rows, p.m) >= std::min(*cols, p.n)) *rows /= 2;
        else *cols /= 2;
    }
}

// `tile` holds alpha op(A) op(B) for rows x cols elements of D from (row, col) of batch z on
inline void tile_epilogue(const Matmul& p, int64_t z, int64_t row, int64_t col, int64_t rows, int64_t cols, float* tile,
                          float* row_sums) {
    float other[kTile], bias[kTile];
    if (p.add_bias) load(bias, p.bias.at(z, row, 0), p.bias.bf16, rows);
    if (p.sum_rows) std::fill(row_sums, row_sums + rows, 0.0f);
    for (int64_t j = 0; j < cols; j++) {
        float* v = tile + j * rows;
        if (p.beta != 0) {
            load(other, p.c.at(z, row, col + j), p.c.bf16, rows);
            for (int64_t i = 0; i < rows; i++) v[i] += p.beta * other[i];
        }
        if (p.add_bias) for (int64_t i = 0; i < rows; i++) v[i] += bias[i];
        if (p.store_aux) store(p.aux.at(z, row, col + j), v, p.aux.bf16, rows);
        const float off = 1 + options.gelu_error;   // as another implementation would be
        if (p.gelu) for (int64_t i = 0; i < rows; i++) v[i] = off * gelu(v[i]);
        if (p.dgelu) {
            load(other, p.aux.at(z, row, col + j), p.aux.bf16, rows);
            for (int64_t i = 0; i < rows; i++) v[i] *= off * gelu_slope(other[i]);
        }
        if (p.sum_rows) for (int64_t i = 0; i < rows; i++) row_sums[i] += v[i];
        store(p.d.at(z, row, col + j), v, p.d.bf16, rows);
    }
}

// Sums over k of op(X), X with k along its columns (`along`) or across them; `first` to `last` of the other side
inline void sum_over_k(const Matmul& p, const Matrix& x, bool along, int64_t first, int64_t last) {
    float sums[kTile] = {};
    if (along)
        for (int64_t i = first; i < last; i++)
            for (int64_t k = 0; k < p.k; k++) sums[i - first] += *(const float*)x.at(0, k, i);
    else
        for (int64_t k = 0; k < p.k; k++) {
            const float* column = (const float*)x.at(0, first, k);
            for (int64_t i = 0; i < last - first; i++) sums[i] += column[i];
        }
    store(p.bias.at(0, first, 0), sums, p.bias.bf16, last - first);
}

inline void matmul(const Matmul& p) {
    static const auto sgemm = openblas().sgemm;
    static Scratch scratch_a, scratch_b, scratch_sums;
    static thread_local Scratch scratch_tile;
    double start = seconds();

    int64_t tile_rows, tile_cols;
    tile_size(p, &tile_rows, &tile_cols);
    int64_t down = (p.m + tile_rows - 1) / tile_rows, across = (p.n + tile_cols - 1) / tile_cols, tiles = down * across * p.batch;
    float* row_sums = p.sum_rows ? scratch_sums.get(across * p.m) : nullptr;

    Matrix a = p.a, b = p.b;                       // as floats: the originals, or widened copies
    auto widened = [&](Matrix x, Scratch& scratch) {
        if (!x.bf16) return x;
        Matrix w = x;
        w.bf16 = false;
        w.ld = x.rows;
        w.batch_stride = x.batch_stride ? x.rows * x.cols : 0;
        w.data = scratch.get(x.rows * x.cols * (x.batch_stride ? p.batch : 1));
        return w;
    };
    a = widened(p.a, scratch_a), b = widened(p.b, scratch_b);
    constexpr int64_t kColumns = 32;               // widened at a time
    int64_t columns_a = p.a.bf16 ? a.cols * (a.batch_stride ? p.batch : 1) : 0;
    int64_t columns_b = p.b.bf16 ? b.cols * (b.batch_stride ? p.batch : 1) : 0;
    int64_t pieces_a = (columns_a + kColumns - 1) / kColumns, pieces_b = (columns_b + kColumns - 1) / kColumns;
    auto widen = [&](int64_t i) {
        const Matrix &from = i < pieces_a ? p.a : p.b, &to = i < pieces_a ? a : b;
        int64_t first = (i < pieces_a ? i : i - pieces_a) * kColumns;
        int64_t end = std::min(first + kColumns, i < pieces_a ? columns_a : columns_b);
        for (int64_t j = first; j < end; j++)
            load((float*)to.at(j / to.cols, 0, j % to.cols), from.at(j / to.cols, 0, j % to.cols), true, to.rows);
    };
    // With nothing to do per element, OpenBLAS writes straight into D
    bool plain = !p.add_bias && !p.store_aux && !p.gelu && !p.dgelu && !p.sum_rows;
    bool direct = plain && !p.d.bf16 && (p.beta == 0 || p.c.data == p.d.data);

    auto tile = [&](int64_t t) {
        int64_t z = t / (down * across), row = t % down * tile_rows, col = t / down % across * tile_cols;
        int64_t rows = std::min(tile_rows, p.m - row), cols = std::min(tile_cols, p.n - col);
        float* out = direct ? (float*)p.d.at(z, row, col) : scratch_tile.get(kTile * kTile);
        sgemm(CblasColMajor, p.transpose_a ? CblasTrans : CblasNoTrans, p.transpose_b ? CblasTrans : CblasNoTrans,
              rows, cols, p.k, p.alpha,
              (const float*)(p.transpose_a ? a.at(z, 0, row) : a.at(z, row, 0)), a.ld,
              (const float*)(p.transpose_b ? b.at(z, col, 0) : b.at(z, 0, col)), b.ld,
              direct ? p.beta : 0.0f, out, direct ? p.d.ld : rows);
        if (!direct) tile_epilogue(p, z, row, col, rows, cols, out, p.sum_rows ? row_sums + t / down * p.m + row : nullptr);
    };
    int64_t sums = p.sum_a ? (p.m + kTile - 1) / kTile : p.sum_b ? (p.n + kTile - 1) / kTile : 0;
    auto tile_or_sum = [&](int64_t i) {
        if (i < tiles) return tile(i);
        int64_t first = (i - tiles) * kTile;
        if (p.sum_a) sum_over_k(p, a, p.transpose_a, first, std::min(first + kTile, p.m));
        else sum_over_k(p, b, !p.transpose_b, first, std::min(first + kTile, p.n));
    };
    if (2.0 * p.m * p.n * p.k * p.batch > 1e6) {   // 10 microseconds: worth sharing
        parallel(pieces_a + pieces_b, widen);
        parallel(tiles + sums, tile_or_sum);
    } else {
        for (int64_t i = 0; i < pieces_a + pieces_b; i++) widen(i);
        for (int64_t i = 0; i < tiles + sums; i++) tile_or_sum(i);
    }
    if (p.sum_rows) {
        for (int64_t j = 1; j < across; j++)
            for (int64_t i = 0; i < p.m; i++) row_sums[i] += row_sums[j * p.m + i];
        store(p.bias.at(0, 0, 0), row_sums, p.bias.bf16, p.m);
    }
    if (options.profile) add_to_profile("[matmul]", seconds() - start, 0, 0);
}

}  // namespace simt
