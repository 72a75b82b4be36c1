// Which matrices have a low-rank pair (--lora, --lora-targets), and where the pairs stand in the table of weights.
// Gives: lora_refuses, lora_targets, is_pair, base_tensors, memory_part, add_pair_tensors, trained_size, find_pair, place_of,
// register_pairs, first_pair_numbers. Needs: dev/lora.h; the table of weights of train_moe.c, which includes it.
//
// The rows of the pairs stand behind all others, "layer3.qkv.lora_A" and "layer3.qkv.lora_B" for "layer3.qkv", and every row
// before them is frozen: it is not trained, and a checkpoint does not have it. In memory the pairs come first. So the arrays of
// gradients and moments, which have the pairs alone, have the same offsets as that of the weights. Behind the pairs' gradients
// there are a few numbers more: the gradient of a frozen vector, which costs next to nothing, is added up there and never read.
#pragma once
#include "lora.h"

enum { LORA_ATTENTION = 1, LORA_EXPERTS = 2, LORA_ROUTER = 4 };
const char *const lora_target_names[] = {"attention", "experts", "router", NULL};

// Matrices that can have a pair. A dense layer counts as an expert that every token passes.
const struct {
    const char *kind;
    int target;
    const char *a, *b; // kinds of the pair's rows
} pair_kinds[] = {
    {"qkv", LORA_ATTENTION, "qkv.lora_A", "qkv.lora_B"},
    {"proj", LORA_ATTENTION, "proj.lora_A", "proj.lora_B"},
    {"router", LORA_ROUTER, "router.lora_A", "router.lora_B"},
    {"w_in", LORA_EXPERTS, "w_in.lora_A", "w_in.lora_B"},
    {"w_out", LORA_EXPERTS, "w_out.lora_A", "w_out.lora_B"},
    {"dense_in", LORA_EXPERTS, "dense_in.lora_A", "dense_in.lora_B"},
    {"dense_out", LORA_EXPERTS, "dense_out.lora_A", "dense_out.lora_B"},
};

// The words of --lora-targets as bits; -1: one of them is no such word.
int lora_targets(const char *text) {
    int targets = 0;
    while (*text) {
        size_t n = strcspn(text, ",");
        int found = -1;
        for (int i = 0; lora_target_names[i]; i++) {
            if (strlen(lora_target_names[i]) == n && !strncmp(lora_target_names[i], text, n)) {
                found = i;
            }
        }
        if (found < 0) {
            return -1;
        }
        targets |= 1 << found;
        text += n + (text[n] == ',');
    }
    return targets;
}

int is_pair(const Tensor *t) {
    return strstr(t->kind, ".lora_") != NULL;
}

// Rows of the table that are not of pairs; with --lora they are frozen.
int base_tensors(const Model *m) {
    int count = m->tensor_count;
    while (count > 0 && is_pair(&m->tensors[count - 1])) {
        count--;
    }
    return count;
}

// In which part of memory a tensor lies: pairs, what all processes have in common, experts, tables that are looked up.
int memory_part(const Tensor *t) {
    if (is_pair(t)) {
        return 0;
    }
    return t->looked_up ? 3 : 1 + t->of_experts;
}

int is_joined(const Config *c, int l); // dev/adapter.h: are gate and up of a dense layer one matrix in the base's files?

// How many matrices a tensor is in the files of other programs, and the rows of each.
int pair_blocks(const Config *c, const Tensor *t, int rows[3]) {
    int queries = c->heads * head_width(c), keys = c->kv_heads * head_width(c), O = t->shape[1];
    int is_qkv = !strcmp(t->kind, "qkv");
    int gated = !strcmp(t->kind, "dense_in") && is_gated(dense_activation(c, t->layer)) && !is_joined(c, t->layer);
    rows[0] = is_qkv ? queries : O / (1 + gated);
    rows[1] = is_qkv ? keys : O / 2;
    rows[2] = keys;
    if (is_qkv) {
        return 3;
    }
    return 1 + gated;
}

// Freezes all tensors of the list, and appends the pairs that the options ask for.
void add_pair_tensors(const Config *c, Tensor *list, int *count) {
    int base = *count, rows[3], targets = c->lora ? lora_targets(c->lora_targets) : 0;
    for (int i = 0; c->lora && i < base; i++) {
        const Tensor *t = &list[i];
        list[i].trained = 0;
        for (int k = 0; k < COUNT(pair_kinds); k++) {
            if (strcmp(pair_kinds[k].kind, t->kind) || !(pair_kinds[k].target & targets)) {
                continue;
            }
            int E = t->shape[0], blocks = pair_blocks(c, t, rows), dims = E > 1 ? 3 : 2;
            add_tensor(list, count, t->layer, pair_kinds[k].a, NO_FIELD, dims, E, blocks * c->lora, t->shape[2], INIT_ZERO);
            add_tensor(list, count, t->layer, pair_kinds[k].b, NO_FIELD, dims, E, t->shape[1], c->lora, INIT_ZERO);
        }
    }
}

// ---- memory

