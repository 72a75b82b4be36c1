// Options that would have no effect are refused, and a word that is no option names the nearest one.
// Gives: Effect, add_effects, refuse_idle_options, check_warmup, unknown_option, unknown_recipe. Needs: the tables of
// options and recipes of dev/options.h, which includes it.
//
// What an option needs is one row of a table: its name, a function that says whether it can have an effect with a
// configuration, and the option that would give it one. Below are the rows of the lesson's options; those of a router's
// options stand in its file. Only what the command line gave is looked at: a recipe or a checkpoint may say more than
// is used. An option is not refused where its value would be the same without the command line, or is its default.
#pragma once

typedef struct Effect {
    const char *option;
    int (*works)(const Config *c);
    const char *needs;
} Effect;

// ---- misspelt options and recipes

// How many letters must be inserted, removed or replaced to make b of a.
int edit_distance(const char *a, const char *b) {
    enum { MOST = 64 };
    int row[MOST + 1], n = min_int((int)strlen(b), MOST);
    for (int j = 0; j <= n; j++) {
        row[j] = j;
    }
    for (int i = 1; a[i - 1]; i++) {
        int corner = row[0]; // of the row before
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int above = row[j], change = corner + (a[i - 1] != b[j - 1]);
            row[j] = min_int(change, 1 + min_int(above, row[j - 1]));
            corner = above;
        }
    }
    return row[n];
}

// Looks at one more name: *nearest becomes the nearest one so far that is near at all; of two that are as near, one that the
// word is the beginning of (--expert is --experts, and not --export). *distance begins at 0.
void compare_name(const char *word, const char *name, const char **nearest, int *distance) {
    int apart = edit_distance(word, name), limit = max_int(1, (int)strlen(word) / 3);
    int begins = !strncmp(word, name, strlen(word));
    if (apart <= limit && (!*nearest || apart < *distance || (apart == *distance && begins))) {
        *nearest = name;
        *distance = apart;
    }
}

// word: what the command line has, with its dashes and without a value.
__attribute__((noreturn)) void unknown_option(const char *word) {
    const char *name = word + strspn(word, "-"), *nearest = NULL;
    int distance = 0;
    if (!strcmp(name, "eval-batches")) {
        usage_fail("there is no option %s any more: --eval-tokens N says how many tokens an evaluation reads", word);
    }
    for (int i = 0; i < option_count; i++) {
        compare_name(name, options[i].name, &nearest, &distance);
    }
    if (nearest) {
        usage_fail("there is no option %s; the nearest is --%s", word, nearest);
    }
    usage_fail("there is no option %s", word);
}

__attribute__((noreturn)) void unknown_recipe(const char *name) {
    const char *nearest = NULL;
    int distance = 0;
    for (int i = 0; i < recipe_count; i++) {
        compare_name(name, recipes[i].name, &nearest, &distance);
    }
    if (nearest) {
        usage_fail("there is no recipe '%s'; the nearest is %s; --list-recipes shows those there are", name, nearest);
    }
    usage_fail("there is no recipe '%s'; --list-recipes shows those there are", name);
}

// ---- what the lesson's options need

int moe_layers(const Config *c); // train_moe.c

int has_experts(const Config *c) {
    return moe_layers(c) > 0;
}

int has_dense_layers(const Config *c) { // with --last-feed 0 the last layer has neither experts nor a dense one
    return moe_layers(c) < c->layers - !c->last_feed;
}

int has_norms(const Config *c) { // the gate of --ngram-gate divides by the root of a mean of squares, too
    return c->norms || c->qk_norm || c->ngram_gate;
}

// With --select threshold the scores say how many experts a token has; the width of a dense layer is K times F.
int counts_topk(const Config *c) {
    return c->select != THRESHOLD || has_dense_layers(c) || c->capacity_factor > 0 || c->eval_capacity_factor > 0;
}

// Experts that differ have activations of their own, and so may dense layers.
int has_activation(const Config *c) {
    return (has_experts(c) && (!c->mixed || c->shared > 0)) || (has_dense_layers(c) && c->dense_activation == SAME);
}

int has_scores(const Config *c) {
    return c->select != HASH;
}

int has_balance_loss(const Config *c) {
    return c->aux_weight > 0;
}

int has_training_capacity(const Config *c) {
    return c->capacity_factor > 0;
}

int has_capacity(const Config *c) {
    return c->capacity_factor > 0 || c->eval_capacity_factor > 0;
}

