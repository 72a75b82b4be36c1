// Several processes: the experts are divided among them. Rows go to where their experts are, and answers come back.
// Gives: Crossing, Placement, ranks_allocate, ranks_free, ranks_begin_batch, ranks_experts_forward,
// ranks_experts_backward. Needs: comm.h; of train_moe.c Model, scratch, sort_by_expert, experts_forward,
// experts_backward and combine.
//
// A token's row is sent once to each process that has some of its experts, together with their numbers and weights.
// There it is a token like any other: the process sorts the rows that came by expert, lets its experts work on them,
// adds up the answers to each row, and sends one row back. Where --ep divides the number of groups of experts, no
// group is on two processes, so a router that chooses within M groups sends a row to M processes at most.
//
// The tokens go in two portions, so that one can be under way while the experts work on the other.
#ifndef RANKS_EXPERTS_H
#define RANKS_EXPERTS_H
#include "compress.h"
#include "staged_sums.h"

// Where the experts of all layers are, among the members of a group. Each member owns E/ep of them, and has memory
// for copies of some busy ones that others own (copies.h). The number of an expert on its process counts those that
// the process owns, then its copies.
typedef struct Placement {
    int owned, copies; // experts that each member owns, and for how many copies it has memory
    int *host;         // (L,E) the member that has the expert's second copy; -1: there is none
    int *nth;          // (L,E) which of that member's copies it is
    int *copy;         // (L,copies) the experts that this process has copies of; -1: no copy
    Experts *here;     // (L) the shapes of the experts of this process
} Placement;

typedef struct Buffer { // memory that grows with what comes
    void *memory;
    size_t bytes;
} Buffer;

// One portion of a layer's tokens. What was sent and what came is kept for the backward pass, which sends gradients
// the same ways.
typedef struct Exchange {
    int begin, end;                       // the tokens begin .. end-1
    int rows, came;                       // rows sent to all members of the group, and received from all
    int *sent, *sent_at, *got, *got_at;   // (ep) rows to each member and from each, and where they begin
    int *token;                           // (rows) the token of each row that was sent
    Route route;                          // of the rows that came, to the experts of this process
    real *x, *hidden;                     // (came,C), and the experts' first products
    Buffer integers, numbers, products;   // memory of the arrays above
    // In the scratch arena, while rows are under way:
    real *choices_out, *choices;          // (rows,2K), (came,2K): K weights, then K numbers of experts, -1: not there
    real *out, *in;                       // (rows,C), (came,C)
    real *answer, *back;                  // (came,C), (rows,C)
    real *dweight, *dweight_back;         // (came,K), (rows,K)
    Request request[2];
    int requests;
    int narrow;                           // rows of x's width are bfloat16 on their way (--compress-rows)
    real *widened;                        // then: the rows that are coming, as such
    size_t widened_count;
} Exchange;

// What a model has only where several processes train it.
typedef struct Crossing {
    size_t slice, slice_end; // of the common weights, this process updates the numbers slice .. slice_end (gradients.h)
    size_t summing;          // of the common gradients, the sums of those from this number on have begun
    int *rank_tokens;        // (processes) tokens that each has in this batch
    Placement *placement;    // NULL: all experts are on each process
    Exchange *exchange;      // (L,2)
    int *came;               // (L) rows that came in the last forward pass
    real *lost;              // --compress: what has not arrived of the gradients, by their offsets (compressed_sums.h)
    unsigned char *code, *coming; // the same on GPUs: the codes of a message
} Crossing;

int most_choices(const Config *c);

// Memory for `count` things of this size. What was in the buffer is lost when it grows.
void *grow_buffer(Buffer *b, size_t count, size_t size) {
    if (count * size > b->bytes || !b->memory) {
        free(b->memory);
        b->bytes = count * size / 4 * 5;
        b->memory = allocate(b->bytes, 1);
    }
    return b->memory;
}

// The member of the group to which token n of a member goes for expert e, and the expert's number there. Of two
// copies, the one on the token's own process is best; else even tokens go to the owner, odd ones to the other.
BOTH int rank_of_expert(const int *host, const int *nth, int owned, int member, int e, int n, int *number) {
    int owner = e / owned, to = owner;
    if (host[e] >= 0 && owner != member && (host[e] == member || n % 2)) {
        to = host[e];
    }
    *number = to == owner ? e - owner * owned : owned + nth[e];
    return to;
}

// ---- memory

