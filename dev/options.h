// The options of the command line, and the recipes, which are rows of options.
// Gives: Config, options, recipes, config_defaults, config_recipe, config_check, parse_command_line. Needs: dev/util.h.
// Every choice is one number or word in Config, and every field one row in `options`: the row is the command line
// option, its help, its check, and its entry in the log and the checkpoints. A recipe is a router of the literature,
// written as a row of such options; what the command line says comes after it and so overrides it.
#pragma once
#include "util.h"

enum { SWIGLU, GEGLU, RELU, GELU, SAME };
enum { SOFTMAX, SIGMOID };
enum { TOP_K, HIERARCHICAL, THRESHOLD, EXPERT_CHOICE, BALANCED, HASH };
enum { PROBABILITY, RENORMALIZED };
enum { BEST, BEST_TWO };
enum { SEQUENCE, BATCH, STEP };
enum { ONE_EXPERT, EXPERT_GROUP };
enum { BY_CHOICE, BY_SCORE, BY_TOKEN };
enum { SKIP, NEXT };
enum { SWITCH, GSHARD, UNBIASED, WIDTH, CV2, VARIANCE };
enum { NORMAL, TRUNCATED };
enum { COSINE, WSD, CONSTANT };
const char *const activation_names[] = {"swiglu", "geglu", "relu", "gelu", NULL};
const char *const dense_names[] = {"swiglu", "geglu", "relu", "gelu", "same", NULL};
const char *const score_names[] = {"softmax", "sigmoid", NULL};
const char *const select_names[] = {"topk", "hierarchical", "threshold", "expert-choice", "balanced", "hash", NULL};
const char *const gate_names[] = {"probability", "renormalized", NULL};
const char *const group_score_names[] = {"best", "top2", NULL};
const char *const group_names[] = {"sequence", "batch", "step", NULL};
const char *const unit_names[] = {"expert", "group", NULL};
const char *const order_names[] = {"choice", "score", "token", NULL};
const char *const overflow_names[] = {"skip", "next", NULL};
const char *const balance_names[] = {"switch", "gshard", "unbiased", "width", "cv2", "variance", NULL};
const char *const init_names[] = {"normal", "truncated", NULL};
const char *const schedule_names[] = {"cosine", "wsd", "constant", NULL};

#define MAX_OPTIONS 120

typedef struct Config {
    const char *recipe, *data, *out, *init, *tokenizer;
    int layers, dim, heads, kv_heads, seq, untied;
    double norm_eps, rope_theta;
    int experts, topk, shared, ffn, moe_every, dense_first, activation, dense_activation, mixed, init_scheme;
    int score, select, gate, noise, routers, subtokens, recurrent, groups, group_topk, group_score, max_active;
    double scale, threshold, second_threshold, jitter, history_decay;
    int balance, group, capacity_unit, drop_order, overflow;
    double aux_weight, load_weight, device_weight, comm_weight, z_weight, sparsity_weight, bias_rate;
    double capacity_factor, eval_capacity_factor, drop_exempt;
    int batch, accum, steps, warmup, schedule;
    double lr, min_lr, weight_decay, beta1, beta2, clip;
    int eval_every, eval_batches, save_every, sample_every, log_every, keep;
    const char *prompt;
    int tokens, top_k;
    double temperature, top_p;
    int resume, seed, recompute, threads;
    int ep, overlap, replicate, replicate_every, watchdog, trace;
    int vocab;                         // V, from the tokenizer
    int list_recipes, help;
    unsigned char given[MAX_OPTIONS];  // 1 where the command line set options[i]
} Config;

// MODEL says what the model computes, ORDER which data it sees when; a resumed run may change neither, but for the pieces
// of a step (--batch). TRAIN options are taken from the checkpoint where the command line does not give them, RUN options
// belong to this call alone.
enum { MODEL, ORDER, TRAIN, RUN };

typedef struct Option {
    const char *name;
    char kind; // i integer, d number, s text, e one of `words`, f flag (takes no value), - heading of a group
    size_t offset;
    const char *standard; // default, as one would type it
    double low, high;     // i, d: what is allowed
    const char *const *words;
    int when;
    const char *help;
} Option;

// clang-format off
#define HEADING(text) {text, '-', 0, NULL, 0, 0, NULL, RUN, NULL}
#define INTEGER(name, field, standard, low, high, when, help)                                                          \
    {name, 'i', offsetof(Config, field), standard, low, high, NULL, when, help}
#define NUMBER(name, field, standard, low, high, when, help)                                                           \
    {name, 'd', offsetof(Config, field), standard, low, high, NULL, when, help}
#define WORD(name, field, standard, words, when, help)                                                                 \
    {name, 'e', offsetof(Config, field), standard, 0, 0, words, when, help}
#define TEXT(name, field, standard, when, help) {name, 's', offsetof(Config, field), standard, 0, 0, NULL, when, help}
#define FLAG(name, field, when, help) {name, 'f', offsetof(Config, field), "0", 0, 1, NULL, when, help}

