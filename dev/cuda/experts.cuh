// The experts' matrix products on the device: forward in two launches, backward in three.
// Gives: Experts, experts_hidden, experts_forward, experts_backward,
// sum_dweight. Needs: dev/cuda/common.cuh, SWIGLU ... of train_moe.c, all inside
// `namespace gpu`. C and every expert's F are multiples of eight.
//
// cuBLAS cannot do these products: the rows are picked out of the batch by index, and only the
// device knows how many rows an expert has. A "slot" is a row of the plan's order, which is sorted
// by expert. H is 2*F where an expert is gated (the gate's F numbers, then those of "up"),
// otherwise F.
//
//            product              A (rows,k)        B (k,columns)  at the end of the kernel
//   HIDDEN   hidden = x W_in^T    x, by token       W_in (H,C)     act = f(gate) * up
//   ANSWER   rows = act W_out^T   act               W_out (C,F)    times the router's weight
//   DHIDDEN  dact = dout W_out    dout, by token    W_out, by k    dhidden, dweight, weight * act
//   DOUT     dW_out = dout^T act  dout, token by k  act, by k      adds to the gradient
//   DIN      dW_in = dhidden^T x  dhidden, by k     x, token by k  adds to it, in DOUT's launch
//   DROWS    rows = dhidden W_in  dhidden           W_in, by k
//
// A block of 256 threads makes one tile of 128 x 128 results of one expert. A list of tiles, made
// on the device, says which expert and which rows; blocks beyond its end return at once. The rows
// of A come straight out of x by their tokens' numbers, since an address costs the same whichever
// row it is; nothing is copied into the experts' order first. Numbers come from memory some 700
// cycles after they are asked for, while the tensor cores need about 500 for a step of 32 numbers
// of k. So shared memory has three stages (or four): while one is multiplied, two (or three) are on
// their way (tiles.cuh).
//
// The ends save passes over memory. The activation, its slope and the weight would each be a kernel
// that reads and writes all of hidden or dact again; here the results are in registers already.
// They go through shared memory once, so that each thread has eight neighbours of a row and reads
// and writes 16 bytes at a time.

#pragma once
#include "tiles.cuh"

struct Experts { // of a layer; act has rows of `widest` numbers, hidden has rows of `hidden_width`
    int E, C, widest, hidden_width;     // the largest F, the largest H
    const int *width, *activation;      // (E): F, and SWIGLU ... GELU
    const size_t *matrix;               // (E): where each expert's W_out begins
    const size_t *matrix_in;            // (E): where its W_in begins
    const int *offset, *token, *choice; // the plan: (E+1), (slots), (slots)
    const int2 *tile; // (tiles): expert and first slot of each tile of rows; expert -1: no tile
    int tiles;
    const int *plan; // with --offload offset (E+1) on the host; NULL: all experts are on the device
};

enum { HIDDEN, ANSWER, DHIDDEN, DROWS, DOUT, DIN };

struct RowsJob { // the arrays of HIDDEN, ANSWER, DHIDDEN and DROWS: see the table
    const floatX *a, *b;
    const floatX *hidden; // (slots,H): DHIDDEN's
    floatX *out;          // hidden (slots,H), rows (slots,C) or dhidden (slots,H)
    floatX *act;          // (slots,F): what HIDDEN and DHIDDEN write besides
    const float *weight;  // (n*K) by choice; NULL: all are 1
    float *part;          // (column tiles, slots): DHIDDEN's parts of dweight
    size_t slots;         // how many there are at most
    int across;           // column tiles
};

struct WeightsJob { // the arrays of WEIGHTS
    const floatX *dout, *act, *dhidden, *x;
    float *dw_out, *dw_in;
    int across_out, across_in; // column tiles of an expert's dW_out, of its dW_in
    int tiles_out;             // all tiles of dW_out, which come before those of dW_in
};

#include "offload.cuh"

// ---- which tile a block makes

__device__ Tile tile_of(const Experts &x, int e, int first, int rows) {
    Tile t = {};
    t.e = e;
    t.first = first;
    t.rows = rows;
    t.F = x.width[e];
    t.activation = x.activation[e];
    t.gated = t.activation == SWIGLU || t.activation == GEGLU;
    t.H = t.F * (1 + t.gated);
    return t;
}