// The shapes of the experts that this process has in layer l. A copy that it does not have is 0 wide.
void place_experts(Model *m, int l) {
    const Config *c = &m->config;
    const Placement *p = m->crossing->placement;
    const Experts *x = &p->here[l];
    for (int i = 0; i < x->E; i++) {
        int e = i < p->owned ? ranks.member * p->owned + i : p->copy[l * p->copies + i - p->owned];
        x->in[i] = x->out[i] = x->C;
        x->F[i] = e < 0 ? 0 : expert_width(c, e);
        x->hidden[i] = e < 0 ? 0 : expert_hidden(c, e);
        x->activation[i] = e < 0 ? c->activation : expert_activation(c, e);
    }
}

void allocate_placement(Model *m) {
    const Config *c = &m->config;
    Placement *p = m->crossing->placement = (Placement *)own(m, 1, sizeof(Placement));
    p->owned = c->experts / ranks.ep;
    p->copies = c->replicate;
    int each = p->owned + p->copies, L = c->layers;
    size_t all = (size_t)L * c->experts, here = (size_t)L * each;
    p->host = (int *)own(m, 2 * all, sizeof(int));
    p->nth = p->host + all;
    p->copy = (int *)own(m, (size_t)L * p->copies, sizeof(int));
    p->here = (Experts *)own(m, L, sizeof(Experts));
    memset(p->host, -1, all * sizeof(int));
    memset(p->copy, -1, (size_t)L * p->copies * sizeof(int));
    int *integers = (int *)own(m, 5 * here, sizeof(int)); // in, out, F, H and activation, each of all layers
    for (int l = 0; l < L; l++) {
        int *first = integers + (size_t)l * each;
        int C = c->dim / c->subtokens;
        Experts x = {each, C, first, first + here, first + 2 * here, first + 3 * here, first + 4 * here};
        p->here[l] = x;
        place_experts(m, l);
    }
}

// Most rows that N tokens send: one to each process that has some of a token's experts.
size_t most_rows(const Config *c, int N) {
    return (size_t)N * c->subtokens * min_int(most_choices(c), ranks.ep);
}

// Numbers that the rows of N tokens take of the scratch arena while they are under way, where the load is even.
size_t ranks_scratch(const Config *c, int N) {
    return ranks.ep > 1 ? most_rows(c, N) * 4 * (c->dim / c->subtokens + most_choices(c)) : 0;
}

// What a model of N tokens needs for several processes.
void ranks_allocate(Model *m, int N) {
    const Config *c = &m->config;
    Crossing *x = m->crossing;
    if (!MANY) {
        return;
    }
    x->rank_tokens = (int *)own(m, ranks.size, sizeof(int));
    if (c->compress && m->memory[GRADS]) {
        int before = m->purpose;
        m->purpose = FOR_GRADIENTS;
        x->lost = own_reals(m, m->tables);
        m->bytes[FOR_GRADIENTS] += 2 * code_bytes(codec_of(c), m->tables); // codes that go and come, until backward is done
        m->purpose = before;
    }
    if (m->memory[GRADS]) {
        m->bytes[FOR_GRADIENTS] += staged_bytes(m); // --offload
    }
    if (ranks.ep == 1 || !moe_layers(c)) {
        return;
    }
    allocate_placement(m);
    x->came = (int *)own(m, c->layers, sizeof(int));
    x->exchange = (Exchange *)own(m, (size_t)2 * c->layers, sizeof(Exchange));
    for (int i = 0; i < 2 * c->layers; i++) {
        Exchange *ex = &x->exchange[i];
        ex->sent = (int *)own(m, (size_t)ranks.ep * 4, sizeof(int));
        ex->sent_at = ex->sent + ranks.ep;
        ex->got = ex->sent_at + ranks.ep;
        ex->got_at = ex->got + ranks.ep;
        ex->narrow = c->compress_rows;
    }

    // The buffers grow with what comes; an even load is booked.
    size_t K = (size_t)most_choices(c), C = (size_t)(c->dim / c->subtokens);
    size_t hidden = (size_t)N * c->subtokens * K * c->ffn * (1 + is_gated(c->activation));
    m->bytes[m->purpose] += moe_layers(c) * (most_rows(c, N) * (C + K) + hidden) * sizeof(real);
}

void ranks_free(Model *m) {
    Crossing *x = m->crossing;
    if (!x) {
        return;
    }
    int exchanges = x->exchange ? 2 * m->config.layers : 0;
    for (int i = 0; i < exchanges; i++) {
        free(x->exchange[i].integers.memory);
        free(x->exchange[i].numbers.memory);
        free(x->exchange[i].products.memory);
    }
}

