// The memory of a model: what lives as long as it does, and scratch memory for the part that works now.
// Gives: own, own_reals, own_arrays, own_by_group, scratch, scratch_reset. Needs: Model of train_moe.c, which includes it.
#ifndef MEMORY_H
#define MEMORY_H
#include "offload.h" // experts that are in a file

// Zeroed memory that lives as long as the model. It is booked under m->purpose, for the table that the program prints.
void *own(Model *m, size_t count, size_t size) {
    m->bytes[m->purpose] += count * size;
    if (m->owned_count % 64 == 0) {
        m->owned = (void **)reallocate(m->owned, (size_t)m->owned_count + 64, sizeof(void *));
    }
    return m->owned[m->owned_count++] = allocate(count, size);
}

real *own_reals(Model *m, size_t count) {
    return (real *)own(m, count, sizeof(real));
}

size_t trained_size(const Model *m); // lora_tensors.h

// The model's memory[]: that of WEIGHTS, unless the weights are those of another model; in training those of gradients and moments,
// too. With --offload the experts' part of each is in a file.
void own_arrays(Model *m, int train, real *weights) {
    const int purpose[] = {FOR_WEIGHTS, FOR_GRADIENTS, FOR_MOMENTS, FOR_MOMENTS};
    int last = train ? MOMENT2 : WEIGHTS;
    m->memory[WEIGHTS] = weights;
    for (int what = weights ? GRADS : WEIGHTS; what <= last; what++) {
        size_t count = what == WEIGHTS ? m->size : trained_size(m);
        count = what < MOMENT1 ? count : moment_offset(m, count);
        m->purpose = purpose[what];
        m->memory[what] = m->config.offload ? offload_array(m, what, count, last) : own_reals(m, count);
    }
    m->purpose = FOR_WEIGHTS; // the lists of pointers to them come next
}

// Memory for `each` numbers for every group of n tokens. There are as many groups as tokens only where sequences
// have one token; else the system never gives most of these pages.
double *own_by_group(Model *m, int n, int each) {
    const Config *c = &m->config;
    m->bytes[FOR_ACTIVATIONS] += (size_t)n * each * sizeof(double) / (c->group == SEQUENCE ? c->seq : n);
    m->purpose = HARDLY_TOUCHED;
    double *memory = (double *)own(m, (size_t)n * each, sizeof(double));
    m->purpose = FOR_ACTIVATIONS;
    return memory;
}

// Scratch memory for the part of a layer that works now; what is in it is undefined. The next scratch_reset() takes it back.
real *scratch(Model *m, size_t count) {
    return (real *)arena_take(&m->scratch, count, sizeof(real));
}

void scratch_reset(Model *m) {
    arena_reset(&m->scratch);
}

#include "quantized.h" // weights of few bits, which have memory of their own

#endif
