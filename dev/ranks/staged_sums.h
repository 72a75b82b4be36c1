// Several processes: sums of the gradients of experts that are in a file (--offload).
// Gives: stage, unstage, staged_count, staged_bytes. Needs: dev/offload.h; Model of train_moe.c; gradients.h calls it.
//
// Where --ep is less than the number of processes, several have the same experts, and their gradients are summed up while
// backward still works. A message would bring all experts of a tensor into memory until it has come, and a network card cannot
// send from a file that is mapped. So the gradients of the layer that is done are copied to memory of their own, and summed up
// there while backward goes on with the next layer. Then they go back to the file. Before that layer's sums begin, all that are
// under way must have come, those of common weights, too: no sum overlaps with more than one layer. It is the same message as
// without --offload, so the sums have the same bits, and processes with and without --offload can sum up together.
#ifndef RANKS_STAGED_SUMS_H
#define RANKS_STAGED_SUMS_H
#include "../offload.h"

typedef struct Staged {
    real *numbers; // where they belong
    real *copy;    // where they are while they are under way
    size_t n;
} Staged;

// Those of the last layer that is done: of w_in and of w_out.
Staged staged[2];
int staged_count = 0;

// Copies n numbers, of which those that lie in a file do not stay in memory.
void copy_staged(real *to, const real *from, size_t n) {
    const size_t piece = 1 << 18;
    for (size_t i = 0, k; i < n; i += k) {
        k = n - i < piece ? n - i : piece;
        about_to_pass(from + i, k);
        about_to_pass(to + i, k);
        memcpy(to + i, from + i, k * sizeof(real));
        passed_over(from + i, k);
        passed_over(to + i, k);
    }
}

// The gradients of a tensor of experts are complete. Returns the copy of them that can be sent.
real *stage(real *numbers, size_t n) {
    if (staged_count == COUNT(staged)) {
        fail("--offload: there are more than %d tensors in a layer", COUNT(staged));
    }
    Staged s = {numbers, allocate_reals(n), n};
    copy_staged(s.copy, numbers, n);
    staged[staged_count++] = s;
    return s.copy;
}

// The sums have come: they go where the gradients belong.
void unstage(void) {
    for (int i = 0; i < staged_count; i++) {
        copy_staged(staged[i].numbers, staged[i].copy, staged[i].n);
        free(staged[i].copy);
    }
    staged_count = 0;
}

// The most that any layer takes; 0 where nothing is staged.
size_t staged_bytes(const Model *m) {
    size_t most = 0;
    if (!m->config.offload || ranks.groups == 1 || m->config.compress) {
        return 0;
    }
    for (int l = 0; l < m->config.layers; l++) {
        size_t size = 0;
        for (int i = 0; i < m->tensor_count; i++) {
            size += m->tensors[i].layer == l && m->tensors[i].of_experts ? m->tensors[i].size : 0;
        }
        most = size > most ? size : most;
    }
    return most * sizeof(real);
}

#endif
