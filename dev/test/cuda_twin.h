// What tests need that hold a function of the CUDA twin against the C twin's function of the same name: a model of one layer,
// which has what such a function looks at, and the same model on the device; and what a layer of the C twin chose, and why.
// Gives: bare_model, bare_twin, expert_level, group_level, layer_plan, noisy_logits, deciding_scores, lowest_of.
// Needs: dev/test/cuda.h.

#pragma once
#include "dev/test/cuda.h"

// ---- models of one layer

// A model of one layer without weights. A test fills in what the function looks at that it calls. Valid until the next call.
Model *bare_model(uint64_t seed) {
    static Model m;
    static LayerActs layer;
    arena_free(&m.scratch);
    memset(&m, 0, sizeof(m));
    memset(&layer, 0, sizeof(layer));
    m.acts.layer = &layer;
    m.config.seed = (int)(seed % 1000000);
    m.config.layers = 1;
    m.config.dim = m.config.subtokens = 1;
    m.batch.step = 3;
    m.batch.scale = 1;
    return &m;
}

template <class T> T *device_twin(const T *host, size_t n) {
    return host ? on_the_device(host, n) : NULL;
}

// The same on the device: the route's arrays and the weights are copied, as far as m has them, and there is memory for scratch
// and for the plan.
// Valid until the next call, and the arrays until free_device().
gpu::Model *bare_twin(const Model *m) {
    static gpu::Model d;
    static LayerActs layer;
    static gpu::LayerActs acts;
    static LayerParams params;
    const size_t scratch_size = 4 << 20, report = gpu::SINGLE_REPORTS + gpu::stats_size(&m->config);
    Route *r = &layer.route;
    memset((void *)&d, 0, sizeof(d));
    (Model &)d = *m;
    d.acts.layer = &layer;
    d.layers = &acts;
    d.params.layer = &params;
    *r = m->acts.layer->route;
    size_t choices = (size_t)r->N * r->K, scores = (size_t)r->rows * r->E;
    size_t tables = r->group ? (size_t)(r->N / r->group) * r->E : 0;
    r->p = device_twin(r->p, scores);
    r->lse = device_twin(r->lse, r->rows);
    r->expert = device_twin(r->expert, choices);
    r->weight = device_twin(r->weight, choices);
    r->served = device_twin(r->served, choices);
    r->count = device_twin(r->count, tables);
    r->slope = device_twin(r->slope, tables);
    r->row = device_room<int>(choices);
    r->choice = device_room<int>(choices);
    r->token = device_room<int>(choices);
    r->offset = device_room<int>((size_t)r->E + 1);
    d.memory[WEIGHTS] = device_twin(m->memory[WEIGHTS], m->size);
    d.memory[GRADS] = device_twin(m->memory[GRADS], m->size);
    d.report = on_the_device((double *)take(report, sizeof(double)), report);
    d.scratch_memory = device_room<char>(scratch_size);
    d.scratch_size = scratch_size;
    size_t chunks = r->group ? (size_t)(r->N / r->group) * div_up(r->group, gpu::BLOCK_ROWS) : 0,
           E = (size_t)r->E;
    unsigned none = 0;
    d.plan.count = device_room<int>(E * chunks);
    d.plan.total = device_room<int>(E);
    d.plan.first_tile = device_room<int>(E + 1);
    d.plan.done = on_the_device(&none, 1);
    return &d;
}

// ---- what a layer chose

// The rows of scores of which a layer's experts are chosen: of the inner level where groups are chosen first.
Level expert_level(const Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    int R = m->config.routers;
    if (m->config.select == HIERARCHICAL) {
        return ((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->experts;
    }
    Level v = {R, r->E, r->K / R, 0, r->p, r->expert, r->weight};
    return v;
}

Level group_level(const Model *m, int l) {
    Level none = {};
    if (m->config.select != HIERARCHICAL) {
        return none;
    }
    return ((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->groups;
}

// The choices of the C twin's layer, for the CUDA twin to take over.
gpu::Decided layer_plan(const Model *m, int l) {
    const Route *r = &m->acts.layer[l].route;
    gpu::Decided plan = {r->expert, r->served, expert_level(m, l).chosen, group_level(m, l).chosen};
    return plan;
}

// (N,W) with noise. Of a model of the CUDA twin, too: then they are on the device.
const real *noisy_logits(const Model *m, int l) {
    if (m->config.select == HIERARCHICAL) {
        return ((const Hierarchical *)*router_state((Model *)m, l, &hierarchical_router))->noisy;
    }
    return ((const Noisy *)*router_state((Model *)m, l, &noisy_router))->logits;
}

// What decided the choice of the last pass, (n,W): scores, or logits, which have the same order.
const real *deciding_scores(Model *m, int l) {
    const Config *c = &m->config;
    const LayerActs *a = &m->acts.layer[l];
    const Route *r = &a->route;
    const real *x = c->subtokens > 1 ? subtokens_of(m, l) : a->h2;
    real *score;
    scratch_reset(m);
    if (c->history_decay > 0) {
        if (c->jitter > 0 && m->batch.mode == TRAIN_MODE) {
            x = (const real *)*router_state(m, l, &jitter_router);
        }
        if (c->recurrent) {
            x = ((const Recurrent *)*router_state(m, l, &recurrent_router))->state;
        }
        score = slow_logits(m, l, x);
    } else if (m->params.layer[l].bias) {
        score = scratch(m, (size_t)r->N * r->E);
        for (size_t i = 0; i < (size_t)r->N * r->E; i++) {
            score[i] = r->p[i] + m->params.layer[l].bias[i % r->E];
        }
    } else {
        return expert_level(m, l).p;
    }
    if (c->group_topk) {
        mask_groups(score, r->N, r->E, c->groups, c->group_topk, c->group_score);
    }
    return score;
}

// The sums of the lowest scores that each expert took (E), and how many such there were; NULL where experts do not choose.
const Lowest *lowest_of(const Model *m, int l) {
    return m->config.select == EXPERT_CHOICE
               ? (const Lowest *)*router_state((Model *)m, l, &expert_choice_router)
               : NULL;
}