// The tile of a block of rows_kernel. The column tiles of the same rows come one after another,
// while the rows are in the cache. rows is 0 where there is nothing to do.
template <int WHAT> __device__ Tile find_rows(const Experts &x, int across) {
    int2 place = x.tile[blockIdx.x / across];
    if (place.x < 0) {
        return {};
    }
    int left = x.offset[place.x + 1] - place.y;
    Tile t = tile_of(x, place.x, place.y, min(TM, left));
    t.high = t.rows;
    t.column = blockIdx.x % across * TN;
    if (WHAT == HIDDEN && t.gated) {
        t.column /= 2; // a tile of HIDDEN has 64 columns of the gate and the same 64 of up
    }
    t.columns = x.C;
    t.depth = WHAT == ANSWER ? t.F : t.H;
    if (WHAT == HIDDEN || WHAT == DHIDDEN) {
        t.columns = t.F;
        t.depth = x.C;
    }
    return t;
}

// The tile of a block of weights_kernel: dW_out (C,F), or dW_in (H,C).
template <int WHAT> __device__ Tile find_weights(const Experts &x, int tile, int across) {
    int e = blockIdx.y, first = x.offset[e];
    Tile t = tile_of(x, e, first, x.offset[e + 1] - first);
    t.row = tile / across * TM;
    t.high = WHAT == DOUT ? x.C : t.H;
    t.column = tile % across * TN;
    t.columns = WHAT == DOUT ? t.F : x.C;
    t.depth = t.rows;
    return t;
}

// ---- the ends

// The end of HIDDEN: hidden, and act = f(hidden), or f(gate) * up.
__device__ void end_hidden(const Results &acc, float *room, const Tile &t, Warp w, const Experts &x,
                           const RowsJob &d) {
    int lanes = t.gated ? 2 : 4, lane_column = t.gated ? 16 : 8; // of a row
#pragma unroll
    for (int half = 0; half < 2; half++) {
        lay_out(room, acc, half, w.lane);
        for (int n = w.lane; n < HALF * lanes; n += 32) {
            int own = n / lanes, row = w.row + HALF * half + own, part = n % lanes;
            int c = t.column + (t.gated ? w.column / 2 : w.column) + 8 * part;
            if (row >= t.rows || c >= t.F) {
                continue;
            }
            float gate[8], up[8], f[8], slope;
            read_eight(gate, room + own * LAID + lane_column * part);
            floatX *hidden = d.out + ((size_t)t.first + row) * x.hidden_width + c;
            store_pack(hidden, gate);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                activate(t.activation, gate[i], &f[i], &slope);
            }
            if (t.gated) {
                read_eight(up, room + own * LAID + lane_column * part + 8);
                store_pack(hidden + t.F, up);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    f[i] *= up[i];
                }
            }
            store_pack(d.act + ((size_t)t.first + row) * x.widest + c, f);
        }
    }
}

// The end of ANSWER and DROWS: rows times the weight of each, which is 1 for DROWS.
__device__ void end_rows(const Results &acc, float *room, const Tile &t, Warp w,
                         const float *weight, const RowsJob &d) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        lay_out(room, acc, half, w.lane);
        for (int own = w.lane / 4; own < HALF; own += 8) {
            int row = w.row + HALF * half + own;
            int column = w.lane % 4 * 8, c = t.column + w.column + column;
            if (row >= t.rows || c >= t.columns) {
                continue;
            }
            float v[8];
            read_eight(v, room + own * LAID + column);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] *= weight[row];
            }
            store_pack(d.out + ((size_t)t.first + row) * t.columns + c, v);
        }
    }
}

// Eight numbers of one row of DHIDDEN: v is dact without the weight. Writes dhidden and weight *
// act, and gives their part of dweight, which is the sum of v * act.
__device__ float back_through(const float (&v)[8], const float (&gate)[8], const float (&up)[8],
                              float weight, const Tile &t, floatX *dhidden, floatX *act) {
    float dgate[8], dup[8], a[8], sum = 0;
    if (t.activation == SAME) { // none: here, and not in activate(), since that would need more registers
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum += v[i] * gate[i];
            dgate[i] = weight * v[i];
            a[i] = weight * gate[i];
        }
        store_pack(dhidden, dgate);
        store_pack(act, a);
        return sum;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float f, slope, u = t.gated ? up[i] : 1;
        activate(t.activation, gate[i], &f, &slope);
        sum += v[i] * u * f;
        dgate[i] = weight * v[i] * u * slope;
        dup[i] = weight * v[i] * f;
        a[i] = weight * u * f;
    }
    store_pack(dhidden, dgate);
    if (t.gated) {
        store_pack(dhidden + t.F, dup);
    }
    store_pack(act, a);
    return sum;
}

