// Several processes: the busiest experts of a layer have a second copy on another process, which shares their work.
// Gives: exchange_copies, ranks_move_copies; for the CUDA twin list_copies, choose_copies. Needs: comm.h, experts.h;
// of train_moe.c the table of weights and Statistics.
//
// The owner of an expert updates it. The gradients of its copy are added to the owner's before, and the owner sends
// the new weights after. Every --replicate-every steps, other experts may get the copies.
#ifndef RANKS_COPIES_H
#define RANKS_COPIES_H

// Numbers of expert e's part of t, which is w_in or w_out.
size_t expert_size(const Config *c, const Tensor *t, int e) {
    int width = strcmp(t->kind, "w_in") ? expert_width(c, e) : expert_hidden(c, e);
    return (size_t)width * (size_t)(c->dim / c->subtokens);
}

// Where the part of t begins, in memory, that belongs to expert `number` of this process.
size_t expert_offset(const Model *m, const Tensor *t, int number) {
    const Experts *here = &m->crossing->placement->here[t->layer];
    const int *width = strcmp(t->kind, "w_in") ? here->F : here->hidden;
    size_t offset = t->offset;
    for (int i = 0; i < number; i++) {
        offset += (size_t)width[i] * here->C;
    }
    return offset;
}

typedef struct Copy { // a matrix of an expert that has two copies, one of them here
    int partner;      // the member of the group that has the other
    int owned;        // 1: this process owns the expert
    size_t at, size;  // where the matrix is in m->memory[what]
} Copy;

// All of them, in the same order on all processes; to be freed.
Copy *list_copies(const Model *m, int *count) {
    const Config *c = &m->config;
    const Placement *p = m->crossing->placement;
    Copy *list = (Copy *)allocate((size_t)m->tensor_count * c->experts, sizeof(Copy));
    *count = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (!t->of_experts) {
            continue;
        }
        for (int e = 0; e < c->experts; e++) {
            int at = t->layer * c->experts + e, host = p->host[at], owner = e / p->owned, owned = owner == ranks.member;
            if (host >= 0 && (owned || host == ranks.member)) {
                int number = owned ? e - owner * p->owned : p->owned + p->nth[at];
                Copy copy = {owned ? host : owner, owned, expert_offset(m, t, number), expert_size(c, t, e)};
                list[(*count)++] = copy;
            }
        }
    }
    return list;
}

// GRADS: adds the gradients of copies to the owners' and clears them. WEIGHTS: sends the owners' weights to the copies.
void exchange_copies(Model *m, int what) {
    int count;
    Copy *list = list_copies(m, &count);
    size_t coming = 0;
    for (int i = 0; i < count; i++) {
        coming += what == GRADS && list[i].owned ? list[i].size : 0;
    }
    real *arrived = allocate_reals(coming), *to = arrived;
    Request *requests = (Request *)allocate(count, sizeof(Request));
    for (int i = 0; i < count; i++) {
        const Copy *copy = &list[i];
        real *matrix = m->memory[what] + copy->at;
        if (what == GRADS && copy->owned) {
            start_receive(to, copy->size, copy->partner, what, &requests[i]);
            to += copy->size;
        } else if (what == WEIGHTS && !copy->owned) {
            start_receive(matrix, copy->size, copy->partner, what, &requests[i]);
        } else {
            ranks.traffic.reduced += (double)(copy->size * sizeof(real));
            start_send(matrix, copy->size, copy->partner, what, &requests[i]);
        }
    }
    ranks_wait(requests, count);

    if (what == GRADS) {
        const real *from = arrived;
        for (int i = 0; i < count; i++) {
            real *matrix = m->memory[GRADS] + list[i].at;
            for (size_t j = 0; j < list[i].size; j++) {
                matrix[j] = list[i].owned ? matrix[j] + from[j] : 0;
            }
            from += list[i].owned ? list[i].size : 0;
        }
    }
    free(requests);
    free(arrived);
    free(list);
}

// Gives second copies to those experts of layer l that have been busiest over the last steps: one after the other,
// on the member of the group that has the least to do by then.
void choose_layer_copies(Model *m, int l) {
    const Config *c = &m->config;
    Placement *p = m->crossing->placement;
    const double *recent = m->stats[l].recent;
    int E = c->experts, *host = p->host + (size_t)l * E, *nth = p->nth + (size_t)l * E;
    Ranked *busy = (Ranked *)allocate(E, sizeof(Ranked));
    double *load = (double *)allocate(ranks.ep, sizeof(double));
    int *used = (int *)allocate(ranks.ep, sizeof(int)); // copies that each member has by now
    for (int e = 0; e < E; e++) {
        busy[e].score = recent[e];
        busy[e].index = e;
        load[e / p->owned] += recent[e];
        host[e] = -1;
    }
    for (int i = 0; i < p->copies; i++) {
        p->copy[l * p->copies + i] = -1;
    }
    qsort(busy, E, sizeof(Ranked), compare_ranked);
    for (int i = 0; i < min_int(p->copies, E); i++) {
        int e = busy[i].index, owner = e / p->owned, least = -1;
        for (int r = 0; r < ranks.ep; r++) {
            if (r != owner && (least < 0 || load[r] < load[least])) {
                least = r;
            }
        }
        load[owner] -= recent[e] / 2;
        load[least] += recent[e] / 2;
        host[e] = least;
        nth[e] = used[least]++;
        if (least == ranks.member) {
            p->copy[l * p->copies + nth[e]] = e;
        }
    }
    place_experts(m, l);
    free(busy);
    free(load);
    free(used);
}

void choose_copies(Model *m) {
    for (int l = 0; l < m->config.layers; l++) {
        if (is_moe(&m->config, l)) {
            choose_layer_copies(m, l);
        }
    }
}

int has_copies(const Model *m) {
    return MANY && m->config.replicate && m->crossing->placement;
}

// After an update.
void ranks_move_copies(Model *m, int step) {
    if (has_copies(m)) {
        if (step % m->config.replicate_every == 0) {
            choose_copies(m);
        }
        exchange_copies(m, WEIGHTS);
    }
}

#endif
