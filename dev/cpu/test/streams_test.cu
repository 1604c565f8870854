// Streams, events and copies: what CUDA promises, and mistakes that a stream which is in time forgives. `./streams_test` checks the
// former. `./streams_test offload MISTAKE` prints results bit for bit, to be compared between values of SIMT_STREAMS; without a
// MISTAKE they are the same. The others end with a report that names them.
#include <cublasLt.h>

#include <vector>

#include "expect.h"

// How far behind streams are decides what some of these checks see. On a GPU it is anybody's guess: neither.
static bool mode(const char* name) { return getenv("SIMT_STREAMS") && !strcmp(getenv("SIMT_STREAMS"), name); }
static bool late() { return mode("late"); }
static bool eager() { return mode("eager"); }

static cudaStream_t blocking_stream() {
    cudaStream_t s;
    cudaCheck(cudaStreamCreate(&s));
    return s;
}
static cudaStream_t stream_of_its_own() {      // the null stream and it do not wait for one another
    cudaStream_t s;
    cudaCheck(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
}
static cudaEvent_t event() {
    cudaEvent_t e;
    cudaCheck(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    return e;
}
template <class T> static T* pinned(size_t n) {
    T* p;
    cudaCheck(cudaMallocHost(&p, n * sizeof(T)));
    return p;
}

// ---- layers whose weights come from the host, by way of two buffers ----------------------------------------------

__global__ void layer_kernel(float* x, float* gradient, const float* w) {
    int i = threadIdx.x;
    x[i] = 0.5f * x[i] + w[i];
    gradient[i] = x[i] * w[i];
}

static void offload(const char* mistake) {
    const int N = 8, TURNS = 7;
    auto not_if = [&](const char* name) { return strcmp(mistake, name) != 0; };
    float ones[N], *x, *staged[2], *w[2], *gradient[2], *gradients = pinned<float>(TURNS * N);
    for (float& one : ones) one = 1;
    x = to_device(ones, N);
    cudaEvent_t copied[2], used[2], returned[2];
    for (int i = 0; i < 2; i++) {
        staged[i] = pinned<float>(N), w[i] = device_array<float>(N), gradient[i] = device_array<float>(N);
        copied[i] = event(), used[i] = event(), returned[i] = event();
    }
    cudaCheck(cudaDeviceSynchronize());
    cudaStream_t in = stream_of_its_own(), compute = stream_of_its_own(), out = stream_of_its_own();
    for (int turn = 0; turn < TURNS; turn++) {
        int i = turn % 2;                                                               // events not yet recorded let all pass
        if (not_if("staged")) cudaCheck(cudaEventSynchronize(copied[i]));               // before the host writes there again
        for (int j = 0; j < N; j++) staged[i][j] = (float)(turn * N + j);
        if (not_if("used")) cudaCheck(cudaStreamWaitEvent(in, used[i]));                // before the copy does
        cudaCheck(cudaMemcpyAsync(w[i], staged[i], N * sizeof(float), cudaMemcpyHostToDevice, in));
        cudaCheck(cudaEventRecord(copied[i], in));
        if (not_if("copied")) cudaCheck(cudaStreamWaitEvent(compute, copied[i]));       // before the kernel reads
        if (not_if("returned")) cudaCheck(cudaStreamWaitEvent(compute, returned[i]));   // before it writes
        layer_kernel<<<1, N, 0, compute>>>(x, gradient[i], w[i]);
        cudaCheck(cudaEventRecord(used[i], compute));
        cudaCheck(cudaStreamWaitEvent(out, used[i], 0));
        cudaCheck(cudaMemcpyAsync(gradients + turn * N, gradient[i], N * sizeof(float), cudaMemcpyDeviceToHost, out));
        cudaCheck(cudaEventRecord(returned[i], out));
    }
    cudaCheck(cudaStreamSynchronize(compute));
    if (not_if("read")) cudaCheck(cudaStreamSynchronize(out));                          // before the host reads
    for (int i = 0; i < TURNS * N; i++) printf("%a\n", gradients[i]);
}

// ---- events ------------------------------------------------------------------------------------------------------

__global__ void set_kernel(int* p, int value) { *p = value; }
__global__ void add_kernel(int* sum, const int* p) { *sum += *p; }

static void events() {
    cudaStream_t a = stream_of_its_own(), b = stream_of_its_own();
    cudaEvent_t e = event(), f = event(), never = event();
    int *x = device_array<int>(1), *y = device_array<int>(1), *host = pinned<int>(1);
    cudaCheck(cudaMemset(y, 0, sizeof(int)));
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaEventSynchronize(never));                // one that nobody has recorded is complete
    EXPECT(cudaEventQuery(never) == cudaSuccess);
    cudaCheck(cudaStreamWaitEvent(b, never, 0));

    // A wait is for the record that was the last one: e is recorded again behind what waits for b, which waits for the first.
    set_kernel<<<1, 1, 0, a>>>(x, 1);
    cudaCheck(cudaEventRecord(e, a));
    cudaCheck(cudaStreamWaitEvent(b, e, 0));
    add_kernel<<<1, 1, 0, b>>>(y, x);
    cudaCheck(cudaEventRecord(f, b));
    cudaCheck(cudaStreamWaitEvent(a, f, 0));
    set_kernel<<<1, 1, 0, a>>>(x, 10);
    cudaCheck(cudaMemcpyAsync(host, x, sizeof(int), cudaMemcpyDeviceToHost, a));
    cudaCheck(cudaEventRecord(e, a));
    cudaCheck(cudaStreamSynchronize(b));
    if (late()) EXPECT(cudaEventQuery(e) == cudaErrorNotReady && cudaGetLastError() == cudaErrorNotReady && *host == -1);
    cudaCheck(cudaEventSynchronize(e));                    // the host waits for the second
    EXPECT(*host == 10 && cudaEventQuery(e) == cudaSuccess);
    cudaCheck(cudaStreamWaitEvent(b, e, 0));
    add_kernel<<<1, 1, 0, b>>>(y, x);
    cudaCheck(cudaEventDestroy(e));                        // what waits for it still does
    cudaCheck(cudaMemcpyAsync(host, y, sizeof(int), cudaMemcpyDeviceToHost, b));
    int asked = 0;
    while (cudaStreamQuery(b) == cudaErrorNotReady) asked++;   // whoever asks gets there
    cudaGetLastError();
    EXPECT(*host == 11 && (asked > 0 || !late()) && (asked == 0 || !eager()));

    float ms;
    cudaEvent_t from, to;
    cudaCheck(cudaEventCreate(&from));
    cudaCheck(cudaEventCreate(&to));
    cudaCheck(cudaEventRecord(from, b));
    cudaCheck(cudaEventRecord(to, b));
    if (late()) EXPECT(cudaEventElapsedTime(&ms, from, to) == cudaErrorNotReady);
    cudaCheck(cudaEventSynchronize(to));
    cudaCheck(cudaEventElapsedTime(&ms, from, to));
    EXPECT(ms >= 0 && ms < 1e4);
    EXPECT(cudaEventElapsedTime(&ms, from, f) == cudaErrorInvalidResourceHandle);      // which keeps no time
    cudaGetLastError();
    cudaCheck(cudaStreamDestroy(a));
    cudaCheck(cudaStreamDestroy(b));
}

// ---- the null stream ---------------------------------------------------------------------------------------------

static void null_stream() {
    cudaStream_t a = blocking_stream(), b = blocking_stream(), own = stream_of_its_own();
    int *x = device_array<int>(1), *y = device_array<int>(1), host = 0, *seen = pinned<int>(1);
    set_kernel<<<1, 1, 0, a>>>(x, 1);
    set_kernel<<<1, 1>>>(y, 0);                            // after a's, and before b's
    add_kernel<<<1, 1>>>(y, x);
    set_kernel<<<1, 1, 0, b>>>(x, 10);
    add_kernel<<<1, 1>>>(y, x);
    set_kernel<<<1, 1, 0, a>>>(x, 100);
    to_host(&host, y, 1);                                  // waits for all of them
    EXPECT(host == 11);
    to_host(&host, x, 1);
    EXPECT(host == 100);

    set_kernel<<<1, 1, 0, a>>>(x, 2);
    set_kernel<<<1, 1, 0, own>>>(y, 2);
    cudaCheck(cudaMemcpyAsync(seen, x, sizeof(int), cudaMemcpyDeviceToHost, a));
    cudaCheck(cudaStreamSynchronize(0));                   // for a, but not for own
    EXPECT(*seen == 2 && cudaStreamQuery(a) == cudaSuccess);
    if (late()) EXPECT(cudaStreamQuery(own) == cudaErrorNotReady && cudaGetLastError() == cudaErrorNotReady);
    set_kernel<<<1, 1, 0, own>>>(y, 3);
    cudaCheck(cudaMemset(x, 0, sizeof(int)));
    cudaCheck(cudaMemcpyAsync(seen, y, sizeof(int), cudaMemcpyDeviceToHost, own));
    cudaCheck(cudaMemcpy(&host, x, sizeof(int), cudaMemcpyDeviceToHost));
    EXPECT(host == 0 && (*seen == 2 || !late()));
    cudaCheck(cudaStreamDestroy(own));                     // what it has to do it does
    cudaCheck(cudaFree(x));                                // waits for the device
    EXPECT(*seen == 3);
    cudaCheck(cudaStreamDestroy(a));
    cudaCheck(cudaStreamDestroy(b));
}

// ---- copies ------------------------------------------------------------------------------------------------------

static void copies() {
    cudaStream_t s = stream_of_its_own();
    const int N = 4;
    int pageable[N], back[N], *locked = pinned<int>(N), *x = device_array<int>(N), *y = device_array<int>(N), *seen;
    cudaCheck(cudaHostAlloc(&seen, N * sizeof(int), cudaHostAllocDefault));
    auto fill = [&](int* p, int value) { for (int i = 0; i < N; i++) p[i] = value; };
    fill(pageable, 1), fill(locked, 1), fill(back, -1), fill(seen, -1);
    cudaCheck(cudaMemcpyAsync(x, pageable, sizeof pageable, cudaMemcpyHostToDevice, s));
    cudaCheck(cudaMemcpyAsync(y, locked, sizeof pageable, cudaMemcpyHostToDevice, s));
    fill(pageable, 2);                                     // taken at the call
    if (late()) fill(locked, 2);                           // read when it runs: a mistake
    cudaCheck(cudaMemcpyAsync(seen, x, sizeof pageable, cudaMemcpyDeviceToHost, s));
    if (late()) EXPECT(seen[0] == -1);
    cudaCheck(cudaMemcpyAsync(back, y, sizeof pageable, cudaMemcpyDeviceToHost, s));    // pageable: waits
    EXPECT(seen[0] == 1 && seen[N - 1] == 1);
    EXPECT(back[0] == (late() ? 2 : 1));
    cudaCheck(cudaMemsetAsync(x, 0, sizeof pageable, s));
    cudaCheck(cudaMemcpyAsync(y, x, sizeof pageable, cudaMemcpyDeviceToDevice, s));
    cudaCheck(cudaMemcpyAsync(locked, y, sizeof pageable, cudaMemcpyDefault, s));
    if (late()) EXPECT(locked[0] == 2);
    cudaCheck(cudaStreamSynchronize(s));
    EXPECT(locked[0] == 0 && locked[N - 1] == 0);

    // cudaMemcpy returns when pageable memory is staged; a stream of its own has to be told to wait for the rest.
    cudaCheck(cudaMemcpy(x, pageable, sizeof pageable, cudaMemcpyHostToDevice));
    if (late()) {
        cudaCheck(cudaMemcpyAsync(seen, x, sizeof pageable, cudaMemcpyDeviceToHost, s));
        cudaCheck(cudaStreamSynchronize(s));
        EXPECT(seen[0] == 0);
    }
    cudaCheck(cudaMemcpy(y, x, sizeof pageable, cudaMemcpyDeviceToDevice));
    cudaCheck(cudaStreamSynchronize(0));
    cudaCheck(cudaMemcpyAsync(seen, y, sizeof pageable, cudaMemcpyDeviceToHost, s));
    cudaCheck(cudaStreamSynchronize(s));
    EXPECT(seen[0] == 2 && seen[N - 1] == 2);
    fill(locked, 3);
    cudaCheck(cudaMemcpy(x, locked, sizeof pageable, cudaMemcpyHostToDevice));          // pinned: waits
    cudaCheck(cudaMemcpyAsync(seen, x, sizeof pageable, cudaMemcpyDeviceToHost, s));
    fill(locked, 4);
    cudaCheck(cudaStreamSynchronize(s));
    EXPECT(seen[0] == 3);
    cudaCheck(cudaMemcpyAsync(seen, locked, sizeof pageable, cudaMemcpyHostToHost, s));
    EXPECT(seen[0] == 4);
    for (int* p : {locked, seen}) cudaCheck(cudaFreeHost(p));
    cudaCheck(cudaStreamDestroy(s));
}

// ---- what a launch and a matmul keep -----------------------------------------------------------------------------

struct Pair { int first, second; };
template <class T> __global__ void pair_kernel(T* out, Pair pair) { out[blockIdx.x] = (T)(pair.first + pair.second); }

static void arguments() {
    cudaStream_t s = stream_of_its_own();
    int *x = device_array<int>(2), *seen = pinned<int>(2);
    cudaCheck(cudaMemset(x, 0, 2 * sizeof(int)));
    cudaCheck(cudaStreamSynchronize(0));
    {
        Pair pair = {1, 2};
        auto kernel = pair_kernel<int>;
#ifndef __CUDACC__
        simt::run_only_blocks(1, 1);
        kernel<<<2, 1, 0, s>>>(x, pair);
        simt::run_all_blocks();
#else
        kernel<<<1, 1, 0, s>>>(x + 1, pair);
#endif
        pair = {10, 20};
        kernel = nullptr;
    }
    cudaCheck(cudaMemcpyAsync(seen, x, 2 * sizeof(int), cudaMemcpyDeviceToHost, s));
    cudaCheck(cudaStreamSynchronize(s));
    EXPECT(seen[0] == 0 && seen[1] == 3);

    const int N = 8;
    float host[N * N], *a, *d = device_array<float>(N * N), alpha = 2, beta = 0, *result = pinned<float>(N * N);
    for (int i = 0; i < N * N; i++) host[i] = (float)(i % (N + 1) == 0);                // the identity
    a = to_device(host, N * N);
    cudaCheck(cudaStreamSynchronize(0));
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout;
    EXPECT(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    EXPECT(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
    EXPECT(cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, N, N, N) == CUBLAS_STATUS_SUCCESS);
    EXPECT(cublasLtMatmul(handle, desc, &alpha, a, layout, a, layout, &beta, d, layout, d, layout, NULL, NULL, 0, s) == CUBLAS_STATUS_SUCCESS);
    alpha = 3;
    cublasLtMatmulDescDestroy(desc);
    cublasLtMatrixLayoutDestroy(layout);
    cudaCheck(cudaMemcpyAsync(result, d, N * N * sizeof(float), cudaMemcpyDeviceToHost, s));
    if (late()) EXPECT(result[0] != result[0]);
    cudaCheck(cudaStreamSynchronize(s));
    for (int i = 0; i < N * N; i++) EXPECT(result[i] == 2 * host[i]);
    cublasLtDestroy(handle);
}

// ---- mistakes that are reported ----------------------------------------------------------------------------------

__global__ void past_the_end_kernel(int* p, int n) { p[n] = 1; }
__global__ void left_kernel(int value) { printf("what was left: %d\n", value); }

static int reports(const char* name) {
    auto is = [&](const char* other) { return !strcmp(name, other); };
    cudaStream_t a = blocking_stream(), b = blocking_stream();
    int *x = device_array<int>(1), *none = NULL;
    if (is("past_the_end")) past_the_end_kernel<<<1, 1, 0, a>>>(x, 1);
    if (is("null_pointer")) set_kernel<<<1, 1, 0, a>>>(none, 1);                        // at null_pointer
    set_kernel<<<1, 1, 0, b>>>(x, 1);
    cudaCheck(cudaStreamSynchronize(b));
    printf("b is done\n");
    if (is("left")) {                                      // a program that ends without waiting
        left_kernel<<<1, 1, 0, a>>>(1);
        cudaCheck(cudaStreamDestroy(a));
        left_kernel<<<1, 1, 0, b>>>(2);
        return 0;
    }
    if (is("destroyed")) {
        cudaCheck(cudaStreamDestroy(a));
        set_kernel<<<1, 1, 0, a>>>(x, 1);                  // at destroyed
        cudaCheck(cudaGetLastError());
    }
#ifndef __CUDACC__
    if (is("deadlock")) {                                  // which takes a record that no stream will come to
        cudaEvent_t e = event(), f = event();
        e->record = std::make_shared<simt::Operation>();
        e->record->what = "a record", e->record->site = {"nowhere", 7};
        cudaCheck(cudaStreamWaitEvent(a, e));              // at deadlock
        cudaCheck(cudaEventRecord(f, a));
        cudaCheck(cudaStreamWaitEvent(b, f));              // at second
        set_kernel<<<1, 1, 0, b>>>(x, 1);
        cudaCheck(cudaStreamSynchronize(b));
    }
#endif
    cudaCheck(cudaDeviceSynchronize());
    printf("nothing reported\n");
    return 0;
}

int main(int argc, char** argv) {
    if (argc > 1 && !strcmp(argv[1], "offload")) offload(argc > 2 ? argv[2] : "");
    else if (argc > 1) return reports(argv[1]);
    else {
        events();
        null_stream();
        copies();
        arguments();
        return finish();
    }
    return 0;
}