// The end of DHIDDEN. part (TM,4): each warp's sums for dweight. The block adds them up in order.
__device__ void end_dhidden(const Results &acc, float *room, const Tile &t, Warp w,
                            const float *weight, float *part, const Experts &x, const RowsJob &d) {
    const int AHEAD = 2; // rows of hidden asked for at once: more do not fit into the registers
    int column = w.lane % 4 * 8, c = t.column + w.column + column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        lay_out(room, acc, half, w.lane);
#pragma unroll 1
        for (int own = w.lane / 4; own < HALF; own += 8 * AHEAD) {
            Pack<floatX, 8> gate[AHEAD], up[AHEAD];
            int first = w.row + HALF * half + own;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (first + 8 * i < t.rows && c < t.F) {
                    const floatX *hidden =
                        d.hidden + ((size_t)t.first + first + 8 * i) * x.hidden_width + c;
                    gate[i] = *(const Pack<floatX, 8> *)hidden;
                    if (t.gated) {
                        up[i] = *(const Pack<floatX, 8> *)(hidden + t.F);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                int row = first + 8 * i;
                float sum = 0;
                if (row < t.rows && c < t.F) {
                    size_t slot = (size_t)t.first + row;
                    float v[8], g[8], u[8];
                    read_eight(v, room + (own + 8 * i) * LAID + column);
                    load_pack(g, gate[i].x);
                    if (t.gated) {
                        load_pack(u, up[i].x);
                    }
                    sum = back_through(v, g, u, weight[row], t, d.out + slot * x.hidden_width + c,
                                       d.act + slot * x.widest + c);
                }
                // Four lanes have a row of the warp's results between them.
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if (w.lane % 4 == 0) {
                    part[row * 4 + w.column / 32] = sum;
                }
            }
        }
    }
    __syncthreads();
    for (int r = threadIdx.x; r < t.rows; r += THREADS) {
        d.part[(size_t)(t.column / TN) * d.slots + t.first + r] =
            part[4 * r] + part[4 * r + 1] + part[4 * r + 2] + part[4 * r + 3];
    }
}

// The end of DOUT and DIN: grad (high,columns) += the results.
__device__ void end_weights(const Results &acc, float *room, const Tile &t, Warp w, float *grad) {
    int column = w.lane % 4 * 8, c = t.column + w.column + column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int first = t.row + w.row + HALF * half + w.lane / 4;
        float old[4][8];
#pragma unroll
        for (int i = 0; i < 4; i++) { // all are asked for before the first is awaited
            if (first + 8 * i < t.high && c < t.columns) {
                load_pack(old[i], grad + (size_t)(first + 8 * i) * t.columns + c);
            }
        }
        lay_out(room, acc, half, w.lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (first + 8 * i < t.high && c < t.columns) {
                float v[8];
                read_eight(v, room + (w.lane / 4 + 8 * i) * LAID + column);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    v[k] += old[i][k];
                }
                store_pack(grad + (size_t)(first + 8 * i) * t.columns + c, v);
            }
        }
    }
}

// ---- the kernels

// Blocks at a time on a multiprocessor: two leave 128 registers a thread, with which float32 cannot
// do.
const int BLOCKS = sizeof(floatX) == 2 ? 2 : 1;

// HIDDEN, ANSWER, DHIDDEN or DROWS: a tile of rows. Shared memory: STAGES pairs of tiles, then the
// rows' weights (TM).
template <int WHAT, int STAGES>
__global__ void __launch_bounds__(THREADS, BLOCKS) rows_kernel(Experts x, RowsJob d) {
    extern __shared__ float4 dynamic[];
    const bool B_BY_K = WHAT == DHIDDEN || WHAT == DROWS;
    Tile t = find_rows<WHAT>(x, d.across);
    if (t.rows == 0) {
        return;
    }
    if (t.column >= t.columns) { // this expert is narrower than others
        for (int r = threadIdx.x; WHAT == DHIDDEN && r < t.rows; r += THREADS) {
            d.part[(size_t)(t.column / TN) * d.slots + t.first + r] = 0;
        }
        return;
    }
    Warp w = this_warp();
    char *tiles = (char *)dynamic;
    float *weight = (float *)(tiles + STAGES * 2 * TILE);
    for (int r = threadIdx.x; r < t.rows; r += THREADS) { // read behind the product's barriers
        weight[r] = d.weight ? d.weight[x.choice[t.first + r]] : 1;
    }

    Fetcher<false, WHAT == HIDDEN || WHAT == DHIDDEN> a;
    Fetcher<B_BY_K, false> b;
    int own_ld = WHAT == ANSWER ? x.widest : x.hidden_width; // of act, of dhidden
    begin_rows(&a, d.a, WHAT == HIDDEN || WHAT == DHIDDEN ? x.C : own_ld, t, x.token);
    const floatX *matrix =
        d.b + (WHAT == HIDDEN || WHAT == DROWS ? x.matrix_in[t.e] : x.matrix[t.e]);
    int pairs = WHAT == HIDDEN && t.gated;
    if constexpr (B_BY_K) {
        begin_by_k(&b, matrix, t.columns, t.column, t.columns, NULL, t.depth);
    } else {
        begin_weights(&b, matrix, t.depth, t, pairs);
    }
    Results acc = {};
    multiply<STAGES>(acc, tiles, a, b, t.depth, w,
                     w.row >= t.rows || t.column + w.column / (1 + pairs) >= t.columns);

    if constexpr (WHAT == HIDDEN) {
        end_hidden(acc, room_of(tiles), t, w, x, d);
    } else if constexpr (WHAT == DHIDDEN) {
        float *part = (float *)tiles + THREADS / 32 * HALF * LAID;
        end_dhidden(acc, room_of(tiles), t, w, weight, part, x, d);
    } else {
        end_rows(acc, room_of(tiles), t, w, weight, d);
    }
}