const Option options[] = {
    HEADING("Files"),
    TEXT("data", data, "", TRAIN, "folder with *train*.bin, *val*.bin, tokenizer.json [data/tinystories, else data/stories]"),
    TEXT("out", out, "", RUN, "run directory: log.jsonl and checkpoints [runs/RECIPE, a fresh one for each new run]"),
    TEXT("init", init, "", RUN, "start from the weights in this checkpoint or Hugging Face directory"),
    TEXT("tokenizer", tokenizer, "", RUN, "tokenizer.json to use where the data folder has none"),
    FLAG("resume", resume, RUN, "go on from the last checkpoint in --out; start where there is none"),
    HEADING("Model"),
    TEXT("recipe", recipe, "mixtral", MODEL, "which router: a row of the options below; see --list-recipes"),
    FLAG("list-recipes", list_recipes, RUN, "show the recipes and what each one chooses"),
    INTEGER("layers", layers, "2", 1, 1000, MODEL, "layers (L)"),
    INTEGER("dim", dim, "128", 2, 65536, MODEL, "width of the model (C)"),
    INTEGER("heads", heads, "8", 1, 1024, MODEL, "query heads (H)"),
    INTEGER("kv-heads", kv_heads, "0", 0, 1024, MODEL, "key and value heads (KV) [as many as --heads]"),
    INTEGER("seq", seq, "256", 1, 1 << 20, ORDER, "tokens in a sequence (T)"),
    FLAG("untied", untied, MODEL, "give the output its own matrix instead of the embedding's"),
    NUMBER("norm-eps", norm_eps, "1e-5", 0, 1, MODEL, "epsilon inside RMSNorm's root"),
    NUMBER("rope-theta", rope_theta, "10000", 1, 1e12, MODEL, "base of the rotary position frequencies"),
    HEADING("Experts"),
    INTEGER("experts", experts, "8", 1, 4096, MODEL, "routed experts (E)"),
    INTEGER("topk", topk, "2", 1, 256, MODEL, "routed experts chosen for each token (K)"),
    INTEGER("shared", shared, "0", 0, 256, MODEL, "shared experts, which see every token (S)"),
    INTEGER("ffn", ffn, "256", 1, 1 << 20, MODEL, "hidden width of one expert (F); a dense layer has (K+S)*F"),
    INTEGER("moe-every", moe_every, "1", 0, 1000, MODEL, "every n-th layer has experts, the others are dense; 0: none has"),
    INTEGER("dense-first", dense_first, "0", 0, 1000, MODEL, "this many first layers are dense"),
    WORD("activation", activation, "swiglu", activation_names, MODEL, "of the experts"),
    WORD("dense-activation", dense_activation, "same", dense_names, MODEL, "of dense layers; same: that of the experts"),
    INTEGER("mixed", mixed, "0", 0, 1, MODEL, "1: experts differ: widths F/2, F, F, 3F/2; SwiGLU and GELU by turns; first weights 0.5 to 1.5 times as large"),
    WORD("init-scheme", init_scheme, "normal", init_names, TRAIN, "first weights: N(0,0.02), or truncated N(0,0.1/fan-in)"),
    HEADING("Router: scores"),
    WORD("score", score, "softmax", score_names, MODEL, "what makes scores p of logits"),
    INTEGER("noise", noise, "0", 0, 1, MODEL, "1: in training the logits get Gaussian noise, whose size the router learns for each token"),
    NUMBER("jitter", jitter, "0", 0, 0.999, TRAIN, "in training the router's input is multiplied by 1 +- this"),
    INTEGER("routers", routers, "1", 1, 64, MODEL, "so many routers choose K/R experts each; their answers are averaged"),
    INTEGER("subtokens", subtokens, "1", 1, 256, MODEL, "a token is split into so many, which are routed apart"),
    INTEGER("recurrent", recurrent, "0", 0, 4096, MODEL, "the router reads a GRU of this width that runs through the layers; 0: none"),
    HEADING("Router: choice and weight"),
    WORD("select", select, "topk", select_names, MODEL, "how experts are chosen"),
    INTEGER("groups", groups, "1", 1, 1024, MODEL, "experts form this many groups (D)"),
    INTEGER("group-topk", group_topk, "0", 0, 1024, MODEL, "choose only within this many groups (M); 0: within all"),
    WORD("group-score", group_score, "best", group_score_names, MODEL, "a group counts as its best score, or the sum of its two best"),
    NUMBER("threshold", threshold, "0", 0, 1, MODEL, "with --select threshold: every expert with p above this; 0: above 1/E"),
    INTEGER("max-active", max_active, "0", 0, 4096, MODEL, "and at most so many experts a token; 0: half of them"),
    NUMBER("bias-rate", bias_rate, "0", 0, 1, MODEL, "choose by p + b; b moves by this after a step, against the load; 0: no b"),
    NUMBER("history-decay", history_decay, "0", 0, 0.999999, MODEL, "choose by a moving average of the router; 0: by the router"),
    WORD("gate", gate, "renormalized", gate_names, MODEL, "weight of a chosen expert: its p, or that over the chosen ones' sum"),
    NUMBER("scale", scale, "1", 1e-6, 1000, MODEL, "all weights times this"),
    NUMBER("second-threshold", second_threshold, "0", 0, 1, TRAIN, "in training a second choice of weight w is kept with probability w/this; 0: always"),
    HEADING("Router: balance"),
    WORD("balance", balance, "switch", balance_names, TRAIN, "form of the balance loss"),
    NUMBER("aux-weight", aux_weight, "0.01", 0, 1e6, TRAIN, "weight of the balance loss, which is 1 at balance"),
    NUMBER("load-weight", load_weight, "0", 0, 1e6, TRAIN, "weight of the smooth load's loss; needs --noise"),
    NUMBER("device-weight", device_weight, "0", 0, 1e6, TRAIN, "weight of the loss that balances groups of experts"),
    NUMBER("comm-weight", comm_weight, "0", 0, 1e6, TRAIN, "weight of the loss that balances tokens sent to groups"),
    NUMBER("z-weight", z_weight, "0", 0, 1e6, TRAIN, "weight of the router's z-loss"),
    NUMBER("sparsity-weight", sparsity_weight, "0", 0, 1e6, TRAIN, "weight of the mean share of experts chosen; a count, so it has no gradient"),
    WORD("group", group, "batch", group_names, TRAIN, "the tokens over which loads, capacities and losses are taken"),
    NUMBER("capacity-factor", capacity_factor, "0", 0, 1e6, TRAIN, "an expert takes at most this times its fair share; 0: all that comes"),
    NUMBER("eval-capacity-factor", eval_capacity_factor, "0", 0, 1e6, TRAIN, "the same at evaluation, early tokens first"),
    WORD("capacity-unit", capacity_unit, "expert", unit_names, TRAIN, "what has a capacity: each expert, or each group of experts"),
    WORD("drop-order", drop_order, "choice", order_names, TRAIN, "served first: first choices, high weights, or early tokens"),
    NUMBER("drop-exempt", drop_exempt, "0", 0, 1, TRAIN, "this share of sequences loses nothing"),
    WORD("overflow", overflow, "skip", overflow_names, TRAIN, "a refused token passes by, or goes to its next best expert with room"),
    HEADING("Training"),
    INTEGER("batch", batch, "2", 1, 1 << 20, ORDER, "sequences in a micro-step (B)"),
    INTEGER("accum", accum, "1", 1, 1 << 20, ORDER, "micro-steps in a step"),
    INTEGER("steps", steps, "3000", 1, 2000000000, TRAIN, "optimizer steps"),
    NUMBER("lr", lr, "4e-3", 0, 100, TRAIN, "learning rate at its highest"),
    NUMBER("min-lr", min_lr, "-1", -1, 100, TRAIN, "learning rate at the end [a tenth of --lr]"),
    INTEGER("warmup", warmup, "100", 0, 2000000000, TRAIN, "steps over which the learning rate rises"),
    WORD("schedule", schedule, "cosine", schedule_names, TRAIN, "then: cosine; wsd: constant, last fifth linear; constant"),
    NUMBER("weight-decay", weight_decay, "0.1", 0, 100, TRAIN, "AdamW's decay of the matrices"),
    NUMBER("beta1", beta1, "0.9", 0, 0.999999, TRAIN, "AdamW: memory of the mean gradient"),
    NUMBER("beta2", beta2, "0.95", 0, 0.999999, TRAIN, "AdamW: memory of the mean squared gradient"),
    NUMBER("clip", clip, "1", 0, 1e30, TRAIN, "largest gradient norm; 0: no clipping"),
    INTEGER("seed", seed, "1", 0, 2147483647, ORDER, "of weights, data order and sampling"),
    FLAG("recompute", recompute, RUN, "keep fewer activations, and work them out again on the way back"),
    INTEGER("threads", threads, "0", 0, 4096, RUN, "threads [all cores]"),
#ifdef USE_MPI
    HEADING("Ranks: N processes, each with --batch sequences of a micro-step, started by mpirun -np N"),
    INTEGER("ep", ep, "0", 0, 65536, RUN, "the experts are divided among so many ranks [the largest common divisor of ranks and experts]"),
    INTEGER("overlap", overlap, "1", 0, 1, RUN, "1: half of a batch travels while the experts work on the other half"),
    INTEGER("replicate", replicate, "0", 0, 4096, RUN, "so many of a layer's busiest experts have a second copy on another rank"),
    INTEGER("replicate-every", replicate_every, "50", 1, 2000000000, RUN, "they are chosen anew, and the first time, after so many steps"),
    INTEGER("watchdog", watchdog, "30", 0, 86400, RUN, "after so many seconds of waiting all are asked; who has not answered in 10 more ends the job; 0: never"),
    FLAG("trace", trace, RUN, "each rank writes what it did in each step: trace-RANK.jsonl in --out"),
#endif
    HEADING("Paces, in steps; 0 turns off"),
    INTEGER("log-every", log_every, "60", 0, 2000000000, TRAIN, "a line in the log"),
    INTEGER("eval-every", eval_every, "600", 0, 2000000000, TRAIN, "validation"),
    INTEGER("eval-batches", eval_batches, "64", 0, 2000000000, TRAIN, "batches in a validation, evenly spread; 0: all there are"),
    INTEGER("sample-every", sample_every, "1200", 0, 2000000000, TRAIN, "a story"),
    INTEGER("save-every", save_every, "600", 0, 2000000000, TRAIN, "a checkpoint; the last step always saves one"),
    INTEGER("keep", keep, "2", 1, 1000000, TRAIN, "checkpoints kept"),
    HEADING("Generation"),
    TEXT("prompt", prompt, NULL, RUN, "go on from this text with the model in --out, and exit; - reads standard input"),
    INTEGER("tokens", tokens, "300", 1, 2000000000, RUN, "at most this many"),
    NUMBER("temperature", temperature, "0.5", 0, 1000, RUN, "0: always the likeliest token"),
    INTEGER("top-k", top_k, "0", 0, 2000000000, RUN, "choose among this many likeliest tokens; 0: all"),
    NUMBER("top-p", top_p, "0.95", 0, 1, RUN, "choose among the likeliest tokens that hold this much probability"),
    FLAG("help", help, RUN, "this list (also -h)"),
};
#undef HEADING
#undef INTEGER
#undef NUMBER
#undef WORD
#undef TEXT
#undef FLAG
// clang-format on
const int option_count = (int)(sizeof(options) / sizeof(options[0]));

