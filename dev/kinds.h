// Experts of several kinds: with --mixed they differ in width and activation (dev/routers/mixed.h).
// Gives: sorted_size, experts_activation_forward, experts_activation_backward. Needs: Experts, and the activations of
// train_moe.c, which includes it.
#pragma once

// How many numbers a sorted array has whose rows are width[e] wide.
size_t sorted_size(const int *offset, int E, const int *width) {
    size_t size = 0;
    for (int e = 0; e < E; e++) {
        size += (size_t)(offset[e + 1] - offset[e]) * width[e];
    }
    return size;
}

// The first expert after e that is not like e, in width and activation; E: all are.
int next_kind(const Experts *s, int e) {
    int next = e + 1;
    while (next < s->E && s->F[next] == s->F[e] && s->activation[next] == s->activation[e]) {
        next++;
    }
    return next;
}

// The activation of all experts. Neighbours that are alike are done together; in most recipes all
// experts are.
void experts_activation_forward(real *act, const real *hidden, const int *offset, const Experts *s) {
    for (int e = 0, next; e < s->E; e = next) {
        next = next_kind(s, e);
        int rows = offset[next] - offset[e];
        activation_forward(act, hidden, rows, s->F[e], s->activation[e]);
        act += (size_t)rows * s->F[e];
        hidden += (size_t)rows * s->hidden[e];
    }
}

void experts_activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden, const real *weight,
                                 const int *choice, const int *offset, const Experts *s) {
    for (int e = 0, next; e < s->E; e = next) {
        next = next_kind(s, e);
        int rows = offset[next] - offset[e];
        activation_backward(dhidden, dweight, dact, hidden, weight, choice, rows, s->F[e], s->activation[e]);
        dact += (size_t)rows * s->F[e];
        hidden += (size_t)rows * s->hidden[e];
        dhidden += (size_t)rows * s->hidden[e];
        choice += rows;
    }
}
