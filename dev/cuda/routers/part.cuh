// What a part of a router is on the device, and how parts are called: as struct Router of train_moe.c.
// Gives: Kernels, kernels_of, run_parts, has_part; for parts gather_tokens, decided, take_over.
// Needs: Model of train_moe.cu, which includes it; dev/cuda/nccl.cuh.
#ifndef CUDA_PART_CUH
#define CUDA_PART_CUH

struct Kernels { // what dev/routers says in C of a part of a router: its functions on the device
    const ::Router *of;
    void (*allocate)(Model *m, int l, int n);
    void (*forward)(Model *m, int l, const float *x);
    void (*backward)(Model *m, int l, float *dx, float *dweight, const float *x);
    void (*update)(Model *m, int l);
};
const Kernels *kernels_of(const ::Router *r); // NULL: it has none

// Runs the parts that work at this place; returns how many there are.
int run_parts(Model *m, int l, const float *x, int place) {
    int count = 0;
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == place) {
            kernels_of(m->parts[i])->forward(m, l, x);
            count++;
        }
    }
    return count;
}

// Is there such a part?
int has_part(const Model *m, int place) {
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == place) {
            return 1;
        }
    }
    return 0;
}

// ---- for parts

// The C twin's choices for this layer; NULL: the device chooses.
const Decided *decided(const Model *m, int l) {
    return m->decided && m->config.overflow != NEXT ? &m->decided[l] : NULL;
}

// Choices that a test takes over from the C twin: replaces expert (n) by them, unless host is NULL.
void take_over(int *expert, const int *host, size_t n) {
    if (host) {
        copy_ints(expert, host, n, cudaMemcpyHostToDevice);
    }
}

// All tokens' rows of the group, in order, where the group is spread over processes: each token's `bytes`. Returns how
// many tokens come before this process's.
int gather_tokens(const Model *m, void *all, const void *mine, size_t bytes) {
    int before = 0, at = 0;
    follow(network, stream);
    nccl_begin();
    for (int r = 0; r < ranks.size; r++) {
        int tokens = m->crossing->rank_tokens[r] * m->config.subtokens;
        nccl_broadcast(mine, (char *)all + at * bytes, tokens * bytes, r);
        before += r < ranks.rank ? tokens : 0;
        at += tokens;
    }
    nccl_end();
    wait_for_network();
    return before;
}

#endif
