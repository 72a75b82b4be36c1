// Numbers that are not finite (NaN or infinite): refused in files, and when one turns up, where it was first.
// Gives: first_not_finite, check_read, check_logits, check_validation, check_step. Needs: Run of dev/run.h, which
// includes it; the model of train_moe.c, cpu_backend of dev/cpu/backend.h; Part of data/safetensors.h.
//
// NaN spreads to everything that is computed from it, so what a user needs to know is what came first. The search goes
// in the order in which a step computes: weights; activations, layer by layer; the loss; gradients, from the last layer
// to the first. It costs nothing before something has gone wrong. The activations of a GPU are not looked at.
#pragma once

// The place of the first number of x (n) that is not finite; n: all are.
size_t first_not_finite(const real *x, size_t n) {
    enum { BLOCK = 4096 };
    for (size_t at = 0; at < n; at += BLOCK) {
        // A finite number times 0 is 0, any other one is NaN, as is each sum with NaN in it. Sixteen sums are a vector.
        size_t end = at + BLOCK < n ? at + BLOCK : n, i = at;
        real sum[16] = {0}, all = 0;
        for (; i + 16 <= end; i += 16) {
            for (int j = 0; j < 16; j++) {
                sum[j] += x[i + (size_t)j] * 0;
            }
        }
        for (; i < end; i++) {
            all += x[i] * 0;
        }
        for (int j = 0; j < 16; j++) {
            all += sum[j];
        }
        if (all == 0) {
            continue;
        }
        for (i = at; isfinite(x[i]); i++) {
        }
        return i;
    }
    return n;
}

// A NaN has a sign, which nobody wants to read.
double shown(double x) {
    return isnan(x) ? (double)NAN : x;
}

// ---- in files

// x: what was read of a part of the file `path`, under its name there.
void check_read(const char *path, const char *prefix, const Part *p, const real *x) {
    size_t n = part_size(p), i = first_not_finite(x, n);
    if (i == n) {
        return;
    }
    char row[32] = "";
    if (p->rows) {
        snprintf(row, sizeof(row), "%zu,", i / (size_t)p->cols);
    }
    fail("%s: damaged: number [%s%zu] of %s%s is %g, and all numbers must be finite. If it is a checkpoint of a run: "
         OLDER_CHECKPOINT, path, row, i % (size_t)p->cols, prefix, p->name, shown((double)x[i]));
}

// ---- the search

// What was found first. order: of two finds, that with the lower one came first; 0: nothing was found.
typedef struct Find {
    int order;
    char text[500];
} Find;

enum { FIND_WEIGHT = 1, FIND_ACTIVATION = 10000, FIND_GRADIENT = 20000 };

// The find of the process that found the earliest one.
Find first_of_all(const Find *mine) {
    Find first = {0, ""};
    if (ranks.size == 1) {
        return *mine;
    }
    int *rows = (int *)allocate(ranks.size, sizeof(int));
    for (int r = 0; r < ranks.size; r++) {
        rows[r] = 1;
    }
    Find *all = (Find *)gather_rows(mine, rows, sizeof(Find));
    for (int r = 0; r < ranks.size; r++) {
        if (all[r].order && (!first.order || all[r].order < first.order)) {
            first = all[r];
            size_t used = strlen(first.text);
            snprintf(first.text + used, sizeof(first.text) - used, ", on rank %d", r);
        }
    }
    free(all);
    free(rows);
    return first;
}

// A tensor's number i by name and index: layer1.qkv[3,5].
void name_number(char *text, size_t size, const Tensor *t, size_t i) {
    size_t column = i % (size_t)t->shape[2], row = i / (size_t)t->shape[2] % (size_t)t->shape[1];
    size_t block = i / (size_t)t->shape[2] / (size_t)t->shape[1];
    if (t->dims == 1) {
        snprintf(text, size, "%s[%zu]", t->name, i);
    } else if (t->dims == 2) {
        snprintf(text, size, "%s[%zu,%zu]", t->name, row, column);
    } else {
        snprintf(text, size, "%s[%zu,%zu,%zu]", t->name, block, row, column);
    }
}

// Looks at this process's share of all WEIGHTS or GRADS. Gradients come into being from the last layer to the first, and
// the table of tensors names them in the order of the forward pass. All processes call it.
Find search_tensors(Run *run, int what) {
    Model *m = run->model;
    Find find = {0, ""};
    real *numbers = allocate_tensor(m);
    for (int turn = 0; turn < m->tensor_count; turn++) {
        int tensor = what == GRADS ? m->tensor_count - 1 - turn : turn;
        if (what == GRADS && m->config.lora && !is_pair(&m->tensors[tensor])) { // frozen
            continue;
        }
        Share share = ranks_share(m, what, tensor);
        run->backend->read(m, what, tensor, numbers);
        size_t i = first_not_finite(numbers, share.size), count = 0;
        if (find.order || i == share.size) {
            continue;
        }
        for (size_t j = i; j < share.size; j++) {
            count += !isfinite(numbers[j]);
        }
        char name[120];
        name_number(name, sizeof(name), &m->tensors[tensor], share.first + i);
        find.order = (what == GRADS ? FIND_GRADIENT : FIND_WEIGHT) + turn;
        snprintf(find.text, sizeof(find.text), "%s is %g (%zu of %zu there are not finite)", name,
                 shown((double)numbers[i]), count, share.size);
    }
    free(numbers);
    return find;
}

