// Capacity on a GPU: drop_overflow of the lesson, and all that dev/routers/capacity.h does besides.
// Gives: drop_overflow, capacity_kernels. Needs: take_best.cuh. The arrays of ::Service are the device's
// here. The choices that are refused are counted by train_moe.cu, after the sort.
#ifndef CUDA_CAPACITY_CUH
#define CUDA_CAPACITY_CUH
#include "take_best.cuh"

// The choice that is served as i-th, of a group of n tokens.
__device__ int choice_served(int i, int n, int K, int order) {
    return order == BY_CHOICE ? i % n * K + i / n : i;
}

// What another block may write at the same time, as a whole: before or after. (PTX ISA, memory consistency model:
// volatile and atomic accesses do not race with each other.)
__device__ int read_at_once(const int *p) {
#ifdef CUDACPU
    return __atomic_load_n(p, __ATOMIC_RELAXED);
#else
    return *(const volatile int *)p;
#endif
}

// The choices as candidates of the units that have a capacity. One after the other is served; a unit refuses
// a choice if so many came before, and an exempt one never. Whether exempt ones come before or not, all
// choices up to the capacity are taken. So these are the first `capacity` ones, or those with the highest
// weights, and the exempt ones.
struct UnitsChoice {
    Service s;

    BOTH size_t size(int) const {
        return (size_t)s.group * s.K;
    }
    __device__ size_t at(size_t i, int group) const {
        return (size_t)group * s.group * s.K + choice_served((int)i, s.group, s.K, s.order);
    }
    __device__ Rank rank(size_t i, int group, int first, int mine, int *unit) const {
        // While other blocks read a choice here, put() may make it -1. They see one or the other, and to them it
        // is the same: a choice of none of their units.
        int e = read_at_once(&s.served[at(i, group)]), u = e < 0 ? -1 : group_of(e, s.E, s.units) - first;
        *unit = u >= 0 && u < mine ? u : -1;
        return rank_of(s.order == BY_SCORE && *unit >= 0 ? order_of(s.weight[at(i, group)]) : 0, (unsigned)i);
    }
    __device__ void put(size_t i, int group, int, int, int taken) const {
        size_t choice = at(i, group);
        if (!taken && !(s.exempt && s.exempt[choice / s.K])) {
            atomicExch(&s.served[choice], -1);
        }
    }
    __device__ void end(int, int, unsigned) const {
    }
};

// The expert with the highest score that token n has not chosen and that is not full, by a warp; 0: there is
// none.
__device__ Rank next_best(const Service &s, const int *taken, size_t n) {
    Rank best = 0;
    for (int e = threadIdx.x; e < s.E; e += 32) {
        int open = taken[e] < s.capacity;
        for (int k = 0; k < s.K; k++) {
            open &= s.expert[n * s.K + k] != e;
        }
        Rank rank = open ? rank_of(order_of(s.p[n * s.E + e]), e) : 0;
        best = rank > best ? rank : best;
    }
    return warp_best(best);
}

// --overflow next: one warp a group of tokens, which goes through its choices one after the other, its lanes
// over the experts.
__global__ void serve_next_kernel(Service s) {
    extern __shared__ float4 dynamic[];
    int *taken = (int *)dynamic, choices = s.group * s.K, lane = threadIdx.x;
    size_t first = (size_t)blockIdx.x * choices;
    for (int e = lane; e < s.E; e += 32) {
        taken[e] = 0;
    }
    __syncwarp();
    for (int base = 0; base < choices; base += 32) {
        int i = base + lane, mine = i < choices ? choice_served(i, s.group, s.K, s.order) : 0;
        int served = i < choices ? s.served[first + mine] : -1;
        for (int j = 0; j < min_int(32, choices - base); j++) {
            size_t choice = first + __shfl_sync(ALL_LANES, mine, j), n = choice / s.K;
            int e = __shfl_sync(ALL_LANES, served, j);
            if (e < 0) {
                continue;
            }
            int refused = taken[e] >= s.capacity && !(s.exempt && s.exempt[n]);
            Rank best = refused ? next_best(s, taken, n) : 0;
            __syncwarp(); // all have read
            if (lane == 0 && refused) {
                s.served[choice] = best ? index_of(best) : -1;
                s.expert[choice] = best ? index_of(best) : e;
            }
            if (lane == 0 && (!refused || best)) {
                taken[refused ? index_of(best) : e]++;
            }
            __syncwarp();
        }
    }
}

void serve(const Service *s, int N) {
    int groups = N / s->group;
    if (s->p) {
        serve_next_kernel<<<groups, 32, s->E * sizeof(int), stream>>>(*s);
        CHECK(cudaGetLastError());
    } else {
        take_best(UnitsChoice{*s}, groups, s->units, s->capacity);
    }
}

