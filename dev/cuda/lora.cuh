// Low-rank pairs beside frozen matrices (--lora) on the GPU: see dev/lora.h, which has the formulas, and dev/lora_tensors.h.
// Gives: own_pairs, merge_pairs, is_frozen, pair_dw, expert_pairs_backward, wants_router, router_pair_backward, normed_size.
// Needs: lora_products.cuh, which it includes; memory.cuh; Experts and WeightsJob of experts.cuh; low_of() and gpu::Model of
// train_moe.cu, which includes it.
//
// Products read a rounded copy of the weights, which is made as a step writes the weights. Beside a pair that copy is of
// W + s B A, made anew after each step: it costs one pass over the frozen weights, as AdamW's step does, and then forward,
// backward to dx, --recompute, evaluation and generation are the kernels that they were, at their speed. W itself stays as it
// is, in float32. (The C twin has no copy, and multiplies by B and A apart.) In float32, where there is no copy otherwise, --lora
// has one. The router is read in float32, so beside a pair it has a merged matrix of its own.
//
// Only the pairs' gradients are made, never that of a frozen matrix: dB = dout^T (s x A^T), dA = (s dout B)^T x.
#pragma once
#include "lora_products.cuh"

struct PairMemory {
    void *of_x, *of_dout; // s x A^T, s dout B (rows, blocks * rank) of the product at hand, in floatX or float
};

// Whether nobody wants the gradient of a matrix that would be at dw: it is frozen, with or without a pair.
int is_frozen(const float *dw) {
    return !dw || pair_of_gradient(dw);
}

// Numbers of the gradients that a step's norm is of, which begin with number 0.
size_t normed_size(const ::Model *m) {
    return m->config.lora ? m->pairs : m->size;
}

// ---- memory

// The rows of the largest product beside a pair, times its A's height.
size_t inner_numbers(const Model *m, int N) {
    const Config *c = &m->config;
    size_t most = 0;
    for (int i = base_tensors(m); i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        int of_experts = !strncmp(t->kind, "w_", 2), choices = of_experts ? most_choices(c) : 1;
        size_t numbers = (size_t)N * c->subtokens * choices * t->shape[1];
        most = strstr(t->kind, ".lora_A") && numbers > most ? numbers : most;
    }
    return most;
}

// Memory for pairs, and products hear of them. parent: the model whose weights this one shares, or NULL.
void own_pairs(Model *m, int N, int train, const Model *parent) {
    const Config *c = &m->config;
    if (train && c->lora % 8) { // kernels read eight numbers at a time, also of a pair
        usage_fail("--lora %d: on a GPU the rank of pairs must be a multiple of 8; ./train_moe trains others on the CPU",
                   c->lora);
    }
    for (int l = 0; c->lora && l < c->layers; l++) {
        int router = find_tensor(m, l, "router");
        if (router >= 0 && find_pair(m, router) >= 0) {
            m->params.layer[l].router = parent ? parent->params.layer[l].router : own_floats(m, m->tensors[router].size);
        }
    }
    if (c->lora && train) {
        PairMemory *p = m->pair_memory = (PairMemory *)own_host(m, 1, sizeof(PairMemory));
        m->purpose = FOR_BUFFERS;
        p->of_x = own_floats(m, inner_numbers(m, N));
        p->of_dout = own_floats(m, inner_numbers(m, N));
    }
    if (!parent && !m->dry) {
        register_pairs(m, train);
    }
}

// ---- the weights that products read

// Remakes those beside which a pair stands, where the matrix or its pair has some of the weights from .. end.
void merge_pairs(Model *m, size_t from, size_t end) {
    const Config *c = &m->config;
    const float *base = m->memory[WEIGHTS];
    for (int i = 0; i < ::pairs.count; i++) {
        const Pair *p = &::pairs.list[i];
        const float *part[] = {p->w, p->a, p->b};
        size_t size[] = {(size_t)p->O * p->I, (size_t)p->blocks * p->rank * p->I, (size_t)p->O * p->rank};
        int touched = 0;
        for (int k = 0; k < 3; k++) {
            touched |= part[k] < base + end && part[k] + p->E * size[k] > base + from;
        }
        if (p->owner != m || !touched) {
            continue;
        }
        merge_pair(low_of(m, p->w), p);
        for (int l = 0; l < c->layers; l++) {
            int router = find_tensor(m, l, "router");
            if (router >= 0 && base + m->tensors[router].offset == p->w) {
                merge_pair(m->params.layer[l].router, p);
            }
        }
    }
}

