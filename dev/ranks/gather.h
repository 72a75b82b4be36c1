// Tokens of other processes, for routers and capacities that decide over all tokens of a group.
// Gives: is_spread, ranks_group_size, gather_tokens, choose_by_groups.
// Needs: Config, Model and Route of train_moe.c; Crossing of dev/ranks/experts.h, which counts each process's tokens.
// A sequence lies in one process. A batch or a step has tokens in all of them: there each process gathers the tokens of
// all, decides for all, and keeps what it decided about its own.
#ifndef GATHER_H
#define GATHER_H

// Do other processes have tokens of the same group?
int is_spread(const Config *c) {
    return MANY && c->group != SEQUENCE;
}

// The tokens of a group, of all processes together.
int ranks_group_size(const Model *m, const Route *r) {
    int total = 0;
    if (!is_spread(&m->config)) {
        return r->group;
    }
    for (int rank = 0; rank < ranks.size; rank++) {
        total += m->crossing->rank_tokens[rank] * m->config.subtokens;
    }
    return total;
}

// All processes' tokens in their order: each token's `width` elements of `size` bytes, to be freed. *first: how many
// tokens come before those of this process.
void *gather_tokens(const Model *m, const void *mine, int width, size_t size, int *first) {
    const int *rank_tokens = m->crossing->rank_tokens;
    *first = 0;
    for (int rank = 0; rank < ranks.rank; rank++) {
        *first += rank_tokens[rank] * m->config.subtokens;
    }
    return gather_rows(mine, rank_tokens, (size_t)(width * m->config.subtokens) * size);
}

// r->expert (N,K) by a function that looks at a group of tokens at once: it fills expert (group,K) by the numbers
// `by` (group,E). `more` is handed on to it.
void choose_by_groups(const Model *m, Route *r, const real *by,
                      void (*choose)(int *expert, const real *by, int group, int E, void *more), void *more) {
    int N = r->N, E = r->E, K = r->K, group = ranks_group_size(m, r), first = 0;
    if (!is_spread(&m->config)) {
        for (int n = 0; n < N; n += group) {
            choose(r->expert + (size_t)n * K, by + (size_t)n * E, group, E, more);
        }
        return;
    }
    real *all = (real *)gather_tokens(m, by, E, sizeof(real), &first);
    int *expert = (int *)allocate((size_t)group * K, sizeof(int));
    choose(expert, all, group, E, more);
    memcpy(r->expert, expert + (size_t)first * K, (size_t)N * K * sizeof(int));
    free(expert);
    free(all);
}

#endif