typedef struct Recipe {
    const char *name;
    int year;    // 0: no paper of its own
    double load; // the largest load over the mean one that goes without a warning, once trained a little; 0: any
    const char *summary, *choices, *paper;
} Recipe;

// What a row does not say is as in the defaults above, which are mixtral's.
// clang-format off
const Recipe recipes[] = {
    {"mixtral", 2024, 2.5, "top-2 of 8 SwiGLU experts, weights renormalised over the two, no token dropped",
     "--activation swiglu --gate renormalized --group batch --aux-weight 0.01", "Jiang et al., Mixtral of Experts"},
    {"jacobs", 1991, 0, "every expert answers, weighted by a softmax gate",
     "--topk 8 --ffn 64 --gate probability --aux-weight 0", "Jacobs, Jordan, Nowlan, Hinton, Adaptive Mixtures of Local Experts"},
    {"shazeer", 2017, 2.5, "noisy top-4; losses on importance and on a smooth count of the load",
     "--topk 4 --ffn 128 --activation relu --noise 1 --balance cv2 --aux-weight 0.1 --load-weight 0.1",
     "Shazeer et al., Outrageously Large Neural Networks"},
    {"hierarchical", 2017, 3, "noisy top-2 of 4 groups, then noisy top-2 of each group's 4 experts",
     "--experts 16 --topk 4 --ffn 128 --activation relu --select hierarchical --groups 4 --group-topk 2 --noise 1 --balance cv2 "
     "--aux-weight 0.1 --load-weight 0.1",
     "Shazeer et al., Outrageously Large Neural Networks, appendix B"},
    {"gshard", 2020, 2.5, "top-2, the second at random by its weight; full experts pass tokens by; every other layer",
     "--activation relu --group sequence --balance gshard --capacity-factor 1 --second-threshold 0.5 --moe-every 2",
     "Lepikhin et al., GShard"},
    {"switch", 2021, 2.5, "top-1, weight is the probability, full experts pass tokens by; every other layer",
     "--topk 1 --ffn 512 --activation relu --gate probability --group sequence --capacity-factor 1.25 --jitter 0.01 --moe-every 2 "
     "--init-scheme truncated",
     "Fedus, Zoph, Shazeer, Switch Transformers"},
    {"glam", 2021, 2.5, "gshard without chance; the dense layers between have a gated GELU",
     "--activation relu --dense-activation geglu --group sequence --balance gshard --capacity-factor 1 --moe-every 2",
     "Du et al., GLaM"},
    {"deepseekmoe", 2024, 3, "many narrow experts, one of them shared by all tokens; balance of experts and of their groups",
     "--experts 31 --topk 7 --shared 1 --ffn 64 --gate probability --groups 4 --device-weight 0.05 --dense-first 1",
     "Dai et al., DeepSeekMoE"},
    {"deepseek-v2", 2024, 3, "deepseekmoe within the best 2 of 4 groups; three balance losses; a full group drops the lowest weights",
     "--experts 32 --topk 6 --shared 2 --ffn 64 --gate probability --groups 4 --group-topk 2 --group sequence --aux-weight 0.003 "
     "--device-weight 0.05 --comm-weight 0.02 --capacity-factor 1 --capacity-unit group --drop-order score --drop-exempt 0.1 "
     "--dense-first 1",
     "DeepSeek-AI, DeepSeek-V2"},
    {"deepseek-v3", 2024, 3, "sigmoid scores; a bias that follows the load chooses, the score alone weighs",
     "--experts 32 --topk 7 --shared 1 --ffn 64 --score sigmoid --scale 2.5 --group-score top2 --bias-rate 0.001 --group sequence "
     "--balance unbiased --aux-weight 0.0001 --dense-first 1",
     "DeepSeek-AI, DeepSeek-V3"},
    {"cmoe", 0, 3, "top-2 of experts that differ in width, activation and scale; balance weighed by width",
     "--mixed 1 --balance width", "a custom mixture of the source documents"},
    {"multirouter", 0, 2.5, "two routers choose two experts each; the answers are averaged",
     "--routers 2 --topk 4 --ffn 128", "multi-head routing of the source documents"},
    {"history", 2022, 2.5, "chosen by a moving average of the router, weighed by the router of now",
     "--history-decay 0.99", "cf. Dai et al., StableMoE"},
    {"threshold", 0, 3, "every expert above 1/E, and always the best: a varying number of experts",
     "--select threshold --gate probability --sparsity-weight 0.01", "sparse(p, epsilon) of the source documents"},
    {"variance", 0, 2.5, "mixtral with the variance of the weights as its balance loss",
     "--balance variance", "the loss of simple introductions"},
    {"dense", 2017, 0, "no router: one feed-forward of width K*F, the same work per token as K experts",
     "--moe-every 0", "Vaswani et al., Attention Is All You Need"},
    {"st-moe", 2022, 2.5, "top-2, a weak second at random; z-loss; room for 1.25 N/E tokens (2 N/E at evaluation); every fourth layer",
     "--layers 4 --activation geglu --balance gshard --second-threshold 0.2 --capacity-factor 0.625 --eval-capacity-factor 1 "
     "--z-weight 0.001 --moe-every 4",
     "Zoph et al., ST-MoE"},
    {"olmoe", 2024, 3.5, "top-8 of 64 narrow experts, weights as they are; z-loss",
     "--experts 64 --topk 8 --ffn 64 --gate probability --z-weight 0.001", "Muennighoff et al., OLMoE"},
    {"qwen3", 2025, 3.5, "top-8 of 64 narrow experts, renormalised; balanced over the whole step",
     "--experts 64 --topk 8 --ffn 64 --group step --aux-weight 0.008", "Qwen team, Qwen3; Qiu et al., Demons in the Detail"},
    {"expert-choice", 2022, 1.5, "each expert chooses its tokens; K is how many experts a token gets on average",
     "--select expert-choice --gate probability --aux-weight 0", "Zhou et al., Mixture-of-Experts with Expert Choice Routing"},
    {"hash", 2021, 2.5, "no router: the expert of a word is fixed, by a table that evens out their frequencies",
     "--select hash --topk 1 --ffn 512 --gate probability --aux-weight 0", "Roller et al., Hash Layers"},
    {"base", 2021, 1.5, "the best assignment that gives each expert as many tokens; greedy at evaluation",
     "--select balanced --topk 1 --ffn 512 --score sigmoid --gate probability --aux-weight 0", "Lewis et al., BASE Layers"},
    {"mh-moe", 2024, 2.5, "each token is split into four, which are routed apart and merged again",
     "--subtokens 4", "Wu et al., Multi-Head Mixture-of-Experts"},
    {"rmoe", 2024, 2.5, "the router reads a GRU that runs through the layers, so it knows what was chosen below",
     "--recurrent 64", "Qiu et al., Layerwise Recurrent Router for Mixture-of-Experts"},
};
// clang-format on
const int recipe_count = (int)(sizeof(recipes) / sizeof(recipes[0]));

