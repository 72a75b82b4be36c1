// A table of word pairs, and triples, that is looked up (--ngrams): each token's last words have a vector of their own.
// Gives: ngram_row, ngram_orders, find_ngrams, remember_token, ngrams_forward, ngrams_backward, ngram_gate_forward,
// ngram_gate_backward.
// Needs: Model, its memory and the layers of train_moe.c, which includes it; dev/tables.h. doc/ngrams.md is the chapter.
//
// A row is found by its number and added; no product is computed. So such a table holds many weights and costs little
// time: it is conditional computation, as experts are, with a choice that is not learned. Only rows that a step has read
// have a gradient, and only they move (dev/tables.h, dev/read_rows.h).
//
// --ngrams R: before layer 0 the embedding of each token gets row hash(word before, word) mod R of one more table, so that
// the first layer already knows which two words met. With --ngram-order 3 it also gets the row of the last three words, by
// another hash in the same table. What falls on one row shares it. Hashed n-grams as embeddings: Roy et al. 2022, N-Grammer;
// Huang et al. 2025, Over-Tokenized Transformer, section 3.
//
// --ngram-gate: each layer may take the token's vector e (C), the sum of its rows, once more, as far as it wants to:
//     out += g * v * e,    g = sigmoid(sum over c of y[c] * k[c] * e[c] / sqrt(C)),    y = mid / rms(mid)
// where mid is the residual stream behind attention, and k and v (C) are weights of the layer: k, which begins at 0, says
// for which states the vector is of use, v, which begins at 1, which parts of it. Cheng et al. 2026, Conditional Memory via
// Scalable Lookup (Engram), have matrices in the place of k and v, a norm of the key, too, and a convolution behind them;
// vectors do what is essential, and cost no product.
#ifdef CONFIG_FIELDS
    int ngrams;      // rows of the table; 0: there is none
    int ngram_order; // 2: pairs; 3: pairs and triples
    int ngram_gate;
#elif !defined(NGRAMS_H)
#define NGRAMS_H
#include "tables.h"

// ---- which rows?

// The row of a pair, or with order 3 of a triple of words, in a table of so many rows. first and before are -1 where the
// text has not begun.
int ngram_row(int first, int before, int word, int order, int rows) {
    uint64_t hash = hash64((uint64_t)(before + 1) << 32 | (uint64_t)word);
    if (order == 3) {
        hash = hash64(hash ^ hash64((uint64_t)(first + 1)));
    }
    return (int)(hash % (uint64_t)rows);
}

// How many rows a token looks up: by its pair, by its triple.
int ngram_orders(const Config *c) {
    return c->ngram_order - 1;
}

// row (orders,N): each token's rows, for sequences of T tokens. before (2): the two tokens before each sequence, which only
// generation knows; NULL: a text begins.
void find_ngrams(const Config *c, int *row, const int *tokens, const int *before, int N, int T) {
    int orders = ngram_orders(c);
    for (int n = 0; n < N; n++) {
        int last[2]; // the tokens before this one
        for (int back = 1; back <= 2; back++) {
            int outside = n % T - back; // below 0: before the sequence
            last[2 - back] = outside >= 0 ? tokens[n - back] : -1;
            if (outside < 0 && before) {
                last[2 - back] = before[2 + outside];
            }
        }
        for (int order = 2; order <= orders + 1; order++) {
            row[(size_t)(order - 2) * N + n] = ngram_row(last[0], last[1], tokens[n], order, c->ngrams);
        }
    }
}

// Generation goes on from token: `before` (2) has the last two tokens of the text.
void remember_token(int *before, int token, int position) {
    before[0] = position ? before[1] : -1;
    before[1] = token;
}

// ---- before layer 0

// x (N,C) += each token's row of table (.., C)
void add_table_rows(real *x, const real *table, const int *row, int N, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        fetch_row(table + (size_t)row[min_int(n + LOOK_AHEAD, N - 1)] * C, (size_t)C * sizeof(real));
        for (int c = 0; c < C; c++) {
            x[(size_t)n * C + c] += table[(size_t)row[n] * C + c];
        }
    }
}

// x (N,C) is the tokens' embedding, and gets what their last words add. before: as in find_ngrams().
void ngrams_forward(Model *m, real *x, const int *before) {
    const Config *c = &m->config;
    Lookup *lookup = m->lookup;
    int N = m->batch.B * m->batch.T, C = c->dim;
    if (!c->ngrams) {
        return;
    }
    find_ngrams(c, lookup->row, m->batch.inputs, before, N, m->batch.T);
    if (c->ngram_gate) {
        memset(lookup->sum, 0, (size_t)N * C * sizeof(real));
    }
    for (int i = 0; i < ngram_orders(c); i++) {
        const int *row = lookup->row + (size_t)i * N;
        add_table_rows(x, m->params.ngrams, row, N, C);
        if (c->ngram_gate) {
            add_table_rows(lookup->sum, m->params.ngrams, row, N, C);
        }
    }
}

