// Balanced assignment on a GPU: see dev/routers/balanced.h.
// Gives: balanced_kernels. Needs: pieces.cuh.
//
// One block works for a group of tokens. It does what the C twin does, but does at once what may come in any
// order: all costs, and all steps from one expert to the others.
#ifndef CUDA_BALANCED_CUH
#define CUDA_BALANCED_CUH
#include "pieces.cuh"

const int MOST_EXPERTS = 4096; // as --experts allows
const unsigned short NOWHERE = 0xffff;

// What moving tokens between experts would cost: see ::Moves. In the device's memory, for each block.
struct Moves {
    int n, E;           // tokens of a group
    int *expert;        // (n) expert of each token
    const float *score; // (n,E)
    Rank *cost;         // (E,E) as order_of_loss()
    int *mover;         // (E,E)
    int *excess;        // (E)
    int *list;          // (n) tokens whose costs are found anew
};

struct Chains { // in shared memory
    double far[MOST_EXPERTS];
    unsigned short from[MOST_EXPERTS]; // NOWHERE: a chain begins here
    unsigned char stale[MOST_EXPERTS];
    int left;   // tokens that must move
    int listed; // tokens in list
    int again;  // 1: far and from have changed
    int end; // expert where the cheapest chain ends; INT_MAX: there is none, because a score is not a number
};

// Losses in their order, as whole numbers, so that atomicMin() finds the least.
__device__ Rank order_of_loss(double loss) {
    Rank bits = (Rank)__double_as_longlong(loss + 0.0); // 0 for -0
    return bits >> 63 ? ~bits : bits | (Rank)1 << 63;
}

__device__ double loss_of(Rank order) {
    return __longlong_as_double((long long)(order >> 63 ? order & ~((Rank)1 << 63) : ~order));
}