int is_moe(const Config *c, int layer) {
    return c->moe_every > 0 && layer >= c->dense_first && (layer - c->dense_first + 1) % c->moe_every == 0;
}

// How many layers have experts; *last is the last of them, -1 where none has.
int moe_layers(const Config *c, int *last) {
    int count = 0;
    *last = -1;
    for (int l = 0; l < c->layers; l++) {
        if (is_moe(c, l)) {
            count++;
            *last = l;
        }
    }
    return count;
}

BOTH int is_gated(int activation) {
    return activation == SWIGLU || activation == GEGLU;
}

// Width of the feed-forward that every token of this layer passes: the shared experts' together, or a dense layer's.
int dense_width(const Config *c, int layer) {
    return (is_moe(c, layer) ? c->shared : c->topk + c->shared) * c->ffn;
}

int dense_activation(const Config *c, int layer) {
    return is_moe(c, layer) || c->dense_activation == SAME ? c->activation : c->dense_activation;
}

int expert_width(const Config *c, int e) {
    return !c->mixed || e % 4 % 3 ? c->ffn : e % 4 ? c->ffn * 3 / 2 : c->ffn / 2;
}

int expert_activation(const Config *c, int e) {
    return !c->mixed ? c->activation : e % 2 ? GELU : SWIGLU;
}