// Looks at activations x: `rows` rows of `width` numbers, which are in the order of tokens, `per` rows for each token,
// or, with `token`, row r of a route is of part token[r] of them.
void search_rows(Find *find, const Model *m, const char *what, const real *x, int rows, int width, int per,
                 const int *token) {
    size_t size = (size_t)rows * (size_t)width, i = x && !find->order ? first_not_finite(x, size) : size;
    if (i == size) {
        return;
    }
    int row = (int)(i / (size_t)width), n = (token ? token[row] : row) / per;
    find->order = FIND_ACTIVATION;
    snprintf(find->text, sizeof(find->text), "%s, of token %d of sequence %d of the batch: %g", what,
             n % m->batch.T, n / m->batch.T, shown((double)x[i]));
}

// The experts' first products, sorted by expert.
void search_experts(Find *find, const Model *m, int l) {
    const LayerActs *a = &m->acts.layer[l];
    const Route *r = &a->route;
    const real *x = a->hidden;
    for (int e = 0; ranks.ep == 1 && e < r->E; e++) { // of several processes, others have the rows
        char what[80];
        int rows = r->offset[e + 1] - r->offset[e], width = m->experts.hidden[e];
        snprintf(what, sizeof(what), "expert %d, before its activation, of layer%d", e, l);
        search_rows(find, m, what, x, rows, width, m->config.subtokens, r->token + r->offset[e]);
        x += (size_t)rows * (size_t)width;
    }
}

void search_layer(Find *find, Model *m, int l) {
    const Config *c = &m->config;
    const LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, C = c->dim, D = head_width(c), Q = (c->heads + 2 * c->kv_heads) * D, moe = is_moe(c, l);
    int parts = moe ? c->subtokens : 1, dense = dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
    int outputs = moe ? router_outputs(c) : 0, K = moe ? a->route.K : 0;
    char what[100];
    snprintf(what, sizeof(what), l ? "the output of layer%d" : "the embedding", l - 1);
    search_rows(find, m, what, a->x, N, C, 1, NULL);
    const struct {
        const char *what;
        const real *x;
        int width, parts; // parts of a token that have a row each
    } list[] = {
        {"norm1", a->h1, C, 1},
        {"the queries, keys and values", a->qkv, a->qkv ? Q : 0, 1},
        {"the attention", a->att, a->att ? c->heads * D : 0, 1},
        {"the residual stream behind the attention", a->mid, C, 1},
        {"norm2", a->h2, C, 1},
        {"the router's logits", a->route.logits, outputs, parts},
        {"the router's weights", a->route.weight, K, parts},
        {"the dense feed-forward, before its activation,", a->dense_hidden, dense, 1},
    };
    for (int i = 0; i < COUNT(list); i++) {
        snprintf(what, sizeof(what), "%s of layer%d", list[i].what, l);
        search_rows(find, m, what, list[i].width ? list[i].x : NULL, N * list[i].parts, list[i].width, list[i].parts, NULL);
    }
    if (moe) {
        search_experts(find, m, l);
    }
}

// The activations of the last batch, in the order of the forward pass. All processes call it.
Find search_batch(Run *run) {
    const Config *c = &run->config;
    Model *m = run->model;
    Find find = {0, ""};
    int N = m->batch.B * m->batch.T;
    for (int l = 0; l < c->layers; l++) {
        if (c->recompute && l != m->at_hand) {
            recompute_layer(m, l); // all layers share the memory of most of their activations
        }
        search_layer(&find, m, l);
    }
    char what[32];
    snprintf(what, sizeof(what), "the output of layer%d", c->layers - 1);
    search_rows(&find, m, what, m->acts.x, N, c->dim, 1, NULL);
    search_rows(&find, m, "the last norm", m->acts.h, N, c->dim, 1, NULL);
    search_rows(&find, m, "the loss", m->acts.nll, N, 1, 1, NULL);
    return find;
}

// The activations of a step. With --accum those of its last batch are there; the batches before it are run again.
Find search_step(Run *run) {
    Find find = search_batch(run);
    int accum = run->config.accum;
    for (int micro = 0; micro < accum - 1 && !first_of_all(&find).order; micro++) {
        Batch batch = next_batch(run, micro);
        run->backend->forward(run->model, &batch);
        find = search_batch(run);
    }
    return find;
}