// Each token has its best expert. Counts how many tokens each expert has too many, and how many must move.
__device__ void begin_moves(const Moves &s, Chains &chains) {
    for (int e = threadIdx.x; e < s.E; e += blockDim.x) {
        s.excess[e] = -(s.n / s.E) - (e < s.n % s.E);
        chains.stale[e] = 1;
    }
    if (threadIdx.x == 0) {
        chains.left = 0;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < s.n; t += blockDim.x) {
        atomicAdd(&s.excess[s.expert[t]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < s.E; e += blockDim.x) {
        atomicAdd(&chains.left, max_int(0, s.excess[e]));
    }
    __syncthreads();
}

// Finds the rows of cost and mover that have changed.
__device__ void find_costs(const Moves &s, Chains &chains) {
    for (int a = 0; a < s.E; a++) {
        for (int b = threadIdx.x; chains.stale[a] && b < s.E; b += blockDim.x) {
            s.cost[(size_t)a * s.E + b] = order_of_loss(INFINITY);
            s.mover[(size_t)a * s.E + b] = INT_MAX;
        }
    }
    if (threadIdx.x == 0) {
        chains.listed = 0;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < s.n; t += blockDim.x) {
        if (chains.stale[s.expert[t]]) {
            s.list[atomicAdd(&chains.listed, 1)] = t;
        }
    }
    __syncthreads();
    for (int pass = 0; pass < 2; pass++) { // the least loss, then the first token that has it
        for (size_t i = threadIdx.x; i < (size_t)chains.listed * s.E; i += blockDim.x) {
            int t = s.list[i / s.E], a = s.expert[t], b = (int)(i % s.E);
            size_t at = (size_t)a * s.E + b;
            double loss = (double)s.score[(size_t)t * s.E + a] - (double)s.score[(size_t)t * s.E + b];
            if (!(loss < INFINITY)) {
                continue;
            }
            if (pass == 0) {
                atomicMin(&s.cost[at], order_of_loss(loss));
            } else if (s.cost[at] == order_of_loss(loss)) {
                atomicMin(&s.mover[at], t);
            }
        }
        __syncthreads();
    }
}

// Finds far and from, by the algorithm of Bellman and Ford.
__device__ void find_chains(const Moves &s, Chains &chains) {
    for (int e = threadIdx.x; e < s.E; e += blockDim.x) {
        chains.stale[e] = 0;
        chains.far[e] = s.excess[e] > 0 ? 0 : INFINITY;
        chains.from[e] = NOWHERE;
    }
    if (threadIdx.x == 0) {
        chains.again = 0;
    }
    __syncthreads();
    for (int round = 0, more = 1; more && round < s.E; round++) {
        for (int a = 0; a < s.E; a++) {
            for (int b = threadIdx.x; chains.far[a] < INFINITY && b < s.E; b += blockDim.x) {
                double far = chains.far[a] + loss_of(s.cost[(size_t)a * s.E + b]);
                if (a != b && far < chains.far[b] - 1e-12) { // by less, rounding could lead in a circle
                    chains.far[b] = far;
                    chains.from[b] = (unsigned short)a;
                    atomicOr(&chains.again, 1);
                }
            }
            __syncthreads();
        }
        more = chains.again;
        __syncthreads(); // all have seen it
        if (threadIdx.x == 0) {
            chains.again = 0;
        }
        __syncthreads();
    }
}

// Finds the expert with too few tokens to which the cheapest chain leads; by the first warp.
__device__ void find_end(const Moves &s, Chains &chains) {
    double least = INFINITY;
    int best = INT_MAX;
    for (int e = threadIdx.x; e < s.E; e += 32) {
        if (s.excess[e] < 0 && chains.far[e] < least) {
            least = chains.far[e];
            best = e;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        double other = __shfl_xor_sync(ALL_LANES, least, step);
        int its = __shfl_xor_sync(ALL_LANES, best, step);
        best = other < least || (other == least && its < best) ? its : best;
        least = fmin(least, other);
    }
    if (threadIdx.x == 0) {
        chains.end = best;
        chains.left = best == INT_MAX ? 0 : chains.left - 1;
    }
}

// Moves a token along each step of the chain, from its end to its beginning; by one thread.
__device__ void move_along(const Moves &s, Chains &chains) {
    int end = chains.end;
    s.excess[end]++;
    for (; chains.from[end] != NOWHERE; end = chains.from[end]) {
        int before = chains.from[end];
        s.expert[s.mover[(size_t)before * s.E + end]] = end;
        chains.stale[end] = chains.stale[before] = 1;
    }
    s.excess[end]--;
}

__global__ void __launch_bounds__(1024) select_balanced_kernel(Moves s, int groups) {
    __shared__ Chains chains;
    size_t squared = (size_t)s.E * s.E;
    int *first = s.expert;
    const float *score = s.score;
    s.cost += blockIdx.x * squared;
    s.mover += blockIdx.x * squared;
    s.excess += (size_t)blockIdx.x * s.E;
    s.list += (size_t)blockIdx.x * s.n;
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        s.expert = first + (size_t)group * s.n;
        s.score = score + (size_t)group * s.n * s.E;
        begin_moves(s, chains);
        while (chains.left > 0) {
            find_costs(s, chains);
            find_chains(s, chains);
            if (threadIdx.x < 32) {
                find_end(s, chains);
            }
            __syncthreads();
            if (threadIdx.x == 0 && chains.end < INT_MAX) {
                move_along(s, chains);
            }
            __syncthreads();
        }
        __syncthreads();
    }
}

// Blocks of select_balanced(): as many as groups of tokens, if their scratch memory stays below 256 MiB.
int balancers(int E, int groups) {
    double each = (double)E * E * (sizeof(Rank) + sizeof(int));
    return max_int(1, (int)fmin(groups, (double)(1 << 28) / each));
}

// The scratch memory of select_balanced(), of groups of n tokens.
size_t balancing_bytes(int n, int E, int groups) {
    size_t squared = (size_t)E * E;
    return balancers(E, groups) * (squared * (sizeof(Rank) + sizeof(int)) + ((size_t)E + n) * sizeof(int));
}

// expert (groups*n): the assignment with the largest sum of score (groups*n,E) that gives each expert its
// share of each group. memory: balancing_bytes()
void select_balanced(int *expert, const float *score, int n, int E, int groups, void *memory) {
    size_t count = balancers(E, groups), squared = count * E * E;
    Rank *cost = (Rank *)memory;
    int *mover = (int *)(cost + squared), *excess = mover + squared, *list = excess + count * E;
    Moves s = {n, E, expert, score, cost, mover, excess, list};
    select_topk(expert, score, groups * n, E, 1);
    select_balanced_kernel<<<(int)count, threads_for((size_t)n * E), 0, stream>>>(s, groups);
    CHECK(cudaGetLastError());
}

void balanced_allocate(Model *m, int l, int n) {
    const Config *c = &m->config;
    (void)l;
    int E = c->experts, groups = most_groups(m);
    int tokens = c->group == SEQUENCE ? c->seq * c->subtokens : (int)most_tokens(c, n);
    part_needs(m, choose_bytes(c, n) + balancing_bytes(tokens, E, groups), 2 * (size_t)n * E * sizeof(float));
}

void choose_balanced(Model *m, int l, int *expert, const float *score, int group, int groups) {
    (void)l;
    int E = m->config.experts;
    select_balanced(expert, score, group, E, groups, scratch_bytes(m, balancing_bytes(group, E, groups)));
}

void balanced_forward(Model *m, int l, const float *x) {
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int N = r->N, E = r->E;
    gpu::matmul(r->logits, x, m->params.layer[l].router, N, router_width(c), E, SET);
    scores_forward(r->p, r->lse, r->logits, N, E, c->score);
    if (m->batch.mode == TRAIN_MODE) {
        choose_by_groups(m, l, r->logits, choose_balanced);
    } else {
        select_topk(r->expert, r->p, N, E, 1);
    }
    take_choices(m, l);
    weights_forward(r->weight, r->p, r->expert, N, E, 1, c->gate, c->scale);
}

const Kernels balanced_kernels = {&balanced_router, balanced_allocate, balanced_forward, topk_backward, NULL};

#endif