// Rows of a layer's router, without those of the noise: the groups' where groups are chosen first, then the experts'.
int router_width(const Config *c) {
    return c->select == HASH ? 0 : c->routers * c->experts + (c->select == HIERARCHICAL ? c->groups : 0);
}

// Experts that one token can have at most.
int places(const Config *c) {
    return c->select == EXPERT_CHOICE ? c->experts : c->select != THRESHOLD ? c->topk : c->max_active ? c->max_active : max_int(1, c->experts / 2);
}
int find_word(const char *const *words, const char *text) {
    for (int i = 0; words[i]; i++) {
        if (!strcmp(words[i], text))
            return i;
    }
    return -1;
}

int find_option(const char *name) {
    for (int i = 0; i < option_count; i++) {
        if (options[i].kind != '-' && !strcmp(options[i].name, name))
            return i;
    }
    return -1;
}

const Recipe *find_recipe(const char *name) {
    for (int i = 0; i < recipe_count; i++) {
        if (!strcmp(recipes[i].name, name))
            return &recipes[i];
    }
    usage_fail("there is no recipe '%s'; --list-recipes shows those there are", name);
}

// Sets one field from text, which is kept by reference. path: the file that says so, or NULL for the command line.
void set_option(Config *config, const Option *option, const char *value, const char *path) {
    char *field = (char *)config + option->offset, *end, expected[256] = "";
    int whole = 0;
    double number = 0;
    errno = 0;
    if (option->kind == 's') {
        memcpy(field, &value, sizeof(value));
    } else if (option->kind == 'e') {
        whole = find_word(option->words, value);
        for (int i = 0; whole < 0 && option->words[i]; i++)
            snprintf(expected + strlen(expected), sizeof(expected) - strlen(expected), "%s%s", i ? ", " : "one of: ",
                     option->words[i]);
        memcpy(field, &whole, sizeof(whole));
    } else {
        number = strtod(value, &end);
        int is_whole = option->kind == 'd' || (number == floor(number) && !strpbrk(value, ".eExX"));
        if (end == value || *end || errno || !(number >= option->low && number <= option->high) || !is_whole)
            snprintf(expected, sizeof(expected), "%s from %.15g to %.15g", option->kind == 'd' ? "a number" : "a whole number",
                     option->low, option->high);
        else if (option->kind == 'd')
            memcpy(field, &number, sizeof(number));
        else
            memcpy(field, (whole = (int)number, &whole), sizeof(whole));
    }
    if (*expected && path)
        fail("%s: %s is '%s'; expected %s", path, option->name, value, expected);
    if (*expected)
        usage_fail("--%s: '%s' is not %s", option->name, value, expected);
}

