/*
Llama in one file: training and fine-tuning in CUDA C, with every layer's forward and backward written out. It trains Llama 2 and 3,
Mistral, Qwen2 and 2.5, Qwen3, SmolLM2 and whatever else has their shape. Who knows train_gpt2.cu reads here what is different:
no positions but RoPE, RMSNorm, grouped queries, SwiGLU, no biases, a head of its own. All else is the same text.

    make train_llama                                             # or, on one GPU and nothing but the CUDA Toolkit:
    nvcc -O3 -std=c++17 -arch=sm_90 train_llama.cu -lcublasLt -o train_llama
    ./train_llama -e DIR -i data/train.bin -j data/val.bin -o run       # DIR: a model as Hugging Face has it; run/step_...: another
    ./train_llama -e DIR -i data/train.bin --base nf4 --lora 16 -o run  # adapters on frozen weights of 4 bits; run/step_...: PEFT's
    ./train_llama -e llama:L4,H4,K2,C128,F352,T128,V257 -i data/train.bin -j data/val.bin -b 16 -t 64
    ./train_llama --estimate -e llama3.1-8b -b 1 -t 8192         # what it would take, before anything is allocated
    ./train_llama --help

CONTENTS, in the order in which one would teach them. Who knows the parts starts at model_forward in section 7.

    1. numbers and errors            floatX, 16-byte accesses, warp sums, cudaCheck
    2. layers                        embedding, column sums, norm, matmul, attention, RoPE, SwiGLU, loss: each forward, then backward
    3. what backward keeps           Approx-BP: 2 bits of SiLU's input; MS-RMSNorm: one tensor for a norm and its matmul; frozen
                                     weights in 4 bits, and what adapters need besides matmuls
    4. attention on tensor cores     the version that most models use
    5. optimizer                     gradient norm, the verdict on a step; AdamW, also in 8 bits, and AdaLomo
    6. many GPUs                     NCCL, optimizer sharding
    7. the model                     configuration, the tensor table (the ledger), forward, loss, backward, update
    8. files                         tokens, model directories, checkpoints, logs, text
    9. main                          the command line and the loop

Every kernel has a file in dev/cuda with simpler versions, from the loop of a textbook to the one that stands here, and its tests.
*/
// ==== twin: primer
/*
A PRIMER OF THE GPU. kernel<<<grid, block, shared_bytes, stream>>>(...) launches a __global__ function: the GPU runs it once per
thread, and the call returns at once. Threads come in blocks, mostly of 256 here, and blocks in a grid; a thread finds its part of
the work from threadIdx, blockIdx, blockDim and gridDim. Kernels given to one stream run one after the other.
  - A block runs on one of the GPU's multiprocessors (an H100 has 132). Its threads share __shared__ memory, which is small (48 KB
    without asking for more) and nearly as fast as registers, and can wait for each other: __syncthreads() is that barrier. Blocks
    run in any order and cannot wait for each other.
  - 32 neighbouring threads are a warp, and each of them is one of its lanes. A warp executes one instruction for all its lanes, so
    where an `if` divides them both sides take time. Lanes can read each other's registers: __shfl_xor_sync(ALL_LANES, x, 16) gives
    lane i the x of lane i XOR 16, and five such steps (16, 8, 4, 2, 1) sum a value over the warp without shared memory.
  - Global memory is large and slow: a load takes about 500 cycles. A multiprocessor holds up to 64 warps and turns to another one
    while one waits. How many it can hold depends on their registers (65,536 in all, at most 255 per thread).
  - Loads are fastest when the lanes of a warp read neighbouring addresses (coalesced): then 32 lanes times 16 bytes are four lines
    of 128 bytes. Shared memory is divided into 32 banks, each 4 bytes wide: lanes that want different words of one bank take turns.
  - Most kernels here do little arithmetic for each byte, so the time they take is the bytes they move. Matmuls and attention do
    much, and run on the tensor cores, which multiply small matrices.
*/
// ==== end twin
/*
SHAPES. B batch, T time, C channels, NH heads of queries, NKV of keys and of values, HS head size (mostly C / NH), F channels between
the matmuls of the MLP, V vocabulary, Vp the vocabulary padded to a multiple of 128, L layers, rows = B*T. QKV = (NH + 2 NKV) HS is a
row of queries, keys and values. All matrices are row-major; a weight is (out, in) as in PyTorch.

ONE BLOCK, from top to bottom; backward goes up. "Kept" is what forward leaves for backward, in units of B*T*C elements, with
q = NH HS / C, which is mostly 1, k = NKV HS / C and f = F / C. The sums are for Llama 3.1 8B: k = 0.25, f = 3.5; of the builds at -r 1.

                                                                    exact                             APPROX_  MS_     both, that is
    tensor        shape      is                                     -r 0   -r 1   -r 2   -r 3   -r 4  ACT=2    NORM=1  USE_APPROXBP=1
    resid ----.   B,T,C      what comes in: resid_out of the block
    ln1       |   B,T,C      norm(resid), gamma ln1w                1      1      .      .      .     1        1 (z)   1 (z)
    qkv       |   B,T,QKV    ln1 qkvw^T + qkvb; q, k turned         q + 2k q + 2k q + 2k q + 2k .     q + 2k   q + 2k  q + 2k
    atty      |   B,T,NH HS  attention(qkv)                         q      q      q      q      .     q        q       q
    resid_mid +   B,T,C      resid + atty attprojw^T                1      1      1      1      .     1        .       .
    ln2       |   B,T,C      norm(resid_mid), gamma ln2w            1      1      .      .      .     1        1 (z)   1 (z)
    gateup    |   B,T,2F     ln2 gateupw^T: gate, and beside it up  2f     2f     2f     .      .     2.125f   2f      2.125f
    h         |   B,T,F      silu(gate) up                          f      .      .      .      .     .        .       .
    resid_out +   B,T,C      resid_mid + h downw^T                  1      1      1      1      1     1        .       .
                                                                    17     13.5   11.5   4.5    1     13.9     11.5    11.9

A tensor marked . is not kept: backward computes it again (-r), or does not need it. Codes of SiLU's input come on top here: whatever
gives silu(gate) gives its derivative too, so that exact backward needs gate and up and nothing else (section 3). What pays is MS_NORM=1.
-r 3 multiplies by gateupw twice, and -r 4 computes the whole block again, from resid: all but attention in chunks of rows (--row-chunks),
so that one layer's qkv and atty are what is left; with --offload 1 the streams between the blocks wait on the host meanwhile.
With adapters (--lora; section 7, "a linear layer") an input of a matmul is kept where that matmul has an adapter whose A is trained;
the same sums come out where all have one. Frozen weights have neither gradients nor optimizer state.
Nothing here uses a float atomic and every sum has one fixed order, so two runs with one seed, batch and number of loss chunks are
equal to the bit. Sections between "==== twin" marks stand in train_gpt2.cu too, byte for byte (make twins).
*/
const char* program_name = "train_llama";   // before every message
constexpr bool kRMSNorm = true;             // Llama's norm has neither mean nor beta
// ==== twin: numbers and errors, embedding, column sums, norm, matmul, attention
// ==== 1. numbers and errors ======================================================================================================

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#ifdef MULTI_GPU
#include <mpi.h>
#include <nccl.h>
#endif

#ifndef FP32
#define FP32 0   // make PRECISION=FP32 sets it to 1
#endif
constexpr bool kFP32 = FP32;

// The memory modes of the backward pass (section 3). USE_APPROXBP=1 is both; each can be had alone.
#ifndef USE_APPROXBP
#define USE_APPROXBP 0
#endif
#ifndef APPROX_ACT
#define APPROX_ACT (USE_APPROXBP ? 2 : 0)
#endif
#ifndef APPROX_SLOPE   // make APPROX_FIT=slope
#define APPROX_SLOPE 0
#endif
#ifndef MS_NORM
#define MS_NORM USE_APPROXBP
#endif
constexpr int kActBits = APPROX_ACT;   // bits per element that backward gets of the activation's input; 0: the element itself
constexpr bool kActSlope = APPROX_SLOPE;   // of 2 bits: the steps are near the activation's derivative, and not their integral to itself
constexpr bool kMsNorm = MS_NORM;      // a norm and the matmul after it keep one tensor between them
static_assert(kActBits >= 0 && kActBits <= 4, "APPROX_ACT is 0 (exact) or 1 to 4 bits");
static_assert(!kActSlope || kActBits == 2, "APPROX_FIT=slope is for APPROX_ACT=2");

// The type of weights, activations and (with one micro-batch per step) gradients. Arithmetic is always fp32.
using floatX = std::conditional_t<kFP32, float, __nv_bfloat16>;
enum DType { F32, BF16, F16, I32, BYTE };
constexpr DType FLOATX = kFP32 ? F32 : BF16;
inline size_t dtype_size(DType type) { return type == BF16 || type == F16 ? 2 : type == BYTE ? 1 : 4; }
inline const char* dtype_name(DType type) {
    return type == F32 ? "fp32" : type == BF16 ? "bf16" : type == F16 ? "fp16" : type == I32 ? "int32" : "byte";
}
inline cudaDataType_t cuda_dtype(DType type) { return type == F32 ? CUDA_R_32F : CUDA_R_16BF; }

// Every fatal message leaves through here: what was expected, what was found, what to do next. Status 1 is a run that could
// not go on, 2 a command line that makes no sense, 3 a loss that is no longer a number.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail_status(int status, const char* format, ...) {
    fflush(stdout);
    char text[8192];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    for (char* c = text; *c; c++)
        if ((*c > 0 && *c < ' ' && *c != '\n') || *c == 127) *c = '?';   // what a file says must not steer a terminal
    fprintf(stderr, "%s: %s\n", program_name, text);
    fflush(stderr);
#ifdef MULTI_GPU
    int started = 0;
    MPI_Initialized(&started);
    if (started) MPI_Abort(MPI_COMM_WORLD, status);   // or the other ranks would wait for this one for ever
#endif
    exit(status);
}
#define fail(...) fail_status(1, __VA_ARGS__)
#define fail_usage(...) fail_status(2, __VA_ARGS__)
#define warn(format, ...) fprintf(stderr, "%s: " format "\n", program_name, ##__VA_ARGS__)

// Every other way out: what was printed must have arrived, or a script takes half an answer for a whole one.
[[noreturn]] void leave(int status) {
    const char* error = fflush(stdout) != 0 ? strerror(errno) : ferror(stdout) ? "an earlier write failed" : nullptr;
    if (error) warn("could not write all of the output: %s", error);
    exit(error && status == 0 ? 1 : status);
}

void cuda_check(cudaError_t error, const char* file, int line) {
    if (error == cudaSuccess) return;
    fail("%s:%d: CUDA says \"%s\" (an error of an earlier asynchronous call shows late: CUDA_LAUNCH_BLOCKING=1 finds its line)",
         file, line, cudaGetErrorString(error));
}
#define cudaCheck(call) cuda_check((call), __FILE__, __LINE__)

inline int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }

// Full memory bandwidth needs 16-byte accesses by each thread. A thread takes 8 neighbouring elements: one such access in bf16,
// two in fp32. Kernels read them, widen them to fp32, compute, and round once when they store. The compiler unrolls loops over them.
constexpr int VEC = 8;
template <class X> struct alignas(16) VecOf { X x[VEC]; };
using Vec = VecOf<floatX>;
struct Floats {
    float x[VEC];
    __device__ float& operator[](int i) { return x[i]; }
    __device__ float operator[](int i) const { return x[i]; }
    __device__ void operator+=(const Floats& other) {
        for (int i = 0; i < VEC; i++) x[i] += other.x[i];
    }
    __device__ void operator*=(const Floats& other) {
        for (int i = 0; i < VEC; i++) x[i] *= other.x[i];
    }
};
template <class X>
__device__ inline Floats widen(VecOf<X> v) {   // by value: through a reference nvcc reads memory element by element
    Floats f;
    for (int i = 0; i < VEC; i++) f[i] = (float)v.x[i];
    return f;
}
template <class X = floatX> __device__ inline VecOf<X> narrow(const Floats& f) {
    VecOf<X> v;
    if constexpr (std::is_same_v<X, float>) {
        for (int i = 0; i < VEC; i++) v.x[i] = f[i];
    } else {   // two in one instruction
        for (int i = 0; i < VEC; i += 2) *(__nv_bfloat162*)&v.x[i] = __floats2bfloat162_rn(f[i], f[i + 1]);
    }
    return v;
}
template <class X> __device__ inline Floats load(const X* p) { return widen(*reinterpret_cast<const VecOf<X>*>(p)); }
template <class X> __device__ inline void store(X* p, const Floats& f) { *reinterpret_cast<VecOf<X>*>(p) = narrow<X>(f); }

inline void check_vec(const char* what, int n) {   // for launchers: their kernels know no other case
    if (n % VEC != 0) fail("%s is %d: expected a multiple of %d, because a thread takes %d neighbouring elements", what, n, VEC, VEC);
}

// exp(x) and 1/x. The hardware has instructions for 2^x and for 1/x that are right to 22 bits; exact ones take about ten instructions.
// A kernel that runs at the speed of memory has time for about 30 instructions per element, so bf16 builds use the fast ones.
constexpr float LOG2E = 1.4426950408889634f;
__device__ inline float exp_2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
__device__ inline float exp_e(float x) {
    if constexpr (kFP32) return expf(x);
    else return exp_2(x * LOG2E);
}
__device__ inline float reciprocal(float x) {
#ifdef __CUDACC__
    if constexpr (!kFP32) {
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
#endif
    return 1.0f / x;
}

constexpr unsigned ALL_LANES = 0xffffffffu;
__device__ inline float warp_sum(float x) {   // every lane gets the same bits: all of them add in the same order
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, o));
    return x;
}
// The sum over a block of 256 threads, valid in thread 0. `shared` has one slot per warp.
__device__ inline float block_sum_256(float x, float* shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    if (threadIdx.x == 0)
        for (int w = 0; w < 8; w++) sum += shared[w];
    return sum;
}

// A gradient is floatX when a step is one micro-batch and fp32 when it is a sum of several: bf16 sums lose up to a third of
// their value at a thousand terms. So its type is known only at run time, and travels with the pointer. Null: nobody wants it.
struct Grad {
    void* p;
    DType type;
    Grad operator+(size_t elements) const { return {p ? (char*)p + elements * dtype_size(type) : nullptr, type}; }
};
__device__ inline float grad_load(Grad grad, size_t i) {
    return grad.type == F32 ? ((const float*)grad.p)[i] : (float)((const __nv_bfloat16*)grad.p)[i];
}
__device__ inline void grad_store(Grad grad, size_t i, float value, bool accumulate) {
    if (accumulate) value += grad_load(grad, i);
    if (grad.type == F32) ((float*)grad.p)[i] = value;
    else ((__nv_bfloat16*)grad.p)[i] = (__nv_bfloat16)value;
}
__device__ inline Floats grad_load_vec(Grad grad, size_t i) {   // elements [i, i + VEC), i a multiple of VEC
    return grad.type == F32 ? load((const float*)grad.p + i) : load((const __nv_bfloat16*)grad.p + i);
}
__device__ inline void grad_store_vec(Grad grad, size_t i, const Floats& value) {
    if (grad.type == F32) store((float*)grad.p + i, value);
    else store((__nv_bfloat16*)grad.p + i, value);
}

// Random numbers without a state: a hash of (seed, stream, index) gives the same bits in whatever order the threads run, and
// after a resume. The mixing steps are those of splitmix64 (Steele et al., OOPSLA 2014). Streams: initialisation and
// rounding count from 0, everything else from 2^40, 2^41, ... on.
__host__ __device__ inline uint64_t hash64(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t z =
        seed * 0x9e3779b97f4a7c15ull + stream * 0xbf58476d1ce4e5b9ull + index * 0xd1342543de82ef95ull + 0x632be59bd9b4e019ull;
    for (int round = 0; round < 2; round++) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
    }
    return z;
}
__host__ __device__ inline float hash_uniform(uint64_t h) { return ((uint32_t)(h >> 41) + 0.5f) / 8388608.0f; }   // in (0, 1)

// Stochastic rounding: add random bits below those that bf16 keeps, then cut them off. The expected result is x itself, so an
// update far smaller than one bf16 step still moves a weight, on average. NaN and infinities stay as they are.
__device__ inline floatX round_stochastic(float x, uint32_t random) {
    if constexpr (kFP32) {
        return x;
    } else {
        uint32_t bits = __float_as_uint(x);
        if ((bits & 0x7f800000u) == 0x7f800000u) return __float2bfloat16_rn(x);
        return __ushort_as_bfloat16((unsigned short)((bits + (random & 0xffffu)) >> 16));
    }
}

struct NvtxRange {   // names a part of the timeline in Nsight Systems
    explicit NvtxRange(const std::string& name) { nvtxRangePushA(name.c_str()); }
    ~NvtxRange() { nvtxRangePop(); }
};

// ==== 2. layers ==================================================================================================================

// ---- embedding
// out[b,t,:] = wte[token[b,t],:] + wpe[t,:]. A thread makes 8 neighbouring channels. Models that turn queries and keys by their
// position (RoPE) have no wpe. (dev/cuda/embedding.cu)
__global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, const int* document,
                                         size_t n, int T, int C) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    size_t bt = i / C;
    int c = (int)(i % C);
    Floats e = load(wte + (size_t)tokens[bt] * C + c);
    if (wpe != nullptr) e += load(wpe + (bt % T - (document != nullptr ? document[bt] : 0)) * C + c);
    store(out + i, e);
}
void embedding_forward(floatX* out,                               // (B, T, C)
                       const int* tokens,                         // (B, T)
                       const floatX* wte, const floatX* wpe,      // (Vp, C), (maxT, C) or null
                       const int* document,                       // (B, T) where each token's document begins in its row; null: at 0
                       int B, int T, int C, cudaStream_t stream) {
    check_vec("embedding_forward: C", C);
    size_t n = (size_t)B * T * C;
    embedding_forward_kernel<<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(out, tokens, wte, wpe, document, n, T, C);
    cudaCheck(cudaGetLastError());
}

// Many positions add to one row of dwte. Atomics would add them in the order in which they arrive, which differs from run to run.
// So the host sorts the positions by token (tokens_sort, section 8), and a block owns one token: each of its 8 warps takes every
// eighth position, and their sums are added in the order of the warps.
__global__ void embedding_backward_wte_kernel(Grad dwte, const floatX* dout, const int* positions, const int* bucket_token,
                                              const int* bucket_start, bool accumulate, int first_row, int rows, int C) {
    __shared__ float partial[8][32 * VEC];
    const int row = bucket_token[blockIdx.x] - first_row;
    if (row < 0 || row >= rows) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int c = (blockIdx.y * 32 + lane) * VEC;
    int first = bucket_start[blockIdx.x], end = bucket_start[blockIdx.x + 1];
    Floats sum = {};
    if (c < C) {
        for (int i = first + warp; i < end; i += 8) sum += load(dout + (size_t)positions[i] * C + c);
    }
    for (int k = 0; k < VEC; k++) partial[warp][lane * VEC + k] = sum[k];
    __syncthreads();
    for (int j = threadIdx.x; j < 32 * VEC; j += 256) {
        int channel = blockIdx.y * 32 * VEC + j;
        if (channel >= C) continue;
        float total = 0;
        for (int w = 0; w < 8; w++) total += partial[w][j];
        grad_store(dwte, (size_t)row * C + channel, total, accumulate);
    }
}

// dwpe[t,:] (+)= sum over b of dout[b,t,:], or over all tokens that are at position t of their document
__global__ void embedding_backward_wpe_kernel(Grad dwpe, const floatX* dout, const int* document, int B, int T, int C, bool accumulate) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;   // element of (T, C)
    if (i >= (size_t)T * C) return;
    Floats sum = {};
    if (accumulate) sum = grad_load_vec(dwpe, i);
    for (int b = 0, position = (int)(i / C); b < B; b++) {
        if (document == nullptr) sum += load(dout + (size_t)b * T * C + i);
        else for (int t = position; t < T; t++)
            if (t - document[(size_t)b * T + t] == position) sum += load(dout + ((size_t)b * T + t) * C + i % C);
    }
    grad_store_vec(dwpe, i, sum);
}
void embedding_backward(Grad dwte,                // (Vp, C) or null; rows of tokens that do not occur are not written
                        Grad dwpe,                // (maxT, C) or null; rows from T on are not written
                        const floatX* dout,       // (B, T, C)
                        const int* positions,     // (B*T) indices into (B,T), sorted by token, ascending within one
                        const int* bucket_token,  // (buckets) the tokens that occur
                        const int* bucket_start,  // (buckets + 1) where each one's positions begin
                        const int* document,      // (B, T) as in forward, or null
                        int buckets, bool accumulate_wte, bool accumulate_wpe, int B, int T, int C, cudaStream_t stream,
                        int first_row = 0, int rows = INT_MAX) {   // of wte: dwte has these alone
    check_vec("embedding_backward: C", C);
    dim3 grid(buckets, ceil_div(C, 32 * VEC));
    if (dwte.p != nullptr)
        embedding_backward_wte_kernel<<<grid, 256, 0, stream>>>(dwte, dout, positions, bucket_token, bucket_start, accumulate_wte,
                                                               first_row, rows, C);
    if (dwpe.p != nullptr)
        embedding_backward_wpe_kernel<<<ceil_div((size_t)T * C, 256 * VEC), 256, 0, stream>>>(dwpe, dout, document, B, T, C,
                                                                                                      accumulate_wpe);
    cudaCheck(cudaGetLastError());
}

// ---- column sums: the gradients of biases, gamma and beta
// The gradient of a bias, and of a norm's gamma and beta, is a sum over the rows of a tensor. For a 2 x 8 tensor d:
//
//     d[0] =  1  2  3  4  5  6  7  8      lane 0 of a warp reads the 8 columns of a row by one access, lane 1 the next 8 ...
//     d[1] = 10 20 30 40 50 60 70 80      warp 0 takes rows 0, 8, 16 ..., warp 1 rows 1, 9, 17 ..., so each read is contiguous
//     sum  = 11 22 33 44 55 66 77 88      the block then adds its 8 warps' sums, in their order
//
// Rows are cut into slices, one per block, so that there are enough blocks; a second kernel adds the slices' sums in their order. The
// number of slices depends on the shape alone, never on the GPU, so the result has the same bits everywhere. (dev/cuda/matmul.cu)
constexpr int COLSUM_SLICES = 64;
inline int colsum_slices(int rows) { return std::clamp(rows / 64, 1, COLSUM_SLICES); }
// The norm's backward has small blocks, so it cuts the rows into more slices.
constexpr int NORM_SLICES = 512;
inline int norm_slices(int rows) { return std::clamp(rows / 16, 1, NORM_SLICES); }
// floats of scratch: the norm's three sums of C columns take most; sums over a tensor of 4C columns, or two of C, take less
inline size_t colsum_scratch(size_t C) { return 3 * C * NORM_SLICES; }

// What a thread of a block of 256 sums: its columns c to c + 7, and every eighth row of its block's slice [first, end).
struct ColsumPlace {
    int lane, warp, c, first, end;
    __device__ ColsumPlace(int rows) {
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        c = (blockIdx.x * 32 + lane) * VEC;
        first = (int)((size_t)rows * blockIdx.y / gridDim.y);
        end = (int)((size_t)rows * (blockIdx.y + 1) / gridDim.y);
    }
};
// partial[slice, columns of the block] = the sum over the block's 8 warps, in their order
__device__ inline void colsum_store(float* partial, const Floats& sum, float (&shared)[8][32 * VEC], const ColsumPlace& at,
                                    int columns) {
    __syncthreads();   // an earlier call may still be reading `shared`
    for (int k = 0; k < VEC; k++) shared[at.warp][at.lane * VEC + k] = sum[k];
    __syncthreads();
    for (int j = threadIdx.x; j < 32 * VEC; j += 256) {
        int column = blockIdx.x * 32 * VEC + j;
        if (column >= columns) continue;
        float total = 0;
        for (int w = 0; w < 8; w++) total += shared[w][j];
        partial[(size_t)blockIdx.y * columns + column] = total;
    }
}

// partial[slice, c] = sum over the slice's rows of dout
__global__ void colsum_kernel(float* partial, const floatX* dout, int rows, int columns) {
    __shared__ float shared[8][32 * VEC];
    ColsumPlace at(rows);
    Floats sum = {};
    for (int r = at.first + at.warp; at.c < columns && r < at.end; r += 8) sum += load(dout + (size_t)r * columns + at.c);
    colsum_store(partial, sum, shared, at, columns);
}

// Up to three results; their partial sums follow one another in memory.
struct ColsumOut { Grad sum[3]; };
__global__ void colsum_finish_kernel(ColsumOut out, const float* partial, int slices, int columns, bool accumulate) {
    __shared__ float shared[32][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int c = blockIdx.x * 32 + lane;
    Grad result = blockIdx.y == 0 ? out.sum[0] : blockIdx.y == 1 ? out.sum[1] : out.sum[2];
    if (result.p == nullptr) return;
    partial += (size_t)blockIdx.y * slices * columns;
    float total = 0;
    for (int s = warp; c < columns && s < slices; s += warps) total += partial[(size_t)s * columns + c];
    shared[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || c >= columns) return;
    for (int w = 1; w < warps; w++) total += shared[w][lane];
    grad_store(result, c, total, accumulate);
}

// out (+)= the sum of the slices
void colsum_finish(ColsumOut out, int sums, const float* partial, int slices, int columns, bool accumulate, cudaStream_t stream) {
    if (out.sum[0].p == nullptr && out.sum[1].p == nullptr && out.sum[2].p == nullptr) return;
    int warps = std::clamp(slices / 8, 1, 32);
    colsum_finish_kernel<<<dim3(ceil_div(columns, 32), sums), warps * 32, 0, stream>>>(out, partial, slices, columns, accumulate);
    cudaCheck(cudaGetLastError());
}

void bias_backward(Grad dbias, float* scratch,   // (OC); COLSUM_SLICES * OC floats
                   const floatX* dout,           // (rows, OC)
                   bool accumulate, int rows, int OC, cudaStream_t stream) {
    check_vec("bias_backward: OC", OC);
    if (dbias.p == nullptr) return;
    int slices = colsum_slices(rows);
    dim3 grid(ceil_div(OC, 32 * VEC), slices);
    colsum_kernel<<<grid, 256, 0, stream>>>(scratch, dout, rows, OC);
    cudaCheck(cudaGetLastError());
    colsum_finish({dbias}, 1, scratch, slices, OC, accumulate, stream);
}

// ---- norm, together with the residual addition before it
//     x = inp + add,   z = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps),   out = gamma * z + beta     over a row's C channels
//
// This is LayerNorm (Ba et al., arXiv 1607.06450). RMSNorm (Zhang and Sennrich, arXiv 1910.07467) is the same without mean and
// beta. A warp owns a row, so its sums need no barrier. Each lane needs its elements three times, so it parks them in shared
// memory; no other lane reads them, hence no barrier. (dev/cuda/layernorm.cu)
//
// MS_LN (section 3): out is z itself, for a matmul whose weight has gamma and beta folded in, and the mean is not kept.

// warps (that is, rows) per block: their rows must fit 48 KB of shared memory
inline int norm_warps(int C) { return (int)std::clamp(48 * 1024 / ((size_t)C * sizeof(floatX)), (size_t)1, (size_t)4); }

template <bool MS_LN, bool RMS>
__global__ void add_norm_forward_kernel(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* inp,
                                        const floatX* add, const floatX* gamma, const floatX* beta, float eps, int rows, int C) {
    extern __shared__ Vec norm_rows[];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row = blockIdx.x * (blockDim.x / 32) + warp;
    if (row >= rows) return;
    Vec* x = norm_rows + (size_t)warp * (C / VEC);
    size_t base = (size_t)row * C;
    float sum = 0;
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
        Floats f = load(inp + base + c);
        if (add != nullptr) f += load(add + base + c);
        Vec rounded = narrow(f);   // the stored x is what is normalised, so that z can be computed again from it to the same bits
        if (residual != nullptr) *reinterpret_cast<Vec*>(residual + base + c) = rounded;
        x[c / VEC] = rounded;
        f = widen(rounded);
        for (int k = 0; k < VEC; k++) sum += f[k];
    }
    float mu = RMS ? 0.0f : warp_sum(sum) / C;
    float square = 0;   // of the deviations: E[x^2] - E[x]^2 would be a small difference of large numbers
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
        Floats f = widen(x[c / VEC]);
        for (int k = 0; k < VEC; k++) square += (f[k] - mu) * (f[k] - mu);
    }
    float rs = rsqrtf(warp_sum(square) / C + eps);
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
        Floats f = widen(x[c / VEC]);
        for (int k = 0; k < VEC; k++) f[k] = (f[k] - mu) * rs;
        if constexpr (!MS_LN) {
            Floats gamma_c = load(gamma + c), beta_c = {};
            if constexpr (!RMS) beta_c = load(beta + c);
            for (int k = 0; k < VEC; k++) f[k] = gamma_c[k] * f[k] + beta_c[k];
        }
        store(out + base + c, f);
    }
    if (lane == 0) {
        if constexpr (!MS_LN && !RMS) mean[row] = mu;
        rstd[row] = rs;
    }
}

// residual may be inp or add, and out may be add: a lane reads an element before it writes it.
template <bool MS_LN, bool RMS = kRMSNorm>
void add_norm_forward(floatX* residual,                           // (rows, C) out: inp + add; null: not wanted
                      floatX* out,                                // (rows, C)
                      float* mean, float* rstd,                   // (rows) each; MS_LN, RMS: no mean is written
                      const floatX* inp, const floatX* add,       // (rows, C) each; add may be null
                      const floatX* gamma, const floatX* beta,    // (C) each; MS_LN: neither is read, RMS: no beta
                      float eps, int rows, int C, cudaStream_t stream) {
    check_vec("add_norm_forward: C", C);
    const int most = 48 * 1024 / sizeof(floatX);
    if (C > most) fail("add_norm_forward: C is %d: expected at most %d, because a row must fit 48 KB of shared memory", C, most);
    int warps = norm_warps(C);
    add_norm_forward_kernel<MS_LN, RMS><<<ceil_div(rows, warps), warps * 32, warps * C * sizeof(floatX), stream>>>(
        residual, out, mean, rstd, inp, add, gamma, beta, eps, rows, C);
    cudaCheck(cudaGetLastError());
}

// Backward. With dz = dout * gamma,
//     dx = rstd * (dz - mean(dz) - z * mean(dz * z))      the means over the row's C channels; RMSNorm has no mean(dz)
// is added to the gradient of the stream that goes around the norm. The other results are sums over columns: dbeta = colsum(dout),
// dgamma = colsum(dout * z), and the gradient of one more bias: that of the matmul whose output forward added to the stream here,
// which is the column sum of the updated dresidual.
//
// So a block takes 8 rows at a time. First each warp takes a row, for the two means; then each thread takes 8 columns, down the
// same 8 rows, which the cache still holds.

// z for elements [i, i + VEC) of a row, from what forward kept: x, or with MS_LN z itself.
template <bool MS_LN, bool RMS> __device__ inline Floats norm_z(const floatX* kept, size_t i, float mean, float rstd) {
    Floats x = load(kept + i);
    if constexpr (!MS_LN) {
        for (int k = 0; k < VEC; k++) x[k] = (RMS ? x[k] : x[k] - mean) * rstd;
    }
    return x;
}
constexpr int NORM_ROWS = 8;
constexpr int NORM_THREADS = kFP32 ? 256 : 512;   // at most: 4096 columns, 2048 in fp32, which takes more registers; where there
// are more columns, further blocks compute the means once more
enum NormSums { NO_SUMS, DBIAS_SUM, ALL_SUMS };   // over the rows: of dresidual, and for dgamma and dbeta
template <bool MS_LN, bool RMS, NormSums SUMS>
__global__ void __launch_bounds__(NORM_THREADS, 1)   // the 1: it needs up to 99 registers, and room for two such blocks leaves 64
add_norm_backward_kernel(floatX* dresidual, float* partial, const floatX* dout, const floatX* kept, const float* mean,
                         const float* rstd, const floatX* gamma, bool accumulate, int rows, int C) {
    __shared__ float mean_dz[2][NORM_ROWS], mean_dz_z[2][NORM_ROWS];   // two of each: slow warps may still read the one before
    constexpr bool CENTRED = !MS_LN && !RMS;   // mean is needed to get z from x
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    int first = (int)((size_t)rows * blockIdx.x / gridDim.x), end = (int)((size_t)rows * (blockIdx.x + 1) / gridDim.x);
    Floats sum_dresidual = {}, sum_dout = {}, sum_dout_z = {};
    for (int r0 = first, buffer = 0; r0 < end; r0 += NORM_ROWS, buffer ^= 1) {
        int count = min(NORM_ROWS, end - r0);
        for (int i = warp; i < count; i += warps) {
            size_t base = (size_t)(r0 + i) * C;
            float mu = CENTRED ? mean[r0 + i] : 0, rs = rstd[r0 + i], sum_dz = 0, sum_dz_z = 0;
            for (int c = lane * VEC; c < C; c += 32 * VEC) {
                Floats d = load(dout + base + c), z = norm_z<MS_LN, RMS>(kept, base + c, mu, rs), gamma_c = load(gamma + c);
                for (int k = 0; k < VEC; k++) {
                    sum_dz += d[k] * gamma_c[k];
                    sum_dz_z += d[k] * gamma_c[k] * z[k];
                }
            }
            sum_dz = RMS ? 0.0f : warp_sum(sum_dz) / C;
            sum_dz_z = warp_sum(sum_dz_z) / C;
            if (lane == 0) mean_dz[buffer][i] = sum_dz, mean_dz_z[buffer][i] = sum_dz_z;
        }
        Floats next = {};   // a row of dresidual is loaded before the row above it is stored: it would have to wait for that
        if (accumulate && column < C) next = load(dresidual + (size_t)r0 * C + column);
        __syncthreads();
        for (int i = 0; column < C && i < count; i++) {
            size_t at = (size_t)(r0 + i) * C + column;
            float mu = CENTRED ? mean[r0 + i] : 0, rs = rstd[r0 + i];
            Floats d = load(dout + at), z = norm_z<MS_LN, RMS>(kept, at, mu, rs), gamma_c = load(gamma + column), dx = next;
            if (accumulate && i + 1 < count) next = load(dresidual + at + C);
            for (int k = 0; k < VEC; k++) {
                dx[k] += rs * (d[k] * gamma_c[k] - mean_dz[buffer][i] - z[k] * mean_dz_z[buffer][i]);
                sum_dresidual[k] += dx[k];
                sum_dout[k] += d[k];
                sum_dout_z[k] += d[k] * z[k];
            }
            store(dresidual + at, dx);
        }
    }
    if (column >= C || SUMS == NO_SUMS) return;
    size_t sums = (size_t)gridDim.x * C, at = (size_t)blockIdx.x * C + column;
    store(partial + at, sum_dresidual);
    if constexpr (SUMS == ALL_SUMS) {
        store(partial + sums + at, sum_dout_z);
        if constexpr (!RMS) store(partial + 2 * sums + at, sum_dout);
    }
}
template <bool MS_LN, bool RMS = kRMSNorm>
void add_norm_backward(floatX* dresidual,    // (rows, C), added to if accumulate_residual
                       Grad dbias,           // (C) column sums of dresidual as it comes out, or null
                       Grad dgamma, Grad dbeta,   // (C) or null: not wanted, or MS_NORM: norm_unfold makes them; RMS: no dbeta
                       float* scratch,       // colsum_scratch(C) floats
                       const floatX* dout,   // (rows, C)
                       const floatX* kept,   // (rows, C): x; MS_LN: z
                       const float* mean, const float* rstd, const floatX* gamma,   // (rows); (rows); (C). MS_LN, RMS: no mean
                       bool accumulate_residual, bool accumulate, int rows, int C, cudaStream_t stream) {
    check_vec("add_norm_backward: C", C);
    int slices = norm_slices(rows), threads = std::min(ceil_div(C, 32 * VEC) * 32, NORM_THREADS);
    const bool all = dgamma.p != nullptr || dbeta.p != nullptr;
    auto kernel = all                  ? add_norm_backward_kernel<MS_LN, RMS, ALL_SUMS>
                  : dbias.p != nullptr ? add_norm_backward_kernel<MS_LN, RMS, DBIAS_SUM>
                                       : add_norm_backward_kernel<MS_LN, RMS, NO_SUMS>;
    kernel<<<dim3(slices, ceil_div(C, threads * VEC)), threads, 0, stream>>>(dresidual, scratch, dout, kept, mean, rstd, gamma,
                                                                             accumulate_residual, rows, C);
    cudaCheck(cudaGetLastError());
    colsum_finish({dbias, dgamma, dbeta}, !all ? 1 : RMS ? 2 : 3, scratch, slices, C, accumulate, stream);
}

// ---- matmul, by cuBLASLt
// cuBLASLt stores a matrix by columns (column-major), we by rows (row-major). The same memory, read the other way, is the transpose:
//
//     memory 1 2 3 4 5 6     row-major 2 x 3:  1 2 3     column-major 3 x 2:  1 4
//                                              4 5 6                          2 5
//                                                                             3 6
//
// So a row-major D = A B is asked for as D^T = B^T A^T, without moving a byte: cuBLASLt gets B first, then A, both as they are in
// memory. For out = inp W^T (rows x OC) it computes out^T = W inp^T, of m = OC rows and n = rows columns, each a sum of k = C
// terms. It finds W^T in W's memory, so it must transpose that (true), and inp^T in inp's (false): see matmul_forward.
//
// To find the algorithm for a shape takes tens of microseconds, so it is looked for once per shape. (dev/cuda/matmul.cu)

// A weight's gradient has few tiles and a long sum, so cuBLASLt splits the sum; each part takes an fp32 (OC, C) of workspace.
// 64 MiB hold 7 parts of GPT-2 124M's fc, 4 of 350M's and 2 of 774M's: 400 tiles of 128 x 256 or more, three for each
// multiprocessor of an H100. Larger weights have as many without a split.
constexpr size_t MATMUL_WORKSPACE = (size_t)64 << 20;   // bytes, at most, unless --workspace says otherwise
constexpr size_t MATMUL_SPLITS = 32;                    // a sum in more parts than these has parts too short to pay
inline size_t matmul_workspace(size_t largest_weight) {   // in elements; the result in bytes
    return std::min(MATMUL_WORKSPACE, MATMUL_SPLITS * largest_weight * sizeof(float));
}

struct Matmul {
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    size_t workspace_bytes = 0;
    bool tf32 = false;            // fp32 builds: let the tensor cores round inputs to 10 bits of mantissa
    int gelu_fusion = 0;          // 0: kernels of our own; 1: GELU in the forward's epilogue; 2: and in the backward's
    int* missing = nullptr;       // for tests: counts the fused GELUs that cuBLASLt does not have; null: the first one ends the run
} matmul_state;

// What cuBLASLt is asked for: D (n, m) row-major, that is D^T = op(A) op(B), where op transposes or not, of sums of k terms.
struct MatmulShape {
    long m, n, k;
    long trans_a, trans_b;             // 0 or 1
    long ld_a = 0, ld_b = 0, ld_d = 0; // elements from one row in memory to the next; 0: rows lie one after the other
};
struct MatmulPlan {
    struct Key {             // what the plan is for; longs, so that there are no gaps between them
        MatmulShape shape;
        long out, epilogue, align, bias_align, workspace;
    } key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t A, B, D;
    cublasLtMatmulAlgo_t algo;
};

void cublas_check(cublasStatus_t status, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) fail("%s:%d: cuBLASLt says status %d", file, line, (int)status);
}
#define cublasCheck(call) cublas_check((call), __FILE__, __LINE__)

template <class Value> void matmul_set(MatmulPlan& p, cublasLtMatmulDescAttributes_t what, Value value) {
    cublasCheck(cublasLtMatmulDescSetAttribute(p.desc, what, &value, sizeof value));
}
void matmul_set_pointers(MatmulPlan& p, const void* bias, const void* aux) {
    if (bias) matmul_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (aux) matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
}

MatmulPlan* matmul_plan(const MatmulPlan::Key& key, const void* bias, const void* aux) {
    static std::vector<MatmulPlan> plans;   // about twenty: searching them costs nothing beside a launch
    for (MatmulPlan& p : plans) {
        if (memcmp(&p.key, &key, sizeof key) != 0) continue;
        matmul_set_pointers(p, bias, aux);
        return &p;
    }
    MatmulPlan p = {};
    p.key = key;
    const auto [m, n, k, trans_a, trans_b, ld_a, ld_b, ld_d] = key.shape;
    const cublasComputeType_t compute = kFP32 && matmul_state.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    cublasCheck(cublasLtMatmulDescCreate(&p.desc, compute, CUDA_R_32F));
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSA, trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSB, trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, (cublasLtEpilogue_t)key.epilogue);
    if (bias) matmul_set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_dtype(FLOATX));
    if (aux) matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)m);
    matmul_set_pointers(p, bias, aux);   // before the heuristic is asked: it looks at the epilogue's pointers
    auto layout = [](cublasLtMatrixLayout_t& l, DType type, long rows, long cols, long ld) {   // column-major
        cublasCheck(cublasLtMatrixLayoutCreate(&l, cuda_dtype(type), rows, cols, ld ? ld : rows));
    };
    layout(p.A, FLOATX, trans_a ? k : m, trans_a ? m : k, ld_a);
    layout(p.B, FLOATX, trans_b ? n : k, trans_b ? k : n, ld_b);
    layout(p.D, (DType)key.out, m, n, ld_d);
    cublasLtMatmulPreference_t preference;
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (size_t)key.workspace);
    // The parts of a split sum stay fp32. By default cuBLASLt may also add them in the output's type, and so round each to bf16.
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
    for (auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                       CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        prefer(which, (uint32_t)key.align);   // it would assume 256, but a pointer into the middle of a tensor may have less
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(matmul_state.handle, p.desc, p.A, p.B, p.D, p.D, preference, 1, &found, &count);
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    const bool found_one = status == CUBLAS_STATUS_SUCCESS && count > 0;
    if (!found_one && aux != nullptr && matmul_state.missing != nullptr) {
        ++*matmul_state.missing;
        return nullptr;
    }
    if (!found_one)
        fail("cuBLASLt has no algorithm for a matmul of m %ld, n %ld, k %ld, output %s, epilogue %ld (status %d)%s", m, n, k,
             dtype_name((DType)key.out), key.epilogue, (int)status, matmul_state.gelu_fusion ? "; --gelu-fusion 0 asks less of it" : "");
    p.algo = found.algo;
    plans.push_back(p);
    return &plans.back();
}

// accumulate: adds to D. In bf16 that may round twice: on Hopper cuBLASLt rounds the product before it adds it (dev/cuda/matmul.cu).
void matmul(void* D, DType out, const floatX* A, const floatX* B, const MatmulShape& shape, bool accumulate, cudaStream_t stream,
            cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT, const void* bias = nullptr, const void* aux = nullptr,
            float alpha = 1) {
    // The largest power of two, up to 256, that divides all the addresses: the lowest bit set in any of them. x & -x is the lowest
    // bit of x alone: 0b101000 & 0b011000 = 0b001000.
    auto align = [](uintptr_t bits) { return (long)((bits | 256) & -(bits | 256)); };
    MatmulPlan* p = matmul_plan({shape, out, epilogue, align((uintptr_t)D | (uintptr_t)A | (uintptr_t)B | (uintptr_t)aux),
                                 align((uintptr_t)bias), (long)matmul_state.workspace_bytes}, bias, aux);
    if (p == nullptr) return;   // counted in matmul_state.missing
    float beta = accumulate ? 1 : 0;
    cublasCheck(cublasLtMatmul(matmul_state.handle, p->desc, &alpha, A, p->A, B, p->B, &beta, D, p->D, D, p->D, &p->algo,
                               matmul_state.workspace, matmul_state.workspace_bytes, stream));
}

// out = inp W^T + bias
void matmul_forward(floatX* out, const floatX* inp,              // (rows, OC), (rows, C)
                    const floatX* weight, const floatX* bias,    // (OC, C), (OC) or null
                    int rows, int C, int OC, cudaStream_t stream) {
    matmul(out, FLOATX, weight, inp, {OC, rows, C, true, false}, false, stream,
           bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT, bias);
}

// dinp = dout W, or with gelu_inp, where forward computed inp = GELU(gelu_inp), dinp = (dout W) * GELU'(gelu_inp)
void matmul_backward_input(floatX* dinp,                                 // (rows, C)
                           const floatX* dout, const floatX* weight,     // (rows, OC), (OC, C)
                           int rows, int C, int OC, cudaStream_t stream,
                           const void* gelu_inp = nullptr) {   // (rows, C) floatX or null
    matmul(dinp, FLOATX, weight, dout, {C, rows, OC, false, false}, false, stream,
           gelu_inp ? CUBLASLT_EPILOGUE_DGELU : CUBLASLT_EPILOGUE_DEFAULT, nullptr, gelu_inp);
}

// dW (+)= dout^T inp
void matmul_backward_weight(Grad dweight,                             // (OC, C)
                            const floatX* dout, const floatX* inp,    // (rows, OC), (rows, C)
                            bool accumulate, int rows, int C, int OC, cudaStream_t stream) {
    matmul(dweight.p, dweight.type, inp, dout, {C, OC, rows, false, true}, accumulate, stream);
}

// ---- attention
// Each head has queries q, keys k and values v of HS channels. A query sees the keys up to its own position (causal attention):
//     s_j = q k_j / sqrt(HS)      p = softmax(s)      out = sum_j p_j v_j      lse = log(sum_j exp(s_j))
// Backward, from dout:
//     p_j = exp(s_j - lse)      dp_j = dout v_j      delta = sum_j p_j dp_j = dout out      ds_j = p_j (dp_j - delta)
//     dq = sum_j ds_j k_j / sqrt(HS)    and over the queries that see key j:  dk_j = sum ds_j q / sqrt(HS)    dv_j = sum p_j dout
//
// The T x T scores are never stored (flash attention: Dao et al., arXiv 2205.14135). Forward walks over the keys tile by tile and
// keeps a running maximum, sum and output (Milakov and Gimelshein, arXiv 1805.02867). When a tile has a larger score, what was
// summed before shrinks by exp(old maximum - new maximum). Four keys with values of one channel, in tiles of two:
//     scores  values    max   shrink          sum                                      o
//     1, 3    10, 20     3                    e^-2 + e^0 = 1.135                       e^-2 * 10 + e^0 * 20 = 21.35
//     2, 4    30, 40     4    e^(3-4) = 0.37  0.37 * 1.135 + e^-2 + e^0 = 1.553        0.37 * 21.35 + e^-2 * 30 + e^0 * 40 = 51.9
// out = o / sum = 33.4 and lse = 4 + log(1.553) = 4.44, as with all four at once. Backward computes p again, from q, k and lse, and
// that twice: by rows of queries for dq and by rows of keys for dk and dv. So every sum belongs to one thread (no atomics).
//
// NH / NKV neighbouring query heads share a head of keys and values (grouped queries: Ainslie et al., arXiv 2305.13245). In GPT-2
// each has its own: NKV = NH. A row of qkv, and of its gradient, has NH + 2 NKV heads: queries, keys, values.
//
// This version is plain arithmetic, for fp32 and unusual heads. Section 4 has the one on tensor cores, for bf16 heads of 64 and 128
// channels, which nearly all models have. dev/cuda/attention.cu begins with two simpler ones: it is the best introduction.

struct AttShape {
    int T, NH, NKV, HS;
    float scale;    // 1 / sqrt(HS)
    int together;   // heads whose blocks run at about the same time, see att_place
    __host__ __device__ size_t stride() const { return (size_t)(NH + 2 * NKV) * HS; }   // of a row of qkv
    __device__ int group() const { return NH / NKV; }                          // query heads per key-value head
    // Which of a row's heads are the keys and values of query head h
    __device__ int k_head(int h) const { return NH + h / group(); }
    __device__ int v_head(int h) const { return NH + NKV + h / group(); }
    // Where in qkv a row's head begins, where it does in out, and where its lse and delta are
    __device__ size_t qkv_at(int b, int t, int head) const { return ((size_t)b * T + t) * stride() + (size_t)head * HS; }
    __device__ size_t out_at(int b, int t, int h) const { return (((size_t)b * T + t) * NH + h) * HS; }
    __device__ size_t lse_at(int b, int h, int t) const { return ((size_t)b * NH + h) * T + t; }
};
// Documents in a row: attention begins anew at each. (B, T) the first key that a query sees, where its document begins, which is never
// before an earlier query's; null: 0. (Not in AttShape: an 8-byte member has the compiler load it by pairs, and hold them in registers.)
struct AttDocuments {
    const int* first;
    __device__ int first_key(const AttShape& shape, int b, int t) const {
        return first != nullptr ? first[(size_t)b * shape.T + min(t, shape.T - 1)] : 0;
    }
};
// The head and the rows of a block. Blocks start in the order of their numbers. All blocks of a head read its keys (or queries), so
// they should run while the L2 cache holds these: heads are taken in groups that fit. And the longest blocks should start first, or
// the last of them runs alone: those of the last queries, which see all keys, or of the first keys. dev/bench/l2.py simulates this.
struct AttPlace { int head, row_block; };   // of all sequences' heads; of the head's blocks
__host__ __device__ inline AttPlace att_place(int block, int heads, int row_blocks, int together, bool last_first) {
    int first = block / (together * row_blocks) * together, i = block % (together * row_blocks);
    int size = heads - first < together ? heads - first : together;   // of this group
    return {first + i % size, last_first ? row_blocks - 1 - i / size : i / size};
}
inline int att_heads_together(int T, int HS, size_t l2_bytes) {   // their keys and values take a third of the cache
    return (int)std::clamp(l2_bytes / 3 / (2 * sizeof(floatX) * T * HS), (size_t)1, (size_t)1 << 10);
}
inline AttShape att_in_groups(AttShape shape, int heads) {   // of about one size: a small last group would not fill the GPU
    shape.together = ceil_div(heads, ceil_div(heads, shape.together));
    return shape;
}
struct AttBlock { int b, h, first, row_blocks; };   // sequence, its head, the block's first row; blocks per head
__device__ inline AttBlock att_block(const AttShape& shape, int heads, int rows, bool last_first) {
    int row_blocks = (shape.T + rows - 1) / rows;
    AttPlace place = att_place(blockIdx.x, gridDim.x / row_blocks, row_blocks, shape.together, last_first);
    return {place.head / heads, place.head % heads, place.row_block * rows, row_blocks};
}

// ---- attention, in plain arithmetic
// A block takes 64 rows, and tiles of the other side through shared memory. A thread keeps 32 channels of its row in registers, as
// 4 vectors. So SHARES = 1, 2 or 4 neighbouring threads share a row of a head of up to 32, 64 or 128 channels. All rows of the
// block read the same row of a tile at once, which shared memory delivers to all of them in one go (a broadcast). A row's state
// takes up to 255 registers: the 1 in the launch bounds says that one block per multiprocessor is enough, or some would be spilled.
constexpr int ATT_ROWS = 64;   // rows per block
constexpr int ATT_TILE = 16;   // rows of the other side in shared memory at a time
constexpr int ATT_VECS = 4;    // vectors per thread
constexpr int ATT_CHANNELS = ATT_VECS * VEC;
constexpr float ATT_NO_MAX = -1e37f;   // before the first key. Minus infinity less itself would be NaN
template <int SHARES>
using AttTile = Floats[ATT_TILE][SHARES][ATT_VECS + 1];   // the 1: else the 4 shares of a row would begin in the same bank

template <int N> __device__ inline float neighbours_sum(float x) {   // over N neighbouring lanes
    for (int o = 1; o < N; o <<= 1) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}
template <int SHARES>
__device__ inline float att_dot(const Floats* a, const Floats* b) {   // over a row; every lane of the warp takes part
    Floats sum = {};   // 8 sums that need not wait for each other
    for (int v = 0; v < ATT_VECS; v++)
        for (int i = 0; i < VEC; i++) sum[i] += a[v][i] * b[v][i];
    return neighbours_sum<SHARES>(((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])));
}
__device__ inline void att_add(Floats* sum, float factor, const Floats* x) {   // sum += factor * x
    for (int v = 0; v < ATT_VECS; v++)
        for (int i = 0; i < VEC; i++) sum[v][i] += factor * x[v][i];
}
// A thread's share of a row: zeros after the head's last channel, and if the row does not exist
__device__ inline void att_load_row(Floats* x, const floatX* row, int share, int HS, bool exists) {
    for (int v = 0, c = share * ATT_CHANNELS; v < ATT_VECS; v++, c += VEC) x[v] = exists && c < HS ? load(row + c) : Floats{};
}
__device__ inline void att_store_row(floatX* row, Floats* x, int share, int HS, float factor) {
    for (int v = 0, c = share * ATT_CHANNELS; v < ATT_VECS; v++, c += VEC) {
        for (int i = 0; i < VEC; i++) x[v][i] *= factor;
        if (c < HS) store(row + c, x[v]);
    }
}
// The next tiles: rows [t0, t0 + ATT_TILE) of a head of x and of y, with zeros as above. A thread loads one vector of each.
template <int SHARES>
__device__ inline void att_load_tiles(AttTile<SHARES>& x_tile, const floatX* x, size_t x_stride, AttTile<SHARES>& y_tile,
                                      const floatX* y, size_t y_stride, int t0, const AttShape& shape) {
    static_assert(ATT_TILE * ATT_VECS == ATT_ROWS, "a block has as many threads as a tile has vectors");
    const int i = threadIdx.x / (SHARES * ATT_VECS), v = threadIdx.x % (SHARES * ATT_VECS), c = v * VEC;
    const bool exists = t0 + i < shape.T && c < shape.HS;
    __syncthreads();   // no thread reads the tiles before any more
    x_tile[i][v / ATT_VECS][v % ATT_VECS] = exists ? load(x + (t0 + i) * x_stride + c) : Floats{};
    y_tile[i][v / ATT_VECS][v % ATT_VECS] = exists ? load(y + (t0 + i) * y_stride + c) : Floats{};
    __syncthreads();   // these are complete
}

template <int SHARES> __global__ void __launch_bounds__(ATT_ROWS * SHARES, 1)
attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, AttShape shape, AttDocuments documents) {
    __shared__ AttTile<SHARES> k_tile, v_tile;
    const AttBlock block = att_block(shape, shape.NH, ATT_ROWS, true);
    const int T = shape.T, HS = shape.HS, row = block.first + threadIdx.x / SHARES, share = threadIdx.x % SHARES;
    const size_t stride = shape.stride();
    const floatX *k = qkv + shape.qkv_at(block.b, 0, shape.k_head(block.h)), *v = k + (size_t)shape.NKV * HS;
    Floats q[ATT_VECS], o[ATT_VECS] = {};
    att_load_row(q, qkv + shape.qkv_at(block.b, row, block.h), share, HS, row < T);
    const int first_key = documents.first_key(shape, block.b, row);
    float max = ATT_NO_MAX, sum = 0;
    for (int t0 = documents.first_key(shape, block.b, block.first) / ATT_TILE * ATT_TILE, end = min(block.first + ATT_ROWS, T); t0 < end;
         t0 += ATT_TILE) {
        att_load_tiles<SHARES>(k_tile, k, stride, v_tile, v, stride, t0, shape);
        if (!__any_sync(ALL_LANES, t0 <= row && first_key < t0 + ATT_TILE)) continue;   // no query of the warp sees a key of the tile
        float s[ATT_TILE];
#pragma unroll
        for (int j = 0; j < ATT_TILE; j++) {
            s[j] = att_dot<SHARES>(q, k_tile[j][share]) * shape.scale;
            if (t0 + j > row || t0 + j < first_key) s[j] = -INFINITY;   // masked: p will be 0
        }
        // Key by key, so that a query's bits depend on the keys of its document alone, and not on where tiles begin.
#pragma unroll
        for (int j = 0; j < ATT_TILE; j++) {
            if (s[j] > max) {
                const float shrink = expf(max - s[j]);
                max = s[j];
                sum *= shrink;
                for (int i = 0; i < ATT_CHANNELS; i++) o[i / VEC][i % VEC] *= shrink;
            }
            float p = expf(s[j] - max);
            sum += p;
            att_add(o, p, v_tile[j][share]);
        }
    }
    if (row >= T) return;
    att_store_row(out + shape.out_at(block.b, row, block.h), o, share, HS, 1.0f / sum);
    if (share == 0) lse[shape.lse_at(block.b, block.h, row)] = max + logf(sum);
}

// Backward, first by rows of queries, then with KEYS by rows of keys. A thread has its row's a and b, the tiles are x and y:
//                 a   b       x   y
//     queries     q   dout    k   v        s = a x    dp = b y    dq = scale * sum ds x
//     keys        k   v       q   dout                            dk = scale * sum ds x    dv = sum p y
template <int SHARES, bool KEYS> __global__ void __launch_bounds__(ATT_ROWS * SHARES, 1)
attention_backward_kernel(floatX* d, int d_stride, float* delta, const floatX* dout, const floatX* qkv, const floatX* out,
                          const float* lse, AttShape shape, AttDocuments documents) {
    __shared__ AttTile<SHARES> x_tile, y_tile;
    const AttBlock block = att_block(shape, KEYS ? shape.NKV : shape.NH, ATT_ROWS, !KEYS);   // block.h: of k and v, or of q
    const int T = shape.T, HS = shape.HS, row = block.first + threadIdx.x / SHARES, share = threadIdx.x % SHARES;
    const size_t row_a = shape.qkv_at(block.b, row, KEYS ? shape.NH + block.h : block.h), row_v = row_a + (size_t)shape.NKV * HS;
    const size_t row_out = shape.out_at(block.b, row, block.h);
    Floats a[ATT_VECS], b[ATT_VECS], sum_x[ATT_VECS] = {}, sum_y[ATT_VECS] = {};
    att_load_row(b, KEYS ? qkv + row_v : dout + row_out, share, HS, row < T);
    if (!KEYS && out != nullptr) {   // or delta is there
        att_load_row(a, out + row_out, share, HS, row < T);
        const float delta_row = att_dot<SHARES>(a, b);
        if (row < T && share == 0) delta[shape.lse_at(block.b, block.h, row)] = delta_row;
    }
    att_load_row(a, qkv + row_a, share, HS, row < T);
    const int heads = KEYS ? shape.group() : 1;   // of queries: those that share the block's keys, in order; or its own
    const int first_key = KEYS ? 0 : documents.first_key(shape, block.b, row);
    const int first =
        KEYS ? block.first : documents.first_key(shape, block.b, block.first) / ATT_TILE * ATT_TILE;   // rows of the other side
    auto more = [&](int t) {   // KEYS: does a query from t on see a key of the block? Else: is t a key that one of the block's may see?
        return t < (KEYS ? T : min(block.first + ATT_ROWS, T)) &&
               (!KEYS || documents.first_key(shape, block.b, t) < block.first + ATT_ROWS);
    };
    for (int h = block.h * heads; h < (block.h + 1) * heads; h++) {
        const floatX* x = qkv + shape.qkv_at(block.b, 0, KEYS ? h : shape.k_head(h));
        const floatX* y = KEYS ? dout + shape.out_at(block.b, 0, h) : qkv + shape.qkv_at(block.b, 0, shape.v_head(h));
        const size_t y_stride = KEYS ? (size_t)shape.NH * HS : shape.stride(), head_lse = shape.lse_at(block.b, h, 0);
        for (int t0 = first; more(t0); t0 += ATT_TILE) {
            att_load_tiles<SHARES>(x_tile, x, shape.stride(), y_tile, y, y_stride, t0, shape);
            if (!__any_sync(ALL_LANES, KEYS ? row < t0 + ATT_TILE : t0 <= row)) continue;
#pragma unroll KEYS ? 1 : 2   // two at a time would take more registers than there are
            for (int i = 0; i < ATT_TILE; i++) {
                const int query = KEYS ? t0 + i : row, key = KEYS ? row : t0 + i;
                const bool sees = key <= query && query < T &&
                                  key >= (KEYS ? documents.first_key(shape, block.b, query) : first_key);   // or else p = 0
                float s = att_dot<SHARES>(a, x_tile[i][share]) * shape.scale, dp = att_dot<SHARES>(b, y_tile[i][share]);
                float p = sees ? expf(s - lse[head_lse + query]) : 0, delta_row = sees ? delta[head_lse + query] : 0;
                att_add(sum_x, p * (dp - delta_row), x_tile[i][share]);
                if constexpr (KEYS) att_add(sum_y, p, y_tile[i][share]);
            }
        }
    }
    if (row >= T) return;
    d += ((size_t)block.b * T + row) * d_stride + block.h * HS;
    att_store_row(d, sum_x, share, HS, shape.scale);
    if constexpr (KEYS) att_store_row(d + shape.NKV * HS, sum_y, share, HS, 1);
}
template <int SHARES>
void attention_forward_launch(floatX* out, float* lse, const floatX* qkv, int B, AttShape shape, AttDocuments documents,
                              cudaStream_t stream) {
    int heads = B * shape.NH, blocks = heads * ceil_div(shape.T, ATT_ROWS);
    attention_forward_kernel<SHARES><<<blocks, ATT_ROWS * SHARES, 0, stream>>>(out, lse, qkv, att_in_groups(shape, heads), documents);
    cudaCheck(cudaGetLastError());
}
// Gradients of queries make delta, which those of keys read; or delta is there (out is null), and queries may be overwritten at last.
struct AttGradients {
    floatX *dqkv, *dkv;   // (B, T, (NH + 2 NKV)*HS), where dq goes; where a row's dk goes, its dv behind it
    int dkv_stride;       // elements from there to the next row's
};
template <int SHARES>
void attention_backward_launch(AttGradients to, float* partial, float* delta, const floatX* dout, const floatX* qkv, const floatX* out,
                               const float* lse, int B, AttShape shape, AttDocuments documents, cudaStream_t stream) {
    int row_blocks = ceil_div(shape.T, ATT_ROWS), heads = B * shape.NH, kv_heads = B * shape.NKV;
    for (bool keys : {out == nullptr, out != nullptr}) {
        if (keys)
            attention_backward_kernel<SHARES, true><<<kv_heads * row_blocks, ATT_ROWS * SHARES, 0, stream>>>(
                to.dkv, to.dkv_stride, delta, dout, qkv, out, lse, att_in_groups(shape, kv_heads), documents);
        else
            attention_backward_kernel<SHARES, false><<<heads * row_blocks, ATT_ROWS * SHARES, 0, stream>>>(
                to.dqkv, (int)shape.stride(), delta, dout, qkv, out, lse, att_in_groups(shape, heads), documents);
        cudaCheck(cudaGetLastError());
    }
}
// ==== end twin
// ---- positions: RoPE, and Qwen3's norm of each head
// Queries and keys are turned by an angle that grows with their position, so that their product depends on their distance (rotary
// position embedding: Su et al., arXiv 2104.09864). Channel i of a head makes a pair with channel i + HS/2, which is Hugging Face's
// layout (Meta's files and GGUF pair neighbours), and the pair is a vector that is turned by t * frequency[i]:
//     (a, b)  ->  (a cos - b sin, b cos + a sin)         backward turns the gradient by minus the angle
// A head of two pairs at t = 1, with the frequencies 1 and 0.01:
//     (1, 2, 3, 4)  ->  (1 cos 1 - 3 sin 1,  2 cos 0.01 - 4 sin 0.01,  3 cos 1 + 1 sin 1,  4 cos 0.01 + 2 sin 0.01)
//                    =  (-1.98, 1.96, 2.46, 4.02)
// Low channels turn fast and tell near positions apart, high ones slowly. The angles are a table that is computed once.
//
// Qwen3 normalises each head of q and of k before it is turned, over its HS channels: y = gamma * x * rstd. Then what is kept is the
// matmul's output x, from which backward makes again what attention has read: that moves a few bytes and keeps none.
// (dev/cuda/rope.cu)
enum RopeScaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };
struct Rope {
    float theta;              // frequency[i] = theta^(-2i/HS)
    int scaling;              // how a model was taught longer texts than it began with
    float factor, low, high;  // linear: 1 / factor of each frequency; llama3: of those below `low`, none of those above `high`
    int original;             // llama3: the longest text of the beginning; low and high count turns in it
};
double rope_frequency(const Rope& r, int i, int HS) {   // in radians per position
    const double f = pow(r.theta, -2.0 * i / HS);
    if (r.scaling == ROPE_PLAIN) return f;
    if (r.scaling == ROPE_LINEAR) return f / r.factor;
    const double turns = r.original * f / (2 * M_PI);
    if (turns > r.high) return f;
    if (turns < r.low) return f / r.factor;
    const double share = (turns - r.low) / (r.high - r.low);   // in between from one to the other
    return (1 - share) * f / r.factor + share * f;
}
// (count, HS/2) pairs of cosine and sine, for positions from `first` on. Frequencies, and the angles of the positions that the model was
// made for, are rounded to fp32, as in the models' own code. Beyond them angles are not: at position 2^23 fp32 knows whole radians alone.
std::vector<float2> rope_table(const Rope& r, int count, int HS, int made_for, int first = 0) {
    std::vector<float2> table((size_t)count * (HS / 2));
    for (int i = 0; i < HS / 2; i++) {
        const float frequency = (float)rope_frequency(r, i, HS);
        for (int t = 0; t < count; t++) {
            const int position = first + t;
            const double angle = position < made_for ? (float)position * frequency : position * (double)frequency;
            table[(size_t)t * (HS / 2) + i] = {(float)cos(angle), (float)sin(angle)};
        }
    }
    return table;
}

// A thread takes 8 pairs of a head, or 4 where HS is no multiple of 16: channels c to c + PAIRS - 1, and those HS/2 further. A power of
// two of neighbouring lanes share a head, so that they can sum over it; in a head of 96 the last 2 of 8 have nothing to do.
template <int PAIRS> struct alignas(PAIRS * sizeof(floatX) < 16 ? PAIRS * sizeof(floatX) : 16) HalfHead { floatX x[PAIRS]; };
template <int PAIRS> struct alignas(16) HalfAngles { float2 x[PAIRS]; };
struct RopeShape {
    int first, T, NH, NKV, HS, lanes;   // first: which of B*T the first row is
    const int* document;   // (B, T) where a row's document begins, and positions with it; null: at 0
    __device__ size_t position(size_t row) const { return (first + row) % T - (document != nullptr ? document[first + row] : 0); }
    __host__ __device__ int stride() const { return (NH + 2 * NKV) * HS; }   // of a row of qkv
};
template <int PAIRS> struct Pairs {
    float a[PAIRS], b[PAIRS];
    __device__ Pairs(const floatX* at, int HS, bool exists) {   // zeros where there are none
        HalfHead<PAIRS> x = {}, y = {};
        if (exists) x = *reinterpret_cast<const HalfHead<PAIRS>*>(at), y = *reinterpret_cast<const HalfHead<PAIRS>*>(at + HS / 2);
        for (int k = 0; k < PAIRS; k++) a[k] = (float)x.x[k], b[k] = (float)y.x[k];
    }
    __device__ void store(floatX* at, int HS) const {
        HalfHead<PAIRS> x, y;
        for (int k = 0; k < PAIRS; k++) x.x[k] = (floatX)a[k], y.x[k] = (floatX)b[k];
        *reinterpret_cast<HalfHead<PAIRS>*>(at) = x;
        *reinterpret_cast<HalfHead<PAIRS>*>(at + HS / 2) = y;
    }
    __device__ void turn(const float2* angles, bool back) {
        const HalfAngles<PAIRS> angle = *reinterpret_cast<const HalfAngles<PAIRS>*>(angles);
        for (int k = 0; k < PAIRS; k++) {
            const float cosine = angle.x[k].x, sine = back ? -angle.x[k].y : angle.x[k].y, turned = a[k] * cosine - b[k] * sine;
            b[k] = b[k] * cosine + a[k] * sine;
            a[k] = turned;
        }
    }
};
__device__ inline float lanes_sum(float x, int lanes) {
    for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}

// Turns the heads of q and k in place, or back.
template <int PAIRS> __global__ void rope_kernel(floatX* qkv, const float2* angles, bool back, RopeShape shape, size_t heads_of_all) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, head = i / shape.lanes;
    int c = (int)(i % shape.lanes) * PAIRS, heads = shape.NH + shape.NKV;
    if (head >= heads_of_all || c >= shape.HS / 2) return;
    size_t row = head / heads;
    floatX* at = qkv + row * shape.stride() + head % heads * shape.HS + c;
    Pairs<PAIRS> x(at, shape.HS, true);
    x.turn(angles + shape.position(row) * (shape.HS / 2) + c, back);
    x.store(at, shape.HS);
}

// Norms the heads of q and k, turns them, and copies those of v.
template <int PAIRS>
__global__ void qk_norm_rope_kernel(floatX* out, const floatX* qkv, const floatX* q_gamma, const floatX* k_gamma, const float2* angles,
                                    float eps, RopeShape shape, size_t heads_of_all) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, all = i / shape.lanes;
    int c = (int)(i % shape.lanes) * PAIRS, HS = shape.HS, heads = shape.NH + 2 * shape.NKV;
    bool exists = all < heads_of_all && c < HS / 2;
    size_t row = all / heads, at = row * shape.stride() + all % heads * HS + c;
    int head = (int)(all % heads);
    Pairs<PAIRS> x(qkv + at, HS, exists);
    float square = 0;
    for (int k = 0; k < PAIRS; k++) square += x.a[k] * x.a[k] + x.b[k] * x.b[k];
    float rs = rsqrtf(lanes_sum(square, shape.lanes) / HS + eps);
    if (!exists) return;
    if (head < shape.NH + shape.NKV) {
        Pairs<PAIRS> gamma((head < shape.NH ? q_gamma : k_gamma) + c, HS, true);
        for (int k = 0; k < PAIRS; k++) x.a[k] *= gamma.a[k] * rs, x.b[k] *= gamma.b[k] * rs;
        x.turn(angles + shape.position(row) * (HS / 2) + c, false);
    }
    x.store(out + at, HS);
}
// Backward of that for the heads of q, or of k: d in place, and partial sums of dgamma, one for each block's slice of (row, head). With
// dy turned back, z = x * rstd and dz = dy * gamma:  dx = rstd * (dz - z * mean(dz * z))   dgamma = sum of dy * z
template <int PAIRS>
__global__ void __launch_bounds__(256) qk_norm_rope_backward_kernel(floatX* d, float* partial, const floatX* qkv, const floatX* gamma,
                                                                    const float2* angles, float eps, RopeShape shape, int first_head,
                                                                    int heads, size_t n) {
    __shared__ float shared[256 * 2 * PAIRS];
    const int HS = shape.HS, lanes = shape.lanes, slots = 256 / lanes, slot = threadIdx.x / lanes, c = threadIdx.x % lanes * PAIRS;
    const size_t first = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
    const Pairs<PAIRS> g(gamma + c, HS, c < HS / 2);
    float sum_a[PAIRS] = {}, sum_b[PAIRS] = {};
    for (size_t i0 = first; i0 < end; i0 += slots) {   // all threads of a warp, for lanes_sum
        const size_t i = i0 + slot, row = i / heads, at = row * shape.stride() + (first_head + i % heads) * HS + c;
        const bool exists = i < end && c < HS / 2;
        const Pairs<PAIRS> x(qkv + at, HS, exists);
        Pairs<PAIRS> dy(d + at, HS, exists);
        if (exists) dy.turn(angles + shape.position(row) * (HS / 2) + c, true);
        float square = 0, dz_x = 0;
        for (int k = 0; k < PAIRS; k++) {
            square += x.a[k] * x.a[k] + x.b[k] * x.b[k];
            dz_x += dy.a[k] * g.a[k] * x.a[k] + dy.b[k] * g.b[k] * x.b[k];
        }
        const float rs = rsqrtf(lanes_sum(square, lanes) / HS + eps), mean = lanes_sum(dz_x, lanes) * rs / HS;
        for (int k = 0; k < PAIRS; k++) {
            const float za = x.a[k] * rs, zb = x.b[k] * rs;
            sum_a[k] += dy.a[k] * za, sum_b[k] += dy.b[k] * zb;
            dy.a[k] = rs * (dy.a[k] * g.a[k] - za * mean), dy.b[k] = rs * (dy.b[k] * g.b[k] - zb * mean);
        }
        if (exists) dy.store(d + at, HS);
    }
    const int half = lanes * PAIRS;   // a slot's sums: of channels c, then of those HS/2 further
    for (int k = 0; k < PAIRS; k++) shared[slot * 2 * half + c + k] = sum_a[k], shared[slot * 2 * half + half + c + k] = sum_b[k];
    __syncthreads();
    for (int j = threadIdx.x; j < HS; j += 256) {
        float total = 0;
        for (int s = 0; s < slots; s++) total += shared[s * 2 * half + (j < HS / 2 ? j : half + j - HS / 2)];
        partial[(size_t)blockIdx.x * HS + j] = total;
    }
}

RopeShape rope_shape(const int* document, int first, int T, int NH, int NKV, int HS) {
    if (HS < 8 || HS > 128 || HS % 8 != 0) fail("RoPE: a head has %d channels: expected a multiple of 8, up to 128", HS);
    int lanes = 1;
    while (lanes * (HS % 16 == 0 ? 8 : 4) < HS / 2) lanes *= 2;
    return {first, T, NH, NKV, HS, lanes, document};
}
template <int PAIRS>
void rope_forward_launch(floatX* out, const floatX* qkv, const floatX* q_gamma, const floatX* k_gamma, const float2* angles, float eps,
                         size_t rows, RopeShape shape, cudaStream_t stream) {
    const size_t heads = rows * (q_gamma ? shape.NH + 2 * shape.NKV : shape.NH + shape.NKV);
    const int blocks = ceil_div(heads * shape.lanes, 256);
    if (q_gamma == nullptr) rope_kernel<PAIRS><<<blocks, 256, 0, stream>>>(out, angles, false, shape, heads);
    else qk_norm_rope_kernel<PAIRS><<<blocks, 256, 0, stream>>>(out, qkv, q_gamma, k_gamma, angles, eps, shape, heads);
    cudaCheck(cudaGetLastError());
}
template <int PAIRS>
void rope_backward_launch(floatX* d, const Grad (&dgamma)[2], float* scratch, const floatX* qkv, const floatX* const (&gamma)[2],
                          const float2* angles, float eps, bool accumulate, size_t rows, RopeShape shape, cudaStream_t stream) {
    const size_t heads = rows * (shape.NH + shape.NKV);
    if (gamma[0] == nullptr) rope_kernel<PAIRS><<<ceil_div(heads * shape.lanes, 256), 256, 0, stream>>>(d, angles, true, shape, heads);
    cudaCheck(cudaGetLastError());
    for (int keys = 0; gamma[0] != nullptr && keys < 2; keys++) {   // queries, then keys
        const int n = keys ? shape.NKV : shape.NH, slices = norm_slices((int)std::min<size_t>(rows * n, INT_MAX));
        qk_norm_rope_backward_kernel<PAIRS><<<slices, 256, 0, stream>>>(d, scratch, qkv, gamma[keys], angles, eps, shape,
                                                                        keys ? shape.NH : 0, n, rows * n);
        cudaCheck(cudaGetLastError());
        colsum_finish({dgamma[keys]}, 1, scratch, slices, shape.HS, accumulate, stream);
    }
}
// What attention reads, from the matmul's output: heads of q and k turned, in place; or with norms of these, into another tensor.
void rope_forward(floatX* out, const floatX* qkv,                   // (rows, QKV) each: the same, or with norms not the same
                  const floatX* q_gamma, const floatX* k_gamma,     // (HS) each, or null: no norms
                  const float2* angles, float eps,                  // (T, HS/2)
                  const int* document,                              // (B, T) as in RopeShape, or null
                  int first, int rows, int T, int NH, int NKV, int HS, cudaStream_t stream) {   // first: of B*T
    if ((out == qkv) != (q_gamma == nullptr)) fail("rope_forward: without norms it works in place, with norms it does not");
    const RopeShape shape = rope_shape(document, first, T, NH, NKV, HS);
    auto run = HS % 16 == 0 ? rope_forward_launch<8> : rope_forward_launch<4>;
    run(out, qkv, q_gamma, k_gamma, angles, eps, rows, shape, stream);
}
// From the gradient of what attention has read to that of the matmul's output, in place.
void rope_backward(floatX* d,                                       // (rows, QKV)
                   Grad dq_gamma, Grad dk_gamma, float* scratch,    // (HS) each or null; NORM_SLICES * HS floats
                   const floatX* qkv,                               // (rows, QKV), the matmul's output; not read without norms
                   const floatX* q_gamma, const floatX* k_gamma, const float2* angles, float eps, const int* document,
                   bool accumulate, int first, int rows, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    const RopeShape shape = rope_shape(document, first, T, NH, NKV, HS);
    auto run = HS % 16 == 0 ? rope_backward_launch<8> : rope_backward_launch<4>;
    run(d, {dq_gamma, dk_gamma}, scratch, qkv, {q_gamma, k_gamma}, angles, eps, accumulate, rows, shape, stream);
}

// ---- activation: SwiGLU
// h = silu(gate) * up, with silu(x) = x * sigmoid(x) (Shazeer, arXiv 2002.05202). Backward, with s = sigmoid(gate):
//     dup = dh * gate * s       dgate = dh * up * (s + gate * s * (1 - s))
// It needs gate and up, and takes their place. h is one pass away, so that it need not be kept. (dev/cuda/swiglu.cu)
//
// With APPROX_ACT (section 3) silu(gate) is kept in place of gate, with codes of gate beside it.
const char* ACT_NAME = "SiLU";
__device__ inline float silu_gate(float x) { return reciprocal(1.0f + exp_e(-x)); }
inline size_t act_codes(size_t n) { return n / 8 * kActBits; }   // bytes, n a multiple of 8
// Section 3 has these two: codes of the inputs x of elements [i, i + VEC), and their slopes, an approximation of silu'(x).
template <int BITS> __device__ void act_keep(uint8_t* codes, size_t i, const Floats& x);
template <int BITS> __device__ Floats act_slope(const uint8_t* codes, size_t i);

// AGAIN: from what forward has left, to the same bits
template <int BITS, bool AGAIN> __global__ void swiglu_forward_kernel(floatX* h, floatX* gateup, uint8_t* codes, size_t n, int F) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;   // of (rows, F)
    if (i >= n) return;
    size_t at = i / F * 2 * F + i % F;
    Floats gate = load(gateup + at), up = load(gateup + at + F);
    if constexpr (BITS > 0 && !AGAIN) act_keep<BITS>(codes, i, gate);
    if constexpr (BITS == 0 || !AGAIN)
        for (int k = 0; k < VEC; k++) gate[k] *= silu_gate(gate[k]);
    if constexpr (BITS > 0 && !AGAIN) {   // h is made from silu(gate) as it is kept, that is rounded
        Vec rounded = narrow(gate);
        *reinterpret_cast<Vec*>(gateup + at) = rounded;
        gate = widen(rounded);
    }
    gate *= up;
    store(h + i, gate);
}
template <int BITS, bool AGAIN = false>
void swiglu_forward(floatX* h,          // (rows, F)
                    floatX* gateup,     // (rows, 2F): gate, then up; BITS > 0: out silu(gate), then up. Not written with BITS 0 or AGAIN
                    uint8_t* codes,     // (rows, F) out: codes of gate, of BITS bits. Not written with BITS 0 or AGAIN
                    size_t rows, int F, cudaStream_t stream) {
    check_vec("swiglu_forward: F", F);
    size_t n = rows * F;
    swiglu_forward_kernel<BITS, AGAIN><<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(h, gateup, codes, n, F);
    cudaCheck(cudaGetLastError());
}

template <int BITS> __global__ void swiglu_backward_kernel(floatX* gateup, const floatX* dh, const uint8_t* codes, size_t n, int F) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;   // of (rows, F)
    if (i >= n) return;
    size_t at = i / F * 2 * F + i % F;
    Floats d = load(dh + i), gate = load(gateup + at), up = load(gateup + at + F);
    if constexpr (BITS > 0) {
        Floats slope = act_slope<BITS>(codes, i);
        gate *= d;   // silu(gate) it was
        up *= d;
        up *= slope;
    } else {
        for (int k = 0; k < VEC; k++) {
            float s = silu_gate(gate[k]), dgate = d[k] * up[k] * (s + gate[k] * s * (1.0f - s));
            gate[k] = d[k] * (gate[k] * s);   // so it is 0, not NaN, where d * gate is beyond all numbers and s is 0
            up[k] = dgate;
        }
    }
    store(gateup + at, up);         // dgate
    store(gateup + at + F, gate);   // dup
}
template <int BITS>
void swiglu_backward(floatX* gateup,          // (rows, 2F) in: what forward has left, out: the gradients of gate, then of up
                     const floatX* dh,        // (rows, F)
                     const uint8_t* codes,    // (rows, F) codes of BITS bits; not read with BITS 0
                     size_t rows, int F, cudaStream_t stream) {
    check_vec("swiglu_backward: F", F);
    size_t n = rows * F;
    swiglu_backward_kernel<BITS><<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(gateup, dh, codes, n, F);
    cudaCheck(cudaGetLastError());
}

// ==== twin: loss
// ---- loss
// Softmax and cross-entropy of a row of logits, and their gradient in place: dlogits = (softmax - onehot(target)) * dloss.
// One block per row keeps few rows in flight, so the second pass, which reads the row again and writes its gradient, still finds
// it in the L2 cache. The first pass finds maximum and sum together. Padded columns [V, Vp) have gradient 0. (dev/cuda/classifier.cu)
__global__ void __launch_bounds__(1024)
classifier_kernel(floatX* logits, float* losses, const int* targets, float dloss, bool train, int V, int Vp) {
    __shared__ float shared_max[32], shared_sum[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    size_t row = blockIdx.x;
    floatX* x = logits + row * Vp;
    int target = targets[row];
    if (target < 0) {   // this row has no loss
        if (threadIdx.x == 0) losses[row] = 0;
        for (int c = threadIdx.x * VEC; train && c < Vp; c += blockDim.x * VEC) store(x + c, Floats{});
        return;
    }
    float target_logit = (float)x[target];   // before it is overwritten
    float max = -INFINITY, sum = 0;
    for (int c = threadIdx.x * VEC; c < V; c += blockDim.x * VEC) {
        Floats f = load(x + c);
        for (int k = 0; c + VEC > V && k < VEC; k++)
            if (c + k >= V) f[k] = -INFINITY;
        float vec_max = max;
        for (int k = 0; k < VEC; k++) vec_max = fmaxf(vec_max, f[k]);
        if (vec_max > max) {
            sum *= exp_e(max - vec_max);
            max = vec_max;
        }
        float base = max == -INFINITY ? 0.0f : max;   // if all are -inf: exp(-inf - 0) is 0, and -inf - -inf would be NaN
        for (int k = 0; k < VEC; k++) sum += exp_e(f[k] - base);
    }
    float row_max = warp_max(max);
    if (lane == 0) shared_max[warp] = row_max;
    __syncthreads();
    row_max = warp_max(lane < warps ? shared_max[lane] : -INFINITY);
    // A thread without columns, or with nothing but -inf, has max = -inf and sum = 0. If all threads have, the loss is NaN.
    sum = warp_sum(max == row_max ? sum : sum * exp_e(max - row_max));
    if (lane == 0) shared_sum[warp] = sum;
    __syncthreads();
    sum = warp_sum(lane < warps ? shared_sum[lane] : 0.0f);
    if (threadIdx.x == 0) losses[row] = logf(sum) + (row_max - target_logit);
    if (!train) return;
    float scale = 1.0f / sum;
    for (int c = threadIdx.x * VEC; c < Vp; c += blockDim.x * VEC) {
        Floats f = load(x + c);
        for (int k = 0; k < VEC; k++) f[k] = exp_e(f[k] - row_max) * scale;
        if ((unsigned)(target - c) < VEC) {   // true for one vector of the row: a branch costs less than 8 selects
            for (int k = 0; k < VEC; k++) f[k] -= c + k == target ? 1.0f : 0.0f;
        }
        for (int k = 0; k < VEC; k++) f[k] *= dloss;
        for (int k = 0; c + VEC > V && k < VEC; k++)
            if (c + k >= V) f[k] = 0;
        store(x + c, f);
    }
}
void classifier(floatX* logits,                           // (rows, Vp); out, if train: their gradient
                float* losses, const int* targets,        // (rows) each; losses in nats; target -1: no loss
                float dloss, bool train, int rows, int V, int Vp, cudaStream_t stream) {
    check_vec("classifier: Vp", Vp);
    int threads = std::clamp(ceil_div(Vp, 32 * VEC), 1, 32) * 32;
    classifier_kernel<<<rows, threads, 0, stream>>>(logits, losses, targets, dloss, train, V, Vp);
    cudaCheck(cudaGetLastError());
}

// Is a row's target the likeliest token (of equals the first)? Then it becomes HIT. For validation, after the loss.
constexpr int NO_TARGET = -1, HIT = -2;
__global__ void likeliest_kernel(int* targets, const floatX* logits, int V, int Vp) {
    __shared__ float shared[8];
    const int target = targets[blockIdx.x];
    const floatX* x = logits + (size_t)blockIdx.x * Vp;
    float larger = 0;   // tokens that come first
    for (int c = threadIdx.x; target >= 0 && c < V; c += 256)
        larger += (float)x[c] < (float)x[target] || ((float)x[c] == (float)x[target] && c >= target) ? 0.0f : 1.0f;   // NaN: 1
    larger = block_sum_256(larger, shared);
    if (threadIdx.x == 0 && target >= 0 && larger == 0) targets[blockIdx.x] = HIT;
}

// sum (+)= x[0] + ... + x[n - 1], by one block
__global__ void sum_kernel(float* sum, const float* x, bool accumulate, unsigned n) {
    __shared__ float shared[8];
    float mine = 0;
    for (unsigned i = threadIdx.x; i < n; i += 256) mine += x[i];
    mine = block_sum_256(mine, shared);
    if (threadIdx.x == 0) *sum = accumulate ? *sum + mine : mine;
}
// ==== end twin
// ==== 3. what backward keeps: Approx-BP and MS-RMSNorm ===========================================================================
// What USE_APPROXBP=1 changes, together with the constants kActBits and kMsNorm by which the rest of the file asks for it. One of its
// two halves pays here, MS_NORM=1; the other, APPROX_ACT, does not, and this is why.

// ---- Approx-BP: SiLU's input in 2 bits
// The derivative of SiLU is replaced, in backward only, by that of a sum of ramps h~(x) = sum_i a_i max(x - c_i, 0) close to it (ReSiLU2:
// Yang et al., ICML 2024, arXiv 2406.16282; train_gpt2.cu says more). It is a step function of 4 values, so an element keeps 2 bits.
// The thresholds are about -6.31, 0 and 6.33. Eight neighbours share two bytes, the first one in the lowest bits:
//
//     x         -7.1   0.3   1.2  -0.5   9.0  -1.7   0.1   2.2
//     code         0     2     2     1     3     1     2     2      bits, from the last to the first: 10100111 01101000
//     slope        0  1.04  1.04 -0.04     1 -0.04  1.04  1.04
//
// A framework's autograd keeps gate, silu(gate) and up, and there codes in place of gate save 14 bits of each element. But
// whoever writes SwiGLU's backward by hand keeps gate and up alone and computes silu(gate) and its derivative from gate: exact, and
// without the codes' F/8. So codes cost memory here; where the matmul after an activation needs no input of its own, they save some
// (train_gpt2.cu). They are here to compare: what training does with them, and what others' trainers gain by them. Fine-tuning of a
// Llama minds that these slopes are far from the derivative (relative squared error 0.222 under N(0,1)); those of APPROX_FIT=slope, the
// four that are nearest to it (0.021), it does not seem to: see the table in the README.

// ==== twin: codes
// h~' for codes of BITS bits: 2^BITS - 1 thresholds and 2^BITS slopes.
template <int BITS> struct StepFunction {
    float threshold[(1 << BITS) - 1], slope[1 << BITS];
};
// Element i has bits [BITS * (i % 8), BITS * (i % 8) + BITS) of the BITS bytes of its group of 8. A thread writes whole groups.
template <int BITS> __device__ inline void codes_store(uint8_t* codes, size_t i, const Floats& x, const StepFunction<BITS>& h) {
    uint32_t bits = 0;
    for (int e = 0; e < VEC; e++) {
        uint32_t code = 0;
        for (int j = 0; j < (1 << BITS) - 1; j++) code += !(x[e] <= h.threshold[j]);   // NaN is above them all: its slope is 1
        bits |= code << (BITS * e);
    }
    memcpy(__builtin_assume_aligned(codes + i / 8 * BITS, BITS == 3 ? 1 : BITS), &bits, BITS);
}
template <int BITS> __device__ inline Floats codes_slope(const uint8_t* codes, size_t i, const StepFunction<BITS>& h) {
    uint32_t bits = 0;
    memcpy(&bits, __builtin_assume_aligned(codes + i / 8 * BITS, BITS == 3 ? 1 : BITS), BITS);
    Floats slope;
    for (int e = 0; e < VEC; e++) {
        uint32_t code = bits >> (BITS * e) & ((1u << BITS) - 1);
        slope[e] = h.slope[0];
        for (uint32_t j = 1; j < 1u << BITS; j++)   // selects: an array indexed by a variable would not lie in registers
            if (code >= j) slope[e] = h.slope[j];
    }
    return slope;
}
// ==== end twin
// SiLU's step functions. 2 bits: the published constants. The others: dev/bench/fit_codes.py --function silu --bits 1 3 4
template <int BITS> __host__ __device__ constexpr StepFunction<BITS> silu_steps() {
    if constexpr (BITS == 1) return {{0.0f}, {0.0f, 1.0f}};   // one ramp that tends to 0 and to x can only be ReLU
    else if constexpr (BITS == 2 && kActSlope)
        return {{-0.6685287255181208f, 0.0f, 0.6685287255181208f},
                {0.03359466971762137f, 0.34452635483755456f, 0.6554736451624454f, 0.9664053302823786f}};
    else if constexpr (BITS == 2)
        return {{-6.3050461001646445f, -0.0008684942046214787f, 6.325815242089708f},
                {0.0f, -0.04060357190528599f, 1.040321856624382f, 1.0f}};
    else if constexpr (BITS == 3)
        return {{-6.8930493412956375f, -4.22667883583394f, -1.0161580369751242f, 0.0f, 1.0161580369751242f, 4.22667883583394f,
                 6.8930493412956375f},
                {0.0f, -0.019075343792057886f, -0.07925282760003677f, 0.26211264789942423f, 0.7378873521005758f, 1.0792528276000368f,
                 1.0190753437920579f, 1.0f}};
    else
        return {{-8.476686798315175f, -5.966246244109291f, -4.53272316859859f, -3.435044824329755f, -1.5396731662724306f,
                 -0.9366893198655765f, -0.4484248481098829f, 0.0f, 0.4484248481098829f, 0.9366893198655765f, 1.5396731662724306f,
                 3.435044824329755f, 4.53272316859859f, 5.966246244109291f, 8.476686798315175f},
                {0.0f, -0.005034877367900037f, -0.022615072124165747f, -0.053543226694657164f, -0.09206376198948174f,
                 0.011706327568322905f, 0.18115407122886018f, 0.3893727641940176f, 0.6106272358059823f, 0.8188459287711398f,
                 0.9882936724316771f, 1.0920637619894817f, 1.0535432266946572f, 1.0226150721241658f, 1.0050348773679f, 1.0f}};
}
template <int BITS> __device__ inline void act_keep(uint8_t* codes, size_t i, const Floats& x) {
    constexpr StepFunction<BITS> h = silu_steps<BITS>();
    codes_store<BITS>(codes, i, x, h);
}
template <int BITS> __device__ inline Floats act_slope(const uint8_t* codes, size_t i) {
    constexpr StepFunction<BITS> h = silu_steps<BITS>();
    return codes_slope<BITS>(codes, i, h);
}

// ==== twin: MS-LN
// ---- MS-LN: one tensor for a norm and its matmul
// The norm's backward needs z = (x - mean) * rstd, and the matmul after the norm needs its own input, gamma * z + beta. The matmul
// computes y = (gamma * z + beta) W^T + b. With W' = W * gamma (by columns) and b' = b + W beta that is y = z W'^T + b': now z is the
// input of the matmul too, and one tensor serves both. x, the residual stream, need not be kept. gamma and beta stay parameters:
//     forward            W', b' into scratch (fold), then the matmul
//     backward           dz = (dy W) * gamma; the usual weight gradient, of z instead of the norm's output, sums G = dy^T z in dW
//     once per step      dgamma = colsum(G * W), dbeta = W^T db, dW = G * gamma + db beta^T   (unfold)
// This is the exact gradient. W, gamma and beta do not change within a step, so unfolding the sum over micro-batches is right, and
// unfolding each one would count db beta^T more than once. The published method merges gamma and beta into the weights for good;
// prepro/merge_norm.py does that to a checkpoint. RMSNorm has no beta, and its matmul may have no bias. (dev/cuda/layernorm.cu)

// Weights as they are; section 3's last part has those in 4 bits. A vector is 8 elements from i on.
struct PlainWeight {
    static constexpr bool TABLE = false;
    const floatX* weight;
    __device__ Floats at(size_t i, const float*) const { return load(weight + i); }
};
template <class Weight>
__global__ void norm_fold_kernel(floatX* folded, floatX* folded_bias, Weight weight, const floatX* bias, const floatX* gamma,
                                 const floatX* beta, int OC, int C) {
    __shared__ float table[16];
    if constexpr (Weight::TABLE) weight.table(table);
    int lane = threadIdx.x % 32;
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= OC) return;
    size_t base = (size_t)row * C;
    float sum = 0;
    for (int c = lane * VEC; c < C; c += 32 * VEC) {
        Floats w = weight.at(base + c, table), beta_c = {};
        if (beta != nullptr) beta_c = load(beta + c);
        for (int k = 0; k < VEC; k++) sum += w[k] * beta_c[k];
        if (gamma != nullptr) w *= load(gamma + c);
        store(folded + base + c, w);
    }
    sum = warp_sum(sum);
    if (folded_bias != nullptr && lane == 0) folded_bias[row] = (floatX)((bias != nullptr ? (float)bias[row] : 0.0f) + sum);
}
template <class Weight>
void norm_fold(floatX* folded, floatX* folded_bias,         // (OC, C) W', (OC) b' or null: not wanted
               Weight weight, const floatX* bias,           // (OC, C), (OC) or null: zeros
               const floatX* gamma, const floatX* beta,     // (C) each, or null: ones, zeros
               int OC, int C, cudaStream_t stream) {
    check_vec("norm_fold: C", C);
    norm_fold_kernel<<<ceil_div(OC, 8), 256, 0, stream>>>(folded, folded_bias, weight, bias, gamma, beta, OC, C);
    cudaCheck(cudaGetLastError());
}

__global__ void norm_unfold_kernel(Grad dweight, float* partial_gamma, float* partial_beta, Grad dbias, const floatX* weight,
                                   const floatX* gamma, const floatX* beta, int OC, int C) {
    __shared__ float shared[8][32 * VEC];
    ColsumPlace at(OC);
    Floats sum_gamma = {}, sum_beta = {};
    if (at.c < C) {
        Floats gamma_c = load(gamma + at.c), beta_c = {};
        if (beta != nullptr) beta_c = load(beta + at.c);
        for (int o = at.first + at.warp; o < at.end; o += 8) {
            size_t i = (size_t)o * C + at.c;
            Floats w = load(weight + i), G = grad_load_vec(dweight, i);
            float db = beta != nullptr ? grad_load(dbias, o) : 0;
            for (int k = 0; k < VEC; k++) {
                sum_gamma[k] += G[k] * w[k];
                sum_beta[k] += w[k] * db;
                G[k] = G[k] * gamma_c[k] + db * beta_c[k];
            }
            grad_store_vec(dweight, i, G);
        }
    }
    colsum_store(partial_gamma, sum_gamma, shared, at, C);
    if (beta != nullptr) colsum_store(partial_beta, sum_beta, shared, at, C);
}
void norm_unfold(Grad dweight,                               // (OC, C) in: G, out: dW
                 Grad dgamma, Grad dbeta,                    // (C), (C) or null
                 float* scratch,                             // 2 * COLSUM_SLICES * C floats
                 Grad dbias, const floatX* weight,           // (OC), not read without beta; (OC, C)
                 const floatX* gamma, const floatX* beta,    // (C), (C) or null
                 int OC, int C, cudaStream_t stream) {
    check_vec("norm_unfold: C", C);
    int slices = colsum_slices(OC);
    norm_unfold_kernel<<<dim3(ceil_div(C, 32 * VEC), slices), 256, 0, stream>>>(dweight, scratch, scratch + (size_t)slices * C,
                                                                                dbias, weight, gamma, beta, OC, C);
    cudaCheck(cudaGetLastError());
    colsum_finish({dgamma, dbeta}, 2, scratch, slices, C, false, stream);
}

// ---- NF4: frozen weights in 4 bits
// A frozen weight is read and never written, and can do with fewer bits (QLoRA: Dettmers et al., arXiv 2305.14314). Of 64 elements in a
// row of memory the largest |w| is kept as absmax, and each w / absmax as the nearest of 16 values, which divide a normal distribution
// into equal parts. The 64 elements -0.02, 0.05, 0.1, 0.004, ... with absmax 0.1:
//     w / absmax          -0.2     0.5     1.0    0.04
//     nearest value     -0.185   0.441       1  0.0796 (0.04 is above 0.0398, which is halfway from 0)
//     index                  5      12      15       8        two to a byte, the first one high: 0x5c 0xf8
// That is 4 bits and a float for 64 elements, 4.5 in all. With --double-quant 1 absmax is kept in 8 bits too: less their mean, in
// blocks of 256 with a scale of their own, as the nearest of 256 values: 4.127 bits. All of it is bitsandbytes' format, bit for bit.
// Before each matmul a weight is made again, in one buffer for all; a norm's gamma is multiplied in on the way. (dev/cuda/nf4.cu)

constexpr int NF4_BLOCK = 64, NF4_NESTED = 256;
constexpr int NF4_TABLES = 16 + 256;   // floats: the 16 values, and the 256 of absmax
struct Nf4 {   // of one matrix, flattened
    static constexpr bool TABLE = true;
    const uint8_t* codes;      // (OC * C / 2)
    const void* absmax;        // (blocks) float, or with `nested` bytes: indices of values
    const float* nested;       // (ceil(blocks / 256) + 1) scales of absmax, then the mean; null: no double quantization
    const float* tables;       // (NF4_TABLES)
    __device__ void table(float* shared) const {
        if (threadIdx.x < 16) shared[threadIdx.x] = tables[threadIdx.x];
        __syncthreads();
    }
    __device__ Floats at(size_t i, const float* values) const {
        size_t block = i / NF4_BLOCK;
        float scale;
        if (nested == nullptr) scale = ((const float*)absmax)[block];
        else scale = __fadd_rn(__fmul_rn(tables[16 + ((const uint8_t*)absmax)[block]], nested[1 + block / NF4_NESTED]), nested[0]);
        uint32_t bits = *(const uint32_t*)(codes + i / 2);
        Floats w;
        for (int k = 0; k < VEC; k++) w[k] = values[bits >> (k / 2 * 8 + (k % 2 ? 0 : 4)) & 15] * scale;
        return w;
    }
};
inline size_t nf4_blocks(size_t n) { return ceil_div(n, NF4_BLOCK); }
inline size_t nf4_nested(size_t n) { return ceil_div(nf4_blocks(n), NF4_NESTED) + 1; }   // the mean stands first

const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// bitsandbytes' dynamic map of 8 bits (dynamic tree quantization: Dettmers et al., arXiv 2110.02861): in each of 7 decades twice as many
// values as in the one below, between 0 and 1 and below 0; without a sign twice as many in each, above 0 alone. Ascending.
std::vector<float> dynamic_map(bool with_sign) {
    std::vector<float> map = {0, 1};
    for (int decade = 0; decade < 7; decade++) {
        // from 0.1 to 1, of which neighbours' means count, as torch.linspace makes them in fp32: from the nearer end, rounded once
        const int n = (1 << (decade + !with_sign)) + 1;
        const float step = (1.0f - 0.1f) / (n - 1);
        auto point = [&](int i) { return i < n / 2 ? fmaf(step, (float)i, 0.1f) : fmaf(-step, (float)(n - 1 - i), 1.0f); };
        for (int i = 0; i + 1 < n; i++) {
            const float value = (float)pow(10.0, decade - 6) * ((point(i) + point(i + 1)) / 2.0f);
            map.push_back(value);
            if (with_sign) map.push_back(-value);
        }
    }
    std::sort(map.begin(), map.end());
    return map;
}
std::vector<float> nf4_tables() {
    std::vector<float> tables(NF4_VALUES, NF4_VALUES + 16), map = dynamic_map(true);
    tables.insert(tables.end(), map.begin(), map.end());
    return tables;
}
// The borders between neighbours: of the 16 values bitsandbytes' own constants, which are halfway in decimal digits, at some not where
// fp32 rounds it to; of the 256 halfway in fp32, which belongs to the even index.
const float NF4_BORDERS[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f, -0.13791173323988914f,
    -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f,
    0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
std::vector<float> nf4_borders(const float* map) {
    std::vector<float> borders(255);
    for (int i = 0; i < 255; i++) {
        const float middle = (map[i] + map[i + 1]) * 0.5f;
        borders[i] = i % 2 ? nextafterf(middle, -2) : middle;
    }
    return borders;
}
// The index of the nearest value: how many of the ascending borders x is above. NaN: 0.
inline int nf4_nearest(float x, const float* borders, int count) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (x > borders[middle]) low = middle + 1;
        else high = middle;
    }
    return low;
}
// A matrix of n elements, quantized on the host. Elements come in any number of calls, each but the last with a multiple of 64.
struct Nf4Host {
    std::vector<uint8_t> codes, absmax8;
    std::vector<float> absmax, nested;
    void add(const float* w, size_t n) {
        for (size_t first = 0; first < n; first += NF4_BLOCK) {
            const size_t end = std::min(n, first + NF4_BLOCK);
            float most = 0;
            for (size_t i = first; i < end; i++) most = std::max(most, fabsf(w[i]));
            const float scale = 1.0f / most;   // of zeros: infinite, and 0 times it is NaN, whose index is 0
            absmax.push_back(most);
            float x[NF4_BLOCK] = {};
            int index[NF4_BLOCK] = {};   // the nearest value's: border by border for all, without a branch, since a model has billions
            for (size_t i = first; i < end; i++) x[i - first] = w[i] * scale;
            for (float border : NF4_BORDERS)
                for (int i = 0; i < NF4_BLOCK; i++) index[i] += x[i] > border;
            for (size_t i = 0; i < end - first; i += 2) codes.push_back((uint8_t)(index[i] << 4 | index[i + 1]));
        }
    }
    void finish(bool twice, const float* tables) {   // twice: double quantization
        if (!twice) return;
        const float mean = (float)(std::accumulate(absmax.begin(), absmax.end(), 0.0) / absmax.size());
        const std::vector<float> borders = nf4_borders(tables + 16);
        nested = {mean};
        for (size_t first = 0; first < absmax.size(); first += NF4_NESTED) {
            const size_t end = std::min(absmax.size(), first + NF4_NESTED);
            float most = 0;
            for (size_t i = first; i < end; i++) most = std::max(most, fabsf(absmax[i] - mean));
            const float scale = 1.0f / most;
            nested.push_back(most);
            for (size_t i = first; i < end; i++) absmax8.push_back((uint8_t)nf4_nearest((absmax[i] - mean) * scale, borders.data(), 255));
        }
    }
};

// ---- adapters' input: y = gamma x + beta, and dropout
// --lora-dropout sets elements of an adapter's input to 0, and multiplies the others so that the mean stays. Which ones is a hash of the
// step, the layer and the element, so that backward knows them without a mask. ADD: out += what dropout makes of inp.
struct Dropout {
    float p;               // 0: none
    uint64_t seed, stream; // stream: of the micro-batch and the linear layer
    size_t first;          // element of it that inp begins with
};
template <bool ADD>
__global__ void dropout_kernel(floatX* out, const floatX* inp, const floatX* gamma, const floatX* beta, Dropout drop, size_t n, int C) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    int c = (int)(i % C);
    Floats x = load(inp + i), old = {};
    if (gamma != nullptr) x *= load(gamma + c);
    if (beta != nullptr) x += load(beta + c);
    if constexpr (ADD) old = load(out + i);
    const uint32_t limit = (uint32_t)(drop.p * 65536.0f);   // 16 random bits an element
    const float keep = 65536.0f / (65536 - limit);
    for (int half = 0; half < 2; half++) {
        uint64_t random = hash64(drop.seed, drop.stream, drop.first + i + half * 4);
        for (int k = half * 4; k < half * 4 + 4; k++, random >>= 16) x[k] = (random & 0xffff) < limit ? 0.0f : x[k] * keep;
    }
    x += old;
    store(out + i, x);
}
template <bool ADD>
void dropout(floatX* out, const floatX* inp,                // (rows, C) each
             const floatX* gamma, const floatX* beta,       // (C) or null, before dropout
             const Dropout& drop, size_t rows, int C, cudaStream_t stream) {
    check_vec("dropout: C", C);
    dropout_kernel<ADD><<<ceil_div(rows * C, 256 * VEC), 256, 0, stream>>>(out, inp, gamma, beta, drop, rows * C, C);
    cudaCheck(cudaGetLastError());
}
// With MS_NORM an adapter's gradient G = dt^T z is one of A * gamma: dA (+)= G * gamma + colsum(dt) beta^T, in each micro-batch.
__global__ void adapter_unfold_kernel(Grad dA, const float* G, const float* dt_sum, const floatX* gamma, const floatX* beta,
                                      bool accumulate, size_t n, int C) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    int c = (int)(i % C);
    Floats g = load(G + i), old = {};
    g *= load(gamma + c);
    if (beta != nullptr) {
        Floats b = load(beta + c);
        for (int k = 0; k < VEC; k++) g[k] += dt_sum[i / C] * b[k];
    }
    if (accumulate) old = grad_load_vec(dA, i);
    g += old;
    grad_store_vec(dA, i, g);
}
void adapter_unfold(Grad dA, const float* G, const float* dt_sum,    // (rows, C), (rows, C), (rows): not read without beta
                    const floatX* gamma, const floatX* beta,         // (C), (C) or null
                    bool accumulate, int rows, int C, cudaStream_t stream) {
    check_vec("adapter_unfold: C", C);
    const size_t n = (size_t)rows * C;
    adapter_unfold_kernel<<<ceil_div(n, 256 * VEC), 256, 0, stream>>>(dA, G, dt_sum, gamma, beta, accumulate, n, C);
    cudaCheck(cudaGetLastError());
}
// ==== end twin
// ==== twin: tensor cores, optimizer, many GPUs, tensor table
// ==== 4. attention on tensor cores ===============================================================================================
// The same algorithm, with its products on tensor cores. A warp multiplies by mma.sync.m16n8k16: c += a b, where a is 16 x 16 and
// b is 16 x 8, in bf16, and c is 16 x 8, in fp32. Each lane holds some elements of each in registers (PTX: a fragment). Of c it has
// two neighbours in row lane / 4, and two 8 rows below:
//              column 0, 1    2, 3    4, 5    6, 7
//     row  0       lane 0     1       2       3       c[0], c[1]      for example lane 5: c[0] is in row 1, column 2
//     row  1       lane 4     5       6       7                                          c[1] is in row 1, column 3
//     ...                                                                                c[2] is in row 9, column 2
//     row  7       lane 28    29      30      31                                         c[3] is in row 9, column 3
//     rows 8-15    as above                           c[2], c[3]
//
// An a is four squares of 8 x 8, each spread over the lanes like the upper half of a c. A register holds two neighbouring bf16:
//                  columns 0-7    8-15
//     rows 0-7         a[0]       a[2]        So two c side by side, rounded to bf16, are an a, and no element changes its lane:
//     rows 8-15        a[1]       a[3]        the scores that one product makes become the p that the next one takes.
//
// A b is two such squares, transposed: lane / 4 is the column. b[0] has rows lane % 4 * 2 and the next, b[1] those 8 rows below.
//
// A warp owns 16 M rows (queries, or keys), as M matrices a. The other side comes in tiles of 64 rows. They are copied to shared
// memory asynchronously, the next one while this one is used, and b is read from there. Each b serves M products: with M = 1 the
// warps wait for shared memory more than for the tensor cores.

typedef __nv_bfloat16 bf16;
constexpr int TC_THREADS = 128;   // 4 warps
constexpr int TC_ROWS = 64;       // rows of a tile
template <int HS> constexpr uint32_t TC_TILE = TC_ROWS * HS * sizeof(bf16);   // bytes of a tile
template <int HS> constexpr int TC_M = HS == 64 ? 2 : 1;                      // what fits in registers
template <int HS> constexpr int TC_BLOCK = TC_THREADS / 32 * 16 * TC_M<HS>;   // rows per block
template <int HS> using TcRows = uint32_t[HS / 32][TC_M<HS>][2][4];           // a warp's rows: per 32 channels M times two a
template <int HS> using TcSums = float[TC_M<HS>][HS / 8][4];                  // results of its rows: M times HS / 8 matrices c
// Registers cannot be indexed, so loops over these must be unrolled (short inner ones are, unasked). A multiprocessor has 65,536 of
// them. Three blocks leave 168 per thread, two leave 255, the most that a thread can have. For compute capability 10 and 12 the
// compiler needs a few more. With TC_V_SHARED v has no room in the kernel for dk and dv, and is read from shared memory each time.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int HS, bool DOCS> constexpr int TC_FORWARD_BLOCKS = 2;
template <int HS, bool DOCS> constexpr bool TC_V_SHARED = true;
#else
template <int HS, bool DOCS> constexpr int TC_FORWARD_BLOCKS = HS == 64 && !DOCS ? 3 : 2;
template <int HS, bool DOCS> constexpr bool TC_V_SHARED = HS == 64 || DOCS;
#endif
// DOCS: attention begins anew at each document. Without them, the registers that this takes are free for more blocks.

// Single instructions.
//   mma_16816    c += a b
//   ldmatrix_x4  four 8 x 8 matrices from shared memory: lane 8 i + j gives the address of row j of matrix i. r[i] is the lane's
//                two elements of it, as in a square of an a, or with TRANSPOSE of a b.
//   cp_async     begins to copy 16 or 4 bytes to shared memory. If they do not exist, zeros are written and nothing is read.
//   opaque       the same number, but the compiler cannot know: what follows from it is computed again and not kept in registers
#ifdef __CUDACC__
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <bool TRANSPOSE> __device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    if constexpr (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
template <int BYTES> __device__ inline void cp_async(uint32_t address, const void* global, bool exists) {
    int bytes = exists ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(address), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }   // for this thread's copies
__device__ inline uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
#else   // the CPU backend has functions for them
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_m16n8k16_bf16(c, a, {b0, b1}, c);
}
template <bool TRANSPOSE> __device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t at) { simt::ldmatrix<4, TRANSPOSE>(r, at); }
template <int BYTES> __device__ inline void cp_async(uint32_t address, const void* global, bool exists) {
    simt::cp_async<BYTES>(address, global, exists ? BYTES : 0);
}
__device__ inline void cp_async_wait_all() { simt::cp_async_commit(), simt::cp_async_wait(0); }
__device__ inline uint32_t opaque(uint32_t x) { return x; }
#endif
__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }   // what they take

// Where a lane's c[0] is in c. Its c[i] is in row lane_row() + i / 2 * 8 and column lane_col() + i % 2.
__device__ inline int lane_row() { return opaque(threadIdx.x) % 32 / 4; }
__device__ inline int lane_col() { return opaque(threadIdx.x) % 4 * 2; }

// Where 8 channels of a tile's row are, in bytes. Shared memory has 32 banks of 4 bytes, and lanes that read different rows of one
// bank wait for each other. A row of 64 channels is 128 bytes, all banks once: 8 pieces of 16 bytes, with 4 banks each. ldmatrix
// reads the same piece of 8 rows at once. If every row began with its piece 0, all 8 would come from the same 4 banks, one after
// the other. So piece i of row r stands at place i XOR r % 8:
//     place (4 banks each)       0 1 2 3 4 5 6 7      piece 2 stands at place
//     row 0 has there the pieces 0 1 2 3 4 5 6 7          2
//     row 1                      1 0 3 2 5 4 7 6          3
//     row 2                      2 3 0 1 6 7 4 5          0
//     rows 3 to 7                ...                      1 6 7 4 5: in 8 rows at 8 places
template <int HS>
__device__ inline uint32_t tc_at(uint32_t row, uint32_t channel) { return row * (2 * HS) + ((channel / 8) ^ (row % 8)) * 16; }
// Begins to copy rows [t0, t0 + 64) of one head into a tile, zeros for rows that do not exist. The whole block takes part.
template <int HS> __device__ inline void tc_load_tile(uint32_t tile, const bf16* head, int stride, int t0, int T) {
    constexpr int PIECES = HS / 8, STEP = TC_THREADS / PIECES;   // per row; rows that the block copies at a time
    int thread = opaque(threadIdx.x), row = thread / PIECES, channel = thread % PIECES * 8;
    const bf16* from = head + (size_t)(t0 + row) * stride + channel;
    uint32_t to = tile + tc_at<HS>(row, channel);   // STEP is a multiple of 8: further rows have the same row % 8
#pragma unroll
    for (int i = 0; i < TC_ROWS; i += STEP) cp_async<16>(to + i * (2 * HS), from + i * stride, t0 + row + i < T);
}
template <int HS>
__device__ inline void tc_load_tiles(uint32_t tile, const bf16* x, int x_stride, const bf16* y, int y_stride, int t0, int T) {
    tc_load_tile<HS>(tile, x, x_stride, t0, T);
    tc_load_tile<HS>(tile + TC_TILE<HS>, y, y_stride, t0, T);
}
// Reads from a tile, by one ldmatrix each:
//     a    16 rows of 16 channels, as an a
//     b    16 rows of 16 channels, as two b: channels 0-7 in b[0], b[1], channels 8-15 in b[2], b[3]
//     b_t  8 rows of 32 channels, transposed, as two b: channels 0-15 in b[0], b[1], channels 16-31 in b[2], b[3]
// at_16 and at_8 are the lane's addresses for row 0 and channel 0. `row` is a multiple of 8, which moves them by whole rows.
// `channel` is a multiple of 16 or 32, so 2 * channel has no bit in common with the lane's own channels, and is an XOR as they are.
template <int HS> struct TileReader {
    uint32_t at_8, at_16;
    __device__ TileReader() {
        uint32_t lane = threadIdx.x % 32;
        at_8 = tc_at<HS>(lane % 8, lane / 8 * 8);
        at_16 = tc_at<HS>(lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8);
    }
    __device__ void a(uint32_t (&a)[4], uint32_t tile, int row, int channel) const {
        ldmatrix_x4<false>(a, tile + row * (2 * HS) + (at_16 ^ (2 * channel)));
    }
    __device__ void b(uint32_t (&b)[4], uint32_t tile, int row, int channel) const {
        ldmatrix_x4<true>(b, tile + row * (2 * HS) + (at_16 ^ (2 * channel)));
    }
    __device__ void b_t(uint32_t (&b)[4], uint32_t tile, int row, int channel) const {
        ldmatrix_x4<false>(b, tile + row * (2 * HS) + (at_8 ^ (2 * channel)));
    }
};

// A warp's rows of one head, from `first` on: zeros for rows that do not exist
template <int HS> __device__ inline void tc_load_rows(TcRows<HS>& a, const bf16* head, int stride, int first, int T) {
    const int row = first + lane_row(), col = lane_col();
#pragma unroll
    for (int m = 0; m < TC_M<HS>; m++)
#pragma unroll
        for (int i = 0; i < HS / 4; i++) {
            int t = row + 16 * m + i % 2 * 8, channel = i / 2 * 8 + col;
            a[i / 8][m][i / 4 % 2][i % 4] = t < T ? *(const uint32_t*)(head + (size_t)t * stride + channel) : 0;
        }
}
// scores[n][m] += rows 16 m and on of the warp times 8 rows of a tile, transposed: from `row` + 8 n on. With A_SHARED the warp's
// rows are read from a tile too.
template <int HS, bool A_SHARED = false, int N>
__device__ inline void tc_scores(float (&scores)[N][TC_M<HS>][4], TcRows<HS>& a, const TileReader<HS>& read, uint32_t tile, int row,
                                 uint32_t a_tile = 0, int a_row = 0) {
#pragma unroll
    for (int i = 0; i < HS / 32; i++) {
        if constexpr (A_SHARED)
            for (int m = 0; m < 2 * TC_M<HS>; m++) read.a(a[i][m / 2][m % 2], a_tile, a_row + m / 2 * 16, 32 * i + m % 2 * 16);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t b[4];
            read.b_t(b, tile, row + 8 * n, 32 * i);
            for (int m = 0; m < TC_M<HS>; m++)
                for (int half = 0; half < 2; half++) mma_16816(scores[n][m], a[i][m][half], b[2 * half], b[2 * half + 1]);
        }
    }
}
// sums += a (16 M x 16) times rows [row, row + 16) of a tile
template <int HS>
__device__ inline void tc_add(TcSums<HS>& sums, const uint32_t (&a)[TC_M<HS>][4], const TileReader<HS>& read, uint32_t tile, int row) {
#pragma unroll
    for (int i = 0; i < HS / 16; i++) {
        uint32_t b[4];
        read.b(b, tile, row, 16 * i);
        for (int m = 0; m < TC_M<HS>; m++)
            for (int half = 0; half < 2; half++) mma_16816(sums[m][2 * i + half], a[m], b[2 * half], b[2 * half + 1]);
    }
}
// Scores of pairs whose key comes after the query become -infinity: their p is 0. s[n][m] has queries as rows, from first_query on,
// and keys as columns, from first_key + 8 n on. With KEY_ROWS it is the other way round, and queries after T are masked too.
template <bool KEY_ROWS, int N, int M>
__device__ inline void tc_mask(float (*s)[M][4], int m, int first_query, int first_key, int T) {
    const int key_less_query = first_key - first_query;   // in row 0 and column 0
    if (key_less_query + (KEY_ROWS ? 15 : 8 * N - 1) <= 0 && (!KEY_ROWS || first_query + 8 * N <= T)) return;   // no pair is masked
    const int row = lane_row(), col = lane_col(), own = key_less_query + (KEY_ROWS ? row - col : col - row);   // in the lane's c[0]
#pragma unroll
    for (int i = 0; i < 4 * N; i++) {
        const int down = i % 4 / 2 * 8, right = i / 4 * 8 + i % 2;
        if (own + (KEY_ROWS ? down - right : right - down) > 0 || (KEY_ROWS && first_query + col + right >= T))
            s[i / 4][m][i % 4] = -INFINITY;
    }
}
// The same for keys of documents before a query's own: first(query) is the first key that it sees. `seen` keys are seen by all queries:
// those from that one on, and mostly none of this tile comes before it.
template <bool KEY_ROWS, int N, int M, class First>
__device__ inline void tc_mask_documents(float (*s)[M][4], int m, int first_query, int first_key, int seen, const First& first) {
    if (first_key >= seen) return;
    const int row = lane_row(), col = lane_col();
#pragma unroll
    for (int i = 0; i < (KEY_ROWS ? 2 * N : 2); i++) {   // the lane's queries: two rows; or columns, two of each c
        const int unseen = first(first_query + (KEY_ROWS ? col + i / 2 * 8 + i % 2 : row + 8 * i)) - first_key - (KEY_ROWS ? row : col);
        for (int k = 0; k < (KEY_ROWS ? 2 : 2 * N); k++) {
            float& x = KEY_ROWS ? s[i / 2][m][i % 2 + 2 * k] : s[k / 2][m][2 * i + k % 2];
            if ((KEY_ROWS ? 8 * k : k / 2 * 8 + k % 2) < unseen) x = -INFINITY;
        }
    }
}
// A c (16 x 8), rounded to bf16, as the left or the right half of an a (16 x 16)
__device__ inline void tc_as_a(uint32_t (&a)[4], const float (&c)[4], bool right) {
    *(__nv_bfloat162*)&a[2 * right] = __floats2bfloat162_rn(c[0], c[1]);
    *(__nv_bfloat162*)&a[2 * right + 1] = __floats2bfloat162_rn(c[2], c[3]);
}
// Results times a factor to global memory, rows from `first` on
template <int HS> __device__ inline void tc_store(bf16* head, int stride, const TcSums<HS>& sums, int first, int T, float factor) {
    const int row = first + lane_row(), col = lane_col();
#pragma unroll
    for (int r = 0; r < 2 * TC_M<HS>; r++) {   // the lane's rows: c[0] and c[1] of m = 0, c[2] and c[3], and so on
        const int t = row + 8 * r, i = r % 2 * 2;
        if (t >= T) continue;
        for (int n = 0; n < HS / 8; n++)
            *(__nv_bfloat162*)(head + (size_t)t * stride + n * 8 + col) =
                __floats2bfloat162_rn(sums[r / 2][n][i] * factor, sums[r / 2][n][i + 1] * factor);
    }
}
// column_sums[i] = factor * the sum of results over the block's rows, by way of `shared`: 4 * HS floats that nobody uses any more.
// The whole block takes part; rows that do not exist have results of 0.
template <int HS> __device__ inline void tc_column_sums(float* column_sums, const TcSums<HS>& sums, float factor, float* shared) {
    const int row = lane_row(), col = lane_col(), warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < HS / 4; i++) {
        float x = 0;
        for (int m = 0; m < TC_M<HS>; m++) x += sums[m][i / 2][i % 2] + sums[m][i / 2][i % 2 + 2];
        for (int o = 4; o < 32; o <<= 1) x += __shfl_xor_sync(ALL_LANES, x, o);   // over the 8 lanes of a column
        if (row == 0) shared[warp * HS + i / 2 * 8 + col + i % 2] = x;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HS; i += TC_THREADS)
        column_sums[i] = factor * ((shared[i] + shared[HS + i]) + (shared[2 * HS + i] + shared[3 * HS + i]));
}

template <int HS, bool DOCS> __global__ void __launch_bounds__(TC_THREADS, TC_FORWARD_BLOCKS<HS, DOCS>)
attention_forward_tc_kernel(bf16* out, float* lse, const bf16* qkv, AttShape shape, AttDocuments documents) {
    extern __shared__ __align__(128) bf16 tc_tiles[];   // two stages of a tile of k and one of v
    // DOCS: keys that all of a warp's queries see, and block.b. The registers are all in use.
    __shared__ int seen[TC_THREADS / 32], sequence;
    constexpr int M = TC_M<HS>, KEYS = 64 / M;          // keys that a warp looks at between two corrections of its maximum
    const uint32_t tiles = shared_address(tc_tiles);
    const TileReader<HS> read;
    const AttBlock block = att_block(shape, shape.NH, TC_BLOCK<HS>, true);
    const int T = shape.T, stride = (int)shape.stride(), to_v = shape.NKV * HS, end = min(block.first + TC_BLOCK<HS>, T);
    auto first_query = [&] { return block.first + (int)opaque(threadIdx.x) / 32 * 16 * M; };   // the warp's
    const bf16 *row0 = qkv + (size_t)block.b * T * stride, *k_head = row0 + shape.k_head(block.h) * HS;
    const float scale = shape.scale * LOG2E;   // exp(x) = exp_2(x * LOG2E)
    if constexpr (DOCS) {
        seen[threadIdx.x / 32] = documents.first_key(shape, block.b, first_query() + 16 * M - 1);
        sequence = block.b;
    }
    auto first_key = [&](int query) { return documents.first_key(shape, sequence, query); };
    TcRows<HS> q;
    TcSums<HS> o = {};
    float max[M][2], sum[M][2] = {};   // of the lane's rows
    tc_load_rows<HS>(q, row0 + block.h * HS, stride, first_query(), T);
#pragma unroll
    for (int m = 0; m < M; m++) max[m][0] = max[m][1] = DOCS ? ATT_NO_MAX : -INFINITY;
    const int first = DOCS ? documents.first_key(shape, block.b, block.first) / TC_ROWS * TC_ROWS : 0;
    tc_load_tiles<HS>(tiles, k_head, stride, k_head + to_v, stride, first, T);
    for (int t0 = first, stage = 0; t0 < end; t0 += TC_ROWS, stage ^= 1) {
        const uint32_t k_tile = tiles + stage * 2 * TC_TILE<HS>, v_tile = k_tile + TC_TILE<HS>;
        cp_async_wait_all();
        __syncthreads();   // the copies of all threads are complete, and no thread reads the tiles before any more
        if (t0 + TC_ROWS < end)
            tc_load_tiles<HS>(tiles + (stage ^ 1) * 2 * TC_TILE<HS>, k_head, stride, k_head + to_v, stride, t0 + TC_ROWS, T);
#pragma unroll 1
        for (int j = 0; j < TC_ROWS; j += KEYS) {
            if (t0 + j - first_query() > 16 * M - 1) break;   // masked for all queries of the warp, as is what follows
            float s[KEYS / 8][M][4] = {};                   // q k^T
            tc_scores<HS>(s, q, read, k_tile, j);
#pragma unroll
            for (int m = 0; m < M; m++) {
                tc_mask<false, KEYS / 8>(s, m, first_query() + 16 * m, t0 + j, T);
                if constexpr (DOCS)
                    tc_mask_documents<false, KEYS / 8>(s, m, first_query() + 16 * m, t0 + j, seen[threadIdx.x / 32], first_key);
#pragma unroll
                for (int half = 0; half < 2; half++) {   // the lane's row of c[0] and c[1], then that of c[2] and c[3]
                    float new_max = max[m][half];
                    for (int n = 0; n < KEYS / 8; n++) new_max = fmaxf(new_max, fmaxf(s[n][m][2 * half], s[n][m][2 * half + 1]));
                    new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 1));   // over the 4 lanes that share the row
                    new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 2));
                    float shrink = exp_2((max[m][half] - new_max) * scale);
                    max[m][half] = new_max;
                    sum[m][half] *= shrink;
                    for (int n = 0; n < HS / 8; n++) o[m][n][2 * half] *= shrink, o[m][n][2 * half + 1] *= shrink;
                    for (int n = 0; n < KEYS / 4; n++) {
                        float& p = s[n / 2][m][2 * half + n % 2];   // in place of s
                        p = exp_2(p * scale - new_max * scale);
                        sum[m][half] += p;   // of this lane's columns; those of the row's 4 lanes are added at the end
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {   // o += p v
                uint32_t p[M][4];
                for (int m = 0; m < M; m++) tc_as_a(p[m], s[n][m], false), tc_as_a(p[m], s[n + 1][m], true);
                tc_add<HS>(o, p, read, v_tile, j + 8 * n);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
        const int query = first_query() + lane_row() + 8 * r, m = r / 2, half = r % 2;
        const float total = neighbours_sum<4>(sum[m][half]), factor = 1.0f / total;
        for (int n = 0; n < HS / 8; n++) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
        if (lane_col() == 0 && query < T) lse[shape.lse_at(block.b, block.h, query)] = max[m][half] * shape.scale + logf(total);
    }
    tc_store<HS>(out + shape.out_at(block.b, 0, block.h), shape.NH * HS, o, first_query(), T, 1);
}

// Backward by rows of queries: dq. `partial` gets the sums of dq over the block's rows, for the gradient of the bias of the matmul
// that made qkv. If it is null they are not wanted.
template <int HS, bool DOCS> __global__ void __launch_bounds__(TC_THREADS, 2)
attention_backward_dq_tc_kernel(bf16* dqkv, float* partial, float* delta, const bf16* dout, const bf16* qkv, const bf16* out,
                                const float* lse, AttShape shape, AttDocuments documents) {
    extern __shared__ __align__(128) bf16 tc_tiles[];   // two stages of a tile of k and one of v
    // DOCS: keys that all of a warp's queries see, and block.b. The registers are all in use.
    __shared__ int seen[TC_THREADS / 32], sequence;
    constexpr int M = TC_M<HS>;
    const uint32_t tiles = shared_address(tc_tiles);
    const TileReader<HS> read;
    const AttBlock block = att_block(shape, shape.NH, TC_BLOCK<HS>, true);
    const int T = shape.T, stride = (int)shape.stride(), end = min(block.first + TC_BLOCK<HS>, T);
    const int first_query = block.first + threadIdx.x / 32 * 16 * M;   // the warp's
    const bf16* k_head = qkv + shape.qkv_at(block.b, 0, shape.k_head(block.h));
    const float scale = shape.scale * LOG2E;
    auto stage = [&](int t0) { return tiles + t0 / TC_ROWS % 2 * 2 * TC_TILE<HS>; };
    auto load = [&](int t0) { tc_load_tiles<HS>(stage(t0), k_head, stride, k_head + shape.NKV * HS, stride, t0, T); };
    const int first = DOCS ? documents.first_key(shape, block.b, block.first) / TC_ROWS * TC_ROWS : 0;
    load(first);
    if constexpr (DOCS) {
        seen[threadIdx.x / 32] = documents.first_key(shape, block.b, first_query + 16 * M - 1);
        sequence = block.b;
    }
    auto first_key = [&](int query) { return documents.first_key(shape, sequence, query); };
    const size_t q_head = shape.qkv_at(block.b, 0, block.h), out_head = shape.out_at(block.b, 0, block.h);
    TcRows<HS> q, dout_rows;
    TcSums<HS> dq = {};
    float lse_row[2 * M], delta_row[2 * M] = {};   // of the lane's rows
    if (out != nullptr)
        tc_load_rows<HS>(q, out + out_head, shape.NH * HS, first_query, T);   // it needs registers for a moment only: those of q
    tc_load_rows<HS>(dout_rows, dout + out_head, shape.NH * HS, first_query, T);
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
        const int query = first_query + lane_row() + 8 * r;
        const size_t at = shape.lse_at(block.b, block.h, query);
        lse_row[r] = query < T ? lse[at] * LOG2E : 0;
        if (out == nullptr) {
            delta_row[r] = query < T ? delta[at] : 0;
            continue;
        }
#pragma unroll
        for (int i = r % 2; i < HS / 4; i += 2) {
            const __nv_bfloat162 x = *(const __nv_bfloat162*)&q[i / 8][r / 2][i / 4 % 2][i % 4];
            const __nv_bfloat162 y = *(const __nv_bfloat162*)&dout_rows[i / 8][r / 2][i / 4 % 2][i % 4];
            delta_row[r] += (float)x.x * (float)y.x + (float)x.y * (float)y.y;
        }
        delta_row[r] = neighbours_sum<4>(delta_row[r]);
        if (lane_col() == 0 && query < T) delta[at] = delta_row[r];   // for the kernel below
    }
    tc_load_rows<HS>(q, qkv + q_head, stride, first_query, T);
    for (int t0 = first; t0 < end; t0 += TC_ROWS) {
        const uint32_t k_tile = stage(t0), v_tile = k_tile + TC_TILE<HS>;
        cp_async_wait_all();
        __syncthreads();   // the copies of all threads are complete, and no thread reads the tiles before any more
        if (t0 + TC_ROWS < end) load(t0 + TC_ROWS);
#pragma unroll
        for (int j = 0; j < TC_ROWS; j += 16) {
            if (t0 + j - first_query > 16 * M - 1) break;
            uint32_t ds[M][4];
#pragma unroll
            for (int right = 0; right < 2; right++) {      // 8 keys, then 8 more
                float s[1][M][4] = {}, dp[1][M][4] = {};   // q k^T and dout v^T
                tc_scores<HS>(s, q, read, k_tile, j + 8 * right);
                tc_scores<HS>(dp, dout_rows, read, v_tile, j + 8 * right);
                for (int m = 0; m < M; m++) {
                    tc_mask<false, 1>(s, m, first_query + 16 * m, t0 + j + 8 * right, T);
                    if constexpr (DOCS)
                        tc_mask_documents<false, 1>(s, m, first_query + 16 * m, t0 + j + 8 * right, seen[threadIdx.x / 32], first_key);
                    for (int i = 0; i < 4; i++)   // ds = p (dp - delta)
                        dp[0][m][i] = exp_2(s[0][m][i] * scale - lse_row[2 * m + i / 2]) * (dp[0][m][i] - delta_row[2 * m + i / 2]);
                    tc_as_a(ds[m], dp[0][m], right);
                }
            }
            tc_add<HS>(dq, ds, read, k_tile, j);   // dq += ds k
        }
    }
    tc_store<HS>(dqkv + q_head, stride, dq, first_query, T, shape.scale);
    if (partial == nullptr) return;
    partial += (size_t)(block.b * block.row_blocks + block.first / TC_BLOCK<HS>) * stride + block.h * HS;
    __syncthreads();   // no thread reads tiles any more
    tc_column_sums<HS>(partial, dq, shape.scale, (float*)tc_tiles);
}

// Backward by rows of keys: dk, dv and their sums over rows. All is transposed: s^T = k q^T, dv = p^T dout, dk = scale * ds^T q.
template <int HS, bool DOCS> __global__ void __launch_bounds__(TC_THREADS, 2)
attention_backward_dkv_tc_kernel(bf16* dkv, int dkv_stride, float* partial, const bf16* dout, const bf16* qkv, const float* lse,
                                 const float* delta, AttShape shape, AttDocuments documents) {
    extern __shared__ __align__(128) bf16 tc_tiles[];      // two stages of a tile of q and one of dout; v
    __shared__ float2 row_statistics[2][2][TC_ROWS / 2];   // of each stage: lse and delta of its queries, by twos
    __shared__ int row_documents[2][TC_ROWS + 1];          // DOCS: the first key that each sees, and the query behind them
    constexpr int M = TC_M<HS>;
    const uint32_t tiles = shared_address(tc_tiles), v_tile = tiles + 4 * TC_TILE<HS>;
    const TileReader<HS> read;
    const AttBlock block = att_block(shape, shape.NKV, TC_BLOCK<HS>, false);   // block.h is a key-value head
    const int T = shape.T, stride = (int)shape.stride(), to_v = shape.NKV * HS;
    auto first_key = [&] { return block.first + (int)opaque(threadIdx.x) / 32 * 16 * M; };   // the warp's
    const bf16 *row0 = qkv + shape.qkv_at(block.b, 0, 0), *k_head = row0 + (shape.NH + block.h) * HS;
    const float scale = shape.scale * LOG2E;
    auto load_stage = [&](int stage, int h, int t0) {   // queries from t0 on, of query head h
        const bf16* dout_head = dout + shape.out_at(block.b, 0, h);
        tc_load_tiles<HS>(tiles + stage * 2 * TC_TILE<HS>, row0 + h * HS, stride, dout_head, shape.NH * HS, t0, T);
        const int thread = opaque(threadIdx.x), row = thread % TC_ROWS;   // half of the block copies lse, the other delta
        const float* from = (thread < TC_ROWS ? lse : delta) + shape.lse_at(block.b, h, t0 + row);
        cp_async<4>(shared_address((float*)row_statistics[stage][thread / TC_ROWS] + row), from, t0 + row < T);
        if (DOCS && thread <= TC_ROWS)
            cp_async<4>(shared_address(&row_documents[stage][thread]), documents.first + (block.b * T + t0 + thread),   // < 2^30
                        t0 + thread < T);
    };
    const int first_head = block.h * shape.group(), last_head = first_head + shape.group() - 1;   // that share these keys
    int stage = 0;
    TcRows<HS> k, v;
    TcSums<HS> dk = {}, dv = {};
    tc_load_rows<HS>(k, k_head, stride, first_key(), T);
    if constexpr (!TC_V_SHARED<HS, DOCS>) tc_load_rows<HS>(v, k_head + to_v, stride, first_key(), T);
    else for (int m = 0; m < M; m++) tc_load_tile<HS>(v_tile + m * TC_TILE<HS>, k_head + to_v, stride, block.first + 64 * m, T);
    load_stage(stage, first_head, block.first);
    for (int h = first_head; h <= last_head; h++)
        for (int t0 = block.first, last = 0; DOCS ? !last : t0 < T; t0 += TC_ROWS, stage ^= 1) {
            const uint32_t q_tile = tiles + stage * 2 * TC_TILE<HS>, dout_tile = q_tile + TC_TILE<HS>;
            if constexpr (!DOCS) last = t0 + TC_ROWS >= T;   // of the head
            cp_async_wait_all();
            __syncthreads();
            if constexpr (DOCS)   // or other queries see none of these keys
                last = t0 + TC_ROWS >= T || row_documents[stage][TC_ROWS] >= block.first + TC_BLOCK<HS>;
            if (!last || h < last_head) load_stage(stage ^ 1, h + last, last ? block.first : t0 + TC_ROWS);
#pragma unroll 1
            for (int j = 0; j < TC_ROWS; j += 16) {
                if (first_key() - (t0 + j) > 15) continue;     // these queries come before all keys of the warp
                float s[2][M][4] = {}, dp[2][M][4] = {};   // of 8 queries, then 8 more
                tc_scores<HS>(s, k, read, q_tile, j);
                tc_scores<HS, TC_V_SHARED<HS, DOCS>>(dp, v, read, dout_tile, j, v_tile, first_key() - block.first);
                for (int m = 0; m < M; m++) {
                    tc_mask<true, 2>(s, m, t0 + j, first_key() + 16 * m, T);
                    if constexpr (DOCS)
                        tc_mask_documents<true, 2>(s, m, t0 + j, first_key() + 16 * m, row_documents[stage][min(j + 15, T - 1 - t0)],
                                                   [&](int query) { return row_documents[stage][query - t0]; });
                }
                uint32_t p[M][4], ds[M][4];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int pair = (j + 8 * n + lane_col()) / 2;   // the lane's two queries
                    const float2 lse_2 = row_statistics[stage][0][pair], delta_2 = row_statistics[stage][1][pair];
                    for (int m = 0; m < M; m++) {
                        for (int i = 0; i < 4; i++) {   // p in place of s, ds of dp
                            s[n][m][i] = exp_2(s[n][m][i] * scale - (i % 2 ? lse_2.y : lse_2.x) * LOG2E);
                            dp[n][m][i] = s[n][m][i] * (dp[n][m][i] - (i % 2 ? delta_2.y : delta_2.x));
                        }
                        tc_as_a(p[m], s[n][m], n);
                        tc_as_a(ds[m], dp[n][m], n);
                    }
                }
                tc_add<HS>(dv, p, read, dout_tile, j);
                tc_add<HS>(dk, ds, read, q_tile, j);
            }
        }
    bf16* dk_head = dkv + (size_t)block.b * T * dkv_stride + block.h * HS;
    tc_store<HS>(dk_head, dkv_stride, dk, first_key(), T, shape.scale);
    tc_store<HS>(dk_head + to_v, dkv_stride, dv, first_key(), T, 1);
    if (partial == nullptr) return;
    partial += (size_t)(block.b * block.row_blocks + block.first / TC_BLOCK<HS>) * stride + (shape.NH + block.h) * HS;
    __syncthreads();   // no thread reads tiles any more
    tc_column_sums<HS>(partial, dk, shape.scale, (float*)tc_tiles);
    tc_column_sums<HS>(partial + to_v, dv, 1, (float*)tc_tiles + 4 * HS);
}

// A kernel has to ask for more than 48 KB of shared memory, static and dynamic together. Returns the bytes of the dynamic.
template <class Kernel> int tc_shared_bytes(Kernel kernel, int bytes) {
    cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return bytes;
}
template <int HS, bool DOCS>
void attention_forward_tc(floatX* out, float* lse, const floatX* qkv, int B, AttShape shape, AttDocuments documents,
                          cudaStream_t stream) {
    static int bytes = tc_shared_bytes(attention_forward_tc_kernel<HS, DOCS>, 4 * TC_TILE<HS>);
    int heads = B * shape.NH, blocks = heads * ceil_div(shape.T, TC_BLOCK<HS>);
    attention_forward_tc_kernel<HS, DOCS><<<blocks, TC_THREADS, bytes, stream>>>(out, lse, qkv, att_in_groups(shape, heads), documents);
    cudaCheck(cudaGetLastError());
}
template <int HS, bool DOCS>
void attention_backward_tc(AttGradients to, float* partial, float* delta, const floatX* dout, const floatX* qkv, const floatX* out,
                           const float* lse, int B, AttShape shape, AttDocuments documents, cudaStream_t stream) {
    static int dq_bytes = tc_shared_bytes(attention_backward_dq_tc_kernel<HS, DOCS>, 4 * TC_TILE<HS>);
    static int dkv_bytes = tc_shared_bytes(attention_backward_dkv_tc_kernel<HS, DOCS>, (4 + TC_M<HS>) * TC_TILE<HS>);
    int row_blocks = ceil_div(shape.T, TC_BLOCK<HS>), heads = B * shape.NH, kv_heads = B * shape.NKV;
    for (bool keys : {out == nullptr, out != nullptr}) {
        if (keys)
            attention_backward_dkv_tc_kernel<HS, DOCS><<<kv_heads * row_blocks, TC_THREADS, dkv_bytes, stream>>>(
                to.dkv, to.dkv_stride, partial, dout, qkv, lse, delta, att_in_groups(shape, kv_heads), documents);
        else
            attention_backward_dq_tc_kernel<HS, DOCS><<<heads * row_blocks, TC_THREADS, dq_bytes, stream>>>(
                to.dqkv, partial, delta, dout, qkv, out, lse, att_in_groups(shape, heads), documents);
        cudaCheck(cudaGetLastError());
    }
}

AttShape att_shape(int T, int NH, int NKV, int HS) {
    if (NKV < 1 || NH % NKV != 0) fail("attention: %d query heads, %d key-value heads: expected a multiple", NH, NKV);
    if (HS < VEC || HS > 4 * ATT_CHANNELS || HS % VEC != 0)
        fail("attention: a head has %d channels: expected a multiple of %d, up to %d", HS, VEC, 4 * ATT_CHANNELS);
    static const int l2_bytes = [] {   // of this process's GPU
        int device = 0, bytes = 0;
        cudaCheck(cudaGetDevice(&device));
        cudaCheck(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
        return bytes > 0 ? bytes : 32 << 20;   // a virtual GPU may not say
    }();
    return {T, NH, NKV, HS, 1.0f / sqrtf((float)HS), att_heads_together(T, HS, l2_bytes)};
}

void attention_forward(floatX* out,        // (B, T, NH*HS)
                       float* lse,         // (B, NH, T), natural logarithm
                       const floatX* qkv,  // (B, T, (NH + 2 NKV)*HS): q of all heads, then k, then v
                       const int* document,   // (B, T) as in AttDocuments, or null
                       int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    auto run = HS <= 32 ? attention_forward_launch<1> : HS <= 64 ? attention_forward_launch<2> : attention_forward_launch<4>;
    if constexpr (!kFP32) {
        if (HS == 64) run = document ? attention_forward_tc<64, true> : attention_forward_tc<64, false>;
        if (HS == 128) run = document ? attention_forward_tc<128, true> : attention_forward_tc<128, false>;
    }
    run(out, lse, qkv, B, att_shape(T, NH, NKV, HS), {document}, stream);
}

inline size_t attention_scratch(size_t B, size_t T, size_t NH, size_t NKV, size_t HS) {   // floats that backward takes for dbias
    return std::max((size_t)COLSUM_SLICES, B * ceil_div(T, 64)) * (NH + 2 * NKV) * HS;
}
// delta = row sums of dout * out, of each head; and dout takes the place of out.
__global__ void attention_delta_kernel(floatX* out, float* delta, const floatX* dout, size_t first, size_t heads, int T, int NH, int HS,
                                       int lanes) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, head = i / lanes;
    const int c = (int)(i % lanes) * VEC;
    const bool exists = head < heads && c < HS;
    float sum = 0;
    if (exists) {
        Floats x = load(out + head * HS + c);
        const Floats d = load(dout + head * HS + c);
        x *= d;
        for (int k = 0; k < VEC; k++) sum += x[k];
        store(out + head * HS + c, d);
    }
    for (int o = lanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, o);
    const size_t row = first + head / NH;
    if (exists && c == 0) delta[(row / T * NH + head % NH) * T + row % T] = sum;
}
void attention_delta(floatX* out,          // (rows, NH*HS) in: attention's output, out: dout
                     float* delta,         // (B, NH, T), of which those of these rows are written
                     const floatX* dout,   // (rows, NH*HS)
                     size_t first, int rows, int T, int NH, int HS, cudaStream_t stream) {   // first: these rows' number in B*T
    int lanes = 1;
    while (lanes * VEC < HS) lanes *= 2;
    const size_t heads = (size_t)rows * NH;
    attention_delta_kernel<<<ceil_div(heads * lanes, 256), 256, 0, stream>>>(out, delta, dout, first, heads, T, NH, HS, lanes);
    cudaCheck(cudaGetLastError());
}
void attention_backward(floatX* dqkv,                               // (B, T, (NH + 2 NKV)*HS); may be qkv, if dkv is there
                        floatX* dkv,                                // (B, T, 2 NKV*HS) on the way there, or null: not needed
                        Grad dbias,                                 // ((NH + 2 NKV)*HS) column sums of dqkv; null: not wanted
                        float* delta, float* scratch,               // (B, NH, T); for dbias attention_scratch(B, T, NH, NKV, HS) floats
                        const floatX* dout, const floatX* qkv,      // (B, T, NH*HS), as dqkv
                        const floatX* out, const float* lse,        // (B, T, NH*HS) or null: attention_delta was called; (B, NH, T)
                        const int* document,                        // (B, T) as in AttDocuments, or null
                        bool accumulate, int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    auto run = HS <= 32 ? attention_backward_launch<1> : HS <= 64 ? attention_backward_launch<2> : attention_backward_launch<4>;
    int rows = 0;   // of the partial sums of dbias; 0: the kernel makes none
    if constexpr (!kFP32) {
        if (HS == 64) run = document ? attention_backward_tc<64, true> : attention_backward_tc<64, false>, rows = TC_BLOCK<64>;
        if (HS == 128) run = document ? attention_backward_tc<128, true> : attention_backward_tc<128, false>, rows = TC_BLOCK<128>;
    }
    const int columns = (NH + 2 * NKV) * HS, keys = 2 * NKV * HS;
    const AttGradients to = {dqkv, dkv ? dkv : dqkv + NH * HS, dkv ? keys : columns};
    run(to, dbias.p && rows ? scratch : nullptr, delta, dout, qkv, out, lse, B, att_shape(T, NH, NKV, HS), {document}, stream);
    if (dkv != nullptr)
        cudaCheck(cudaMemcpy2DAsync(dqkv + NH * HS, columns * sizeof(floatX), dkv, keys * sizeof(floatX), keys * sizeof(floatX),
                                    (size_t)B * T, cudaMemcpyDeviceToDevice, stream));
    if (dbias.p == nullptr) return;
    if (rows) colsum_finish({dbias}, 1, scratch, B * ceil_div(T, rows), columns, accumulate, stream);
    else bias_backward(dbias, scratch, dqkv, accumulate, B * T, columns, stream);
}

// ==== 5. optimizer ===============================================================================================================
// A step's update: the squares of all gradients and their sum, the verdict on the step (by what factor to clip, whether to skip it),
// AdamW. The verdict stays on the device, where AdamW reads it, so that the host need not wait for it. Two others take less memory:
// AdamW with m and v in 8 bits, and AdaLomo, which keeps sums of v's rows and columns and updates within backward.
// (dev/cuda/optimizer.cu)

enum Optimizer { ADAMW, ADAMW8, ADALOMO };   // --optimizer

constexpr int ROUNDING_STREAMS = 64;   // streams of random numbers per step: one per tensor, with room for more tensors
constexpr int OPT_BLOCK = 256 * VEC;   // elements per block

// What AdamW needs of one parameter tensor, or with --zero 1 of this rank's share of it.
struct OptTensor {
    floatX* param;       // (n)
    Grad grad;           // (n)
    float *m, *v;        // (n)
    float* master;       // (n) or null
    size_t n, offset;    // multiples of VEC; offset: where the share begins in the tensor
    float decay;         // weight decay
    unsigned stream;     // of random numbers
};

// Squares of the gradients of one tensor: a sum per block. blockIdx.y is the share of a rank: blocks begin anew at each share, so that
// with and without --zero 1 they have the same elements. partial has one slot per block of any rank. The ranks add up their arrays,
// in which the slots of others are 0, so that then the norm is one sum in one order.
__global__ void square_sum_kernel(float* partial, Grad grad, size_t share) {
    __shared__ float shared[8];
    const size_t i = (size_t)blockIdx.x * OPT_BLOCK + threadIdx.x * VEC;   // in the share
    float sum = 0;
    if (i < share) {
        Floats g = grad_load_vec(grad, blockIdx.y * share + i);
        for (int k = 0; k < VEC; k++) sum += g[k] * g[k];
    }
    sum = block_sum_256(sum, shared);
    if (threadIdx.x == 0) partial[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// The last values of the loss and of the gradient norm. An outlier is many standard deviations above their mean. They are kept on
// the device, where the verdict is made, and in checkpoints.
constexpr int HISTORY = 128;
struct History {
    float value[2][HISTORY];   // [0] loss, [1] gradient norm
    int count;                 // values ever pushed
};
struct Verdict {
    float loss, grad_norm;     // mean over the step's tokens; before clipping
    float loss_z, grad_z;      // NaN until HISTORY steps have been seen
    float clip;                // AdamW multiplies gradients by this
    int skip;                  // 1: this step changes nothing
};
struct StepState {
    float loss_sum;            // over the step's micro-batches
    float square_sum;          // of all gradients
    Verdict verdict;
    History history;
};

__global__ void verdict_kernel(StepState* s, float loss_scale, float grad_clip, float skip_loss_z, float skip_grad_z) {
    Verdict v;
    v.loss = s->loss_sum * loss_scale;
    v.grad_norm = sqrtf(s->square_sum);
    bool finite = isfinite(v.loss) && isfinite(v.grad_norm);
    History& h = s->history;
    float z[2] = {NAN, NAN}, now[2] = {v.loss, v.grad_norm};
    if (h.count >= HISTORY) {
        for (int w = 0; w < 2; w++) {
            float mean = 0, var = 0;
            for (int i = 0; i < HISTORY; i++) mean += h.value[w][i];
            mean /= HISTORY;
            for (int i = 0; i < HISTORY; i++) var += (h.value[w][i] - mean) * (h.value[w][i] - mean);
            z[w] = var > 0 ? (now[w] - mean) / sqrtf(var / HISTORY) : 0.0f;
        }
    }
    if (finite) {   // one NaN would make every later mean NaN
        for (int w = 0; w < 2; w++) h.value[w][h.count % HISTORY] = now[w];
        h.count = h.count + 1 == 2 * HISTORY ? HISTORY : h.count + 1;   // only the remainder, and "full", matter
    }
    v.loss_z = z[0];
    v.grad_z = z[1];
    // A limit of 0 is no limit. A comparison with NaN is false, so an unknown z skips nothing.
    v.skip = !finite || (skip_loss_z > 0 && v.loss_z > skip_loss_z) || (skip_grad_z > 0 && v.grad_z > skip_grad_z);
    v.clip = grad_clip > 0 && v.grad_norm > grad_clip ? grad_clip / v.grad_norm : 1.0f;
    s->verdict = v;
}

// AdamW (Loshchilov and Hutter, arXiv 1711.05101). With a master copy the fp32 value is trained and the weight is the bf16 nearest
// to it; without one the weight itself is trained, and rounded stochastically.
struct AdamW {
    float lr, beta1, beta2, eps;
    float correction1, correction2;   // 1 - beta^t, t counting the updates that were made
    uint64_t seed, step;
};
__device__ inline void adamw(Floats& x, Floats& m, Floats& v, Floats grad, float clip, float decay, const AdamW& a) {
    for (int k = 0; k < VEC; k++) {
        grad[k] *= clip;
        m[k] = a.beta1 * m[k] + (1 - a.beta1) * grad[k];
        v[k] = a.beta2 * v[k] + (1 - a.beta2) * grad[k] * grad[k];
        x[k] -= a.lr * ((m[k] / a.correction1) / (sqrtf(v[k] / a.correction2) + a.eps) + decay * x[k]);
    }
}
// A weight's new value. `first`: the element of its tensor, in `stream` of random numbers.
__device__ inline void weight_store(floatX* param, float* master, const Floats& x, uint64_t seed, uint64_t stream, size_t first) {
    if (master != nullptr) {
        store(master, x);
        store(param, x);
    } else {
        Vec rounded;
        for (int k = 0; k < VEC; k++) rounded.x[k] = round_stochastic(x[k], (uint32_t)hash64(seed, stream, first + k));
        *reinterpret_cast<Vec*>(param) = rounded;
    }
}
__global__ void adamw_kernel(OptTensor tensor, const Verdict* verdict, AdamW a) {
    if (verdict->skip) return;
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= tensor.n) return;
    float* master = tensor.master != nullptr ? tensor.master + i : nullptr;
    Floats m = load(tensor.m + i), v = load(tensor.v + i), x = master ? load(master) : load(tensor.param + i);
    adamw(x, m, v, grad_load_vec(tensor.grad, i), verdict->clip, tensor.decay, a);
    store(tensor.m + i, m);
    store(tensor.v + i, v);
    weight_store(tensor.param + i, master, x, a.seed, a.step * ROUNDING_STREAMS + tensor.stream, tensor.offset + i);
}

// --optimizer adamw8: m and v in 8 bits (Dettmers et al., arXiv 2110.02861). 256 neighbouring elements share a scale, their largest |m|
// or v, and each keeps the index of the nearest of 256 values between -1 (v: 0) and 1, which are dense near 0 (dynamic_map): 2 + 8/256
// bytes an element for AdamW's 8. The step is AdamW's, on the values before they are rounded. Two things are not bitsandbytes': a v that
// is not 0 never becomes 0, because m divided by its root and eps would be a leap; and a negative m may, where theirs stays below.
// Blocks begin anew at each rank's share, as those of the squares do. Vectors are a thousandth of a model and keep 32 bits.
constexpr int Q8_BLOCK = 32 * VEC;   // a warp's elements
struct Moments8 {
    uint8_t *m, *v;                // (n)
    float *m_absmax, *v_absmax;    // of each block
    const float* maps;             // (2, 256): m's values, then v's
};
inline size_t q8_blocks(size_t n, size_t share) { return n / share * ceil_div(share, Q8_BLOCK); }
__device__ inline int nearest8(const float* map, float x) {   // of 256 ascending values
    int i = 0;
    for (int step = 128; step > 0; step /= 2)
        if (map[i + step] <= x) i += step;
    return i < 255 && map[i + 1] - x < x - map[i] ? i + 1 : i;
}
__device__ inline Floats unpack8(const uint8_t* codes, const float* map, float absmax) {
    const uint64_t bits = *(const uint64_t*)codes;
    Floats f;
    for (int k = 0; k < VEC; k++) f[k] = map[bits >> 8 * k & 255] * absmax;
    return f;
}
// tensor.m and tensor.v are not read. Blocks of threads as for square_sum_kernel.
__global__ void adamw8_kernel(OptTensor tensor, Moments8 q, const Verdict* verdict, AdamW a, size_t share) {
    __shared__ float maps[2][256];
    maps[0][threadIdx.x] = q.maps[threadIdx.x], maps[1][threadIdx.x] = q.maps[256 + threadIdx.x];
    __syncthreads();
    const size_t at = (size_t)blockIdx.x * OPT_BLOCK + threadIdx.x * VEC, i = blockIdx.y * share + at;   // in the share, in the tensor
    const size_t block = blockIdx.y * ((share + Q8_BLOCK - 1) / Q8_BLOCK) + at / Q8_BLOCK;
    if (verdict->skip || at / Q8_BLOCK * Q8_BLOCK >= share) return;   // whole warps
    float* master = tensor.master != nullptr ? tensor.master + i : nullptr;
    Floats m = {}, v = {}, x = {};
    if (at < share) {
        m = unpack8(q.m + i, maps[0], q.m_absmax[block]), v = unpack8(q.v + i, maps[1], q.v_absmax[block]);
        x = master ? load(master) : load(tensor.param + i);
        adamw(x, m, v, grad_load_vec(tensor.grad, i), verdict->clip, tensor.decay, a);
    }
    float most_m = 0, most_v = 0;
    for (int k = 0; k < VEC; k++) most_m = fmaxf(most_m, fabsf(m[k])), most_v = fmaxf(most_v, v[k]);
    most_m = warp_max(most_m), most_v = warp_max(most_v);
    if (at >= share) return;
    uint64_t codes_m = 0, codes_v = 0;
    for (int k = 0; k < VEC; k++) {
        const int code_v = nearest8(maps[1], most_v > 0 ? v[k] / most_v : 0.0f);
        codes_m |= (uint64_t)nearest8(maps[0], most_m > 0 ? m[k] / most_m : 0.0f) << 8 * k;
        codes_v |= (uint64_t)(code_v == 0 && v[k] > 0 ? 1 : code_v) << 8 * k;
    }
    *(uint64_t*)(q.m + i) = codes_m, *(uint64_t*)(q.v + i) = codes_v;
    if (threadIdx.x % 32 == 0) q.m_absmax[block] = most_m, q.v_absmax[block] = most_v;
    weight_store(tensor.param + i, master, x, a.seed, a.step * ROUNDING_STREAMS + tensor.stream, tensor.offset + i);
}

// --optimizer adalomo (Lv et al., arXiv 2310.10195; the constants are those of its authors' code). v of a matrix is kept as means over
// its rows and its columns, so the state is next to nothing:
//     r_i = b r_i + (1 - b) (mean over j of g_ij^2 + eps1)     c_j = b c_j + (1 - b) (mean over i of g_ij^2 + eps1)
//     u_ij = g_ij / sqrt(r_i c_j / mean(r))      x -= lr max(eps2, rms(x)) (u / max(1, rms(u)) + decay x)      b = 1 - t^-0.8
// A vector is a matrix of one row, whose c is v itself. There is no m, and nothing about a step is known but the matrix: so a matrix is
// updated as soon as it has its gradient (model_fused_update), and the gradients of one layer are all that there are at a time. A
// matrix whose gradient is not finite stays as it is.
constexpr float LOMO_EPS1 = 1e-30f, LOMO_EPS2 = 1e-3f;
struct AdaLomo {
    float lr, decay, beta2;
    uint64_t seed, step;
};
struct LomoMatrix {
    floatX* param;           // (rows, cols)
    Grad grad;               // (rows, cols), or of some rows at a time
    float *v_rows, *v_cols;  // (rows), (cols)
    float* master;           // (rows, cols) or null
    size_t rows, cols;       // cols: a multiple of VEC
    size_t offset;           // where the matrix begins in its tensor
    float decay;
    unsigned stream;         // of random numbers
};
struct LomoState {
    float mean_rows, rms_weight, rate, step;   // of r; of x; the rate for a matrix of that size; what u is multiplied by
    int skip;
};
// One matrix after the other has scratch for sums: over rows and over columns of g^2, then over rows of u^2; and over rows of x^2.
struct LomoScratch {
    LomoState* state;
    float *cols, *partial, *rows, *weights;   // (cols), (COLSUM_SLICES, cols), (rows), (rows)
    LomoScratch(float* p, size_t rows, size_t cols)
        : state((LomoState*)p), cols(p + 8), partial(p + 8 + cols), rows(partial + COLSUM_SLICES * cols), weights(this->rows + rows) {}
    static size_t floats(size_t rows, size_t cols) { return 8 + cols * (1 + COLSUM_SLICES) + 2 * rows; }
};
__device__ inline float lomo_row_factor(const LomoMatrix& m, const LomoState* s, size_t row) {
    return sqrtf(s->mean_rows) * rsqrtf(m.v_rows[row]);   // the quotient may be beyond fp32: a row without gradients has 1e-30
}
__device__ inline Floats lomo_update(const LomoMatrix& m, Floats g, float row_factor, size_t c) {   // u, from column c on
    Floats v = load(m.v_cols + c);
    for (int k = 0; k < VEC; k++) g[k] = g[k] * row_factor * rsqrtf(v[k]);
    return g;
}
// Sums over rows [first, first + count), whose gradient stands in m.grad. A warp owns a row.
template <bool UPDATE>   // of u^2; else of g^2 and x^2
__global__ void lomo_rows_kernel(LomoScratch s, LomoMatrix m, size_t first, size_t count) {
    const int lane = threadIdx.x % 32;
    const size_t i = (size_t)blockIdx.x * 8 + threadIdx.x / 32, row = first + i;
    if (i >= count || (UPDATE && s.state->skip)) return;
    const float factor = UPDATE ? lomo_row_factor(m, s.state, row) : 1;
    float sum = 0, weight = 0;
    for (size_t c = lane * VEC; c < m.cols; c += 32 * VEC) {
        Floats g = grad_load_vec(m.grad, i * m.cols + c);
        if constexpr (UPDATE) g = lomo_update(m, g, factor, c);
        for (int k = 0; k < VEC; k++) sum += g[k] * g[k];
        if constexpr (!UPDATE) {
            const size_t at = row * m.cols + c;
            const Floats x = m.master != nullptr ? load(m.master + at) : load(m.param + at);
            for (int k = 0; k < VEC; k++) weight += x[k] * x[k];
        }
    }
    sum = warp_sum(sum), weight = warp_sum(weight);
    if (lane > 0) return;
    s.rows[row] = sum;
    if constexpr (!UPDATE) s.weights[row] = weight;
}
__global__ void lomo_cols_kernel(float* partial, LomoMatrix m, int count) {   // sums of g^2, as colsum_kernel
    __shared__ float shared[8][32 * VEC];
    ColsumPlace at(count);
    Floats sum = {};
    for (int r = at.first + at.warp; at.c < (int)m.cols && r < at.end; r += 8) {
        const Floats g = grad_load_vec(m.grad, r * m.cols + at.c);
        for (int k = 0; k < VEC; k++) sum[k] += g[k] * g[k];
    }
    colsum_store(partial, sum, shared, at, (int)m.cols);
}
// r, c, and what follows from them for all of the matrix. square_sum: of all gradients of the step.
__global__ void lomo_factors_kernel(LomoScratch s, float* square_sum, LomoMatrix m, float beta2) {
    __shared__ float shared[3][8], square;
    float sum = 0, weight = 0, mean = 0;
    for (size_t r = threadIdx.x; r < m.rows; r += 256) sum += s.rows[r], weight += s.weights[r];
    sum = block_sum_256(sum, shared[0]), weight = block_sum_256(weight, shared[1]);
    if (threadIdx.x == 0) square = sum, *square_sum += sum, s.state->skip = !isfinite(sum);
    __syncthreads();
    if (!isfinite(square)) return;
    for (size_t r = threadIdx.x; r < m.rows; r += 256)
        mean += m.v_rows[r] = beta2 * m.v_rows[r] + (1 - beta2) * (s.rows[r] / m.cols + LOMO_EPS1);
    for (size_t c = threadIdx.x; c < m.cols; c += 256)
        m.v_cols[c] = beta2 * m.v_cols[c] + (1 - beta2) * (s.cols[c] / m.rows + LOMO_EPS1);
    mean = block_sum_256(mean, shared[2]);
    if (threadIdx.x == 0) s.state->mean_rows = mean / m.rows, s.state->rms_weight = sqrtf(weight / m.rows / m.cols);
}
__global__ void lomo_step_kernel(LomoScratch s, LomoMatrix m, float lr) {
    __shared__ float shared[8];
    float sum = 0;
    if (s.state->skip) return;
    for (size_t r = threadIdx.x; r < m.rows; r += 256) sum += s.rows[r];
    sum = block_sum_256(sum, shared);
    if (threadIdx.x > 0) return;
    s.state->rate = lr * fmaxf(LOMO_EPS2, s.state->rms_weight);
    s.state->step = s.state->rate / fmaxf(1.0f, sqrtf(sum / m.rows / m.cols));
    s.state->skip = !isfinite(sum);
}
__global__ void lomo_kernel(const LomoState* s, LomoMatrix m, AdaLomo a, size_t first, size_t count) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * VEC, at = first * m.cols + i;
    if (i >= count * m.cols || s->skip) return;
    float* master = m.master != nullptr ? m.master + at : nullptr;
    Floats x = master ? load(master) : load(m.param + at);
    const Floats u = lomo_update(m, grad_load_vec(m.grad, i), lomo_row_factor(m, s, at / m.cols), i % m.cols);
    for (int k = 0; k < VEC; k++) x[k] -= s->step * u[k] + s->rate * m.decay * x[k];
    weight_store(m.param + at, master, x, a.seed, a.step * ROUNDING_STREAMS + m.stream, m.offset + at);
}
// Where m.grad has no room for all rows, gradient(first, count) puts some of them there, at most `room`; null: all are there.
void adalomo(const LomoMatrix& m, const LomoScratch& s, float* square_sum, const AdaLomo& a, size_t room,
             const std::function<void(size_t first, size_t count)>& gradient, cudaStream_t stream) {
    check_vec("adalomo: cols", (int)m.cols);
    auto by_rows = [&](auto f) {
        for (size_t first = 0; first < m.rows; first += room) {
            const size_t count = std::min(room, m.rows - first);
            if (gradient) gradient(first, count);
            f(first, count);
            cudaCheck(cudaGetLastError());
        }
    };
    by_rows([&](size_t first, size_t count) {
        const int slices = colsum_slices((int)count);
        lomo_rows_kernel<false><<<ceil_div(count, 8), 256, 0, stream>>>(s, m, first, count);
        lomo_cols_kernel<<<dim3(ceil_div(m.cols, 32 * VEC), slices), 256, 0, stream>>>(s.partial, m, (int)count);
        colsum_finish({{{s.cols, F32}}}, 1, s.partial, slices, (int)m.cols, first > 0, stream);
    });
    lomo_factors_kernel<<<1, 256, 0, stream>>>(s, square_sum, m, a.beta2);
    by_rows([&](size_t first, size_t count) { lomo_rows_kernel<true><<<ceil_div(count, 8), 256, 0, stream>>>(s, m, first, count); });
    lomo_step_kernel<<<1, 256, 0, stream>>>(s, m, a.lr);
    by_rows([&](size_t first, size_t count) {
        lomo_kernel<<<ceil_div(count * m.cols, OPT_BLOCK), 256, 0, stream>>>(s.state, m, a, first, count);
    });
}

// A tensor that training starts from: normal random values (Box and Muller) for `drawn` elements, then a constant. `first`: the number
// of its first element, by which they are drawn.
__global__ void init_kernel(floatX* param, size_t n, size_t drawn, float std, float constant, uint64_t seed, int which, size_t first) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float u1 = hash_uniform(hash64(seed, 2 * which, first + i)), u2 = hash_uniform(hash64(seed, 2 * which + 1, first + i));
    param[i] = (floatX)(first + i < drawn ? std * sqrtf(-2.0f * logf(u1)) * cosf(6.2831853f * u2) : constant);
}

// ==== 6. many GPUs ===============================================================================================================
// One process per GPU, launched by mpirun; a process is a rank. Every rank holds the whole model and its own part of the batch.
// After backward the gradients are summed over the ranks. With --zero 1 (Rajbhandari et al., arXiv 1910.02054, stage 1) a rank
// receives the sum of its share alone, keeps AdamW's state for that share, and the updated shares are gathered into the weights of
// all. A program built without MULTI_GPU=1 is a world of one rank, and the functions below do nothing.

struct World {
    int rank = 0, size = 1, local_rank = 0;
    bool sharded = false;   // --zero 1
#ifdef MULTI_GPU
    ncclComm_t nccl = nullptr;
    MPI_Comm local = MPI_COMM_NULL;   // the ranks on this machine
#endif
} world;

// A tensor of n elements is divided among the ranks if that gives equal shares of whole vectors; else every rank updates all of it.
inline size_t world_share(size_t n) { return n % ((size_t)world.size * VEC) == 0 ? n / world.size : n; }
inline bool world_shards(size_t n) { return world.sharded && world_share(n) < n; }
inline size_t shard_size(size_t n) { return world_shards(n) ? world_share(n) : n; }
inline size_t shard_offset(size_t n) { return world_shards(n) ? world_share(n) * world.rank : 0; }

#ifdef MULTI_GPU
void nccl_check(ncclResult_t result, const char* file, int line) {
    if (result != ncclSuccess) fail("%s:%d: NCCL says \"%s\" (NCCL_DEBUG=INFO tells more)", file, line, ncclGetErrorString(result));
}
#define ncclCheck(call) nccl_check((call), __FILE__, __LINE__)
#else
#define ncclCheck(call) (void)0   // in a world of one nothing is asked of NCCL
#endif

void world_init(int* argc, char*** argv) {
#ifdef MULTI_GPU
    MPI_Init(argc, argv);
    atexit([] {   // --help and the like leave through exit(), but mpirun expects MPI_Finalize
        int done = 0;
        MPI_Finalized(&done);
        if (!done) MPI_Finalize();
    });
    MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world.size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world.rank, MPI_INFO_NULL, &world.local);
    MPI_Comm_rank(world.local, &world.local_rank);
    const std::string remedy = "MPI does not know of the others; start it with mpirun, or with the --mpi that srun --mpi=list shows";
#else
    const std::string remedy = std::string("this program was built for one; build with: make ") + program_name + " MULTI_GPU=1";
#endif
    // How many processes did a launcher start? In the shell of a SLURM job SLURM_NTASKS is set too: a step's tasks count.
    const struct { const char *variable, *launcher; int more; } launchers[] = {
        {"OMPI_COMM_WORLD_SIZE", "mpirun", 0}, {"MV2_COMM_WORLD_SIZE", "mpirun", 0}, {"PMI_SIZE", "mpirun", 0},
        {"SLURM_STEP_NUM_TASKS", "srun", 0},   {"PMI_RANK", "mpirun", 1},            {"PMIX_RANK", "mpirun", 1},
    };
    for (auto& l : launchers) {
        const char* value = getenv(l.variable);
        if (world.size == 1 && value != nullptr && atoi(value) + l.more > 1)
            fail("%s started several processes (%s=%s), and each would train alone: %s", l.launcher, l.variable, value, remedy.c_str());
    }
}
// Every process needs a GPU of its own. Which ones it sees, and under which numbers, is up to its launcher (under SLURM often one
// for each task, each of them number 0), so the processes of a machine compare bus addresses.
void world_check_device(int device) {
#ifdef MULTI_GPU
    int ranks;
    MPI_Comm_size(world.local, &ranks);
    char mine[32] = "";
    cudaCheck(cudaDeviceGetPCIBusId(mine, sizeof mine, device));
    std::vector<char> all(ranks * sizeof mine);
    MPI_Allgather(mine, sizeof mine, MPI_CHAR, all.data(), sizeof mine, MPI_CHAR, world.local);
    for (int r = 0; r < world.local_rank; r++)
        if (strcmp(&all[r * sizeof mine], mine) == 0)
            fail("processes %d and %d of the %d on this machine share the GPU at %s; expected a GPU for each: start fewer, or have "
                 "the launcher show each its own", r, world.local_rank, ranks, mine);
#endif
}
void world_connect() {   // after cudaSetDevice
#ifdef MULTI_GPU
    ncclUniqueId id;
    if (world.rank == 0) ncclCheck(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    ncclCheck(ncclCommInitRank(&world.nccl, world.size, id, world.rank));
#endif
}
void world_end() {
    if (world.size > 1) ncclCheck(ncclCommDestroy(world.nccl));
}
double world_reduce(double mine, bool least) {   // of numbers on the host: their sum, or the least
    double out = mine;
#ifdef MULTI_GPU
    MPI_Allreduce(&mine, &out, 1, MPI_DOUBLE, least ? MPI_MIN : MPI_SUM, MPI_COMM_WORLD);
#endif
    return out;
}
double world_sum(double mine) { return world_reduce(mine, false); }
double world_min(double mine) { return world_reduce(mine, true); }
void world_barrier() { world_sum(0); }
void world_sum_host(float* x, size_t n) {   // of arrays on the host, on rank 0
#ifdef MULTI_GPU
    MPI_Reduce(world.rank == 0 ? MPI_IN_PLACE : x, x, (int)n, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD);
#endif
}
void world_sum_floats(float* x, size_t n, cudaStream_t stream) {   // on the device, in place
    if (world.size > 1) ncclCheck(ncclAllReduce(x, x, n, ncclFloat, ncclSum, world.nccl, stream));
}
// Sums a gradient over the ranks, in place: all of it, or this rank's share alone.
void world_reduce_gradient(Grad grad, size_t n, cudaStream_t stream) {
    if (world.size == 1) return;
    if (world_shards(n))
        ncclCheck(ncclReduceScatter(grad.p, (grad + shard_offset(n)).p, shard_size(n), grad.type == F32 ? ncclFloat : ncclBfloat16,
                                    ncclSum, world.nccl, stream));
    else ncclCheck(ncclAllReduce(grad.p, grad.p, n, grad.type == F32 ? ncclFloat : ncclBfloat16, ncclSum, world.nccl, stream));
}
void world_gather_param(floatX* param, size_t n, cudaStream_t stream) {
    if (!world_shards(n)) return;
    ncclCheck(ncclAllGather(param + shard_offset(n), param, shard_size(n), kFP32 ? ncclFloat : ncclBfloat16, world.nccl, stream));
}
void world_group(bool begin) {   // NCCL runs what is asked for in between as one launch
    if (world.size > 1) ncclCheck(begin ? ncclGroupStart() : ncclGroupEnd());
}
bool world_any(bool mine) { return world_min(mine ? -1 : 0) < 0; }   // did it happen on any rank? (Ctrl-C, an error)

// ==== 7. the model ===============================================================================================================
// ---- the tensor table
// Every tensor on the device is a row of one table. The ledger prints the table, --estimate adds it up, and allocation walks
// through it, so what is announced and what is taken cannot differ.

enum Kind { PARAM, GRAD, OPTIMIZER, SAVED, SCRATCH, WORKSPACE };
enum Scope { LAYER, MODEL, HOST };   // HOST: pinned memory of the host, beside the device's
const char* KIND_NAME[] = {"param", "grad", "optimizer", "saved", "scratch", "workspace"};
const char* SCOPE_NAME[] = {"layer", "model", "host"};

struct Row {
    std::string name;
    DType dtype;
    std::vector<size_t> shape;   // a row of scope LAYER counts all layers: L stands first
    Kind kind;
    Scope scope;
    void* where;                 // the address of the pointer to set
    const char* shrink;          // the option that makes it smaller
    std::string alias_of;        // the row whose storage this one reuses at another time; it then costs nothing
    size_t elements() const { return std::accumulate(shape.begin(), shape.end(), (size_t)1, std::multiplies<size_t>()); }
    size_t bytes() const { return alias_of.empty() ? elements() * dtype_size(dtype) : 0; }
    void* get() const {   // by memcpy: the pointer may be to any type
        void* p;
        memcpy(&p, where, sizeof p);
        return p;
    }
    void set(void* p) const { memcpy(where, &p, sizeof p); }
    std::string shape_text(const char* separator) const {
        std::string s;
        for (size_t i = 0; i < shape.size(); i++) s += (i ? separator : "") + std::to_string(shape[i]);
        return s;
    }
};
using Table = std::vector<Row>;

size_t table_bytes(const Table& table, bool host = false) {   // of the device, or of the host
    size_t sum = 0;
    for (const Row& r : table) sum += (r.scope == HOST) == host ? r.bytes() : 0;
    return sum;
}

// What cudaMalloc was asked for, and cudaMallocHost: now, and at most.
size_t device_bytes = 0, device_peak = 0, host_bytes = 0, host_peak = 0;

// What pinned tensors of a rank may take: its share of the memory that the machine, or the container, has, less an eighth for all else.
size_t host_room() {
    size_t room = (size_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE), limit;
    for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
        if (FILE* f = fopen(path, "re")) {
            if (fscanf(f, "%zu", &limit) == 1) room = std::min(room, limit);   // or it says "max"
            fclose(f);
        }
    int ranks = 1;
#ifdef MULTI_GPU
    MPI_Comm_size(world.local, &ranks);
#endif
    return room / 8 * 7 / ranks;
}
void table_allocate(Table& table) {
    if (table_bytes(table, true) > host_room())   // to ask for it could end other programs, or this one without a word
        fail("out of memory: the plan pins %.1f MiB of the host's memory, which has %.1f MiB for it; smaller by --offload 0, "
             "--embedding-on device, --batch or --seq-len", table_bytes(table, true) / 1048576.0, host_room() / 1048576.0);
    for (Row& r : table) {
        if (!r.alias_of.empty()) continue;
        void* memory = nullptr;
        const bool host = r.scope == HOST;
        cudaError_t error = host ? cudaMallocHost(&memory, r.bytes()) : cudaMalloc(&memory, r.bytes());
        r.set(memory);
        if (host && error != cudaSuccess)
            fail("out of memory at %s: the host cannot give %.1f MiB of pinned memory; smaller by %s", r.name.c_str(),
                 r.bytes() / 1048576.0, r.shrink);
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();   // it would come up again at the next launch
            Table largest;   // the host's rows would not help
            std::copy_if(table.begin(), table.end(), std::back_inserter(largest), [](const Row& a) { return a.scope != HOST; });
            std::sort(largest.begin(), largest.end(), [](const Row& a, const Row& b) { return a.bytes() > b.bytes(); });
            std::string text;
            for (const Row& big : {largest[0], largest[1], largest[2]}) {
                char line[256];
                snprintf(line, sizeof line, "\n    %-12s %10.1f MiB   %s", big.name.c_str(), big.bytes() / 1048576.0, big.shrink);
                text += line;
            }
            size_t free_bytes = 0, total = 0;
            cudaMemGetInfo(&free_bytes, &total);
            fail("out of memory at %s (%.1f MiB): the plan takes %.1f MiB, the device has room for %.1f MiB (%.1f MiB in all).\n"
                "  The three largest tensors, and what makes each smaller:%s\n"
                "  --estimate prints the whole plan without a GPU; --batch auto takes the largest batch that fits; --fit says what else does:\n"
                "  full training by other optimizers, LoRA, QLoRA, how much is computed again or waits on the host.",
                r.name.c_str(), r.bytes() / 1048576.0, table_bytes(table) / 1048576.0, (device_bytes + free_bytes) / 1048576.0,
                total / 1048576.0, text.c_str());
        }
        cudaCheck(error);
        (host ? host_bytes : device_bytes) += r.bytes();
        device_peak = std::max(device_peak, device_bytes), host_peak = std::max(host_peak, host_bytes);
    }
    for (Row& r : table) {
        if (r.alias_of.empty()) continue;
        for (const Row& other : table)
            if (other.name == r.alias_of) r.set(other.get());
    }
}
void table_free(Table& table) {
    for (Row& r : table) {
        if (r.alias_of.empty()) {
            cudaCheck(r.scope == HOST ? cudaFreeHost(r.get()) : cudaFree(r.get()));
            (r.scope == HOST ? host_bytes : device_bytes) -= r.bytes();
        }
        r.set(nullptr);
    }
    table.clear();
}

// What one layer keeps for its backward, in units of B*T*C elements: the number by which memory modes are compared. Statistics
// are what a norm or attention keeps of a row: a few floats.
double table_units(const Table& table, size_t layers, size_t BTC, bool statistics) {
    auto is_statistic = [](const std::string& name) {
        return name == "lse" || name.find("_mean") != std::string::npos || name.find("_rstd") != std::string::npos;
    };
    size_t bytes = 0;
    for (const Row& r : table)
        if (r.kind == SAVED && r.scope == LAYER && (statistics || !is_statistic(r.name))) bytes += r.bytes();
    return (double)bytes / (layers * BTC * sizeof(floatX));
}

// The ledger. Short: without the rows of parameters, gradients and optimizer state, five for each parameter tensor.
void table_print(const Table& table, size_t layers, size_t BTC, const char* mode, bool full) {
    printf("%-14s %-6s %-22s %12s  %s\n", "tensor", "type", "shape", "MiB", "kind, scope");
    for (const Row& r : table) {
        if (!full && r.kind <= OPTIMIZER) continue;
        std::string note = r.alias_of.empty() ? "" : ", in " + r.alias_of;
        printf("%-14s %-6s %-22s %12.2f  %s, %s%s\n", r.name.c_str(), dtype_name(r.dtype), r.shape_text(" x ").c_str(),
               r.bytes() / 1048576.0, KIND_NAME[r.kind], SCOPE_NAME[r.scope], note.c_str());
    }
    for (int k = PARAM; k <= WORKSPACE; k++) {
        size_t bytes = 0;
        for (const Row& r : table)
            if (r.kind == k && r.scope != HOST) bytes += r.bytes();
        if (bytes) printf("%-44s %12.2f\n", KIND_NAME[k], bytes / 1048576.0);
    }
    printf("%-44s %12.2f\n", "total", table_bytes(table) / 1048576.0);
    if (const size_t host = table_bytes(table, true)) printf("%-44s %12.2f\n", "pinned memory of the host", host / 1048576.0);
    double units = table_units(table, layers, BTC, true);
    if (units > 0)
        printf("kept for backward per layer: %.2f units of B*T*C %s elements, %.2f without statistics (%s)\n", units, dtype_name(FLOATX),
               table_units(table, layers, BTC, false), mode);
}

void table_print_json(const Table& table, double again) {
    printf("{\"total_bytes\": %zu, \"host_bytes\": %zu, \"recompute_share\": %.6f, \"rows\": [", table_bytes(table),
           table_bytes(table, true), again);
    // The batch's tokens are the host's in every run; they are a row where there are others, so that elsewhere the rows' sum is the total.
    const bool host = std::count_if(table.begin(), table.end(), [](const Row& r) { return r.scope == HOST; }) > 1;
    for (size_t i = 0; i < table.size(); i++) {
        const Row& r = table[i];
        if (r.scope == HOST && !host) continue;
        printf("%s\n  {\"name\": \"%s\", \"dtype\": \"%s\", \"shape\": [%s], \"bytes\": %zu, \"kind\": \"%s\", \"scope\": \"%s\"",
               i ? "," : "", r.name.c_str(), dtype_name(r.dtype), r.shape_text(", ").c_str(), r.bytes(), KIND_NAME[r.kind],
               SCOPE_NAME[r.scope]);
        if (!r.alias_of.empty()) printf(", \"alias_of\": \"%s\"", r.alias_of.c_str());
        printf("}");
    }
    printf("\n]}\n");
}

// ---- parameters, by a table: param_shape
// The initial values of a tensor. The projections that add to the residual stream start smaller by sqrt(2L), because 2L of them add up.
enum Init { ZEROS, ONES, NORMAL, NORMAL_RESIDUAL };
struct ParamShape {
    const char* name;
    bool in_layer;       // each layer has one
    size_t rows, cols;   // (out, in) of a weight; cols 0: a vector
    Init init;
    bool decay;          // weight decay pulls at it
    size_t layers;       // L, or 1 for the tensors outside the blocks
    size_t per_layer() const { return rows * (cols ? cols : 1); }
    size_t elements() const { return layers * per_layer(); }
};
// What adapters can be put on, by the name that --lora-targets has for it and by PEFT's: rows [first, first + rows) of a weight. `part`:
// Hugging Face has no matrix for it, but one of which it is a part.
struct LoraTarget {
    const char *name, *peft;
    int weight;
    size_t first, rows;
    bool part = false;
};
struct Lora {
    int rank, targets;   // in memory: the largest rank as a multiple of 8, or 0; bit i: lora_targets()[i]
    int quantized;       // the directory's weights are in NF4: 1; 2 with double quantization
};
// ==== end twin
// ---- configuration and parameters
struct Config {   // int and float alone, so that two can be compared byte by byte
    int maxT;        // positions that it was made for
    int V;           // vocabulary
    int Vp;          // padded to a multiple of 128, so that every matmul on it is aligned
    int L;           // layers
    int NH;          // heads of queries
    int NKV;         // heads of keys, and of values: each serves NH / NKV heads of queries
    int C;           // channels
    int head_size;   // channels of a head, which need not be C / NH
    int F;           // channels between the matmuls of the MLP
    float eps;       // of the norms
    Rope rope;
    int tied;        // 1: the head's weight is the embedding
    int qkv_bias;    // 1: Qwen2
    int qk_norm;     // 1: Qwen3
    int window;      // keys that a query sees, at most; 0: all
    Lora lora;       // adapters on it
    int HS() const { return head_size; }
    int ATT() const { return NH * head_size; }                 // channels of attention's output
    int QKV() const { return (NH + 2 * NKV) * head_size; }     // channels of q, k and v together
    int FF() const { return F; }
};

// The parameter tensors. Those that a model does without have no elements. The last ones are adapters', two for each of LINEAR.
enum Param { WTE, LN1W, QKVW, QKVB, QNORMW, KNORMW, ATTPROJW, LN2W, GATEUPW, DOWNW, LNFW, HEADW, LORA_A, LORA_B = LORA_A + 4,
             NUM_PARAMS = LORA_B + 4 };
constexpr int LINEAR[4] = {QKVW, ATTPROJW, GATEUPW, DOWNW};   // the weights of a block, in the order of forward
inline int head_param(const Config& c) { return c.tied ? WTE : HEADW; }
inline int bias_of(const Config& c, int weight) { return weight == QKVW && c.qkv_bias ? QKVB : -1; }
inline int beta_of(int) { return -1; }
constexpr int FOLDED[2][2] = {{LN1W, QKVW}, {LN2W, GATEUPW}};   // MS_NORM: a norm's gamma, and the weight that it is folded into

ParamShape base_shape(const Config& c, int p) {
    const size_t C = c.C, Vp = c.Vp, QKV = c.QKV(), ATT = c.ATT(), HS = c.HS(), F = c.F;
    ParamShape shapes[LORA_A] = {
        {"wte",      false, Vp,                    C,   NORMAL,          true},
        {"ln1w",     true,  C,                     0,   ONES,            false},
        {"qkvw",     true,  QKV,                   C,   NORMAL,          true},    // rows of q, then of k, then of v
        {"qkvb",     true,  c.qkv_bias ? QKV : 0,  0,   ZEROS,           false},
        {"qnormw",   true,  c.qk_norm ? HS : 0,    0,   ONES,            false},
        {"knormw",   true,  c.qk_norm ? HS : 0,    0,   ONES,            false},
        {"attprojw", true,  C,                     ATT, NORMAL_RESIDUAL, true},
        {"ln2w",     true,  C,                     0,   ONES,            false},
        {"gateupw",  true,  2 * F,                 C,   NORMAL,          true},    // rows of gate, then of up
        {"downw",    true,  C,                     F,   NORMAL_RESIDUAL, true},
        {"lnfw",     false, C,                     0,   ONES,            false},
        {"headw",    false, c.tied ? 0 : Vp,       C,   NORMAL,          true},
    };
    shapes[p].layers = shapes[p].in_layer ? c.L : 1;
    return shapes[p];
}
const char* LORA_NAMES[8] = {"qkvw_A", "attprojw_A", "gateupw_A", "downw_A", "qkvw_B", "attprojw_B", "gateupw_B", "downw_B"};
std::vector<LoraTarget> lora_targets(const Config& c) {
    const size_t C = c.C, F = c.F, q = c.ATT(), kv = c.NKV * c.HS();
    return {{"q", "q_proj", QKVW, 0, q}, {"k", "k_proj", QKVW, q, kv}, {"v", "v_proj", QKVW, q + kv, kv}, {"o", "o_proj", ATTPROJW, 0, C},
            {"gate", "gate_proj", GATEUPW, 0, F}, {"up", "up_proj", GATEUPW, F, F}, {"down", "down_proj", DOWNW, 0, C}};
}
// ==== twin: plan
// An adapter's A of all targets of one weight lie below one another, as their B do. A rank that is no multiple of 8, or that is smaller
// than the largest, is padded by zeros in both: their gradients are 0 too, so they stay.
ParamShape param_shape(const Config& c, int p) {
    if (p < LORA_A) return base_shape(c, p);
    const ParamShape w = base_shape(c, LINEAR[(p - LORA_A) % 4]);
    ParamShape s = {LORA_NAMES[p - LORA_A], true, 0, p < LORA_B ? w.cols : c.lora.rank, ZEROS, true, w.layers};
    const std::vector<LoraTarget> targets = lora_targets(c);
    for (size_t i = 0; i < targets.size(); i++)
        if ((c.lora.targets >> i & 1) && targets[i].weight == LINEAR[(p - LORA_A) % 4])
            s.rows += p < LORA_B ? c.lora.rank : targets[i].rows;
    return s;
}
inline int linear_index(int p) { return (int)(std::find(LINEAR, LINEAR + 4, p) - LINEAR); }   // 4: it is none
size_t param_count(const Config& c) {   // without adapters
    size_t n = 0;
    for (int p = 0; p < LORA_A; p++) n += param_shape(c, p).elements();
    return n;
}
constexpr float USUAL_EPS = 1e-5f;
inline int padded(int V) { return ceil_div(V, 128) * 128; }

// How a run uses memory.
struct Plan {
    int B, T;             // one micro-batch on one GPU
    int micro_batches;    // whose gradients are summed into one step
    bool training;        // false: one layer's activations serve all layers, and there are no gradients
    int recompute;        // 0: keep all; 1: compute GELU again in backward; 2: norms as well; 3: the matmul before it; 4: the block
    bool master;          // fp32 copies of bf16 weights
    int chunk_rows;       // rows of logits that exist at a time; 0: all
    int rows;             // of B*T that a block works on at a time; 0: all
    Optimizer optimizer;
    size_t workspace;     // bytes for cuBLASLt; 0: what this model can use
    unsigned frozen;      // bit p: parameter p is not trained, and has neither gradient nor optimizer state
    bool nf4, nested;     // the weights of the blocks are in 4 bits; their absmax in 8
    bool host_wte;        // the embedding is on the host: a batch's rows of it come to the device
    bool offload;         // the stream before each block waits on the host for its backward
    float dropout;        // of adapters' inputs
    bool marks;           // the data say where documents begin, and which tokens have no loss
    bool trains(int p) const { return training && !(frozen >> p & 1); }
    bool fuses() const { return optimizer == ADALOMO; }   // the update into backward
    bool quantizes(int p) const { return nf4 && linear_index(p) < 4; }
};
// Rows of a chunk of logits: a multiple of 256 (whole tiles of a matmul) where that gives the same number of chunks.
inline int loss_chunk_rows(size_t rows, size_t chunks) {
    size_t each = ceil_div(rows, chunks), whole = (each + 255) / 256 * 256;
    return (int)std::min(rows, ceil_div(rows, whole) == ceil_div(rows, each) ? whole : each);
}
// --loss-chunks auto: the fewest chunks of at most so many bytes (but 256 rows at least). 1 GiB keeps every multiprocessor of a
// large GPU busy with one chunk (9472 rows at V 50257 in bf16); 256 MiB is for devices on which that does not fit, and --row-chunks auto.
constexpr size_t CHUNK_BYTES = (size_t)1 << 30, SMALL_CHUNK_BYTES = (size_t)256 << 20;
inline int loss_auto_rows(size_t rows, size_t columns, size_t bytes) {
    size_t most = std::max<size_t>(256, bytes / (columns * sizeof(floatX)) / 256 * 256);
    return loss_chunk_rows(rows, ceil_div(rows, most));
}
inline size_t plan_chunk_rows(const Plan& p) {
    return std::min((size_t)p.B * p.T, p.chunk_rows ? (size_t)p.chunk_rows : SIZE_MAX);
}
inline bool in_chunks(const Plan& p) { return p.rows > 0 && (size_t)p.rows < (size_t)p.B * p.T; }
// The shape of a buffer that holds rows of a chunk
std::vector<size_t> chunk_shape(const Plan& p, size_t columns) {
    return in_chunks(p) ? std::vector<size_t>{(size_t)p.rows, columns} : std::vector<size_t>{(size_t)p.B, (size_t)p.T, columns};
}

// ==== end twin
// What --recompute recomputes: h always, and with MS-RMSNorm no norm, because z is kept; gate and up; the block from its input.
inline bool recomputes_act(const Plan& p) { return p.recompute >= 1; }
inline bool recomputes_norm(const Plan& p) { return p.recompute >= (kMsNorm ? 4 : 2); }
inline bool recomputes_fc(const Plan& p) { return p.recompute >= 3; }
inline bool recomputes_block(const Plan& p) { return p.recompute >= 4; }
// Whether backward has a weight's input in any case: it is kept for another purpose, or computed again.
bool has_input(const Plan& p, int weight) {
    return weight == ATTPROJW || (weight == DOWNW ? recomputes_act(p) : kMsNorm || recomputes_norm(p)) ||
           (weight == GATEUPW && recomputes_fc(p));
}

// What forward keeps for backward, as in the figure at the top: in Model the tensors of all layers, from model_layer those of one.
struct LayerTensors {
    floatX* resid;         // (B, T, C)         the stream before the block: not a tensor of its own
    floatX* ln1;           // (B, T, C)         MS_NORM: z; -r 2: scratch_ln, for all layers
    float* ln1_rstd;       // (B, T)
    floatX* qkv;           // (B, T, QKV)       q and k turned; with norms of q and k as the matmul made it
    floatX* atty;          // (B, T, NH*HS)
    float* lse;            // (B, NH, T)        attention's log of the sum of exp(score), of each query
    floatX* resid_mid;     // (B, T, C)         MS_NORM: resid_in, for all layers
    floatX* ln2;           // (B, T, C)         as ln1
    float* ln2_rstd;       // (B, T)
    floatX* gateup;        // (B, T, 2F)        gate and up; APPROX_ACT: silu(gate) and up. Backward puts their gradients there
    uint8_t* gate_codes;   // (B, T, F)         APPROX_ACT: codes of gate
    floatX* h;             // (B, T, F)         -r 1, 2: scratch_f, for all layers
    floatX* resid_out;     // (B, T, C)         MS_NORM: resid_in, for all layers
};
// What all blocks share.
struct BlockBuffers {
    floatX* resid_in;      // (B, T, C)         the residual stream before the first block; MS_NORM: one running stream, for all blocks
    float* lnf_rstd;       // (B, T)
    floatX* scratch_c;     // (B, T, C or NH*HS)  a matmul's output before it is added to the stream; gradients of that shape
    floatX* lnf;           // (B, T, C)         in scratch_c: the final norm's output, then, chunk by chunk, its gradient
    floatX* scratch_f;     // (B, T, F or QKV)  h where it is not kept; gradients of h and qkv
    floatX* scratch_qkv;   // (B, T, QKV)       with norms of q and k: what attention reads
    floatX* scratch_ln;    // (B, T, C)         -r 2: a norm's output
    floatX* scratch_gateup;    // (B, T, 2F)    -r 3: gate and up, and their codes
    uint8_t* scratch_codes;    // (B, T, F)
    floatX* scratch_mid;   // (B, T, C)         -r 4: the stream after attention
    floatX* scratch_dkv;   // (B, T, 2 NKV*HS)  in chunks: gradients of k and v, while other blocks of threads read k and v
    float2* angles;        // (T, HS/2)         RoPE's cosines and sines
};
// ==== twin: model
struct LoraModule {
    int rank;      // 0: this layer has none on this target
    float scale;   // alpha / rank, or as its file says
};
struct Quantized {         // of all layers, one after the other, and in each the matrices that Hugging Face has
    uint8_t* codes;
    void* absmax;          // float, or with double quantization bytes
    float* nested;
};
// Null pointers: what the run does not need.
struct Model : BlockBuffers {
    Config config;
    Plan plan;
    Table table;
    // parameters, and what training keeps for each
    floatX* param[NUM_PARAMS];
    Grad grad[NUM_PARAMS];
    float* layer_sum[NUM_PARAMS];   // in chunks, of a matrix (rows, cols): see sums_layer
    void *m[NUM_PARAMS], *v[NUM_PARAMS];   // (shard_size) each, fp32; adamw8: bytes of matrices. adalomo: no m, v of rows
    float *m_absmax[NUM_PARAMS], *v_absmax[NUM_PARAMS], *v_cols[NUM_PARAMS], *master[NUM_PARAMS];   // adamw8; adalomo; (shard_size)
    float* q8_maps;            // adamw8: (2, 256)
    LayerTensors kept;         // with L in front of the shapes
    floatX *fold_w, *fold_b;   // of the largest shape: a weight and a bias with their norm's gamma and beta folded in; NF4: a weight
    // adapters: the rank and the scale of each target in each layer; where backward can stop; x A^T and its gradient (B, T, rank of all
    // targets of a weight); with MS_NORM A with gamma, and A beta, folded in, dt^T z, and the column sums of dt; x after dropout
    std::vector<LoraModule> lora;
    int lowest;                // LINEAR[lowest % 4] of layer lowest / 4 has the lowest parameters that are trained; -1: all below too
    floatX* kept_t[4];         // (L, B, T, ranks) of LINEAR: see keeps_t
    floatX *lora_t, *lora_dt, *lora_fold, *lora_fold_b, *dropped;
    float *lora_G, *lora_dt_sum;
    uint64_t micro_batch;      // of the run, for dropout; 0: none, this is no training
    Quantized quantized[4];    // NF4: LINEAR's weights
    float* nf4_tables;
    // On the host. With Plan::host_wte the embedding (Vp, C), the rows of it that a micro-batch names, twice (B, T, C), and when they
    // are on the device; which of the two comes next. Tokens as token_ints has them, of a step's micro-batches and of the next step's.
    floatX *host_wte, *wte_rows;
    cudaEvent_t wte_copied[2];
    int wte_turn;
    int* host_tokens;
    // --offload: the stream before each block but the last (L - 1, B, T, C), and where it is on the device: block l reads
    // stream_at[l % 2] and writes the other; the stream of copies; when what comes is there, and when a copy of each buffer is done.
    floatX *host_stream, *stream_at[2];
    cudaStream_t copies;
    cudaEvent_t stream_ready, stream_copied[2];
    floatX* dresid;     // (B, T, C)      gradient of the residual stream
    float* delta;       // (B, NH, T)     attention's backward
    floatX* logits;     // (chunk, Vp)    of one chunk of rows; then their gradient
    float* losses;      // (B, T)
    float *colsum, *squares;   // partial sums: of bias and norm gradients, of squared gradients (adalomo: LomoScratch)
    int* tokens;        // inputs, targets, and the inputs sorted: see tokens_sort
    StepState* state;   // loss, norm, verdict
    void* workspace;    // cuBLASLt's
    cudaStream_t stream;
    uint64_t seed;
    int updates;        // AdamW steps taken; skipped ones do not count
    bool weights_in_state;   // of a checkpoint, whose model is written in a type that does not hold all their bits
};
// Of layer l. p -1: of a parameter that this model does without.
const floatX* model_param(const Model& model, int p, int l) {
    return p < 0 || model.param[p] == nullptr ? nullptr : model.param[p] + l * param_shape(model.config, p).per_layer();
}
// With an update that is fused into backward, all layers share the gradients of matrices. Those of vectors, which are small, stand for
// each: where biases belong to the gradient of the stream, the layer above makes them.
bool shares_grad(const Plan& plan, const ParamShape& s) { return plan.fuses() && s.in_layer && s.cols > 0; }
// In chunks of rows the gradient of a matrix is a sum over them in fp32, for one layer at a time; layer_end rounds it to its place.
// (A vector's gradient, one that all layers share, and a sum over micro-batches is fp32 in any case.)
bool sums_layer(const Model& model, int p) {
    const ParamShape s = param_shape(model.config, p);
    return in_chunks(model.plan) && !kFP32 && model.plan.micro_batches == 1 && s.in_layer && s.cols > 0 && !model.plan.fuses();
}
Grad model_grad(const Model& model, int p, int l) {
    if (p < 0) return {};
    if (model.layer_sum[p] != nullptr) return {model.layer_sum[p], F32};
    const ParamShape s = param_shape(model.config, p);
    return model.grad[p] + (shares_grad(model.plan, s) ? 0 : l * s.per_layer());
}
std::vector<int> model_trained(const Model& model) {   // the parameters that are
    std::vector<int> trained;
    for (int p = 0; p < NUM_PARAMS; p++)
        if (model.plan.trains(p) && param_shape(model.config, p).elements() > 0) trained.push_back(p);
    return trained;
}
bool has_adapter(const Config& c, int weight) { return param_shape(c, LORA_A + linear_index(weight)).rows > 0; }
// Whether forward keeps t = x A^T for backward: where A is frozen, so that x itself is not needed, and x would take more.
bool keeps_t(const Model& model, int weight) {
    const Plan& plan = model.plan;
    return plan.training && has_adapter(model.config, weight) && !plan.trains(LORA_A + linear_index(weight)) && !has_input(plan, weight);
}
// Whether backward wants the input of a weight's matmul: for the gradient of the weight or of its adapter's A, or to make t again.
bool needs_input(const Model& model, int weight) {
    return model.plan.trains(weight) || (has_adapter(model.config, weight) && !keeps_t(model, weight));
}
// Where backward can stop (Model::lowest).
int model_lowest(const Model& model) {
    const std::vector<LoraTarget> targets = lora_targets(model.config);
    for (int p = 0; p < LORA_A; p++)
        if (model.plan.trains(p)) return -1;
    int lowest = INT_MAX;
    for (size_t i = 0; i < model.lora.size(); i++)
        if (model.lora[i].rank > 0)
            lowest = std::min(lowest, (int)(i / targets.size()) * 4 + linear_index(targets[i % targets.size()].weight));
    return lowest;
}

// inputs (BT), targets (BT; -1: no loss), positions (BT), bucket_token (cap), bucket_start (cap + 1): see tokens_sort; of data with marks
// documents (BT): where in its row each token's document begins
inline size_t token_cap(size_t BT, int V) { return std::min(BT, (size_t)V); }
inline size_t documents_at(size_t BT, int V) { return 3 * BT + 2 * token_cap(BT, V) + 1; }
inline size_t token_ints(size_t BT, int V, bool marks) { return documents_at(BT, V) + (marks ? BT : 0); }
// Null: the data have no marks, and every row is one document.
const int* model_documents(const Model& model, int BT) {
    return model.plan.marks ? model.tokens + documents_at(BT, model.config.V) : nullptr;
}

inline size_t opt_blocks(size_t n) { return n / world_share(n) * ceil_div(world_share(n), OPT_BLOCK); }   // of all ranks
// The matrices of a tensor, in one layer, as Hugging Face has them; a vector is a matrix of one row. first: element.
struct Span { size_t first, rows, cols; };
std::vector<Span> param_spans(const Config& c, int p);   // section 8
struct SpanSums { size_t rows = 0, cols = 0, most_rows = 0, most_cols = 0; };
SpanSums span_sums(const Config& c, int p) {
    SpanSums n;
    for (const Span& s : param_spans(c, p)) {
        n.rows += s.rows, n.cols += s.cols;
        n.most_rows = std::max(n.most_rows, s.rows), n.most_cols = std::max(n.most_cols, s.cols);
    }
    return n;
}
LomoScratch model_lomo_scratch(const Model& model, size_t* floats = nullptr) {   // floats: how many it has
    size_t rows = 0, cols = 0;
    for (int p : model_trained(model)) {
        const SpanSums n = span_sums(model.config, p);
        rows = std::max(rows, n.most_rows), cols = std::max(cols, n.most_cols);
    }
    if (floats) *floats = LomoScratch::floats(rows, cols);
    return {model.squares, rows, cols};
}
size_t model_opt_blocks(const Model& model) {
    size_t blocks = 0;
    if (model.plan.fuses()) {
        model_lomo_scratch(model, &blocks);
        return blocks;
    }
    for (int p : model_trained(model)) blocks += opt_blocks(param_shape(model.config, p).elements());
    return blocks;
}
struct Nf4Sizes { size_t blocks, nested; };   // of a layer's matrices
Nf4Sizes nf4_sizes(const Config& c, int p) {
    Nf4Sizes n = {};
    for (const LoraTarget& t : lora_targets(c))
        if (t.weight == p && !t.part)
            n.blocks += nf4_blocks(t.rows * param_shape(c, p).cols), n.nested += nf4_nested(t.rows * param_shape(c, p).cols);
    return n;
}
const char *SMALLER = "a smaller model (-e)", *CHUNKS = "--row-chunks",
           *BATCH = "--batch (halving it halves this; --total-batch keeps the step's size), or a shorter --seq-len";
template <class X>
void table_add(Table& table, const std::string& name, X** where, DType dtype, std::vector<size_t> shape, Kind kind, Scope scope,
               const char* shrink, const char* alias_of = "") {
    table.push_back({name, dtype, std::move(shape), kind, scope, where, shrink, alias_of});
}
// An embedding that is not the head as well has few rows with a gradient. With a fused update it is made of some rows at a time.
bool embedding_in_parts(const Model& model, int p) { return model.plan.fuses() && p == WTE && head_param(model.config) != WTE; }
// Parameters, and what training keeps for each.
void table_add_params(Table& table, Model& model) {
    const Config& c = model.config;
    const Plan& plan = model.plan;
    auto add = [&](const char* prefix, int p, auto** where, DType dtype, bool sharded, Kind kind, const char* shrink) {
        const ParamShape s = param_shape(c, p);
        const Scope scope = s.in_layer ? LAYER : MODEL;
        std::vector<size_t> shape;
        if (sharded && world_shards(s.elements())) {
            shape = {shard_size(s.elements())};
        } else {
            if (scope == LAYER) shape.push_back(s.layers);
            shape.push_back(s.rows);
            if (s.cols) shape.push_back(s.cols);
        }
        table_add(table, std::string(prefix) + s.name, where, dtype, shape, kind, scope, shrink);
    };
    for (int p = 0; p < NUM_PARAMS; p++) {
        const ParamShape s = param_shape(c, p);
        if (s.elements() == 0 || (p == WTE && plan.host_wte)) continue;
        if (!plan.quantizes(p)) {
            const char* frozen = linear_index(p) < 4 ? "--base nf4" : p == WTE && head_param(c) != WTE ? "--embedding-on host" : SMALLER;
            add("", p, &model.param[p], FLOATX, false, PARAM, p >= LORA_A ? "--lora" : plan.trains(p) ? SMALLER : frozen);
            continue;
        }
        Quantized& q = model.quantized[linear_index(p)];
        const Nf4Sizes n = nf4_sizes(c, p);
        table_add(table, s.name, &q.codes, BYTE, {s.layers, s.rows, s.cols / 2}, PARAM, LAYER, SMALLER);
        table_add(table, std::string(s.name) + "_absmax", &q.absmax, plan.nested ? BYTE : F32, {s.layers, n.blocks}, PARAM, LAYER,
                  plan.nested ? SMALLER : "--double-quant 1");
        if (plan.nested) table_add(table, std::string(s.name) + "_scales", &q.nested, F32, {s.layers, n.nested}, PARAM, LAYER, SMALLER);
    }
    if (plan.nf4) table_add(table, "nf4_tables", &model.nf4_tables, F32, {NF4_TABLES}, PARAM, MODEL, SMALLER);
    for (int p : model_trained(model)) {
        const ParamShape s = param_shape(c, p);
        const size_t n = s.elements();
        // the head's gradient is a sum over chunks of the loss in any case
        const bool sums = sums_layer(model, p);
        model.grad[p].type = plan.micro_batches > 1 || p == head_param(c) || (in_chunks(plan) && s.in_layer && !sums) ? F32 : FLOATX;
        const char* hint = plan.micro_batches > 1 ? "one micro-batch a step (--total-batch)" : SMALLER;
        if (sums) table_add(table, std::string("sum_") + s.name, &model.layer_sum[p], F32, {s.rows, s.cols}, GRAD, MODEL, SMALLER);
        if (shares_grad(plan, s))
            table_add(table, std::string("d_") + s.name, &model.grad[p].p, model.grad[p].type, {s.rows, s.cols}, GRAD, MODEL, hint);
        else if (!embedding_in_parts(model, p)) add("d_", p, &model.grad[p].p, model.grad[p].type, false, GRAD, hint);
        auto add_state = [&](const std::string& name, auto** where, DType dtype, std::vector<size_t> shape) {
            table_add(table, name, where, dtype, shape, OPTIMIZER, s.in_layer ? LAYER : MODEL, SMALLER);
        };
        if (plan.fuses()) {
            const SpanSums sums = span_sums(c, p);
            add_state(std::string("v_") + s.name, &model.v[p], F32, {s.layers, sums.rows});
            add_state(std::string("v_") + s.name + "_cols", &model.v_cols[p], F32, {s.layers, sums.cols});
        } else {
            const bool bytes = plan.optimizer == ADAMW8 && s.cols > 0;
            const size_t blocks = world_shards(n) ? q8_blocks(shard_size(n), shard_size(n)) : q8_blocks(n, world_share(n));
            auto add_moment = [&](const char* prefix, void** moment, float** absmax) {
                add(prefix, p, moment, bytes ? BYTE : F32, true, OPTIMIZER, bytes ? "--zero 1 on several GPUs" : "--optimizer adamw8");
                if (bytes) add_state(std::string(prefix) + s.name + "_absmax", absmax, F32, {blocks});
            };
            add_moment("m_", &model.m[p], &model.m_absmax[p]);
            add_moment("v_", &model.v[p], &model.v_absmax[p]);
        }
        if (plan.master && !kFP32) add("master_", p, &model.master[p], F32, true, OPTIMIZER, "--master-weights 0");
    }
    if (plan.training && plan.optimizer == ADAMW8) table_add(table, "q8_maps", &model.q8_maps, F32, {2, 256}, SCRATCH, MODEL, SMALLER);
    for (auto [gamma, weight] : FOLDED)   // unfolding makes the gradients of all four from those of weight and bias
        for (int p : {gamma, beta_of(gamma), bias_of(c, weight)})
            if (kMsNorm && p >= 0 && plan.trains(weight) && !plan.trains(p))
                fail("MS_NORM=1 trains all of a norm and the linear layer after it, or not the layer");
}
// What adapters need besides themselves.
void table_add_adapters(Table& table, Model& model) {
    const Config& c = model.config;
    const Plan& plan = model.plan;
    const size_t B = plan.B, T = plan.T;
    size_t ranks = 0, folded = 0, input = 0;   // of all targets of a weight, at most; after a norm; columns of an input
    for (int i = 0; i < 4; i++) {
        const ParamShape s = param_shape(c, LORA_A + i);
        ranks = std::max(ranks, s.rows);
        input = std::max(input, s.rows > 0 ? s.cols : 0);
        for (auto [gamma, weight] : FOLDED)
            if (weight == LINEAR[i]) folded = std::max(folded, s.rows);
    }
    for (int i = 0; i < 4; i++)
        if (keeps_t(model, LINEAR[i]))
            table_add(table, std::string(base_shape(c, LINEAR[i]).name) + "_t", &model.kept_t[i], FLOATX,
                      {(size_t)c.L, B, T, param_shape(c, LORA_A + i).rows}, SAVED, LAYER, "--lora");
    if (ranks == 0) return;
    table_add(table, "lora_t", &model.lora_t, FLOATX, chunk_shape(plan, ranks), SCRATCH, MODEL, CHUNKS);
    if (plan.training) table_add(table, "lora_dt", &model.lora_dt, FLOATX, chunk_shape(plan, ranks), SCRATCH, MODEL, CHUNKS);
    if (kMsNorm && folded > 0) {
        const size_t C = c.C;
        table_add(table, "lora_fold", &model.lora_fold, FLOATX, {folded, C}, SCRATCH, MODEL, "--lora");
        if (beta_of(FOLDED[0][0]) >= 0) {
            table_add(table, "lora_fold_b", &model.lora_fold_b, FLOATX, {folded}, SCRATCH, MODEL, "--lora");
            if (plan.training) table_add(table, "lora_dt_sum", &model.lora_dt_sum, F32, {folded}, SCRATCH, MODEL, "--lora");
        }
        if (plan.training) table_add(table, "lora_G", &model.lora_G, F32, {folded, C}, SCRATCH, MODEL, "--lora");
    }
    if (plan.training && plan.dropout > 0)
        table_add(table, "dropped", &model.dropped, FLOATX, chunk_shape(plan, input), SCRATCH, MODEL, CHUNKS);
}
// On the host.
void table_add_host(Table& table, Model& model) {
    const Config& c = model.config;
    const Plan& plan = model.plan;
    const size_t B = plan.B, T = plan.T, C = c.C;
    if (plan.host_wte) {
        table_add(table, "wte", &model.host_wte, FLOATX, {(size_t)c.Vp, C}, PARAM, HOST, "--embedding-on device");
        table_add(table, "wte_rows", &model.wte_rows, FLOATX, {2, B, T, C}, SCRATCH, HOST, "--embedding-on device");
    }
    if (plan.offload) {
        const size_t inputs = std::max(c.L - 1, 1);   // the last block's stays
        table_add(table, "host_stream", &model.host_stream, FLOATX, {inputs, B, T, C}, SAVED, HOST, "--offload 0");
    }
    table_add(table, "host_tokens", &model.host_tokens, I32, {2, (size_t)plan.micro_batches, token_ints(B * T, c.V, plan.marks)}, SCRATCH,
              HOST, BATCH);
}
// Two rows that are never in use at the same time: the smaller one lies in the larger.
void table_share(Table& table, const char* a, const char* b) {
    auto row = [&](const char* name) { return std::find_if(table.begin(), table.end(), [&](const Row& r) { return r.name == name; }); };
    const auto x = row(a), y = row(b);
    if (x == table.end() || y == table.end()) return;
    if (x->bytes() < y->bytes()) x->alias_of = b;
    else y->alias_of = a;
}
// What every model needs besides its blocks. The workspace comes last: model_allocate counts on it.
void table_add_rest(Table& table, Model& model, size_t colsum) {
    const Config& c = model.config;
    const Plan& plan = model.plan;
    const size_t B = plan.B, T = plan.T, C = c.C, NH = c.NH;
    ParamShape largest = {};   // of the weights that are made in fold_w
    size_t bias = 0;
    for (int weight : LINEAR) {
        const ParamShape s = param_shape(c, weight);
        const bool folds = std::any_of(std::begin(FOLDED), std::end(FOLDED), [&](auto& f) { return f[1] == weight; });
        if ((plan.nf4 || (kMsNorm && folds)) && s.per_layer() > largest.per_layer()) largest = s;
        if (kMsNorm && folds && beta_of(FOLDED[0][0]) >= 0) bias = std::max(bias, s.rows);
    }
    if (largest.rows > 0) table_add(table, "fold_w", &model.fold_w, FLOATX, {largest.rows, largest.cols}, SCRATCH, MODEL, SMALLER);
    if (bias > 0) table_add(table, "fold_b", &model.fold_b, FLOATX, {bias}, SCRATCH, MODEL, SMALLER);
    table_add_adapters(table, model);
    table_add_host(table, model);
    table_add(table, "logits", &model.logits, FLOATX, {plan_chunk_rows(plan), (size_t)c.Vp}, SCRATCH, MODEL, "--loss-chunks");
    table_add(table, "losses", &model.losses, F32, {B, T}, SCRATCH, MODEL, BATCH);
    if (plan.training) {
        table_add(table, "dresid", &model.dresid, FLOATX, {B, T, C}, SCRATCH, MODEL, BATCH);
        table_add(table, "delta", &model.delta, F32, {B, NH, T}, SCRATCH, MODEL, BATCH);
        table_add(table, "colsum", &model.colsum, F32, {colsum}, SCRATCH, MODEL, SMALLER);
        table_add(table, "squares", &model.squares, F32, {model_opt_blocks(model)}, SCRATCH, MODEL, SMALLER);
    }
    table_add(table, "tokens", &model.tokens, I32, {token_ints(B * T, c.V, plan.marks)}, SCRATCH, MODEL, BATCH);
    table_add(table, "step_state", &model.state, BYTE, {sizeof(StepState)}, OPTIMIZER, MODEL, SMALLER);
    const size_t workspace = plan.workspace ? plan.workspace : matmul_workspace(C * std::max<size_t>(c.FF(), c.Vp));
    table_add(table, "workspace", &model.workspace, BYTE, {workspace}, WORKSPACE, MODEL, "--workspace");
    if (!plan.training || !recomputes_block(plan)) return;
    table_share(table, "logits", "dresid");         // before backward begins, and after
    table_share(table, "fold_w", "scratch_dkv");    // in linear layers, and in attention's backward
}
// ==== end twin
// What is kept in a tensor of its own. Without a backward, one layer's tensors serve all, and are as large as scratch.
bool keeps_norm(const Model& model, int weight) {   // the output of the norm before a weight
    const Plan& plan = model.plan;
    if (plan.training && recomputes_block(plan)) return false;
    return kMsNorm || (!recomputes_norm(plan) && (!plan.training || needs_input(model, weight)));
}
bool keeps_act(const Model& model) {   // h
    return !recomputes_act(model.plan) && (!model.plan.training || needs_input(model, DOWNW));
}
// The table of a run. Nothing is allocated here, and the pointer of a tensor that the run does not need stays null.
Table model_table(Model& model) {
    const Config& c = model.config;
    const Plan& plan = model.plan;
    const size_t B = plan.B, T = plan.T, C = c.C, QKV = c.QKV(), ATT = c.ATT(), F = c.F, NH = c.NH;
    const bool blocks = plan.training && recomputes_block(plan);   // alone their inputs are kept
    const bool shared = !plan.training || blocks;   // one layer's tensors serve them all
    const size_t L = shared ? 1 : c.L;
    Table table;
    table_add_params(table, model);
    LayerTensors& kept = model.kept;
    auto keep = [&](const std::string& name, auto** where, DType dtype, std::vector<size_t> shape, const char* shrink) {
        if (blocks) shape.erase(shape.begin());
        table_add(table, name, where, dtype, std::move(shape), plan.training && !blocks ? SAVED : SCRATCH, blocks ? MODEL : LAYER,
                  shared ? BATCH : shrink);
    };
    const char* norm_hint = kMsNorm || plan.recompute >= 2 ? BATCH : "--recompute 2, or a build with MS_NORM=1";
    // Without a backward that wants them, outputs of norms and h are kept by nobody: scratch holds them.
    auto keep_norm = [&](const std::string& name, floatX** out, float** rstd, int weight) {
        if (keeps_norm(model, weight)) keep(name, out, FLOATX, {L, B, T, C}, norm_hint);
        keep(name + "_rstd", rstd, F32, {L, B, T}, BATCH);
    };
    keep_norm("ln1", &kept.ln1, &kept.ln1_rstd, QKVW);
    keep("qkv", &kept.qkv, FLOATX, {L, B, T, QKV}, "--recompute 4");
    keep("atty", &kept.atty, FLOATX, {L, B, T, ATT}, "--recompute 4");
    keep("lse", &kept.lse, F32, {L, B, NH, T}, BATCH);
    if (!kMsNorm && !blocks) keep("resid_mid", &kept.resid_mid, FLOATX, {L, B, T, C}, norm_hint);
    keep_norm("ln2", &kept.ln2, &kept.ln2_rstd, GATEUPW);
    if (!plan.training || !recomputes_fc(plan)) {
        keep("gateup", &kept.gateup, FLOATX, {L, B, T, 2 * F}, "--recompute 3");
        if (kActBits) keep("gate_codes", &kept.gate_codes, BYTE, {L, B, T, act_codes(F)}, "a build with APPROX_ACT=0");
    } else {
        table_add(table, "scratch_gateup", &model.scratch_gateup, FLOATX, chunk_shape(plan, 2 * F), SCRATCH, MODEL, CHUNKS);
        if (kActBits)
            table_add(table, "scratch_codes", &model.scratch_codes, BYTE, chunk_shape(plan, act_codes(F)), SCRATCH, MODEL, CHUNKS);
    }
    if (keeps_act(model)) keep("h", &kept.h, FLOATX, {L, B, T, F}, "--recompute 1");
    if (blocks && !plan.offload)
        table_add(table, "resid_out", &kept.resid_out, FLOATX, {(size_t)c.L, B, T, C}, SAVED, LAYER, "--offload 1");
    else if (!kMsNorm && !blocks) keep("resid_out", &kept.resid_out, FLOATX, {L, B, T, C}, norm_hint);
    if (blocks) table_add(table, "scratch_mid", &model.scratch_mid, FLOATX, chunk_shape(plan, C), SCRATCH, MODEL, CHUNKS);

    const Kind kind = plan.training ? SAVED : SCRATCH;
    table_add(table, "resid_in", &model.resid_in, FLOATX, {B, T, C}, kind, MODEL, BATCH);
    if (plan.offload) {
        table_add(table, "stream_even", &model.stream_at[0], FLOATX, {B, T, C}, SCRATCH, MODEL, BATCH, "resid_in");
        table_add(table, "stream_odd", &model.stream_at[1], FLOATX, {B, T, C}, SCRATCH, MODEL, BATCH);
    }
    table_add(table, "lnf_rstd", &model.lnf_rstd, F32, {B, T}, kind, MODEL, BATCH);
    table_add(table, "angles", &model.angles, F32, {T, (size_t)c.HS() / 2, 2}, SCRATCH, MODEL, "--seq-len");
    // In chunks scratch holds one. Then the gradient of attention's output takes its place, that of q q's; and lnf that of qkv, where
    // layers share it.
    const bool chunks = in_chunks(plan);
    table_add(table, "scratch_c", &model.scratch_c, FLOATX, chunk_shape(plan, std::max(C, ATT)), SCRATCH, MODEL, CHUNKS);
    table_add(table, "lnf", &model.lnf, FLOATX, {B, T, C}, SCRATCH, MODEL, BATCH, !chunks ? "scratch_c" : shared && QKV >= C ? "qkv" : "");
    if (!keeps_act(model) || plan.training)
        table_add(table, "scratch_f", &model.scratch_f, FLOATX, chunk_shape(plan, plan.training && !chunks ? std::max(F, QKV) : F),
                  SCRATCH, MODEL, CHUNKS);
    if (plan.training && chunks)
        table_add(table, "scratch_dkv", &model.scratch_dkv, FLOATX, {B, T, QKV - ATT}, SCRATCH, MODEL, BATCH);
    if (c.qk_norm) table_add(table, "scratch_qkv", &model.scratch_qkv, FLOATX, {B, T, QKV}, SCRATCH, MODEL, BATCH);
    if (!keeps_norm(model, QKVW) || !keeps_norm(model, GATEUPW))
        table_add(table, "scratch_ln", &model.scratch_ln, FLOATX, chunk_shape(plan, C), SCRATCH, MODEL, CHUNKS);
    table_add_rest(table, model, std::max({colsum_scratch(C), COLSUM_SLICES * QKV, (size_t)NORM_SLICES * c.HS()}));
    return table;
}
void model_constants(Model& model) {
    const int T = model.plan.T, HS = model.config.HS(), most = 1 << 16;   // at a time: the host should not hold all of them
    for (int t = 0; t < T; t += most) {
        const std::vector<float2> table = rope_table(model.config.rope, std::min(most, T - t), HS, model.config.maxT, t);
        cudaCheck(cudaMemcpy(model.angles + (size_t)t * (HS / 2), table.data(), table.size() * sizeof(float2), cudaMemcpyHostToDevice));
    }
}

// ==== twin: allocation, linear layers
// The mode as the ledger names it.
std::string model_mode(const Plan& plan) {
    std::string s = std::string(kActBits ? "" : "exact ") + ACT_NAME;
    if (kActBits) s += " in " + std::to_string(kActBits) + (kActBits == 1 ? " bit" : kActSlope ? " bits, by its slope" : " bits");
    s += kMsNorm ? ", one tensor for a norm and its matmul" : ", separate norms";
    s += ", --recompute " + std::to_string(plan.recompute);
    if (plan.recompute >= 1 && !recomputes_act(plan) && !recomputes_norm(plan)) s += " (nothing is left to compute again)";
    else if (plan.recompute == 2 && !recomputes_act(plan)) s += " (only norms are left to compute again)";
    else if (plan.recompute == 2 && !recomputes_norm(plan)) s += std::string(" (only ") + ACT_NAME + " is left to compute again)";
    if (!kFP32) s += plan.master ? ", fp32 master weights" : ", no master weights";
    if (plan.nf4) s += plan.nested ? ", base in NF4, double quantization" : ", base in NF4";
    return s;
}

// Allocates what the plan needs. Weights are garbage afterwards: model_init or a checkpoint fills them.
void model_allocate(Model& model) {
    model.table = model_table(model);
    table_allocate(model.table);
    matmul_state.workspace = model.workspace;
    matmul_state.workspace_bytes = model.table.back().bytes();
    if (matmul_state.handle == nullptr) cublasCheck(cublasLtCreate(&matmul_state.handle));
    model_constants(model);
    for (int p = 0; p < NUM_PARAMS; p++) {
        const size_t n = param_shape(model.config, p).elements();
        if (p >= LORA_A && model.param[p]) cudaCheck(cudaMemsetAsync(model.param[p], 0, n * sizeof(floatX), model.stream));
    }
    // the optimizer's state; and most gradients are written before they are read, but for example positions from T on never get one
    for (const Row& r : model.table)
        if (r.kind == OPTIMIZER || r.kind == GRAD) cudaCheck(cudaMemsetAsync(r.get(), 0, r.bytes(), model.stream));
    for (bool v : {false, true})
        if (model.q8_maps != nullptr)
            cudaCheck(cudaMemcpy(model.q8_maps + 256 * v, dynamic_map(!v).data(), 256 * sizeof(float), cudaMemcpyHostToDevice));
    model.updates = 0;
    model.lowest = model_lowest(model);
    for (cudaEvent_t& event : model.wte_copied)
        if (model.plan.host_wte) cudaCheck(cudaEventCreate(&event));
    if (model.plan.offload) {
        cudaCheck(cudaStreamCreateWithFlags(&model.copies, cudaStreamNonBlocking));
        for (cudaEvent_t* event : {&model.stream_ready, &model.stream_copied[0], &model.stream_copied[1]})
            cudaCheck(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    if (model.plan.nf4)
        cudaCheck(cudaMemcpy(model.nf4_tables, nf4_tables().data(), NF4_TABLES * sizeof(float), cudaMemcpyHostToDevice));
}

// ---- a frozen weight in 4 bits
// The matrices of a weight in layer l, as they are on the device.
struct Nf4Part { size_t first, rows; Nf4 nf4; };
std::vector<Nf4Part> nf4_parts(const Model& model, int p, int l) {
    const Quantized& q = model.quantized[linear_index(p)];
    const ParamShape s = param_shape(model.config, p);
    const Nf4Sizes sizes = nf4_sizes(model.config, p);
    size_t block = l * sizes.blocks, nested = l * sizes.nested;
    std::vector<Nf4Part> parts;
    for (const LoraTarget& t : lora_targets(model.config)) {
        if (t.weight != p || t.part) continue;
        const uint8_t* codes = q.codes + (l * s.per_layer() + t.first * s.cols) / 2;
        const void* absmax = (char*)q.absmax + block * (q.nested ? 1 : 4);
        parts.push_back({t.first, t.rows, {codes, absmax, q.nested ? q.nested + nested : nullptr, model.nf4_tables}});
        block += nf4_blocks(t.rows * s.cols), nested += nf4_nested(t.rows * s.cols);
    }
    return parts;
}
void nf4_put(const Nf4& to, const Nf4Host& from) {
    auto copy = [](const void* device, const auto& host) {
        if (device) cudaCheck(cudaMemcpy((void*)device, host.data(), host.size() * sizeof host[0], cudaMemcpyHostToDevice));
    };
    copy(to.codes, from.codes);
    if (to.nested == nullptr) return copy(to.absmax, from.absmax);
    copy(to.absmax, from.absmax8), copy(to.nested, from.nested);
}
// W into fold_w; with a norm W * gamma, and b + W beta into fold_b.
void nf4_dequantize(const Model& model, int p, int l, const floatX* bias, const floatX* gamma, const floatX* beta) {
    const size_t C = param_shape(model.config, p).cols;
    for (const Nf4Part& part : nf4_parts(model, p, l))
        norm_fold(model.fold_w + part.first * C, beta ? model.fold_b + part.first : nullptr, part.nf4, bias ? bias + part.first : nullptr,
                  gamma, beta, (int)part.rows, (int)C, model.stream);
}

__global__ void widen_kernel(float* out, const floatX* inp, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = (float)inp[i];
}
void model_put(Model& model, int p, size_t first, size_t n, const float* values);   // section 8: from the host
// GPT-2's initialisation: weights from N(0, 0.02), or less (enum Init); rows that pad the vocabulary 0. Master weights begin as they are.
void model_init(Model& model) {
    for (int p = 0; p < LORA_A; p++) {
        const ParamShape s = param_shape(model.config, p);
        const bool vocabulary = p == WTE || p == head_param(model.config);
        const size_t n = s.elements(), drawn = s.init < NORMAL ? 0 : vocabulary ? (size_t)model.config.V * model.config.C : n;
        if (n == 0) continue;
        const float std = s.init == NORMAL_RESIDUAL ? 0.02f / sqrtf(2.0f * model.config.L) : 0.02f, constant = s.init == ONES ? 1 : 0;
        auto draw = [&](floatX* to, size_t first, size_t count) {
            init_kernel<<<ceil_div(count, 256), 256, 0, model.stream>>>(to, count, drawn, std, constant, model.seed, p, first);
            cudaCheck(cudaGetLastError());
        };
        if (model.param[p] != nullptr) draw(model.param[p], 0, n);
        for (size_t layer = 0; model.param[p] == nullptr && layer < s.layers; layer++) {   // to be kept in another way than it is drawn
            const size_t rows = p == WTE ? (size_t)model.plan.B * model.plan.T : s.rows;   // at a time: what fits into a buffer
            floatX* buffer = p == WTE ? model.resid_in : model.fold_w;
            for (size_t row = 0; row < s.rows; row += rows) {
                const size_t count = std::min(rows, s.rows - row) * s.cols;
                std::vector<floatX> drawn_here(count);
                std::vector<float> values(count);
                draw(buffer, layer * s.per_layer() + row * s.cols, count);
                cudaCheck(cudaMemcpyAsync(drawn_here.data(), buffer, count * sizeof(floatX), cudaMemcpyDeviceToHost, model.stream));
                cudaCheck(cudaStreamSynchronize(model.stream));
                std::copy(drawn_here.begin(), drawn_here.end(), values.begin());
                model_put(model, p, layer * s.per_layer() + row * s.cols, count, values.data());
            }
        }
        if (model.master[p] == nullptr) continue;
        const size_t share = shard_size(n);
        widen_kernel<<<ceil_div(share, 256), 256, 0, model.stream>>>(model.master[p], model.param[p] + shard_offset(n), share);
        cudaCheck(cudaGetLastError());
    }
}

// ---- a linear layer: out = inp W^T + b, and perhaps an adapter: + s (inp A^T) B^T
// After a norm, with MS_NORM, inp is the norm's z, and gamma and beta are folded into W, b and A. W may be frozen, and then in 4 bits.
//
// An adapter (LoRA: Hu et al., arXiv 2106.09685) is a narrow matrix A (R, C) and another one B (OC, R), which begins with zeros; they are
// trained in place of W. t = inp A^T is R wide, so it is computed again in backward. Matrices that share their input (q, k and v; gate and
// up) have their A below one another, for one matmul, and each its own B, which is multiplied with its R columns of t. Backward:
//     dt = s dout B      dA += dt^T inp      dB += s dout^T t      dinp = dout W + dt A
// Without a gradient of A (LoRA-FA: Zhang et al., arXiv 2308.03303) inp is not needed.
struct Linear {
    const floatX *weight, *bias;   // (OC, C), (OC) or null; weight null: in 4 bits
    Grad dweight, dbias;           // of the same shapes; null: not wanted
    const floatX *gamma, *beta;    // (C) of the norm to fold in; null: none
    Grad dgamma, dbeta;            // (C)
    int C, OC, p, l;               // p: its parameter
    const floatX *A, *B;           // (ranks, C), the targets' (rows, R) one after the other
    Grad dA, dB;
    int R, slots;                  // R: of a target; ranks = slots * R
    struct Slot { size_t first, rows; float scale; } slot[3];   // rows of the weight; scale 0: this layer has no adapter there
    floatX* t;                     // (rows, ranks): scratch, or what forward keeps for backward
    Dropout dropout;
    bool lowest;                   // nothing below it is trained
    int ranks() const { return slots * R; }
};
// Rows [first, first + count) of B*T: those that are worked on at a time. All of a block but attention works row by row.
struct Rows { int first, count; };
template <class F> void for_rows(const Plan& plan, int BT, const F& f) {
    const int each = in_chunks(plan) ? plan.rows : BT;
    for (int r = 0; r < BT; r += each) f(Rows{r, std::min(each, BT - r)});
}
Linear model_linear(const Model& model, int weight, int l, Rows rows, int norm = -1) {   // norm: the gamma of the norm before it
    const ParamShape s = param_shape(model.config, weight);
    const int bias = bias_of(model.config, weight), index = linear_index(weight);
    Linear linear = {model_param(model, weight, l), model_param(model, bias, l), model_grad(model, weight, l),
                     model_grad(model, bias, l), nullptr, nullptr, {}, {}, (int)s.cols, (int)s.rows, weight, l};
    if (kMsNorm && norm >= 0) {
        linear.gamma = model_param(model, norm, l), linear.dgamma = model_grad(model, norm, l);
        linear.beta = model_param(model, beta_of(norm), l), linear.dbeta = model_grad(model, beta_of(norm), l);
    }
    linear.lowest = model.lowest == l * 4 + index;
    if (!has_adapter(model.config, weight)) return linear;
    linear.A = model_param(model, LORA_A + index, l), linear.dA = model_grad(model, LORA_A + index, l);
    linear.B = model_param(model, LORA_B + index, l), linear.dB = model_grad(model, LORA_B + index, l);
    linear.R = model.config.lora.rank, linear.t = model.lora_t;
    if (model.kept_t[index])
        linear.t =
            model.kept_t[index] + ((size_t)l * model.plan.B * model.plan.T + rows.first) * param_shape(model.config, LORA_A + index).rows;
    const float dropout = model.micro_batch > 0 ? model.plan.dropout : 0;
    linear.dropout = {dropout, model.seed, (1ull << 44) + (model.micro_batch * model.config.L + l) * 4 + index, rows.first * s.cols};
    const std::vector<LoraTarget> targets = lora_targets(model.config);
    for (size_t i = 0; i < targets.size(); i++)
        if (targets[i].weight == weight && (model.config.lora.targets >> i & 1))
            linear.slot[linear.slots++] = {targets[i].first, targets[i].rows, model.lora[l * targets.size() + i].scale};
    return linear;
}
// What a matmul multiplies by and adds: W and b, or with the norm folded in (if wanted), which holds until the next call, W' and b'.
struct Weights { const floatX *weight, *bias; };
Weights linear_weights(const Model& model, const Linear& linear, bool fold) {
    const floatX *gamma = fold ? linear.gamma : nullptr, *beta = fold ? linear.beta : nullptr;
    const bool quantized = linear.weight == nullptr;
    if (quantized) nf4_dequantize(model, linear.p, linear.l, linear.bias, gamma, beta);
    else if (gamma != nullptr)
        norm_fold(model.fold_w, beta ? model.fold_b : nullptr, PlainWeight{linear.weight}, linear.bias, gamma, beta, linear.OC, linear.C,
                  model.stream);
    return {quantized || gamma ? model.fold_w : linear.weight, beta ? model.fold_b : linear.bias};
}
// What A is multiplied with: the layer's input, or with dropout what is left of it.
const floatX* adapter_input(const Model& model, const floatX* inp, const Linear& linear, int rows) {
    if (linear.dropout.p == 0) return inp;
    dropout<false>(model.dropped, inp, linear.gamma, linear.beta, linear.dropout, rows, linear.C, model.stream);
    return model.dropped;
}
// t = x A^T, of what adapter_input returns. Without dropout gamma and beta are folded into A.
void adapter_down(const Model& model, const floatX* x, const Linear& linear, int rows) {
    const bool folds = linear.gamma != nullptr && linear.dropout.p == 0;
    floatX* folded_b = folds && linear.beta ? model.lora_fold_b : nullptr;
    if (folds)
        norm_fold(model.lora_fold, folded_b, PlainWeight{linear.A}, nullptr, linear.gamma, linear.beta, linear.ranks(), linear.C,
                  model.stream);
    matmul_forward(linear.t, x, folds ? model.lora_fold : linear.A, folded_b, rows, linear.C, linear.ranks(), model.stream);
}
void linear_forward(const Model& model, floatX* out,   // (rows, OC)
                    const floatX* inp,                 // (rows, C)
                    const Linear& linear, int rows) {
    const Weights w = linear_weights(model, linear, true);
    matmul_forward(out, inp, w.weight, w.bias, rows, linear.C, linear.OC, model.stream);
    if (linear.slots == 0) return;
    adapter_down(model, adapter_input(model, inp, linear, rows), linear, rows);
    const floatX* B = linear.B;
    for (int i = 0, R = linear.R; i < linear.slots; B += linear.slot[i++].rows * R) {   // out += scale t B^T, in the slot's columns
        const Linear::Slot& s = linear.slot[i];
        matmul(out + s.first, FLOATX, B, linear.t + i * R, {(long)s.rows, rows, R, true, false, 0, linear.ranks(), linear.OC}, true,
               model.stream, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, s.scale);
    }
}
struct Pass { bool add, last; };   // a micro-batch of a step: its gradients are added to those before; no further one comes
// Gradients of an adapter; leaves dt in lora_dt.
void adapter_backward(const Model& model, const floatX* dout, const floatX* inp, const Linear& linear, int rows, Pass pass) {
    const int R = linear.R, ranks = linear.ranks(), C = linear.C, OC = linear.OC;
    const floatX *x = inp ? adapter_input(model, inp, linear, rows) : nullptr, *B = linear.B;
    if (inp != nullptr) adapter_down(model, x, linear, rows);   // or t was kept
    size_t at = 0;
    for (int i = 0; i < linear.slots; i++) {
        const Linear::Slot& s = linear.slot[i];
        auto product = [&](void* D, DType type, const floatX* A, const MatmulShape& shape, bool add) {   // with dout's columns
            matmul(D, type, A, dout + s.first, shape, add, model.stream, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, s.scale);
        };
        const Grad dB = linear.dB + at;
        product(dB.p, dB.type, linear.t + i * R, {R, (long)s.rows, rows, false, true, ranks, OC, 0}, pass.add);
        product(model.lora_dt + i * R, FLOATX, B + at, {R, rows, (long)s.rows, false, false, 0, OC, ranks}, false);
        at += s.rows * R;
    }
    if (linear.dA.p == nullptr) return;
    if (linear.gamma == nullptr || linear.dropout.p > 0)
        return matmul_backward_weight(linear.dA, model.lora_dt, x, pass.add, rows, C, ranks, model.stream);
    matmul_backward_weight({model.lora_G, F32}, model.lora_dt, x, false, rows, C, ranks, model.stream);
    if (linear.beta) bias_backward({model.lora_dt_sum, F32}, model.colsum, model.lora_dt, false, rows, ranks, model.stream);
    adapter_unfold(linear.dA, model.lora_G, model.lora_dt_sum, linear.gamma, linear.beta, pass.add, ranks, C, model.stream);
}
// Gradients of a linear layer, but its bias. False: nothing below it is trained, and dinp was not computed.
bool linear_backward(const Model& model, floatX* dinp,   // (rows, C)
                     const floatX* dout,                 // (rows, OC); what the layer adds to dbias from it is done
                     const floatX* inp,                  // (rows, C), may be dinp; null: not needed (needs_input)
                     const Linear& linear, int rows, Pass pass,
                     const void* gelu_inp = nullptr) {   // see matmul_backward_input
    const int C = linear.C, OC = linear.OC, ranks = linear.ranks();
    const bool wanted = linear.dweight.p != nullptr;
    if (wanted) matmul_backward_weight(linear.dweight, dout, inp, pass.add, rows, C, OC, model.stream);
    if (linear.slots > 0) adapter_backward(model, dout, inp, linear, rows, pass);
    if (linear.lowest) return false;
    matmul_backward_input(dinp, dout, linear_weights(model, linear, false).weight, rows, C, OC, model.stream, gelu_inp);
    if (linear.slots > 0 && linear.dropout.p > 0) {
        matmul_backward_input(model.dropped, model.lora_dt, linear.A, rows, C, ranks, model.stream);
        dropout<true>(dinp, model.dropped, nullptr, nullptr, linear.dropout, rows, C, model.stream);
    } else if (linear.slots > 0) {
        matmul(dinp, FLOATX, linear.A, model.lora_dt, {C, rows, ranks, false, false}, true, model.stream);
    }
    if (wanted && linear.gamma != nullptr && pass.last)
        norm_unfold(linear.dweight, linear.dgamma, linear.dbeta, model.colsum, linear.dbias, linear.weight, linear.gamma,
                    linear.beta, OC, C, model.stream);
    return true;
}
// --offload. The stream before block l, x_l, stands in stream_at[l % 2]. To the host as soon as it is whole, beside what the device does
// next; from the host one block ahead. A copy waits for the work that was asked for before it; what uses its buffer waits for the copy.
// None is left when a pass is over, so whatever writes the first block's input need not wait.
void offload_copy(const Model& model, int l, int BT, bool back) {
    const size_t n = (size_t)BT * model.config.C;
    floatX *host = model.host_stream + l * n, *device = model.stream_at[l % 2];
    cudaCheck(cudaEventRecord(model.stream_ready, model.stream));
    cudaCheck(cudaStreamWaitEvent(model.copies, model.stream_ready, 0));
    cudaCheck(cudaMemcpyAsync(back ? device : host, back ? host : device, n * sizeof(floatX),
                              back ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, model.copies));
    cudaCheck(cudaEventRecord(model.stream_copied[l % 2], model.copies));
}
void offload_wait(const Model& model, int l) { cudaCheck(cudaStreamWaitEvent(model.stream, model.stream_copied[l % 2], 0)); }
// Before and after the backward of a layer: see sums_layer. A gradient that is not computed, below the lowest adapter, is 0.
void layer_begin(const Model& model) {
    for (int p : model_trained(model))
        if (model.layer_sum[p])
            cudaCheck(cudaMemsetAsync(model.layer_sum[p], 0, param_shape(model.config, p).per_layer() * sizeof(float), model.stream));
}
__global__ void round_kernel(floatX* out, const float* inp, size_t n) {   // n: a matrix has whole vectors
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) store(out + i, load(inp + i));
}
void layer_end(const Model& model, int l) {
    for (int p : model_trained(model)) {
        const size_t n = param_shape(model.config, p).per_layer();
        if (model.layer_sum[p])
            round_kernel<<<ceil_div(n, 256 * VEC), 256, 0, model.stream>>>((floatX*)(model.grad[p] + l * n).p, model.layer_sum[p], n);
    }
    cudaCheck(cudaGetLastError());
}
// The gradient of a norm's gamma or beta that the norm itself makes. With MS_NORM norm_unfold does, where the weight after it is trained.
Grad norm_grad(const Model& model, int p, int weight, int l) {
    return kMsNorm && model.plan.trains(weight) ? Grad{} : model_grad(model, p, l);
}
// ==== end twin
// ---- forward: the figure at the top of this file, from top to bottom
// Without training, and with -r 4, all layers share one slot but for the stream between them; a tensor that is not kept is a buffer for
// all. Of what stands for all rows those from `row` on; a buffer begins with them.
LayerTensors model_layer(const Model& model, int l, int BT, int row = 0) {
    const Config& c = model.config;
    const LayerTensors& kept = model.kept;
    const size_t layer = model.plan.training ? l : 0, slot = recomputes_block(model.plan) ? 0 : layer, C = c.C, F = c.F;
    auto at = [&](auto* base, size_t per_row, decltype(base) buffer) { return base ? base + (slot * BT + row) * per_row : buffer; };
    floatX* running = model.resid_in + row * C;   // the stream, where it is not kept
    auto stream = [&](size_t of) {   // after block `of`
        if (model.stream_at[1]) return model.stream_at[(of + 1) % 2] + row * C;
        return kept.resid_out ? kept.resid_out + (of * BT + row) * C : running;
    };
    return {l == 0 ? running : stream(model.plan.training ? l - 1 : 0),
            at(kept.ln1, C, model.scratch_ln), at(kept.ln1_rstd, 1, nullptr),
            at(kept.qkv, c.QKV(), nullptr), at(kept.atty, c.ATT(), nullptr), at(kept.lse, c.NH, nullptr),
            at(kept.resid_mid, C, model.scratch_mid ? model.scratch_mid : running),
            at(kept.ln2, C, model.scratch_ln), at(kept.ln2_rstd, 1, nullptr),
            at(kept.gateup, 2 * F, model.scratch_gateup), at(kept.gate_codes, act_codes(F), model.scratch_codes),
            at(kept.h, F, model.scratch_f), stream(layer)};
}
// What attention reads: qkv, with q and k turned by their positions; with norms of q and k, which are done first, it is a buffer.
floatX* attention_input(const Model& model, const LayerTensors& t, size_t row = 0) {
    return model.config.qk_norm ? model.scratch_qkv + row * model.config.QKV() : t.qkv;
}
void model_turn(const Model& model, const LayerTensors& t, int l, int BT, int T, Rows rows) {
    const Config& c = model.config;
    rope_forward(attention_input(model, t, rows.first), t.qkv, model_param(model, QNORMW, l), model_param(model, KNORMW, l), model.angles,
                 c.eps, model_documents(model, BT), rows.first, rows.count, T, c.NH, c.NKV, c.HS(), model.stream);
}
// The parts of a block. Before attention: from the output of its first norm to q, k and v.
void block_qkv(const Model& model, const LayerTensors& t, int l, int BT, int T, Rows rows) {
    linear_forward(model, t.qkv, t.ln1, model_linear(model, QKVW, l, rows, LN1W), rows.count);
    model_turn(model, t, l, BT, T, rows);
}
void block_attention(const Model& model, const LayerTensors& t, int B, int T) {
    const Config& c = model.config;
    attention_forward(t.atty, t.lse, attention_input(model, t), model_documents(model, B * T), B, T, c.NH, c.NKV, c.HS(), model.stream);
}
// After it, to the second norm's output; then to h.
void block_mid(const Model& model, const LayerTensors& t, int l, Rows rows) {
    const Config& c = model.config;
    linear_forward(model, model.scratch_c, t.atty, model_linear(model, ATTPROJW, l, rows), rows.count);
    add_norm_forward<kMsNorm>(t.resid_mid, t.ln2, nullptr, t.ln2_rstd, t.resid, model.scratch_c, model_param(model, LN2W, l), nullptr,
                              c.eps, rows.count, c.C, model.stream);
}
void block_act(const Model& model, const LayerTensors& t, int l, Rows rows) {
    linear_forward(model, t.gateup, t.ln2, model_linear(model, GATEUPW, l, rows, LN2W), rows.count);
    swiglu_forward<kActBits>(t.h, t.gateup, t.gate_codes, rows.count, model.config.F, model.stream);
}

// From the inputs in model.tokens to the final norm's output, model.lnf. B and T may be smaller than the plan's.
// keep: for a backward, so that with --offload what it wants goes to the host.
void model_forward(Model& model, int B, int T, bool keep = true) {
    NvtxRange range("forward");
    const Config& c = model.config;
    const int C = c.C, L = c.L, BT = B * T;
    cudaStream_t stream = model.stream;
    auto W = [&](int p, int l) { return model_param(model, p, l); };
    if (!model.plan.host_wte)
        embedding_forward(model.resid_in, model.tokens, W(WTE, 0), nullptr, nullptr, B, T, C, stream);   // or model_tokens did
    for_rows(model.plan, BT, [&](Rows rows) {
        const LayerTensors t = model_layer(model, 0, BT, rows.first);
        add_norm_forward<kMsNorm>(nullptr, t.ln1, nullptr, t.ln1_rstd, t.resid, nullptr, W(LN1W, 0), nullptr, c.eps, rows.count, C,
                                  stream);
        block_qkv(model, t, 0, BT, T, rows);
    });
    for (int l = 0; l < L; l++) {
        NvtxRange layer_range("forward layer " + std::to_string(l));
        if (model.plan.offload) {
            if (l + 1 < L && keep) offload_copy(model, l, BT, false);   // backward finds the last one where it is
            offload_wait(model, l + 1);                                 // this one writes where the input of the one before stands
        }
        block_attention(model, model_layer(model, l, BT), B, T);
        for_rows(model.plan, BT, [&](Rows rows) {
            const LayerTensors t = model_layer(model, l, BT, rows.first);
            block_mid(model, t, l, rows);
            block_act(model, t, l, rows);
            linear_forward(model, model.scratch_c, t.h, model_linear(model, DOWNW, l, rows), rows.count);

            // The second residual addition is part of the norm that comes next: ln1 of the next layer, or the final norm.
            if (l + 1 < L) {
                const LayerTensors next = model_layer(model, l + 1, BT, rows.first);
                add_norm_forward<kMsNorm>(t.resid_out, next.ln1, nullptr, next.ln1_rstd, t.resid_mid, model.scratch_c, W(LN1W, l + 1),
                                          nullptr, c.eps, rows.count, C, stream);
                block_qkv(model, next, l + 1, BT, T, rows);
            } else {   // it always applies gamma: its matmul may use wte, as the embedding does, so nothing can be folded in
                add_norm_forward<false>(t.resid_out, model.lnf + (size_t)rows.first * C, nullptr, model.lnf_rstd + rows.first,
                                        t.resid_mid, model.scratch_c, W(LNFW, 0), nullptr, c.eps, rows.count, C, stream);
            }
        });
    }
}

// ==== twin: loss over chunks
// ---- loss: the lm-head, softmax and cross-entropy over chunks of rows
// Logits are (B*T, Vp), the largest tensor of a small model. A row's loss needs no other row, so a chunk of rows goes all the way
// (logits, loss, their gradient, and from it the gradients of the head's weight and of lnf) before the next chunk reuses the
// memory. Nothing is computed twice. The gradient of a chunk of lnf overwrites the chunk itself, which is not needed any more.
// `with_loss`: the targets that have a loss in all of the step, over which the gradient is a mean.
void model_loss(Model& model, int B, int T, bool train, bool first_micro_batch, double with_loss) {
    NvtxRange range("loss");
    const int C = model.config.C, V = model.config.V, Vp = model.config.Vp, BT = B * T;
    int* targets = model.tokens + BT;
    const int chunk = std::min((int)plan_chunk_rows(model.plan), BT);
    const int head = head_param(model.config);
    const float dloss = 1.0f / (float)with_loss;
    for (int r = 0; r < BT; r += chunk) {
        int rows = std::min(chunk, BT - r);
        floatX* lnf = model.lnf + (size_t)r * C;
        matmul_forward(model.logits, lnf, model.param[head], nullptr, rows, C, Vp, model.stream);
        classifier(model.logits, model.losses + r, targets + r, dloss, train, rows, V, Vp, model.stream);
        if (!train && model.plan.marks) likeliest_kernel<<<rows, 256, 0, model.stream>>>(targets + r, model.logits, V, Vp);
        if (!train) continue;
        if (model.plan.trains(head))
            matmul_backward_weight(model.grad[head], model.logits, lnf, !(first_micro_batch && r == 0), rows, C, Vp, model.stream);
        matmul_backward_input(lnf, model.logits, model.param[head], rows, C, Vp, model.stream);
    }
    sum_kernel<<<1, 256, 0, model.stream>>>(&model.state->loss_sum, model.losses, train && !first_micro_batch, BT);
    cudaCheck(cudaGetLastError());
}

// ---- an update that is fused into backward
// Of layer l, when all that reads its weights and all that adds to its gradients is done; -1: of the tensors outside the blocks.
// a null: none. make(grad, first, count) makes the gradient of some rows of an embedding.
void model_fused_update(const Model& model, const AdaLomo* a, int l,
                        const std::function<void(Grad grad, size_t first, size_t count)>& make = nullptr) {
    if (a == nullptr) return;
    const Config& c = model.config;
    const LomoScratch scratch = model_lomo_scratch(model);
    for (int p : model_trained(model)) {
        const ParamShape s = param_shape(c, p);
        if (s.in_layer != (l >= 0)) continue;
        const size_t layer = std::max(l, 0), begin = layer * s.per_layer();
        const SpanSums sums = span_sums(c, p);
        const bool parts = embedding_in_parts(model, p);
        const Grad grad = parts ? model.grad[LINEAR[2]] : model_grad(model, p, (int)layer);   // which is done with, and has many rows
        if (!parts) world_reduce_gradient(grad, s.per_layer(), model.stream);
        float *v_rows = (float*)model.v[p] + layer * sums.rows, *v_cols = model.v_cols[p] + layer * sums.cols;
        for (const Span& span : param_spans(c, p)) {
            const size_t at = begin + span.first, room = parts ? param_shape(c, LINEAR[2]).per_layer() / span.cols : span.rows;
            float* master = model.master[p] ? model.master[p] + at : nullptr;
            const LomoMatrix matrix = {model.param[p] + at, grad + span.first, v_rows, v_cols, master, span.rows, span.cols, at,
                                       s.decay ? a->decay : 0.0f, (unsigned)p};
            auto some = [&](size_t first, size_t count) {
                make(grad, first, count);
                world_reduce_gradient(grad, count * span.cols, model.stream);
            };
            adalomo(matrix, scratch, &model.state->square_sum, *a, room, parts ? some : std::function<void(size_t, size_t)>(),
                    model.stream);
            v_rows += span.rows, v_cols += span.cols;
        }
    }
}

// ==== end twin
// ---- backward: the figure, from bottom to top
// Where each of the 12 gradients is written:
//     headw                                model_loss; it is wte where the two are tied
//     wte                                  the embedding, which adds to what is there: what model_loss wrote, or zeros
//     qkvw attprojw gateupw downw          linear_backward of that layer
//     qkvb                                 its column sums, after RoPE's backward
//     qnormw knormw                        RoPE's backward
//     ln1w ln2w                            that norm, or with MS_NORM=1 linear_backward of the layer after it
//     lnfw                                 the final norm

// From the gradient of the final norm's output, which model_loss has left in model.lnf, to all gradients.
void model_backward(Model& model, int B, int T, int buckets, int micro_batch, const AdaLomo* fused = nullptr) {
    NvtxRange range("backward");
    const Config& c = model.config;
    const int C = c.C, L = c.L, BT = B * T;
    const Plan& plan = model.plan;
    const Pass pass = {micro_batch > 0, micro_batch == plan.micro_batches - 1};
    cudaStream_t stream = model.stream;
    floatX *d = model.scratch_c, *d_wide = model.scratch_f;
    auto W = [&](int p, int l) { return model_param(model, p, l); };
    auto G = [&](int p, int l) { return model_grad(model, p, l); };
    auto norm_again = [&](int gamma, floatX* out, float* rstd, const floatX* inp, int l, Rows rows) {
        add_norm_forward<kMsNorm>(nullptr, out, nullptr, rstd, inp, nullptr, W(gamma, l), nullptr, c.eps, rows.count, C, stream);
    };
    auto pass_of = [&](Rows rows) { return Pass{pass.add || rows.first > 0, pass.last && rows.first + rows.count == BT}; };
    const bool h = needs_input(model, DOWNW), ln2 = needs_input(model, GATEUPW), atty = needs_input(model, ATTPROJW);
    const bool ln1 = needs_input(model, QKVW), chunks = in_chunks(plan);

    // After attention, from the block's output to the gradient of attention's. False: nothing below is trained.
    auto after = [&](int l, Rows rows) {
        const LayerTensors t = model_layer(model, l, BT, rows.first);
        const Pass pass = pass_of(rows);
        floatX* dresid = model.dresid + (size_t)rows.first * C;
        // What forward did not keep is computed again, to the same bits. h may be in scratch_f: the weight's gradient reads it before
        // the input's gradient takes its place. The gradients of gate and up take the place of gate and up.
        if (recomputes_block(plan)) block_mid(model, t, l, rows);
        else if ((ln2 || recomputes_fc(plan)) && !keeps_norm(model, GATEUPW)) norm_again(LN2W, t.ln2, t.ln2_rstd, t.resid_mid, l, rows);
        if (recomputes_fc(plan)) block_act(model, t, l, rows);
        else if (h && !keeps_act(model)) swiglu_forward<kActBits, true>(t.h, t.gateup, t.gate_codes, rows.count, c.F, stream);
        if (!linear_backward(model, d_wide, dresid, h ? t.h : nullptr, model_linear(model, DOWNW, l, rows), rows.count, pass))
            return false;
        swiglu_backward<kActBits>(t.gateup, d_wide, t.gate_codes, rows.count, c.F, stream);
        if (!linear_backward(model, d, t.gateup, ln2 ? t.ln2 : nullptr, model_linear(model, GATEUPW, l, rows, LN2W), rows.count, pass))
            return false;
        add_norm_backward<kMsNorm>(dresid, {}, norm_grad(model, LN2W, GATEUPW, l), {}, model.colsum, d, kMsNorm ? t.ln2 : t.resid_mid,
                                   nullptr, t.ln2_rstd, W(LN2W, l), true, pass.add, rows.count, C, stream);
        if (!linear_backward(model, d, dresid, atty ? t.atty : nullptr, model_linear(model, ATTPROJW, l, rows), rows.count, pass))
            return false;
        if (chunks) attention_delta(t.atty, model.delta, d, rows.first, rows.count, T, c.NH, c.HS(), stream);
        return true;
    };
    // Before attention, from the gradient of q, k and v to that of the block's input.
    auto before = [&](int l, Rows rows) {
        const LayerTensors t = model_layer(model, l, BT, rows.first);
        const Pass pass = pass_of(rows);
        floatX* dqkv = chunks ? attention_input(model, t, rows.first) : d_wide;
        rope_backward(dqkv, G(QNORMW, l), G(KNORMW, l), model.colsum, t.qkv, W(QNORMW, l), W(KNORMW, l), model.angles, c.eps,
                      model_documents(model, BT), pass.add, rows.first, rows.count, T, c.NH, c.NKV, c.HS(), stream);
        bias_backward(G(QKVB, l), model.colsum, dqkv, pass.add, rows.count, c.QKV(), stream);
        if ((ln1 || (kMsNorm && recomputes_block(plan))) && !keeps_norm(model, QKVW))
            norm_again(LN1W, t.ln1, t.ln1_rstd, t.resid, l, rows);
        if (!linear_backward(model, d, dqkv, ln1 ? t.ln1 : nullptr, model_linear(model, QKVW, l, rows, LN1W), rows.count, pass))
            return false;
        add_norm_backward<kMsNorm>(model.dresid + (size_t)rows.first * C, {}, norm_grad(model, LN1W, QKVW, l), {}, model.colsum, d,
                                   kMsNorm ? t.ln1 : t.resid, nullptr, t.ln1_rstd, W(LN1W, l), true, pass.add, rows.count, C, stream);
        return true;
    };
    auto all_rows = [&](int l, auto& part) {
        bool goes_on = true;
        for_rows(plan, BT, [&](Rows rows) { goes_on = part(l, rows); });
        return goes_on;
    };
    add_norm_backward<false>(model.dresid, {}, G(LNFW, 0), {}, model.colsum, model.lnf, model_layer(model, L - 1, BT).resid_out, nullptr,
                             model.lnf_rstd, W(LNFW, 0), false, pass.add, BT, C, stream);
    for (int l = L - 1; l >= 0; l--) {
        NvtxRange layer_range("backward layer " + std::to_string(l));
        const LayerTensors t = model_layer(model, l, BT);
        layer_begin(model);
        if (plan.offload) {
            if (l < L - 1) offload_wait(model, l);
            if (l > model.lowest / 4) offload_copy(model, l - 1, BT, true);   // over the stream after this block, which is done with
        }
        if (recomputes_block(plan)) {
            for_rows(plan, BT, [&](Rows rows) {
                const LayerTensors t = model_layer(model, l, BT, rows.first);
                norm_again(LN1W, t.ln1, t.ln1_rstd, t.resid, l, rows);
                block_qkv(model, t, l, BT, T, rows);
            });
            block_attention(model, t, B, T);
        }
        if (!all_rows(l, after)) return layer_end(model, l);
        if (c.qk_norm && !recomputes_block(plan)) model_turn(model, t, l, BT, T, {0, BT});
        floatX* qkv = attention_input(model, t);
        attention_backward(chunks ? qkv : d_wide, model.scratch_dkv, {}, model.delta, model.colsum, chunks ? t.atty : d, qkv,
                           chunks ? nullptr : t.atty, t.lse, model_documents(model, BT), pass.add, B, T, c.NH, c.NKV, c.HS(), stream);
        if (!all_rows(l, before)) return layer_end(model, l);
        layer_end(model, l);
        model_fused_update(model, fused, l);
    }
    const floatX* dresid = model.dresid;
    const int* document = model_documents(model, BT);
    const int* positions = model.tokens + 2 * (size_t)BT;
    const int* bucket_token = positions + BT;
    const int* bucket_start = bucket_token + token_cap(BT, c.V);
    auto embedding = [&](Grad dwte, size_t first, size_t rows) {
        if (!c.tied && !pass.add && dwte.p != nullptr)   // rows of tokens that do not occur are written by nobody
            cudaCheck(cudaMemsetAsync(dwte.p, 0, rows * C * dtype_size(dwte.type), stream));
        embedding_backward(dwte, {}, dresid, positions, bucket_token, bucket_start, document, buckets, true, false, B, T, C, stream,
                           (int)first, (int)rows);
    };
    embedding(model.grad[WTE], 0, c.Vp);
    model_fused_update(model, fused, -1, embedding);
}

// ==== twin: update, files
// ---- update
struct Hyper {
    float lr, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0, grad_clip = 0, skip_loss_z = 0, skip_grad_z = 0;
};

// One optimizer step, from the gradients of the step's micro-batches. Returns the verdict: this is the only moment of a step at
// which the host waits for the device. `with_loss`: its targets that have a loss, over all ranks. `meanwhile` is called before that: the
// host can work while the device does.
Verdict model_update(Model& model, const Hyper& h, uint64_t step, double with_loss, const std::function<void()>& meanwhile = nullptr) {
    NvtxRange range("update");
    const std::vector<int> trained = model.plan.fuses() ? std::vector<int>() : model_trained(model);   // that are still to be updated
    world_group(true);
    for (int p : trained) world_reduce_gradient(model.grad[p], param_shape(model.config, p).elements(), model.stream);
    world_group(false);
    const size_t squares = model_opt_blocks(model);
    if (world.sharded) cudaCheck(cudaMemsetAsync(model.squares, 0, squares * sizeof(float), model.stream));
    float* partial = model.squares;
    for (int p : trained) {
        const size_t n = param_shape(model.config, p).elements(), share = world_share(n);
        const int blocks = ceil_div(share, OPT_BLOCK);
        if (world_shards(n))
            square_sum_kernel<<<blocks, 256, 0, model.stream>>>(partial + world.rank * blocks, model.grad[p] + shard_offset(n), share);
        else if (!world.sharded || world.rank == 0)   // with --zero 1 all ranks have the same of this tensor
            square_sum_kernel<<<dim3(blocks, n / share), 256, 0, model.stream>>>(partial, model.grad[p], share);
        cudaCheck(cudaGetLastError());
        partial += opt_blocks(n);
    }
    if (world.sharded) world_sum_floats(model.squares, squares, model.stream);   // x + 0 is x: exact in whatever order
    if (!model.plan.fuses())   // or backward has added them up
        sum_kernel<<<1, 256, 0, model.stream>>>(&model.state->square_sum, model.squares, false, (unsigned)squares);
    cudaCheck(cudaGetLastError());
    world_sum_floats(&model.state->loss_sum, 1, model.stream);
    float loss_scale = 1.0f / (float)with_loss;
    verdict_kernel<<<1, 1, 0, model.stream>>>(model.state, loss_scale, h.grad_clip, h.skip_loss_z, h.skip_grad_z);
    cudaCheck(cudaGetLastError());
    const int updates = model.updates + 1;   // with this one
    AdamW a = {h.lr, h.beta1, h.beta2, h.eps, (float)(1 - pow(h.beta1, updates)), (float)(1 - pow(h.beta2, updates)), model.seed, step};
    for (int p : trained) {
        const ParamShape shape = param_shape(model.config, p);
        const size_t n = shape.elements(), offset = shard_offset(n), share = shard_size(n);
        const OptTensor tensor = {model.param[p] + offset, model.grad[p] + offset, (float*)model.m[p], (float*)model.v[p],
                                  model.master[p], share, offset, shape.decay ? h.weight_decay : 0.0f, (unsigned)p};
        const size_t part = std::min(share, world_share(n));   // of a rank
        const Moments8 moments = {(uint8_t*)model.m[p], (uint8_t*)model.v[p], model.m_absmax[p], model.v_absmax[p], model.q8_maps};
        if (model.m_absmax[p] != nullptr)
            adamw8_kernel<<<dim3(ceil_div(part, OPT_BLOCK), share / part), 256, 0, model.stream>>>(tensor, moments,
                                                                                               &model.state->verdict, a, part);
        else adamw_kernel<<<ceil_div(share, OPT_BLOCK), 256, 0, model.stream>>>(tensor, &model.state->verdict, a);
        cudaCheck(cudaGetLastError());
    }
    world_group(true);
    for (int p : trained) world_gather_param(model.param[p], param_shape(model.config, p).elements(), model.stream);
    world_group(false);
    if (meanwhile) meanwhile();
    Verdict verdict;
    cudaCheck(cudaMemcpyAsync(&verdict, &model.state->verdict, sizeof verdict, cudaMemcpyDeviceToHost, model.stream));
    cudaCheck(cudaStreamSynchronize(model.stream));
    if (!verdict.skip) model.updates++;
    return verdict;
}

// Matmul operations of one token, forward and backward: 6 per weight that multiplies, or 4 where it is frozen and so has no gradient, and
// attention's two products over T/2 keys on average, three times.
double model_flops_per_token(const Model& model, int T) {
    const Config& c = model.config;
    auto each = [&](int p) { return model.plan.trains(p) ? 6.0 : 4.0; };
    double sum = each(head_param(c)) * c.V * c.C;
    for (int p = 0; p < NUM_PARAMS; p++)
        if (const ParamShape s = param_shape(c, p); s.in_layer && s.cols) sum += each(p) * s.elements();
    return sum + 6.0 * c.L * c.NH * c.HS() * (double)T;
}
// Those of a token that --recompute 3 and 4 do again, as a share of the step's: the matmul before the activation; that, those around
// attention, and its forward.
double model_again_share(const Model& model, int T) {
    const Config& c = model.config;
    double sum = recomputes_block(model.plan) ? 2.0 * c.L * c.NH * c.HS() * (double)T : 0;
    for (int i = recomputes_block(model.plan) ? 0 : 2; recomputes_fc(model.plan) && i < 3; i++)
        for (int p : {LINEAR[i], LORA_A + i, LORA_B + i}) sum += 2.0 * param_shape(c, p).elements();
    return model.plan.training ? sum / model_flops_per_token(model, T) : 0;
}

// ==== 8. files ===================================================================================================================
// Models are Hugging Face's directories; tokens and the states of runs are llm.c's files, little-endian, with a header of 256 int32. A
// reader trusts nothing: before it allocates, it compares the magic, the version and all sizes with the real size of the file. A writer
// renames a file from a temporary name when all its bytes are on the disk, so that a name always stands for a whole file. Only regular
// files are replaced.

constexpr int HEADER_INTS = 256;
constexpr size_t HEADER_BYTES = HEADER_INTS * sizeof(int32_t);

size_t file_size(FILE* f) {
    struct stat s;
    return fstat(fileno(f), &s) == 0 ? (size_t)s.st_size : 0;
}
bool is_folder(const char* path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}
std::string real_path(const std::string& path) {   // without links and dots, where there is such a file
    char* found = realpath(path.c_str(), nullptr);
    const std::string text = found ? found : path;
    free(found);
    return text;
}
bool file_exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }
std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// Opens a file and reads its header. Magic 0: the caller checks it. Messages end with `remedy`: what to run for a good file.
FILE* open_with_header(const char* path, void* header, int magic, const char* what, const char* remedy) {
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);   // a pipe would wait for its writer
    struct stat s;
    FILE* f = fd >= 0 && fstat(fd, &s) == 0 ? fdopen(fd, "rb") : nullptr;
    if (f == nullptr) fail("cannot open %s (%s): %s; %s", path, what, strerror(errno), remedy);
    if (!S_ISREG(s.st_mode))
        fail("%s is %s; expected %s in a regular file; %s", path,
             S_ISDIR(s.st_mode) ? "a folder" : S_ISFIFO(s.st_mode) ? "a pipe" : "a device", what, remedy);
    if (fread(header, 1, HEADER_BYTES, f) != HEADER_BYTES)
        fail("%s: expected %s with a header of %zu bytes, found a file of %zu bytes; %s", path, what, HEADER_BYTES, file_size(f),
             remedy);
    const int found = *(const int32_t*)header;
    if (magic != 0 && found != magic) fail("%s: expected %s (magic %d), found magic %d; %s", path, what, magic, found, remedy);
    return f;
}
void read_bytes(FILE* f, const char* path, void* data, size_t bytes) {
    if (fread(data, 1, bytes, f) != bytes) fail("%s: could not be read to its end: %s", path, strerror(errno));
}
// Returns how many of the bytes could be written. If that is not all of them, errno tells why.
size_t write_bytes(int fd, const void* data, size_t bytes) {
    size_t done = 0;
    while (done < bytes) {
        const ssize_t n = write(fd, (const char*)data + done, bytes - done);
        if (n >= 0) done += n;
        else if (errno != EINTR) break;
    }
    return done;
}
void sync_folder(const std::string& folder) {   // a new name is on the disk only after its folder is
    const int fd = open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

// Where a name leads, after all links: to a file, or to nothing yet.
std::string follow_links(std::string path) {
    char link[PATH_MAX];
    for (ssize_t n, links = 0; links < 40 && (n = readlink(path.c_str(), link, sizeof link)) >= 0; links++)   // Linux follows as many
        path = (link[0] == '/' ? "" : folder_of(path) + "/") + std::string(link, n);
    return path;
}
// Writes a file that appears under its name when it is whole. `fill` gives its bytes to put(data, bytes), and is called in any case,
// because other ranks may wait for their part in it. After the first failure nothing more is written and nothing is left. Returns what
// went wrong, or an empty text.
using Put = std::function<void(const void* data, size_t bytes)>;
std::string write_file(const std::string& name, const std::function<void(const Put& put)>& fill) {
    const std::string path = follow_links(name), temporary = path + ".tmp";   // a link stays a link
    auto cannot = [&](const char* what) { return std::string("cannot ") + what + " " + name + ": " + strerror(errno); };
    std::string error;
    struct stat old;
    const bool exists = stat(path.c_str(), &old) == 0;
    int fd = -1;
    if (exists && !S_ISREG(old.st_mode)) {
        error = "cannot write " + name + ": it is no regular file";
    } else {
        unlink(temporary.c_str());   // a killed run may have left it
        fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0) error = cannot("create");
    }
    if (exists && fd >= 0) (void)!fchown(fd, old.st_uid, old.st_gid), fchmod(fd, old.st_mode & 0777);   // only root can give a file away
    fill([&](const void* data, size_t bytes) {
        if (error.empty() && write_bytes(fd, data, bytes) != bytes) error = cannot("write");
    });
    if (fd < 0) return error;
    if (error.empty() && fsync(fd) != 0) error = cannot("write");
    if (close(fd) != 0 && error.empty()) error = cannot("write");
    if (error.empty() && rename(temporary.c_str(), path.c_str()) != 0) error = cannot("rename to");
    if (error.empty()) sync_folder(folder_of(path));
    else unlink(temporary.c_str());
    return error;
}
// Takes a lock, which the kernel releases when this process ends, however it ends. False: another process has it.
bool lock_file(int fd) { return flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

// Brings device memory to a file (out) or back, in pieces of at most 16 MiB. use(data, bytes) writes or reads a piece.
void device_copy(bool out, void* device, size_t bytes, const std::function<void(void* data, size_t bytes)>& use) {
    std::vector<char> piece(std::min(bytes, (size_t)16 << 20));
    for (size_t i = 0; i < bytes; i += piece.size()) {
        const size_t n = std::min(piece.size(), bytes - i);
        if (out) cudaCheck(cudaMemcpy(piece.data(), (char*)device + i, n, cudaMemcpyDeviceToHost));
        use(piece.data(), n);
        if (!out) cudaCheck(cudaMemcpy((char*)device + i, piece.data(), n, cudaMemcpyHostToDevice));
    }
}

double now_seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
std::string duration(double seconds) {
    const long long s = (long long)seconds;
    char text[48];
    snprintf(text, sizeof text, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    return text;
}
// What a long loop shows: on a terminal a line that is written over; elsewhere one line, if the loop will take long.
void progress(const char* doing, size_t done, size_t of, double begin) {
    if (world.rank != 0) return;
    const double took = now_seconds() - begin;
    if (isatty(STDOUT_FILENO)) printf(done < of ? "\r%s %zu/%zu" : "\r\033[K", doing, done + 1, of);
    else if (done == 1 && took * of > 10)
        printf("%s: %zu times %.1f s, done in %s\n", doing, of, took, duration(took * (of - 1)).c_str());
    fflush(stdout);
}

// ---- tokens
// A shard is a file of token ids with 16 or 32 bits each. It is cut into windows of T + 1 tokens: T inputs and, shifted by one,
// their targets, so the last token of a window is the first of the next. Every epoch takes the shards in a new order, and the
// windows of each shard too. Both orders are functions of seed and epoch, so that three numbers are a position in the data.

// Marks of a token (version 8): it is no target of the loss; a document begins with it, and then it is none either.
constexpr uint32_t NO_LOSS = 1u << 31, BEGINS = 1u << 30, ID = BEGINS - 1;
struct TokensHeader { int32_t magic, version; uint32_t tokens; int32_t unused[HEADER_INTS - 3]; };
const char* TOKENS_REMEDY = "make one with: python3 prepro/text.py FILE --out data";

struct Shard {
    std::string path;
    size_t tokens;
    int width;   // bytes per token
    bool marks;  // NO_LOSS and BEGINS stand in the ids
    size_t bytes() const { return HEADER_BYTES + tokens * width; }
};
// `window` windows have been taken from the shard that stands at `shard` in the order of this epoch.
struct Position { size_t shard = 0, window = 0, epoch = 0; };
struct Loader {
    std::vector<Shard> shards;
    int B = 0, T = 0, largest_id = 0;
    bool shuffle = false;
    uint64_t seed = 0, checksum = 0;   // checksum: of all tokens in their order, whatever the files are called
    size_t tokens = 0;                 // in all shards
    double inside = 0;                 // sequences that begin within a document
    Position position;
    size_t current = 0;                // the shard at this position, as an index into shards; and its file
    FILE* file = nullptr;
    std::vector<uint32_t> window_order, ids;   // of that shard; ids: those that were read last
    std::string error;                 // why the data cannot be read any more
    bool marks() const { return std::any_of(shards.begin(), shards.end(), [](auto& s) { return s.marks; }); }
    size_t windows(const Shard& s) const { return (s.tokens - 1) / T; }
    size_t batch_windows() const { return (size_t)B * world.size; }
    size_t batches_left_in_shard() const { return (window_order.size() - position.window) / batch_windows(); }
    size_t batches_per_epoch() const {
        size_t n = 0;
        for (const Shard& s : shards) n += windows(s) / batch_windows();
        return n;
    }
};

// Opens a shard, if it is what it was when its header was checked.
void loader_open_shard(Loader& d, size_t i) {
    const Shard& s = d.shards[d.current = i];
    if (d.file != nullptr) fclose(d.file);
    const int fd = open(s.path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    d.file = fd >= 0 ? fdopen(fd, "rb") : nullptr;
    if (d.file != nullptr && file_size(d.file) == s.bytes()) return;
    d.error = s.path + ": was a file of " + std::to_string(s.bytes()) + " bytes when this run began, and is no more";
    if (d.file != nullptr) fclose(std::exchange(d.file, nullptr));
}
// Reads tokens [first, first + n) of the open shard into d.ids. False: that is not possible any more, and d.error says why. A
// shard is not mapped: if somebody truncates it meanwhile, reading fails, but a mapping would end this process with a signal.
bool loader_read(Loader& d, size_t first, size_t n) {
    if (d.file == nullptr) return false;
    static std::vector<char> raw;
    const Shard& s = d.shards[d.current];
    raw.resize(n * s.width);
    if (fseeko(d.file, HEADER_BYTES + first * s.width, SEEK_SET) != 0 || fread(raw.data(), 1, raw.size(), d.file) != raw.size()) {
        const char* why = feof(d.file) ? "it was cut off while this run read it" : strerror(errno);
        return d.error = s.path + ": cannot read it to its end: " + why, false;
    }
    d.ids.resize(n);
    if (s.width == 2) std::copy_n((const uint16_t*)raw.data(), n, d.ids.begin());
    else std::copy_n((const uint32_t*)raw.data(), n, d.ids.begin());
    return true;
}
// Looks at all ids of a shard before a run begins: one of V or more would read memory beyond wte. Returns a checksum of the ids.
uint64_t loader_check_ids(Loader& d, size_t shard, int V) {
    constexpr size_t CHUNK = 1 << 20;
    const Shard& s = d.shards[shard];
    loader_open_shard(d, shard);
    uint64_t sum = s.tokens;
    for (size_t i = 0; i < s.tokens; i += CHUNK) {
        if (!loader_read(d, i, std::min(CHUNK, s.tokens - i))) fail("%s; %s", d.error.c_str(), TOKENS_REMEDY);
        for (const uint32_t& raw : d.ids) {
            const uint32_t id = s.marks ? raw & ID : raw;
            const size_t at = i + (&raw - d.ids.data());
            d.inside += s.marks && !(raw & BEGINS) && at % d.T == 0 && at / d.T < d.windows(s);
            sum = (sum + raw) * 0x9e3779b97f4a7c15ull;
            d.largest_id = std::max(d.largest_id, (int)id);
            if (id >= (uint32_t)V)
                fail("%s: token %zu has id %u, but the model's vocabulary is %d (expected ids 0 to %d); make the tokens with the "
                     "model's tokenizer (prepro/text.py --tokenizer), or take a model with V%u or more (-e)",
                     s.path.c_str(), at, id, V, V - 1, id + 1);
        }
    }
    return sum;
}

std::vector<uint32_t> shuffled(size_t n, bool shuffle, uint64_t seed, uint64_t stream) {
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = n; shuffle && i > 1; i--) std::swap(order[i - 1], order[hash64(seed, stream, i) % i]);   // Fisher, Yates
    return order;
}
void loader_seek(Loader& d, size_t epoch, size_t shard, size_t window) {
    d.position = {shard, window, epoch};
    loader_open_shard(d, shuffled(d.shards.size(), d.shuffle, d.seed, 2 * epoch + (1ull << 40))[shard]);
    const size_t windows = d.windows(d.shards[d.current]);
    d.window_order = shuffled(windows, d.shuffle, d.seed, ((epoch * d.shards.size() + shard) << 1) + 1 + (1ull << 41));
}

// What a name on the command line stands for: the file with exactly that name, or else the files that match it as a pattern. If
// its folder exists, that part is no pattern. Sorted, so that every rank and every run sees one order.
std::vector<std::string> files_named(const std::string& name) {
    if (file_exists(name)) return {name};
    const size_t slash = name.rfind('/');
    const size_t literal = slash != std::string::npos && is_folder(folder_of(name).c_str()) ? slash : 0;
    std::string pattern;
    for (size_t i = 0; i < name.size(); i++)
        pattern += (i < literal && strchr("[]*?~\\", name[i]) ? "\\" : "") + name.substr(i, 1);
    glob_t found = {};
    std::vector<std::string> names;
    if (glob(pattern.c_str(), GLOB_TILDE, nullptr, &found) == 0) names.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    return names;
}
Shard shard_check_header(const char* path) {
    TokensHeader h;
    FILE* f = open_with_header(path, &h, 0, "tokens", TOKENS_REMEDY);
    const size_t size = file_size(f);
    fclose(f);
    const bool marks = h.magic == 20240801 && h.version == 8;
    const int width = h.magic == 20240520 && h.version == 1 ? 2 : (h.magic == 20240801 && h.version == 7) || marks ? 4 : 0;
    const Shard s = {path, h.tokens, width, marks};
    if (width == 0)
        fail("%s: expected tokens (magic 20240520 version 1, or magic 20240801 version 7 or 8), found magic %d version %d; %s", path,
             h.magic, h.version, TOKENS_REMEDY);
    if (size != s.bytes())
        fail("%s: its header announces %zu tokens of %d bytes, so expected a file of %zu bytes, found %zu; it is damaged or was "
             "cut off: %s", path, s.tokens, width, s.bytes(), size, TOKENS_REMEDY);
    if (s.tokens < 2) fail("%s: expected a token and the one after it, its target, found %zu; %s", path, s.tokens, TOKENS_REMEDY);
    return s;
}
// Finds the shards and checks them. `option` is what the user typed before `pattern`.
void loader_open(Loader& d, const char* option, const char* pattern, int T, int V, bool shuffle, uint64_t seed) {
    d.T = T, d.shuffle = shuffle, d.seed = seed;
    const std::vector<std::string> names = files_named(pattern);
    for (const std::string& name : names) {
        if (is_folder(name.c_str())) continue;
        d.shards.push_back(shard_check_header(name.c_str()));
        d.tokens += d.shards.back().tokens;
    }
    if (d.shards.empty())
        fail("%s %s: %s; %s", option, pattern, names.empty() ? "no such file, and none matches it as a pattern" : "is a folder",
             TOKENS_REMEDY);
    double sum = 0, begin = now_seconds();
    for (size_t i = world.rank; i < d.shards.size(); i += world.size) {   // the ranks share the work
        progress("reading shards", i, d.shards.size(), begin);
        sum += (double)(hash64(loader_check_ids(d, i, V), 0, i) >> 32);   // a double holds the sum of 2^21 of these exactly
    }
    progress("", d.shards.size(), d.shards.size(), begin);
    d.checksum = (uint64_t)world_sum(sum);
    d.largest_id = -(int)world_min(-d.largest_id);
    d.inside = world_sum(d.inside);
}
// The largest batch per GPU that every shard can fill; at least 1, because loader_set_batch refuses what fills none.
size_t loader_largest_batch(const Loader& d) {
    size_t least = SIZE_MAX;
    for (const Shard& s : d.shards) least = std::min(least, d.windows(s) / world.size);
    return std::max<size_t>(least, 1);
}
void loader_set_batch(Loader& d, int B) {
    d.B = B;
    for (const Shard& s : d.shards)
        if (d.windows(s) < d.batch_windows())
            fail("%s: its %zu tokens make %zu sequences of %d, but a batch takes %zu (%d on each of %d GPUs); take a smaller -b%s, or more "
                 "text", s.path.c_str(), s.tokens, d.windows(s), d.T, d.batch_windows(), B, world.size,
                 s.marks ? "" : " or -t");   // rows were packed for this -t
    loader_seek(d, 0, 0, 0);
}
void loader_close(Loader& d) {
    if (d.file != nullptr) fclose(d.file);
    d = Loader();
}
// This rank's rows of the next batch. False: they cannot be read any more, and `error` says why.
// (B, T) each; documents: as in token_ints, or null: not wanted
bool loader_next(Loader& d, int* inputs, int* targets, int* documents) {
    Position& at = d.position;
    while (at.window + d.batch_windows() > d.window_order.size()) {   // windows that fill no batch are left out of this epoch
        const bool last = at.shard + 1 == d.shards.size();
        loader_seek(d, at.epoch + last, last ? 0 : at.shard + 1, 0);
    }
    for (int b = 0; b < d.B; b++) {
        const size_t window = d.window_order[at.window + (size_t)world.rank * d.B + b];
        if (!loader_read(d, window * d.T, d.T + 1)) return false;
        const bool marks = d.shards[d.current].marks;
        for (int t = 0, begin = 0; t <= d.T; t++) {
            const uint32_t raw = d.ids[t], id = marks ? raw & ID : raw;
            const size_t at = (size_t)b * d.T + t;
            if (id > (uint32_t)d.largest_id) return d.error = d.shards[d.current].path + ": was written to since this run began", false;
            if (t > 0) targets[at - 1] = marks && (raw & (NO_LOSS | BEGINS)) ? NO_TARGET : (int)id;
            if (t == d.T) break;
            inputs[at] = (int)id;
            if (marks && (raw & BEGINS)) begin = t;
            if (documents != nullptr) documents[at] = begin;
        }
    }
    at.window += d.batch_windows();
    return true;
}
// `host` has the layout of token_ints, with inputs and targets filled in. Adds the positions of the inputs, sorted by token, for
// the embedding's backward. The host has time for that while the GPU works on the step before. Returns how many tokens occur.
int tokens_sort(int* host, int BT, int V) {
    static std::vector<int> count;
    count.assign(V + 1, 0);
    const int* inputs = host;
    int* positions = host + 2 * (size_t)BT;
    int* bucket_token = positions + BT;
    int* bucket_start = bucket_token + std::min(BT, V);
    for (int i = 0; i < BT; i++) count[inputs[i] + 1]++;
    std::partial_sum(count.begin(), count.end(), count.begin());   // where the positions of each token begin
    int buckets = 0;
    for (int token = 0; token < V; token++) {
        if (count[token] == count[token + 1]) continue;
        bucket_token[buckets] = token;
        bucket_start[buckets++] = count[token];
    }
    bucket_start[buckets] = BT;
    for (int i = 0; i < BT; i++) positions[count[inputs[i]]++] = i;
    return buckets;
}
// `host` is pinned memory, so that the copy waits for nothing. It must not change before the next synchronisation.
void tokens_copy(int* device, const int* host, int BT, int V, int buckets, cudaStream_t stream) {
    const size_t ints = 3 * (size_t)BT + std::min(BT, V) + buckets + 1;
    cudaCheck(cudaMemcpyAsync(device, host, ints * sizeof(int), cudaMemcpyHostToDevice, stream));
}
int tokens_upload(int* device, int* host, int BT, int V, cudaStream_t stream) {
    const int buckets = tokens_sort(host, BT, V);
    tokens_copy(device, host, BT, V, buckets, stream);
    return buckets;
}

// A micro-batch's tokens to the device. Of an embedding on the host, the rows that they name too: straight into the residual stream.
void model_tokens(Model& model, const int* host, int BT, int buckets) {
    const size_t C = model.config.C;
    const size_t documents = documents_at(BT, model.config.V);
    tokens_copy(model.tokens, host, BT, model.config.V, buckets, model.stream);
    if (model.plan.marks)
        cudaCheck(cudaMemcpyAsync(model.tokens + documents, host + documents, BT * sizeof(int), cudaMemcpyHostToDevice, model.stream));
    if (!model.plan.host_wte) return;
    const int turn = model.wte_turn ^= 1;
    floatX* rows = model.wte_rows + turn * (size_t)model.plan.B * model.plan.T * C;
    cudaCheck(cudaEventSynchronize(model.wte_copied[turn]));   // of the one before the last
    for (int i = 0; i < BT; i++) memcpy(rows + i * C, model.host_wte + host[i] * C, C * sizeof(floatX));
    cudaCheck(cudaMemcpyAsync(model.resid_in, rows, BT * C * sizeof(floatX), cudaMemcpyHostToDevice, model.stream));
    cudaCheck(cudaEventRecord(model.wte_copied[turn], model.stream));
}

// ---- text
struct TokenizerHeader { int32_t magic, version, tokens, end_of_text, unused[HEADER_INTS - 4]; };
struct Tokenizer {
    std::vector<std::string> tokens;
    int end_of_text = 0;
    bool after_cr = false;   // the last character printed was a \r
};
bool tokenizer_load(Tokenizer& t, const char* path) {   // false: there is none
    if (!file_exists(path)) return false;
    const char* remedy = "prepro/text.py writes one beside its token files";
    TokenizerHeader h;
    FILE* f = open_with_header(path, &h, 20240328, "a tokenizer", remedy);
    if (h.version != 2 || h.tokens <= 0 || (size_t)h.tokens > file_size(f) || h.end_of_text < 0 || h.end_of_text >= h.tokens)
        fail("%s: expected a tokenizer of version 2, found version %d, %d tokens, of which the end of text is number %d; %s", path,
             h.version, h.tokens, h.end_of_text, remedy);
    t.end_of_text = h.end_of_text;
    for (int i = 0; i < h.tokens; i++) {   // a byte for the length, then the token
        const int length = fgetc(f);
        std::string s(std::max(length, 0), '\0');
        if (length < 0 || fread(&s[0], 1, s.size(), f) != s.size())
            fail("%s: expected %d tokens, the file ends within token %d; %s", path, h.tokens, i, remedy);
        t.tokens.push_back(s);
    }
    fclose(f);
    return true;
}
void print_token(Tokenizer& t, int id) {
    if (t.tokens.empty()) {
        printf("%d ", id);
    } else if (id == t.end_of_text) {
        printf("\n");
    } else if (id < (int)t.tokens.size()) {
        for (unsigned char c : t.tokens[id]) {   // a control character could do anything to a terminal
            if (c == '\n' && t.after_cr) c = 0;   // \r, \n and \r\n each end one line
            t.after_cr = c == '\r';
            if (t.after_cr) c = '\n';
            if (c >= 32 ? c != 127 : c == '\n' || c == '\t') putchar(c);
        }
    }
}

// ---- log: one JSON object per line
struct Log {
    int fd = -1;
    std::string path, waiting;   // lines that could not be written yet
    bool said = false;
    int val_step = -1;           // of the last validation in it
};
std::string json_number(double x) {   // JSON has no NaN
    char s[32];
    snprintf(s, sizeof s, "%.9g", x);
    return isfinite(x) ? s : "null";
}
// A log that cannot be written is no reason to lose a run. Its lines wait, and are written with a later one.
void log_flush(Log& log) {
    log.waiting.erase(0, write_bytes(log.fd, log.waiting.data(), log.waiting.size()));
    if (log.waiting.empty() || log.said || errno == EAGAIN) return;   // EAGAIN: the reader of a FIFO is slow
    warn("cannot write %s: %s; training goes on, and the lines wait", log.path.c_str(), strerror(errno));
    log.said = true;
}
__attribute__((format(printf, 2, 3))) void log_line(Log& log, const char* format, ...) {
    if (log.fd < 0) return;
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    log.waiting += std::string(line) + '\n';
    log_flush(log);
}
bool log_close(Log& log) {   // false: lines are missing
    if (log.fd < 0) return true;
    fcntl(log.fd, F_SETFL, fcntl(log.fd, F_GETFL) & ~O_NONBLOCK);   // the last lines may wait for their reader
    log_flush(log);
    if (close(log.fd) == 0 && log.waiting.empty()) return true;
    warn("the last lines of %s could not be written", log.path.c_str());
    return false;
}
// ---- JSON (RFC 8259), as far as the files of a model need it
//
// A value is read whole into a tree. Numbers stay text until somebody asks for one. A name that stands twice in an object is an
// error: readers disagree about which of the two counts.

struct Json {
    enum Type { ABSENT, JSON_NULL, BOOLEAN, NUMBER, STRING, ARRAY, OBJECT } type = ABSENT;
    std::string text;                    // of a number or string (UTF-8); "true" or "false"
    std::vector<std::string> names;      // of an object's members, in the order of the file
    std::vector<Json> values;            // an object's members, an array's elements

    const Json& operator[](const std::string& name) const {   // ABSENT where there is no such member
        static const Json absent;
        const size_t i = std::find(names.begin(), names.end(), name) - names.begin();
        return type == OBJECT && i < names.size() ? values[i] : absent;
    }
    Json& set(const std::string& name, Json value) {   // in place of the member of that name, or as a new one
        const size_t i = std::find(names.begin(), names.end(), name) - names.begin();
        if (i == names.size()) names.push_back(name), values.emplace_back();
        return values[i] = std::move(value);
    }
};
Json json_object() { Json j; j.type = Json::OBJECT; return j; }
Json json_string(const std::string& s) { Json j; j.type = Json::STRING, j.text = s; return j; }
Json json_sizes(const std::vector<size_t>& sizes) {
    Json j;
    j.type = Json::ARRAY;
    for (size_t n : sizes) j.values.emplace_back(), j.values.back().type = Json::NUMBER, j.values.back().text = std::to_string(n);
    return j;
}
Json json_bool(bool b) { Json j; j.type = Json::BOOLEAN, j.text = b ? "true" : "false"; return j; }
Json json_number_value(float x) {   // the shortest text that reads back as the same number; 1e-05 as Python writes it
    char s[40];
    for (int digits = 1; digits <= 9; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, x);
        if (strtof(s, nullptr) == x) break;
    }
    Json j;
    j.type = Json::NUMBER, j.text = s;
    return j;
}

struct JsonReader {
    const char *begin, *at, *end;
    std::string error;   // the first one, with its place; after it nothing more is read

    bool wrong(const char* expected) {
        if (error.empty()) error = std::string("expected ") + expected + " at byte " + std::to_string(at - begin);
        return false;
    }
    void blanks() {
        while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) at++;
    }
    bool take(char c) {
        blanks();
        return at < end && *at == c ? at++, true : false;
    }
    bool word(const char* w) {
        const size_t n = strlen(w);
        return (size_t)(end - at) >= n && memcmp(at, w, n) == 0 ? at += n, true : false;
    }
    bool digits() {
        const char* first = at;
        while (at < end && *at >= '0' && *at <= '9') at++;
        return at > first;
    }
    bool hex(unsigned& u) {   // of \u0041
        u = 0;
        for (int i = 0; i < 4; i++, at++) {
            if (at >= end || !isxdigit((unsigned char)*at)) return wrong("four hexadecimal digits");
            u = u * 16 + (*at <= '9' ? *at - '0' : (*at | 32) - 'a' + 10);
        }
        return true;
    }
    bool string(std::string& s) {   // after its opening quote
        while (at < end && *at != '"') {
            const unsigned char c = *at++;
            if (c < 32) return at--, wrong("no control character in a string");
            if (c != '\\') {
                s += (char)c;
                continue;
            }
            if (at >= end) break;
            const char *escapes = "\"\\/bfnrt", *meaning = "\"\\/\b\f\n\r\t", e = *at++;
            if (e != 'u') {
                const char* found = e ? strchr(escapes, e) : nullptr;
                if (found == nullptr) return at--, wrong("an escape that JSON knows");
                s += meaning[found - escapes];
                continue;
            }
            unsigned u, low;
            if (!hex(u)) return false;
            if (u >= 0xdc00 && u < 0xe000) return wrong("a surrogate's first half before its second");
            if (u >= 0xd800 && u < 0xdc00) {   // two of them are one character beyond 0xffff
                if (!word("\\u") || !hex(low) || low < 0xdc00 || low >= 0xe000) return wrong("the second half of a surrogate");
                u = 0x10000 + ((u - 0xd800) << 10) + (low - 0xdc00);
            }
            const int more = u < 0x80 ? 0 : u < 0x800 ? 1 : u < 0x10000 ? 2 : 3;   // bytes of UTF-8 after the first
            s += (char)(more == 0 ? u : (0xff00 >> (more + 1) & 0xff) | u >> 6 * more);
            for (int i = more - 1; i >= 0; i--) s += (char)(0x80 | (u >> 6 * i & 63));
        }
        return at < end ? at++, true : wrong("the end of the string");
    }
    bool value(Json& j, int depth) {
        blanks();
        if (at >= end) return wrong("a value");
        if (depth > 64) return wrong("no more than 64 levels");
        const char* first = at;
        if (take('{')) {
            j.type = Json::OBJECT;
            if (take('}')) return true;
            do {
                std::string name;
                if (!take('"')) return wrong("a name in quotes");
                if (!string(name)) return false;
                if (!take(':')) return wrong("a colon");
                j.names.push_back(name), j.values.emplace_back();
                if (!value(j.values.back(), depth + 1)) return false;
            } while (take(','));
            if (!take('}')) return wrong("a comma or }");
            std::vector<std::string> sorted = j.names;
            std::sort(sorted.begin(), sorted.end());
            const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
            return twice == sorted.end() || wrong(("the name " + *twice + " only once before").c_str());
        }
        if (take('[')) {
            j.type = Json::ARRAY;
            if (take(']')) return true;
            do {
                j.values.emplace_back();
                if (!value(j.values.back(), depth + 1)) return false;
            } while (take(','));
            return take(']') || wrong("a comma or ]");
        }
        if (take('"')) return j.type = Json::STRING, string(j.text);
        if (word("true") || word("false")) return j.type = Json::BOOLEAN, j.text.assign(first, at), true;
        if (word("null")) return j.type = Json::JSON_NULL, true;
        word("-");
        if (!word("0") && !digits()) return at = first, wrong("a value");
        if (word(".") && !digits()) return wrong("a digit");
        if (word("e") || word("E")) {
            if (!word("+")) word("-");
            if (!digits()) return wrong("a digit");
        }
        return j.type = Json::NUMBER, j.text.assign(first, at), true;
    }
};
// Reads a whole text. False: `error` says what was expected, and where.
bool json_read(Json& j, const char* text, size_t bytes, std::string& error) {
    JsonReader r = {text, text, text + bytes, ""};
    if (r.value(j, 0) && (r.blanks(), r.at < r.end)) r.wrong("nothing more");
    error = r.error;
    return error.empty();
}
void json_append_string(std::string& out, const std::string& s) {
    out += '"';
    for (unsigned char c : s) {
        char escaped[8];
        if (c < 32) snprintf(escaped, sizeof escaped, "\\u%04x", c), out += escaped;
        else (c == '"' || c == '\\' ? out += '\\' : out) += (char)c;
    }
    out += '"';
}
// As text, two blanks to a level; one line if `indent` is negative.
void json_append(std::string& out, const Json& j, int indent) {
    const bool object = j.type == Json::OBJECT, lines = indent >= 0 && !j.values.empty() && object;
    if (j.type == Json::STRING) return json_append_string(out, j.text);
    if (j.type < Json::ARRAY) return void(out += j.type <= Json::JSON_NULL ? "null" : j.text);
    out += object ? '{' : '[';
    for (size_t i = 0; i < j.values.size(); i++) {
        out += i == 0 ? "" : lines ? "," : ", ";
        if (lines) out += '\n' + std::string(2 * (indent + 1), ' ');
        if (object) json_append_string(out, j.names[i]), out += ": ";
        json_append(out, j.values[i], lines ? indent + 1 : -1);
    }
    if (lines) out += '\n' + std::string(2 * indent, ' ');
    out += object ? '}' : ']';
}

// ---- safetensors: 8 bytes that count the bytes of a JSON header, the header, the elements of one tensor after another
//
// A reader trusts nothing: every shape and offset is checked against the bytes that are there before anything is allocated for it.
// The format knows no gaps and no overlaps, so that a file has one meaning.

std::string shape_text(const std::vector<size_t>& shape) {
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
}
struct SafeTensor {
    std::string name, file, type;
    DType dtype;                 // F32, BF16 or F16: what can be loaded. BYTE: any other
    std::vector<size_t> shape;
    size_t begin, end;           // bytes in the file
};
bool json_size(const Json& j, size_t& n) {   // a whole number below 2^53
    const bool digits = j.type == Json::NUMBER && j.text.size() <= 16 && j.text.find_first_not_of("0123456789") == std::string::npos;
    n = digits ? strtoull(j.text.c_str(), nullptr, 10) : 0;
    return digits && n < (size_t)1 << 53;
}
// The tensors of a file, from its header and the bytes after it. Returns what is wrong, or an empty text.
std::string safetensors_parse(std::vector<SafeTensor>& tensors, const char* header, size_t bytes, size_t data_bytes,
                              Json* metadata = nullptr) {
    static const struct { const char* name; size_t size; DType dtype; } types[] = {
        {"F32", 4, F32}, {"BF16", 2, BF16}, {"F16", 2, F16}, {"F64", 8, BYTE}, {"I64", 8, BYTE}, {"U64", 8, BYTE}, {"I32", 4, BYTE},
        {"U32", 4, BYTE}, {"I16", 2, BYTE}, {"U16", 2, BYTE}, {"I8", 1, BYTE}, {"U8", 1, BYTE}, {"BOOL", 1, BYTE},
        {"F8_E4M3", 1, BYTE}, {"F8_E5M2", 1, BYTE}};
    Json root;
    std::string error;
    if (!json_read(root, header, bytes, error)) return "its header is no JSON: " + error;
    if (root.type != Json::OBJECT) return "its header is no JSON object";
    for (size_t i = 0; i < root.names.size(); i++) {
        const Json& j = root.values[i];
        if (root.names[i] == "__metadata__") {
            if (metadata != nullptr) *metadata = j;
            continue;
        }
        const std::string tensor = "tensor " + root.names[i];
        SafeTensor t = {root.names[i], "", j["dtype"].text, BYTE, {}, 0, 0};
        const auto type = std::find_if(std::begin(types), std::end(types), [&](auto& known) { return known.name == j["dtype"].text; });
        if (j["dtype"].type != Json::STRING || type == std::end(types))
            return tensor + ": unknown type of elements '" + j["dtype"].text + "'";
        t.dtype = type->dtype;
        size_t size = type->size;
        if (j["shape"].type != Json::ARRAY) return tensor + ": expected a shape, a list of whole numbers";
        for (const Json& dimension : j["shape"].values) {
            size_t n;
            if (!json_size(dimension, n)) return tensor + ": expected a shape, a list of whole numbers";
            if (__builtin_mul_overflow(size, n, &size)) return tensor + ": a shape of more than 2^64 bytes";
            t.shape.push_back(n);
        }
        const std::vector<Json>& offsets = j["data_offsets"].values;
        if (j["data_offsets"].type != Json::ARRAY || offsets.size() != 2 || !json_size(offsets[0], t.begin) ||
            !json_size(offsets[1], t.end))
            return tensor + ": expected data_offsets, two whole numbers";
        if (t.begin > t.end || t.end > data_bytes)
            return tensor + ": is at bytes " + offsets[0].text + " to " + offsets[1].text + ", but the file has " +
                   std::to_string(data_bytes) + " bytes of elements; it is damaged or was cut off";
        if (t.end - t.begin != size)
            return tensor + ": a shape of " + shape_text(t.shape) + " takes " + std::to_string(size) + " bytes, but it has " +
                   std::to_string(t.end - t.begin);
        tensors.push_back(t);
    }
    std::sort(tensors.begin(), tensors.end(), [](const SafeTensor& a, const SafeTensor& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    size_t at = 0;
    for (SafeTensor& t : tensors) {
        if (t.begin != at)
            return "tensor " + t.name + ": begins at byte " + std::to_string(t.begin) + ", where the one before ends at " +
                   std::to_string(at);
        at = t.end;
        t.begin += 8 + bytes, t.end += 8 + bytes;
    }
    return at == data_bytes ? "" : "after its last tensor come " + std::to_string(data_bytes - at) + " more bytes";
}

// IEEE's 16-bit floats: 1 sign, 5 exponent, 10 mantissa
inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    const float value = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent == 0 ? ldexpf((float)mantissa, -24)
                                       : ldexpf((float)(1024 + mantissa), (int)exponent - 25);
    return sign ? -value : value;
}
inline uint16_t half_from_float(float f) {   // to the nearest, ties to even
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    if (f != f) return sign | 0x7e00;
    const float x = fabsf(f);
    if (x >= 65520) return sign | 0x7c00;                                     // halfway to 2^16 and beyond: infinity
    if (x < 0x1p-14f) return sign | (uint16_t)nearbyintf(ldexpf(x, 24));      // subnormal: a multiple of 2^-24
    int exponent;
    const float mantissa = nearbyintf(ldexpf(frexpf(x, &exponent), 11));      // 1024 to 2048, the latter of the next exponent
    return sign | (uint16_t)(((exponent + 13) << 10) + (int)mantissa);
}

// ---- a model's directory, in Hugging Face's format: config.json, and model.safetensors or shards with an index

struct HfModel {
    std::string folder;
    Json config;
    std::vector<SafeTensor> tensors;   // by name, ascending

    const SafeTensor* find(const std::string& name) const {
        const auto at = std::lower_bound(tensors.begin(), tensors.end(), name,
                                         [](const SafeTensor& t, const std::string& n) { return t.name < n; });
        return at != tensors.end() && at->name == name ? &*at : nullptr;
    }
};
constexpr size_t HEADER_MOST = (size_t)16 << 20;   // of JSON, which may take 60 times that in memory; 100,000 tensors have 10 MiB
const char* HF_REMEDY = "expected a model's directory as transformers writes it: config.json and model.safetensors (one that stands on a hub: "
                        "huggingface-cli download NAME --local-dir DIR; one of ours: OUT/step_...)";

// The bytes of a small file.
std::string read_text(const std::string& path, size_t most) {
    const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat s;
    if (fd < 0 || fstat(fd, &s) != 0) fail("cannot open %s: %s; %s", path.c_str(), strerror(errno), HF_REMEDY);
    if (!S_ISREG(s.st_mode) || (size_t)s.st_size > most)
        fail("%s: expected a regular file of at most %zu bytes, found %s; %s", path.c_str(), most,
             S_ISREG(s.st_mode) ? std::to_string(s.st_size).c_str() : "something else", HF_REMEDY);
    std::string text(s.st_size, '\0');
    size_t n = 0;
    for (ssize_t got; n < text.size() && (got = pread(fd, &text[n], text.size() - n, n)) > 0;) n += got;
    close(fd);
    if (n != text.size()) fail("%s: could not be read to its end", path.c_str());
    return text;
}
Json read_json(const std::string& path) {
    const std::string text = read_text(path, HEADER_MOST);
    Json j;
    std::string error;
    if (!json_read(j, text.data(), text.size(), error)) fail("%s: is no JSON: %s", path.c_str(), error.c_str());
    if (j.type != Json::OBJECT) fail("%s: expected a JSON object", path.c_str());
    return j;
}
// The header of a file of tensors.
std::vector<SafeTensor> safetensors_open(const std::string& path, Json* metadata = nullptr) {
    const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat s;
    if (fd < 0 || fstat(fd, &s) != 0) fail("cannot open %s: %s; %s", path.c_str(), strerror(errno), HF_REMEDY);
    if (!S_ISREG(s.st_mode)) fail("%s: expected a regular file; %s", path.c_str(), HF_REMEDY);
    uint64_t bytes = 0;
    const size_t size = s.st_size;
    if (pread(fd, &bytes, 8, 0) != 8 || bytes > HEADER_MOST || bytes + 8 > size)
        fail("%s: expected safetensors, 8 bytes that count a header of at most 16 MiB and the header, found a file of %zu bytes "
             "that counts %zu; it is damaged or was cut off", path.c_str(), size, (size_t)bytes);
    std::string header(bytes, '\0');
    if (pread(fd, &header[0], bytes, 8) != (ssize_t)bytes) fail("%s: its header could not be read", path.c_str());
    close(fd);
    std::vector<SafeTensor> tensors;
    const std::string error = safetensors_parse(tensors, header.data(), bytes, size - 8 - bytes, metadata);
    if (!error.empty()) fail("%s: %s", path.c_str(), error.c_str());
    for (SafeTensor& t : tensors) t.file = path;
    return tensors;
}
// Reads the config and all headers. No weight is read yet.
HfModel hf_open(const std::string& folder) {
    HfModel m;
    m.folder = folder;
    m.config = read_json(folder + "/config.json");
    const std::string single = folder + "/model.safetensors", index = single + ".index.json";
    if (file_exists(index) && !file_exists(single)) {
        const Json map = read_json(index)["weight_map"];
        std::map<std::string, std::string> file_of;
        std::vector<std::string> files;
        if (map.type != Json::OBJECT || map.values.empty())
            fail("%s: expected a weight_map, which names the file of each tensor", index.c_str());
        for (const Json& file : map.values) {
            if (file.type != Json::STRING || file.text.empty() || file.text.find_first_of(std::string("/\0", 2)) != std::string::npos)
                fail("%s: expected names of files in the same directory, found '%s'", index.c_str(), file.text.c_str());
            files.push_back(file.text);
        }
        for (size_t i = 0; i < map.names.size(); i++) file_of[map.names[i]] = map.values[i].text;
        std::sort(files.begin(), files.end());
        files.erase(std::unique(files.begin(), files.end()), files.end());
        for (const std::string& file : files)
            for (const SafeTensor& t : safetensors_open(folder + "/" + file))
                if (const auto at = file_of.find(t.name); at != file_of.end() && at->second == file) {
                    m.tensors.push_back(t);
                    file_of.erase(at);
                }
        if (!file_of.empty())
            fail("%s: tensor %s should be in %s, but is not", index.c_str(), file_of.begin()->first.c_str(),
                 file_of.begin()->second.c_str());
    } else {
        m.tensors = safetensors_open(single);
    }
    std::sort(m.tensors.begin(), m.tensors.end(), [](const SafeTensor& a, const SafeTensor& b) { return a.name < b.name; });
    return m;
}
// Elements of a type as floats, and back: rounded to the nearest.
void load_as(DType type, float* to, const char* from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        if (type == F32) memcpy(&to[i], from + 4 * i, 4);
        else memcpy(&h, from + 2 * i, 2), to[i] = type == F16 ? half_to_float(h) : (float)__ushort_as_bfloat16(h);
    }
}
void store_as(DType type, char* to, const float* from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const uint16_t h = type == F16 ? half_from_float(from[i]) : __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
        if (type == F32) memcpy(to + 4 * i, &from[i], 4);
        else memcpy(to + 2 * i, &h, 2);
    }
}
// Elements [first, first + n) of a tensor, as floats.
void safetensors_read(const SafeTensor& t, size_t first, size_t n, float* out) {
    const size_t size = dtype_size(t.dtype);
    static std::string open_path;   // the file that was read last stays open
    static int fd = -1;
    if (open_path != t.file) {
        if (fd >= 0) close(fd);
        open_path = t.file;
        fd = open(t.file.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) fail("cannot open %s again: %s", t.file.c_str(), strerror(errno));
    }
    std::vector<char> raw(n * size);
    size_t done = 0;
    errno = 0;
    for (ssize_t got; done < raw.size() && (got = pread(fd, &raw[done], raw.size() - done, t.begin + first * size + done)) > 0;)
        done += got;
    if (done != raw.size()) fail("%s: tensor %s could not be read: %s", t.file.c_str(), t.name.c_str(),
                                  errno ? strerror(errno) : "the file is shorter than it was");
    load_as(t.dtype, out, raw.data(), n);
}

// Of each model, below: names that are no weights of it, names as they should be, and its config.json.
bool hf_ignores(const Config& c, const std::string& name);
void hf_complete_names(HfModel& m);
void hf_config_json(const Config& c, Json& j);
// ---- a model's weights to and from its directory
// A piece is a tensor of a file, and some rows of one of our parameters: Hugging Face keeps q, k and v apart where we have one weight,
// and GPT-2's weights (Conv1D) lie transposed in it. hf_pieces (below, of each model) lists a parameter's pieces in the order of rows.
struct HfPiece {
    std::string name;
    size_t rows, cols;        // of ours; cols 0: a vector, rows 0: one number
    bool transposed = false;  // in the file, (cols, rows)
    size_t elements() const { return std::max<size_t>(rows, 1) * std::max<size_t>(cols, 1); }
    std::vector<size_t> shape() const {
        std::vector<size_t> shape;
        if (rows > 0) shape.push_back(rows);
        if (cols > 0) shape.push_back(cols);
        if (transposed) std::swap(shape[0], shape[1]);
        return shape;
    }
};
constexpr size_t PIECE = (size_t)1 << 20;   // elements that are on the host at a time; a transposed tensor is there as a whole
std::vector<HfPiece> hf_pieces(const Config& c, int p, int layer);   // layer -1: of a tensor outside the blocks
// Calls f(parameter, its first element, piece) for all of a model.
void hf_walk(const Config& c, const std::function<void(int p, size_t first, const HfPiece& piece)>& f) {
    for (int layer = -1; layer < c.L; layer++)
        for (int p = 0; p < LORA_A; p++) {
            const ParamShape s = param_shape(c, p);
            if (s.in_layer != (layer >= 0) || s.elements() == 0) continue;
            size_t first = layer >= 0 ? layer * s.per_layer() : 0;
            for (const HfPiece& piece : hf_pieces(c, p, layer)) f(p, first, piece), first += piece.elements();
        }
}
std::vector<Span> param_spans(const Config& c, int p) {
    std::vector<Span> spans;
    size_t first = 0;
    for (const HfPiece& piece : hf_pieces(c, p, base_shape(c, p).in_layer ? 0 : -1)) {
        spans.push_back({first, piece.cols ? piece.rows : 1, piece.cols ? piece.cols : piece.rows});
        first += piece.elements();
    }
    return spans;
}

// The same for a weight that is kept in 4 bits. A matrix's elements come in their order, in any number of calls.
void nf4_put_elements(Model& model, int p, size_t first, size_t n, const float* values) {
    static Nf4Host matrix;
    static size_t done = 0;   // of its elements
    const ParamShape s = param_shape(model.config, p);
    while (n > 0) {
        const size_t l = first / s.per_layer(), row = first % s.per_layer() / s.cols;
        for (const Nf4Part& part : nf4_parts(model, p, (int)l)) {
            if (row < part.first || row >= part.first + part.rows) continue;
            const size_t all = part.rows * s.cols, count = std::min(n, all - done);
            matrix.add(values, count);
            done += count, first += count, values += count, n -= count;
            if (done < all) continue;
            matrix.finish(model.plan.nested, nf4_tables().data());
            nf4_put(part.nf4, matrix);
            matrix = Nf4Host(), done = 0;
        }
    }
}
// Elements [first, first + n) of a parameter, from the host into the weights and, where there are some, this rank's master weights.
void model_put(Model& model, int p, size_t first, size_t n, const float* values) {
    if (model.plan.quantizes(p)) return nf4_put_elements(model, p, first, n, values);
    if (p == WTE && model.plan.host_wte) return void(std::copy(values, values + n, model.host_wte + first));
    const size_t all = param_shape(model.config, p).elements(), begin = shard_offset(all), end = begin + shard_size(all);
    const size_t from = std::max(first, begin), to = std::min(first + n, end);
    const std::vector<floatX> rounded(values, values + n);
    cudaCheck(cudaMemcpy(model.param[p] + first, rounded.data(), n * sizeof(floatX), cudaMemcpyHostToDevice));
    if (model.master[p] != nullptr && from < to)
        cudaCheck(cudaMemcpy(model.master[p] + (from - begin), values + (from - first), (to - from) * sizeof(float),
                             cudaMemcpyHostToDevice));
}
// The other way, with all their bits. With --zero 1 the master weights are divided among the ranks: then all ranks call this, and each
// has its own in `values`, and zeros.
void model_get(const Model& model, int p, size_t first, size_t n, float* values) {
    if (model.master[p] == nullptr) {
        std::vector<floatX> weights(n);
        cudaCheck(cudaMemcpy(weights.data(), model.param[p] + first, n * sizeof(floatX), cudaMemcpyDeviceToHost));
        std::copy(weights.begin(), weights.end(), values);
        return;
    }
    const size_t all = param_shape(model.config, p).elements(), begin = shard_offset(all), end = begin + shard_size(all);
    const size_t from = std::max(first, begin), to = std::min(first + n, end);
    std::fill(values, values + n, 0.0f);
    if (from < to)
        cudaCheck(cudaMemcpy(values + (from - first), model.master[p] + (from - begin), (to - from) * sizeof(float),
                             cudaMemcpyDeviceToHost));
    if (world_shards(all)) world_sum_host(values, n);
}
void transpose(float* to, const float* from, size_t rows, size_t cols) {   // to (cols, rows), from (rows, cols)
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) to[c * rows + r] = from[r * cols + c];
}

// Where a model came from: what is written beside its weights, and in which types those are.
struct Source {
    Json config = json_object();         // what we do not know of stays in it
    std::vector<std::pair<std::string, std::string>> files;   // of the tokenizer: names and contents. The directory may go
    DType dtype = FLOATX;                // of the tensors that are not in `dtypes`
    std::map<std::string, DType> dtypes;
    Json adapter;                        // adapter_config.json of the adapter that came along
    DType dtype_of(const std::string& name) const {
        const auto at = dtypes.find(name);
        return at == dtypes.end() ? dtype : at->second;
    }
};
// ---- weights that bitsandbytes has written in 4 bits: X.weight holds codes, and beside it stand X.weight.absmax and the like
std::string bnb_text(const HfModel& m, const std::string& name) {   // of bytes
    const SafeTensor* t = m.find(name);
    std::string bytes(t->end - t->begin, '\0');
    const int fd = open(t->file.c_str(), O_RDONLY | O_CLOEXEC);
    const bool read = fd >= 0 && pread(fd, &bytes[0], bytes.size(), t->begin) == (ssize_t)bytes.size();
    if (fd >= 0) close(fd);
    if (!read) fail("%s: tensor %s could not be read", t->file.c_str(), name.c_str());
    return bytes;
}
std::vector<float> bnb_floats(const HfModel& m, const std::string& name) {
    const SafeTensor* t = m.find(name);
    std::vector<float> values((t->end - t->begin) / sizeof(float));
    safetensors_read(*t, 0, values.size(), values.data());
    return values;
}
void bnb_check(const Config& c, const HfModel& m, const HfPiece& piece, std::map<std::string, bool>& wanted) {
    const size_t n = piece.elements(), blocks = nf4_blocks(n);
    const bool twice = c.lora.quantized == 2;
    auto check = [&](const std::string& suffix, const char* type, size_t elements) {
        const std::string name = piece.name + suffix;
        const SafeTensor* t = m.find(name);
        if (t == nullptr)
            fail("%s: no tensor %s, which a weight in bitsandbytes' NF4 has; load and save the model again, or take the one in 16 bits",
                 m.folder.c_str(), name.c_str());
        size_t found = 1;
        for (size_t size : t->shape) found *= size;
        if (t->type != type || (elements > 0 && found != elements))
            fail("%s: tensor %s: expected %zu elements of type %s, found %s of type %s%s", t->file.c_str(), name.c_str(), elements, type,
                 shape_text(t->shape).c_str(), t->type.c_str(),
                 suffix.empty() ? "; the config says that all weights of the blocks are in NF4" : "");
        wanted[name] = true;
    };
    check("", "U8", n / 2);
    check(".absmax", twice ? "U8" : "F32", blocks);
    check(".quant_map", "F32", 16);
    check(".quant_state.bitsandbytes__nf4", "U8", 0);
    if (twice) check(".nested_absmax", "F32", nf4_nested(n) - 1), check(".nested_quant_map", "F32", 256);
    const std::string name = piece.name + ".quant_state.bitsandbytes__nf4", text = bnb_text(m, name);
    Json state;
    std::string error;
    if (!json_read(state, text.data(), text.size(), error))
        fail("%s: tensor %s: is no JSON: %s", m.folder.c_str(), name.c_str(), error.c_str());
    auto expect = [&](const char* key, const std::string& found, const std::string& expected) {
        if (found != expected)
            fail("%s: tensor %s: %s is %s; expected %s", m.folder.c_str(), name.c_str(), key, found.empty() ? "missing" : found.c_str(),
                 expected.c_str());
    };
    std::string shape;
    json_append(shape, state["shape"], -1);
    expect("quant_type", state["quant_type"].text, "nf4");
    expect("blocksize", state["blocksize"].text, std::to_string(NF4_BLOCK));
    expect("shape", shape, shape_text({piece.rows, piece.cols}));   // (out, in): GPT-2's too
    if (twice) {
        expect("nested_blocksize", state["nested_blocksize"].text, std::to_string(NF4_NESTED));
        if (state["nested_offset"].type != Json::NUMBER) expect("nested_offset", "", "a number");
    }
    const std::vector<float> ours = nf4_tables();
    auto compare = [&](const std::string& suffix, const float* expected, size_t count) {
        const std::vector<float> found = bnb_floats(m, piece.name + suffix);
        for (size_t i = 0; i < count; i++)
            if (!(fabsf(found[i] - expected[i]) <= 1e-6f))
                fail("%s: tensor %s: its value %zu is %g; bitsandbytes' NF4 has %g", m.folder.c_str(), (piece.name + suffix).c_str(), i,
                     found[i], expected[i]);
    };
    compare(".quant_map", ours.data(), 16);
    if (twice) compare(".nested_quant_map", ours.data() + 16, 256);
}
void bnb_load(const HfModel& m, const HfPiece& piece, const Nf4& to) {
    const std::string codes = bnb_text(m, piece.name), absmax = bnb_text(m, piece.name + ".absmax");
    Nf4Host matrix;
    matrix.codes.assign(codes.begin(), codes.end());
    if (to.nested == nullptr) matrix.absmax = bnb_floats(m, piece.name + ".absmax");
    else {
        const std::string text = bnb_text(m, piece.name + ".quant_state.bitsandbytes__nf4");
        Json state;
        std::string error;
        json_read(state, text.data(), text.size(), error);
        matrix.absmax8.assign(absmax.begin(), absmax.end());
        matrix.nested = bnb_floats(m, piece.name + ".nested_absmax");
        matrix.nested.insert(matrix.nested.begin(), strtof(state["nested_offset"].text.c_str(), nullptr));
    }
    for (const std::vector<float>* scales : {&matrix.absmax, &matrix.nested})
        for (float x : *scales)
            if (!std::isfinite(x)) fail("%s: the scales of %s hold %g; expected finite numbers", m.folder.c_str(), piece.name.c_str(), x);
    nf4_put(to, matrix);
}
// The values that a file's own codes stand for: one table for all its matrices.
std::vector<float> bnb_tables(const Config& c, const HfModel& m) {
    std::vector<float> tables;
    std::string first;
    hf_walk(c, [&](int p, size_t, const HfPiece& piece) {
        if (linear_index(p) == 4) return;
        std::vector<float> found = bnb_floats(m, piece.name + ".quant_map"), map = nf4_tables();
        map.erase(map.begin(), map.begin() + 16);
        if (c.lora.quantized == 2) map = bnb_floats(m, piece.name + ".nested_quant_map");
        found.insert(found.end(), map.begin(), map.end());
        if (tables.empty()) tables = found, first = piece.name;
        if (found != tables)
            fail("%s: tensor %s: its quant_map or nested_quant_map is another than that of %s; expected one for all", m.folder.c_str(),
                 piece.name.c_str(), first.c_str());
    });
    return tables;
}
// The headers of a directory's files, against its config: each weight must be there, once, in its shape, and nothing else that holds
// weights. Completes the names.
void hf_check(const Config& c, HfModel& m) {
    hf_complete_names(m);
    const auto twice = std::adjacent_find(m.tensors.begin(), m.tensors.end(), [](auto& a, auto& b) { return a.name == b.name; });
    if (twice != m.tensors.end())
        fail("%s: tensor %s is there twice, under a name with and one without its beginning", twice->file.c_str(), twice->name.c_str());
    std::map<std::string, bool> wanted;
    hf_walk(c, [&](int p, size_t, const HfPiece& piece) {
        const SafeTensor* t = m.find(piece.name);
        if (c.lora.quantized && linear_index(p) < 4) return bnb_check(c, m, piece, wanted);
        if (t == nullptr) fail("%s: no tensor %s, which its config.json asks for; %s", m.folder.c_str(), piece.name.c_str(), HF_REMEDY);
        if (t->dtype == BYTE)
            fail("%s: tensor %s: expected elements of type F32, BF16 or F16, found %s", t->file.c_str(), t->name.c_str(), t->type.c_str());
        if (t->shape != piece.shape())
            fail("%s: tensor %s: expected the shape %s by config.json, found %s", t->file.c_str(), t->name.c_str(),
                 shape_text(piece.shape()).c_str(), shape_text(t->shape).c_str());
        wanted[piece.name] = true;
    });
    for (const SafeTensor& t : m.tensors)
        if (!wanted.count(t.name) && !hf_ignores(c, t.name))
            fail("%s: tensor %s is none of the model that config.json describes", t.file.c_str(), t.name.c_str());
    // A tied head may be there once more. Readers disagree about which of two different ones counts.
    const SafeTensor *head = m.find("lm_head.weight"), *wte = m.find(hf_pieces(c, WTE, -1)[0].name);
    if (head == nullptr || wanted.count(head->name)) return;
    bool same = head->shape == wte->shape && head->dtype == wte->dtype;
    const size_t n = (size_t)c.V * c.C;
    std::vector<float> a(std::min(PIECE, n)), b(a.size());
    for (size_t at = 0; same && at < n; at += a.size()) {
        const size_t count = std::min(a.size(), n - at);
        safetensors_read(*head, at, count, a.data());
        safetensors_read(*wte, at, count, b.data());
        same = memcmp(a.data(), b.data(), count * sizeof(float)) == 0;
    }
    if (!same)
        fail("%s: tensor %s is another than %s, but config.json says that they are one (tie_word_embeddings); remove the head, or untie it",
             head->file.c_str(), head->name.c_str(), wte->name.c_str());
}
// What goes along with the weights. Their types, as they are in the files.
Source hf_source(const HfModel& m) {
    Source source = {m.config};
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                             "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"}) {
        const std::string path = m.folder + "/" + name;
        if (file_exists(path)) source.files.push_back({name, read_text(path, (size_t)1 << 30)});
    }
    for (const SafeTensor& t : m.tensors) source.dtypes[t.name] = t.dtype;
    return source;
}
// Reads all weights of a directory.
Source hf_load(Model& model, const std::string& folder) {
    HfModel m = hf_open(folder);
    hf_check(model.config, m);
    Source source = hf_source(m);
    if (model.config.lora.quantized)
        cudaCheck(cudaMemcpy(model.nf4_tables, bnb_tables(model.config, m).data(), NF4_TABLES * sizeof(float), cudaMemcpyHostToDevice));
    for (int p = 0; p < LORA_A; p++) {   // for the rows that pad the vocabulary
        const size_t n = param_shape(model.config, p).elements();
        if (model.param[p] == nullptr) continue;
        cudaCheck(cudaMemset(model.param[p], 0, n * sizeof(floatX)));
        if (model.master[p] != nullptr) cudaCheck(cudaMemset(model.master[p], 0, shard_size(n) * sizeof(float)));
    }
    hf_walk(model.config, [&](int p, size_t first, const HfPiece& piece) {
        const SafeTensor* t = m.find(piece.name);
        if (model.config.lora.quantized && linear_index(p) < 4) {
            const size_t per_layer = param_shape(model.config, p).per_layer();
            for (const Nf4Part& part : nf4_parts(model, p, (int)(first / per_layer)))
                if (part.first == first % per_layer / piece.cols) bnb_load(m, piece, part.nf4);
            return;
        }
        const size_t chunk = piece.transposed ? piece.elements() : std::min(PIECE, piece.elements());
        std::vector<float> values(chunk), turned(piece.transposed ? chunk : 0);
        for (size_t i = 0; i < piece.elements(); i += chunk) {
            const size_t n = std::min(chunk, piece.elements() - i);
            safetensors_read(*t, i, n, values.data());
            if (piece.transposed) transpose(turned.data(), values.data(), piece.cols, piece.rows);
            model_put(model, p, first + i, n, piece.transposed ? turned.data() : values.data());
        }
    });
    source.dtype = source.dtype_of(hf_pieces(model.config, WTE, -1)[0].name);
    return source;
}

struct HfPart {   // a piece, where it begins in its parameter, and the type that it has in the file
    int p;
    size_t first;
    HfPiece piece;
    DType dtype;
    size_t bytes() const { return piece.elements() * dtype_size(dtype); }
};
// Writes a file of tensors on rank 0. get(part, i, n, values) has all ranks find elements [i, i + n) of a part. Returns what went wrong.
std::string safetensors_write(const std::string& path, const std::vector<HfPart>& parts,
                              const std::function<void(const HfPart& part, size_t i, size_t n, float* values)>& get,
                              Json metadata = json_object()) {
    Json header = json_object();
    header.set("__metadata__", std::move(metadata)).set("format", json_string("pt"));
    size_t at = 0;
    for (const HfPart& part : parts) {
        const size_t end = at + part.bytes();
        Json& t = header.set(part.piece.name, json_object());
        t.set("dtype", json_string(part.dtype == F32 ? "F32" : part.dtype == F16 ? "F16" : "BF16"));
        t.set("shape", json_sizes(part.piece.shape()));
        t.set("data_offsets", json_sizes({at, end}));
        at = end;
    }
    std::string text;
    json_append(text, header, -1);
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::string beyond;   // what the type cannot hold
    auto fill = [&](const Put& put) {
        const uint64_t length = text.size();
        put(&length, sizeof length);
        put(text.data(), text.size());
        for (const HfPart& part : parts) {
            const HfPiece& piece = part.piece;
            const size_t size = dtype_size(part.dtype);
            const size_t chunk = piece.transposed ? piece.elements() : std::min(PIECE, piece.elements());
            std::vector<float> values(chunk), turned(piece.transposed ? chunk : 0);
            std::vector<char> raw(chunk * size);
            for (size_t i = 0; i < piece.elements(); i += chunk) {
                const size_t n = std::min(chunk, piece.elements() - i);
                get(part, i, n, values.data());
                if (piece.transposed) transpose(turned.data(), values.data(), piece.rows, piece.cols);
                for (size_t k = 0; k < n && part.dtype == F16 && beyond.empty(); k++)
                    if (std::isfinite(values[k]) && fabsf(values[k]) >= 65520)
                        beyond = path + ": tensor " + piece.name + " has " + std::to_string(values[k]) +
                                 ", and f16 ends at 65504; --save-dtype bf16 or f32 holds it";
                store_as(part.dtype, raw.data(), piece.transposed ? turned.data() : values.data(), n);
                put(raw.data(), n * size);
            }
        }
    };
    if (world.rank > 0) fill([](const void*, size_t) {});
    const std::string error = world.rank == 0 ? write_file(path, fill) : "";
    return error.empty() ? beyond : error;
}
// ---- adapters, in PEFT's format: adapter_config.json and adapter_model.safetensors
const char* ADAPTER_REMEDY = "expected an adapter's directory as PEFT writes it: adapter_config.json and adapter_model.safetensors (one of "
                             "ours: OUT/step_...)";

// A matrix of Hugging Face's in a layer, and the targets that it consists of: itself, or parts of it. `index`: in lora_targets().
struct LoraPart { int index, slot; size_t row; int rank; };   // slot: among those of its weight in memory; row: of the module's
struct LoraMatrix {
    std::string name;      // model.layers.0.self_attn.q_proj
    int layer, weight;
    size_t rows, cols;
    int whole;             // the target that is all of it
    std::vector<LoraPart> parts;
    int rank() const {
        int n = 0;
        for (const LoraPart& part : parts) n += part.rank;
        return n;
    }
};
// All matrices that could have an adapter, in the order of layers. `lora` may be empty: then ranks are 0.
std::vector<LoraMatrix> lora_matrices(const Config& c, const std::vector<LoraModule>& lora) {
    std::vector<LoraMatrix> matrices;
    const std::vector<LoraTarget> targets = lora_targets(c);
    for (int layer = 0; layer < c.L; layer++)
        for (int weight : LINEAR) {
            size_t row = 0;
            for (const HfPiece& piece : hf_pieces(c, weight, layer)) {
                LoraMatrix m = {piece.name.substr(0, piece.name.rfind('.')), layer, weight, piece.rows, piece.cols, -1, {}};
                for (int i = 0, slot = 0; i < (int)targets.size(); i++) {
                    const LoraTarget& t = targets[i];
                    if (t.weight == weight && t.first == row && t.rows == piece.rows) m.whole = i;
                    if (t.weight != weight || !(c.lora.targets >> i & 1)) continue;
                    if (t.first >= row && t.first + t.rows <= row + piece.rows)
                        m.parts.push_back({i, slot, t.first - row, lora.empty() ? 0 : lora[layer * targets.size() + i].rank});
                    slot++;
                }
                matrices.push_back(m);
                row += piece.rows;
            }
        }
    return matrices;
}
// A matrix's A or B between files and memory. use(p, first, n, values) gets or puts elements of a parameter; `dense` is the file's tensor,
// A (rank, cols) or B (rows, rank).
using UseElements = std::function<void(int p, size_t first, size_t n, float* values)>;
void lora_exchange(const Config& c, const LoraMatrix& m, bool A, bool put, std::vector<float>& dense, const UseElements& use) {
    const std::vector<LoraTarget> targets = lora_targets(c);
    const size_t R = c.lora.rank, rank = m.rank(), index = linear_index(m.weight);
    if (!put) dense.assign(A ? rank * m.cols : m.rows * rank, 0.0f);
    size_t column = 0;   // of the matrix's rank
    for (const LoraPart& part : m.parts) {
        const int p = (A ? LORA_A : LORA_B) + (int)index;
        size_t first = m.layer * param_shape(c, p).per_layer() + (A ? part.slot * R * m.cols : 0);
        for (int i = 0; !A && i < part.index; i++)
            if (targets[i].weight == m.weight && (c.lora.targets >> i & 1)) first += targets[i].rows * R;
        const size_t rows = A ? part.rank : targets[part.index].rows, cols = A ? m.cols : R, n = rows * cols;
        std::vector<float> values(n);
        if (!put) use(p, first, n, values.data());
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < (A ? cols : (size_t)part.rank); k++) {
                float& there = A ? dense[(column + r) * cols + k] : dense[(part.row + r) * rank + column + k];
                (put ? values[r * cols + k] : there) = put ? there : values[r * cols + k];
            }
        if (put) use(p, first, n, values.data());
        column += part.rank;
    }
}
// Python's regular expressions, as far as they are used for names of modules, against all of a name.
bool matches(const std::string& pattern, const std::string& name, const std::string& where) {
    std::string posix;
    bool set = false, known = true;   // set: within [ ], where POSIX has no escapes
    for (size_t i = 0; i < pattern.size(); i++) {
        const char c = pattern[i], next = i + 1 < pattern.size() ? pattern[i + 1] : '\0';
        if (c == '\\') {
            i++;
            if (next == 'd') posix += set ? "0-9" : "[0-9]";
            else if (set && next == 'w') posix += "_[:alnum:]";
            else if (set) known &= strchr("]^-\\", next) == nullptr && !isalnum(next), posix += next;
            else if (next == 'A' || next == 'Z') posix += next == 'A' ? '^' : '$';
            else known &= !isalnum(next) || strchr("bBwWsS", next), posix += {c, next};
        } else if (set) {
            set = c != ']', posix += c;
        } else if (pattern.compare(i, 3, "(?:") == 0 || pattern.compare(i, 4, "(?P<") == 0) {
            posix += '(', i = pattern[i + 2] == ':' ? i + 2 : std::min(pattern.find('>', i), pattern.size());
        } else if (c != '?' || i == 0 || !strchr("*+?}", pattern[i - 1])) {   // the shortest or the longest: both match all of a name
            set = c == '[', known &= c != '(' || next != '?', posix += c;
        }
    }
    regex_t compiled;
    if (!known || regcomp(&compiled, ("^(" + posix + ")$").c_str(), REG_EXTENDED | REG_NOSUB) != 0)
        fail("%s: '%s' is no regular expression that %s understands", where.c_str(), pattern.c_str(), program_name);
    const bool found = regexec(&compiled, name.c_str(), 0, nullptr, 0) == 0;
    regfree(&compiled);
    return found;
}
bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}
bool named_by(const Json& list, const std::string& name, const std::string& where) {   // target_modules and the like
    if (list.type == Json::STRING) return strcasecmp(list.text.c_str(), "all-linear") == 0 || matches(list.text, name, where);
    return std::any_of(list.values.begin(), list.values.end(), [&](auto& j) { return name == j.text || ends_with(name, "." + j.text); });
}
// An adapter's number for a module: by the first pattern that matches its name's end, or the usual one.
double lora_number(const Json& config, const char* patterns, const char* usual, const std::string& name, const std::string& where) {
    const Json& map = config[patterns];
    for (size_t i = 0; map.type == Json::OBJECT && i < map.names.size(); i++)
        if (matches("(.*\\.)?(" + map.names[i] + ")", name, where)) return strtod(map.values[i].text.c_str(), nullptr);
    return strtod(config[usual].text.c_str(), nullptr);
}
// A norm's tensor in an adapter's file: modules_to_save.
std::string saved_name(const HfPiece& piece) { return "base_model.model." + piece.name; }
struct AdapterFile {
    std::string folder;
    Json config;
    HfModel tensors;                // its tensors alone
    std::vector<LoraModule> lora;   // (L, targets)
    unsigned norms = 0;             // the parameters, as bits, that it holds besides: norms
};
std::string target_names(const Config& c) {   // as --lora-targets has them
    const std::vector<LoraTarget> targets = lora_targets(c);
    std::string names;
    for (size_t i = 0; i < targets.size(); i++)
        if (c.lora.targets >> i & 1) names += (names.empty() ? "" : ",") + std::string(targets[i].name);
    return names;
}
bool is_norm(int p) {   // a norm's gamma or beta, those that stand before matmuls and the last one
    for (auto [gamma, weight] : FOLDED)
        if (p == gamma || p == beta_of(gamma)) return true;
    return p == LNFW || p == beta_of(LNFW);
}
// Reads an adapter's config and headers, and sets what it is in `c`. Whatever it asks for and we do not do is refused.
AdapterFile adapter_open(Config& c, const std::string& folder) {
    AdapterFile a;
    a.folder = a.tensors.folder = folder;
    const std::string path = folder + "/adapter_config.json", file = folder + "/adapter_model.safetensors";
    if (!file_exists(path)) fail("%s: there is none; %s", path.c_str(), ADAPTER_REMEDY);
    if (!file_exists(file))
        fail("%s: there is none%s; %s", file.c_str(),
             file_exists(folder + "/adapter_model.bin") ? " (adapter_model.bin is an older PEFT's: load and save it again)" : "",
             ADAPTER_REMEDY);
    a.config = read_json(path);
    auto refuse = [&](const char* name, const std::string& found, const char* expected) {
        fail("%s: %s is %s; expected %s: %s does nothing else", path.c_str(), name, found.c_str(), expected, program_name);
    };
    const Json& config = a.config;
    if (config["peft_type"].text != "LORA") refuse("peft_type", "'" + config["peft_type"].text + "'", "LORA");
    for (const char* name : {"use_dora", "lora_bias", "use_qalora"})
        if (config[name].text == "true") refuse(name, "true", "false");
    if (config["bias"].type == Json::STRING && config["bias"].text != "none") refuse("bias", "'" + config["bias"].text + "'", "none");
    for (const char* name :
         {"trainable_token_indices", "layer_replication", "target_parameters", "megatron_config", "alora_invocation_tokens", "use_bdlora",
          "kasa_config", "arrow_config", "velora_config", "monteclora_config"})
        if (config[name].type > Json::JSON_NULL && !(config[name].type >= Json::ARRAY && config[name].values.empty()) &&
            config[name].text != "false")
            refuse(name, "there", "none");
    for (const char* name : {"pissa", "olora", "corda", "loftq", "lora_ga"})
        if (config["init_lora_weights"].text.compare(0, strlen(name), name) == 0)
            refuse("init_lora_weights", "'" + config["init_lora_weights"].text + "', which changes the base model", "true");
    for (const char* name : {"rank_pattern", "alpha_pattern"}) {
        const Json& map = config[name];
        if (map.type > Json::JSON_NULL && map.type != Json::OBJECT) refuse(name, "no object", "names of modules with numbers");
        for (const Json& value : map.values)
            if (value.type != Json::NUMBER) refuse(name, "'" + value.text + "'", "names of modules with numbers");
    }
    if (config["use_rslora"].type > Json::JSON_NULL && config["use_rslora"].type != Json::BOOLEAN)
        refuse("use_rslora", "'" + config["use_rslora"].text + "'", "true or false");
    const double dropout = strtod(config["lora_dropout"].text.c_str(), nullptr);
    if (!(dropout >= 0 && dropout <= 0.9)) refuse("lora_dropout", config["lora_dropout"].text, "0 to 0.9");
    for (const Json& module : config["modules_to_save"].values) {
        bool norm = false, other = false;
        hf_walk(c, [&](int p, size_t, const HfPiece& piece) {
            (is_norm(p) ? norm : other) |= ends_with(piece.name.substr(0, piece.name.rfind('.')), module.text);
        });
        if (!norm || other) refuse("modules_to_save", "'" + module.text + "'", "norms");
    }
    if (config["r"].type != Json::NUMBER || config["lora_alpha"].type != Json::NUMBER) refuse("r or lora_alpha", "missing", "numbers");
    Json metadata;
    a.tensors.tensors = safetensors_open(file, &metadata);
    std::sort(a.tensors.tensors.begin(), a.tensors.tensors.end(), [](auto& x, auto& y) { return x.name < y.name; });
    std::map<std::string, bool> known;
    const std::vector<LoraTarget> targets = lora_targets(c);
    c.lora.rank = c.lora.targets = 0;
    a.lora.assign(c.L * targets.size(), {0, 0});
    std::vector<LoraMatrix> whole = lora_matrices(c, {});   // no targets yet: names alone
    std::string missing;
    for (const std::string& name : {std::string("lm_head.weight"), hf_pieces(c, WTE, -1)[0].name}) {
        const std::string module = name.substr(0, name.rfind('.'));
        if (strcasecmp(config["target_modules"].text.c_str(), "all-linear") != 0 && named_by(config["target_modules"], module, path) &&
            !named_by(config["exclude_modules"], module, path))
            refuse("target_modules", "such that it names " + module, "matrices of layers");
    }
    for (const LoraMatrix& m : whole) {
        const std::string first = "base_model.model." + m.name;
        const SafeTensor *A = a.tensors.find(first + ".lora_A.weight"), *B = a.tensors.find(first + ".lora_B.weight");
        const Json& layers = config["layers_to_transform"];
        bool named = named_by(config["target_modules"], m.name, path) && !named_by(config["exclude_modules"], m.name, path);
        if (layers.type == Json::NUMBER) named &= layers.text == std::to_string(m.layer);
        if (layers.type == Json::ARRAY)
            named &= std::any_of(layers.values.begin(), layers.values.end(), [&](auto& j) { return j.text == std::to_string(m.layer); });
        if (A == nullptr && B == nullptr && named && missing.empty()) missing = m.name;
        if (A == nullptr && B == nullptr) continue;
        if (A == nullptr || B == nullptr)
            fail("%s: %s has lora_%s and no lora_%s", file.c_str(), m.name.c_str(), A ? "A" : "B", A ? "B" : "A");
        if (!named)
            fail(
                "%s: holds tensors of %s, which target_modules in adapter_config.json does not name; PEFT would drop them, and say "
                "nothing",
                file.c_str(), m.name.c_str());
        const double asked = lora_number(config, "rank_pattern", "r", m.name, path),
                     alpha = lora_number(config, "alpha_pattern", "lora_alpha", m.name, path);
        if (!(asked >= 1 && asked <= 4096 && asked == (int)asked) || !(fabs(alpha) < 1e9))
            fail("%s: r %g and lora_alpha %g of %s; expected a rank from 1 to 4096 and a number below 10^9", path.c_str(), asked, alpha,
                 m.name.c_str());
        for (const SafeTensor* t : {A, B}) {
            const size_t rank = t->shape.size() == 2 ? t->shape[t == A ? 0 : 1] : 0;
            const std::vector<size_t> expected =
                t == A ? std::vector<size_t>{(size_t)asked, m.cols} : std::vector<size_t>{m.rows, (size_t)asked};
            if (rank < 1 || t->shape != expected)
                fail("%s: tensor %s: expected the shape %s by adapter_config.json and the model, found %s", file.c_str(), t->name.c_str(),
                     shape_text(expected).c_str(), shape_text(t->shape).c_str());
            if (t->dtype == BYTE)
                fail("%s: tensor %s: expected elements of type F32, BF16 or F16, found %s", file.c_str(), t->name.c_str(),
                     t->type.c_str());
            known[t->name] = true;
        }
        c.lora.targets |= 1 << m.whole;
        const bool rooted = config["use_rslora"].text == "true";
        a.lora[m.layer * targets.size() + m.whole] = {(int)asked, (float)(alpha / (rooted ? sqrt(asked) : asked))};
        c.lora.rank = std::max(c.lora.rank, (int)asked);
    }
    if (c.lora.targets == 0)
        fail("%s: holds no lora_A and lora_B of this model (such as base_model.model.%s.lora_A.weight)", file.c_str(),
             whole[0].name.c_str());
    if (!missing.empty()) fail("%s: target_modules names %s, but %s holds no lora_A of it", path.c_str(), missing.c_str(), file.c_str());
    unsigned some = 0;   // GPT-2's q, k and v have one module. Which of them its columns are for, adapter_save has left there.
    for (size_t i = 0; i < targets.size(); i++)
        if (targets[i].part &&
            ("," + metadata["lora_targets"].text + ",").find(std::string(",") + targets[i].name + ",") != std::string::npos)
            some |= 1u << i;
    const int count = __builtin_popcount(some);
    bool apart = count > 0;
    for (int l = 0; l < c.L; l++) apart &= a.lora[l * targets.size()].rank % std::max(count, 1) == 0;
    if (apart) {
        c.lora.targets = (c.lora.targets & ~1) | some;
        c.lora.rank = 0;
        for (size_t i = 0; i < a.lora.size(); i++) {
            const LoraModule& whole = a.lora[i / targets.size() * targets.size()];
            if (some >> i % targets.size() & 1) a.lora[i] = {whole.rank / count, whole.scale};
            if (i % targets.size() > 0) c.lora.rank = std::max(c.lora.rank, a.lora[i].rank);
        }
        for (int l = 0; l < c.L; l++) a.lora[l * targets.size()] = {};
    }
    c.lora.rank = ceil_div(c.lora.rank, 8) * 8;
    hf_walk(c, [&](int p, size_t, const HfPiece& piece) {
        if (!is_norm(p)) return;
        const std::string module = piece.name.substr(0, piece.name.rfind('.'));
        const std::vector<Json>& saved = config["modules_to_save"].values;
        const bool named = std::any_of(saved.begin(), saved.end(), [&](auto& j) { return ends_with(module, j.text); });
        const SafeTensor* t = a.tensors.find(saved_name(piece));
        if (named != (t != nullptr))
            fail("%s: modules_to_save %s %s, and %s %s its tensor; PEFT would %s, and say nothing", path.c_str(),
                 named ? "names" : "does not name", module.c_str(), file.c_str(), named ? "does not hold" : "holds",
                 named ? "leave it as it is in the base" : "drop it");
        if (t == nullptr) return;
        if (t->shape != piece.shape() || t->dtype == BYTE)
            fail("%s: tensor %s: expected the shape %s, found %s of type %s", file.c_str(), t->name.c_str(),
                 shape_text(piece.shape()).c_str(), shape_text(t->shape).c_str(), t->type.c_str());
        known[t->name] = true, a.norms |= 1u << p;
    });
    for (const SafeTensor& t : a.tensors.tensors)
        if (!known.count(t.name))
            fail("%s: tensor %s: %s trains adapters on the matrices of blocks, and norms beside them; nothing else", file.c_str(),
                 t.name.c_str(), program_name);
    return a;
}
std::vector<float> adapter_read(const AdapterFile& a, const std::string& name) {   // a whole tensor
    const SafeTensor& t = *a.tensors.find(name);
    std::vector<float> values(1);
    for (size_t size : t.shape) values.resize(values.size() * size);
    safetensors_read(t, 0, values.size(), values.data());
    for (float x : values)
        if (!std::isfinite(x)) fail("%s: tensor %s holds %g; expected an adapter of finite numbers", t.file.c_str(), name.c_str(), x);
    return values;
}
// Into the model, which has been allocated.
void adapter_load(Model& model, const AdapterFile& a, Source& source) {
    source.adapter = a.config, source.dtypes.clear(), source.dtype = F32;
    for (const SafeTensor& t : a.tensors.tensors) source.dtypes[t.name] = t.dtype;
    for (const LoraMatrix& m : lora_matrices(model.config, model.lora))
        for (bool A : {true, false}) {
            if (m.rank() == 0) continue;
            std::vector<float> values = adapter_read(a, "base_model.model." + m.name + (A ? ".lora_A.weight" : ".lora_B.weight"));
            lora_exchange(model.config, m, A, true, values,
                          [&](int p, size_t first, size_t n, float* x) { model_put(model, p, first, n, x); });
        }
    hf_walk(model.config, [&](int p, size_t first, const HfPiece& piece) {
        if (a.norms >> p & 1) model_put(model, p, first, piece.elements(), adapter_read(a, saved_name(piece)).data());
    });
}
// A new one: A uniform, B zeros, as PEFT has it.
void adapter_init(Model& model) {
    uint64_t drawn = 0;
    for (const LoraMatrix& m : lora_matrices(model.config, model.lora)) {
        if (m.rank() == 0) continue;
        std::vector<float> values(m.rank() * m.cols);
        for (float& x : values) x = (2 * hash_uniform(hash64(model.seed, 1ull << 43, drawn++)) - 1) / sqrtf((float)m.cols);
        lora_exchange(model.config, m, true, true, values,
                      [&](int p, size_t first, size_t n, float* x) { model_put(model, p, first, n, x); });
    }
}
// The tensors of an adapter's file, of which `get` finds elements.
struct AdapterPart { HfPart part; LoraMatrix matrix; bool A; };
std::vector<AdapterPart> adapter_parts(const Model& model, const Source& source) {
    std::vector<AdapterPart> parts;
    for (const LoraMatrix& m : lora_matrices(model.config, model.lora))
        for (bool A : {true, false}) {
            const size_t rank = m.rank();
            if (rank == 0) continue;
            const HfPiece piece = {"base_model.model." + m.name + (A ? ".lora_A.weight" : ".lora_B.weight"), A ? rank : m.rows,
                                   A ? m.cols : rank};
            const HfPart part = {-2, parts.size(), piece, source.dtype_of(piece.name)};
            parts.push_back({part, m, A});
        }
    return parts;
}
const char* DUMP_BEGINS = "{\"__metadata__\": {\"format\": \"pt\"}, \"loss\": {";
// --dump-gradients: the loss of a micro-batch and every gradient, in fp32, under the names of the weights.
std::string hf_dump_gradients(const Model& model, const std::string& path, float loss) {
    std::vector<HfPart> parts = {{-1, 0, {"loss", 0, 0}, F32}};
    std::vector<AdapterPart> adapter = adapter_parts(model, Source());
    for (AdapterPart& a : adapter)
        if (model.plan.trains((a.A ? LORA_A : LORA_B) + linear_index(a.matrix.weight))) a.part.dtype = F32, parts.push_back(a.part);
    hf_walk(model.config, [&](int p, size_t first, const HfPiece& piece) {
        HfPiece named = piece;
        if (model.config.lora.rank > 0) named.name = saved_name(piece);
        if (model.plan.trains(p)) parts.push_back({p, first, named, F32});
    });
    auto get = [&](int p, size_t first, size_t n, float* values) {
        const Grad grad = model.grad[p] + first;
        std::vector<char> raw(n * dtype_size(grad.type));
        cudaCheck(cudaMemcpy(raw.data(), grad.p, raw.size(), cudaMemcpyDeviceToHost));
        load_as(grad.type, values, raw.data(), n);
        for (size_t k = 0; k < n; k++) values[k] *= world.size;   // model_loss has divided by it, for the sum over the ranks
    };
    std::vector<float> dense;
    return safetensors_write(path, parts, [&](const HfPart& part, size_t i, size_t n, float* values) {
        if (part.p == -1) return void(values[0] = loss);
        if (part.p >= 0) return get(part.p, part.first + i, n, values);
        const AdapterPart& a = adapter[part.first];
        if (i == 0) lora_exchange(model.config, a.matrix, a.A, false, dense, get);
        std::copy_n(dense.begin() + i, n, values);
    });
}
// Files beside the weights. Return what went wrong, or an empty text.
std::string write_json(const std::string& path, const Json& j) {
    std::string text;
    json_append(text, j, 0);
    text += '\n';
    return write_file(path, [&](const Put& put) { put(text.data(), text.size()); });
}
std::string write_files(const std::string& folder, const Source& source) {
    std::string error;
    for (const auto& file : source.files)
        if (error.empty()) error = write_file(folder + "/" + file.first, [&](const Put& put) { put(file.second.data(), file.second.size()); });
    return error;
}
// Writes an adapter's directory. All ranks call it, rank 0 writes. Returns what went wrong, or an empty text.
std::string adapter_save(const Model& model, const std::string& folder, const Source& source) {
    Json metadata = json_object();
    for (const LoraMatrix& m : lora_matrices(model.config, model.lora))   // parts of a module
        if (m.rank() > 0 && m.parts[0].index != m.whole) metadata.set("lora_targets", json_string(target_names(model.config)));
    const std::vector<AdapterPart> adapter = adapter_parts(model, source);
    std::vector<HfPart> parts;
    for (const AdapterPart& a : adapter) parts.push_back(a.part);
    hf_walk(model.config, [&](int p, size_t first, const HfPiece& piece) {
        HfPiece named = piece;
        named.name = saved_name(piece);
        if (is_norm(p) && model.plan.trains(p)) parts.push_back({p, first, named, source.dtype_of(named.name)});
    });
    std::string bad;
    std::vector<float> dense;
    auto get = [&](int p, size_t first, size_t n, float* values) { model_get(model, p, first, n, values); };
    const std::string error =
        safetensors_write(folder + "/adapter_model.safetensors", parts, [&](const HfPart& part, size_t i, size_t n, float* values) {
            if (part.p >= 0) get(part.p, part.first + i, n, values);
            else if (i == 0) lora_exchange(model.config, adapter[part.first].matrix, adapter[part.first].A, false, dense, get);
            if (part.p < 0) std::copy_n(dense.begin() + i, n, values);
            for (size_t k = 0; k < n && bad.empty(); k++)
                if (!std::isfinite(values[k]))
                    bad = "the adapter is not finite: tensor " + part.piece.name + " holds " + std::to_string(values[k]);
        }, metadata);
    if (world.rank > 0) return "";
    if (!bad.empty() || !error.empty()) return bad.empty() ? error : bad;
    const std::string written = write_json(folder + "/adapter_config.json", source.adapter);
    return written.empty() ? write_files(folder, source) : written;
}
// modules_to_save: PEFT looks for ends of names, and drops what none of them names.
Json adapter_norms(const Model& model) {
    const Config& c = model.config;
    Json saved;
    saved.type = Json::ARRAY;
    hf_walk(c, [&](int p, size_t first, const HfPiece& piece) {
        const std::string module = piece.name.substr(0, piece.name.rfind('.'));
        const std::string name = param_shape(c, p).in_layer ? module.substr(module.rfind('.') + 1) : module;
        if (!is_norm(p) || !model.plan.trains(p) || first > 0) return;
        for (const Json& known : saved.values)
            if (known.text == name) return;
        saved.values.push_back(json_string(name));
    });
    if (saved.values.empty()) saved.type = Json::JSON_NULL;
    return saved;
}
// adapter_config.json of a new one: what every version of PEFT, and what reads its files, wants to find.
Json adapter_new_config(const Model& model, const std::string& base, double alpha, double dropout) {
    const Config& c = model.config;
    const std::vector<LoraTarget> targets = lora_targets(c);
    int rank = 0;
    for (const LoraModule& module : model.lora) rank = std::max(rank, module.rank);
    Json j = json_object(), modules, ranks = json_object(), alphas = json_object();
    modules.type = Json::ARRAY;
    int most = 0;
    for (const LoraMatrix& m : lora_matrices(c, model.lora)) {
        if (m.layer > 0 || m.rank() == 0) continue;
        std::string name = m.name.substr(m.name.rfind('.') + 1);
        if (name == "c_proj") name = m.name.substr(m.name.rfind('.', m.name.rfind('.') - 1) + 1);   // there are two: attn's and mlp's
        modules.values.push_back(json_string(name));
        most = std::max(most, m.rank());
        if (m.rank() != rank) {   // parts of a module, each with a rank of its own
            ranks.set(name, json_sizes({(size_t)m.rank()}).values[0]);
            alphas.set(name, json_number_value((float)(alpha * m.rank() / rank)));
        }
    }
    if (modules.values.size() == 1) ranks = alphas = json_object(), alpha *= (double)most / rank, rank = most;
    Json none;
    none.type = Json::JSON_NULL;
    j.set("peft_type", json_string("LORA")), j.set("task_type", json_string("CAUSAL_LM"));
    j.set("base_model_name_or_path", json_string(base)), j.set("revision", none);
    j.set("r", json_sizes({(size_t)rank}).values[0]), j.set("lora_alpha", json_number_value((float)alpha));
    j.set("lora_dropout", json_number_value((float)dropout)), j.set("target_modules", modules);
    j.set("bias", json_string("none")), j.set("fan_in_fan_out", json_bool(hf_pieces(c, QKVW, 0)[0].transposed));
    j.set("inference_mode", json_bool(true)), j.set("init_lora_weights", json_bool(true)), j.set("use_rslora", json_bool(false));
    j.set("use_dora", json_bool(false)), j.set("modules_to_save", adapter_norms(model));
    j.set("layers_to_transform", none), j.set("layers_pattern", none);
    j.set("rank_pattern", ranks), j.set("alpha_pattern", alphas);
    return j;
}

// Writes a model's directory. All ranks call it, rank 0 writes. Returns what went wrong, or an empty text. `get` finds weights.
using GetWeights = std::function<void(const HfPart& part, size_t i, size_t n, float* values)>;
std::string hf_save(const Config& c, const std::string& folder, const Source& source, const GetWeights& get) {
    constexpr size_t SHARD_BYTES = (size_t)5 << 30;   // at most, unless one tensor has more
    std::vector<std::vector<HfPart>> shards(1);
    size_t bytes = 0, total = 0;
    hf_walk(c, [&](int p, size_t first, const HfPiece& piece) {
        const HfPart part = {p, first, piece, source.dtype_of(piece.name)};
        if (bytes > 0 && bytes + part.bytes() > SHARD_BYTES) shards.emplace_back(), bytes = 0;
        shards.back().push_back(part);
        bytes += part.bytes(), total += part.bytes();
    });
    std::string error;
    Json map = json_object();
    for (size_t shard = 0; shard < shards.size(); shard++) {
        char file[64] = "model.safetensors";
        if (shards.size() > 1) snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", shard + 1, shards.size());
        for (const HfPart& part : shards[shard]) map.set(part.piece.name, json_string(file));
        const std::string wrong = safetensors_write(folder + "/" + file, shards[shard], get);
        if (error.empty()) error = wrong;
    }
    if (world.rank > 0) return "";
    if (shards.size() > 1 && error.empty()) {
        Json index = json_object();
        index.set("metadata", json_object()).set("total_size", json_sizes({total}).values[0]);
        index.set("weight_map", map);
        error = write_json(folder + "/model.safetensors.index.json", index);
    }
    Json config = source.config;
    hf_config_json(c, config);
    const char* type = source.dtype == F32 ? "float32" : source.dtype == F16 ? "float16" : "bfloat16";
    for (const char* name : {"dtype", "torch_dtype"})   // transformers 5 has the first, 4 the second
        if (config[name].type != Json::ABSENT || strcmp(name, "torch_dtype") == 0) config.set(name, json_string(type));
    if (error.empty()) error = write_json(folder + "/config.json", config);
    return error.empty() ? write_files(folder, source) : error;
}
// --merge: base and adapter as one model, W + scale B A, on the host, matrix by matrix, in fp32 and rounded once.
std::string hf_merge(const Config& c, const std::string& base, const AdapterFile& a, const std::string& folder, Source& source) {
    HfModel m = hf_open(base);
    hf_check(c, m);
    std::map<std::string, LoraMatrix> adapted;
    for (const LoraMatrix& matrix : lora_matrices(c, a.lora))
        if (matrix.rank() > 0) adapted[matrix.name + ".weight"] = matrix;
    const size_t targets = lora_targets(c).size();
    std::string loaded;   // the matrix whose A and B are here
    std::vector<float> A, B, turned;
    std::string beyond;   // what the sum's type cannot hold
    const std::string error = hf_save(c, folder, source, [&](const HfPart& part, size_t i, size_t n, float* values) {
        const HfPiece& piece = part.piece;
        const SafeTensor* t = a.norms >> part.p & 1 ? a.tensors.find(saved_name(piece)) : m.find(piece.name);
        safetensors_read(*t, i, n, values);
        if (piece.transposed) turned.assign(values, values + n), transpose(values, turned.data(), piece.cols, piece.rows);
        const auto found = adapted.find(piece.name);
        if (found == adapted.end()) return;
        const LoraMatrix& matrix = found->second;
        if (loaded != matrix.name) {
            loaded = matrix.name;
            A = adapter_read(a, "base_model.model." + loaded + ".lora_A.weight");
            B = adapter_read(a, "base_model.model." + loaded + ".lora_B.weight");
        }
        const float scale = a.lora[matrix.layer * targets + matrix.parts[0].index].scale;
        const size_t rank = A.size() / piece.cols;
        for (size_t at = i; at < i + n;) {   // row by row
            const size_t r = at / piece.cols, first = at % piece.cols, count = std::min(piece.cols - first, i + n - at);
            float* w = values + (at - i);
            for (size_t k = 0; k < rank; k++) {
                const float factor = scale * B[r * rank + k], *row = &A[k * piece.cols + first];
                for (size_t j = 0; j < count; j++) w[j] += factor * row[j];
            }
            at += count;
        }
        if (std::any_of(values, values + n, [](float x) { return !(fabsf(x) < 3.3e38f); }))   // bf16's largest is 3.39e38
            beyond = piece.name + ": the sum of base and adapter is not finite";
    });
    return error.empty() ? beyond : error;
}
// The model as a run writes it: all of it, or the adapter.
std::string model_save(const Model& model, const std::string& folder, const Source& source) {
    if (model.config.lora.rank > 0) return adapter_save(model, folder, source);
    return hf_save(model.config, folder, source,
                   [&](const HfPart& part, size_t i, size_t n, float* values) { model_get(model, part.p, part.first + i, n, values); });
}

// What config.json says under a name, or `usual` where it says nothing (or null). Another type than expected is an error.
const Json* config_value(const HfModel& m, const char* name, Json::Type type, const char* expected) {
    const Json& j = m.config[name];
    if (j.type == Json::ABSENT || j.type == Json::JSON_NULL) return nullptr;
    if (j.type != type) fail("%s/config.json: %s: expected %s", m.folder.c_str(), name, expected);
    return &j;
}
constexpr int64_t REQUIRED = -1;
int64_t config_int(const HfModel& m, const char* name, int64_t usual = REQUIRED) {
    const Json* j = config_value(m, name, Json::NUMBER, "a whole number");
    size_t n;
    if (j == nullptr && usual == REQUIRED) fail("%s/config.json: has no %s, which this model needs", m.folder.c_str(), name);
    if (j == nullptr) return usual;
    if (!json_size(*j, n) || n < 1 || n > 1 << 30)
        fail("%s/config.json: %s: expected a whole number from 1 to 2^30, found %s", m.folder.c_str(), name, j->text.c_str());
    return (int64_t)n;
}
double config_number(const HfModel& m, const char* name, double usual) {
    const Json* j = config_value(m, name, Json::NUMBER, "a number");
    const double x = j ? strtod(j->text.c_str(), nullptr) : usual;
    if (!std::isfinite(x)) fail("%s/config.json: %s: %s is too large for a number", m.folder.c_str(), name, j->text.c_str());
    return x;
}
bool config_flag(const HfModel& m, const char* name, bool usual) {
    const Json* j = config_value(m, name, Json::BOOLEAN, "true or false");
    return j ? j->text == "true" : usual;
}
float config_eps(const HfModel& m, const char* name, double usual) {   // of norms
    const double eps = config_number(m, name, usual);
    if (!(eps > 0 && eps < 1)) fail("%s/config.json: %s: expected a number between 0 and 1, found %g", m.folder.c_str(), name, eps);
    return (float)eps;
}
std::string config_text(const HfModel& m, const char* name, const char* usual) {
    const Json* j = config_value(m, name, Json::STRING, "a text");
    return j ? j->text : usual;
}
[[noreturn]] void config_refuse(const HfModel& m, const char* name, const std::string& found, const char* expected) {
    fail("%s/config.json: %s is %s; expected %s: %s does nothing else", m.folder.c_str(), name, found.c_str(), expected, program_name);
}
// Lora::quantized, by quantization_config.
int hf_quantization(const HfModel& m) {
    const Json* q = config_value(m, "quantization_config", Json::OBJECT, "an object");
    if (q == nullptr) return 0;
    auto expect = [&](const char* name, const char* usual, const char* expected) {
        const std::string found = (*q)[name].type <= Json::JSON_NULL ? usual : (*q)[name].text;
        if (found != expected) config_refuse(m, (std::string("quantization_config, ") + name).c_str(), "'" + found + "'", expected);
    };
    expect("quant_method", "none", "bitsandbytes");
    expect("load_in_4bit", "false", "true");
    expect("bnb_4bit_quant_type", "fp4", "nf4");
    expect("bnb_4bit_quant_storage", "uint8", "uint8");
    return (*q)["bnb_4bit_use_double_quant"].text == "true" ? 2 : 1;
}
// ==== end twin
// ---- Llama's names and settings in Hugging Face's format

std::vector<HfPiece> hf_pieces(const Config& c, int p, int layer) {
    const size_t C = c.C, V = c.V, F = c.F, HS = c.HS(), q = c.ATT(), kv = c.NKV * HS;   // V: the rows that pad it are ours
    const std::string block = "model.layers." + std::to_string(layer) + ".", att = block + "self_attn.", mlp = block + "mlp.";
    switch (p) {
        case WTE:      return {{"model.embed_tokens.weight", V, C}};
        case LN1W:     return {{block + "input_layernorm.weight", C, 0}};
        case QKVW:     return {{att + "q_proj.weight", q, C}, {att + "k_proj.weight", kv, C}, {att + "v_proj.weight", kv, C}};
        case QKVB:     return {{att + "q_proj.bias", q, 0}, {att + "k_proj.bias", kv, 0}, {att + "v_proj.bias", kv, 0}};
        case QNORMW:   return {{att + "q_norm.weight", HS, 0}};
        case KNORMW:   return {{att + "k_norm.weight", HS, 0}};
        case ATTPROJW: return {{att + "o_proj.weight", C, q}};
        case LN2W:     return {{block + "post_attention_layernorm.weight", C, 0}};
        case GATEUPW:  return {{mlp + "gate_proj.weight", F, C}, {mlp + "up_proj.weight", F, C}};
        case DOWNW:    return {{mlp + "down_proj.weight", C, F}};
        case LNFW:     return {{"model.norm.weight", C, 0}};
        default:       return {{"lm_head.weight", V, C}};
    }
}
// What files may hold besides: the frequencies of RoPE in old ones, and a tied head, which is the embedding once more.
bool hf_ignores(const Config& c, const std::string& name) {
    return (c.tied && name == "lm_head.weight") || name.find(".rotary_emb.inv_freq") != std::string::npos;
}
// Models that were saved without their head leave "model." out.
void hf_complete_names(HfModel& m) {
    for (SafeTensor& t : m.tensors)
        for (const char* first : {"embed_tokens.", "layers.", "norm."})
            if (t.name.compare(0, strlen(first), first) == 0) { t.name = "model." + t.name; break; }
    std::sort(m.tensors.begin(), m.tensors.end(), [](const SafeTensor& a, const SafeTensor& b) { return a.name < b.name; });
}
// transformers 5 writes all of it into rope_parameters, 4 into rope_theta and rope_scaling, with "type" for "rope_type" in old files.
Rope hf_rope(const HfModel& m) {
    const Json *newer = config_value(m, "rope_parameters", Json::OBJECT, "an object");
    const Json *older = config_value(m, "rope_scaling", Json::OBJECT, "an object");
    const bool old = older != nullptr && !older->names.empty();   // it counts where both are there
    const char* name = old || newer == nullptr ? "rope_scaling" : "rope_parameters";
    HfModel part, with_theta;
    part.folder = with_theta.folder = m.folder;
    if (newer != nullptr) part.config = with_theta.config = *newer;
    if (old) part.config = *older;
    Rope r = {(float)config_number(with_theta, "rope_theta", config_number(m, "rope_theta", 10000))};
    const std::string type = config_text(part, "rope_type", config_text(part, "type", "default").c_str());
    auto need = [&](const char* key) {
        const double x = config_number(part, key, 0);
        if (!(x > 0 && x < 1e9)) fail("%s/config.json: %s: rope_type %s needs %s, between 0 and 10^9", m.folder.c_str(), name, type.c_str(), key);
        return (float)x;
    };
    for (size_t i = 0; i < part.config.values.size(); i++)
        if (part.config.values[i].type == Json::OBJECT)
            config_refuse(m, name, "one for each kind of layer ('" + part.config.names[i] + "')", "one for all layers");
    if (config_number(part, "partial_rotary_factor", config_number(m, "partial_rotary_factor", 1)) != 1)
        config_refuse(m, "partial_rotary_factor", "not 1", "1");
    if (!(r.theta >= 1 && r.theta < 1e30f)) fail("%s/config.json: rope_theta: expected 1 or more", m.folder.c_str());
    if (type == "default") return r;
    if (type != "linear" && type != "llama3")
        config_refuse(m, (std::string(name) + ", rope_type").c_str(), "'" + type + "'", "default, linear or llama3");
    r.scaling = type == "linear" ? ROPE_LINEAR : ROPE_LLAMA3;
    r.factor = need("factor");
    if (type == "linear") return r;
    r.low = need("low_freq_factor"), r.high = need("high_freq_factor"), r.original = (int)need("original_max_position_embeddings");
    if (r.high <= r.low) fail("%s/config.json: %s: expected high_freq_factor above low_freq_factor", m.folder.c_str(), name);
    return r;
}
int size_of_heads(const Config& c) { return c.C % c.NH == 0 ? c.C / c.NH : 0; }   // where none is given; 0: there is none
// The model that a config.json describes. What it asks for and we do not do is refused.
Config hf_config(const HfModel& m) {
    const std::string type = config_text(m, "model_type", "");
    if (type != "llama" && type != "mistral" && type != "qwen2" && type != "qwen3")
        config_refuse(m, "model_type", "'" + type + "'", "llama, mistral, qwen2 or qwen3 (train_gpt2 takes gpt2)");
    Config c = {};
    c.V = (int)config_int(m, "vocab_size"), c.C = (int)config_int(m, "hidden_size"), c.F = (int)config_int(m, "intermediate_size");
    c.L = (int)config_int(m, "num_hidden_layers"), c.NH = (int)config_int(m, "num_attention_heads");
    c.NKV = (int)config_int(m, "num_key_value_heads", c.NH);
    c.head_size = (int)config_int(m, "head_dim", type == "qwen3" ? 128 : size_of_heads(c));
    c.maxT = (int)config_int(m, "max_position_embeddings", type == "llama" ? 2048 : type == "mistral" ? 131072 : 32768);
    c.Vp = padded(c.V);
    c.eps = config_eps(m, "rms_norm_eps", 1e-6);
    c.rope = hf_rope(m);
    c.tied = config_flag(m, "tie_word_embeddings", false), c.qkv_bias = type == "qwen2", c.qk_norm = type == "qwen3";
    const std::string act = config_text(m, "hidden_act", "silu");
    if (act != "silu" && act != "swish") config_refuse(m, "hidden_act", act, "silu");
    for (const char* name : {"attention_bias", "mlp_bias"})
        if (config_flag(m, name, false)) config_refuse(m, name, "true", "false");
    c.lora.quantized = hf_quantization(m);
    for (const char* name : {"attn_logit_softcapping", "final_logit_softcapping", "num_local_experts", "num_experts",
                             "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier"})
        if (m.config[name].type > Json::JSON_NULL) config_refuse(m, name, "there", "none");
    if (config_number(m, "attention_dropout", 0) > 0 && world.rank == 0)
        warn("note: %s/config.json has attention_dropout %g; this program trains without dropout", m.folder.c_str(),
             config_number(m, "attention_dropout", 0));
    // A window that is at least as long as the sequence hides nothing, so sequences may have its length.
    bool slides = type == "mistral" || config_flag(m, "use_sliding_window", false);
    const Json* layers = config_value(m, "layer_types", Json::ARRAY, "a list");
    for (const Json& layer : layers ? layers->values : std::vector<Json>()) {
        if (layer.text != "full_attention" && layer.text != "sliding_attention")
            config_refuse(m, "layer_types", "'" + layer.text + "'", "full_attention");
        slides |= layer.text == "sliding_attention";
    }
    const bool silent = m.config["sliding_window"].type == Json::ABSENT;
    const int window = !slides ? 0 : silent ? 4096 : (int)config_int(m, "sliding_window", 0);   // 4096: Mistral's, unless it says null
    if (window > 0) c.window = window;
    if (window > 0 && window < c.maxT) {
        if (world.rank == 0)
            warn("note: %s/config.json has a sliding window; sequences may be as long as it, %d", m.folder.c_str(), window);
        c.maxT = window;
    }
    return c;
}
// Into what the model came with. What only a model of ours lacks is filled in.
void hf_config_json(const Config& c, Json& j) {
    const char* ours = c.qk_norm ? "qwen3" : c.qkv_bias ? "qwen2" : "llama";
    const std::string type = j["model_type"].type == Json::STRING ? j["model_type"].text : ours;
    const std::pair<const char*, const char*> classes[] = {
        {"llama", "LlamaForCausalLM"}, {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
    Json architectures;
    architectures.type = Json::ARRAY;
    for (auto& [name, architecture] : classes)
        if (type == name) architectures.values = {json_string(architecture)};
    j.set("architectures", architectures);
    j.set("model_type", json_string(type));
    const std::pair<const char*, size_t> numbers[] = {
        {"vocab_size", c.V}, {"hidden_size", c.C}, {"intermediate_size", c.F}, {"num_hidden_layers", c.L}, {"num_attention_heads", c.NH},
        {"num_key_value_heads", c.NKV}, {"head_dim", c.head_size}};
    for (auto& [name, value] : numbers) j.set(name, json_sizes({value}).values[0]);
    j.set("rms_norm_eps", json_number_value(c.eps));
    j.set("tie_word_embeddings", json_bool(c.tied));
    auto fill = [&](const char* name, Json value) {
        if (j[name].type == Json::ABSENT) j.set(name, std::move(value));
    };
    fill("hidden_act", json_string("silu"));
    fill("max_position_embeddings", json_sizes({(size_t)c.maxT}).values[0]);
    // For transformers 4, also beside the rope_parameters of 5, which 4 does not read: it would take 10000 and no scaling.
    fill("rope_theta", json_number_value(c.rope.theta));
    if (c.rope.scaling != ROPE_PLAIN && j["rope_scaling"].type != Json::OBJECT) {
        Json& scaling = j.set("rope_scaling", json_object());
        scaling.set("rope_type", json_string(c.rope.scaling == ROPE_LINEAR ? "linear" : "llama3"));
        scaling.set("factor", json_number_value(c.rope.factor));
        if (c.rope.scaling == ROPE_LLAMA3) {
            scaling.set("low_freq_factor", json_number_value(c.rope.low));
            scaling.set("high_freq_factor", json_number_value(c.rope.high));
            scaling.set("original_max_position_embeddings", json_sizes({(size_t)c.rope.original}).values[0]);
        }
    }
    for (const char* name : {"bos_token_id", "eos_token_id"})   // as our own vocabularies have it
        fill(name, json_sizes({(size_t)c.V - 1}).values[0]);
}

// What -e names.
const char* MODEL_REMEDY = "give -e a model's directory or a size such as smollm2-135m";
Config model_read_config(const std::string& path) {
    if (file_exists(path) && !is_folder(path.c_str())) fail("%s: expected a directory, found a file; %s", path.c_str(), MODEL_REMEDY);
    return hf_config(hf_open(path));
}
Source model_load(Model& model, const std::string& path) { return hf_load(model, path); }

// ==== twin: checkpoints, device, schedule, command line
// ---- checkpoints: OUT/step_00000010 is a model's directory, which also holds the state of each rank
// Where a run stands, besides its weights: with it 5 steps, a checkpoint and 5 steps equal 10 steps.
struct RunState {
    int step = 0, not_finite_in_row = 0;   // steps done, and how many of the last ones were not finite
    Position position;                     // after the data that these steps have used; the loader may be ahead
    std::vector<double> settings;          // what the run was told, in the order of settings_kept
};
// llm.c's header of a state, with more in slots that llm.c leaves free. Beside a line stands the slot of its first name.
struct StateHeader {
    int32_t magic, version, ranks, rank, master, shuffle, zero, weights, optimizer, unused9;   // 0; weights: bytes of each, if any
    int32_t step, T, shards, chunk_rows;                                      // 10
    size_t tokens;                                                            // 14
    int32_t B, unused17[3];                                                   // 16
    uint64_t seed;                                                            // 20
    int32_t updates, unused23[7];                                             // 22
    Position position;                                                        // 30
    size_t checksum;                                                          // 36; 0 in old files
    int32_t unused38[2], settings, unused41;                                  // 38
    double setting[(HEADER_INTS - 42) / 2];                                   // 42
};
static_assert(sizeof(StateHeader) == HEADER_BYTES, "a header has 256 int32");
constexpr int STATE_MAGIC = 20240527, ROW_CHUNKS_SLOT = 25;   // which of the settings is how many chunks of rows there were
const char* OPTIMIZERS[] = {"adamw", "adamw8", "adalomo"};
const char* STATE_REMEDY = "remove this checkpoint's directory to resume from the one before, or start afresh with another --out";

StateHeader state_header(const Model& model, const RunState& r, const Loader& train) {
    StateHeader h = {STATE_MAGIC, 1, world.size, world.rank, model.plan.master && !kFP32, 1, world.sharded};
    h.weights = model.weights_in_state ? sizeof(floatX) : 0;
    h.optimizer = model.plan.optimizer;
    h.step = r.step, h.position = r.position;
    h.T = train.T, h.shards = (int)train.shards.size(), h.tokens = train.tokens, h.checksum = train.checksum;
    h.B = model.plan.B, h.chunk_rows = model.plan.chunk_rows;
    h.seed = model.seed, h.updates = model.updates;
    h.settings = (int)r.settings.size();
    std::copy(r.settings.begin(), r.settings.end(), h.setting);
    return h;
}
// Calls f(device pointer, bytes) for each thing that follows the header, in the order of the file.
void state_walk(const Model& model, const std::function<void(void* device, size_t bytes)>& f) {
    for (const std::string prefix : {"m_", "v_", "master_"})
        for (const Row& r : model.table)
            if (r.kind == OPTIMIZER && r.name.compare(0, prefix.size(), prefix) == 0) f(r.get(), r.bytes());
    for (int p = 0; model.weights_in_state && p < NUM_PARAMS; p++)
        if (model.param[p] != nullptr && model.plan.trains(p))
            f(model.param[p], param_shape(model.config, p).elements() * sizeof(floatX));
    f(&model.state->history, sizeof(History));
}
size_t state_bytes(const Model& model) {
    size_t n = HEADER_BYTES;
    state_walk(model, [&](void*, size_t bytes) { n += bytes; });
    return n;
}

std::string checkpoint_folder(const std::string& out, int step) {
    char name[32];
    snprintf(name, sizeof name, "/step_%08d", step);
    return out + name;
}
std::string state_path(const std::string& folder, int rank = world.rank) {
    char name[32];
    snprintf(name, sizeof name, "/state_%05d.bin", rank);
    return folder + name;
}

// What a run chose by the memory that was free, and keeps when it is resumed: otherwise sums would have another order.
StateHeader state_peek(const std::string& folder) {   // of rank 0, which there always is
    StateHeader h;
    fclose(open_with_header(state_path(folder, 0).c_str(), &h, STATE_MAGIC, "the state of a run", STATE_REMEDY));
    return h;
}
Plan state_plan(const std::string& folder) {
    const StateHeader h = state_peek(folder);
    if (h.ranks != world.size)
        fail("%s: was written by a run on %d GPUs, this one has %d; resume with as many GPUs", state_path(folder, 0).c_str(), h.ranks,
             world.size);
    Plan was = {};
    was.B = std::max(h.B, 0), was.chunk_rows = std::max(h.chunk_rows, 0);
    const double rows = (double)was.B * std::max(h.T, 0), chunks = h.settings > ROW_CHUNKS_SLOT ? h.setting[ROW_CHUNKS_SLOT] : 0;
    if (chunks >= 1 && chunks <= rows && rows < 1 << 30) was.rows = loss_chunk_rows((size_t)rows, (size_t)chunks);   // a NaN is neither
    return was;
}
// Puts model and loader where the run stood after `step` steps. A run that only evaluates needs its seed alone.
RunState state_load(Model& model, Loader& train, const std::string& folder, int step) {
    const std::string name = state_path(folder, model.plan.training ? world.rank : 0);
    const char* path = name.c_str();
    const StateHeader now = state_header(model, RunState(), train);
    StateHeader was;
    FILE* f = open_with_header(path, &was, STATE_MAGIC, "the state of a run", STATE_REMEDY);
    if (was.version != 1 || was.step != step)
        fail("%s: expected version 1 after step %d, found version %d after step %d; %s", path, step, was.version, was.step,
             STATE_REMEDY);
    model.seed = train.seed = was.seed;
    if (!model.plan.training) { fclose(f); return {step, 0, {}, {}}; }
    if (was.ranks != now.ranks || was.rank != now.rank || was.zero != now.zero)
        fail("%s: was written by rank %d of %d with --zero %d, this is rank %d of %d with --zero %d; resume with as many GPUs "
             "and the same --zero", path, was.rank, was.ranks, was.zero, now.rank, now.ranks, now.zero);
    if (was.optimizer != now.optimizer)
        fail("%s: its run had --optimizer %s, this one has %s; resume with the same, or take the weights to a new run: -e %s and "
             "another --out", path, was.optimizer < 0 || was.optimizer > ADALOMO ? "of another version" : OPTIMIZERS[was.optimizer],
             OPTIMIZERS[now.optimizer], folder.c_str());
    if (was.master != now.master)
        fail("%s: its run %s fp32 master weights, this one %s them; resume with the same --master-weights and PRECISION", path,
             was.master ? "kept" : "did without", now.master ? "keeps" : "does without");
    if (was.weights != 0 && was.weights != (int)sizeof(floatX))
        fail("%s: holds weights of %d bytes each, this build has %zu; resume with the same PRECISION", path, was.weights, sizeof(floatX));
    const bool weights = std::exchange(model.weights_in_state, was.weights != 0);   // until it is read
    if (file_size(f) != state_bytes(model))
        fail("%s: expected %zu bytes for this model, found %zu; it is damaged or was cut off; %s", path, state_bytes(model),
             file_size(f), STATE_REMEDY);
    if (was.T != now.T || was.shards != now.shards || was.tokens != now.tokens || (was.checksum != 0 && was.checksum != now.checksum))
        fail("%s: its run read %zu tokens in %d shards in sequences of %d (checksum %zx), this one reads %zu in %d in sequences "
             "of %d (checksum %zx); resume with the same -i and -t, or take the weights to other data: -e %s and another --out",
             path, was.tokens, was.shards, was.T, was.checksum, now.tokens, now.shards, now.T, now.checksum,
             folder.c_str());
    const Position& at = was.position;
    if (was.updates < 0 || at.shard >= train.shards.size() || at.window > train.tokens)
        fail("%s: step %d, shard %zu, sequence %zu is no place in these data; it is damaged; %s", path, step, at.shard, at.window,
             STATE_REMEDY);
    if (was.settings < 0 || was.settings > (int)std::size(was.setting))
        fail("%s: its header counts %d settings; it is damaged; %s", path, was.settings, STATE_REMEDY);
    model.updates = was.updates;
    loader_seek(train, at.epoch, at.shard, at.window);
    state_walk(model, [&](void* device, size_t bytes) {
        device_copy(false, device, bytes, [&](void* data, size_t n) { read_bytes(f, path, data, n); });
    });
    model.weights_in_state = weights;
    fclose(f);
    return {step, 0, at, {was.setting, was.setting + was.settings}};
}
constexpr const char* CHECKPOINTS = "/step_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]";   // in a folder, as a pattern
// Steps of the checkpoints in a folder, ascending.
std::vector<int> checkpoints_in(const std::string& out) {
    std::vector<int> steps;
    if (is_folder(out.c_str()))
        for (const std::string& name : files_named(out + CHECKPOINTS))
            if (is_folder(name.c_str())) steps.push_back(atoi(&name[name.size() - 8]));
    return steps;
}
void remove_folder(const std::string& path) {   // one of ours, in which there are only files; of a link, the link
    struct stat s;
    if (lstat(path.c_str(), &s) == 0 && S_ISLNK(s.st_mode)) return void(unlink(path.c_str()));
    for (const std::string& file : files_named(path + "/*")) unlink(file.c_str());
    rmdir(path.c_str());
}

// Writes a checkpoint under a temporary name, and renames it when all is on the disk: a run that is killed in between resumes from the
// one before. False: this one could not be written. That is said, nothing is left of it, and those before it stay.
bool checkpoint_save(Model& model, const RunState& r, const Loader& train, const std::string& out, int keep, const Source& source) {
    NvtxRange range("checkpoint");
    const std::string folder = checkpoint_folder(out, r.step), unfinished = folder + ".tmp";
    std::string error;   // of this rank
    if (world.rank == 0) {
        remove_folder(unfinished);   // a killed run may have left it
        if (mkdir(unfinished.c_str(), 0777) != 0) error = "cannot make " + unfinished + ": " + strerror(errno);
    }
    if (!world_any(!error.empty())) {   // and every rank has waited for the folder
        error = model_save(model, unfinished, source);
        if (error.empty())
            error = write_file(state_path(unfinished), [&](const Put& put) {
                const StateHeader h = state_header(model, r, train);
                put(&h, sizeof h);
                state_walk(model, [&](void* device, size_t bytes) { device_copy(true, device, bytes, put); });
            });
    }
    bool failed = world_any(!error.empty());
    if (!failed && world.rank == 0) {
        remove_folder(folder);   // a run that started over may write this step again
        if (rename(unfinished.c_str(), folder.c_str()) != 0) error = "cannot rename " + unfinished + ": " + strerror(errno);
        sync_folder(out);
    }
    failed = world_any(!error.empty());
    if (failed) {
        if (world.rank == 0) remove_folder(unfinished);
        if (!error.empty()) warn("%s. There is no checkpoint of step %d; those before it stay", error.c_str(), r.step);
        return false;
    }
    if (world.rank > 0) return true;
    printf("checkpoint of step %d in %s\n", r.step, folder.c_str());
    const std::vector<int> steps = checkpoints_in(out);
    for (size_t i = 0; keep > 0 && i + keep < steps.size(); i++) {
        const std::string old = checkpoint_folder(out, steps[i]);
        if (rename(old.c_str(), (old + ".tmp").c_str()) == 0) remove_folder(old + ".tmp");   // half of one must not look whole
    }
    return true;
}

// ==== 9. main ====================================================================================================================
#ifndef TESTING
// Peak of the tensor cores in bf16 without sparsity, in FLOP/s, by NVIDIA's data sheets; 0 where a share of it (MFU) means nothing.
double device_peak_flops(const cudaDeviceProp& prop, bool tensor_cores) {
    const struct { const char* name; double tflops; } known[] = {
        {"H200", 989}, {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989}, {"H800", 989}, {"H20", 148}, {"B200", 2250}, {"A100", 312},
        {"A800", 312}, {"L40S", 362}, {"L40", 181}, {"L4", 121}, {"A40", 150}, {"A10G", 70}, {"A10", 125}, {"A6000", 155},
        {"6000 Ada", 364}, {"RTX 3090", 71}, {"RTX 4090", 165}, {"RTX 4080", 97}, {"RTX 5090", 209}, {"RTX 5080", 113},
    };
    if (!tensor_cores || prop.major < 8 || strstr(prop.name, "CPU")) return 0;
    const double precision = kFP32 ? 0.5 : 1;   // TF32 runs at half the rate of bf16
    std::string words = std::string(" ") + prop.name + " ";   // whole words are compared: an A1000 is no A100
    for (char& c : words) c = isalnum((unsigned char)c) ? c : ' ';
    for (auto& k : known)
        if (words.find(std::string(" ") + k.name + " ") != std::string::npos) return k.tflops * 1e12 * precision;
    return 0;
}

// The learning rate of step 0, 1, ..., steps - 1: a linear warmup to `peak`, then down to peak * final_fraction.
// wsd (warmup, stable, decay: Hu et al., arXiv 2404.06395) stays at the peak and falls, linearly, in the last fifth of the run.
enum Schedule { COSINE, LINEAR_DECAY, CONSTANT, WSD };
float schedule_lr(int schedule, int step, int steps, float peak, int warmup, float final_fraction) {
    if (step < warmup) return peak * (step + 1) / warmup;
    if (schedule == CONSTANT) return peak;
    const double from = schedule == WSD ? std::max(warmup, steps - steps / 5) : warmup;
    const double done = step < from ? 0 : (step - from) / std::max(1.0, steps - from);   // 0 at the peak, 1 where the run ends
    const double share = schedule == COSINE ? 0.5 * (1 + cos(M_PI * done)) : 1 - done;
    return peak * (float)(final_fraction + (1 - final_fraction) * share);
}

// The first signal asks for a checkpoint and the end of the run. A second Ctrl-C or SIGTERM ends it at once, unless it follows within
// half a second: timeout sends two, and when a terminal closes, both the kernel and the shell tell us.
volatile sig_atomic_t interrupted = 0;   // the signal
// What Ctrl-C answers at once, although the step goes on. (A signal handler may do little more than write(2).)
const char* const STOP_ANSWERS[] = {"", "\nstopping after this step; a second Ctrl-C ends at once\n",
                                    "\nstopping after this step, with a checkpoint; a second Ctrl-C ends at once, without it\n"};
volatile sig_atomic_t stop_answer = 0;
void set_stop_answer(bool saves) { stop_answer = world.rank > 0 ? 0 : 1 + saves; }
void on_interrupt(int signal) {
    static double first = 0;
    const int error = errno;
    const char* answer = STOP_ANSWERS[stop_answer];
    if (!interrupted) {
        first = now_seconds();
        interrupted = signal;
        if (write(STDERR_FILENO, answer, strlen(answer)) < 0) { /* nobody is there to read it */ }
    } else if ((signal == SIGINT || signal == SIGTERM) && now_seconds() - first > 0.5) {
        ::signal(signal, SIG_DFL);
        raise(signal);
    }
    errno = error;
}
void catch_signals() {
    struct sigaction action = {}, before = {};
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART;
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGUSR1, SIGUSR2})   // batch systems send the last three
        if (signal != SIGHUP || (sigaction(signal, nullptr, &before) == 0 && before.sa_handler != SIG_IGN))   // nohup ignores it
            sigaction(signal, &action, nullptr);
}

constexpr int MOST_T = 1 << 24;   // tokens of a sequence

// ---- the command line: one table for parsing, for messages, for --help, and for what a state file keeps of it
enum ValueType { INTEGER, REAL, TEXT, ESTIMATE, FIT, HELP, BUILD };   // BUILD: a flag of the build, which is in the table to be kept
constexpr int LORA_SLOT = 18, LORA_SLOTS = 7;   // slots of options about adapters
struct Option {
    const char *name, *alias;   // long; llm.c's, or ""
    ValueType type;
    void* value;                // int64_t; double for REAL; std::string for TEXT, ESTIMATE and FIT
    double low, high;           // of numbers; where low > high, words alone are allowed
    const char *usual, *help;   // as --help prints them: the default, what the option does
    int slot = -1;              // where a state file keeps the value: see settings_kept
    std::vector<const char*> words = {};   // what stands for the numbers 0, 1, ...
    std::string typed = "";     // the spelling on the command line; empty if it was not there
    double number() const { return type == REAL ? *(double*)value : (double)*(int64_t*)value; }
    void set(double x) { type == REAL ? *(double*)value = x : *(int64_t*)value = (int64_t)x; }
    std::string text(double x) const {
        char digits[32];
        snprintf(digits, sizeof digits, "%.10g", x);
        return x >= 0 && x < words.size() ? words[(size_t)x] : digits;
    }
};
std::vector<Option> options;

Option& option(const std::string& name) {
    return *std::find_if(options.begin(), options.end(), [&](const Option& o) { return name == o.name; });
}
bool given(const char* name) { return !option(name).typed.empty(); }
// For messages: an option as it was typed, or its long form; and with its value.
std::string typed(const char* name) { return given(name) ? option(name).typed : std::string("--") + name; }
std::string quoted(const char* name) {
    const Option& o = option(name);
    return typed(name) + " " + (o.type == TEXT ? *(std::string*)o.value : o.text(o.number()));
}
// fail and fail_usage with a message about this option.
#define fail_option(name, format, ...) fail("%s: " format, quoted(name).c_str(), ##__VA_ARGS__)
#define bad_option(name, format, ...) fail_usage("%s: " format, quoted(name).c_str(), ##__VA_ARGS__)

void options_help() {
    printf("usage: %s [options]      (--name VALUE or --name=VALUE)\n\n", program_name);
    for (const Option& o : options)
        if (o.type != BUILD)
            printf("  %-4s --%-21s %s%s%s%s\n", o.alias, o.name, o.help, *o.usual ? " [" : "", o.usual, *o.usual ? "]" : "");
}

void option_set(Option& o, const std::string& text, bool attached) {   // attached: as in --name=text
    const char *name = o.typed.c_str(), *value = text.c_str();
    const size_t word = std::find(o.words.begin(), o.words.end(), text) - o.words.begin();
    char* end = nullptr;
    errno = 0;
    const double number = o.type == REAL ? strtod(value, &end) : (double)strtoll(value, &end, 10);
    // plain decimals alone: no blanks, no hexadecimals; and NaN is out of range
    const bool plain = text.find_first_not_of("0123456789+-.eE") == std::string::npos && *end == '\0' && errno == 0;
    const bool fine = plain && number >= o.low && number <= o.high;
    if (o.type == TEXT && !attached && text[0] == '-')
        fail_usage("%s %s: expected a value, found an option (%s); a name that begins so is written --%s=%s", name, value, o.help, o.name,
                   value);
    if (o.type == TEXT) *(std::string*)o.value = text;
    else if (word < o.words.size()) *(int64_t*)o.value = word;
    else if (fine && o.type == REAL) *(double*)o.value = number;
    else if (fine) *(int64_t*)o.value = (int64_t)number;   // exact: no limit is above 2^53
    else if (o.low > o.high) {
        std::string words;
        for (const char* w : o.words) words += (words.empty() ? "" : ", ") + std::string(w);
        fail_usage("%s %s: expected one of: %s", name, value, words.c_str());
    }
    else if (o.type == REAL) fail_usage("%s %s: expected a number from %g to %g", name, value, o.low, o.high);
    else fail_usage("%s %s: expected a whole number from %.0f to %.0f%s", name, value, o.low, o.high, o.words.empty() ? "" : ", or auto");
}

void options_parse(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i], next = i + 1 < argc ? argv[i + 1] : "";
        const size_t equals = arg.compare(0, 2, "--") == 0 ? arg.find('=') : std::string::npos;
        const bool attached = equals != std::string::npos;
        const std::string name = arg.substr(0, equals), value = attached ? arg.substr(equals + 1) : next;
        auto o = std::find_if(options.begin(), options.end(), [&](const Option& o) {
            return o.type != BUILD && (name == std::string("--") + o.name || (*o.alias && name == o.alias)); });
        if (o == options.end()) fail_usage("%s: no such option; --help lists them", arg.c_str());
        if (!o->typed.empty() && o->type != FIT && world.rank == 0) warn("%s is given more than once: the last one counts", name.c_str());
        o->typed = name;
        if (o->type == HELP) {   // llm.c's -h takes 0 or 1 and switches HellaSwag's evaluation; ours alone is help
            if (name == "-h" && next == "1")
                fail_usage("-h 1: HellaSwag's evaluation does not exist here; allowed: -h 0, or -h alone for help");
            if (name == "-h" && next == "0") { i++; continue; }
            options_help();
            leave(0);
        }
        if (o->type == ESTIMATE) {
            if (attached && value != "json") fail_usage("%s: allowed: --estimate or --estimate=json", arg.c_str());
            *(std::string*)o->value = attached ? "json" : "text";
            continue;
        }
        if (o->type == FIT) {   // may stand alone, and twice: what it says adds up
            const bool takes = !attached && !next.empty() && next[0] != '-';
            i += takes;
            if (attached || takes) *(std::string*)o->value += (attached ? value : next) + ",";
            continue;
        }
        if (!attached && ++i >= argc) fail_usage("%s: expects a value (%s)", name.c_str(), o->help);
        if (value.empty()) fail_usage("%s: expected a value, found an empty one (%s)", arg.c_str(), o->help);
        option_set(*o, value, attached);
    }
}

// Files that the run will write besides its checkpoints: found out now whether it can.
void check_name(const char* name, const std::string& path) {
    const std::string out = *(std::string*)option("out").value, base = path.substr(path.rfind('/') + 1);
    const std::string model = *(std::string*)option("model").value, folder = real_path(folder_of(path));
    const bool checkpoint = fnmatch(&CHECKPOINTS[1], base.substr(0, 13).c_str(), 0) == 0;
    if (!out.empty() && folder == real_path(out) && (checkpoint || base == ".lock"))
        fail_option(name, "that name in --out is a checkpoint's or the lock's; expected another");
    for (const char* part : {"model", "config.json", "generation_config", "tokenizer", "pytorch_model", "adapter_"})   // what readers look for
        if (is_folder(model.c_str()) && folder == real_path(model) && base.compare(0, strlen(part), part) == 0)
            fail_option(name, "that name in the directory of the model would make it another; expected another name, or another folder");
    for (const char* other : {"log", "dump-gradients", "write-bin"})
        for (const Option& o : options)
            if (strcmp(o.name, other) == 0 && strcmp(name, other) != 0 && *(std::string*)o.value == path)
                fail_option(name, "is the file of --%s as well; expected one for each", other);
    struct stat st;
    if (stat((path + ".tmp").c_str(), &st) == 0)
        fail_option(name, "there is %s.tmp, under which it would be written first; remove that, or name another", path.c_str());
}
// One that is there is replaced if it begins as ours do, `at` bytes from its beginning.
void check_output(const char* name, const std::string& path, size_t at, const std::string& begins) {
    if (path.empty()) return;
    check_name(name, path);
    struct stat st;
    if (stat(path.c_str(), &st) != 0) {
        const std::string folder = folder_of(path);
        if (access(folder.c_str(), W_OK | X_OK) != 0) fail_option(name, "cannot write into the folder %s: %s", folder.c_str(), strerror(errno));
        return;
    }
    if (!S_ISREG(st.st_mode)) fail_option(name, "expected a file, found a folder or a device");
    std::string found(begins.size(), '\0');
    FILE* f = fopen(path.c_str(), "rb");
    const size_t got = f != nullptr && fseek(f, at, SEEK_SET) == 0 ? fread(&found[0], 1, found.size(), f) : 0;
    const bool ours = f != nullptr && (st.st_size == 0 || (got == found.size() && found == begins));
    if (f != nullptr) fclose(f);
    if (!ours) fail_option(name, "there is another kind of file of that name, which stays; remove it or name another");
}

// ---- sizes by letters, as in L4,H4,C128,T64,V257
struct SizeLetter { char name; int* value; bool must, seen = false; };
void parse_letters(const char* at, std::vector<SizeLetter> letters, const char* meaning, const std::string& example) {
    while (*at != '\0') {
        char* end;
        const long value = strtol(at + 1, &end, 10);
        auto letter = std::find_if(letters.begin(), letters.end(), [&](auto& l) { return l.name == *at && !l.seen; });
        if (letter == letters.end() || end == at + 1 || value < 1 || value > 1 << 30 || (*end != '\0' && *end != ','))
            bad_option("model", "expected a size like %s (%s)", example.c_str(), meaning);
        *letter->value = (int)value;
        letter->seen = true;
        at = *end == ',' ? end + 1 : end;
    }
    for (const SizeLetter& l : letters)
        if (l.must && !l.seen) bad_option("model", "expected %c among the sizes, as in %s", l.name, example.c_str());
}
// ==== end twin
// ---- what of main is Llama's alone
// The model without -e, and a short way to ask for it; what --help says of -e and -r; the levels of -r.
const char *USUAL_MODEL = "smollm2-135m", *USUAL_TYPED = "smollm2-135m";
const char* MODEL_HELP = "DIR of a model, llama3.2-1b, or a size like llama:L4,H4,K2,C128,F352,T128,V257";
const char* LORA_HELP = "all, or some of q,k,v,o,gate,up,down";
const char* RECOMPUTE_HELP =
    "keep less for backward: computed again are 1: SwiGLU's output, 2: and norms, 3: gate and up, 4: whole blocks";
constexpr int RECOMPUTE_MOST = 4;
// The longest sequence: RoPE turns by any position, but where a window slides over the keys a longer one would need it.
inline int model_longest(const Config& c) { return c.window > 0 ? c.window : MOST_T; }
std::string model_example(int V) { return "llama:L4,H4,K2,C128,F352,T128,V" + std::to_string(V); }   // a small size, for messages
std::string model_sizes(const Config& c) {
    char text[160];
    snprintf(text, sizeof text, "L %d, NH %d, NKV %d, HS %d, C %d, F %d, T %d, V %d", c.L, c.NH, c.NKV, c.head_size, c.C, c.F, c.maxT,
             c.V);
    return text;
}

// The models that have a name here: sizes, what is special, RoPE. llama3: the factor of its scaling.
enum Special { TIED = 1, QKV_BIAS = 2, QK_NORM = 4 };
const struct Known { const char* name; int L, C, F, NH, NKV, HS, V, maxT, special; float theta, llama3, eps; } KNOWN_MODELS[] = {
    {"llama2-7b",      32, 4096, 11008, 32, 32, 128,  32000,   4096, 0,               1e4f,   0, 1e-5f},
    {"llama2-13b",     40, 5120, 13824, 40, 40, 128,  32000,   4096, 0,               1e4f,   0, 1e-5f},
    {"llama2-70b",     80, 8192, 28672, 64,  8, 128,  32000,   4096, 0,               1e4f,   0, 1e-5f},
    {"llama3-8b",      32, 4096, 14336, 32,  8, 128, 128256,   8192, 0,               5e5f,   0, 1e-5f},
    {"llama3.1-8b",    32, 4096, 14336, 32,  8, 128, 128256, 131072, 0,               5e5f,   8, 1e-5f},
    {"llama3.1-70b",   80, 8192, 28672, 64,  8, 128, 128256, 131072, 0,               5e5f,   8, 1e-5f},
    {"llama3.2-1b",    16, 2048,  8192, 32,  8,  64, 128256, 131072, TIED,            5e5f,  32, 1e-5f},
    {"llama3.2-3b",    28, 3072,  8192, 24,  8, 128, 128256, 131072, TIED,            5e5f,  32, 1e-5f},
    {"llama3.3-70b",   80, 8192, 28672, 64,  8, 128, 128256, 131072, 0,               5e5f,   8, 1e-5f},
    {"mistral-7b",     32, 4096, 14336, 32,  8, 128,  32768,  32768, 0,               1e6f,   0, 1e-5f},
    {"qwen2.5-0.5b",   24,  896,  4864, 14,  2,  64, 151936,  32768, TIED | QKV_BIAS, 1e6f,   0, 1e-6f},
    {"qwen2.5-1.5b",   28, 1536,  8960, 12,  2, 128, 151936,  32768, TIED | QKV_BIAS, 1e6f,   0, 1e-6f},
    {"qwen2.5-3b",     36, 2048, 11008, 16,  2, 128, 151936,  32768, TIED | QKV_BIAS, 1e6f,   0, 1e-6f},
    {"qwen2.5-7b",     28, 3584, 18944, 28,  4, 128, 152064,  32768, QKV_BIAS,        1e6f,   0, 1e-6f},
    {"qwen2.5-14b",    48, 5120, 13824, 40,  8, 128, 152064,  32768, QKV_BIAS,        1e6f,   0, 1e-6f},
    {"qwen2.5-32b",    64, 5120, 27648, 40,  8, 128, 152064,  32768, QKV_BIAS,        1e6f,   0, 1e-6f},
    {"qwen3-0.6b",     28, 1024,  3072, 16,  8, 128, 151936,  40960, TIED | QK_NORM,  1e6f,   0, 1e-6f},
    {"qwen3-1.7b",     28, 2048,  6144, 16,  8, 128, 151936,  40960, TIED | QK_NORM,  1e6f,   0, 1e-6f},
    {"qwen3-4b",       36, 2560,  9728, 32,  8, 128, 151936,  40960, TIED | QK_NORM,  1e6f,   0, 1e-6f},
    {"qwen3-8b",       36, 4096, 12288, 32,  8, 128, 151936,  40960, QK_NORM,         1e6f,   0, 1e-6f},
    {"qwen3-14b",      40, 5120, 17408, 40,  8, 128, 151936,  40960, QK_NORM,         1e6f,   0, 1e-6f},
    {"qwen3-32b",      64, 5120, 25600, 64,  8, 128, 151936,  40960, QK_NORM,         1e6f,   0, 1e-6f},
    {"smollm2-135m",   30,  576,  1536,  9,  3,  64,  49152,   8192, TIED,            1e5f,   0, 1e-5f},
    {"smollm2-360m",   32,  960,  2560, 15,  5,  64,  49152,   8192, TIED,            1e5f,   0, 1e-5f},
    {"smollm2-1.7b",   24, 2048,  8192, 32, 32,  64,  49152,   8192, TIED,            1.3e5f, 0, 1e-5f},
    {"tinyllama-1.1b", 22, 2048,  5632, 32,  4,  64,  32000,   2048, 0,               1e4f,   0, 1e-5f},
};

// A name of KNOWN_MODELS, or "llama:L4,H4,K2,C128,F352,T128,V257", in which K is H, F the usual share of C (8/3, in steps of 32), T 1024,
// V 32000, and D, the size of a head, C / H, where they are not given. False: neither, so it names a directory.
bool model_parse_size(const std::string& text, Config& c) {
    const bool prefixed = text.compare(0, 6, "llama:") == 0;
    auto known = std::find_if(std::begin(KNOWN_MODELS), std::end(KNOWN_MODELS), [&](auto& k) { return text == k.name; });
    const bool named = known != std::end(KNOWN_MODELS) && !is_folder(text.c_str());
    if (!prefixed && !named) {
        std::string names;
        for (const Known& k : KNOWN_MODELS) names += (names.empty() ? "" : " ") + std::string(k.name);
        if (!file_exists(text) && text.find('/') == std::string::npos)
            bad_option("model", "no directory of that name; expected one, a size like %s, or one of: %s", model_example(257).c_str(),
                       names.c_str());
        return false;
    }
    c = {};
    if (named) {
        const Known& k = *known;
        c = {k.maxT, k.V, 0, k.L, k.NH, k.NKV, k.C, k.HS, k.F, k.eps, {k.theta}};
        c.tied = (k.special & TIED) != 0, c.qkv_bias = (k.special & QKV_BIAS) != 0, c.qk_norm = (k.special & QK_NORM) != 0;
        if (k.llama3 > 0) c.rope = {k.theta, ROPE_LLAMA3, k.llama3, 1, 4, 8192};
    } else {
        c.maxT = 1024, c.V = 32000, c.eps = USUAL_EPS, c.rope = {10000};
        parse_letters(text.c_str() + 6,
                      {{'L', &c.L, true}, {'H', &c.NH, true}, {'K', &c.NKV, false}, {'C', &c.C, true}, {'D', &c.head_size, false},
                       {'F', &c.F, false}, {'T', &c.maxT, false}, {'V', &c.V, false}},
                      "layers, heads, key-value heads, channels, channels of a head, of the MLP, longest sequence, vocabulary",
                      model_example(257));
        if (c.NKV == 0) c.NKV = c.NH;
        if (c.head_size == 0) c.head_size = size_of_heads(c);
        if (c.F == 0) c.F = ceil_div((size_t)c.C * 8, 3 * 32) * 32;
    }
    c.Vp = padded(c.V);
    return true;
}

// What the kernels can do: whole vectors of 8 everywhere, heads whose row fits the registers of 4 threads, and a norm's row that fits
// the shared memory which every GPU gives. `from` is the size or the directory that asks for it.
void model_check_config(const Config& c, const char* from) {
    const int most = (int)(48 * 1024 / sizeof(floatX)) / 2;
    const std::string option = typed("model") + " " + from;
    if (c.head_size == 0)
        fail_usage("%s: C %d, %d heads, and no size of a head (head_dim, or D); expected one, or heads that divide C", option.c_str(), c.C, c.NH);
    if (c.NH % c.NKV != 0)
        fail_usage("%s: %d heads, %d key-value heads; expected key-value heads that divide the heads", option.c_str(), c.NH, c.NKV);
    if (c.head_size < 8 || c.head_size % 8 != 0 || c.head_size > 128)
        fail_usage("%s: heads of %d channels; expected a multiple of 8 up to 128", option.c_str(), c.head_size);
    if (c.C % 8 != 0 || c.F % 8 != 0 || c.C > most || c.L > 1 << 12 || c.F > 1 << 20 || c.NH > 1 << 10)
        fail_usage("%s: C %d, F %d, L %d; expected multiples of 8, C up to %d, F up to 2^20, L up to 4096, and up to 1024 heads",
                   option.c_str(), c.C, c.F, c.L, most);
}

#define MODEL_OPTIONS
int model_finish(const Model&) { return 0; }   // nothing is left to do when a run has ended well
void model_check_options() {}

// ==== twin: settings, plan, loop, main
// ---- settings: what the command line says
struct Settings {
    std::string train_data = "data/train.bin", val_data = "data/val.bin", model = USUAL_MODEL, out, log, estimate, fit, tokenizer;
    std::string dump_gradients, lora_targets = "all", adapter, merge;
    int64_t lora = 0, freeze_a = 0, train_norms = 0, base = 0, double_quant = 1, embedding_on = -1;
    double lora_alpha = 0, lora_dropout = 0;
    int64_t B = 4, T = 1024, total_batch = 0, steps = -1, schedule = COSINE, warmup = 0, seed = 1337;
    int64_t optimizer = ADAMW, recompute = 1, row_chunks = 0, offload = 0, master = 1, loss_chunks = 0, workspace = 0, tf32 = 1, zero = 0;
    int64_t val_every = 20, val_batches = 20, sample_every = 20, sample_tokens = 64, top_k = 40, overfit = 0;
    int64_t checkpoint_every = -1, keep = 0, resume = 0, save_dtype = 0;   // -1: at the end alone
    int64_t act_bits = kActBits, act_slope = kActSlope, ms_norm = kMsNorm, fp32 = kFP32;   // the build's
    // steps of 0 may still want gradients, or the model written as it came
    bool trains() const { return merge.empty() && (steps != 0 || !dump_gradients.empty() || (!out.empty() && !resume)); }
    double lr = 3e-4, final_fraction = 0.1, weight_decay = 0, grad_clip = 1.0, skip_loss_z = 0, skip_grad_z = 0, temperature = 0.8;
};
std::vector<Option> settings_options(Settings& s) {
    const double BIG = 2147483647;
    return {
        {"train-data", "-i", TEXT, &s.train_data, 0, 0, "data/train.bin", "FILE or 'PATTERN': shards of tokens to train on"},
        {"val-data", "-j", TEXT, &s.val_data, 0, 0, "data/val.bin", "FILE or 'PATTERN': shards of tokens to validate on"},
        {"tokenizer", "", TEXT, &s.tokenizer, 0, 0, "tokenizer.bin beside the training data", "FILE that turns sampled ids into text"},
        {"model", "-e", TEXT, &s.model, 0, 0, USUAL_MODEL, MODEL_HELP},
        {"out", "-o", TEXT, &s.out, 0, 0, "none", "DIR for checkpoints"},
        {"batch", "-b", INTEGER, &s.B, 1, 1 << 20, "4", "sequences in a micro-batch on a GPU; auto: as many as fit", 9, {"auto"}},
        {"seq-len", "-t", INTEGER, &s.T, 1, MOST_T, "1024, or the model's longest", "tokens in a sequence"},
        {"total-batch", "-d", INTEGER, &s.total_batch, 1, BIG, "B*T*ranks", "tokens in a step, over all micro-batches and GPUs", 10},
        {"steps", "-x", INTEGER, &s.steps, 0, 1 << 30, "one epoch", "optimizer steps; 0 validates and samples only", 0},
        {"schedule", "-k", INTEGER, &s.schedule, 1, 0, "cosine", "cosine, linear, constant, wsd", 1,
         {"cosine", "linear", "constant", "wsd"}},
        {"optimizer", "", INTEGER, &s.optimizer, 1, 0, "adamw",
         "adamw, adamw8 (its state in 8 bits), adalomo (hardly a state, gradients of one layer)", -1, {OPTIMIZERS, OPTIMIZERS + 3}},
        {"lr", "-l", REAL, &s.lr, 0, 1e9, "3e-4", "learning rate at its peak", 2},
        {"warmup", "-u", INTEGER, &s.warmup, 0, BIG, "0", "steps in which the rate rises to its peak", 3},
        {"final-lr-fraction", "-q", REAL, &s.final_fraction, 0, 1, "0.1", "the rate at the end, as a share of its peak", 4},
        {"weight-decay", "-c", REAL, &s.weight_decay, 0, 1e9, "0", "of 2-D tensors", 5},
        {"grad-clip", "", REAL, &s.grad_clip, 0, 1e30, "1.0; adalomo: 0", "largest norm of the gradient; 0: no limit", 6},
        {"skip-loss-z", "-sl", REAL, &s.skip_loss_z, 0, 1e30, "0", "skip steps so many deviations above the last 128; 0: never", 7},
        {"skip-grad-z", "-sg", REAL, &s.skip_grad_z, 0, 1e30, "0", "the same for the gradient's norm", 8},
        {"seed", "", INTEGER, &s.seed, 0, BIG, "1337", "of weights, data order, rounding and samples"},
        {"recompute", "-r", INTEGER, &s.recompute, 0, RECOMPUTE_MOST, "1", RECOMPUTE_HELP},
        {"row-chunks", "", INTEGER, &s.row_chunks, 1, BIG, "auto", "parts of B*T that a block works on, but attention; auto: with -r 4, 256 MiB",
         ROW_CHUNKS_SLOT,
         {"auto"}},
        {"offload", "", INTEGER, &s.offload, 0, 1, "0", "1, with -r 4: blocks' inputs wait on the host for backward", 26},
        {"master-weights", "-w", INTEGER, &s.master, 0, 1, "1", "fp32 copies of bf16 weights; 0: stochastic rounding instead"},
        {"loss-chunks", "", INTEGER, &s.loss_chunks, 1, BIG, "auto", "parts of the logits; auto: 1 GiB, or 256 MiB, each", 11, {"auto"}},
        {"workspace", "", INTEGER, &s.workspace, 1, 1 << 20, "auto", "MiB for cuBLASLt; auto: what it can use, up to 64", -1, {"auto"}},
        {"lora", "", INTEGER, &s.lora, 0, 1024, "0", "rank of adapters that are trained in place of the weights; 0: none", 18},
        {"lora-alpha", "", REAL, &s.lora_alpha, 1e-6, 1e6, "twice the rank", "adapters count alpha / rank times", 19},
        {"lora-targets", "", TEXT, &s.lora_targets, 0, 0, "all", LORA_HELP},
        {"lora-dropout", "", REAL, &s.lora_dropout, 0, 0.9, "0", "share of an adapter's input that is left out in training", 20},
        {"lora-freeze-a", "", INTEGER, &s.freeze_a, 0, 1, "0", "1: train B alone (LoRA-FA)", 21},
        {"lora-train-norms", "", INTEGER, &s.train_norms, 0, 1, "0", "1: train the norms as well", 22},
        {"adapter", "", TEXT, &s.adapter, 0, 0, "none", "DIR of an adapter (PEFT's format) to go on from"},
        {"base", "", INTEGER, &s.base, 1, 0, "bf16", "frozen weights of the blocks: bf16 (as the build has them), nf4 (4 bits)", 23,
         {"bf16", "nf4"}},
        {"double-quant", "", INTEGER, &s.double_quant, 0, 1, "1", "NF4: 8 bits, not 32, for the scale of 64 weights", 24},
        {"embedding-on", "", INTEGER, &s.embedding_on, 1, 0, "host with nf4", "a frozen embedding's place: device, host", -1,
         {"device", "host"}},
        {"merge", "", TEXT, &s.merge, 0, 0, "none", "DIR for base and adapter as one model; writes it, and exits"},
        MODEL_OPTIONS   // those of this model alone
        {"tf32", "-f", INTEGER, &s.tf32, 0, 1, "1", "fp32 builds: tensor cores for matmuls", 14},
        {"zero", "-z", INTEGER, &s.zero, 0, 1, "0", "several GPUs: each keeps a share of the optimizer's state"},
        {"val-every", "-v", INTEGER, &s.val_every, 0, BIG, "20", "steps between validations, also at step 0 and the end; 0: never"},
        {"val-batches", "-m", INTEGER, &s.val_batches, 1, BIG, "20", "batches in a validation, at most"},
        {"sample-every", "-s", INTEGER, &s.sample_every, 0, BIG, "20", "steps between samples of text, also at the end; 0: never"},
        {"sample-tokens", "-g", INTEGER, &s.sample_tokens, 1, 1 << 20, "64", "tokens in a sample"},
        {"top-k", "", INTEGER, &s.top_k, 0, BIG, "40", "sample among the k likeliest; 0: all"},
        {"temperature", "", REAL, &s.temperature, 0, 1e6, "0.8", "of sampling; 0: always the likeliest"},
        {"overfit", "-a", INTEGER, &s.overfit, 0, 1, "0", "1: train on the first step's data again and again", 12},
        {"checkpoint-every", "-n", INTEGER, &s.checkpoint_every, 0, BIG, "at the end", "steps between checkpoints; 0: none at all"},
        {"keep", "-nk", INTEGER, &s.keep, 0, BIG, "0", "the newest so many checkpoints; 0: all"},
        {"dump-gradients", "", TEXT, &s.dump_gradients, 0, 0, "none", "FILE.safetensors for the first micro-batch's loss and gradients"},
        {"save-dtype", "", INTEGER, &s.save_dtype, 1, 0, "as it was", "of the weights in checkpoints: f32, bf16, f16", -1,
         {"as it was", "f32", "bf16", "f16"}},
        {"resume", "-y", INTEGER, &s.resume, 0, 1, "0", "1: go on from the newest checkpoint in --out"},
        {"log", "", TEXT, &s.log, 0, 0, "none", "FILE for one JSON object a step"},
        {"estimate", "", ESTIMATE, &s.estimate, 0, 0, "", "print what the run would take on the device, and exit; =json for programs"},
        {"fit", "", FIT, &s.fit, 0, 0, "", "24G: print what fits into so many GiB, and exit; alone: into what is free; json, 24G,json"},
        {"help", "-h", HELP, nullptr, 0, 0, "", "this text"},
        {"APPROX_ACT", "", BUILD, &s.act_bits, 0, 0, "", "", 15},
        {"APPROX_FIT", "", BUILD, &s.act_slope, 0, 0, "", "", 27, {"function", "slope"}},
        {"MS_NORM", "", BUILD, &s.ms_norm, 0, 0, "", "", 16},
        {"PRECISION", "", BUILD, &s.fp32, 0, 0, "", "", 17, {"BF16", "FP32"}},
    };
}
void settings_check(const Settings& s) {
    model_check_options();
    check_output("dump-gradients", s.dump_gradients, 8, DUMP_BEGINS);
    for (const char* name : {"resume", "checkpoint-every", "keep"})
        if (option(name).number() > 0 && s.out.empty()) bad_option(name, "expected --out DIR with it, the folder of the checkpoints");
    if (s.offload && s.recompute < 4) bad_option("offload", "moves what --recompute 4 keeps; expected -r 4 with it");
    if (s.steps == 0 && s.checkpoint_every > 0)
        bad_option("checkpoint-every", "nothing is trained with --steps 0, so there is nothing to write; expected 0, or some steps");
}

// A run: what it was told, what it works on, and where it stands.
struct Run {
    Settings s;
    Model model = {};
    Loader train, val;
    Tokenizer tokenizer;
    Log log;
    RunState state;
    cudaDeviceProp device = {};   // without a name where there is none
    size_t free_bytes = 0, total_bytes = 0;
    double peak_flops = 0;
    std::string model_file;   // a model's directory (or file), whose weights are loaded; empty: weights are drawn
    std::string resumed;      // the checkpoint from which the run goes on; empty: none
    AdapterFile adapter;      // that is loaded; without a folder: none, or a new one
    Source source;
    int steps = 0, resume_step = -1;
    int saved = -1, status = 0;           // the last step in --out; the exit status if it ended now
    float val_loss = 0, first_loss = 0;   // of the last validation; of the first step that was finite
    std::vector<int> first_tokens;        // of this run's first micro-batch, as token_ints has them
    int timed = -1;                       // steps but the first, which prepares the matmuls,
    double seconds = 0;                   // and what they took
    // Pinned memory in two halves, each with a region per micro-batch: the tokens of this step, and those of the next. When one
    // half is ready, the other is free for validation and samples.
    int half = 0;
    bool ready = false;         // the next step's tokens are in `half`
    std::vector<int> buckets;   // (micro_batches)
    int without_loss = 0, without_loss_in_row = 0;   // steps of whose tokens none had a loss
    double with_loss = 0;       // targets that have one in the next step; without marks, over all ranks
    size_t BT() const { return (size_t)model.plan.B * model.plan.T; }
    size_t step_tokens() const { return BT() * model.plan.micro_batches * world.size; }
    size_t region_ints() const { return token_ints(BT(), model.config.V, model.plan.marks); }
    int* host_region(int micro) const { return model.host_tokens + (half * model.plan.micro_batches + micro) * region_ints(); }
    int* documents(int* host) const { return model.plan.marks ? host + documents_at(BT(), model.config.V) : nullptr; }
    // Targets of a batch that have a loss
    double count_with_loss(const int* host) const { return (double)(BT() - std::count(host + BT(), host + 2 * BT(), NO_TARGET)); }
    int* host_free() const { return model.host_tokens + !half * model.plan.micro_batches * region_ints(); }
    int rank() const {   // of the largest adapter
        int most = 0;
        for (const LoraModule& module : model.lora) most = std::max(most, module.rank);
        return most;
    }
    bool on_cpu() const { return strstr(device.name, "CPU") != nullptr; }
    const char* model_name() const { return model_file.empty() ? s.model.c_str() : model_file.c_str(); }
    bool saves() const { return !s.out.empty() && model.plan.training; }
    bool unsaved() const { return saves() && (state.step > 0 || s.steps == 0) && state.step != saved; }
};

// What shapes the numbers of a run, besides its model and its data: the values that have a slot, in their order.
std::vector<double> settings_kept(Run& run) {
    run.s.steps = run.steps;   // what was chosen counts, where nothing was given
    run.s.B = run.model.plan.B;
    run.s.total_batch = run.step_tokens();
    run.s.loss_chunks = ceil_div(run.BT(), plan_chunk_rows(run.model.plan));
    run.s.row_chunks = in_chunks(run.model.plan) ? ceil_div(run.BT(), run.model.plan.rows) : 1;
    run.s.tf32 = kFP32 && run.s.tf32;
    run.s.lora = run.model.config.lora.rank > 0 ? run.rank() : 0;
    run.s.base = run.model.plan.nf4, run.s.double_quant = !run.model.plan.nf4 || run.model.plan.nested;
    std::vector<double> kept;
    for (const Option& o : options)
        if (o.slot >= 0) {
            kept.resize(std::max<size_t>(kept.size(), o.slot + 1));
            kept[o.slot] = o.number();
        }
    return kept;
}

// ---- the model, the device, the data, and a plan that fits them
// What --lora-targets names, as bits.
int parse_targets(const Config& c, const std::string& text) {
    const std::vector<LoraTarget> known = lora_targets(c);
    unsigned bits = 0, all = 0, parts = 0;
    std::string names;
    for (size_t i = 0; i < known.size(); i++) {
        if (known[i].part) parts |= 1u << i;
        else all |= 1u << i;
        if (strcmp(known[i].name, "qkv") != 0) names += (names.empty() ? "" : ",") + std::string(known[i].name);
    }
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        const std::string word = text.substr(at, end - at);
        const auto found =
            std::find_if(known.begin(), known.end(), [&](auto& t) { return word == t.name || (*t.peft && word == t.peft); });
        if (word == "all" || word == "all-linear") bits |= all;
        else if (found != known.end()) bits |= 1u << (found - known.begin());
        else bad_option("lora-targets", "'%s' is none; expected all, or some of %s", word.c_str(), names.c_str());
        at = end + 1;
    }
    if (parts && ((bits & parts) == parts || (bits & 1))) bits = (bits & ~parts) | 1;   // all parts are the whole
    return (int)bits;
}
// Adapters: a new one, or one from a directory, and what of the model stays as it is.
void pick_adapter(Run& run) {
    Settings& s = run.s;
    Config& c = run.model.config;
    Plan& plan = run.model.plan;
    const bool continues = file_exists(run.resumed + "/adapter_config.json") && !run.resumed.empty();
    if (!s.adapter.empty() && given("lora"))
        bad_option("lora", "%s brings its own rank; expected one of the two", quoted("adapter").c_str());
    if (!run.resumed.empty() && !continues && (s.lora > 0 || !s.adapter.empty()))
        fail_option("resume", "%s holds a whole model and no adapter; leave %s out, or take another --out", run.resumed.c_str(),
                    s.lora > 0 ? "--lora" : "--adapter");
    const std::string folder = continues ? run.resumed : s.adapter;
    for (const char* name : {"lora-alpha", "lora-targets"})
        if (!s.adapter.empty() && given(name)) bad_option(name, "%s brings its own; expected one of the two", quoted("adapter").c_str());
    for (const char* name : {"lora-alpha", "lora-targets", "lora-dropout", "lora-freeze-a", "lora-train-norms"})
        if (given(name) && s.lora == 0 && folder.empty()) bad_option(name, "expected --lora R or --adapter DIR with it");
    const StateHeader was = continues ? state_peek(run.resumed) : StateHeader{};
    run.model.seed = continues ? was.seed : s.seed;   // from which a model that stands in no file is drawn again
    for (Option& o : options) {   // the run to resume goes on as it was, but for what an adapter can be trained with
        if (o.slot < LORA_SLOT || o.slot >= std::min({was.settings, (int)std::size(was.setting), LORA_SLOT + LORA_SLOTS})) continue;
        const bool stays = o.value != &s.lora_dropout && o.value != &s.base && o.value != &s.double_quant;
        if (!given(o.name)) o.set(was.setting[o.slot]);
        else if (stays && o.number() != was.setting[o.slot])
            bad_option(o.name, "the run to resume has %s; leave it out, or begin anew in another --out",
                       o.text(was.setting[o.slot]).c_str());
    }
    if (!folder.empty()) {
        run.adapter = adapter_open(c, folder);
        run.model.lora = run.adapter.lora;
        if (continues && given("lora-targets") && parse_targets(c, s.lora_targets) != c.lora.targets)
            bad_option("lora-targets", "the run to resume has adapters on %s; leave it out, or begin anew in another --out",
                       target_names(run.model.config).c_str());
        const Json &alpha = run.adapter.config["lora_alpha"], &dropout = run.adapter.config["lora_dropout"];
        s.lora_alpha = strtod(alpha.text.c_str(), nullptr);
        for (const LoraModule& module : run.model.lora)   // a part of a module has its share
            if (module.rank == run.rank() && run.adapter.config["use_rslora"].text != "true") s.lora_alpha = module.scale * module.rank;
        if (!continues && !given("lora-dropout") && dropout.type == Json::NUMBER) s.lora_dropout = strtod(dropout.text.c_str(), nullptr);
    } else if (s.lora > 0) {
        c.lora.targets = parse_targets(c, s.lora_targets);
        c.lora.rank = ceil_div(s.lora, 8) * 8;
        if (!given("lora-alpha")) s.lora_alpha = 2.0 * s.lora;
        const size_t targets = lora_targets(c).size();
        run.model.lora.resize(c.L * targets);
        for (size_t i = 0; i < run.model.lora.size(); i++)
            if (c.lora.targets >> i % targets & 1) run.model.lora[i] = {(int)s.lora, (float)(s.lora_alpha / s.lora)};
    }
    const bool adapts = c.lora.rank > 0;
    if (adapts && matmul_state.gelu_fusion > 0 && !given("fit"))   // whose recipes for adapters leave it out
        bad_option("gelu-fusion", "an adapter adds to what GELU takes, and to its gradient; expected 0");
    if (adapts) matmul_state.gelu_fusion = 0;
    plan = {};
    unsigned norms = 0;   // in training: those that the adapter has, or all
    for (int p = 0; p < LORA_A; p++) norms |= is_norm(p) ? 1u << p : 0;
    if (!folder.empty() && (continues || !given("lora-train-norms"))) norms = run.adapter.norms;
    else if (!s.train_norms && run.adapter.norms)
        bad_option("lora-train-norms", "the adapter in %s has norms, which would be lost; leave it out", folder.c_str());
    else if (!s.train_norms) norms = 0;
    s.train_norms = norms != 0;
    for (int p = 0; adapts && p < LORA_A; p++)
        if (!(norms >> p & 1)) plan.frozen |= 1u << p;
    for (int i = 0; s.freeze_a && i < 4; i++) plan.frozen |= 1u << (LORA_A + i);
    plan.nf4 = s.base == 1 || c.lora.quantized;
    plan.nested = c.lora.quantized ? c.lora.quantized == 2 : s.double_quant != 0;
    plan.dropout = (float)s.lora_dropout;
    for (const Option& o : options)
        if ((adapts || plan.nf4) && strcmp(o.name, "write-bin") == 0 && !o.typed.empty())
            bad_option(o.name, "llm.c's format has no adapters, and no weights in 4 bits; --merge makes a whole model");
    if (given("double-quant") && (!plan.nf4 || (c.lora.quantized && s.double_quant != plan.nested)))
        bad_option("double-quant", "%s; leave it out",
                   plan.nf4 ? "the model's directory is quantized the other way" : "expected --base nf4 with it");
    if (plan.nf4 && !adapts && s.trains())
        fail_usage(
            "%s: weights in 4 bits cannot be trained or written; expected --lora R or --adapter DIR with it, or -x 0 without --out "
            "and --dump-gradients",
            c.lora.quantized ? run.model_name() : quoted("base").c_str());
    if (given("base") && s.base == 0 && c.lora.quantized)
        bad_option("base", "%s is quantized; expected nf4, or the model in 16 bits", run.model_name());
    const bool can = adapts && head_param(c) != WTE;   // the head multiplies by it, and must have it on the device
    if (s.embedding_on == 1 && !can)
        bad_option("embedding-on", "%s; expected device", adapts ? "this model's head is its embedding" : "all of the model is trained");
    plan.host_wte = can && (s.embedding_on == 1 || (s.embedding_on < 0 && plan.nf4));
}
// The model: of a size, of a file, or of the checkpoint that is resumed.
void pick_model(Run& run) {
    Settings& s = run.s;
    Config& c = run.model.config;
    if (s.resume && file_exists(s.out) && !is_folder(s.out.c_str())) fail_option("out", "expected a folder, found a file");
    if (s.resume && access(s.out.c_str(), R_OK | X_OK) != 0 && errno != ENOENT)
        fail_option("out", "cannot read this folder: %s", strerror(errno));
    const std::vector<int> checkpoints = s.resume ? checkpoints_in(s.out) : std::vector<int>();
    if (!checkpoints.empty()) run.resume_step = checkpoints.back(), run.resumed = checkpoint_folder(s.out, run.resume_step);
    const std::string config = run.resumed + "/adapter_config.json";
    const bool adapter = !run.resumed.empty() && file_exists(config);   // then the model is still that of -e
    if (adapter && !given("model")) s.model = read_json(config)["base_model_name_or_path"].text;
    if (s.model.empty()) bad_option("resume", "%s does not name the model that it belongs to; expected -e DIR with it", config.c_str());
    const bool size = model_parse_size(s.model, c), resumes = !run.resumed.empty();
    if (s.resume && s.steps == 0 && !resumes)
        fail_option("resume", "%s holds no checkpoint, so there is nothing to evaluate; expected step_* in it", s.out.c_str());
    if (resumes || !size) run.model_file = resumes && !adapter ? run.resumed : size ? "" : s.model;
    if (file_exists(run.model_file + "/adapter_config.json") && !run.model_file.empty() && !file_exists(run.model_file + "/config.json"))
        fail("%s: is an adapter; expected %s BASE --adapter %s, with the model that it belongs to (adapter_config.json says '%s')",
             run.model_name(), typed("model").c_str(), run.model_name(),
             read_json(run.model_file + "/adapter_config.json")["base_model_name_or_path"].text.c_str());
    Config asked = c;
    if (!run.model_file.empty()) c = model_read_config(run.model_file);
    if (resumes && !adapter && given("model") && s.model != run.model_file) {   // it is the checkpoint's; another may have been asked for
        if (!size) asked = file_exists(s.model) ? model_read_config(s.model) : c;
        if (memcmp(&asked, &c, sizeof c) != 0)
            bad_option("model", "is another model (%s) than that of the checkpoint to resume, %s (%s); leave %s out, or begin anew in "
                       "another --out", model_sizes(asked).c_str(), run.model_name(), model_sizes(c).c_str(), typed("model").c_str());
        if (!size && world.rank == 0) printf("note: %s is not read: the run goes on from %s\n", s.model.c_str(), run.model_name());
    }
    model_check_config(c, run.model_name());
    if (is_folder(run.model_file.c_str())) {   // before memory is taken and a folder made
        HfModel m = hf_open(run.model_file);
        hf_check(c, m);
    }
    pick_adapter(run);
    if (!given("seq-len")) s.T = std::min<int64_t>(s.T, c.maxT);
    if (s.T > model_longest(c)) bad_option("seq-len", "the model's longest sequence is %d", model_longest(c));
    if (s.T > c.maxT && world.rank == 0)
        warn("note: %s: the model was made for %d positions; those beyond them are new to it", quoted("seq-len").c_str(), c.maxT);
}

// What AdaLomo's update cannot have, because it is made within backward, of a matrix after the other.
void pick_optimizer(Run& run) {
    Settings& s = run.s;
    if (s.optimizer != ADALOMO) return;
    const char* early = "adalomo updates a layer before backward has reached those below it";
    if (!given("grad-clip")) s.grad_clip = 0;   // it bounds each matrix's update instead
    if (s.grad_clip > 0) bad_option("grad-clip", "needs the norm of all gradients, and %s; expected 0, or --optimizer adamw8", early);
    for (const char* name : {"skip-loss-z", "skip-grad-z"})
        if (option(name).number() > 0) bad_option(name, "%s, so a step cannot be taken back; expected 0, or --optimizer adamw8", early);
    if (s.zero) bad_option("zero", "adalomo's state is a few vectors, of which each GPU has all; expected 0, or --optimizer adamw8");
    if (!s.dump_gradients.empty())
        bad_option("dump-gradients", "%s, and their gradients take the place of its own; expected another --optimizer", early);
    if (run.model.config.lora.rank > 0)
        bad_option("optimizer", "adapters have small gradients and a small state, so there is nothing to save; expected adamw or "
                   "adamw8, or all of the model in training, without --lora and --adapter");
}
// The device. --estimate and --fit can do without.
void pick_device(Run& run) {
    const bool estimating = !run.s.estimate.empty() || given("fit");
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    cudaGetLastError();   // or it would come up again later
    matmul_state.tf32 = run.s.tf32;
    world.sharded = run.s.zero;
    if (error == cudaSuccess && devices > 0) {
        const int device = world.local_rank % devices;
        cudaCheck(cudaSetDevice(device));
        cudaCheck(cudaGetDeviceProperties(&run.device, device));
        world_check_device(device);
        run.peak_flops = device_peak_flops(run.device, !kFP32 || run.s.tf32);
        if (!estimating) {   // before the memory is measured: both take some
            cublasCheck(cublasLtCreate(&matmul_state.handle));
            world_connect();
        }
        cudaCheck(cudaMemGetInfo(&run.free_bytes, &run.total_bytes));
        run.free_bytes = (size_t)world_min((double)run.free_bytes);   // all ranks must come to one plan
    } else if (!estimating) {
        fail("no GPU to run on (CUDA says \"%s\", nvidia-smi lists what it sees); expected one, or a build for the CPU: make %s CPU=1",
             cudaGetErrorString(error), program_name);
    } else if (run.s.B == 0) {
        bad_option("batch", "no GPU is visible whose memory could be filled; expected a number");
    }
}

// The data, as far as the run will read them. Returns the largest batch that they can fill.
size_t open_data(Run& run) {
    const Settings& s = run.s;
    const Config& c = run.model.config;
    size_t batch = 1 << 16;
    auto open = [&](Loader& d, const char* option, const std::string& name, bool shuffle) {
        if (world.rank == 0) printf("data       %s\n", name.c_str());
        fflush(stdout);   // reading them all may take long
        loader_open(d, typed(option).c_str(), name.c_str(), (int)s.T, c.V, shuffle, run.model.seed);
        batch = std::min(batch, loader_largest_batch(d));
        if (d.inside > 0 && world.rank == 0)
            warn("note: %s: %.0f sequences of %d tokens begin within a document, whose beginning they do not see; data that "
                 "prepro/text.py has packed want its --seq-len as %s", name.c_str(), d.inside, (int)s.T, typed("seq-len").c_str());
    };
    if ((s.steps != 0 || !s.dump_gradients.empty()) && s.merge.empty()) open(run.train, "train-data", s.train_data, true);
    if (s.val_every > 0) open(run.val, "val-data", s.val_data, false);
    // samples are written in the tokens of the data
    run.model.plan.marks = run.train.marks() || run.val.marks();
    const std::string& named = given("train-data") || !given("val-data") ? s.train_data : s.val_data;
    const std::vector<std::string> found = files_named(named);
    const std::string beside = found.empty() ? named : found[0];
    const std::string path = s.tokenizer.empty() ? folder_of(beside) + "/tokenizer.bin" : s.tokenizer;
    // the usual model, which is large, for a text of bytes is a mistake that takes long to show
    const Loader& d = run.train.shards.empty() ? run.val : run.train;
    const bool chosen = given("model") || run.resume_step >= 0, small = !chosen && !d.shards.empty() && d.largest_id < 1024;
    if ((s.sample_every > 0 && world.rank == 0) || small) {
        const bool loaded = tokenizer_load(run.tokenizer, path.c_str());
        if (!loaded && !s.tokenizer.empty())
            fail("--tokenizer %s: no such file; prepro/text.py writes one beside its token files", path.c_str());
        if (!loaded && !small) printf("no %s: samples are printed as ids\n", path.c_str());
    }
    const int V = std::max(d.largest_id + 1, (int)run.tokenizer.tokens.size());
    if (small)
        fail_usage("%s has a vocabulary of %d tokens, and %s, the model without -e, one of %d (and %.0fM parameters); expected a model "
                   "for these data, such as -e %s, or -e %s if that one is meant", beside.c_str(), V, s.model.c_str(), c.V,
                   param_count(c) / 1e6, model_example(V).c_str(), USUAL_TYPED);
    if (!chosen && run.on_cpu() && world.rank == 0)
        printf("note: this build runs on the CPU, where a step of %s takes about a minute; -e %s is a smaller model\n", s.model.c_str(),
               model_example(c.V).c_str());
    return batch;
}

// How many micro-batches make a step of --total-batch tokens; 0: no number does.
int64_t micro_batches(const Run& run, int64_t B) {
    const int64_t tokens = B * run.s.T * world.size;
    return run.s.total_batch == 0 ? 1 : run.s.total_batch % tokens == 0 ? run.s.total_batch / tokens : 0;
}
// The plan for B sequences of s.T tokens. Chunks as given; for auto as in `was`, or if it says nothing, of the loss of `chunk_bytes` each.
void make_plan(Run& run, int64_t B, size_t chunk_bytes, const Plan& was = {}) {
    const Settings& s = run.s;
    Plan& plan = run.model.plan;
    const size_t rows = (size_t)B * s.T;
    plan.B = (int)B, plan.T = (int)s.T, plan.micro_batches = (int)micro_batches(run, B), plan.training = s.trains();
    plan.offload = s.offload && plan.training, plan.optimizer = (Optimizer)s.optimizer;
    plan.recompute = (int)s.recompute, plan.master = s.master != 0, plan.workspace = (size_t)s.workspace << 20;
    if (plan.training && recomputes_block(plan))   // memory is short: where the gradient of the stream will be there is room for them
        chunk_bytes = std::clamp(rows * run.model.config.C * sizeof(floatX), SMALL_CHUNK_BYTES / 4, SMALL_CHUNK_BYTES);
    if (s.loss_chunks) plan.chunk_rows = loss_chunk_rows(rows, std::min<size_t>(rows, s.loss_chunks));
    else plan.chunk_rows = was.chunk_rows ? was.chunk_rows : loss_auto_rows(rows, run.model.config.Vp, chunk_bytes);
    plan.rows = s.row_chunks ? loss_chunk_rows(rows, std::min<size_t>(rows, s.row_chunks)) : was.rows;
    if (plan.rows == 0 && plan.training && recomputes_block(plan)) {   // auto
        size_t scratch = 0;
        for (const Row& r : model_table(run.model)) scratch += r.shrink == CHUNKS ? r.bytes() : 0;
        plan.rows = loss_auto_rows(rows, ceil_div(scratch, rows * sizeof(floatX)), SMALL_CHUNK_BYTES);
    }
}
// B as given. For auto, that of the run which is resumed, or the largest power of two, up to `data_batch`, whose tensors fit into the
// free memory. Chunks as given. For auto, those of the run which is resumed, or of the loss large ones if they fit. Where no device is
// visible, everything fits.
void choose_plan(Run& run, size_t data_batch) {
    const Settings& s = run.s;
    const Plan was = run.resume_step >= 0 && s.trains() ? state_plan(run.resumed) : Plan{};
    const size_t pinned = (size_t)world_min((double)host_room());
    bool host_is_short = false;
    auto fits = [&](int64_t B, size_t chunk_bytes) {   // makes the plan for B
        const size_t page = 2 << 20;   // cudaMalloc's, for tensors that have it
        make_plan(run, B, chunk_bytes, B == was.B ? was : Plan{});
        size_t need = 0;
        const Table table = model_table(run.model);
        for (const Row& r : table)
            if (r.scope != HOST) need += r.bytes() < page / 2 ? r.bytes() : (r.bytes() + page - 1) / page * page;
        host_is_short = table_bytes(table, true) > pinned;
        return run.free_bytes == 0 || (need <= run.free_bytes - run.free_bytes / 32 && !host_is_short);   // libraries load kernels later
    };
    int64_t B = s.B;
    if (B == 0 && was.B > 0 && was.B <= (int64_t)data_batch && micro_batches(run, was.B) > 0 && fits(was.B, SMALL_CHUNK_BYTES)) B = was.B;
    if (B == 0) {
        for (int64_t next = 1; next <= (int64_t)data_batch && next * s.T < 1 << 30; next *= 2) {
            if (micro_batches(run, next) == 0) continue;
            if (!fits(next, SMALL_CHUNK_BYTES)) break;
            B = next;
        }
    }
    const int64_t BT = B * s.T;
    if (B == 0)
        fail_option("batch", "not even one sequence of %lld tokens fits into the %.1f MiB that %s%s; --estimate -b 1 shows what "
                    "takes the room", (long long)s.T, (host_is_short ? pinned : run.free_bytes) / 1048576.0,
                    host_is_short ? "the host can pin" : "are free", s.total_batch ? " and divides --total-batch" : "");
    if (BT >= 1 << 30) bad_option("batch", "%lld tokens in one micro-batch; expected fewer than 2^30", (long long)BT);
    if (micro_batches(run, B) == 0)
        bad_option("total-batch", "expected a multiple of batch * seq-len * GPUs = %lld * %lld * %d = %lld", (long long)B, (long long)s.T,
                   world.size, (long long)BT * world.size);
    if (s.optimizer == ADALOMO && micro_batches(run, B) > 1)
        bad_option("total-batch", "adalomo updates a layer as soon as it has a gradient, so a step is one micro-batch; expected batch * "
                   "seq-len * GPUs = %lld (a larger --batch, with -r 4 for the memory), or --optimizer adamw8", (long long)BT * world.size);
    if (s.row_chunks > BT) bad_option("row-chunks", "a micro-batch has %lld rows, so expected at most that", (long long)BT);
    if (s.loss_chunks > BT) bad_option("loss-chunks", "a micro-batch has %lld rows, so expected at most that", (long long)BT);
    if (!fits(B, CHUNK_BYTES)) fits(B, SMALL_CHUNK_BYTES);
}

// The steps of the run, when its batch is known. Ends the program if a resumed run has taken them all.
void count_steps(Run& run) {
    const Plan& plan = run.model.plan;
    const bool told = run.s.steps >= 0;
    if (run.s.val_every > 0) loader_set_batch(run.val, plan.B);
    if (run.train.shards.empty()) return;
    loader_set_batch(run.train, plan.B);
    if (run.s.steps == 0) return;
    const size_t batches = run.train.batches_per_epoch();
    run.steps = (int)(told ? run.s.steps : std::min<int64_t>(batches / plan.micro_batches, 1 << 30));
    if (run.steps == 0)
        fail("%s: one epoch makes %zu batches, fewer than the %d of one step; take a smaller --total-batch or give --steps",
             run.s.train_data.c_str(), batches, plan.micro_batches);
    const char* origin = told ? "" : " (one epoch)";
    if (run.resume_step >= run.steps) {
        if (world.rank == 0)
            printf("already at step %d: nothing left to do (--steps is %d%s); give a larger -x to go on, or -x 0 to validate and sample\n",
                   run.resume_step, run.steps, origin);
        world_end();
        leave(0);
    }
    if (run.s.warmup > run.steps)
        bad_option("warmup", "the rate would never reach its peak; expected at most the number of steps, %d%s", run.steps, origin);
}

// ---- --fit: what can be trained in so much memory
// Ways to train, as options and what they are set to; and ways to keep less, for each of them.
using Values = std::vector<std::pair<const char*, int64_t>>;
const struct { const char* name; Values values; } FIT_RECIPES[] = {
    {"full, adamw", {}},
    {"full, adamw8", {{"optimizer", ADAMW8}}},
    {"full, adalomo", {{"optimizer", ADALOMO}, {"master-weights", 0}}},
    {"LoRA", {{"lora", 16}}},
    {"QLoRA", {{"lora", 16}, {"base", 1}}},
};
const Values FIT_SAVINGS[] = {{{"recompute", 1}}, {{"recompute", 2}}, {{"recompute", 4}}, {{"recompute", 4}, {"offload", 1}}};
const std::vector<std::string> FIT_OWN = {   // what recipes choose, or is another task
    "batch", "total-batch", "optimizer", "recompute", "offload", "base", "double-quant", "grad-clip", "skip-loss-z", "skip-grad-z",
    "zero", "adapter", "resume", "merge", "estimate", "dump-gradients", "write-bin"};
constexpr double GIB = 1 << 30, FIT_RESERVE = 0.75;   // GiB: what the driver and libraries may take where it was not measured

struct FitAsked { double size; bool json; };   // GiB, or 0: what is free on the device
FitAsked fit_asked(const Settings& s) {
    FitAsked asked = {};
    for (size_t at = 0, end; at < s.fit.size(); at = end + 1) {   // each word ends with a comma
        end = s.fit.find(',', at);
        const std::string word = s.fit.substr(at, end - at);
        char* rest = nullptr;
        const bool digits = !word.empty() && word.find_first_not_of("0123456789.") == word.size() - 1;   // up to the last letter
        const double number = digits ? strtod(word.c_str(), &rest) : 0;
        if (word == "json") asked.json = true;
        else if (digits && strcmp(rest, "G") == 0 && number > FIT_RESERVE && number <= 1 << 20 && asked.size == 0) asked.size = number;
        else if (!word.empty())
            fail_usage("%s %s: expected one size in GiB (2^30 bytes), more than the %g that driver and libraries may take, such as 24G; "
                       "json; or both as 24G,json", typed("fit").c_str(), word.c_str(), FIT_RESERVE);
    }
    return asked;
}
void fit_begin(Run& run) {   // before the model is read
    fit_asked(run.s);
    for (const Option& o : options)
        if (!o.typed.empty() && std::count(FIT_OWN.begin(), FIT_OWN.end(), o.name))
            fail_usage("%s: not with %s, %s; leave one of them out", o.typed.c_str(), typed("fit").c_str(),
                       o.value != &run.s.total_batch ? "whose table has all there is of it"
                       : "whose plans have one micro-batch a step (more sum gradients in fp32; --estimate says what a plan takes then)");
    if (!run.s.trains()) fail_usage("%s: %s is about training; leave one of them out", quoted("steps").c_str(), typed("fit").c_str());
    if (run.s.lora == 0) run.s.lora = 16;   // the rank of recipes with adapters
}
struct FitPlan { int64_t B, T; size_t device, host, chunks; double again; };   // B 0: nothing fits. Bytes; chunks of the loss
// The plan for B sequences of T tokens, if the tensors of its table take no more than `room` bytes, and no more than `pinned` of the host.
FitPlan fit_plan(Run& run, int64_t B, int64_t T, size_t room, size_t pinned) {
    run.s.T = T;
    if (std::max(run.s.row_chunks, run.s.loss_chunks) > B * T) return {};   // as choose_plan has it
    for (size_t chunk_bytes : {CHUNK_BYTES, SMALL_CHUNK_BYTES}) {
        make_plan(run, B, chunk_bytes);
        const Table table = model_table(run.model);
        if (table_bytes(table) <= room && table_bytes(table, true) <= pinned)
            return {B, T, table_bytes(table), table_bytes(table, true), (size_t)ceil_div(run.BT(), plan_chunk_rows(run.model.plan)),
                    model_again_share(run.model, (int)T)};
    }
    return {};
}
// By bisection the plan of n, if it fits, or of an i from `least` on that fits while that of i + 1 does not.
FitPlan fit_largest(int64_t least, int64_t n, const std::function<FitPlan(int64_t)>& plan) {
    FitPlan best = plan(n);
    for (int64_t low = least - 1, high = n; best.B == 0 && high - low > 1;) {
        const int64_t middle = low + (high - low) / 2;
        (plan(middle).B > 0 ? low : high) = middle;
        if (high - low == 1 && low >= least) best = plan(low);
    }
    return best;
}
struct FitRow {
    std::string recipe, saving, options;
    FitPlan plans[2];   // of the largest batch, and of the longest sequence
};
std::vector<FitRow> fit_rows(Run& run, size_t room, size_t pinned) {
    Settings& s = run.s;
    Model& model = run.model;
    const Config c = model.config;
    const int64_t T = s.T, most_T = model_longest(c), most_B = std::min<int64_t>(((1 << 30) - 1) / T, (int64_t)option("batch").high);
    const int64_t least = std::max<int64_t>({1, s.row_chunks, s.loss_chunks});   // rows, or there are chunks without any
    const int fusion = matmul_state.gelu_fusion;
    const bool marks = model.plan.marks;
    std::vector<FitRow> rows;
    for (const auto& recipe : FIT_RECIPES)
        for (const Values& saving : FIT_SAVINGS) {
            const Settings before = s;
            s.lora = 0;
            FitRow row = {recipe.name};
            for (const Values* values : {&recipe.values, &saving})
                for (auto [name, value] : *values) {
                    Option& o = option(name);
                    if (o.value != &s.lora && given(name)) continue;   // what was asked for counts
                    o.set(o.value == &s.lora ? before.lora : value);
                    (values == &saving ? row.saving : row.options) += std::string(" ") + (*o.alias ? o.alias : "--" + std::string(name)) +
                                                                      " " + o.text(o.number());
                }
            row.options += row.saving;
            if (!c.lora.quantized || s.base == 1) {   // or there are no weights in 16 bits
                model.config.lora = {0, 0, c.lora.quantized}, model.lora.clear(), model.plan = {};
                matmul_state.gelu_fusion = fusion;
                if (s.lora > 0) pick_adapter(run);
                model.plan.marks = marks;
                row.plans[0] =
                    fit_largest(ceil_div(least, T), most_B, [&](int64_t B) { return fit_plan(run, B, T, room, pinned); });
                row.plans[1] = fit_largest(ceil_div(least, (int64_t)256), ceil_div(most_T, (int64_t)256),
                                           [&](int64_t i) { return fit_plan(run, 1, std::min(256 * i, most_T), room, pinned); });
                rows.push_back(row);
            }
            s = before;
        }
    return rows;
}
// The command that runs a plan.
std::string fit_command(const Run& run, const FitRow& row, const FitPlan& p) {
    auto word = [](const std::string& text) {   // as a shell reads it
        std::string quoted = "'";
        for (char c : text) quoted += c == '\'' ? "'\\''" : std::string(1, c);
        const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) { return isalnum(c) || strchr("_./:,=+-", c); });
        return plain ? text : quoted + "'";
    };
    std::string line = std::string("./") + program_name + " -e " + word(run.model_name()) + row.options;
    const bool adapts = row.options.find("--lora") != std::string::npos;
    for (const Option& o : options) {   // and what was asked for besides
        const std::string name = o.name;
        const bool of_adapters = name.compare(0, 4, "lora") == 0 || name == "embedding-on";
        if (o.typed.empty() || o.value == nullptr || name == "fit" || name == "model" || name == "seq-len" || name == "lora") continue;
        if (adapts ? name != "gelu-fusion" : !of_adapters)
            line += " " + o.typed + " " + word(o.type == TEXT ? *(std::string*)o.value : o.text(o.number()));
    }
    line += " -b " + std::to_string(p.B) + " -t " + std::to_string(p.T);
    return line + (run.s.loss_chunks ? "" : " --loss-chunks " + std::to_string(p.chunks));
}
void fit_print_json(const Run& run, const std::vector<FitRow>& rows, const Config& c, double size, double reserve) {
    auto number = [](double x) { return json_sizes({(size_t)x}).values[0]; };
    Json all = json_object(), list = json_sizes({});
    all.set("model", json_string(run.model_name())), all.set("parameters", number(param_count(c)));
    all.set("size_bytes", number(size)), all.set("reserve_bytes", number(reserve)), all.set("seq_len", number(run.s.T));
    all.set("trained_for", number(c.maxT)), all.set("precision", json_string(dtype_name(FLOATX)));
    all.set("approx_act", number(kActBits)), all.set("ms_norm", number(kMsNorm));
    for (const FitRow& row : rows) {
        Json one = json_object();
        one.set("recipe", json_string(row.recipe)), one.set("options", json_string(row.options.substr(1)));
        for (int i = 0; i < 2; i++) {
            const FitPlan& p = row.plans[i];
            Json plan = json_object();
            plan.set("batch", number(p.B)), plan.set("seq_len", number(p.T)), plan.set("device_bytes", number(p.device));
            plan.set("host_bytes", number(p.host)), plan.set("recompute_share", json_number_value((float)p.again));
            plan.set("beyond_trained", json_bool(p.T > c.maxT)), plan.set("command", json_string(fit_command(run, row, p)));
            one.set(i == 0 ? "largest_batch" : "longest_sequence", p.B > 0 ? plan : Json{Json::JSON_NULL});
        }
        list.values.push_back(one);
    }
    all.set("recipes", list);
    std::string text;
    json_append(text, all, 0);
    printf("%s\n", text.c_str());
}
void fit_print(const Run& run, const std::vector<FitRow>& rows, const Config& c, double size, double reserve) {
    const bool asked = fit_asked(run.s).size > 0;
    printf("model      %s: %s, %.2fM parameters, %s, %s\n", run.model_name(), model_sizes(c).c_str(), param_count(c) / 1e6,
           dtype_name(FLOATX), kMsNorm || kActBits ? "in the modes of this build" : "exact");
    printf("memory     %.2f GiB%s, less %.2f %s\n\n", size / GIB, asked ? "" : " that are free", reserve / GIB,
           asked ? "in reserve for the driver and the libraries" : "for what libraries load later");
    printf("%-14s %-18s %10s %8s %9s %12s %9s %9s\n", "", "", "batch at", "matmuls", "GiB of", "longest T", "matmuls", "GiB of");
    printf("%-14s %-18s %10s %8s %9s %12s %9s %9s\n", "", "", ("-t " + std::to_string(run.s.T)).c_str(), "again", "the host", "at -b 1",
           "again", "the host");
    bool beyond = false;
    size_t host = 0;   // the most that a plan pins
    for (const FitRow& row : rows) {
        printf("%-14s%-19s", row.recipe.c_str(), row.saving.c_str());
        for (int i = 0; i < 2; i++) {
            const FitPlan& p = row.plans[i];
            const bool marked = p.T > c.maxT;
            beyond |= marked, host = std::max(host, p.host);
            if (p.B == 0) printf(i ? " %11s  %9s %9s" : " %10s %8s %9s", "-", "", "");
            else if (i == 0) printf(" %10lld %6.1f %% %9.2f", (long long)p.B, 100 * p.again, p.host / GIB);
            else printf(" %11lld%c %7.1f %% %9.2f", (long long)p.T, marked ? '*' : ' ', 100 * p.again, p.host / GIB);
        }
        printf("\n");
    }
    if (beyond) printf("* beyond the %d positions that the model was made for\n", c.maxT);
    if (host > host_room()) printf("this machine can pin %.2f GiB for the device; plans of more are for another one\n", host_room() / GIB);
    if (model_longest(c) < MOST_T) printf("no sequence is longer than %d: the model has no more positions\n", model_longest(c));
    if (!kMsNorm) printf("a build with MS_NORM=1 (make %s MS_NORM=1) has a table of its own: it keeps less at -r 1\n", program_name);
    for (int i = 0; i < 2; i++) {
        if (std::none_of(rows.begin(), rows.end(), [&](const FitRow& row) { return row.plans[i].B > 0; })) {
            printf("\n%s\n", i ? "no sequence fits, not even one of 256 tokens; try a smaller model (-e)"
                              : "no batch fits; try a shorter -t or a smaller model (-e)");
            continue;
        }
        printf("\n%s\n", i ? "the longest sequence:" : "the largest batch:");
        for (const FitRow& row : rows)
            if (row.plans[i].B > 0) printf("  %s\n", fit_command(run, row, row.plans[i]).c_str());
    }
}
// The table of --fit.
void fit(Run& run) {
    const FitAsked asked = fit_asked(run.s);
    if (asked.size == 0 && run.free_bytes == 0)
        fail_usage("%s: no GPU is visible whose free memory it could be; expected a size, as in --fit 24G", typed("fit").c_str());
    const double size = asked.size > 0 ? asked.size * GIB : run.free_bytes;
    const double reserve = asked.size > 0 ? FIT_RESERVE * GIB : run.free_bytes / 32;   // as choose_plan has it
    const Config c = run.model.config;
    const std::vector<FitRow> rows = fit_rows(run, (size_t)(size - reserve), asked.size > 0 ? SIZE_MAX : host_room());
    if (world.rank == 0) (asked.json ? fit_print_json : fit_print)(run, rows, c, size, reserve);
    leave(0);
}

// ---- the output folder and the log
// One run alone writes into a folder: two would mix their files into a checkpoint that calls itself whole. Both locks hold until this
// process ends. The folder's holds where somebody removes the file; the file's is for NFS, which locks no folders.
void lock_out(const std::string& out) {
    const std::string lock = out + "/.lock";
    const int folder = open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const int fd = open(lock.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
    struct stat st;
    if (fd < 0 && errno != ELOOP && errno != EISDIR) fail_option("out", "cannot write into this folder: %s", strerror(errno));
    if (fd < 0 || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
        fail_option("out", "expected .lock in it to be a file that this run may write, found a folder, a link or a device; remove it");
    char holder[200] = "", host[100] = "";
    if (!lock_file(folder) || !lock_file(fd)) {
        if (read(fd, holder, sizeof holder - 1) <= 0) strcpy(holder, "another process");
        fail_option("out", "%s trains into this folder; wait for its end, or name another folder", holder);
    }
    gethostname(host, sizeof host - 1);
    snprintf(holder, sizeof holder, "process %d on %s", (int)getpid(), host);
    if (ftruncate(fd, 0) == 0) write_bytes(fd, holder, strlen(holder));   // for the message above; the lock holds without
}

// A folder that can be written to: found out now, and not after an hour of training.
void prepare_out(const Settings& s, int resume_step) {
    const char* out = s.out.c_str();
    if (mkdir(out, 0777) != 0 && errno != EEXIST) fail_option("out", "cannot make this folder: %s", strerror(errno));
    if (!is_folder(out)) fail_option("out", "expected a folder, found %s", file_exists(s.out) ? "a file" : "a link that leads to none");
    if (faccessat(AT_FDCWD, out, R_OK | W_OK | X_OK, AT_EACCESS) != 0)
        fail_option("out", "cannot list, enter and write into this folder: %s", strerror(errno));
    if (world.rank > 0) return;   // rank 0 holds the lock for all
    lock_out(s.out);
    const std::vector<int> steps = checkpoints_in(s.out);
    if (!s.resume && !steps.empty())   // mixed with ours, a later resume could take them for ours
        fail_option("out", "holds checkpoints of an earlier run, up to step %d; --resume 1 goes on with it, another folder begins anew",
                    steps.back());
    if (s.resume && resume_step != (steps.empty() ? -1 : steps.back()))
        fail_option("out", "another run has written into this folder just now; start again");
    for (const std::string& path : files_named(s.out + CHECKPOINTS + ".tmp")) remove_folder(path);   // of a killed run
}

// A disk that is too small for what this run will write is said now, and not after its last step.
void check_room(const Settings& s, const Model& model, const Source& source, int steps) {
    double weights = 0;
    for (int p : model_trained(model)) weights += (double)param_shape(model.config, p).elements() * dtype_size(source.dtype);   // nearly
    if (model.config.lora.rank == 0) weights = (double)param_count(model.config) * dtype_size(source.dtype);
    const double need = weights + world_sum((double)state_bytes(model)), MiB = 1 << 20;
    if (world.rank != 0 || steps <= 0) return;
    struct rlimit limit;
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && std::max(weights, need - weights) > (double)limit.rlim_cur)
        fail_option("out", "the files of a checkpoint have up to %.3f MiB, but this process may write %.3f MiB (ulimit -f)",
                    std::max(weights, need - weights) / MiB, limit.rlim_cur / MiB);
    struct statvfs disk;
    if (statvfs(s.out.c_str(), &disk) != 0 || disk.f_blocks == 0) return;   // it does not say
    const double room = (double)(geteuid() == 0 ? disk.f_bfree : disk.f_bavail) * disk.f_frsize;
    if (room < need)
        fail_option("out", "a checkpoint takes %.3f MiB, but %.3f MiB are free there; free some space, or name a folder on another disk",
                    need / MiB, room / MiB);
    double more = s.checkpoint_every > 0 ? ceil((double)steps / s.checkpoint_every) : 1;
    if (s.keep > 0) more = std::min(more, std::max(1.0, s.keep + 1.0 - checkpoints_in(s.out).size()));   // one more, and one goes
    if (room < more * need)
        printf("note: %s has room for %.0f more checkpoints of %.1f MiB, and this run would add %.0f (--keep N keeps the newest N)\n",
               s.out.c_str(), floor(room / need), need / MiB, more);
}

// Opens the log. What is no file is written to as it is: a device, a FIFO, or what this process has open (/dev/stdout, the shell's
// >(...)). A resumed run goes on after the lines that its checkpoint has seen. What is no log of ours is left as it is.
void log_open(Log& log, const Settings& s, int resume_step) {
    const char* name = s.log.c_str();
    log.path = s.log;
    int ours = s.log == "/dev/stdout" ? 1 : s.log == "/dev/stderr" ? 2 : -1;
    if (ours >= 0 || sscanf(name, "/dev/fd/%d", &ours) == 1 || sscanf(name, "/proc/self/fd/%d", &ours) == 1) {
        log.fd = fcntl(ours, F_DUPFD_CLOEXEC, 3);
        if (log.fd < 0) fail_option("log", "cannot write there: %s", strerror(errno));
        return;
    }
    check_name("log", s.log);
    const std::string path = follow_links(s.log);
    struct stat at = {};
    const bool stream = stat(name, &at) == 0 && !S_ISREG(at.st_mode);
    if (S_ISDIR(at.st_mode) || S_ISBLK(at.st_mode)) fail_option("log", "expected a file, found a folder or a disk");
    const int how = stream ? O_WRONLY | O_NOCTTY | O_NONBLOCK : O_RDWR | O_CREAT;   // a FIFO would wait for a reader
    log.fd = open(name, how | O_APPEND | O_CLOEXEC, 0666);
    if (log.fd < 0) fail_option("log", "cannot open it: %s", errno == ENXIO ? "nobody reads this FIFO" : strerror(errno));
    if (stream) return;
    if (!lock_file(log.fd)) fail_option("log", "another run writes this log now; name another");

    FILE* old = fdopen(dup(log.fd), "r");
    off_t keep = 0;
    bool keeping = resume_step >= 0;
    char line[512];
    while (old != nullptr && fgets(line, sizeof line, old)) {
        int step;
        const size_t length = strlen(line), compared = std::min<size_t>(length, 9);   // a full disk may have cut the last one off
        if (length == 0 || (strncmp(line, "{\"step\": ", compared) != 0 && strncmp(line, "{\"done\": ", compared) != 0))
            fail_option("log", "expected a new name or the log of a run (lines that begin with {\"step\":), found something else; it "
                        "stays as it was");
        const bool whole = length > 1 && strcmp(line + length - 2, "}\n") == 0;
        keeping = keeping && whole && sscanf(line, "{\"step\": %d", &step) == 1 && step <= resume_step;
        if (keeping) keep += length;
        if (keeping && strstr(line, "\"val_loss\"") != nullptr) log.val_step = step;
    }
    if (old == nullptr || ferror(old) || fstat(log.fd, &at) != 0 || (keep < at.st_size && ftruncate(log.fd, keep) != 0))
        fail_option("log", "cannot go on with it: %s", strerror(errno));
    if (keep == 0 && at.st_size > 0) printf("note: %s held the lines of an earlier run, and begins anew\n", s.log.c_str());
    fclose(old);
}

// ---- validation and samples
bool stop_wanted(const Run& run) {   // by a signal to any of the ranks, or because data are lost
    const int signal = -(int)world_min(-(double)interrupted);   // one that comes after this is answered next time, by all ranks alike
    if (signal) interrupted = signal;
    return world_any(!run.train.error.empty() || !run.val.error.empty()) || signal;
}

// Summed loss of the batch in `host`.
float model_batch_loss(Model& model, int* host) {
    const int B = model.plan.B, T = model.plan.T;
    model_tokens(model, host, B * T, tokens_sort(host, B * T, model.config.V));
    model_forward(model, B, T, false);
    model_loss(model, B, T, false, true, B * T);
    float loss;
    cudaCheck(cudaMemcpyAsync(&loss, &model.state->loss_sum, sizeof loss, cudaMemcpyDeviceToHost, model.stream));
    cudaCheck(cudaStreamSynchronize(model.stream));
    return loss;
}

// Documents of the last batch that have targets, and those of which all are hits: then taking the likeliest token, again and again,
// gives the answer as it stands there.
void count_answers(const Run& run, const int* host, double (&answers)[2]) {
    const size_t BT = run.BT(), T = run.model.plan.T;
    std::vector<int> targets(BT);
    const int* documents = host + documents_at(BT, run.model.config.V);
    cudaCheck(cudaMemcpy(targets.data(), run.model.tokens + BT, BT * sizeof(int), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < BT;) {
        int wanted = 0, missed = 0;
        const size_t row = i / T;
        for (const int document = documents[i]; i < BT && i / T == row && documents[i] == document; i++)
            wanted += targets[i] != NO_TARGET, missed += targets[i] >= 0;
        answers[0] += wanted > 0, answers[1] += wanted > 0 && missed == 0;
    }
}
// Mean loss over up to --val-batches batches from the start of the validation data. Returns stop_wanted; if so, there is no result.
bool validate(Run& run) {
    const int batches = (int)std::min<size_t>(run.s.val_batches, run.val.batches_per_epoch()), step = run.state.step;
    int* host = run.host_free();
    loader_seek(run.val, 0, 0, 0);
    double sum = 0, trained = 0, answers[2] = {}, begin = now_seconds();
    for (int i = 0; i < batches && !interrupted && loader_next(run.val, host, host + run.BT(), run.documents(host)); i++) {
        progress("validating", i, batches, begin);
        sum += model_batch_loss(run.model, host);
        trained += run.count_with_loss(host);
        if (run.val.marks()) count_answers(run, host, answers);
    }
    progress("", batches, batches, begin);
    trained = world_sum(trained);
    for (double& count : answers) count = world_sum(count);
    const float loss = (float)(world_sum(sum) / std::max(trained, 1.0));
    if (stop_wanted(run)) return true;
    if (trained == 0) {
        run.val.error = run.s.val_data +
                        ": none of its tokens has a loss, so there is nothing to validate; expected some without the mark of masked "
                        "ones (prepro/text.py --show 3 shows them)";
        return stop_wanted(run);
    }
    run.val_loss = loss;
    char right[100] = "", logged[100] = "";
    if (run.val.marks()) {
        snprintf(right, sizeof right, ", %.0f of %.0f answers right (%.1f %%)", answers[1], answers[0],
                 100 * answers[1] / std::max(1.0, answers[0]));
        snprintf(logged, sizeof logged, ", \"answers\": %.0f, \"right\": %.0f", answers[0], answers[1]);
    }
    if (world.rank == 0) printf("val loss %.4f at step %d%s\n", std::isnan(loss) ? NAN : loss, step, right);   // a NaN may be negative
    fflush(stdout);
    if (run.log.val_step != step) log_line(run.log, "{\"step\": %d, \"val_loss\": %s%s}", step, json_number(loss).c_str(), logged);
    run.log.val_step = step;
    return false;
}

// A token drawn by its logit among the `top_k` likeliest (all: 0), by a random number `uniform` from 0 to 1. -1: a logit is NaN.
int draw_token(const std::vector<floatX>& logits, int V, int top_k, float temperature, float uniform) {
    std::vector<std::pair<float, int>> best(V);   // minus the logit, token: the likeliest is the least, and of equals the first
    for (int v = 0; v < V; v++) best[v] = {-(float)logits[v], v};
    if (std::any_of(best.begin(), best.end(), [](auto& b) { return std::isnan(b.first); })) return -1;
    std::vector<double> p(temperature == 0 ? 1 : top_k > 0 ? std::min(top_k, V) : V);
    std::partial_sort(best.begin(), best.begin() + p.size(), best.end());
    for (size_t j = 0; j < p.size(); j++) p[j] = temperature == 0 ? 1 : exp((best[0].first - best[j].first) / temperature);
    double left = uniform * std::accumulate(p.begin(), p.end(), 0.0);
    size_t j = 0;
    while ((left -= p[j]) > 0 && j + 1 < p.size()) j++;
    return best[j].second;
}

// Prints up to `most` tokens that the model writes after `text`, ending with the token `stop` (-1: none). False: the logits are no numbers.
bool write_on(Run& run, std::vector<int> text, int64_t most, int stop, uint64_t stream) {
    Model& model = run.model;
    const int V = model.config.V, Vp = model.config.Vp, C = model.config.C;
    int* host = run.host_free();
    std::vector<floatX> logits(Vp);
    for (int i = 0; i < most && !interrupted; i++) {
        const int T = std::min((int)text.size(), model.plan.T);   // a longer text is seen through its end
        const int padded = std::min(ceil_div(T, 16) * 16, model.plan.T);   // few shapes, because matmuls are prepared once per shape
        std::copy(text.end() - T, text.end(), host);
        std::fill(host + T, host + padded, text[0]);   // after the last token, where causal attention does not look
        std::copy(host, host + padded, host + padded);
        if (model.plan.marks) std::fill_n(host + documents_at(padded, V), padded, 0);
        model_tokens(model, host, padded, tokens_sort(host, padded, V));
        model_forward(model, 1, padded, false);
        const floatX *last = model.lnf + (size_t)(T - 1) * C, *head = model.param[head_param(model.config)];
        matmul_forward(model.logits, last, head, nullptr, 1, C, Vp, model.stream);
        cudaCheck(cudaMemcpyAsync(logits.data(), model.logits, Vp * sizeof(floatX), cudaMemcpyDeviceToHost, model.stream));
        cudaCheck(cudaStreamSynchronize(model.stream));
        const float uniform = hash_uniform(hash64(model.seed, run.state.step + stream, i));
        text.push_back(draw_token(logits, V, (int)run.s.top_k, (float)run.s.temperature, uniform));
        if (text.back() < 0) {
            printf("(the logits are not finite)");
            if (!model.plan.training) run.status = 3;
            return false;
        }
        if (text.back() == stop) break;
        print_token(run.tokenizer, text.back());
        fflush(stdout);
    }
    return true;
}
// Prints what the model writes: --sample-tokens tokens after an end-of-text token, or of data with marks answers to questions of the
// validation data, beside those that stand there. Plain: each token is a forward of all before it. Returns stop_wanted.
bool sample(Run& run) {
    const int V = run.model.config.V;
    if (world.rank == 0) printf("---- sample\n");
    std::vector<int> batch;
    if (run.val.marks()) {
        loader_seek(run.val, 0, 0, 0);
        batch.resize(3 * run.BT());
        if (!loader_next(run.val, &batch[0], &batch[run.BT()], &batch[2 * run.BT()])) return stop_wanted(run);
    }
    const size_t BT = run.BT(), T = run.model.plan.T;
    int shown = 0;
    for (size_t i = 0; world.rank == 0 && !batch.empty() && i < BT && shown < 3 && !interrupted;) {   // a document after the other
        const size_t begin = i;
        for (; i < BT && i / T == begin / T && batch[2 * BT + i] == batch[2 * BT + begin]; i++) {}
        size_t first = begin;
        while (first < i && batch[BT + first] == NO_TARGET) first++;
        if (first == i) continue;
        std::vector<int> answer;
        for (size_t t = first; t < i && batch[BT + t] != NO_TARGET; t++) answer.push_back(batch[BT + t]);
        for (size_t t = begin; t <= first; t++) print_token(run.tokenizer, batch[t]);
        printf(" >>> ");
        const bool wrote =
            write_on(run, {&batch[begin], &batch[first] + 1}, std::min<int64_t>(run.s.sample_tokens, 2 * answer.size() + 8),
                     answer.back(), (1ull << 42) + ((uint64_t)++shown << 50));
        printf("   (expected: ");
        for (size_t t = 0; t + 1 < answer.size(); t++) print_token(run.tokenizer, answer[t]);
        printf(")\n");
        if (!wrote) break;
    }
    if (world.rank == 0 && batch.empty()) {
        const int start = run.tokenizer.tokens.empty() ? V - 1 : std::min(run.tokenizer.end_of_text, V - 1);
        write_on(run, {start}, run.s.sample_tokens, -1, 1ull << 42);
    }
    if (world.rank == 0) printf("\n----\n");
    return stop_wanted(run);
}

// ---- a step. Step s is the s-th update: what is logged under s has seen s updates.
// The tokens of a step, into `half`.
void load_tokens(Run& run) {
    const int BT = (int)run.BT(), V = run.model.config.V;
    run.buckets.resize(run.model.plan.micro_batches);
    run.ready = true, run.with_loss = 0;
    for (int micro = 0; run.ready && micro < run.model.plan.micro_batches; micro++) {
        int* host = run.host_region(micro);
        if (run.s.overfit && micro == 0) loader_seek(run.train, 0, 0, 0);
        run.ready = loader_next(run.train, host, host + BT, run.documents(host));
        if (run.ready) run.buckets[micro] = tokens_sort(host, BT, V);
        if (run.ready) run.with_loss += run.count_with_loss(host);
    }
    run.with_loss *= run.model.plan.marks ? 1 : world.size;   // with marks the ranks add theirs up, in run_step
}

void next_tokens(Run& run) {   // after a step
    run.state.position = run.train.position;
    const bool another = run.state.step + 1 < run.steps && run.train.batches_left_in_shard() >= (size_t)run.model.plan.micro_batches;
    run.ready = another || run.s.overfit;
    if (run.s.overfit) return;   // the same tokens again
    run.half = !run.half;
    if (another) load_tokens(run);
}
constexpr int NO_LOSS_AT_ALL = 2;   // Verdict::skip of a step whose tokens have none
Verdict skip_step(Run& run) {
    next_tokens(run);
    return {0, 0, NAN, NAN, 1, NO_LOSS_AT_ALL};
}
Verdict run_step(Run& run, const Hyper& h) {
    Model& model = run.model;
    const int B = model.plan.B, T = model.plan.T, micro_batches = model.plan.micro_batches;
    if (run.first_tokens.empty()) run.first_tokens.assign(run.host_region(0), run.host_region(0) + run.region_ints());
    const double with_loss = model.plan.marks ? world_sum(run.with_loss) : run.with_loss;
    if (with_loss == 0) return skip_step(run);
    const AdaLomo fused = {h.lr, h.weight_decay, (float)(1 - pow(model.updates + 1, -0.8)), model.seed, (uint64_t)run.state.step};
    if (model.plan.fuses()) cudaCheck(cudaMemsetAsync(&model.state->square_sum, 0, sizeof(float), model.stream));
    for (int micro = 0; micro < micro_batches; micro++) {
        model_tokens(model, run.host_region(micro), B * T, run.buckets[micro]);
        model.micro_batch = ((uint64_t)run.state.step * micro_batches + micro) * world.size + world.rank + 1;
        model_forward(model, B, T);
        model_loss(model, B, T, true, micro == 0, with_loss);
        model_backward(model, B, T, run.buckets[micro], micro, model.plan.fuses() ? &fused : nullptr);
    }
    model.micro_batch = 0;
    return model_update(model, h, run.state.step, with_loss, [&] { next_tokens(run); });   // while the device works
}

void report_step(Run& run, float lr, const Verdict& v, double took) {   // on the terminal and in the log
    const int step = run.state.step, to_come = run.steps - step;
    const double speed = run.step_tokens() / took, each = run.timed > 0 ? run.seconds / run.timed : took, rest = each * to_come;
    const double mfu = model_flops_per_token(run.model, run.model.plan.T) * speed / (run.peak_flops * world.size);
    const bool known = run.timed > 0 || run.on_cpu();   // a GPU's first step prepares its matmuls; a CPU's is like all others
    const bool terminal = isatty(STDOUT_FILENO);
    if (v.skip == NO_LOSS_AT_ALL) {
        printf("step %5d/%d | skipped: none of its tokens has a loss (%d such steps so far)\n", step, run.steps, run.without_loss);
        return log_line(run.log, "{\"step\": %d, \"train_loss\": null}", step);
    }
    printf("step %5d/%d | loss %.4f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s | ", step, run.steps, fabsf(v.loss), fabsf(v.grad_norm),
           lr, took * 1e3, speed);   // fabs: neither is negative, but a NaN may be
    if (run.peak_flops > 0) printf("MFU %.1f%%", 100 * mfu);
    else printf("MFU n/a");
    if (terminal && known) printf(" | %s left", duration(rest).c_str());
    printf("\n");
    if (!terminal && run.timed == (run.on_cpu() ? 0 : 1) && rest > 60)   // as soon as it is known
        printf("  %d steps of about %.1f s are to come: %s\n", to_come, each, duration(rest).c_str());
    if (run.state.not_finite_in_row > 0)
        printf("  the loss or the gradient is not finite: this step changed %s (%d in a row)\n",
               run.model.plan.fuses() ? "nothing whose gradient was not" : "nothing", run.state.not_finite_in_row);
    else if (v.skip)
        printf("  skipped: loss %.1f, gradient norm %.1f deviations above the last %d steps\n", v.loss_z, v.grad_z, HISTORY);
    log_line(run.log, "{\"step\": %d, \"train_loss\": %s, \"grad_norm\": %s, \"lr\": %s, \"ms\": %.3f, \"tokens_per_s\": %.1f, \"mfu\": "
             "%s}", step, json_number(v.loss).c_str(), json_number(v.grad_norm).c_str(), json_number(lr).c_str(), took * 1e3, speed,
             json_number(mfu).c_str());
}

void train_step(Run& run) {
    const Settings& s = run.s;
    RunState& at = run.state;
    const float lr = schedule_lr((int)s.schedule, at.step, run.steps, (float)s.lr, (int)s.warmup, (float)s.final_fraction);
    const Hyper h = {lr, 0.9f, 0.95f, 1e-8f, (float)s.weight_decay, (float)s.grad_clip, (float)s.skip_loss_z, (float)s.skip_grad_z};
    set_stop_answer(run.saves());
    const double begin = now_seconds();
    const Verdict v = run_step(run, h);
    const double took = now_seconds() - begin;
    if (v.skip != NO_LOSS_AT_ALL && ++run.timed > 0) run.seconds += took;
    at.step++;
    const bool finite = std::isfinite(v.loss) && std::isfinite(v.grad_norm);
    at.not_finite_in_row = finite ? 0 : at.not_finite_in_row + 1;
    if (finite && run.first_loss == 0) run.first_loss = v.loss;
    run.without_loss_in_row = v.skip == NO_LOSS_AT_ALL ? run.without_loss_in_row + 1 : 0;
    run.without_loss += run.without_loss_in_row > 0;
    if (world.rank == 0) report_step(run, lr, v, took);
}

// Writes a checkpoint, and with --keep deletes an older one, if what is in memory is worth it. The last step and the last
// validation were finite; but that step has changed the weights since. So the first micro-batch of the run, tried once more, must
// have a loss that is a number, and less than twice that of guessing, or of the beginning.
void save(Run& run) {
    const RunState& at = run.state;
    bool good = at.not_finite_in_row == 0 && std::isfinite(run.val_loss);
    if (good && !run.first_tokens.empty()) {
        std::copy(run.first_tokens.begin(), run.first_tokens.end(), run.host_free());
        const double limit = 2 * std::max(logf((float)run.model.config.V), run.first_loss) * run.count_with_loss(run.host_free());
        good = !world_any(!(model_batch_loss(run.model, run.host_free()) <= limit));   // so written, NaN is not good
    }
    run.status = !good ? 3 : checkpoint_save(run.model, at, run.train, run.s.out, (int)run.s.keep, run.source) ? 0 : 1;
    if (run.status == 0) run.saved = at.step;
    if (!good && world.rank == 0)
        warn("no checkpoint of step %d: the loss is not finite, or has exploded; those before it stay", at.step);
}

// What is said at the end. `left_out`: a signal has kept the run from something. Returns the exit status.
int end_loop(Run& run, bool finished, bool left_out, bool wrote) {
    const RunState& at = run.state;
    if (at.not_finite_in_row > 0 || !std::isfinite(run.val_loss)) run.status = 3;
    for (const std::string& error : {run.train.error, run.val.error}) {
        if (!error.empty()) warn("%s", error.c_str());
        run.status = std::max(run.status, error.empty() ? 0 : 1);
    }
    const int status = left_out && interrupted ? 128 + interrupted : run.status;
    if (world.rank != 0) return status;
    if (!wrote && run.status == 3) warn("what this model computes is not finite");
    fflush(stdout);
    FILE* to = ferror(stdout) ? stderr : stdout;   // the last words must be heard
    if (run.timed > 0)
        fprintf(to, "%d steps after the first, %.1f ms each, %.0f tok/s\n", run.timed, run.seconds / run.timed * 1e3,
                run.step_tokens() * run.timed / run.seconds);
    const std::string kept = finished || at.step == 0 ? "" : run.s.out.empty() ? "; without --out nothing was saved"
        : run.saved < 0 ? "; nothing was saved" : "; --resume 1 goes on after step " + std::to_string(run.saved);
    if (left_out) fprintf(to, "interrupted after step %d%s\n", at.step, kept.c_str());
    return status;
}

// --dump-gradients, before the first step: that step computes them again.
void dump_gradients(Run& run) {
    Model& model = run.model;
    const int B = model.plan.B, T = model.plan.T, micro_batches = std::exchange(model.plan.micro_batches, 1);
    model_tokens(model, run.host_region(0), B * T, run.buckets[0]);
    model_forward(model, B, T);
    const double with_loss = run.count_with_loss(run.host_region(0));
    if (with_loss == 0)
        fail_option("dump-gradients", "no token of the first micro-batch has a loss (prepro/text.py --show 3 shows which have)");
    model_loss(model, B, T, true, true, with_loss * world.size);
    model_backward(model, B, T, run.buckets[0], 0);
    float loss;
    cudaCheck(cudaMemcpyAsync(&loss, &model.state->loss_sum, sizeof loss, cudaMemcpyDeviceToHost, model.stream));
    cudaCheck(cudaStreamSynchronize(model.stream));
    model.plan.micro_batches = micro_batches;
    const std::string error = world.rank == 0 ? hf_dump_gradients(model, run.s.dump_gradients, loss / (float)with_loss) : "";
    if (!error.empty()) fail_option("dump-gradients", "%s", error.c_str());
    if (world.rank == 0) printf("gradients of the first micro-batch in %s\n", run.s.dump_gradients.c_str());
}

int run_loop(Run& run) {   // returns the exit status
    const Settings& s = run.s;
    RunState& at = run.state;
    run.saved = run.resume_step;
    if (!s.dump_gradients.empty()) {
        load_tokens(run);
        if (run.ready) dump_gradients(run);
    }
    while (true) {
        if (world.rank == 0 && fflush(stdout) != 0 && errno == EPIPE) on_interrupt(SIGPIPE);   // nobody reads us any more
        set_stop_answer(run.unsaved());
        const bool finished = at.step >= run.steps;
        auto due = [&](int64_t every) { return every > 0 && (finished || at.step % every == 0); };
        if (!finished && !run.ready && run.train.error.empty()) load_tokens(run);
        bool stop = stop_wanted(run);
        if (!stop && due(s.val_every)) stop = validate(run);
        if (!stop && due(s.sample_every) && (finished || at.step > 0)) stop = sample(run);
        const bool writes = run.unsaved() && (stop || due(s.checkpoint_every) || (finished && s.checkpoint_every != 0));
        if (writes) save(run);
        if (finished || stop) return end_loop(run, finished, stop && (!finished || s.val_every > 0 || s.sample_every > 0), writes);
        train_step(run);
        if (run.without_loss_in_row >= std::min(10, run.steps - std::max(run.resume_step, 0))) {
            warn("none of the tokens of %d steps in a row, up to step %d, has a loss: all of them are masked, so there is nothing to "
                 "learn; prepro/text.py --show 3 shows what is trained on", run.without_loss_in_row, at.step);
            return 3;
        }
        if (at.not_finite_in_row >= 10) {
            warn("the loss or the gradient was not finite for 10 steps in a row, up to step %d. %sLower the rate (--lr), lengthen "
                 "--warmup, or resume from a checkpoint (--resume 1)", at.step,
                 run.model.plan.fuses() ? "" : "The weights are those of before. ");
            return 3;
        }
    }
}

// What the run takes: all of it, as for --estimate, or at its start, without the parameters and what training keeps for each.
void print_plan(Run& run, bool all) {
    const Config& c = run.model.config;
    const Plan& plan = run.model.plan;
    const Table table = model_table(run.model);
    const double MiB = 1 << 20, room = run.free_bytes / MiB, total = run.total_bytes / MiB;
    if (!all) {
        printf("device     %s x %d, %.1f MiB free of %.1f (driver, libraries and others hold %.1f)\n", run.device.name, world.size, room,
               total, total - room);
        printf("model      %s: %s, %.2fM parameters, %s\n", run.model_name(), model_sizes(c).c_str(), param_count(c) / 1e6,
               dtype_name(FLOATX));
        if (c.lora.rank > 0) {
            double trained = 0;
            for (int p : model_trained(run.model)) trained += (double)param_shape(c, p).elements();
            printf("adapters   rank %d on %s, alpha %g%s: %.2fM parameters in training%s\n", run.rank(),
                   target_names(run.model.config).c_str(), run.s.lora_alpha, run.s.lora_dropout > 0 ? ", dropout" : "", trained / 1e6,
                   run.s.freeze_a ? ", B alone (LoRA-FA)" : "");
        }
        if (run.steps > 0) {
            const double epoch = (double)run.train.batches_per_epoch() / plan.micro_batches;
            printf("step       %d sequences x %d tokens x %d micro-batches x %d GPUs = %zu tokens; %d steps, an epoch has %.*f\n", plan.B,
                   plan.T, plan.micro_batches, world.size, run.step_tokens(), run.steps, epoch < 10 ? 1 : 0, epoch);
        }
        if (plan.optimizer != ADAMW && plan.training)
            printf("optimizer  %s%s\n", OPTIMIZERS[plan.optimizer],
                   plan.fuses() ? ", within backward, a layer at a time; no --grad-clip" : "");
        printf("memory     (--estimate lists parameters, gradients and optimizer state row by row)\n");
    }
    const double again = model_again_share(run.model, plan.T);
    if (run.s.estimate == "json") table_print_json(table, again);
    else table_print(table, plan.training ? c.L : 1, run.BT() * c.C, model_mode(plan).c_str(), all);
    if (run.s.estimate != "json" && again > 0)
        printf("computed again for backward: %.1f %% of a step's matmul operations\n", 100 * again);
    if (run.s.estimate == "text" && !*run.device.name)
        printf("no GPU is visible here, so whether this fits is for you to say; chunks of logits are as if it did\n");
    else if (run.s.estimate == "text")
        printf("%s has %.1f MiB, %.1f MiB of them free: this %s\n", run.device.name, total, room,
               table_bytes(table) >= run.free_bytes      ? "does not fit"
               : table_bytes(table, true) > host_room() ? "fits there, but not what it pins of the host's memory"
                                                         : "fits");
    fflush(stdout);
}

// Takes the memory, and fills it with weights.
void make_model(Run& run) {
    Model& model = run.model;
    cudaCheck(cudaStreamCreate(&model.stream));
    model_allocate(model);
    if (world.rank == 0) printf("weights    %s%s\n", run.model_file.empty() ? "drawn from --seed" : "from ", run.model_file.c_str());
    fflush(stdout);
    if (run.model_file.empty() && model.config.lora.rank > 0 && world.rank == 0)
        printf("note: the weights under the adapters stand in no file; what PEFT loads belongs to a directory, -e DIR\n");
    if (run.model_file.empty()) model_init(model);
    else run.source = model_load(model, run.model_file);
    if (model.config.lora.rank > 0) {   // what is written is the adapter
        run.source.dtypes.clear(), run.source.dtype = F32;
        if (run.adapter.folder.empty()) {
            adapter_init(model);
            run.source.adapter = adapter_new_config(model, real_path(run.model_name()), run.s.lora_alpha, run.s.lora_dropout);
        } else {
            adapter_load(model, run.adapter, run.source);
            run.source.adapter.set("base_model_name_or_path", json_string(real_path(run.model_name())));
            run.source.adapter.set("task_type", json_string("CAUSAL_LM")), run.source.adapter.set("inference_mode", json_bool(true));
            if (given("lora-dropout")) run.source.adapter.set("lora_dropout", json_number_value((float)run.s.lora_dropout));
            if (run.s.train_norms && run.s.trains()) run.source.adapter.set("modules_to_save", adapter_norms(model));
        }
    }
    if (run.s.save_dtype > 0) run.source.dtype = std::vector<DType>{F32, BF16, F16}[run.s.save_dtype - 1], run.source.dtypes.clear();
    model.weights_in_state = false;
    auto narrows = [&](DType type) { return type != F32 && (kFP32 || type != BF16); };
    for (const AdapterPart& a : adapter_parts(model, run.source)) model.weights_in_state |= narrows(a.part.dtype);
    hf_walk(model.config, [&](int p, size_t, const HfPiece& piece) {
        model.weights_in_state |=
            model.plan.trains(p) && narrows(run.source.dtype_of(model.config.lora.rank ? saved_name(piece) : piece.name));
    });
    cudaCheck(cudaStreamSynchronize(model.stream));
}

void free_model(Run& run) {
    Model& model = run.model;
    cudaCheck(cudaDeviceSynchronize());
    table_free(model.table);
    for (cudaEvent_t* event :
         {&model.wte_copied[0], &model.wte_copied[1], &model.stream_ready, &model.stream_copied[0], &model.stream_copied[1]})
        if (*event != nullptr) cudaCheck(cudaEventDestroy(*event)), *event = nullptr;
    if (model.copies != nullptr) cudaCheck(cudaStreamDestroy(model.copies)), model.copies = nullptr;
    cudaCheck(cudaStreamDestroy(model.stream));
}

// Puts model, loader and counters where the checkpoint left them, and says what the run does otherwise than the one that wrote it.
void begin_or_go_on(Run& run) {
    const std::vector<double> kept = settings_kept(run);
    const bool resumes = run.resume_step >= 0;
    if (resumes) run.state = state_load(run.model, run.train, run.resumed, run.resume_step);
    const std::vector<double> was = run.state.settings;   // of an older file there may be fewer, or none
    run.state.settings = kept;
    if (world.rank != 0 || !run.s.resume) return;
    if (resumes) printf("resumed at step %d from %s\n", run.state.step, run.resumed.c_str());
    else printf("no checkpoint in %s yet: starting at step 0\n", run.s.out.c_str());
    for (size_t slot = 0; slot < std::min(kept.size(), was.size()); slot++)
        for (const Option& o : options)
            if (o.slot == (int)slot && was[slot] != kept[slot])
                printf("note: %s%s was %s, is %s\n", o.type == BUILD ? "" : "--", o.name, o.text(was[slot]).c_str(),
                       o.text(kept[slot]).c_str());
    const std::string& base = run.adapter.config["base_model_name_or_path"].text;
    if (resumes && !run.adapter.folder.empty() && real_path(run.model_name()) != base)
        printf("note: the model under the adapters was %s, is %s\n", base.c_str(), real_path(run.model_name()).c_str());
    if (resumes && given("seed") && (uint64_t)run.s.seed != run.model.seed)
        printf("note: the run goes on with its own --seed, %llu\n", (unsigned long long)run.model.seed);
}

// --merge, and where there are data to validate on the losses of base, base with adapter, and what was written, over one batch.
void merge(Run& run) {
    Settings& s = run.s;
    while (s.merge.size() > 1 && s.merge.back() == '/') s.merge.pop_back();
    const std::string folder = s.merge, unfinished = folder + ".tmp";
    s.sample_every = 0, s.val_every = 1;
    for (const char* name : {"lora", "out", "resume", "steps", "dump-gradients", "log", "estimate"})
        if (given(name))
            bad_option("merge", "adds --adapter to the 16-bit model of -e, writes that, and exits; leave out %s", typed(name).c_str());
    if (world.size > 1) bad_option("merge", "one process is enough; start it without mpirun");
    if (run.adapter.folder.empty()) bad_option("merge", "expected --adapter DIR with it, whose weights are added to those of -e");
    if (!is_folder(run.model_file.c_str())) bad_option("merge", "expected -e DIR, the directory of the base model");
    if (run.model.config.lora.quantized)
        bad_option("merge", "%s is in 4 bits, and the sum would be rounded to them; expected the model in 16 bits", run.model_name());
    if (file_exists(folder)) bad_option("merge", "there is something of that name; expected a new one");
    const bool compare = given("val-data");
    const Config with = run.model.config;
    double loss[3] = {};
    auto read_batch = [&](int* host) {   // returns how many of its tokens have a loss
        loader_seek(run.val, 0, 0, 0);
        if (!loader_next(run.val, host, host + run.BT(), run.documents(host))) fail("%s", run.val.error.c_str());
        const double with_loss = run.count_with_loss(host);
        if (with_loss == 0)
            fail_option("val-data", "no token of its first batch has a loss; leave it out, or see prepro/text.py --show 3");
        return with_loss;
    };
    auto measure = [&](int which, const std::string& model_file, bool adapter) {
        run.model.config.lora = adapter ? with.lora : Lora{};
        if (!adapter) run.model.plan.host_wte = false;
        run.model_file = model_file;
        make_model(run);
        int* host = run.host_free();
        const double with_loss = read_batch(host);
        loss[which] = model_batch_loss(run.model, host) / with_loss;
        free_model(run);
        run.model.config = with;
    };
    if (compare) {
        pick_device(run);
        choose_plan(run, open_data(run));
        loader_set_batch(run.val, run.model.plan.B);
        read_batch(std::vector<int>(run.region_ints()).data());   // what is wrong with it is said before anything is written
    }
    for (const SafeTensor& t : run.adapter.tensors.tensors) adapter_read(run.adapter, t.name);   // are they finite?
    remove_folder(unfinished);   // a killed one may have left it
    if (mkdir(unfinished.c_str(), 0777) != 0) fail_option("merge", "cannot make %s: %s", unfinished.c_str(), strerror(errno));
    HfModel m = hf_open(run.model_file);
    Source source = hf_source(m);
    source.dtype = source.dtype_of(hf_pieces(with, WTE, -1)[0].name);
    if (s.save_dtype > 0) source.dtype = std::vector<DType>{F32, BF16, F16}[s.save_dtype - 1], source.dtypes.clear();
    const std::string error = hf_merge(with, run.model_file, run.adapter, unfinished, source);
    if (!error.empty() || rename(unfinished.c_str(), folder.c_str()) != 0) {
        remove_folder(unfinished);
        fail_option("merge", "%s", error.empty() ? strerror(errno) : error.c_str());
    }
    printf("base and adapter, as one model, in %s\n", folder.c_str());
    if (!compare) return;
    printf("its loss, and theirs (that takes the model on the device: --base nf4 makes it smaller, and without %s nothing is measured)\n",
           typed("val-data").c_str());
    fflush(stdout);
    const std::string base = run.model_file;
    measure(1, base, true), measure(0, base, false), measure(2, folder, false);
    printf("loss of a batch: base %.6f, base with adapter %.6f, merged %.6f%s\n", loss[0], loss[1], loss[2],
           run.model.plan.nf4 ? "; all three in 4 bits" : "");
}

int main(int argc, char** argv) {
    for (int fd = 0; fd < 3; fd++)   // a file of ours that took a closed one's number would get our messages
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) < 0) return 1;
    signal(SIGPIPE, SIG_IGN);   // a reader that has gone, and a limit on a file's size, are errors of write(), with a message
    signal(SIGXFSZ, SIG_IGN);
    world_init(&argc, &argv);
    const bool speaks = world.rank == 0;
    Run run;
    options = settings_options(run.s);
    options_parse(argc, argv);
    settings_check(run.s);
    if (given("fit")) fit_begin(run);
    pick_model(run);
    if (!run.s.merge.empty()) {
        merge(run);
        leave(0);
    }
    pick_optimizer(run);
    pick_device(run);
    const bool estimating = !run.s.estimate.empty() || given("fit");
    for (const char* data : {"train-data", "val-data"})   // marks take four bytes a token
        for (const std::string& name :
             estimating&& given(data) ? files_named(*(std::string*)option(data).value) : std::vector<std::string>())
            run.model.plan.marks |= shard_check_header(name.c_str()).marks;
    if (given("fit")) fit(run);
    choose_plan(run, estimating ? 1 << 16 : open_data(run));
    if (estimating && speaks) print_plan(run, true);
    if (estimating) leave(0);
    count_steps(run);
    if (run.saves()) prepare_out(run.s, run.resume_step);
    if (speaks) print_plan(run, false);
    make_model(run);
    begin_or_go_on(run);
    if (run.saves()) check_room(run.s, run.model, run.source, run.steps - run.state.step);
    if (!run.s.log.empty() && speaks) log_open(run.log, run.s, run.resume_step);   // after all that could still refuse to run
    catch_signals();
    if (speaks) printf("start      at step %d; the first step also prepares the matmuls\n", run.state.step);
    fflush(stdout);
    int status = run_loop(run);
    if (status == 0 && speaks) status = model_finish(run.model);
    const size_t announced = table_bytes(run.model.table);
    if (speaks)
        printf("device memory: %zu bytes at the peak, %zu announced; of the host, pinned: %zu, %zu\n", device_peak, announced, host_peak,
               table_bytes(run.model.table, true));
    log_line(run.log, "{\"done\": %s, \"steps\": %d, \"peak_bytes\": %zu, \"estimate_bytes\": %zu}", status == 0 ? "true" : "false",
             run.state.step, device_peak, announced);
    if (!log_close(run.log) && status == 0) status = 1;
    loader_close(run.train);
    loader_close(run.val);
    free_model(run);
    cublasCheck(cublasLtDestroy(matmul_state.handle));
    world_end();
    leave(status);
}
// ==== end twin
#endif
