// Several processes: rank 0 reads and writes for all, in the order of a single process.
// Gives: ranks_fetch, ranks_store, ranks_forget, file_offset, file_size. Needs: comm.h, experts.h, gradients.h; of
// train_moe.c the table of weights.
//
// A checkpoint does not tell how many processes wrote it: any number of them can go on with it.
#ifndef RANKS_FILES_H
#define RANKS_FILES_H

// Where a tensor begins in the memory that ranks_fetch returns: common tensors first, then the experts, as a single
// process has them.
size_t file_offset(const Model *m, int tensor) {
    size_t at = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        int differ = m->tensors[i].of_experts - m->tensors[tensor].of_experts;
        at += differ < 0 || (differ == 0 && i < tensor) ? m->tensors[i].whole : 0;
    }
    return at;
}

// Numbers in that memory.
size_t file_size(const Model *m) {
    size_t size = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        size += m->tensors[i].whole;
    }
    return size;
}

// All WEIGHTS, GRADS, MOMENT1 or MOMENT2, gathered by rank 0. The others get as much memory, with nothing in it.
real *ranks_fetch(Model *m, int what) {
    real *mine = m->memory[what];
    if (!MANY) {
        return mine;
    }
    Crossing *x = m->crossing;
    if (!x->fetched[what]) {
        x->fetched[what] = allocate_reals(file_size(m));
    }
    real *to = x->fetched[what], *common = mine, *slices = NULL;
    int moments = what == MOMENT1 || what == MOMENT2;
    if (moments) {
        common = slices = (real *)gather_parts(mine, (x->slice_end - x->slice) * sizeof(real), ranks.size, NULL);
    }
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (t->of_experts) {
            size_t at = moments ? moment_offset(m, t->offset) : t->offset;
            gather_parts(mine + at, t->size * sizeof(real), ranks.ep, to + file_offset(m, i));
        } else if (ranks.rank == 0) {
            memcpy(to + file_offset(m, i), common + t->offset, t->size * sizeof(real));
        }
    }
    free(slices);
    return to;
}

// Takes over this process's part of the memory that ranks_fetch gave, after that was filled from a file.
void ranks_store(Model *m, int what) {
    int moments = what == MOMENT1 || what == MOMENT2;
    if (!MANY) {
        return;
    }
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        const real *from = m->crossing->fetched[what] + file_offset(m, i) + t->first;
        size_t at = t->offset, size = t->size;
        if (moments) {
            ranks_own_range(m, t, &at, &size);
        }
        if (size > 0) {
            real *to = m->memory[what] + (moments ? moment_offset(m, at) : at);
            memcpy(to, from + (at - t->offset), size * sizeof(real));
        }
    }
}

// Frees the memory that ranks_fetch gave.
void ranks_forget(Model *m) {
    if (!m->crossing) {
        return;
    }
    for (int what = 0; what < 4; what++) {
        free(m->crossing->fetched[what]);
        m->crossing->fetched[what] = NULL;
    }
}

#endif
