// Hugging Face's config.json: what the fields of a model's class say of it, and what lies beside it.
// Gives: config_from_hugging_face, check_weight_files, write_fields, write_rope. Needs: data/json.h; json_word of
// data/tokenizer.h; the tables of data/class_fields.h; data/granite.h; dev/options.h, and Config of train_moe.c;
// data/checkpoint.h includes it.
//
// What this program can compute and no class can, as pairs of words (--ngrams), only its own checkpoints say, in their
// object train_moe; in another model's files its fields are refused here, and its tensors by check_tensors().
#pragma once
#include "json.h"
#include "tokenizer.h"
#include "class_fields.h"
#include "granite.h"

// ---- reading it

typedef struct ConfigReader {
    const Json *json;
    const char *path;
    int kind; // which of model_classes; OURS: a model of this program, which transformers has no class for
    int own;  // 1: this program wrote the file once, and its object train_moe has been read
    char changed[1024], unknown[1024], training[512]; // lists, for the user
} ConfigReader;

// Appends to a list of words; what does not fit is left out.
__attribute__((format(printf, 3, 4))) void list_word(char *list, size_t size, const char *format, ...) {
    size_t used = strlen(list);
    va_list args;
    va_start(args, format);
    if (used && used + 2 < size) {
        memcpy(list + used, ", ", 3);
        used += 2;
    }
    vsnprintf(list + used, size - used, format, args);
    va_end(args);
}

// A member that is there and is not null.
const Json *find_member(const Json *object, const char *name) {
    const Json *m = json_get(object, name);
    return m && m->type != '0' ? m : NULL;
}

__attribute__((noreturn)) void refuse_field(const ConfigReader *r, const char *name, const Json *m, const char *why) {
    char number[32];
    const char *word = m->type == 'a' ? "a list" : json_word(m, number);
    fail("%s: %s is %s: %s", r->path, name, m->type == 'o' ? "an object" : word, why);
}

// null, false, 0, and what is empty.
int is_off(const Json *m) {
    if (m->type == 'a' || m->type == 'o') {
        return !m->child;
    }
    return m->type == 'f' || m->type == '0' || (m->type == 'n' && m->number == 0) || (m->type == 's' && !m->length);
}

// ---- rotary positions
//
// Version 5 of transformers writes them into rope_parameters, older ones beside the other fields and into rope_scaling.
// Where there are several, version 5 takes rope_scaling alone, then rope_parameters.

const char *rope_source(const Json *json) {
    const Json *scaling = find_member(json, "rope_scaling");
    return scaling && scaling->child ? "rope_scaling" : "rope_parameters";
}

const Json *rope_member(const Json *json, const char *name) {
    const Json *source = find_member(json, rope_source(json)), *m = source ? find_member(source, name) : NULL;
    return m ? m : find_member(json, name);
}

// What kind of scaling an object says; NULL: none.
const Json *rope_kind(const Json *object) {
    const Json *m = find_member(object, "rope_type");
    m = m ? m : find_member(object, "type");
    return m && m->type == 's' && !strcmp(m->text, "default") ? NULL : m;
}

// A member of one of the two objects that this program does not follow.
__attribute__((noreturn)) void refuse_rope(const ConfigReader *r, const char *name, const Json *m) {
    char text[96];
    snprintf(text, sizeof(text), "%s's %.40s", name, m->key);
    refuse_field(r, text, m, "its rotary positions are scaled in a way that this program does not compute");
}

