// The plan of a layer: counting, balance and sorting of the choices, in chunks of tokens. train_moe.cu says what it is for.
// Gives: find_chunk, sums_of_chunk, finish_chunks, count_kernel, balance_kernel, place_kernel.
// Needs: struct Routing, fresh() and is_last_block() of train_moe.cu, which includes it; TM of experts.cuh.
#ifndef CUDA_PLAN_CUH
#define CUDA_PLAN_CUH

// Tokens first .. end of a chunk.
__device__ void find_chunk(const Routing &q, int chunk, int *first, int *end) {
    int group = chunk / q.chunks_of_group;
    *first = group * q.group + chunk % q.chunks_of_group * BLOCK_ROWS;
    *end = min((group + 1) * q.group, *first + BLOCK_ROWS);
}

// Sums over the tokens first .. end, by a block: choices and scores of each expert, entropies, squares of lse.
__device__ void sums_of_chunk(const Routing &q, int chunk, int first, int end) {
    __shared__ float row_sum[BLOCK_ROWS]; // of p: 1, but for sigmoid scores
    const Route &r = q.r;
    int E = r.E, warp = threadIdx.x / 32, lane = threadIdx.x % 32, scored = q.todo & (STATISTICS | COUNTS | LOSSES);
    int per = scored && r.p ? r.rows / r.N : 0; // rows of a token
    double entropy = 0, squares = 0;
    for (int row = first * per + warp; row < end * per; row += THREADS / 32) {
        const float *p = r.p + (size_t)row * E;
        float all = 0, sum = 0;
        for (int e = lane; q.score == SIGMOID && e < E; e += 32) {
            all += at_least_tiny(p[e]);
        }
        all = q.score == SIGMOID ? warp_sum(all) : 1;
        for (int e = lane; e < E; e += 32) {
            float share = q.score == SIGMOID ? at_least_tiny(p[e]) / all : p[e];
            sum -= share > 0 ? share * logf(share) : 0;
        }
        entropy += (double)warp_sum(sum) / per;
        squares += q.z_weight > 0 ? (double)r.lse[row] * (double)r.lse[row] : 0;
        if (lane == 0 && per == 1) {
            row_sum[row - first] = all;
        }
    }
    entropy = block_sum(lane == 0 ? entropy : 0);
    squares = block_sum(lane == 0 ? squares : 0);
    if (threadIdx.x == 0 && per) {
        q.s.entropy[chunk] = entropy;
        q.s.lse_squares[chunk] = squares;
    }
    for (int e = threadIdx.x; e < E; e += THREADS) {
        int count = 0, unbiased = 0;
        float p = 0;
        for (int i = first * r.K; i < end * r.K; i++) {
            count += r.served[i] == e;
            unbiased += q.balance == UNBIASED && per && q.s.unbiased[i] == e;
        }
        for (int n = first; n < end && per == 1; n++) {
            float own = r.p[(size_t)n * E + e];
            p += q.score == SIGMOID ? at_least_tiny(own) / row_sum[n - first] : own;
        }
        q.s.count[(size_t)e * q.chunks + chunk] = count;
        if (per == 1) {
            q.s.unbiased_count[(size_t)e * q.chunks + chunk] = unbiased;
            q.s.p_sum[(size_t)e * q.chunks + chunk] = p;
        }
    }
}

// count (E,chunks) becomes that of all chunks before; total (E). A warp has an expert.
__device__ void scan_counts(const Routing &q) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = warp; e < q.r.E; e += THREADS / 32) {
        int *count = q.s.count + (size_t)e * q.chunks, sum = 0;
        for (int first = 0; first < q.chunks; first += 32 * AHEAD) {
            int own[AHEAD]; // all are asked for before the first is needed
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                int chunk = first + 32 * j + lane;
                own[j] = chunk < q.chunks ? fresh(&count[chunk]) : 0;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                int chunk = first + 32 * j + lane, up_to = warp_scan(own[j]);
                if (chunk < q.chunks) {
                    count[chunk] = sum + up_to - own[j];
                }
                sum += __shfl_sync(ALL_LANES, up_to, 31);
            }
        }
        if (lane == 0) {
            q.s.total[e] = sum;
        }
    }
    __syncthreads();
}