// A tile of an expert's dW_out or dW_in; k are its slots.
template <int WHAT, int STAGES>
__device__ void add_gradient(const Experts &x, const WeightsJob &d, char *tiles, int tile,
                             int across) {
    Tile t = find_weights<WHAT>(x, tile, across);
    if (t.rows == 0 || t.row >= t.high || t.column >= t.columns) {
        return;
    }
    Warp w = this_warp();
    Fetcher<true, WHAT == DOUT> a;
    Fetcher<true, WHAT == DIN> b;
    const int *token = x.token + t.first;
    if constexpr (WHAT == DOUT) {
        begin_by_k(&a, d.dout, x.C, t.row, t.high, token, t.depth);
        begin_by_k(&b, d.act + (size_t)t.first * x.widest, x.widest, t.column, t.columns, NULL,
                   t.depth);
    } else {
        begin_by_k(&a, d.dhidden + (size_t)t.first * x.hidden_width, x.hidden_width, t.row, t.high,
                   NULL, t.depth);
        begin_by_k(&b, d.x, x.C, t.column, t.columns, token, t.depth);
    }
    Results acc = {};
    multiply<STAGES>(acc, tiles, a, b, t.depth, w,
                     t.row + w.row >= t.high || t.column + w.column >= t.columns);
    end_weights(acc, room_of(tiles), t, w,
                WHAT == DOUT ? d.dw_out + x.matrix[t.e] : d.dw_in + x.matrix_in[t.e]);
}

template <int STAGES>
__global__ void __launch_bounds__(THREADS, BLOCKS) weights_kernel(Experts x, WeightsJob d) {
    extern __shared__ float4 dynamic[];
    int tile = blockIdx.x;
    if (tile < d.tiles_out) {
        add_gradient<DOUT, STAGES>(x, d, (char *)dynamic, tile, d.across_out);
    } else {
        add_gradient<DIN, STAGES>(x, d, (char *)dynamic, tile - d.tiles_out, d.across_in);
    }
}

// ---- starting them

// Bytes of shared memory of a block: in bfloat16 49,664 with three stages, of which two blocks fit
// into the 100 KiB that a multiprocessor of a GeForce has; 66,048 with four. In float32, which is
// for checks, 98,816 with three.
constexpr int shared_bytes(int stages) {
    return stages * 2 * TILE + TM * (int)sizeof(float);
}

// With four stages one more step is on its way, which is worth its memory as long as a
// multiprocessor still has two blocks at a time. A block takes 1 KiB more than it asks for, and a
// multiprocessor has 1 KiB more than a block may ask for.
const int MOST_STAGES = sizeof(floatX) == 2 ? 4 : 3;
bool most_stages() {
    return 2 * ((size_t)shared_bytes(MOST_STAGES) + 1024) <= shared_limit() + 1024;
}

