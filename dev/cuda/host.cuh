// What goes to the device and comes back from it: batches, the report of losses and statistics, routes, tensors.
// Gives: send_batch, clear_statistics, model_losses, model_statistics, model_remember, model_route, model_read, model_write.
// Needs: dev/cuda/memory.cuh; Model and its report of train_moe.cu, which includes it.
#ifndef CUDA_HOST_CUH
#define CUDA_HOST_CUH

// Sends the batch to the device: tokens and targets, and the tokens sorted by word; with --ngrams also by pair of words, and by triple.
// The memory that it is sent from may not be written again until it has been read.
void send_batch(Model *m, const int *tokens, const int *targets, int N) {
    const Config *c = &m->config;
    int *to = m->staging, *pairs = to + (m->pairs - m->tokens);
    await(m->staged);
    memcpy(to, tokens, (size_t)N * sizeof(int));
    memcpy(to + m->max_tokens, targets, (size_t)N * sizeof(int));
    ReadRows *batch = m->tables_there->batch;
    m->word_count = sort_by_row(to + 2 * m->max_tokens, m->max_tokens, tokens, N, N, &batch[BY_WORD]);
    if (c->ngrams) {
        int orders = ngram_orders(c), most = m->max_tokens * orders;
        find_ngrams(c, pairs, tokens, NULL, N, m->batch.T);
        m->pair_count = sort_by_row(pairs + most, most, pairs, N * orders, N, &batch[BY_NGRAM]);
    }
    copy_ints(m->tokens, to, batch_ints(m), cudaMemcpyHostToDevice);
    CHECK(cudaEventRecord(m->staged, stream));
}

void clear_statistics(Model *m) {
    int E = m->config.experts;
    for (int l = 0; l < m->config.layers; l++) { // all but recent, idle and AUX
        zero(layer_stats(m, l), (size_t)2 * E * sizeof(double));
        zero(layer_stats(m, l) + 4 * E, AUX * sizeof(double));
    }
    zero(layer_stats(m, m->config.layers), m->config.layers * head_stats_size(&m->config) * sizeof(double));
}

// The report on the host; waits until the device has done all.
void fetch_report(Model *m) {
    download(m->host_report, m->report, m->report_size * sizeof(double));
}

void fetch_taught(const ::Model *m); // teacher.cuh

void model_losses(::Model *base, double *loss, double *aux, double *norm) {
    Model *m = (Model *)base;
    fetch_report(m);
    fetch_taught(m);
    *loss = m->host_report[TOTAL_LOSS];
    *aux = m->host_report[TOTAL_AUX];
    *norm = m->host_report[GRADIENT_NORM];
}

// The rows behind those of the layers: see statistics_rows() of the C twin.
const Statistics *statistics_of_heads(const Model *m, int row) {
    const Config *c = &m->config;
    Statistics *s = &m->stats[row];
    int l = (row - c->layers) / 2, which = (row - c->layers) % 2;
    double *from = m->host_report + (head_stats(m, l, which) - m->report), *single = from + route_experts(c, which);
    s->count = from;
    s->entropy = single[ENTROPY];
    s->dropped = single[DROPPED];
    s->active = single[ACTIVE];
    s->tokens = single[TOKENS];
    return s;
}

// As of the last fetch_report.
const Statistics *model_statistics(const ::Model *base, int l) {
    const Model *m = (const Model *)base;
    if (l >= m->config.layers) {
        return statistics_of_heads(m, l);
    }
    Statistics *s = &m->stats[l];
    int E = m->config.experts;
    double *from = m->host_report + (layer_stats(m, l) - m->report), *single = from + 4 * E;
    s->count = from;
    s->recent = from + 2 * E;
    if (!s->idle) {
        s->idle = (int *)own_host((Model *)m, E, sizeof(int));
    }
    for (int e = 0; e < E; e++) {
        s->idle[e] = (int)from[3 * E + e];
    }
    s->entropy = single[ENTROPY];
    s->dropped = single[DROPPED];
    s->active = single[ACTIVE];
    s->tokens = single[TOKENS];
    return s;
}

// As set_statistics of the C twin.
void model_remember(::Model *base, int l, const double *recent, const int *idle) {
    Model *m = (Model *)base;
    int E = m->config.experts;
    double *both = (double *)allocate(2 * E, sizeof(double)); // as they stand in the report
    for (int e = 0; e < E; e++) {
        both[e] = recent[e];
        both[E + e] = idle[e];
    }
    upload(m, layer_stats(m, l) + 2 * E, both, (size_t)2 * E * sizeof(double));
    free(both);
}

// The choices of the last forward pass, copied to the host.
const Route *model_route(const ::Model *base, int l) {
    Model *m = (Model *)base;
    const Route *from = &m->acts.layer[l].route;
    Route *to = &m->host_route[l];
    size_t choices = (size_t)from->N * from->K, most = (size_t)m->max_tokens * m->config.subtokens * from->K;
    if (!to->expert && from->E) {
        int *ints = (int *)own_host(m, most * 5 + from->E + 1, sizeof(int));
        to->E = from->E;
        to->K = from->K;
        lay_choices(to, ints, most);
    }
    to->N = from->N;
    if (!from->E || !from->N) {
        return to;
    }
    download(to->offset, from->offset, ((size_t)from->E + 1) * sizeof(int));
    download(to->expert, from->expert, choices * sizeof(int));
    download(to->served, from->served, choices * sizeof(int));
    download(to->row, from->row, choices * sizeof(int));
    download(to->choice, from->choice,
             (size_t)to->offset[from->E] * sizeof(int)); // behind the last row nothing was written
    download(to->token, from->token, (size_t)to->offset[from->E] * sizeof(int));
    return to;
}

// As ranks_read and ranks_write of dev/ranks/files.h: the host's memory has one tensor at a time. Moments in bfloat16 are
// floats on the host; to and from there nothing is lost.
void model_read(::Model *m, int what, int tensor, real *to) {
    Share s = ranks_share(m, what, tensor);
    if (what >= MOMENT1 && m->config.moments == MOMENTS_BF16) {
        char *half =
            (char *)to +
            s.size * sizeof(uint16_t); // they come to the second half of the array, and fill it from its beginning
        download(half, moment_at(m, what, s.at), s.size * sizeof(uint16_t));
        for (size_t i = 0; i < s.size; i++) {
            uint16_t upper;
            memcpy(&upper, half + i * sizeof(upper), sizeof(upper));
            uint32_t bits = (uint32_t)upper << 16;
            memcpy(&to[i], &bits, sizeof(bits));
        }
    } else {
        download(to, m->memory[what] + s.at, s.size * sizeof(real));
    }
    ranks_gather(m, what, tensor, to);
}

void model_write(::Model *base, int what, int tensor, const real *from) {
    Model *m = (Model *)base;
    Share s = ranks_share(m, what, tensor);
    await_device(); // as in download
    if (what >= MOMENT1 && m->config.moments == MOMENTS_BF16) {
        uint16_t *half = (uint16_t *)allocate(s.size, sizeof(uint16_t));
        for (size_t i = 0; i < s.size; i++) {
            float rounded = nearest_bf16(from[s.first + i]);
            uint32_t bits;
            memcpy(&bits, &rounded, sizeof(bits));
            half[i] = (uint16_t)(bits >> 16);
        }
        upload(m, moment_at(m, what, s.at), half, s.size * sizeof(uint16_t));
        free(half);
    } else {
        upload(m, m->memory[what] + s.at, from + s.first, s.size * sizeof(real));
    }
    if (what == WEIGHTS) {
        round_weights(m, s.at, s.at + s.size);
    }
}

#endif
