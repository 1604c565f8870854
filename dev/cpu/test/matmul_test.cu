// cublasLtMatmul against a plain product: transposes, types, epilogues, alpha and beta, batches; and what it refuses.
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <vector>

#include "expect.h"

typedef __nv_bfloat16 bf16;

// A matrix (or a vector) on both sides; values are such that its type holds them exactly.
struct Values {
    bool is_bf16;
    std::vector<float> host;
    void* device;
    Values(bool is_bf16, size_t n) : is_bf16(is_bf16), host(n) {
        std::vector<bf16> narrow(n);
        for (size_t i = 0; i < n; i++) host[i] = (float)(narrow[i] = uniform());
        device = is_bf16 ? (void*)to_device(narrow.data(), n) : (void*)to_device(host.data(), n);
    }
    ~Values() { cudaCheck(cudaFree(device)); }
    Values(const Values&) = delete;
    cudaDataType_t type() const { return is_bf16 ? CUDA_R_16BF : CUDA_R_32F; }
    std::vector<float> result() const {            // what is on the device now
        std::vector<float> out(host.size());
        std::vector<bf16> narrow(host.size());
        if (!is_bf16) to_host(out.data(), (float*)device, out.size());
        else to_host(narrow.data(), (bf16*)device, out.size());
        for (size_t i = 0; i < out.size() && is_bf16; i++) out[i] = (float)narrow[i];
        return out;
    }
};

struct Problem {
    int m, n, k;
    bool ta, tb, in_bf16, out_bf16;
    float alpha, beta;
    uint32_t epilogue;
    bool own_c;                                    // C is a matrix of its own, not D
};

static cublasLtHandle_t handle;
static uint32_t digest;                            // of all results, to compare them between runs

template <class T> static void set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, T value) { EXPECT(cublasLtMatmulDescSetAttribute(d, a, &value, sizeof value) == CUBLAS_STATUS_SUCCESS); }