// The shortest of two forms that gives the same number when read again.
const char *number_text(double number, char buffer[64]) {
    snprintf(buffer, 64, "%.15g", number);
    if (strtod(buffer, NULL) != number)
        snprintf(buffer, 64, "%.17g", number);
    return buffer;
}

// One field as text, into buffer where it is not text already.
const char *option_text(const Config *config, const Option *option, char buffer[64]) {
    const char *field = (const char *)config + option->offset;
    int whole;
    double number;
    if (option->kind == 's') {
        const char *text;
        memcpy(&text, field, sizeof(text));
        return text ? text : "";
    }
    if (option->kind == 'd') {
        memcpy(&number, field, sizeof(number));
        return number_text(number, buffer);
    }
    memcpy(&whole, field, sizeof(whole));
    if (option->kind == 'e')
        return option->words[whole];
    snprintf(buffer, 64, "%d", whole);
    return buffer;
}

// A copy of text that lives as long as the program.
const char *keep_text(const char *text) {
    static char **kept = NULL;
    static size_t count = 0;
    kept = (char **)reallocate(kept, count + 1, sizeof(char *));
    kept[count] = strdup(text);
    return kept[count++];
}

void config_defaults(Config *config) {
    memset(config, 0, sizeof(*config));
    for (int i = 0; i < option_count; i++) {
        if (options[i].standard)
            set_option(config, &options[i], options[i].standard, NULL);
    }
}

// Sets the recipe's choices, but for what the command line gave.
void config_recipe(Config *config, const char *name) {
    const Recipe *recipe = find_recipe(name);
    config->recipe = recipe->name;
    char *text = strdup(recipe->choices), *rest = NULL;
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        int o = find_option(word + 2);
        const char *value = strtok_r(NULL, " ", &rest);
        if (!config->given[o])
            set_option(config, &options[o], value, NULL);
    }
    free(text);
}