// Takes the scaling that an object says into the options, or refuses it; `counts` 0: the other object counts, and this
// one may say none.
void take_rope(ConfigReader *r, Config *c, const char *name, int counts) {
    static const char *const idle[] = {"rope_type", "type", "rope_theta", "partial_rotary_factor", NULL};
    static const char *const numbers[] = {"factor", "low_freq_factor", "high_freq_factor",
                                          "original_max_position_embeddings", NULL};
    static const char *const names[] = {"rope-factor", "rope-low", "rope-high", "rope-original"};
    const Json *rope = find_member(r->json, name);
    if (!rope) {
        return;
    }
    if (rope->type != 'o') {
        refuse_field(r, name, rope, "expected an object");
    }
    const Json *kind = rope_kind(rope), *part = find_member(rope, "partial_rotary_factor");
    int scaling = kind && kind->type == 's' ? find_word(rope_names, kind->text) : 0;
    if (part && !(part->type == 'n' && part->number == 1)) {
        refuse_field(r, part->key, part, "here positions turn the whole of a head");
    }
    if (kind && (scaling <= ROPE_NONE || !counts)) {
        refuse_rope(r, name, kind);
    }
    int used = scaling == ROPE_LINEAR ? 1 : 4 * (scaling == ROPE_LLAMA3); // of the numbers
    for (const Json *m = rope->child; m; m = m->next) {
        int i = find_word(numbers, m->key), is_one = m->type == 'n' && m->number == 1;
        if (m->type == '0' || find_word(idle, m->key) >= 0 || (i >= 0 && i < used) || is_one || i == 3) {
            continue;
        }
        refuse_rope(r, name, m);
    }
    if (!counts) {
        return;
    }
    c->rope_scaling = scaling;
    for (int i = 0; i < used; i++) {
        char text[64], path[4300];
        const Json *m = find_member(rope, numbers[i]);
        if (!m || m->type != 'n') {
            fail("%s: %s has no number %s, which %s positions need", r->path, name, numbers[i], kind->text);
        }
        snprintf(path, sizeof(path), "%s: %s's %s", r->path, name, numbers[i]);
        set_option(c, &options[find_option(names[i])], number_text(m->number, text), path);
    }
}

// The object that says how positions are scaled; nothing where they are not.
void write_rope(FILE *file, const Config *c) {
    char text[64];
    if (c->rope_scaling == ROPE_NONE) {
        return;
    }
    fprintf(file, "  \"rope_scaling\": {\"rope_type\": \"%s\", \"factor\": %s", rope_names[c->rope_scaling],
            number_text(c->rope_factor, text));
    if (c->rope_scaling == ROPE_LLAMA3) {
        fprintf(file, ", \"low_freq_factor\": %s", number_text(c->rope_low, text));
        fprintf(file, ", \"high_freq_factor\": %s", number_text(c->rope_high, text));
        fprintf(file, ", \"original_max_position_embeddings\": %d", c->rope_original);
    }
    fprintf(file, "},\n");
}

// ---- fields that are options

int head_width(const Config *c); // dev/mixers/attention_experts.h

// The width of what every token passes in the layers with experts, or in those without.
int width_beside(const Config *c, int with_experts) {
    for (int l = 0; l < c->layers; l++) {
        if (is_moe(c, l) == with_experts) {
            return dense_width(c, l);
        }
    }
    int dense = c->dense_ffn ? c->dense_ffn : (c->topk + c->shared) * c->ffn;
    return with_experts ? 0 : dense;
}

// What the model says of a field, as its option's text.
const char *field_value(const Config *c, const TakenField *f, char text[64]) {
    switch (f->form) {
    case AS_WIDTH:
        return number_text(dense_width(c, 0), text);
    case AS_HEADS:
        return number_text(c->kv_heads ? c->kv_heads : c->heads, text);
    case AS_HEAD:
        return number_text(head_width(c), text);
    case AS_DENSE:
    case AS_SHARED:
        return number_text(width_beside(c, f->form == AS_SHARED), text);
    default:
        return option_text(c, &options[find_option(f->option)], text);
    }
}