// Descriptors of a problem, made and destroyed together.
struct Plan {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    static cublasLtMatrixLayout_t layout(cudaDataType_t type, int rows, int cols, int ld) {
        cublasLtMatrixLayout_t l;
        EXPECT(cublasLtMatrixLayoutCreate(&l, type, rows, cols, ld) == CUBLAS_STATUS_SUCCESS);
        return l;
    }
    Plan(const Problem& p, int lda, int ldb, int ldd) {
        EXPECT(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
        set(desc, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(p.ta ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(desc, CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(p.tb ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
        cudaDataType_t in = p.in_bf16 ? CUDA_R_16BF : CUDA_R_32F, out = p.out_bf16 ? CUDA_R_16BF : CUDA_R_32F;
        a = layout(in, p.ta ? p.k : p.m, p.ta ? p.m : p.k, lda);
        b = layout(in, p.tb ? p.n : p.k, p.tb ? p.k : p.n, ldb);
        d = layout(out, p.m, p.n, ldd);
    }
    ~Plan() {
        cublasLtMatmulDescDestroy(desc);
        cublasLtMatrixLayoutDestroy(a);
        cublasLtMatrixLayoutDestroy(b);
        cublasLtMatrixLayoutDestroy(d);
    }
    Plan(const Plan&) = delete;
    cublasStatus_t heuristic(cublasLtMatmulAlgo_t* algo, uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, uint64_t workspace = 0) {
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulHeuristicResult_t result = {};
        int found = 0;
        EXPECT(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
        if (schemes != CUBLASLT_REDUCTION_SCHEME_MASK)   // the default
            EXPECT(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes) == CUBLAS_STATUS_SUCCESS);
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, d, d, preference, 1, &result, &found);
        EXPECT((status == CUBLAS_STATUS_SUCCESS) == (found == 1));
        cublasLtMatmulPreferenceDestroy(preference);
        *algo = result.algo;
        return status;
    }
};

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
static double gelu_slope(double x) { return (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6; }
static bool close_to(float got, double expected, double size, bool is_bf16) { return fabs(got - expected) <= 2e-6 * size + (is_bf16 ? fabs(expected) / 250 : 2e-6); }

static void check(const Problem& p) {
    auto up = [](int n) { return (n + 7) & ~7; };
    int lda = up(p.ta ? p.k : p.m), ldb = up(p.tb ? p.n : p.k), ldd = up(p.m) + 8;       // D is wider than it has to be
    size_t sd = (size_t)ldd * p.n;
    Values a(p.in_bf16, (size_t)lda * (p.ta ? p.m : p.k)), b(p.in_bf16, (size_t)ldb * (p.tb ? p.k : p.n));
    Values c(p.out_bf16, sd), d(p.out_bf16, sd), aux(p.out_bf16, sd), bias(p.out_bf16, p.m);
    Plan plan(p, lda, ldb, ldd);
    set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.device);
    set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)bias.type());
    set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.device);
    set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)ldd);
    cublasLtMatmulAlgo_t algo;
    EXPECT(plan.heuristic(&algo) == CUBLAS_STATUS_SUCCESS);
    cublasStatus_t status = cublasLtMatmul(handle, plan.desc, &p.alpha, a.device, plan.a, b.device, plan.b, &p.beta,
                                           p.own_c ? c.device : d.device, plan.d, d.device, plan.d, &algo, NULL, 0, 0);
    EXPECT(status == CUBLAS_STATUS_SUCCESS);
    const std::vector<float> got = d.result(), got_aux = aux.result();
    int before = failures;
    bool keeps = p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    for (int j = 0; j < p.n; j++)
        for (int i = 0; i < ldd; i++) {
            size_t at = (size_t)j * ldd + i;
            uint32_t bits;
            memcpy(&bits, &got[at], 4);
            digest = digest * 31 + bits;
            if (i >= p.m) {                                        // what lies between columns is not touched
                EXPECT(got[at] == d.host[at]);
                continue;
            }
            double v = 0, size = 1;
            for (int k = 0; k < p.k; k++) {
                double x = a.host[p.ta ? (size_t)i * lda + k : (size_t)k * lda + i];
                double y = b.host[p.tb ? (size_t)k * ldb + j : (size_t)j * ldb + k];
                v += x * y;
                size += fabs(x * y);
            }
            v = p.alpha * v + p.beta * (p.own_c ? c : d).host[at];
            if (p.epilogue & CUBLASLT_EPILOGUE_BIAS) v += bias.host[i];
            EXPECT(keeps ? close_to(got_aux[at], v, size, p.out_bf16) : got_aux[at] == aux.host[at]);
            if (keeps) v = gelu(v);
            if (p.epilogue == CUBLASLT_EPILOGUE_DGELU) v *= gelu_slope(aux.host[at]);
            EXPECT(close_to(got[at], v, size, p.out_bf16));
        }
    if (failures > before)
        printf("  m %d n %d k %d, %c%c, %s to %s, alpha %g beta %g, epilogue %u\n", p.m, p.n, p.k, "NT"[p.ta], "NT"[p.tb],
               p.in_bf16 ? "bf16" : "fp32", p.out_bf16 ? "bf16" : "fp32", p.alpha, p.beta, p.epilogue);
}

