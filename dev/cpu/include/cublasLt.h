// The part of cuBLASLt that the trainers use: one matmul with epilogues, and what describes it.
//
// The real library refuses what its kernels cannot do (odd alignments, shapes that disagree), and so does
// this, with the same status and, since a status says little, a line on stderr with the reason.
#pragma once
#include "cuda_runtime.h"
#include "simt/matmul.h"

#define SIMT_STATUSES(S)                                      \
    S(CUBLAS_STATUS_SUCCESS, 0)                               \
    S(CUBLAS_STATUS_INVALID_VALUE, 7)                         \
    S(CUBLAS_STATUS_EXECUTION_FAILED, 13)                     \
    S(CUBLAS_STATUS_NOT_SUPPORTED, 15)
#define SIMT_ENUM(name, value) name = value,
typedef enum { SIMT_STATUSES(SIMT_ENUM) } cublasStatus_t;
#undef SIMT_ENUM
#define SIMT_NAME(name, value) case name: return #name;
inline const char* cublasGetStatusName(cublasStatus_t s) { switch (s) { SIMT_STATUSES(SIMT_NAME) } return "unknown cuBLAS status"; }
#undef SIMT_NAME

typedef enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 } cublasComputeType_t;      // both are fp32 here

typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164, CUBLASLT_EPILOGUE_DGELU = 192,
} cublasLtEpilogue_t;
typedef enum {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26,
} cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
} cublasLtMatmulPreferenceAttributes_t;
typedef enum {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_INPLACE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7,
} cublasLtReductionScheme_t;

typedef struct cublasLtContext { int unused; }* cublasLtHandle_t;
typedef struct cublasLtMatmulDescOpaque_t {
    int32_t compute_type, scale_type, transpose_a, transpose_b;
    uint32_t epilogue;
    void *bias, *aux;
    int32_t bias_type;             // -1: that of D, which is aux's type always
    int64_t aux_ld;
}* cublasLtMatmulDesc_t;
typedef struct cublasLtMatrixLayoutOpaque_t { uint32_t type; uint64_t rows, cols; int64_t ld; }* cublasLtMatrixLayout_t;
typedef struct cublasLtMatmulPreferenceOpaque_t { uint64_t max_workspace; uint32_t reduction_mask; }* cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;      // here: the problem it was found for, and its workspace
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;          // here: all that was allowed
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

// ---- descriptors -----------------------------------------------------------------------------------