// The table's gradient, from dx (N,C), the gradient by layer 0's input, and from what the layers took.
void ngrams_backward(Model *m, const real *dx) {
    const Config *c = &m->config;
    Lookup *lookup = m->lookup;
    int N = m->batch.B * m->batch.T, C = c->dim;
    if (!m->grads.ngrams) { // there is no table, or it is frozen
        return;
    }
    for (size_t i = 0; c->ngram_gate && i < (size_t)N * C; i++) {
        lookup->dsum[i] += dx[i];
    }
    for (int i = 0; i < ngram_orders(c); i++) {
        embedding_backward(m->grads.ngrams, c->ngram_gate ? lookup->dsum : dx, lookup->row + (size_t)i * N, N, C);
    }
    note_rows(&lookup->read[BY_NGRAM], lookup->row, N * ngram_orders(c));
}

// ---- in each layer

// Of token n: 1 / rms(x), the gate's logit, and the gate.
typedef struct NgramGate {
    real rstd, logit, gate;
} NgramGate;

NgramGate ngram_gate_of(const real *x, const real *e, const real *key, int C, double eps) {
    double squares = 0;
    real dot = 0;
    for (int c = 0; c < C; c++) {
        squares += (double)x[c] * (double)x[c];
        dot += x[c] * key[c] * e[c];
    }
    NgramGate t;
    t.rstd = (real)(1 / sqrt(squares / C + eps));
    t.logit = dot * t.rstd / (real)sqrt((double)C);
    t.gate = (real)(1 / (1 + exp(-(double)t.logit)));
    return t;
}

// out (N,C) += what layer l takes of the tokens' vectors. x (N,C): its residual stream behind attention.
void ngram_gate_forward(Model *m, int l, real *out, const real *x) {
    const real *key = m->params.layer[l].ngram_key, *value = m->params.layer[l].ngram_value, *sum = m->lookup->sum;
    int N = m->batch.B * m->batch.T, C = m->config.dim;
    double eps = m->config.norm_eps;
    if (!key) {
        return;
    }
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        const real *e = sum + (size_t)n * C;
        real gate = ngram_gate_of(x + (size_t)n * C, e, key, C, eps).gate;
        for (int c = 0; c < C; c++) {
            out[(size_t)n * C + c] += gate * value[c] * e[c];
        }
    }
}

// The gradients by key and value. For each token, gate (N), and slope (N): the derivative by the sum over c of
// x[c]*key[c]*e[c]. A task owns some of the columns, so any number of threads gives the same bits.
void ngram_gate_weights_backward(real *dkey, real *dvalue, const real *dout, const real *x, const real *sum, const real *gate,
                           const real *slope, int N, int C) {
    enum { WIDTH = 16 };
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int first = 0; first < C; first += WIDTH) {
        int width = min_int(WIDTH, C - first);
        double of_key[WIDTH] = {0}, of_value[WIDTH] = {0};
        for (int n = 0; n < N; n++) {
            size_t at = (size_t)n * C + first;
            for (int i = 0; i < width; i++) {
                of_key[i] += (double)(slope[n] * x[at + i] * sum[at + i]);
                of_value[i] += (double)(gate[n] * dout[at + i] * sum[at + i]);
            }
        }
        for (int i = 0; i < width; i++) {
            dkey[first + i] += (real)of_key[i];
            dvalue[first + i] += (real)of_value[i];
        }
    }
}

// The way back through ngram_gate_forward(): dx (N,C) comes in as the gradient by the layer's output, and gets what the gate adds
// to that by the residual stream behind attention. Backward goes from the last layer to the first.
void ngram_gate_backward(Model *m, int l, real *dx) {
    const Config *c = &m->config;
    const real *key = m->params.layer[l].ngram_key, *value = m->params.layer[l].ngram_value;
    const real *x = m->acts.layer[l].mid, *sum = m->lookup->sum;
    real *dsum = m->lookup->dsum;
    int N = m->batch.B * m->batch.T, C = c->dim;
    if (!key) {
        return;
    }
    scratch_reset(m);
    real *gate = scratch(m, N), *slope = scratch(m, N), *fall = scratch(m, N), root = (real)sqrt((double)C);
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        const real *e = sum + (size_t)n * C, *dout = dx + (size_t)n * C;
        NgramGate t = ngram_gate_of(x + (size_t)n * C, e, key, C, c->norm_eps);
        real dgate = 0;
        for (int i = 0; i < C; i++) {
            dgate += dout[i] * value[i] * e[i];
        }

        // The logit depends on x as such, by slope, and through the norm, by fall: d rstd / d x_j = -rstd^3 x_j / C.
        real dlogit = dgate * t.gate * (1 - t.gate);
        gate[n] = t.gate;
        slope[n] = dlogit * t.rstd / root;
        fall[n] = dlogit * t.logit * t.rstd * t.rstd / (real)C;
    }
    ngram_gate_weights_backward(m->grads.layer[l].ngram_key, m->grads.layer[l].ngram_value, dx, x, sum, gate, slope, N, C);
#pragma omp parallel for if (is_worth_threads(N, C))
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < C; i++) {
            size_t at = (size_t)n * C + i;
            real before = l == c->layers - 1 ? 0 : dsum[at];
            dsum[at] = before + gate[n] * value[i] * dx[at] + slope[n] * x[at] * key[i];
            dx[at] += slope[n] * key[i] * sum[at] - fall[n] * x[at];
        }
    }
}

#endif
