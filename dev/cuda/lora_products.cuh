// What low-rank pairs need of the device: products with narrow matrices, and W + s B A. Formulas: dev/lora.h.
// Gives: merge_pair, pair_product, pair_rows, pair_weights, pair_of_router. Needs: dev/cuda/tiles.cuh, the ends of experts.cuh;
// cublas and type_of of train_moe.cu; dev/cuda/lora.cuh, which includes it.
//
// A pair beside one matrix has few products, and cuBLAS makes them. Beside a stack of experts' matrices only the device knows how
// many rows an expert has, so the products are made by tiles as in experts.cuh, out of the same pieces: a tile of 128 columns of
// which the rank may fill only 8. Warps whose columns do not exist multiply nothing, and the time goes to reading the rows.
#pragma once

// ---- W + s B A

struct MergeJob {
    const float *w, *a, *b;     // (E,O,I), (E,R,I), (E,O,rank)
    int O, I, R, rank;
    int end0, end1;             // rows of the first block, and of the first two: see Pair.rows
    size_t rows;                // E*O
    float scale;
};

const int MERGED = 4; // rows that a warp makes at a time; an expert's O and a block's rows are multiples of it

// to (E,O,I) = w + scale * b a. A warp has MERGED rows and 128 columns, and reads each row of a once for all of them.
template <class Out> __global__ void merge_kernel(Out *to, MergeJob d) {
    size_t first = MERGED * row_of_warp();
    int c = 128 * blockIdx.y + 4 * (threadIdx.x % 32), count = (int)(d.rows - first < MERGED ? d.rows - first : MERGED);
    if (first >= d.rows || c >= d.I) {
        return;
    }
    int o = (int)(first % d.O), block = (o >= d.end0) + (o >= d.end1);
    const float *a = d.a + ((first / d.O) * d.R + (size_t)block * d.rank) * d.I + c, *b = d.b + first * d.rank;
    float sum[MERGED][4] = {}, of_a[4], w[4];
    for (int j = 0; j < d.rank; j++) {
        load_pack(of_a, a + (size_t)j * d.I);
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            float of_b = i < count ? b[i * d.rank + j] : 0;
            for (int v = 0; v < 4; v++) {
                sum[i][v] += of_b * of_a[v];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MERGED; i++) {
        if (i < count) {
            size_t at = (first + i) * d.I + c;
            load_pack(w, d.w + at);
            for (int v = 0; v < 4; v++) {
                w[v] += d.scale * sum[i][v];
            }
            store_pack(to + at, w);
        }
    }
}

// to (E,O,I) = the matrix that p is as good as.
template <class Out> void merge_pair(Out *to, const Pair *p) {
    int O = p->O, several = p->blocks > 1;
    MergeJob d = {p->w, p->a, p->b, O, p->I, p->blocks * p->rank, p->rank, several ? p->rows[0] : O,
                  several ? p->rows[0] + p->rows[1] : O, (size_t)p->E * O, p->scale};
    dim3 grid(row_blocks((d.rows + MERGED - 1) / MERGED), div_up(p->I, 128));
    merge_kernel<Out><<<grid, THREADS, 0, stream>>>(to, d);
    CHECK(cudaGetLastError());
}

// ---- products beside one matrix

template <class T> struct PairSide { // a factor (rows,K), or by k (K,rows); ld: numbers from one row in memory to the next
    const T *x;
    int ld, by_k;
};

// out (M,N), ld_out numbers from row to row, = or with ADD += scale * the sum over k < K of a times b.
template <class Out, class In>
void pair_product(Out *out, int ld_out, PairSide<In> a, PairSide<In> b, int M, int N, int K, float scale, int add) {
    float beta = add == ADD ? 1 : 0;
    CHECK(cublasGemmEx(cublas, b.by_k ? CUBLAS_OP_N : CUBLAS_OP_T, a.by_k ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &scale, b.x,
                       type_of(b.x), b.ld, a.x, type_of(a.x), a.ld, &beta, out, type_of(out), ld_out, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT));
}

// ---- products beside experts' matrices

const int PAIR_STAGES = 3; // as the experts' products have at least

struct PairRows { // out (slots,rank) = scale * from matrix
    const floatX *from;   // (n,ld) by token, or (slots,ld)
    const floatX *matrix; // (E,rank,depth), or by k (E,depth,rank)
    floatX *out;
    int ld, depth, rank, across; // across: column tiles
    float scale;
};

// x A^T, or B_BY_K dout B, of a tile of rows. BY_TOKEN: a slot's row is its token's.
template <bool BY_TOKEN, bool B_BY_K>
__global__ void __launch_bounds__(THREADS, BLOCKS) pair_rows_kernel(Experts x, PairRows d) {
    extern __shared__ float4 dynamic[];
    int2 place = x.tile[blockIdx.x / d.across];
    if (place.x < 0) {
        return;
    }
    Tile t = {};
    t.e = place.x;
    t.first = place.y;
    t.rows = min(TM, x.offset[place.x + 1] - place.y);
    t.column = blockIdx.x % d.across * TN;
    t.columns = d.rank;
    t.depth = d.depth;
    Warp w = this_warp();
    char *tiles = (char *)dynamic;
    float *factor = (float *)(tiles + PAIR_STAGES * 2 * TILE);
    for (int r = threadIdx.x; r < t.rows; r += THREADS) { // read behind the product's barriers
        factor[r] = d.scale;
    }
    Fetcher<false, BY_TOKEN> a;
    Fetcher<B_BY_K, false> b;
    begin_rows(&a, d.from, d.ld, t, x.token);
    const floatX *matrix = d.matrix + (size_t)t.e * d.rank * d.depth;
    if constexpr (B_BY_K) {
        begin_by_k(&b, matrix, d.rank, t.column, d.rank, NULL, d.depth);
    } else {
        begin_weights(&b, matrix, d.depth, t, false);
    }
    Results acc = {};
    multiply<PAIR_STAGES>(acc, tiles, a, b, t.depth, w, w.row >= t.rows || t.column + w.column >= t.columns);
    RowsJob end = {};
    end.out = d.out;
    end_rows(acc, room_of(tiles), t, w, factor, end);
}

struct PairWeights { // to (E,high,columns) += a^T b, over an expert's slots
    const floatX *a, *b; // (n,ld) by token, or (slots,ld)
    int lda, ldb, high, columns, across;
    float *to;
};

// The gradient of a stack of A, whose factor b is x, or of B, whose factor a is dout.
template <bool A_BY_TOKEN, bool B_BY_TOKEN>
__global__ void __launch_bounds__(THREADS, BLOCKS) pair_weights_kernel(Experts x, PairWeights d) {
    extern __shared__ float4 dynamic[];
    Tile t = {};
    t.e = blockIdx.y;
    t.first = x.offset[t.e];
    t.depth = x.offset[t.e + 1] - t.first;
    t.row = blockIdx.x / d.across * TM;
    t.high = d.high;
    t.column = blockIdx.x % d.across * TN;
    t.columns = d.columns;
    if (t.depth == 0) {
        return;
    }
    Warp w = this_warp();
    char *tiles = (char *)dynamic;
    Fetcher<true, A_BY_TOKEN> a;
    Fetcher<true, B_BY_TOKEN> b;
    const int *token = x.token + t.first;
    begin_by_k(&a, d.a + (A_BY_TOKEN ? 0 : (size_t)t.first * d.lda), d.lda, t.row, t.high, token, t.depth);
    begin_by_k(&b, d.b + (B_BY_TOKEN ? 0 : (size_t)t.first * d.ldb), d.ldb, t.column, t.columns, token, t.depth);
    Results acc = {};
    multiply<PAIR_STAGES>(acc, tiles, a, b, t.depth, w, t.row + w.row >= t.high || t.column + w.column >= t.columns);
    end_weights(acc, room_of(tiles), t, w, d.to + (size_t)t.e * d.high * d.columns);
}

template <bool BY_TOKEN, bool B_BY_K> void pair_rows(const Experts *x, PairRows d) {
    const int BYTES = shared_bytes(PAIR_STAGES);
    d.across = div_up(d.rank, TN);
    CHECK(cudaFuncSetAttribute(pair_rows_kernel<BY_TOKEN, B_BY_K>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    pair_rows_kernel<BY_TOKEN, B_BY_K><<<d.across * x->tiles, THREADS, BYTES, stream>>>(*x, d);
    CHECK(cudaGetLastError());
}

template <bool A_BY_TOKEN, bool B_BY_TOKEN> void pair_weights(const Experts *x, PairWeights d) {
    const int BYTES = shared_bytes(PAIR_STAGES);
    d.across = div_up(d.columns, TN);
    dim3 grid(div_up(d.high, TM) * d.across, x->E);
    CHECK(cudaFuncSetAttribute(pair_weights_kernel<A_BY_TOKEN, B_BY_TOKEN>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    pair_weights_kernel<A_BY_TOKEN, B_BY_TOKEN><<<grid, THREADS, BYTES, stream>>>(*x, d);
    CHECK(cudaGetLastError());
}

// ---- the pair beside a router whose kernels are fused
//
// Its gradient dW (E,C) is d (E,C) times the norm's weights n (C): see fused_router_backward. It is so small that it is made
// first, and the pair's gradients come of it: dB = s dW A^T, dA = s B^T dW.

// A warp has a number of dB (E,rank).
__global__ void pair_of_router_b_kernel(float *db, const float *d, const float *n, const float *a, int E, int C, int rank,
                                        float scale) {
    size_t i = row_of_warp();
    float of_d[4], of_n[4], of_a[4], sum = 0;
    if (i >= (size_t)E * rank) {
        return;
    }
    for (int c = 4 * (threadIdx.x % 32); c < C; c += 128) {
        load_pack(of_d, d + i / rank * C + c);
        load_pack(of_n, n + c);
        load_pack(of_a, a + i % rank * C + c);
        for (int v = 0; v < 4; v++) {
            sum += of_d[v] * of_n[v] * of_a[v];
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        db[i] += scale * sum;
    }
}

// A thread has a number of dA (rank,C).
__global__ void pair_of_router_a_kernel(float *da, const float *d, const float *n, const float *b, int E, int C, int rank,
                                        float scale) {
    size_t i = thread_of_grid(), c = i % C, j = i / C;
    float sum = 0;
    if (i >= (size_t)rank * C) {
        return;
    }
    for (int e = 0; e < E; e++) {
        sum += b[e * rank + j] * d[(size_t)e * C + c];
    }
    da[i] += scale * sum * n[c];
}

void pair_of_router(const Pair *p, const float *d, const float *n) {
    size_t of_b = (size_t)p->O * p->rank, of_a = (size_t)p->rank * p->I;
    pair_of_router_b_kernel<<<row_blocks(of_b), THREADS, 0, stream>>>(p->db, d, n, p->a, p->O, p->I, p->rank, p->scale);
    CHECK(cudaGetLastError());
    pair_of_router_a_kernel<<<blocks(of_a), THREADS, 0, stream>>>(p->da, d, n, p->b, p->O, p->I, p->rank, p->scale);
    CHECK(cudaGetLastError());
}