namespace simt {
template <class T> cublasStatus_t create(T** p, const T& value) { *p = new T(value); return CUBLAS_STATUS_SUCCESS; }
template <class T> cublasStatus_t destroy(T* p) { delete p; return CUBLAS_STATUS_SUCCESS; }
template <class T> cublasStatus_t set_attribute(T* field, const void* value, size_t bytes) {
    if (bytes != sizeof(T)) {
        fprintf(stderr, "simt: a cublasLt attribute of %zu bytes was set with %zu\n", sizeof(T), bytes);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    memcpy(field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t refuse(cublasStatus_t status, const std::string& why) {
    fprintf(stderr, "simt: cublasLt refuses this matmul: %s (%s)\n", why.c_str(), cublasGetStatusName(status));
    return status;
}
}  // namespace simt

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    simt::openblas();             // what it takes is gone before a program asks how much there is
    return simt::create(handle, {});
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t scale) {
    return simt::create(d, {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, -1, 0});
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    return simt::create(l, {type, rows, cols, ld});
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    return simt::create(p, {0, CUBLASLT_REDUCTION_SCHEME_MASK});
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return simt::destroy(handle); }
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return simt::destroy(d); }
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return simt::destroy(l); }
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return simt::destroy(p); }

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return simt::set_attribute(&d->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return simt::set_attribute(&d->transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return simt::set_attribute(&d->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return simt::set_attribute(&d->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return simt::set_attribute(&d->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return simt::set_attribute(&d->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return simt::set_attribute(&d->aux_ld, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t bytes) {
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return simt::set_attribute(&p->max_workspace, value, bytes);
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return simt::set_attribute(&p->reduction_mask, value, bytes);
    return CUBLAS_STATUS_SUCCESS;          // there is one algorithm: the others choose nothing
}

// ---- the problem, checked --------------------------------------------------------------------------

namespace simt {

struct LtProblem { cublasLtMatmulDesc_t desc; cublasLtMatrixLayout_t a, b, c, d; };

// What makes an algorithm good for one problem and not for another; addresses are no part of it.
inline uint64_t identify(const LtProblem& p) {
    uint64_t h = 1;
    auto add = [&](uint64_t v) { h = mix(h ^ v); };
    add(p.desc->compute_type), add(p.desc->transpose_a), add(p.desc->transpose_b), add(p.desc->epilogue), add(p.desc->bias_type);
    for (auto* l : {p.a, p.b, p.c, p.d}) add(l->type), add(l->rows), add(l->cols), add(l->ld);
    return h;
}

// Everything that can be said without the matrices' addresses.
inline cublasStatus_t check(const LtProblem& p, Matmul* out) {
    const auto& desc = *p.desc;
    auto invalid = [](const std::string& why) { return refuse(CUBLAS_STATUS_INVALID_VALUE, why); };
    auto unsupported = [](const std::string& why) { return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why); };
    auto number = [](int64_t n) { return std::to_string(n); };
    auto size = [&](int64_t rows, int64_t cols) { return number(rows) + " x " + number(cols); };
    auto known = [](int64_t type) { return type == CUDA_R_32F || type == CUDA_R_16BF; };
    if (desc.scale_type != CUDA_R_32F) return unsupported("the CPU backend has fp32 scales alone");
    Matmul& q = *out;
    q.transpose_a = desc.transpose_a != CUBLAS_OP_N, q.transpose_b = desc.transpose_b != CUBLAS_OP_N;
    q.m = q.transpose_a ? p.a->cols : p.a->rows;
    q.k = q.transpose_a ? p.a->rows : p.a->cols;
    q.n = q.transpose_b ? p.b->rows : p.b->cols;
    int64_t k_of_b = q.transpose_b ? p.b->cols : p.b->rows;
    if (q.k != k_of_b) return invalid("op(A) is " + size(q.m, q.k) + ", op(B) is " + size(k_of_b, q.n));
    if (q.m == 0 || q.n == 0 || q.k == 0) return invalid("a side is 0: m, n, k are " + size(q.m, q.n) + " x " + number(q.k));
    struct { cublasLtMatrixLayout_t layout; Matrix* matrix; char name; } operands[] = {
        {p.a, &q.a, 'A'}, {p.b, &q.b, 'B'}, {p.c, &q.c, 'C'}, {p.d, &q.d, 'D'}};
    for (auto& o : operands) {
        const auto& l = *o.layout;
        std::string name(1, o.name), sizes = size(l.rows, l.cols);
        if (!known(l.type)) return unsupported(name + " is neither fp32 nor bf16");
        if (l.ld < (int64_t)l.rows) return invalid(name + " is " + sizes + " with a leading dimension of " + number(l.ld));
        if (l.type == CUDA_R_16BF && l.ld % 8)
            return unsupported(name + "'s leading dimension, " + number(l.ld) + ", is no multiple of 8 (16 bytes)");
        if (o.name >= 'C' && ((int64_t)l.rows != q.m || (int64_t)l.cols != q.n))
            return invalid(name + " is " + sizes + ", not " + size(q.m, q.n));
        *o.matrix = {nullptr, l.type == CUDA_R_16BF, (int64_t)l.rows, (int64_t)l.cols, l.ld};
    }
    if (p.a->type != p.b->type) return unsupported("A and B are of different types");
    if (p.c->type != p.d->type) return unsupported("C and D are of different types");
    if (!q.a.bf16 && q.d.bf16) return unsupported("fp32 inputs with a bf16 output");

    switch (desc.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT: break;
    case CUBLASLT_EPILOGUE_BIAS: q.add_bias = true; break;
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS: q.add_bias = q.gelu = true; break;
    case CUBLASLT_EPILOGUE_DGELU: q.dgelu = true; break;
    default: return unsupported("epilogue " + number(desc.epilogue) + " is not one the CPU backend has");
    }
    if (desc.bias_type >= 0 && !known(desc.bias_type)) return unsupported("a bias that is neither fp32 nor bf16");
    q.bias = {desc.bias, desc.bias_type < 0 ? q.d.bf16 : desc.bias_type == CUDA_R_16BF, q.m, 1, q.m};
    q.aux = {desc.aux, q.d.bf16, q.m, q.n, desc.aux_ld};
    if ((q.gelu || q.dgelu) && (desc.aux_ld % 8 || desc.aux_ld < q.m))
        return invalid("the auxiliary matrix's leading dimension, " + number(desc.aux_ld) + ", must be a multiple of 8, and " +
                       number(q.m) + " or more");
    return CUBLAS_STATUS_SUCCESS;
}

// One matrix's address: aligned, and all of the matrix within one allocation.
inline cublasStatus_t check_pointer(const Matrix& x, const char* name, Site site) {
    if (!x.data) return refuse(CUBLAS_STATUS_INVALID_VALUE, std::string(name) + " is NULL");
    if ((uintptr_t)x.data % 16) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, std::string(name) + "'s address is no multiple of 16");
    size_t elements = (x.cols - 1) * x.ld + x.rows;
    bool good = range_is_good(x.data, elements * x.element(), true, "cublasLtMatmul", name, site);
    return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace simt

// ---- the two calls ---------------------------------------------------------------------------------

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t results[], int* found) {
    *found = 0;
    simt::Matmul q;
    simt::LtProblem p = {desc, a, b, c, d};
    cublasStatus_t status = simt::check(p, &q);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    // The real library would take it, and might split the sum and round its parts to bf16: nothing here could see that.
    if (q.d.bf16 && (preference->reduction_mask & (CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE)))
        return simt::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "its reduction schemes let partial sums be rounded to bf16");
    if (!simt::options.gelu && (q.gelu || q.dgelu))
        return simt::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a GELU in the epilogue, with SIMT_GELU=0");
    results[0] = {};
    results[0].algo.data[0] = simt::identify(p);
    results[0].algo.data[1] = results[0].workspaceSize = preference->max_workspace;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                                     const void* A, cublasLtMatrixLayout_t a, const void* B, cublasLtMatrixLayout_t b,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t c,
                                     void* D, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo,
                                     void* workspace, size_t bytes, cudaStream_t stream, SIMT_SITE) {
    simt::Matmul q;
    simt::LtProblem p = {desc, a, b, c, d};
    cublasStatus_t status = simt::check(p, &q);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (algo && algo->data[0] != simt::identify(p))          // none: the real library asks the heuristic itself
        return simt::refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was found by the heuristic for another problem");
    if (algo && algo->data[1] > bytes)
        return simt::refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was found for " + std::to_string(algo->data[1]) +
                            " bytes of workspace, and there are " + std::to_string(bytes));
    if (bytes > 0 && !simt::range_is_good(workspace, bytes, true, "cublasLtMatmul", "workspace", {file, line}))
        return CUBLAS_STATUS_INVALID_VALUE;
    q.alpha = *(const float*)alpha, q.beta = *(const float*)beta;
    q.a.data = (void*)A, q.b.data = (void*)B, q.c.data = (void*)C, q.d.data = D;
    struct { const simt::Matrix& matrix; bool used; const char* name; } operands[] = {
        {q.a, true, "A"}, {q.b, true, "B"}, {q.c, q.beta != 0, "C"}, {q.d, true, "D"},
        {q.bias, q.add_bias, "bias"}, {q.aux, q.gelu || q.dgelu, "auxiliary matrix"}};
    for (auto& o : operands)
        if (o.used && (status = simt::check_pointer(o.matrix, o.name, {file, line}))) return status;
    bool good = simt::submit(stream, "cublasLtMatmul", {file, line}, [q] { simt::matmul(q); }) == cudaSuccess;
    return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