__device__ double sum_of_chunks(const double *x, int chunks) { // by a warp
    double sum = 0;
    for (int i = threadIdx.x % 32; i < chunks; i += 32) {
        sum += fresh(&x[i]);
    }
    return warp_sum(sum);
}

// See Statistics of dev/statistics.h.
__device__ void add_statistics(const Routing &q) {
    int E = q.r.E, sum = 0;
    for (int e = threadIdx.x; e < E; e += THREADS) {
        q.stats[e] += q.s.total[e];
        sum += q.s.total[e];
    }
    sum = block_sum(sum);
    double entropy = q.r.p ? sum_of_chunks(q.s.entropy, q.chunks) : 0;
    if (threadIdx.x == 0) {
        q.stats[4 * E + ENTROPY] += entropy;
        q.stats[4 * E + ACTIVE] += sum;
        q.stats[4 * E + TOKENS] += q.r.N;
        *q.s.active = sum;
    }
    __syncthreads();
}

// Of each group of tokens: r.count (groups,E), the choices, and mean_p (groups,E), the sums of scores. A warp has one of
// each.
__device__ void counts_of_groups(const Routing &q) {
    const Route &r = q.r;
    int E = r.E, groups = r.N / q.group, of = q.chunks_of_group, lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < groups * E; i += THREADS / 32) {
        int e = i % E, first = i / E * of, unbiased = 0;
        const int *count = q.s.count + (size_t)e * q.chunks;
        double p = 0;
        for (int chunk = first + lane; chunk < first + of; chunk += 32) {
            p += (double)fresh(&q.s.p_sum[(size_t)e * q.chunks + chunk]);
            unbiased += fresh(&q.s.unbiased_count[(size_t)e * q.chunks + chunk]);
        }
        p = warp_sum(p);
        unbiased = warp_sum(unbiased);
        if (lane == 0) {
            int before_next = first + of < q.chunks ? count[first + of] : q.s.total[e];
            double chosen = q.balance == UNBIASED ? unbiased : before_next - count[first];
            r.count[i] = q.whole_step ? q.stats[e] : chosen;
            q.s.mean_p[i] = p;
        }
    }
    __syncthreads();
}

// slope (groups,E) = weight * E * f, or 0 where the loss has another form.
__device__ void slopes_of_groups(const Routing &q) {
    const Route &r = q.r;
    int E = r.E, lane = threadIdx.x % 32, own = q.balance == SWITCH || q.balance == UNBIASED;
    for (int g = threadIdx.x / 32; g < r.N / q.group; g += THREADS / 32) {
        double total = 0;
        for (int e = lane; e < E; e += 32) {
            total += r.count[(size_t)g * E + e];
        }
        total = warp_sum(total);
        for (int e = lane; e < E; e += 32) {
            r.slope[(size_t)g * E + e] = own && total > 0 ? q.aux_weight * E * r.count[(size_t)g * E + e] / total : 0;
        }
    }
    __syncthreads();
}