// Does anything look at many tokens together?
int looks_at_groups(const Config *c) {
    double losses = c->aux_weight + c->load_weight + c->device_weight + c->comm_weight;
    int heads = c->attention_experts > 1 && (c->attention_aux_weight > 0 || c->attention_capacity_factor > 0);
    return losses > 0 || c->capacity_factor > 0 || c->quantile_sweeps > 0 || c->select == EXPERT_CHOICE ||
           c->select == BALANCED || heads;
}

int has_shared_experts(const Config *c) {
    return has_experts(c) && c->shared > 0;
}

int has_heads(const Config *c) {
    return c->mixer == MIX_ATTENTION;
}

int has_qk_norm(const Config *c) {
    return c->qk_norm;
}

int is_rope_scaled(const Config *c) {
    return has_heads(c) && c->rope_scaling != ROPE_NONE;
}

int is_rope_llama3(const Config *c) {
    return has_heads(c) && c->rope_scaling == ROPE_LLAMA3;
}

int has_ngrams(const Config *c) {
    return c->ngrams > 0;
}

int rate_falls(const Config *c) {
    return c->schedule != CONSTANT;
}

int sets_steps(const Config *c) {
    return !c->given[find_option("steps")];
}

int asks_for_copies(const Config *c) {
    return c->replicate > 0;
}

int sends_largest(const Config *c) {
    return c->compress == CODE_TOPK;
}

int exports(const Config *c) {
    return c->export_to[0] != 0;
}

int quantizes(const Config *c) {
    return c->quantize != NO_BLOCKS;
}

int mixes_bits(const Config *c) {
    return c->quantize >= MIXED;
}

int reads_weights(const Config *c) {
    return c->resume || c->init[0] || c->prompt || exports(c) || quantizes(c) || c->evaluate || c->merge[0];
}

int is_drawn(const Config *c) {
    return c->temperature > 0;
}

int trains_pairs(const Config *c) {
    return c->lora > 0;
}

int has_teacher(const Config *c) {
    return c->teacher[0] != 0;
}

int is_offloaded(const Config *c) {
    return c->offload > 0;
}

const Effect base_effects[] = {
    {"experts", has_experts, "layers with experts, which --moe-every 0 or --recipe dense takes away"},
    {"offload", has_experts, "layers with experts, which --moe-every 0 or --recipe dense takes away"},
    {"offload-cold", is_offloaded, "experts in a file: --offload N"},
    {"offload-dir", is_offloaded, "experts in a file: --offload N"},
    {"topk", counts_topk, "experts that are counted: --select topk"},
    {"activation", has_activation, "experts or dense layers that have it: --mixed 0, or --dense-activation same"},
    {"norm-eps", has_norms, "norms: --norms 1"},
    {"moe-sigmoid", has_experts, "layers with experts, which --moe-every 0 or --recipe dense takes away"},
    {"mixed", has_experts, "layers with experts, which --moe-every 0 or --recipe dense takes away"},
    {"dense-first", has_experts, "layers with experts, which --moe-every 0 or --recipe dense takes away"},
    {"dense-activation", has_dense_layers, "dense layers: --moe-every 2, --dense-first 1 or --recipe dense"},
    {"shared-gate", has_shared_experts, "shared experts beside routed ones: --shared 1"},
    {"shared-ffn", has_shared_experts, "shared experts beside routed ones: --shared 1"},
    {"dense-ffn", has_dense_layers, "dense layers: --moe-every 2, --dense-first 1 or --recipe dense"},
    {"head-width", has_heads, "heads: --mixer attention"},
    {"qk-norm-over", has_qk_norm, "norms of queries and keys: --qk-norm"},
    {"rope-scaling", has_heads, "heads: --mixer attention"},
    {"rope-factor", is_rope_scaled, "scaled positions: --rope-scaling linear or llama3"},
    {"rope-low", is_rope_llama3, "scaled positions: --rope-scaling llama3"},
    {"rope-high", is_rope_llama3, "scaled positions: --rope-scaling llama3"},
    {"rope-original", is_rope_llama3, "scaled positions: --rope-scaling llama3"},
    {"score", has_scores, "scores, which --select hash does not have: --select topk"},
    {"balance", has_balance_loss, "a balance loss: --aux-weight 0.01"},
    {"group", looks_at_groups, "a loss or a capacity that looks at many tokens: --aux-weight or --capacity-factor"},
    {"ngram-order", has_ngrams, "a table: --ngrams 16384"},
    {"ngram-gate", has_ngrams, "a table: --ngrams 16384"},
    {"lora-alpha", trains_pairs, "pairs: --lora 8"},
    {"lora-targets", trains_pairs, "pairs: --lora 8"},
    {"distill-weight", has_teacher, "a teacher: --teacher DIR"},
    {"distill-temperature", has_teacher, "a teacher: --teacher DIR"},
    {"minutes", sets_steps, "a number of steps that it can set: leave --steps out"},
    {"min-lr", rate_falls, "a learning rate that falls: --schedule cosine or wsd"},
    {"replicate-every", asks_for_copies, "copies of experts: --replicate 1"},
    {"compress-ratio", sends_largest, "gradients of which only the largest are sent: --compress topk"},
    {"trust-weights", reads_weights, "weights to read: --resume, --init, --prompt, --evaluate, --export, --quantize or --merge"},
    {"quantized", quantizes, "a model to write: --quantize q8_0"},
    {"few", mixes_bits, "experts of two kinds: --quantize mixed"},
    {"export-type", exports, "a file to write: --export FILE"},
    {"top-k", is_drawn, "tokens that are drawn by chance: a --temperature above 0"},
    {"top-p", is_drawn, "tokens that are drawn by chance: a --temperature above 0"},
};