// A router's choices that do not go together are refused, each with its reason.
void config_check_router(const Config *c) {
    int E = c->experts, K = c->topk, D = c->groups, M = c->group_topk, topk = c->select == TOP_K;
    int two = c->select == HIERARCHICAL, each = two ? K / max_int(1, M) : places(c) / c->routers; // chosen by one gate
    int bounded = c->capacity_factor > 0 || c->eval_capacity_factor > 0, of_weights = c->balance >= CV2;
    int grouped = c->device_weight > 0 || c->comm_weight > 0, unlike = c->recurrent || c->subtokens > 1;
    const struct {
        int wrong;
        const char *reason;
    } rules[] = {
        {K > E * c->routers || c->max_active > E, "a token cannot have more experts than there are"},
        {K % c->routers, "--topk must be divisible by --routers"},
        {D > E || M > D || (M && K > M * (E / D)), "--groups and --group-topk must leave at least --topk experts to choose from"},
        {c->gate == RENORMALIZED && E > 1 && (each == 1 || (two && M == 1)),
         "where one is chosen, --gate renormalized makes its weight always 1, so the router would never learn; use --gate probability "
         "or choose more (for each router, and on each level)"},
        {M && !topk && !two, "--group-topk goes with --select topk or hierarchical"},
        {two && (M < 1 || E % D || K % max_int(1, M)),
         "--select hierarchical needs --group-topk, --experts divisible by --groups and --topk by --group-topk"},
        {two && (c->gate != RENORMALIZED || c->score == SIGMOID || c->jitter + c->z_weight > 0 || grouped ||
                 (c->aux_weight > 0 && !of_weights)),
         "--select hierarchical goes with --gate renormalized and softmax, and balances by --balance cv2 or variance and --load-weight"},
        {c->routers > 1 && (!topk || c->noise || D > 1 || M || c->bias_rate > 0 || c->score == SIGMOID || c->balance == UNBIASED ||
                            c->overflow == NEXT || c->second_threshold > 0),
         "--routers goes with plain top-k of softmax scores only"},
        {c->noise && (c->score == SIGMOID || (!topk && !two) || c->history_decay > 0),
         "--noise needs --score softmax and --select topk or hierarchical, without --history-decay"},
        {c->noise && (two ? each >= E / D || M >= D : K >= E), "--noise needs fewer chosen than there are to choose from"},
        {c->load_weight > 0 && (!c->noise || (M && topk)), "--load-weight needs --noise, and does not know --group-topk"},
        {(grouped || c->capacity_unit == EXPERT_GROUP) && D == 1, "--device-weight, --comm-weight and --capacity-unit group need --groups"},
        {c->comm_weight > 0 && !M, "--comm-weight needs --group-topk"},
        {c->z_weight > 0 && c->score == SIGMOID, "--z-weight is of softmax scores"},
        {(c->bias_rate > 0 || c->history_decay > 0) && !topk, "--bias-rate and --history-decay go with --select topk"},
        {c->bias_rate > 0 && c->history_decay > 0, "--bias-rate or --history-decay: give one of them"},
        {c->balance == UNBIASED && !topk, "--balance unbiased goes with --select topk"},
        {c->group == STEP && (c->routers > 1 || (c->balance != SWITCH && c->balance != WIDTH) || c->load_weight + c->comm_weight > 0),
         "--group step goes with one router and with losses of counts: --balance switch or width, --device-weight"},
        {c->second_threshold > 0 && (K != 2 || c->gate != RENORMALIZED || !topk),
         "--second-threshold needs two experts a token, --gate renormalized and --select topk"},
        {c->overflow == NEXT && (!topk || !bounded || c->capacity_unit == EXPERT_GROUP || c->drop_order == BY_SCORE),
         "--overflow next needs a capacity, --select topk, --capacity-unit expert, and --drop-order choice or token"},
        {c->overflow == NEXT && (of_weights || c->noise), "--overflow next changes weights after the losses of --balance cv2, variance and --noise"},
        {c->select == EXPERT_CHOICE && (bounded || c->aux_weight > 0 || c->score == SIGMOID || c->gate == RENORMALIZED),
         "with --select expert-choice experts are full by construction: softmax, --gate probability, no capacity, no --aux-weight"},
        {c->select == BALANCED && (K != 1 || bounded || c->aux_weight > 0),
         "--select balanced gives each token one expert and each expert its share: --topk 1, no capacity, no --aux-weight"},
        {c->select == HASH && (K != 1 || c->gate == RENORMALIZED || unlike || grouped || c->aux_weight + c->z_weight > 0 ||
                               c->sparsity_weight + c->jitter > 0),
         "--select hash has no router: --topk 1, --gate probability, and nothing that trains or balances one"},
        {c->subtokens > 1 && (c->dim % c->subtokens || c->recurrent), "--subtokens must divide --dim, and goes without --recurrent"},
        {c->mixed && (c->ffn % 2 || E % 4), "--mixed needs an even --ffn and --experts divisible by 4"},
    };
    for (int i = 0; i < (int)(sizeof(rules) / sizeof(rules[0])); i++) {
        if (rules[i].wrong)
            usage_fail("%s (here: --recipe %s, --experts %d, --topk %d)", rules[i].reason, c->recipe, E, K);
    }
}