// The value of a field as its option's text; NULL where nothing is said of it.
const char *field_text(const ConfigReader *r, const Config *c, const TakenField *f, char number[64]) {
    int is_theta = !strcmp(f->name, "rope_theta"), is_seq = !strcmp(f->name, "max_position_embeddings");
    int is_bool = f->form == AS_FLAG || f->form == AS_NOT || f->form == AS_GATE;
    const Json *raw = json_get(r->json, f->name), *m = is_theta ? rope_member(r->json, f->name) : raw;
    const char *text = f->if_missing[r->kind];
    if (m && m->type != '0') {
        if (is_bool ? m->type != 't' && m->type != 'f' : m->type != 'n') {
            refuse_field(r, f->name, m, is_bool ? "expected true or false" : "expected a number");
        }
        int is_true = m->type == 't';
        if (f->form == AS_GATE) {
            text = gate_names[is_true ? RENORMALIZED : PROBABILITY];
        } else if (is_bool) {
            text = is_true == (f->form == AS_FLAG) ? "1" : "0";
        } else {
            text = number_text(is_seq ? fmin(m->number, 1 << 20) : m->number, number);
        }
    } else if (raw && (f->form == AS_HEADS || f->form == AS_HEAD)) {
        text = "0";
    }
    if (!strcmp(text, "0") && f->form == AS_HEADS) {
        text = number_text(c->heads, number);
    }
    if (!strcmp(text, "0") && f->form == AS_HEAD) {
        text = number_text(c->dim / c->heads, number);
    }
    return *text ? text : NULL;
}

// Says that a field of a file of ours is no longer what it was.
void note_change(ConfigReader *r, const TakenField *f, const char *was, const char *now) {
    double before = strtod(was, NULL), after = strtod(now, NULL);
    if (f->form == AS_NOT || f->form == AS_FLAG) {
        int is_true = (after != 0) == (f->form == AS_FLAG);
        list_word(r->changed, sizeof(r->changed), "%s is %s now", f->name, is_true ? "true" : "false");
    } else if (f->form == AS_GATE) {
        const char *word = strcmp(now, "renormalized") ? "false" : "true";
        list_word(r->changed, sizeof(r->changed), "%s is %s now", f->name, word);
    } else {
        list_word(r->changed, sizeof(r->changed), "%s %s from %s to %s", f->name, after < before ? "fell" : "rose", was, now);
    }
}

// Takes a field into its option.
void take_field(ConfigReader *r, Config *c, const TakenField *f) {
    char number[64], old[64], path[4300];
    const char *text = field_text(r, c, f, number), *before = field_value(c, f, old);
    if (!text || (f->form == AS_DENSE && moe_layers(c) == c->layers)) {
        return;
    }
    int is_same = !strcmp(text, before) || (f->form != AS_GATE && strtod(text, NULL) == strtod(before, NULL));
    if (is_same && (r->own || f->form == AS_HEAD)) {
        return;
    }
    if (r->own) {
        note_change(r, f, before, text);
    }
    if (f->form == AS_HEAD && r->kind == OURS) {
        fail("%s: head_dim %s is not %s, the model's head-width", r->path, text, before);
    }
    if (f->form == AS_WIDTH) {
        c->topk = 1;
        c->shared = 0;
        c->dense_ffn = 0;
    }
    if (f->form == AS_SHARED) {
        c->shared = strcmp(text, "0") ? max_int(1, c->shared) : 0;
    }
    snprintf(path, sizeof(path), "%s: %s", r->path, f->name);
    set_option(c, &options[find_option(f->option)], text, path);
    if (!strcmp(f->option, "seq")) {
        c->seq = min_int(c->seq, 4096); // the cache of generation
    }
}

// Class k's fields, for the model c.
void write_fields(FILE *file, const Config *c, int k) {
    for (int i = 0; i < COUNT(taken_fields); i++) {
        char text[64];
        const TakenField *f = &taken_fields[i];
        if (!f->if_missing[k] || !is_written(f, k)) {
            continue;
        }
        const char *value = field_value(c, f, text);
        if (f->form == AS_GATE) {
            value = strcmp(value, "renormalized") ? "false" : "true";
        } else if (f->form == AS_FLAG || f->form == AS_NOT) {
            int is_zero = !strcmp(value, "0");
            value = is_zero == (f->form == AS_NOT) ? "true" : "false";
        }
        fprintf(file, "  \"%s\": %s,\n", f->name, value);
    }
}