// A batch begins. Where a group of tokens has members in all processes, each has to know how many the others have.
void ranks_begin_batch(Model *m) {
    int N = m->batch.B * m->batch.T;
    if (!MANY) {
        return;
    }
    m->crossing->rank_tokens[ranks.rank] = N;
    if (m->config.group != SEQUENCE) {
        double *count = (double *)allocate(ranks.size, sizeof(double));
        count[ranks.rank] = N;
        sum_over_ranks(count, ranks.size);
        for (int r = 0; r < ranks.size; r++) {
            m->crossing->rank_tokens[r] = (int)count[r];
        }
        free(count);
    }
}

// Rows that the experts of this process worked on in the last forward pass.
int ranks_came(const Model *m, int l) {
    return ranks.ep > 1 ? m->crossing->came[l] : m->acts.layer[l].route.N;
}

// ---- rows under way

// Sends rows of `bytes` to the processes that have the experts (THERE), or back to those from which they came (BACK), and
// receives such.
enum { THERE, BACK };
void send_bytes(Exchange *ex, int way, const void *out, void *in, size_t bytes) {
    const int *sent = way == THERE ? ex->sent : ex->got, *sent_at = way == THERE ? ex->sent_at : ex->got_at;
    const int *got = way == THERE ? ex->got : ex->sent, *got_at = way == THERE ? ex->got_at : ex->sent_at;
    for (int r = 0; r < ranks.ep; r++) {
        ranks.traffic.sent += r == ranks.member ? 0 : (double)bytes * sent[r];
    }
    start_all_to_all(out, sent, sent_at, in, got, got_at, bytes, &ex->request[ex->requests++]);
}

// The same with rows of `width` numbers, which stay as they are.
void send_rows(Exchange *ex, int way, const real *out, real *in, int width) {
    send_bytes(ex, way, out, in, (size_t)width * sizeof(real));
}

// The same with rows of x, or of answers, or of gradients by these. With --compress-rows they are rounded in `out`, and
// await_rows() makes numbers of those that have come.
void send_wide_rows(Exchange *ex, int way, real *out, real *in, int C) {
    size_t go = (size_t)(way == THERE ? ex->rows : ex->came), come = (size_t)(way == THERE ? ex->came : ex->rows);
    if (!ex->narrow) {
        send_rows(ex, way, out, in, C);
        return;
    }
    narrow(out, go * C);
    ex->widened = in;
    ex->widened_count = come * C;
    send_bytes(ex, way, out, narrow_part(in, come * C), (size_t)C * BF16_BYTES);
}

// Scratch memory for rows under way. Also where there are none the address is a new one: MPI takes equal ones for
// one array.
real *rows_scratch(Model *m, int rows, int width) {
    return scratch(m, (size_t)rows * width + 1);
}

void await_rows(Exchange *ex) {
    ranks_wait(ex->request, ex->requests);
    ex->requests = 0;
    if (ex->widened) {
        widen(ex->widened, narrow_part(ex->widened, ex->widened_count), ex->widened_count);
        ex->widened = NULL;
    }
}

// Sends the rows of x (N,C) there.
void send_tokens(Model *m, Exchange *ex, const real *x, real *in, int C) {
    ex->out = rows_scratch(m, ex->rows, C);
#pragma omp parallel for if (ex->rows > 16)
    for (int row = 0; row < ex->rows; row++) {
        memcpy(ex->out + (size_t)row * C, x + (size_t)ex->token[row] * C, (size_t)C * sizeof(real));
    }
    send_wide_rows(ex, THERE, ex->out, in, C);
}

// out (N,width) += the rows that came back. One process sends back at most one row for a token.
void add_rows(real *out, const real *back, const Exchange *ex, int width) {
    for (int r = 0; r < ranks.ep; r++) {
        int first = ex->sent_at[r], end = first + ex->sent[r];
#pragma omp parallel for if (end - first > 16)
        for (int row = first; row < end; row++) {
            for (int i = 0; i < width; i++) {
                out[(size_t)ex->token[row] * width + i] += back[(size_t)row * width + i];
            }
        }
    }
}

// Where token n goes for its choice k, and the expert's number there; -1: nowhere, the choice was refused.
int member_of_choice(const Model *m, int l, int n, int k, int *number) {
    const Route *r = &m->acts.layer[l].route;
    const Placement *p = m->crossing->placement;
    size_t layer = (size_t)l * m->config.experts;
    int e = r->served[n * r->K + k];
    return e < 0 ? -1 : rank_of_expert(p->host + layer, p->nth + layer, p->owned, ranks.member, e, n, number);
}

