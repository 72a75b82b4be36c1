// cublas_v2.h, the look-alike: the matrix products of cuBLAS that train_moe.cu uses, for dev/emulator. Matrices are
// column-major; sums are float32, in the order of k.

#ifndef CUDACPU_CUBLAS_V2_H
#define CUDACPU_CUBLAS_V2_H

#include "cuda_bf16.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
enum cublasMath_t {
    CUBLAS_DEFAULT_MATH = 0,
    CUBLAS_PEDANTIC_MATH = 2,
    CUBLAS_TF32_TENSOR_OP_MATH = 3,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16,
};

namespace cudacpu {
struct Blas {
    Stream *stream = nullptr;
};
} // namespace cudacpu
typedef cudacpu::Blas *cublasHandle_t;

inline const char *cublasGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS           ? "success"
           : status == CUBLAS_STATUS_NOT_INITIALIZED ? "the library was not initialized"
           : status == CUBLAS_STATUS_NOT_SUPPORTED   ? "the requested functionality is not supported"
                                                     : "an invalid value was used as an argument";
}
inline cublasStatus_t cublasCreate(cublasHandle_t *blas) {
    *blas = new cudacpu::Blas;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t blas) {
    cudacpu::run_all();
    delete blas;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream) {
    blas->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) {
    return CUBLAS_STATUS_SUCCESS;
}