// ---- gradients

// What products multiply by: the rounded copy of a pair's matrix, or where x is float32 the matrix itself.
#ifndef FP32
const floatX *factor_of(const Pair *p, const float *matrix, const floatX *) {
    return low_of((const Model *)p->owner, matrix);
}
#endif
const float *factor_of(const Pair *, const float *matrix, const float *) {
    return matrix;
}

// The gradients of the pair that stands beside a matrix, as paired_matmul_dw of the C twin: dout (N,O), x (N,I). Returns 0 where
// the matrix is not frozen, and so has a gradient of its own, at dw.
template <class In> int pair_dw(const float *dw, const In *dout, const In *x, int N, int I, int O) {
    const Pair *p = pair_of_gradient(dw);
    if (!p || N == 0) {
        return is_frozen(dw);
    }
    const PairMemory *memory = ((const Model *)p->owner)->pair_memory;
    const In *a = factor_of(p, p->a, x), *b = factor_of(p, p->b, x);
    In *of_x = (In *)memory->of_x, *of_dout = (In *)memory->of_dout;
    int r = p->rank, R = p->blocks * r, first = 0;

    // A has the rows of all blocks one behind the other, so that one product serves them; B has a block of rows for each.
    pair_product(of_x, R, PairSide<In>{x, I, 0}, PairSide<In>{a, I, 0}, N, R, I, p->scale, SET);
    for (int block = 0; block < p->blocks; block++) {
        int rows = p->blocks == 1 ? O : p->rows[block];
        pair_product(p->db + (size_t)first * r, r, PairSide<In>{dout + first, O, 1}, PairSide<In>{of_x + block * r, R, 1},
                     rows, r, N, 1, ADD);
        pair_product(of_dout + block * r, R, PairSide<In>{dout + first, O, 0}, PairSide<In>{b + (size_t)first * r, r, 1}, N, r,
                     rows, p->scale, SET);
        first += rows;
    }
    pair_product(p->da, I, PairSide<In>{of_dout, R, 1}, PairSide<In>{x, I, 1}, R, I, N, 1, ADD);
    return 1;
}

// In place of weights_product() where the experts are frozen: the gradients of their pairs.
void expert_pairs_backward(const Experts *x, const WeightsJob &d) {
    const Pair *in = pair_of_gradient(d.dw_in), *out = pair_of_gradient(d.dw_out);
    if (!in || !out) {
        return;
    }
    const Model *m = (const Model *)in->owner;
    const PairMemory *memory = m->pair_memory;
    floatX *of_x = (floatX *)memory->of_x, *of_dout = (floatX *)memory->of_dout;
    int r = in->rank, C = x->C, F = out->I, H = in->O;
    float s = in->scale;

    // hidden = x W_in^T, with x by token
    pair_rows<true, false>(x, {d.x, low_of(m, in->a), of_x, C, C, r, 0, s});
    pair_weights<false, false>(x, {d.dhidden, of_x, x->hidden_width, r, H, r, 0, in->db});
    pair_rows<false, true>(x, {d.dhidden, low_of(m, in->b), of_dout, x->hidden_width, H, r, 0, s});
    pair_weights<false, true>(x, {of_dout, d.x, r, C, r, C, 0, in->da});

    // rows = act W_out^T, with the gradient by the rows by token, and act times the choices' weights
    pair_rows<false, false>(x, {d.act, low_of(m, out->a), of_x, x->widest, F, r, 0, s});
    pair_weights<true, false>(x, {d.dout, of_x, C, r, C, r, 0, out->db});
    pair_rows<true, true>(x, {d.dout, low_of(m, out->b), of_dout, C, C, r, 0, s});
    pair_weights<false, false>(x, {of_dout, d.act, r, x->widest, r, F, 0, out->da});
}

// ---- the fused router

// Does anybody want the gradient of layer l's router?
int wants_router(const Model *m, int l) {
    return !m->config.lora || pair_of_gradient(m->grads.layer[l].router);
}

// Its gradient, of which d (E,C) is all but the factor of the norm's weights, goes to the pair that stands beside it.
void router_pair_backward(const Model *m, int l, const float *d) {
    const Pair *p = pair_of_gradient(m->grads.layer[l].router);
    if (p) {
        pair_of_router(p, d, m->params.layer[l].norm2);
    }
}