// ---- fields that need more than a row of a table

// Which layers have experts: Qwen's layer l has, if l+1 is a multiple of decoder_sparse_step and l is not in
// mlp_only_layers.
void take_layers(const ConfigReader *r, Config *c) {
    const Json *step = find_member(r->json, "decoder_sparse_step"), *only = find_member(r->json, "mlp_only_layers");
    int L = c->layers, dense = 0;
    if (!(1 << r->kind & OF_LAYERS)) {
        return;
    }
    int good = !step || (step->type == 'n' && step->number >= 1 && step->number <= 1e6 && step->number == floor(step->number));
    int every = good && step ? (int)step->number : 1;
    if (!good || (only && only->type != 'a')) {
        fail("%s: expected a whole number decoder_sparse_step, and a list mlp_only_layers", r->path);
    }
    char *wanted = (char *)allocate(L, 1); // 1: with experts
    for (int l = 0; l < L; l++) {
        wanted[l] = (l + 1) % every == 0;
        for (const Json *m = only ? only->child : NULL; m; m = m->next) {
            wanted[l] &= m->number != l;
        }
        dense += !wanted[l];
    }

    // The same in our options: the pair that agrees in all layers; first that which the model has.
    int agrees = 0;
    for (int pair = -1; pair < L * L && !agrees; pair++) {
        if (pair >= 0) {
            c->moe_every = dense == L ? 0 : 1 + pair / L;
            c->dense_first = dense == L ? 0 : pair % L;
        }
        agrees = 1;
        for (int l = 0; l < L && agrees; l++) {
            agrees = is_moe(c, l) == wanted[l];
        }
    }
    free(wanted);
    if (!agrees) {
        fail("%s: by mlp_only_layers and decoder_sparse_step the layers without experts stand where --moe-every and --dense-first "
             "cannot have them: here the first layers may have none, and then each n-th one has", r->path);
    }
}

void write_layers(FILE *file, const Config *c) {
    const char *comma = "";
    fprintf(file, "  \"decoder_sparse_step\": 1,\n  \"mlp_only_layers\": [");
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            fprintf(file, "%s%d", comma, l);
            comma = ", ";
        }
    }
    fprintf(file, "],\n");
}

// Granite's factors, as numbers; where they are missing, 1.
void take_granite(const ConfigReader *r, Config *c) {
    double factor[4];
    for (int i = 0; i < 4; i++) {
        const Json *m = find_member(r->json, granite_factors[i]);
        factor[i] = m ? m->number : 1;
        if (m && (m->type != 'n' || !(m->number >= 1e-6 && m->number <= 1e6))) {
            refuse_field(r, granite_factors[i], m, "expected a number from 1e-6 to 1e6");
        }
    }
    if (1 << r->kind & OF_GRANITE) {
        take_factors(c, factor);
    }
}

// What hidden_act is in transformers.
const char *act_name(const Config *c) {
    if (c->activation == SWIGLU || c->activation == RELU) {
        return c->activation == SWIGLU ? "silu" : "relu";
    }
    return "gelu";
}

// Experts of a class can be as many as the file says, unless the router could not learn.
void check_expert_fields(const ConfigReader *r, const Config *c) {
    if (r->kind == OURS || model_classes[r->kind].experts == NO_LAYERS || !moe_layers(c)) {
        return;
    }
    if (c->topk > c->experts) {
        fail("%s: num_experts_per_tok %d is more than the %d experts of a layer", r->path, c->topk, c->experts);
    }
    if (c->topk == 1 && c->experts > 1 && c->gate == RENORMALIZED) {
        fail("%s: num_experts_per_tok is 1: a %s makes the weight of its only expert always 1, so that its router "
             "cannot learn, and it is not trained here; set num_experts_per_tok to 2, which makes it another model, or "
             "give a model with more experts a token",
             r->path, r->kind == MIXTRAL ? "Mixtral" : model_classes[r->kind].type);
    }
}