namespace cudacpu {

inline float element(const void *p, size_t i, cudaDataType_t type) {
    return type == CUDA_R_32F ? ((const float *)p)[i] : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

// c (m,n) = alpha a (m,k) b (k,n) + beta c: a is packed by columns, sixteen rows at a time, and b by rows of four
// columns, so that a tile of (16,4) sums stays in registers.
inline void product(const char *name, bool at, bool bt, int m, int n, int k, float alpha, const void *a,
                    cudaDataType_t of_ab, int lda, const void *b, int ldb, float beta, void *c, cudaDataType_t of_c,
                    int ldc) {
    typedef float Row __attribute__((vector_size(64), aligned(4)));
    Traps traps(name);
    if (alpha == 0)
        k = 0;
    size_t m16 = ((size_t)m + 15) / 16 * 16, n4 = ((size_t)n + 3) / 4 * 4;
    std::vector<float> pa(m16 * k), pb(n4 * k); // what is past the edges is 0
    for (int l = 0; l < k; l++) {
        for (int i = 0; i < m; i++)
            pa[((size_t)i / 16 * k + l) * 16 + i % 16] =
                element(a, at ? (size_t)i * lda + l : (size_t)l * lda + i, of_ab);
        for (int j = 0; j < n; j++)
            pb[((size_t)j / 4 * k + l) * 4 + j % 4] = element(b, bt ? (size_t)l * ldb + j : (size_t)j * ldb + l, of_ab);
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(workers()) schedule(dynamic) if ((double)m * n * k > 1e6)
#endif
    for (int j = 0; j < n; j += 4) {
        Traps traps(name);
        for (int i = 0; i < m; i += 16) {
            Row sum[4] = {};
            const float *x = pa.data() + (size_t)i * k, *y = pb.data() + (size_t)j * k;
            for (int l = 0; l < k; l++, x += 16, y += 4) {
                for (int v = 0; v < 4; v++)
                    sum[v] += *(const Row *)x * y[v];
            }
            for (int v = 0; v < 4 && j + v < n; v++) {
                for (int u = 0; u < 16 && i + u < m; u++) {
                    size_t at = (size_t)(j + v) * ldc + i + u;
                    float value = alpha * sum[v][u] + (beta == 0 ? 0 : beta * element(c, at, of_c));
                    if (of_c == CUDA_R_32F)
                        ((float *)c)[at] = value;
                    else
                        ((__nv_bfloat16 *)c)[at] = __float2bfloat16(value);
                }
            }
        }
    }
}

inline cublasStatus_t products(const char *name, cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m,
                               int n, int k, float alpha, const void *a, cudaDataType_t of_a, int lda, long long step_a,
                               const void *b, cudaDataType_t of_b, int ldb, long long step_b, float beta, void *c,
                               cudaDataType_t of_c, int ldc, long long step_c, int count, cublasComputeType_t compute) {
    bool at = ta != CUBLAS_OP_N, bt = tb != CUBLAS_OP_N;
    if (!blas)
        return CUBLAS_STATUS_NOT_INITIALIZED;
    if (m < 0 || n < 0 || k < 0 || count < 0 || lda < std::max(1, at ? k : m) || ldb < std::max(1, bt ? n : k) ||
        ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (of_a != of_b || (of_a != CUDA_R_32F && of_a != CUDA_R_16BF) || (of_c != CUDA_R_32F && of_c != of_a) ||
        (compute == CUBLAS_COMPUTE_32F_FAST_TF32 && of_a != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m == 0 || n == 0 || count == 0)
        return CUBLAS_STATUS_SUCCESS;
    enqueue(blas->stream, [=] {
        Handlers handlers;
        size_t wide = of_a == CUDA_R_32F ? 4 : 2, wide_c = of_c == CUDA_R_32F ? 4 : 2;
        for (int i = 0; i < count; i++) {
            product(name, at, bt, m, n, k, alpha, (const char *)a + i * step_a * wide, of_a, lda,
                    (const char *)b + i * step_b * wide, ldb, beta, (char *)c + i * step_c * wide_c, of_c, ldc);
        }
        if (count_file()) {
            char text[200];
            size_t sizes_ab = ((size_t)m * k + (size_t)k * n) * wide * count, size_c = (size_t)m * n * wide_c * count;
            snprintf(text, sizeof(text), "gemm %s -> %s %c%c m %d n %d k %d x %d%s", wide == 4 ? "fp32" : "bf16",
                     wide_c == 4 ? "fp32" : "bf16", "NT"[at], "NT"[bt], m, n, k, count, beta == 0 ? "" : " added");
            cudacpu::count(text, sizes_ab + (beta == 0 ? 0 : size_c), size_c);
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace cudacpu

inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m,
                                                 int n, int k, const void *alpha, const void *a, cudaDataType_t of_a,
                                                 int lda, long long step_a, const void *b, cudaDataType_t of_b, int ldb,
                                                 long long step_b, const void *beta, void *c, cudaDataType_t of_c,
                                                 int ldc, long long step_c, int count, cublasComputeType_t compute,
                                                 cublasGemmAlgo_t) {
    return cudacpu::products("cublasGemmStridedBatchedEx", blas, ta, tb, m, n, k, *(const float *)alpha, a, of_a, lda,
                             step_a, b, of_b, ldb, step_b, *(const float *)beta, c, of_c, ldc, step_c, count, compute);
}
inline cublasStatus_t cublasGemmEx(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                   const void *alpha, const void *a, cudaDataType_t of_a, int lda, const void *b,
                                   cudaDataType_t of_b, int ldb, const void *beta, void *c, cudaDataType_t of_c,
                                   int ldc, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return cudacpu::products("cublasGemmEx", blas, ta, tb, m, n, k, *(const float *)alpha, a, of_a, lda, 0, b, of_b,
                             ldb, 0, *(const float *)beta, c, of_c, ldc, 0, 1, compute);
}
inline cublasStatus_t cublasSgemm(cublasHandle_t blas, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                  const float *alpha, const float *a, int lda, const float *b, int ldb,
                                  const float *beta, float *c, int ldc) {
    return cudacpu::products("cublasSgemm", blas, ta, tb, m, n, k, *alpha, a, CUDA_R_32F, lda, 0, b, CUDA_R_32F, ldb, 0,
                             *beta, c, CUDA_R_32F, ldc, 0, 1, CUBLAS_COMPUTE_32F);
}

#endif
