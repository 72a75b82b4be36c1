// Both forms of the lesson's chapter 2 in one program: behind this #include, matmul() is the plain loop of train_moe.c and
// fast_matmul() is the function of dev/cpu, and so on for all the names of dev/cpu/fast.h, choice.h and lstm.h. Functions that were compiled
// before keep what they call. Needs: train_moe.c, which must be included before, with or without -DPLAIN.

#pragma once
#include "dev/cpu/fast.h"
#include "dev/cpu/choice.h"
#include "dev/cpu/lstm.h"
#include "dev/cpu/plain_names.h"

// The experts, row after row, by the lesson's plain loops: for each row of its own or, with `token`, for that token's row of
// x and dout. Shapes and arguments are those of experts_forward and experts_backward; act (rows,F) is kept, too.
void plain_experts_forward(real *answer, real *hidden, real *act, const real *x, const real *w_in, const real *w_out,
                           const int *token, const int *offset, const Experts *s) {
    int C = s->C;
    for (int e = 0; e < s->E; e++) {
        int F = s->F[e], H = s->hidden[e];
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            const real *own = x + (size_t)(token ? token[r] : r) * C;
            matmul(hidden, own, w_in, 1, C, H, SET);
            activation_forward(act, hidden, 1, F, s->activation[e]);
            matmul(answer, act, w_out, 1, F, C, SET);
            hidden += H;
            act += F;
            answer += C;
        }
        w_in += (size_t)H * C;
        w_out += (size_t)C * F;
    }
}

void plain_experts_backward(real *dx, real *dweight, real *dw_in, real *dw_out, const real *dout, const real *x,
                            const real *hidden, const real *weight, const real *w_in, const real *w_out,
                            const int *token, const int *choice, const int *offset, const Experts *s) {
    int C = s->C;
    for (int e = 0; e < s->E; e++) {
        int F = s->F[e], H = s->hidden[e];
        real *dact = allocate_reals(F), *dhidden = allocate_reals(H);
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            size_t own = (size_t)(token ? token[r] : r) * C;
            matmul_dx(dact, dout + own, w_out, 1, F, C, SET);
            activation_backward(dhidden, dweight, dact, hidden, weight, choice + r, 1, F, s->activation[e]);
            matmul_dw(dw_out, dout + own, dact, 1, F, C); // dact is weight * act by now
            matmul_dw(dw_in, dhidden, x + own, 1, C, H);
            matmul_dx(dx, dhidden, w_in, 1, C, H, SET);
            hidden += H;
            dx += C;
        }
        free(dact);
        free(dhidden);
        w_in += (size_t)H * C;
        dw_in += (size_t)H * C;
        w_out += (size_t)C * F;
        dw_out += (size_t)C * F;
    }
}