// Fills in what follows from other fields and refuses what does not go together.
void config_check(Config *c) {
    if (!c->kv_heads)
        c->kv_heads = c->heads;
    if (c->dim % c->heads)
        usage_fail("--dim %d is not divisible by --heads %d", c->dim, c->heads);
    if (c->dim / c->heads % 2)
        usage_fail("--dim %d / --heads %d: heads must have an even width for rotary positions", c->dim, c->heads);
    if (c->heads % c->kv_heads)
        usage_fail("--heads %d is not divisible by --kv-heads %d", c->heads, c->kv_heads);
    int last;
    if (c->moe_every && !moe_layers(c, &last))
        usage_fail(
            "--moe-every %d with --dense-first %d leaves none of %d layers with experts; --recipe dense says so openly",
            c->moe_every, c->dense_first, c->layers);
    if (c->moe_every)
        config_check_router(c);
    double tokens = (double)c->batch * c->seq, widest = fmax(3.0 * c->dim, 2.0 * (c->topk + c->shared) * c->ffn);
    if (c->moe_every)
        widest = fmax(widest, 2.0 * c->subtokens * fmax(router_width(c), places(c) * (double)c->groups));
    if (c->moe_every && 3.0 * c->experts * c->ffn > INT_MAX)
        usage_fail("--experts %d times --ffn %d is too much", c->experts, c->ffn);
    if (tokens * widest > INT_MAX)
        usage_fail("--batch %d times --seq %d tokens at once is too much for this width; take a smaller batch and --accum", c->batch,
                   c->seq);
    if (c->min_lr > c->lr)
        usage_fail("--min-lr %g is more than --lr %g", c->min_lr, c->lr);
}

void print_options(void) {
    const char *name = program_name;
    printf("%s: trains a Mixture-of-Experts language model from scratch.\n\n"
           "  ./%-36s train on the built-in stories, then tell one\n"
           "  ./%s --prompt \"Once upon\"       let the trained model go on\n"
           "  ./%s --out runs/mixtral --resume --steps 2000\n\n"
           "Options [default]:\n",
           name, name, name, name);
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->kind == '-') {
            printf("\n%s\n", o->name);
            continue;
        }
        char left[256];
        int n = snprintf(left, sizeof(left), "--%s%s", o->name,
                         o->kind == 'f'   ? ""
                         : o->kind == 's' ? " TEXT"
                         : o->kind == 'd' ? " X"
                         : o->kind == 'i' ? " N"
                                          : " ");
        for (int w = 0; o->kind == 'e' && o->words[w]; w++)
            n += snprintf(left + n, sizeof(left) - (size_t)n, "%s%s", w ? "|" : "", o->words[w]);
        printf("  %-26s %s", left, o->help);
        int explained = strchr(o->help, '[') != NULL;
        printf(o->kind == 'f' || explained || !o->standard ? "\n" : " [%s]\n", o->standard);
    }
}

void print_recipes(void) {
    printf("Recipes: each is a row of options over the defaults, which are mixtral's; later options override it.\n"
           "Each stands with its year, what it chooses, and its paper; doc/recipes.md explains them.\n");
    for (int i = 0; i < recipe_count; i++) {
        const Recipe *r = &recipes[i];
        char year[16] = "no paper";
        if (r->year)
            snprintf(year, sizeof(year), "%d", r->year);
        printf("\n%s (%s): %s\n    %s\n    %s\n", r->name, year, r->summary, r->choices, r->paper);
    }
}

// What the command line asks for, over the recipe, over the defaults.
void parse_command_line(Config *c, int argc, char **argv) {
    config_defaults(c);
    for (int i = 1; i < argc; i++) { // --name value, --name=value, or --name alone for a flag
        const char *name = strcmp(argv[i], "-h") ? argv[i] : "--help", *value = strchr(name, '=');
        char word[64];
        snprintf(word, sizeof(word), "%.*s", value ? (int)(value - name) : 63, name);
        int o = strncmp(word, "--", 2) ? -1 : find_option(word + 2);
        if (o < 0)
            usage_fail("there is no option %s", name);
        if (options[o].kind == 'f' && value)
            usage_fail("%s takes no value", word);
        if (options[o].kind == 'f')
            value = "1";
        else if (value)
            value++;
        else if (!(value = argv[++i]))
            usage_fail("%s needs a value", word);
        set_option(c, &options[o], value, NULL);
        c->given[o] = 1;
    }
    config_recipe(c, c->recipe);
}

// The run directory where none is given: for a new run the first free one of runs/RECIPE, runs/RECIPE-2, ...; else the one