Effect effects[96];
int effect_count = 0;

void add_effects(const Effect *list, int count) {
    if (effect_count + count > COUNT(effects)) {
        fail("there are more than %d rows about effects of options", COUNT(effects));
    }
    for (int i = 0; i < count; i++) {
        effects[effect_count++] = list[i];
    }
}

// ---- the check

// Does the option belong to the training alone? Then --prompt has no use for it.
int is_of_training(const Option *o) {
    const char *const of_generation[] = {"data", "seed", "seq", "eval-capacity-factor", "capacity-unit", "overflow",
                                         "precision", NULL};
    int of_run = o->when == TRAIN || o->when == ORDER;
    return !strcmp(o->name, "recompute") || (of_run && find_word(of_generation, o->name) < 0);
}

// What the option needs to have an effect; NULL: it has one.
const char *missing_for(const Config *c, const Option *o) {
    if (c->prompt && is_of_training(o)) {
        return "training, and --prompt only goes on from a text";
    }
    if (exports(c) && is_of_training(o)) {
        return "training, and --export only writes a file";
    }
    if (c->merge[0] && is_of_training(o)) {
        return "training, and --merge only writes a model";
    }
    if ((quantizes(c) || c->evaluate) && is_of_training(o) && strcmp(o->name, "eval-tokens") != 0) {
        return "training, and --quantize and --evaluate only read a model";
    }
    int of_heads = !strcmp(o->name, "group") && c->attention_experts > 0; // the routers of heads look at groups, too
    if (!strncmp(o->heading, "Router", 6) && !has_experts(c) && !of_heads) {
        return "layers with experts, which --moe-every 0 or --recipe dense takes away";
    }
    for (int i = 0; i < effect_count; i++) {
        if (!strcmp(effects[i].option, o->name) && !effects[i].works(c)) {
            return effects[i].needs;
        }
    }
    return NULL;
}

// Refuses an option that the command line gave and that cannot have an effect. before: what is there without the
// command line, in a checkpoint; NULL: the recipe, over the defaults.
void refuse_idle_options(const Config *c, const Config *before) {
    Config plain;
    if (!before) {
        config_defaults(&plain);
        config_recipe(&plain, c->recipe);
    }
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        char mine[64], theirs[64];
        const char *value = option_text(c, o, mine);
        int same = o->when != RUN && !strcmp(value, option_text(before ? before : &plain, o, theirs));
        int off = o->standard && !strcmp(value, o->standard);
        const char *needs = c->given[i] && !same && !off ? missing_for(c, o) : NULL;
        if (needs) {
            usage_fail("--%s%s%s would have no effect: it needs %s", o->name, o->kind == 'f' ? "" : " ",
                       o->kind == 'f' ? "" : value, needs);
        }
    }
}

// A warm-up that lasts as long as the run: it is refused where the command line asks for it, and else said, since the
// default is made for longer runs. before: as above.
void check_warmup(const Config *c, const Config *before) {
    if (c->warmup < c->steps) {
        return;
    }
    if (c->given[find_option("warmup")] && (!before || before->warmup != c->warmup)) {
        usage_fail("--warmup %d: a run of %d steps would be nothing but warm-up; take a shorter one, or more "
                   "--steps",
                   c->warmup, c->steps);
    }
    printf("the learning rate only rises, to %.2g: the warm-up of %d steps is no shorter than the run; --warmup says "
           "how long it is\n",
           c->lr * c->steps / c->warmup, c->warmup);
}
