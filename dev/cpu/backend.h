// What the training loop asks of the CPU: the functions of train_moe.c in a Backend.
// Gives: cpu_backend, cpu_update, cpu_statistics, cpu_route. Needs: the model, the optimizer and Backend of train_moe.c,
// which includes it; dev/generate.h, dev/ranks/files.h, dev/statistics.h.
//
// On the CPU all numbers are where the program can read them, so most of these functions only hand them over.
#pragma once
#include "peak.h" // what this processor can do at most

void cpu_forward(Model *m, const Batch *batch) {
    model_forward(m, batch);
}

// Where the norm is not finite nothing changes, and end_step() of dev/run.h ends the program.
void cpu_update(Model *m, int step, double lr) {
    let_go_of_array(m, GRADS); // --offload: what comes now goes over all experts
    m->norm = gradient_norm(m);
    if (isfinite(m->norm)) {
        let_go_of_array(m, WEIGHTS);
        model_update(m, step, lr, m->norm);
    }
}

// With --offload a tensor that was read or written as a whole does not stay in memory.
void cpu_read(Model *m, int what, int tensor, real *to) {
    ranks_read(m, what, tensor, to);
    let_go_of_tensor(m, what, tensor);
}

void cpu_write(Model *m, int what, int tensor, const real *from) {
    ranks_write(m, what, tensor, from);
    let_go_of_tensor(m, what, tensor);
}

void cpu_losses(Model *m, double *loss, double *aux, double *norm) {
    *loss = m->loss;
    *aux = m->aux;
    *norm = m->norm;
}

const Statistics *cpu_statistics(const Model *m, int l) {
    return &m->stats[l];
}

const Route *cpu_route(const Model *m, int l) {
    return &m->acts.layer[l].route;
}

double cpu_memory(void) {
    return 0;
}

const Backend cpu_backend = {
    "cpu",          model_allocate, model_free, model_init,  cpu_forward, model_backward, cpu_update, cpu_losses,
    model_generate, cpu_statistics, cpu_route,  cpu_read,    cpu_write,   measured_peak,  no_sheet,   cpu_name,
    cpu_memory,     set_statistics,
};