// An expert takes at most ceil(factor * topk * tokens / E) choices of a group, first choices first; at
// evaluation early tokens first. r->served becomes -1 where a choice is refused.
void drop_overflow(Model *m, int l, double factor) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    double capacity = ceil(factor * c->topk * r->group / r->E - 1e-9);
    int order = m->batch.mode == TRAIN_MODE ? BY_CHOICE : BY_TOKEN,
        limit = (int)fmin(capacity, (double)r->group * r->K);
    Service s = {r->E, r->K, r->group, r->E, limit, order, r->served, r->expert, NULL, NULL, NULL};
    gpu::serve(&s, r->N);
}

// ---- groups of tokens that are spread over ranks

// Each rank serves the tokens of all, and keeps what becomes of its own, which are N.
void serve_spread(Model *m, const Service *mine, int N) {
    Service all = *mine;
    size_t tokens = mine->group, K = mine->K, size = (size_t)N * K;
    all.served = scratch_ints(m, tokens * K);
    size_t first = K * gather_tokens(m, all.served, mine->served, K * sizeof(int));
    if (mine->p) {
        float *p = scratch(m, tokens * mine->E);
        all.expert = scratch_ints(m, tokens * K);
        gather_tokens(m, all.expert, mine->expert, K * sizeof(int));
        gather_tokens(m, p, mine->p, mine->E * sizeof(float));
        all.p = p;
    }
    if (mine->order == BY_SCORE) {
        float *weight = scratch(m, tokens * K);
        gather_tokens(m, weight, mine->weight, K * sizeof(float));
        all.weight = weight;
    }
    if (mine->exempt) {
        unsigned char *exempt = (unsigned char *)scratch_bytes(m, tokens);
        gather_tokens(m, exempt, mine->exempt, 1);
        all.exempt = exempt;
    }
    gpu::serve(&all, mine->group);
    copy_ints(mine->served, all.served + first, size, cudaMemcpyDeviceToDevice);
    if (mine->p) {
        copy_ints(mine->expert, all.expert + first, size, cudaMemcpyDeviceToDevice);
    }
}

// ---- the part

void capacity_allocate(Model *m, int l, int n) {
    (void)l;
    const Config *c = &m->config;
    size_t K = most_choices(c), bytes = n;
    if (is_spread(c)) {
        bytes += most_tokens(c, n) * (K * (2 * sizeof(int) + sizeof(float)) + c->experts * sizeof(float) + 1);
    }
    part_needs(m, bytes, 0);
}

__global__ void mark_exempt_kernel(unsigned char *exempt, int N, int subtokens, int T, uint64_t random,
                                   uint64_t first, double share) {
    int n = (int)thread_of_grid();
    if (n < N) {
        exempt[n] = random_uniform(random, (first + n / subtokens) / T) < share;
    }
}

// exempt (N): in training chance exempts some sequences, with all their tokens, in all layers. NULL: none.
const unsigned char *exempt_tokens(Model *m, int N) {
    const Config *c = &m->config;
    if (m->batch.mode != TRAIN_MODE || c->drop_exempt <= 0) {
        return NULL;
    }
    unsigned char *exempt = (unsigned char *)scratch_bytes(m, N);
    uint64_t random = random_stream((uint64_t)c->seed, RANDOM_EXEMPT, (uint64_t)m->batch.step, 0);
    uint64_t first = (uint64_t)m->batch.first_token;
    mark_exempt_kernel<<<blocks(N), THREADS, 0, stream>>>(exempt, N, c->subtokens, m->batch.T, random, first,
                                                          c->drop_exempt);
    CHECK(cudaGetLastError());
    return exempt;
}

// A rank may have no tokens (N 0), while others have some.
void capacity_forward(Model *m, int l, const float *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, train = m->batch.mode == TRAIN_MODE,
        units = c->capacity_unit == EXPERT_GROUP ? c->groups : r->E;
    int group = ranks_group_size(m, r);
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    double capacity = ceil(factor * c->topk * group / units - 1e-9);
    const float *p = c->overflow == NEXT ? r->p : NULL;
    Service s = {r->E,
                 r->K,
                 group,
                 units,
                 (int)fmin(capacity, (double)group * r->K),
                 train ? c->drop_order : BY_TOKEN,
                 r->served,
                 r->expert,
                 r->weight,
                 p,
                 exempt_tokens(m, N)};
    if (is_spread(c)) {
        serve_spread(m, &s, N);
    } else {
        gpu::serve(&s, N);
    }

    // Other experts have other weights.
    if (c->overflow == NEXT && N > 0) {
        weights_forward(r->weight, r->p, r->expert, N, r->E, r->K, c->gate, c->scale);
    }
}

const Kernels capacity_kernels = {&capacity_part, capacity_allocate, capacity_forward, NULL, NULL};

#endif