// Goes through the tokens of a portion, which have one row for each member to which they go, be it for several
// experts. The first time it counts the rows: ex->sent. Then it writes them down, each member's from sent_at on:
// ex->token and ex->choices_out.
void list_rows(const Model *m, int l, Exchange *ex, int writing) {
    const Route *r = &m->acts.layer[l].route;
    int K = r->K, number = 0;
    int *count = (int *)allocate((size_t)2 * ranks.ep, sizeof(int)), *last = count + ranks.ep;
    memset(last, -1, (size_t)ranks.ep * sizeof(int));
    for (int n = ex->begin; n < ex->end; n++) {
        for (int k = 0; k < K; k++) {
            int to = member_of_choice(m, l, n, k, &number);
            if (to < 0) {
                continue;
            }
            if (last[to] != n) { // a new row
                last[to] = n;
                count[to]++;
            }
            if (writing) {
                int row = ex->sent_at[to] + count[to] - 1;
                ex->token[row] = n;
                ex->choices_out[(size_t)row * 2 * K + k] = r->weight[n * K + k];
                ex->choices_out[(size_t)row * 2 * K + K + k] = (real)number;
            }
        }
    }
    memcpy(ex->sent, count, (size_t)ranks.ep * sizeof(int));
    free(count);
}

// From how many rows go to each member, or come from each: where they begin. Returns the number of all.
int begin_rows(int *at, const int *rows) {
    int total = 0;
    for (int r = 0; r < ranks.ep; r++) {
        at[r] = total;
        total += rows[r];
    }
    return total;
}

// Finds out how many rows each member sends here, of all portions in one message: ex->got.
void share_counts(Exchange *exchange, int portions) {
    int *out = (int *)allocate((size_t)4 * ranks.ep, sizeof(int)), *in = out + 2 * ranks.ep; // (ep,portions)
    for (int i = 0; i < portions * ranks.ep; i++) {
        out[i] = exchange[i % portions].sent[i / portions];
    }
    all_to_all(out, in, portions);
    for (int i = 0; i < portions * ranks.ep; i++) {
        exchange[i % portions].got[i / portions] = in[i];
    }
    free(out);
}

// Memory for what is sent and for what comes.
void lay_exchange(Model *m, Exchange *ex, int E, int K, int C) {
    size_t rows = (size_t)ex->rows, came = (size_t)ex->came;
    ex->token = (int *)grow_buffer(&ex->integers, rows + 4 * came * K + E + 1, sizeof(int));
    ex->x = (real *)grow_buffer(&ex->numbers, came * (C + K), sizeof(real));
    Route *r = &ex->route;
    r->N = ex->came;
    r->E = E;
    r->K = K;
    r->weight = ex->x + came * C;
    r->served = ex->token + rows;
    r->row = r->served + came * K;
    r->choice = r->row + came * K;
    r->token = r->choice + came * K;
    r->offset = r->token + came * K;
    ex->choices_out = rows_scratch(m, ex->rows, 2 * K);
    ex->choices = rows_scratch(m, ex->came, 2 * K);
    ex->answer = rows_scratch(m, ex->came, C);
    ex->back = rows_scratch(m, ex->rows, C);
    for (size_t i = 0; i < rows * 2 * K; i++) {
        ex->choices_out[i] = (real)(i / K % 2 ? -1 : 0);
    }
}

// Sorts the rows that came by their experts.
void sort_rows(Exchange *ex) {
    Route *r = &ex->route;
    for (int i = 0; i < r->N * r->K; i++) {
        const real *choices = ex->choices + (size_t)(i / r->K) * 2 * r->K;
        r->weight[i] = choices[i % r->K];
        r->served[i] = (int)choices[r->K + i % r->K];
    }
    sort_by_expert(r);
}

// What the experts took of the scratch arena for one portion, they may take again for the next.
void give_back(Model *m, size_t used) {
    if (m->scratch.outside_count == 0) {
        m->scratch.used = used;
    }
}

// ---- forward and backward

