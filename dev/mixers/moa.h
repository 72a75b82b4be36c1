// MoA (Zhang et al. 2022, Mixture of Attention Heads: Selecting Attention Heads Per Token): a head is an expert. There are E of
// them, each a matrix for its queries and one for its output, and a token takes --heads of them, by one softmax router. All
// heads share one head of keys and values.
//     out[n] = sum over the chosen e of g_e(n) W_O^e attention(W_Q^e x[n], keys, values)
// The weights g of the chosen ones are divided by their sum. The paper takes that sum for a constant on the way back; here the
// gradient is the whole one, as everywhere in this program.
// Gives: moa_mixer. Needs: attention_experts.h.
#if !defined(CONFIG_FIELDS) && !defined(MOA_H)
#define MOA_H
#include "attention_experts.h"

extern const Mixer moa_mixer;

void moa_tensors(const Config *c, int l, Tensor *list, int *count) {
    int C = c->dim, D = head_width(c), E = c->attention_experts;
    add_tensor(list, count, l, "query_experts", NO_FIELD, 3, E, D, C, INIT_NORMAL);
    add_tensor(list, count, l, "key_value", NO_FIELD, 2, 1, 2 * D, C, INIT_NORMAL);
    attention_extras(c, l, list, count);
    add_tensor(list, count, l, "output_router", NO_FIELD, 2, 1, E, C, INIT_NORMAL);
    add_tensor(list, count, l, "output_experts", NO_FIELD, 3, E, C, D, INIT_RESIDUAL);
}

// x (N,C) -> the queries of the chosen heads, keys and values.
void moa_project(Model *m, int l, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const Route *r = &s->route[OUTPUTS].all;
    int N = m->batch.B * m->batch.T, C = c->dim, K = c->heads, D = head_width(c), Q = (K + 2) * D;
    real *key_value = scratch(m, (size_t)N * 2 * D), *queries = scratch(m, (size_t)N * K * D);
    real *rows = scratch(m, (size_t)r->offset[r->E] * D);
    matmul(key_value, x, layer_tensor(m, l, "key_value", WEIGHTS), N, C, 2 * D, SET);
    grouped_matmul(rows, x, r->token, layer_tensor(m, l, "query_experts", WEIGHTS), r->offset, r->E, s->of_model, s->of_head);

    // Query k of a token is that of its k-th expert. A choice that was refused has ones, which no norm divides by 0; nobody
    // reads what becomes of them.
    for (int i = 0; i < N * K; i++) {
        for (int j = 0; j < D; j++) {
            queries[(size_t)i * D + j] = r->row[i] < 0;
        }
    }
    combine(queries, rows, NULL, r->row, N * K, 1, D);
    copy_columns(s->qkv, Q, queries, K * D, K * D, N);
    copy_columns(s->qkv + K * D, Q, key_value, 2 * D, 2 * D, N);
}

void moa_backward(Model *m, int l, real *dx, const real *dout, const real *x) {
    const Config *c = &m->config;
    ExpertHeads *s = heads_of(m, l);
    const Route *r = &s->route[OUTPUTS].all;
    int B = m->batch.B, T = m->batch.T, N = B * T, C = c->dim, K = c->heads, D = head_width(c), Q = (K + 2) * D;
    scratch_reset(m);
    real *datt = scratch(m, (size_t)N * K * D), *dqkv = scratch(m, (size_t)N * Q), *dweight = scratch(m, (size_t)N * K);
    real *dqueries = scratch(m, (size_t)N * K * D), *dkey_value = scratch(m, (size_t)N * 2 * D);
    real *dx_rows = scratch(m, (size_t)r->offset[r->E] * C);

    outputs_backward(m, l, datt, dweight, dout);
    attention_backward(dqkv, datt, s->att, s->lse, s->qkv, B, T, K, 1, D);
    prepare_heads_backward(m, l, dqkv);
    copy_columns(dqueries, K * D, dqkv, Q, K * D, N);
    copy_columns(dkey_value, 2 * D, dqkv + K * D, Q, 2 * D, N);
    matmul_backward(dx, layer_tensor(m, l, "key_value", GRADS), dkey_value, x, layer_tensor(m, l, "key_value", WEIGHTS), N, C,
                    2 * D, SET);

    // As (N*K,D), the queries' gradients have a row for each choice.
    begin_products();
    grouped_matmul_dw(layer_tensor(m, l, "query_experts", GRADS), dqueries, r->choice, x, r->token, r->offset, r->E,
                      s->of_model, s->of_head);
    grouped_matmul_dx(dx_rows, dqueries, r->choice, layer_tensor(m, l, "query_experts", WEIGHTS), r->offset, r->E,
                      s->of_model, s->of_head);
    end_products();
    combine(dx, dx_rows, NULL, r->row, N, K, C);
    choose_heads_backward(m, l, OUTPUTS, "output_router", dx, dweight, x);
}

const Recipe moa_recipes[] = {
    {"moa", 2022, 2.5, "mixtral's experts, and in attention a token takes 4 of 16 heads that share keys and values",
     "--heads 4 --attention-form moa --attention-experts 16 --head-width 48 --attention-z-weight 0.001",
     "Zhang et al., Mixture of Attention Heads"},
};

const Mixer moa_mixer = {
    .wanted = moa_wanted,
    .refuses = attention_refuses,
    .tensors = moa_tensors,
    .lay = attention_lay,
    .forward = heads_forward,
    .backward = moa_backward,
    .cache = attention_cache,
    .step = heads_step,
    .uses = attention_uses,
    .flops = attention_flops,
    .scratch = attention_scratch,
    .recipes = moa_recipes,
    .recipe_count = COUNT(moa_recipes),
};

#endif