#ifndef __CUDACC__
// Mistakes that the real library answers with a status, or worse.
static void refusals() {
    Problem p = {64, 64, 64, false, false, true, true, 1, 0, CUBLASLT_EPILOGUE_DEFAULT, false};
    Values a(true, 4096 + 8), b(true, 4096), d(true, 4096);
    float one = 1, zero = 0;
    auto run = [&](Plan& plan, const void* a_pointer, const cublasLtMatmulAlgo_t* algo) {
        return cublasLtMatmul(handle, plan.desc, &one, a_pointer, plan.a, b.device, plan.b, &zero, d.device, plan.d, d.device, plan.d, algo, NULL, 0, 0);
    };
    Plan good(p, 64, 64, 64);
    cublasLtMatmulAlgo_t algo, other;
    EXPECT(good.heuristic(&algo) == CUBLAS_STATUS_SUCCESS);
    EXPECT(run(good, a.device, &algo) == CUBLAS_STATUS_SUCCESS && run(good, a.device, NULL) == CUBLAS_STATUS_SUCCESS);
    EXPECT(run(good, (char*)a.device + 2, &algo) == CUBLAS_STATUS_NOT_SUPPORTED);            // alignment
    EXPECT(run(good, NULL, &algo) == CUBLAS_STATUS_INVALID_VALUE);
    EXPECT(run(good, a.host.data(), &algo) == CUBLAS_STATUS_EXECUTION_FAILED || (uintptr_t)a.host.data() % 16);   // host memory
    EXPECT(run(good, (char*)a.device + 32, &algo) == CUBLAS_STATUS_EXECUTION_FAILED);        // runs past the allocation
    EXPECT(Plan(p, 68, 64, 64).heuristic(&other) == CUBLAS_STATUS_NOT_SUPPORTED);            // a leading dimension that is odd, or short
    EXPECT(Plan(p, 56, 64, 64).heuristic(&other) == CUBLAS_STATUS_INVALID_VALUE);
    p.ta = true;
    Plan turned(p, 64, 64, 64);
    EXPECT(run(turned, a.device, &algo) == CUBLAS_STATUS_INVALID_VALUE);                     // an algorithm for another problem
    p.ta = false;
    cublasLtMatrixLayout_t wrong = Plan::layout(CUDA_R_16BF, 32, 64, 32);
    EXPECT(cublasLtMatmul(handle, good.desc, &one, a.device, good.a, b.device, wrong, &zero, d.device, good.d, d.device, good.d, NULL, NULL, 0, 0) == CUBLAS_STATUS_INVALID_VALUE);
    cublasLtMatrixLayoutDestroy(wrong);
    p.epilogue = CUBLASLT_EPILOGUE_DGELU;
    EXPECT(Plan(p, 64, 64, 64).heuristic(&other) == CUBLAS_STATUS_INVALID_VALUE);            // no leading dimension of aux
    p.epilogue = CUBLASLT_EPILOGUE_BIAS;
    Plan no_bias(p, 64, 64, 64);
    EXPECT(no_bias.heuristic(&other) == CUBLAS_STATUS_SUCCESS && run(no_bias, a.device, &other) == CUBLAS_STATUS_INVALID_VALUE);
    for (uint32_t scheme : {CUBLASLT_REDUCTION_SCHEME_INPLACE, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE, CUBLASLT_REDUCTION_SCHEME_MASK})
        EXPECT(good.heuristic(&other, scheme) == CUBLAS_STATUS_NOT_SUPPORTED);               // partial sums in bf16
    p.epilogue = CUBLASLT_EPILOGUE_DEFAULT, p.out_bf16 = false;
    EXPECT(Plan(p, 64, 64, 64).heuristic(&other, CUBLASLT_REDUCTION_SCHEME_MASK) == CUBLAS_STATUS_SUCCESS);   // and in fp32
    EXPECT(good.heuristic(&other, CUBLASLT_REDUCTION_SCHEME_NONE, 4096) == CUBLAS_STATUS_SUCCESS);
    EXPECT(run(good, a.device, &other) == CUBLAS_STATUS_INVALID_VALUE);                      // less workspace than the heuristic was told
    uint16_t half = 1;
    EXPECT(cublasLtMatmulDescSetAttribute(good.desc, CUBLASLT_MATMUL_DESC_TRANSA, &half, sizeof half) == CUBLAS_STATUS_INVALID_VALUE);
}
#endif

int main() {
    EXPECT(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    for (int types = 0; types < 3; types++) {                      // bf16 to bf16, bf16 to fp32, fp32 to fp32
        bool in = types < 2, out = types < 1;
        for (int ta = 0; ta < 2; ta++)
            for (int tb = 0; tb < 2; tb++) {
                check({40, 24, 56, ta > 0, tb > 0, in, out, 1, 0, CUBLASLT_EPILOGUE_DEFAULT, false});
                check({37, 19, 31, ta > 0, tb > 0, in, out, 0.5f, 1, CUBLASLT_EPILOGUE_DEFAULT, false});
                check({300, 130, 90, ta > 0, tb > 0, in, out, 1, 0.25f, CUBLASLT_EPILOGUE_DEFAULT, true});
            }
        for (uint32_t epilogue : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU}) {
            check({64, 300, 32, true, false, in, out, 1, 0, epilogue, false});
            check({280, 33, 16, true, false, in, out, 0.7f, 0.5f, epilogue, true});
        }
    }
#ifndef __CUDACC__
    refusals();
#endif
    EXPECT(cublasLtDestroy(handle) == CUBLAS_STATUS_SUCCESS);
    printf("digest %08x\n", digest);
    return finish();
}