// The largest weight, which tells whether training has got out of hand. All processes call it. Rank 0 reads all weights,
// and the others get its text.
void name_largest_weight(Run *run, char *text, size_t size) {
    const Model *m = run->model;
    const Tensor *where = &m->tensors[0];
    double largest = 0;
    real *numbers = allocate_tensor(m);
    for (int i = 0; i < m->tensor_count; i++) {
        size_t count = ranks.rank ? m->tensors[i].size : m->tensors[i].whole;
        run->backend->read(run->model, WEIGHTS, i, numbers);
        for (size_t j = 0; j < count && strcmp(m->tensors[i].kind, "table"); j++) {
            if (fabs((double)numbers[j]) > largest) {
                largest = fabs((double)numbers[j]);
                where = &m->tensors[i];
            }
        }
    }
    free(numbers);
    snprintf(text, size, "all weights are finite (the largest, in %s, is %.3g)", where->name, largest);
    broadcast(text, size);
}

// What was not finite first, as a sentence or two. activations: where those that went wrong are looked for.
void explain(Run *run, Find (*activations)(Run *run), int gradients, char *text, size_t size) {
    const char *hint = "a lower --lr or a longer --warmup may help";
    Find mine = search_tensors(run, WEIGHTS), find = first_of_all(&mine);
    if (find.order) { // those of a file were finite: see check_read()
        snprintf(text, size, "The weight %s: an earlier step's update made it so; %s", find.text, hint);
        return;
    }
    char weights[200];
    name_largest_weight(run, weights, sizeof(weights));
    Find none = {0, ""}, gradient = gradients ? search_tensors(run, GRADS) : none; // before batches are run again
    mine = run->backend == &cpu_backend ? activations(run) : none;
    find = first_of_all(&mine);
    if (find.order) {
        snprintf(text, size, "First not finite: %s; %s; %s", find.text, weights, hint);
        return;
    }
    find = first_of_all(&gradient);
    if (find.order) {
        snprintf(text, size, "Searching the gradients from the last layer to the first, the first one that is not finite: "
                 "%s; %s%s; %s",
                 find.text, weights, run->backend == &cpu_backend ? ", and so are all activations" : "", hint);
        return;
    }
    snprintf(text, size, "%c%s; %s", toupper(weights[0]), weights + 1, hint);
}

// ---- what comes of a step, of an evaluation, of a token

// Ends the program where a step's loss or its gradients are not finite, whose update has changed nothing; and where its
// gradient is so large that its update has spoilt the moments, which are not saved.
void check_step(Run *run, int step, double loss, double aux, double norm) {
    char text[1200];
    double most = sizeof(real) == 8 ? 1e150 : 1e18; // its square is a moment
    if (isfinite(loss) && isfinite(aux) && isfinite(norm) && (run->config.clip > 0 || norm < most)) {
        return;
    }
    if (isfinite(loss) && isfinite(aux) && isfinite(norm)) {
        fail("step %d: the gradient's norm is %g, whose square AdamW cannot keep; training stops here, and the last "
             "checkpoint in %s is as it was. Give a --clip above 0, or a lower --lr",
             step, norm, run->out);
    }
    double taught = teacher.model ? teacher.loss : 0;
    sum_over_ranks(&taught, 1);
    if (isfinite(loss) && !isfinite(taught)) {
        fail("step %d: the loss is %g, but the teacher's part of it %g: what --teacher %s answers is not finite, so it cannot teach; "
             "training stops here, and the last checkpoint in %s is as it was",
             step, loss, shown(taught), run->config.teacher, run->out);
    }
    explain(run, search_step, 1, text, sizeof(text));
    fail("step %d: the loss is %g, the balance losses %g and the gradient's norm %g; training stops here, and the last "
         "checkpoint in %s is as it was. %s",
         step, shown(loss), shown(aux), shown(norm), run->out, text);
}

// loss: of the last batch that was evaluated. All processes call it, since those whose own loss is finite help to search.
void check_validation(Run *run, double loss) {
    char text[1200];
    sum_over_ranks(&loss, 1);
    if (isfinite(loss)) {
        return;
    }
    explain(run, search_batch, 0, text, sizeof(text));
    fail("step %d: the validation loss is %g; training stops here, and the last checkpoint in %s is as it was. %s",
         run->step, shown(loss), run->out, text);
}

// Generation has a model of its own for one token, whose activations with --recompute are gone.
Find search_token(Run *run) {
    Find find = {0, ""};
    Model *one = run->model->generation->one;
    for (int l = 0; l < run->config.layers && !run->config.recompute; l++) {
        search_layer(&find, one, l);
    }
    search_rows(&find, one, "what the layers give together", one->acts.x, 1, run->config.dim, 1, NULL);
    search_rows(&find, one, "the last norm", one->acts.h, 1, run->config.dim, 1, NULL);
    return find;
}

// logits: of the token that comes behind `position` tokens.
void check_logits(Run *run, const real *logits, int position) {
    char text[1200];
    size_t V = (size_t)run->config.vocab, i = first_not_finite(logits, V);
    if (i == V) {
        return;
    }
    printf("\n");
    explain(run, search_token, 0, text, sizeof(text));
    fail("no text can be told: behind %d tokens the logit of token %zu is %g. %s", position, i, shown((double)logits[i]), text);
}