// Fields that need more than a row of the table says. An LSTM has no heads.
void check_fields(const ConfigReader *r, const Config *c) {
    int attends = c->mixer == MIX_ATTENTION, shares = attends && !c->head_width;
    const Json *act = find_member(r->json, "hidden_act"), *types = find_member(r->json, "layer_types");
    if (act) {
        const char *text = act->type == 's' ? act->text : "", *wanted = r->own ? act_name(c) : "silu";
        if (strcmp(text, wanted) && (strcmp(text, "swish") || strcmp(wanted, "silu"))) {
            fail("%s: hidden_act is %s; expected %s", r->path, text, wanted);
        }
    }
    if (shares && c->dim % c->heads) {
        fail("%s: hidden_size %d is no multiple of num_attention_heads %d", r->path, c->dim, c->heads);
    }
    if (attends && head_width(c) % 2) {
        fail("%s: head_dim, or hidden_size %d / num_attention_heads %d, is %d, which is odd: rotary positions need an even width",
             r->path, c->dim, c->heads, head_width(c));
    }
    if (attends && c->kv_heads && c->heads % c->kv_heads) {
        fail("%s: num_attention_heads %d is no multiple of num_key_value_heads %d", r->path, c->heads, c->kv_heads);
    }
    int sliding = r->kind != OURS && model_classes[r->kind].window == WINDOW_IF_USED; // then read_window() has the window
    for (const Json *m = types ? types->child : NULL; m; m = m->next) {
        int is_sliding = m->type == 's' && !strcmp(m->text, "sliding_attention");
        if ((m->type != 's' || strcmp(m->text, "full_attention")) && !(sliding && is_sliding)) {
            refuse_field(r, "layer_types", m, "each token attends to all before it here");
        }
    }
    check_expert_fields(r, c);
}

// All fields, by the tables. What is in none of their rows is named.
void check_rules(ConfigReader *r) {
    for (const Json *m = r->json->child; m; m = m->next) {
        const Field *f = NULL;
        for (int i = 0; i < COUNT(other_fields) && !f; i++) {
            f = strcmp(other_fields[i].name, m->key) ? NULL : &other_fields[i];
        }
        if (m->type == '0' || find_taken(m->key, r->kind) || (f && f->checked >> r->kind & 1)) {
            continue;
        }
        if (!f) {
            list_word(r->unknown, sizeof(r->unknown), "%s", m->key);
            continue;
        }
        int refused = (f->rule == FIELD_OFF && !is_off(m)) || (f->rule == FIELD_TRUE && m->type != 't');
        if (refused || (f->rule == FIELD_ONE && !(m->type == 'n' && m->number == 1))) {
            refuse_field(r, f->name, m, f->what);
        }
        if (f->rule == FIELD_TRAINING && !is_off(m)) {
            list_word(r->training, sizeof(r->training), "%s", f->name);
        }
    }
}

// How far attention looks back; 0: to the beginning.
int read_window(const ConfigReader *r, Config *c) {
    const Json *m = find_member(r->json, "sliding_window"), *used = find_member(r->json, "use_sliding_window");
    int rule = r->kind == OURS ? HAS_WINDOW : model_classes[r->kind].window;
    double window = r->kind == MISTRAL && !json_get(r->json, "sliding_window") ? 4096 : 0; // a Mistral's, if nothing is said
    if (rule == NO_WINDOW || (rule == WINDOW_IF_USED && (!used || is_off(used)))) {
        return 0;
    }
    if (m && (m->type != 'n' || !(m->number >= 1))) {
        refuse_field(r, "sliding_window", m, "expected a number of tokens, or null");
    }
    window = m ? m->number : window;
    if (window > 0 && window < c->seq && r->own) {
        fail("%s: sliding_window is %g: this run's sequences are longer, and attention has no window here", r->path, window);
    }
    if (window > 0) {
        c->seq = (int)fmin(window, c->seq);
    }
    return (int)fmin(window, INT_MAX);
}