// out (N,C) += the experts' answers to x (N,C), weighted.
void ranks_experts_forward(Model *m, int l, real *out, const real *x) {
    const LayerParams *w = &m->params.layer[l];
    const Experts *here = &m->crossing->placement->here[l];
    Exchange *exchange = &m->crossing->exchange[2 * l];
    int portions = 1 + m->config.overlap, K = m->acts.layer[l].route.K, C = here->C, *came = &m->crossing->came[l];
    long N = m->acts.layer[l].route.N;

    // How many rows go, and how many come?
    for (int i = 0; i < portions; i++) {
        exchange[i].begin = (int)(N * i / portions);
        exchange[i].end = (int)(N * (i + 1) / portions);
        list_rows(m, l, &exchange[i], 0);
        exchange[i].rows = begin_rows(exchange[i].sent_at, exchange[i].sent);
    }
    share_counts(exchange, portions);

    // The tokens set out, with the numbers of their experts and the weights.
    *came = 0;
    for (int i = 0; i < portions; i++) {
        Exchange *ex = &exchange[i];
        ex->came = begin_rows(ex->got_at, ex->got);
        *came += ex->came;
        lay_exchange(m, ex, here->E, K, C);
        list_rows(m, l, ex, 1);
        send_rows(ex, THERE, ex->choices_out, ex->choices, 2 * K);
        send_tokens(m, ex, x, ex->x, C);
    }

    // The experts work on each portion when it has come. Its answers go back while they work on the next one.
    for (int i = 0; i < portions; i++) {
        Exchange *ex = &exchange[i];
        const Route *r = &ex->route;
        await_rows(ex);
        sort_rows(ex);
        ex->hidden = (real *)grow_buffer(&ex->products, sorted_size(r->offset, here->E, here->hidden), sizeof(real));
        size_t used = m->scratch.used;
        real *rows = scratch(m, (size_t)r->offset[here->E] * C);
        experts_forward(m, rows, ex->hidden, ex->x, w->w_in, w->w_out, r->token, r->offset, here);
        memset(ex->answer, 0, (size_t)ex->came * C * sizeof(real));
        combine(ex->answer, rows, r->weight, r->row, ex->came, K, C);
        give_back(m, used);
        send_wide_rows(ex, BACK, ex->answer, ex->back, C);
    }
    for (int i = 0; i < portions; i++) {
        await_rows(&exchange[i]);
        add_rows(out, exchange[i].back, &exchange[i], C);
    }
}

// Given dout (N,C): dx (N,C) += , dweight (N,K) += , and the gradients of the experts' weights += .
void ranks_experts_backward(Model *m, int l, real *dx, real *dweight, const real *dout) {
    const LayerParams *w = &m->params.layer[l], *dw = &m->grads.layer[l];
    const Experts *here = &m->crossing->placement->here[l];
    Exchange *exchange = &m->crossing->exchange[2 * l];
    int portions = 1 + m->config.overlap, K = m->acts.layer[l].route.K, C = here->C;

    // The gradients by the answers go where the tokens went.
    for (int i = 0; i < portions; i++) {
        Exchange *ex = &exchange[i];
        ex->in = rows_scratch(m, ex->came, C);
        ex->answer = rows_scratch(m, ex->came, C);
        ex->back = rows_scratch(m, ex->rows, C);
        ex->dweight = rows_scratch(m, ex->came, K);
        ex->dweight_back = rows_scratch(m, ex->rows, K);
        send_tokens(m, ex, dout, ex->in, C);
    }

    // Through the experts. The gradients by the rows, and those by their weights, go back.
    for (int i = 0; i < portions; i++) {
        Exchange *ex = &exchange[i];
        const Route *r = &ex->route;
        await_rows(ex);
        size_t used = m->scratch.used;
        real *rows = scratch(m, (size_t)r->offset[here->E] * C);
        memset(ex->dweight, 0, (size_t)ex->came * K * sizeof(real));
        memset(ex->answer, 0, (size_t)ex->came * C * sizeof(real));
        experts_backward(m, rows, ex->dweight, dw->w_in, dw->w_out, ex->in, ex->x, ex->hidden, r->weight, w->w_in,
                         w->w_out, r->token, r->choice, r->offset, here);
        combine(ex->answer, rows, NULL, r->row, ex->came, K, C);
        give_back(m, used);
        send_wide_rows(ex, BACK, ex->answer, ex->back, C);
        send_rows(ex, BACK, ex->dweight, ex->dweight_back, K);
    }
    for (int i = 0; i < portions; i++) {
        await_rows(&exchange[i]);
        add_rows(dx, exchange[i].back, &exchange[i], C);
        add_rows(dweight, exchange[i].dweight_back, &exchange[i], K);
    }
}

#endif
