// The part of cuBLASLt that the trainers use: one matmul with epilogues, and what describes it.
//
// The real library refuses what its kernels cannot do (odd alignments, shapes that disagree), and so does
// this, with the same status and, since a status says little, a line on stderr with the reason.
#pragma once
#include "cublas_v2.h"
#include "simt/matmul.h"

typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_RELU = 2,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_RELU_BIAS = 6,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_GELU_AUX = 160,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_DGELU_BGRAD = 208,
    CUBLASLT_EPILOGUE_BGRADA = 256,
    CUBLASLT_EPILOGUE_BGRADB = 512,
} cublasLtEpilogue_t;
typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE = 10,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE = 13,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26,
} cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0,
    CUBLASLT_MATRIX_LAYOUT_ORDER = 1,
    CUBLASLT_MATRIX_LAYOUT_ROWS = 2,
    CUBLASLT_MATRIX_LAYOUT_COLS = 3,
    CUBLASLT_MATRIX_LAYOUT_LD = 4,
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6,
} cublasLtMatrixLayoutAttribute_t;
typedef enum { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 } cublasLtOrder_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
} cublasLtMatmulPreferenceAttributes_t;
typedef enum {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4,
    CUBLASLT_REDUCTION_SCHEME_MASK = 7,
} cublasLtReductionScheme_t;

struct cublasLtContext { int unused; };
struct cublasLtMatmulDescOpaque_t {
    int32_t compute_type, scale_type;
    int32_t pointer_mode = 0, transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void* bias = nullptr;
    int32_t bias_type = -1;        // -1: that of D
    int64_t bias_batch_stride = 0;
    void* aux = nullptr;
    int32_t aux_type = -1;         // -1: that of D
    int64_t aux_ld = 0, aux_batch_stride = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
    uint32_t type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t order = CUBLASLT_ORDER_COL;
    int32_t batch_count = 1;
    int64_t batch_offset = 0;      // elements
};
struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t max_workspace = 0;
    uint32_t reduction_mask = CUBLASLT_REDUCTION_SCHEME_MASK;
};
typedef cublasLtContext* cublasLtHandle_t;
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;      // here: data[0] identifies the problem it was found for
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;          // here: all that was allowed
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    simt::openblas();             // what it takes is gone before a program asks how much there is
    *handle = new cublasLtContext{};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }

// ---- descriptors -----------------------------------------------------------------------------------

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t scale) {
    *d = new cublasLtMatmulDescOpaque_t{compute, scale};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    *l = new cublasLtMatrixLayoutOpaque_t{(uint32_t)type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = new cublasLtMatmulPreferenceOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }

namespace simt {
inline uint64_t heuristic_calls = 0;       // for tests: a trainer asks once per shape, not once per matmul

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

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return simt::set_attribute(&d->compute_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return simt::set_attribute(&d->scale_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return simt::set_attribute(&d->pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA: return simt::set_attribute(&d->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return simt::set_attribute(&d->transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return simt::set_attribute(&d->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return simt::set_attribute(&d->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: return simt::set_attribute(&d->bias_batch_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return simt::set_attribute(&d->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return simt::set_attribute(&d->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return simt::set_attribute(&d->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE: return simt::set_attribute(&d->aux_batch_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: return simt::set_attribute(&d->aux_type, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void* value, size_t bytes) {
    switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: return simt::set_attribute(&l->type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return simt::set_attribute(&l->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return simt::set_attribute(&l->rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return simt::set_attribute(&l->cols, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD: return simt::set_attribute(&l->ld, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return simt::set_attribute(&l->batch_count, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return simt::set_attribute(&l->batch_offset, value, bytes);
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

struct LtProblem {
    const cublasLtMatmulDescOpaque_t& desc;
    const cublasLtMatrixLayoutOpaque_t &a, &b, &c, &d;
};

// What makes an algorithm good for one problem and not for another; addresses are no part of it.
inline uint64_t identify(const LtProblem& p) {
    uint64_t h = 1;
    auto add = [&](uint64_t v) { h = mix(h ^ v); };
    add(p.desc.compute_type), add(p.desc.transpose_a), add(p.desc.transpose_b), add(p.desc.epilogue);
    add(p.desc.bias_type), add(p.desc.aux_type);
    for (auto* l : {&p.a, &p.b, &p.c, &p.d}) {
        add(l->type), add(l->rows), add(l->cols), add(l->ld);
        add(l->batch_count), add(l->batch_offset);
    }
    return h;
}

// Everything that can be said without the matrices' addresses.
inline cublasStatus_t check(const LtProblem& p, Matmul* out) {
    const auto& desc = p.desc;
    auto invalid = [](const std::string& why) { return refuse(CUBLAS_STATUS_INVALID_VALUE, why); };
    auto unsupported = [](const std::string& why) { return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why); };
    auto number = [](int64_t n) { return std::to_string(n); };
    auto size = [&](int64_t rows, int64_t cols) { return number(rows) + " x " + number(cols); };
    bool fp32 = desc.compute_type == CUBLAS_COMPUTE_32F || desc.compute_type == CUBLAS_COMPUTE_32F_PEDANTIC ||
                desc.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32 || desc.compute_type == CUBLAS_COMPUTE_32F_FAST_16BF;
    if (!fp32 || desc.scale_type != CUDA_R_32F) return unsupported("the CPU backend computes in fp32, with fp32 scales");
    Matmul& q = *out;
    q.transpose_a = desc.transpose_a != CUBLAS_OP_N, q.transpose_b = desc.transpose_b != CUBLAS_OP_N;
    q.m = q.transpose_a ? p.a.cols : p.a.rows;
    q.k = q.transpose_a ? p.a.rows : p.a.cols;
    q.n = q.transpose_b ? p.b.rows : p.b.cols;
    q.batch = p.d.batch_count;
    int64_t k_of_b = q.transpose_b ? p.b.cols : p.b.rows;
    if (q.k != k_of_b) return invalid("op(A) is " + size(q.m, q.k) + ", op(B) is " + size(k_of_b, q.n));
    if (q.m == 0 || q.n == 0 || q.k == 0) return invalid("a side is 0: m, n, k are " + size(q.m, q.n) + " x " + number(q.k));
    const char* names = "ABCD";
    const cublasLtMatrixLayoutOpaque_t* layouts[4] = {&p.a, &p.b, &p.c, &p.d};
    Matrix* matrices[4] = {&q.a, &q.b, &q.c, &q.d};
    for (int i = 0; i < 4; i++) {
        const auto& l = *layouts[i];
        std::string name(1, names[i]);
        if (l.type != CUDA_R_32F && l.type != CUDA_R_16BF) return unsupported(name + " is neither fp32 nor bf16");
        if (l.order != CUBLASLT_ORDER_COL) return unsupported(name + " is not column-major");
        if (l.ld < (int64_t)l.rows) return invalid(name + " is " + size(l.rows, l.cols) + " with a leading dimension of " + number(l.ld));
        if (l.type == CUDA_R_16BF && l.ld % 8)
            return unsupported(name + "'s leading dimension, " + number(l.ld) + ", is no multiple of 8 (16 bytes)");
        if (l.batch_count != p.d.batch_count)
            return invalid(name + " has a batch of " + number(l.batch_count) + ", D one of " + number(p.d.batch_count));
        if (i >= 2 && ((int64_t)l.rows != q.m || (int64_t)l.cols != q.n))
            return invalid(name + " is " + size(l.rows, l.cols) + ", not " + size(q.m, q.n));
        int64_t stride = l.batch_count > 1 ? l.batch_offset : 0;
        *matrices[i] = {nullptr, l.type == CUDA_R_16BF, (int64_t)l.rows, (int64_t)l.cols, l.ld, stride};
    }
    if (p.a.type != p.b.type) return unsupported("A and B are of different types");
    if (p.c.type != p.d.type) return unsupported("C and D are of different types");
    if (!q.a.bf16 && q.d.bf16) return unsupported("fp32 inputs with a bf16 output");

    switch (desc.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT: break;
    case CUBLASLT_EPILOGUE_BIAS: q.add_bias = true; break;
    case CUBLASLT_EPILOGUE_GELU: q.gelu = true; break;
    case CUBLASLT_EPILOGUE_GELU_BIAS: q.add_bias = q.gelu = true; break;
    case CUBLASLT_EPILOGUE_GELU_AUX: q.store_aux = q.gelu = true; break;
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS: q.add_bias = q.store_aux = q.gelu = true; break;
    case CUBLASLT_EPILOGUE_DGELU: q.dgelu = true; break;
    case CUBLASLT_EPILOGUE_DGELU_BGRAD: q.dgelu = q.sum_rows = true; break;
    case CUBLASLT_EPILOGUE_BGRADA: q.sum_a = true; break;
    case CUBLASLT_EPILOGUE_BGRADB: q.sum_b = true; break;
    default: return unsupported("epilogue " + number(desc.epilogue) + " is not one the CPU backend has");
    }
    if ((q.sum_rows || q.sum_a || q.sum_b) && q.batch > 1) return unsupported("a bias gradient of a batch");
    auto type_of = [&](int32_t type, bool* bf16) {
        *bf16 = type < 0 ? q.d.bf16 : type == CUDA_R_16BF;
        return type < 0 || type == CUDA_R_16BF || type == CUDA_R_32F;
    };
    q.bias = {desc.bias, false, q.m, 1, q.m, desc.bias_batch_stride};
    if (q.sum_b) q.bias.rows = q.bias.ld = q.n;
    if (!type_of(desc.bias_type, &q.bias.bf16)) return unsupported("a bias that is neither fp32 nor bf16");
    q.aux = {desc.aux, false, q.m, q.n, desc.aux_ld, desc.aux_batch_stride};
    if (!type_of(desc.aux_type, &q.aux.bf16)) return unsupported("an auxiliary matrix that is neither fp32 nor bf16");
    if ((q.store_aux || q.dgelu) && (desc.aux_ld % 8 || desc.aux_ld < q.m))
        return invalid("the auxiliary matrix's leading dimension, " + number(desc.aux_ld) + ", must be a multiple of 8, and " +
                       number(q.m) + " or more");
    return CUBLAS_STATUS_SUCCESS;
}

// One matrix's address: aligned, and all of the matrix within one allocation.
inline cublasStatus_t check_pointer(const Matrix& x, int64_t batch, const std::string& name, Site site) {
    if (!x.data) return refuse(CUBLAS_STATUS_INVALID_VALUE, name + " is NULL");
    if ((uintptr_t)x.data % 16) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, name + "'s address is no multiple of 16");
    if (x.bf16 && x.batch_stride % 8)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, name + "'s batch stride is no multiple of 8 (16 bytes)");
    size_t elements = (batch - 1) * x.batch_stride + (x.cols - 1) * x.ld + x.rows;
    bool good = range_is_good(x.data, elements * x.element(), true, "cublasLtMatmul", name.c_str(), site);
    return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace simt

// ---- the two calls ---------------------------------------------------------------------------------

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t results[], int* found) {
    simt::heuristic_calls++;
    *found = 0;
    simt::Matmul unused;
    simt::LtProblem p = {*desc, *a, *b, *c, *d};
    cublasStatus_t status = simt::check(p, &unused);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    // The real library would take it, and might split the sum and round its parts to bf16: nothing here could see that.
    if (d->type == CUDA_R_16BF &&
        (preference->reduction_mask & (CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE)))
        return simt::refuse(CUBLAS_STATUS_NOT_SUPPORTED, "its reduction schemes let partial sums be rounded to bf16");
    if (!simt::options.gelu && (unused.gelu || unused.dgelu))
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
                                     void* workspace, size_t bytes, cudaStream_t /*stream*/, SIMT_SITE) {
    simt::Matmul q;
    simt::LtProblem p = {*desc, *a, *b, *c, *d};
    cublasStatus_t status = simt::check(p, &q);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (!algo) simt::heuristic_calls++;            // the real library then asks for itself, at every call
    else if (algo->data[0] != simt::identify(p))
        return simt::refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was found by the heuristic for another problem");
    else if (algo->data[1] > bytes)
        return simt::refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was found for " + std::to_string(algo->data[1]) +
                            " bytes of workspace, and there are " + std::to_string(bytes));
    if (bytes > 0 && !simt::range_is_good(workspace, bytes, true, "cublasLtMatmul", "workspace", {file, line}))
        return CUBLAS_STATUS_INVALID_VALUE;
    q.alpha = *(const float*)alpha, q.beta = *(const float*)beta;
    q.a.data = (void*)A, q.b.data = (void*)B, q.c.data = (void*)C, q.d.data = D;
    bool uses_bias = q.add_bias || q.sum_rows || q.sum_a || q.sum_b, uses_aux = q.store_aux || q.dgelu;
    struct { const simt::Matrix& matrix; bool used; const char* name; } operands[] = {
        {q.a, true, "A"}, {q.b, true, "B"}, {q.c, q.beta != 0, "C"}, {q.d, true, "D"},
        {q.bias, uses_bias, "bias"}, {q.aux, uses_aux, "auxiliary matrix"}};
    for (auto& o : operands)
        if (o.used && (status = simt::check_pointer(o.matrix, q.batch, o.name, {file, line}))) return status;
    simt::matmul(q);
    return CUBLAS_STATUS_SUCCESS;
}