// ---- all of it

// The class that the file says, and what no field of it says of the model.
void begin_class(ConfigReader *r, Config *c, const char *type) {
    char known[256];
    r->kind = find_class(type);
    if (r->kind < 0 && !(r->own && !strcmp(type, "train_moe"))) {
        list_classes(known, sizeof(known));
        fail("%s: model_type is %s; expected one of %s, or a checkpoint of train_moe", r->path, type, known);
    }
    c->read_as = r->kind < 0 ? 1 : 2 + r->kind;
    r->kind = r->kind < 0 ? OURS : r->kind;
    if (r->own) {
        return;
    }
    config_recipe(c, model_classes[r->kind].recipe);
    c->topk = 1; // a dense layer is K*F wide
    c->shared = 0;
    char *text = copy_text(model_classes[r->kind].choices), *rest = NULL;
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        const Option *o = &options[find_option(word + 2)];
        set_option(c, o, o->kind == 'f' ? "1" : strtok_r(NULL, " ", &rest), NULL);
    }
    free(text);
}

// What the fields say of a model. own: c has what the object train_moe of the same file says, and where the two differ
// the fields count, which other tools change. Returns the length of attention's sliding window, 0: none.
int config_from_hugging_face(Config *c, const Json *json, const char *type, const char *path, int own) {
    ConfigReader r;
    memset(&r, 0, sizeof(r));
    r.json = json;
    r.path = path;
    r.own = own;
    begin_class(&r, c, type);
    check_rules(&r);
    const char *scaling = rope_source(json);
    take_rope(&r, c, "rope_parameters", !strcmp(scaling, "rope_parameters"));
    take_rope(&r, c, "rope_scaling", !strcmp(scaling, "rope_scaling"));
    for (int i = 0; i < COUNT(taken_fields); i++) {
        if (taken_fields[i].form == AS_DENSE) {
            take_layers(&r, c);
        }
        if (taken_fields[i].if_missing[r.kind]) {
            take_field(&r, c, &taken_fields[i]);
        }
    }
    check_fields(&r, c);
    take_granite(&r, c);
    if (own && r.kind != OURS && class_of(c) != r.kind) {
        fail("%s: model_type is %s, but its object train_moe (--recipe %s) says another model: take that object out of "
             "the file if the other fields are right",
             path, type, c->recipe);
    }
    int window = read_window(&r, c);
    if (r.changed[0]) {
        remark("%s: changed since this program wrote it: %s; the changed values are used", path, r.changed);
    }
    if (r.unknown[0]) {
        remark("%s: these fields are unknown, and ignored: %s", path, r.unknown);
    }
    if (r.training[0]) {
        remark("%s: these fields act in training only, and this program has nothing like them: %s", path, r.training);
    }
    return window;
}

// ---- the files beside it

// Says which file of weights is read where there are two kinds, and ends the program where there is only one of a kind
// that is not read.
void check_weight_files(const char *dir, const char *name) {
    char index[256];
    snprintf(index, sizeof(index), "%s.index.json", name);
    int whole = has_file(dir, name), shards = has_file(dir, index);
    if (whole && shards) {
        remark("%s has both %s and %s: the first is read, as transformers does", dir, name, index);
    }
    if (!whole && !shards && (has_file(dir, "pytorch_model.bin") || has_file(dir, "pytorch_model.bin.index.json"))) {
        fail("%s: its weights are in pytorch_model.bin, which is not read here: open it with transformers and save it "
             "by save_pretrained, which writes %s",
             dir, name);
    }
}