template <int WHAT, int STAGES> void start_rows(const Experts *x, const RowsJob &job) {
    const int BYTES = shared_bytes(STAGES);
    CHECK(cudaFuncSetAttribute(rows_kernel<WHAT, STAGES>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    rows_kernel<WHAT, STAGES><<<job.across * x->tiles, THREADS, BYTES, stream>>>(*x, job);
    CHECK(cudaGetLastError());
}

template <int WHAT> void rows_product(const Experts *x, RowsJob job) {
    if (x->plan) {
        rows_by_expert(x, WHAT, job.b, [&](const Experts *part) { rows_product<WHAT>(part, job); });
        return;
    }
    int columns = WHAT == HIDDEN ? x->hidden_width : x->C;
    job.across = div_up(WHAT == DHIDDEN ? x->widest : columns, TN);
    if (most_stages()) {
        start_rows<WHAT, MOST_STAGES>(x, job);
    } else {
        start_rows<WHAT, 3>(x, job);
    }
}

template <int STAGES> void start_weights(const Experts *x, const WeightsJob &job) {
    const int BYTES = shared_bytes(STAGES);
    dim3 grid(job.tiles_out + div_up(x->hidden_width, TM) * job.across_in, x->E);
    CHECK(cudaFuncSetAttribute(weights_kernel<STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               BYTES));
    weights_kernel<STAGES><<<grid, THREADS, BYTES, stream>>>(*x, job);
    CHECK(cudaGetLastError());
}

void weights_product(const Experts *x, WeightsJob job) {
    if (x->plan) {
        weights_by_expert(x, job.dw_out, [&](const Experts *part) { weights_product(part, job); });
        return;
    }
    job.across_out = div_up(x->widest, TN);
    job.across_in = div_up(x->C, TN);
    job.tiles_out = div_up(x->C, TM) * job.across_out;
    if (most_stages()) {
        start_weights<MOST_STAGES>(x, job);
    } else {
        start_weights<3>(x, job);
    }
}

// ---- parts of dweight

__global__ void sum_dweight_kernel(float *dweight, const float *part, const int *choice,
                                   const int *slots, size_t room, int tiles) {
    size_t slot = thread_of_grid();
    if (slot >= (size_t)*slots) {
        return;
    }
    float sum = 0;
    for (int t = 0; t < tiles; t++) {
        sum += part[t * room + slot];
    }
    dweight[choice[slot]] = sum;
}

// dweight (n*K, by choice) = for each choice that has a slot the sum of part (tiles,room) over the
// column tiles, in their order. slots: the device's number of slots; room: how many there are at
// most.
void sum_dweight(float *dweight, const float *part, const int *choice, const int *slots,
                 size_t room, int tiles) {
    sum_dweight_kernel<<<blocks(room), THREADS, 0, stream>>>(dweight, part, choice, slots, room,
                                                             tiles);
    CHECK(cudaGetLastError());
}

// ---- the experts

int is_frozen(const float *dw); // --lora: see dev/cuda/lora.cuh
void expert_pairs_backward(const Experts *x, const WeightsJob &d);

// hidden (slots,H) = x[token] W_in^T; act (slots,F) = f(hidden). x (n,C)
void experts_hidden(floatX *hidden, floatX *act, const floatX *x, const floatX *w_in,
                    const Experts *experts) {
    RowsJob job = {};
    job.a = x;
    job.b = w_in;
    job.out = hidden;
    job.act = act;
    rows_product<HIDDEN>(experts, job);
}

// rows (slots,C) = weight * (act W_out^T): what combine() adds up. weight (n*K) by choice; NULL:
// all are 1.
void experts_forward(floatX *rows, floatX *hidden, floatX *act, const floatX *x, const floatX *w_in,
                     const floatX *w_out, const float *weight, const Experts *experts) {
    gpu::experts_hidden(hidden, act, x, w_in, experts);
    RowsJob job = {};
    job.a = act;
    job.b = w_out;
    job.out = rows;
    job.weight = weight;
    rows_product<ANSWER>(experts, job);
}

// rows (slots,C) = the gradient by each row of x; dw_in and dw_out +=; part (column tiles, slots) =
// the parts of dweight, by slot, which sum_dweight() adds up. dout (n,C). dact (slots,F) and
// dhidden (slots,H) are scratch. slots: how many there are at most.
void experts_backward(floatX *rows, float *dw_in, float *dw_out, const floatX *dout,
                      const floatX *x, const floatX *hidden, const float *weight,
                      const floatX *w_in, const floatX *w_out, floatX *dact, floatX *dhidden,
                      float *part, size_t slots, const Experts *experts) {
    RowsJob inner = {};
    inner.a = dout;
    inner.b = w_out;
    inner.hidden = hidden;
    inner.out = dhidden;
    inner.act = dact;
    inner.weight = weight;
    inner.part = part;
    inner.slots = slots;
    rows_product<DHIDDEN>(experts, inner);

    WeightsJob weights = {dout, dact, dhidden, x, dw_out, dw_in, 0, 0, 0};
    if (is_frozen(dw_in)) {
        expert_pairs_backward(experts, weights);
    } else {
        weights_product(experts, weights);
    }

    RowsJob to_x = {};
    to_x.a = dhidden;
    to_x.b = w_in;
    to_x.out = rows;
    rows_product<DROWS>(experts, to_x);
}