// Is this frozen tensor so small that its gradient is added up where nobody reads it?
int has_idle_gradient(const Config *c, const Tensor *t) {
    return !t->looked_up && (t->dims == 1 || t->size <= 4 * (size_t)c->dim);
}

// Numbers of gradients and of moments.
size_t trained_size(const Model *m) {
    size_t idle = 0;
    if (!m->config.lora) {
        return m->size;
    }
    for (int i = 0; i < base_tensors(m); i++) {
        const Tensor *t = &m->tensors[i];
        idle = has_idle_gradient(&m->config, t) && t->size > idle ? t->size : idle;
    }
    return m->pairs + idle;
}

// The row of the A that stands beside the matrix of row i; -1: none does. That of B is the next one.
int find_pair(const Model *m, int i) {
    for (int k = 0; k < COUNT(pair_kinds); k++) {
        if (!strcmp(pair_kinds[k].kind, m->tensors[i].kind)) {
            return find_tensor(m, m->tensors[i].layer, pair_kinds[k].a);
        }
    }
    return -1;
}

// Where the numbers of row i begin in memory of weights or gradients. A frozen matrix has no gradient: NULL, or where a
// pair stands beside it the address by which the products find the pair.
real *place_of(const Model *m, int i, real *memory) {
    const Tensor *t = &m->tensors[i];
    if (!m->config.lora || is_pair(t) || memory != m->memory[GRADS]) {
        return memory + t->offset;
    }
    int pair = find_pair(m, i);
    if (pair >= 0) {
        return memory + m->tensors[pair].offset;
    }
    return has_idle_gradient(&m->config, t) ? memory + m->pairs : NULL;
}

// Tells the products of all pairs of a model.
void register_pairs(Model *m, int train) {
    const Config *c = &m->config;
    for (int i = 0; c->lora && i < base_tensors(m); i++) {
        int a = find_pair(m, i);
        const Tensor *t = &m->tensors[i];
        if (a < 0) {
            continue;
        }
        real *w = m->memory[WEIGHTS], *g = train ? m->memory[GRADS] : NULL;
        size_t at = m->tensors[a].offset, next = m->tensors[a + 1].offset;
        Pair pair = {m, w + t->offset, train ? g + at : NULL, w + at, w + next, train ? g + at : NULL, train ? g + next : NULL,
                     t->shape[0], t->shape[1], t->shape[2], c->lora, 1, {0, 0, 0}, (real)(c->lora_alpha / c->lora)};
        pair.blocks = pair_blocks(c, t, pair.rows);
        register_pair(&pair);
    }
}

// The first numbers of a pair's tensor: A has uniform ones between -1/sqrt(I) and 1/sqrt(I), which is Kaiming's rule with
// the slope of PEFT; B is 0, so the model begins as the base is.
void first_pair_numbers(const Model *m, int i, real *w) {
    const Tensor *t = &m->tensors[i];
    uint64_t stream = random_stream((uint64_t)m->config.seed, RANDOM_INIT, (uint64_t)i, 0);
    int is_a = strstr(t->kind, ".lora_A") != NULL;
    double bound = 1 / sqrt((double)t->shape[2]);
    for (size_t j = 0; j < t->whole; j++) {
        w[j] = (real)(is_a ? (2 * random_uniform(stream, j) - 1) * bound : 0);
    }
}

// ---- what does not go together

// Why pairs cannot be trained with these options; NULL: they can.
const char *lora_refuses(const Config *c) {
    if (!c->lora) {
        return NULL;
    }
    if (lora_targets(c->lora_targets) <= 0) {
        return "--lora-targets takes one or more of attention, experts, router, with commas between them";
    }
    if (mixer_of(c)) {
        return "--lora goes with the attention of --mixer attention; an LSTM and attention with experts have no pairs";
    }
    if (ranks.size > 1) {
        return "--lora is trained by one process; start it without mpirun";
    }
    if (c->optimizer == MUON) {
        return "--lora goes with --optimizer adamw: a pair's product is what learns, and Muon would turn A and B each by itself";
    }
    if (c->mixed && c->moe_every) {
        return "--lora takes experts of one width; those of --mixed differ";
    }

    // A router of its own is trained with the model; a frozen one that still moves would be no frozen one.
    Tensor *list = (Tensor *)allocate(tensor_limit(c), sizeof(Tensor));
    int own = 0, count = 0, any = 0;
    Config base = *c;
    base.lora = 0;
    count = model_tensors(&base, list);
    for (int i = 0; i < count; i++) {
        own += list[i].trained && list[i].field == NO_FIELD;
        for (int k = 0; k < COUNT(pair_kinds); k++) {
            any += !strcmp(pair_kinds[k].kind, list[i].kind) && (pair_kinds[k].target & lora_targets(c->lora_targets));
        }
    }
    free(list);
    if (own) {
        return "--lora does not go with this recipe: its router has matrices of its own, which would have to be frozen";
    }
    return any ? NULL : "--lora-targets: this model has none of these matrices (--recipe dense has no router)";
}