// The layer's AUX += the mean over tokens of slope . p, and the z-loss.
__device__ void add_losses(const Routing &q) {
    const Route &r = q.r;
    int E = r.E, groups = r.slope ? r.N / q.group : 0, lane = threadIdx.x % 32;
    for (int g = threadIdx.x / 32; g < groups; g += THREADS / 32) {
        double dot = 0;
        for (int e = lane; e < E; e += 32) {
            dot += r.slope[(size_t)g * E + e] * q.s.mean_p[(size_t)g * E + e];
        }
        dot = warp_sum(dot);
        if (lane == 0) {
            q.s.group_loss[g] = dot;
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        double loss = sum_of_chunks(q.s.group_loss, groups) / r.N;
        loss += r.p && q.z_weight > 0 ? q.z_weight * sum_of_chunks(q.s.lse_squares, q.chunks) / r.rows : 0;
        if (lane == 0) {
            q.stats[4 * E + AUX] += loss;
        }
    }
    __syncthreads();
}

// r.offset (E+1), and the list of tiles.
__device__ void lay_rows(const Routing &q) {
    int E = q.r.E, lane = threadIdx.x, row = 0, tile = 0;
    for (int first = 0; first < E && threadIdx.x < 32; first += 32) {
        int e = first + lane, count = e < E ? q.s.total[e] : 0, mine = div_up(count, TM);
        int rows_to = warp_scan(count), tiles_to = warp_scan(mine);
        if (e < E) {
            q.r.offset[e] = row + rows_to - count;
            q.s.first_tile[e] = tile + tiles_to - mine;
        }
        row += __shfl_sync(ALL_LANES, rows_to, 31);
        tile += __shfl_sync(ALL_LANES, tiles_to, 31);
    }
    if (threadIdx.x == 0) {
        q.r.offset[E] = row;
        q.s.first_tile[E] = tile;
        if (q.todo & DROPS) {
            q.stats[4 * E + DROPPED] += *q.s.active - row;
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E && q.tile; e += THREADS) {
        for (int i = q.s.first_tile[e]; i < q.s.first_tile[e + 1]; i++) {
            q.tile[i] = make_int2(e, q.r.offset[e] + (i - q.s.first_tile[e]) * TM);
        }
    }
    for (int i = q.s.first_tile[E] + threadIdx.x; i < q.tiles; i += THREADS) {
        q.tile[i] = make_int2(-1, 0);
    }
}

// What is done once for all chunks, by the last block of a grid.
__device__ void finish_chunks(const Routing &q) {
    scan_counts(q);
    if (q.todo & STATISTICS) {
        add_statistics(q);
    }
    if ((q.todo & COUNTS) && q.r.slope) {
        counts_of_groups(q);
    }
    if (q.todo & SLOPES) {
        slopes_of_groups(q);
    }
    if (q.todo & LOSSES) {
        add_losses(q);
    }
    if (q.todo & PLAN) {
        lay_rows(q);
    }
}

__global__ void __launch_bounds__(THREADS, 4) count_kernel(Routing q) {
    int first, end;
    find_chunk(q, blockIdx.x, &first, &end);
    sums_of_chunk(q, blockIdx.x, first, end);
    if (is_last_block(q.s.done)) {
        finish_chunks(q);
    }
}

__global__ void __launch_bounds__(THREADS) balance_kernel(Routing q) { // one block, after the counts of all processes
    if (q.todo & SLOPES) {
        slopes_of_groups(q);
    }
    if (q.todo & LOSSES) {
        add_losses(q);
    }
}

// Places the choices of a chunk, by a warp: 32 choices at a time, each behind those of the same expert before it.
__global__ void __launch_bounds__(32) place_kernel(Routing q) {
    extern __shared__ float4 dynamic[];
    int *next = (int *)dynamic, lane = threadIdx.x, first, end, K = q.r.K; // next (E): each expert's next row
    find_chunk(q, blockIdx.x, &first, &end);
    for (int e = lane; e < q.r.E; e += 32) {
        next[e] = q.r.offset[e] + q.s.count[(size_t)e * q.chunks + blockIdx.x];
    }
    __syncwarp();
    for (int base = first * K; base < end * K; base += 32) {
        int choice = base + lane, e = choice < end * K ? q.r.served[choice] : -1;
        unsigned same = __match_any_sync(ALL_LANES, e);
        int earlier = __popc(same & ((1u << lane) - 1)), row = e < 0 ? -1 : next[e] + earlier;
        __syncwarp();
        if (e >= 0 && earlier == 0) {
            next[e] += __popc(same);
        }
        __syncwarp();
        if (choice < end * K) {
            q.r.row[choice] = row;
        }
        if (row >= 0) {
            q.r.choice[row] = choice;
            q.r.token[row] = choice / K;
        }
    }
}

#endif
