// SwitchHead (Csordas et al. 2023, SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention): queries and keys
// are those of every attention. But each head has E matrices for its values and E for its output, of which a token takes K, by
// sigmoid scores of two routers of that head's own. The matrices of values belong to the key and value heads.
//     v[n] = sum over the chosen e of s_e(n) W_V^e x[n]          out[n] = sum over heads, chosen e of s_e(n) W_O^e att[n]
// Gives: switchhead_mixer. Needs: attention_experts.h.
#if !defined(CONFIG_FIELDS) && !defined(SWITCHHEAD_H)
#define SWITCHHEAD_H
#include "attention_experts.h"

extern const Mixer switchhead_mixer;

void switchhead_tensors(const Config *c, int l, Tensor *list, int *count) {
    int C = c->dim, D = head_width(c), E = c->attention_experts;
    add_tensor(list, count, l, "query_key", NO_FIELD, 2, 1, (c->heads + c->kv_heads) * D, C, INIT_NORMAL);
    attention_extras(c, l, list, count);
    add_tensor(list, count, l, "value_router", NO_FIELD, 2, 1, c->kv_heads * E, C, INIT_NORMAL);
    add_tensor(list, count, l, "value_experts", NO_FIELD, 3, c->kv_heads * E, D, C, INIT_NORMAL);
    add_tensor(list, count, l, "output_router", NO_FIELD, 2, 1, c->heads * E, C, INIT_NORMAL);
    add_tensor(list, count, l, "output_experts", NO_FIELD, 3, c->heads * E, C, D, INIT_RESIDUAL);
}

// x (N,C) -> queries, keys and values.
void switchhead_project(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const Route *r = &s->route[VALUES].all;
    int N = m->batch.B * m->batch.T, C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c);
    int Q = (H + 2 * KV) * D, dense = (H + KV) * D;

    // Queries and keys have one matrix, as always.
    real *query_key = scratch(m, (size_t)N * dense), *values = scratch(m, (size_t)KV * N * D);
    matmul(query_key, x, layer_tensor(m, l, "query_key", WEIGHTS), N, C, dense, SET);
    copy_columns(s->qkv, Q, query_key, dense, dense, N);

    // Each expert makes values of its own tokens, and each head of a token adds up those of its experts.
    grouped_matmul(s->rows, x, r->token, layer_tensor(m, l, "value_experts", WEIGHTS), r->offset, KV * r->E, s->of_model,
                   s->of_head);
    memset(values, 0, (size_t)KV * N * D * sizeof(real));
    combine(values, s->rows, r->weight, r->row, KV * N, r->K, D);
    for (int i = 0; i < KV; i++) {
        copy_columns(s->qkv + dense + i * D, Q, values + (size_t)i * N * D, D, D, N);
    }
}

// From dqkv's columns of values to the experts, x, and the weights of the choices. dx (N,C) is added to.
void values_backward(Model *m, int l, real *dx, real *dweight, const real *dqkv, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const Route *r = &s->route[VALUES].all;
    int N = r->N, C = c->dim, KV = c->kv_heads, D = head_width(c), before = (c->heads + KV) * D, Q = before + KV * D;
    int experts = KV * r->E, rows = r->offset[experts];
    real *dvalues = scratch(m, (size_t)KV * N * D), *drows = scratch(m, (size_t)rows * D);
    real *dx_rows = scratch(m, (size_t)rows * C);
    for (int i = 0; i < KV; i++) {
        copy_columns(dvalues + (size_t)i * N * D, D, dqkv + before + i * D, Q, D, N);
    }
    memset(dweight, 0, (size_t)KV * N * r->K * sizeof(real));
#pragma omp parallel for if (is_worth_threads(rows, D))
    for (int row = 0; row < rows; row++) {
        const real *d = dvalues + (size_t)(r->choice[row] / r->K) * D, *value = s->rows + (size_t)row * D;
        real weight = r->weight[r->choice[row]], sum = 0;
        for (int i = 0; i < D; i++) {
            sum += d[i] * value[i];
            drows[(size_t)row * D + i] = weight * d[i];
        }
        dweight[r->choice[row]] = sum;
    }
    begin_products();
    grouped_matmul_dw(layer_tensor(m, l, "value_experts", GRADS), drows, NULL, x, r->token, r->offset, experts,
                      s->of_model, s->of_head);
    grouped_matmul_dx(dx_rows, drows, NULL, layer_tensor(m, l, "value_experts", WEIGHTS), r->offset, experts,
                      s->of_model, s->of_head);
    end_products();
    for (int i = 0; i < KV; i++) {
        combine(dx, dx_rows, NULL, r->row + (size_t)i * N * r->K, N, r->K, C);
    }
}

void switchhead_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim, H = c->heads, KV = c->kv_heads, D = head_width(c);
    int Q = (H + 2 * KV) * D, dense = (H + KV) * D;
    scratch_reset(m);
    real *datt = scratch(m, (size_t)N * H * D), *dqkv = scratch(m, (size_t)N * Q);
    real *dquery_key = scratch(m, (size_t)N * dense);
    real *doutput_weight = scratch(m, (size_t)H * N * c->attention_topk);
    real *dvalue_weight = scratch(m, (size_t)KV * N * c->attention_topk);

    outputs_backward(m, l, datt, doutput_weight, dout);
    attention_backward(dqkv, datt, s->att, s->lse, s->qkv, B, T, H, KV, D);
    prepare_heads_backward(m, l, dqkv);
    copy_columns(dquery_key, dense, dqkv, Q, dense, N);
    matmul_backward(dx, layer_tensor(m, l, "query_key", GRADS), dquery_key, x, layer_tensor(m, l, "query_key", WEIGHTS), N,
                    C, dense, SET);
    values_backward(m, l, dx, dvalue_weight, dqkv, x);
    choose_heads_backward(m, l, VALUES, "value_router", dx, dvalue_weight, x);
    choose_heads_backward(m, l, OUTPUTS, "output_router", dx, doutput_weight, x);
}

const Recipe switchhead_recipes[] = {
    {"switchhead", 2023, 2.5, "mixtral's experts, and in attention each head takes 2 of 4 experts for values and outputs",
     "--heads 2 --attention-experts 4 --attention-topk 2 --head-width 40 --attention-aux-weight 0", "Csordas et al., SwitchHead"},
};

const Mixer switchhead_mixer = {
    .wanted = switchhead_wanted,
    .refuses = attention_refuses,
    .tensors = switchhead_tensors,
    .lay = attention_lay,
    .forward = heads_forward,
    .backward = switchhead_backward,
    .cache = attention_cache,
    .step = heads_step,
    .uses = attention_uses,
    .flops = attention_flops,
    .scratch = attention_scratch,
    .options = attention_options,
    .option_count = COUNT(attention_options),
    .effects = attention_effects,
    .effect_count = COUNT(attention_effects),
    .recipes = switchhead_recipes,
    .recipe_count = COUNT(switchhead_recipes),
};

#endif
