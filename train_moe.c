// train_moe.c: trains a Mixture-of-Experts language model from scratch, on the CPU, in one file.
//
// It is the whole trainer: configuration, matrix product, attention, router, experts, every backward pass, AdamW,
// tokenizer, data, checkpoints and generation. It is not a framework: there is no autograd, each gradient is written
// out by hand and checked against finite differences in test_moe.c. Read it from top to bottom.
//
//   make train_moe        a C compiler and make are all it takes; OpenMP is used where the compiler has it
//   ./train_moe           trains on the built-in stories and tells one
//   ./train_moe -h        every option
//
// The model, with the shape of what flows (B sequences of T tokens, N = B*T; C = --dim):
//
//     tokens (B,T)
//        |  embedding (V,C)
//        v
//     x (N,C) ----------------------------------------------------------------------------+
//        |                                                                    L layers    |
//        |-- rmsnorm --> qkv (N,(H+2KV)*D) --> rope --> attention (N,H*D) --> proj --(+)  |
//        |                                                                                |
//        |-- rmsnorm --> h (N,C) --+--> router (N,E): which K of the E experts? ---+      |
//        |                         |                                               v      |
//        |                         |   plan: tokens sorted by expert      gate weight     |
//        |                         |        |                                      |      |
//        |                         +--> expert 0:  rows off[0]..off[1] --+         v      |
//        |                         +--> expert 1:  rows off[1]..off[2] --+-->  weighted --(+)
//        |                         +--> ...                              |        sum     |
//        |                         +--> expert E-1                     --+                |
//        |  <-----------------------------------------------------------------------------+
//        v
//     rmsnorm --> logits (N,V) = x . embedding^T --> cross-entropy
//
// A feed-forward layer in a dense GPT is one pair of matrices that every token passes. Here there are E such pairs,
// the experts, and a small linear map, the router, sends each token to K of them: E/K times the weights for the same
// work per token. What a dense trainer would not have is in section 6 and, put together, in 7.
//
// Letters, everywhere: B batch, T sequence length, N tokens = B*T, C model width, V vocabulary, L layers, H query heads,
// KV key/value heads, D = C/H head width, E experts, K experts per token, F expert hidden width, S shared experts.
// A comment such as "x (N,C)" gives an array's shape, row-major. Gradients are named like their value with a d before.
// The file is C11 and C++17 at once, so that a CUDA twin can include it and replace only what computes.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef USE_MPI
#include <aio.h>
#include <mpi.h>
#include <sched.h>
#endif
#include "data/unicode.h"

// `real` is the type of every weight and activation: float, or double to check gradients (make train_moe_double).
#ifndef REAL
#define REAL float
#endif
typedef REAL real;

// What a CUDA twin's kernels call too.
#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 2. Configuration and recipes
//
// Every choice is one number or word in Config, and every field one row in `options`: the row is the command line
// option, its help, its check, and its entry in the log and the checkpoints. A recipe is a router of the literature,
// written as a row of such options; what the command line says comes after it and so overrides it.

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

BOTH int min_int(int a, int b) {
    return a < b ? a : b;
}

BOTH int max_int(int a, int b) {
    return a > b ? a : b;
}

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

// ---------------------------------------------------------------------------------------------------------------------
// 3. Errors, memory, random numbers, JSON, options, ranks
//
// A wrong file or a wrong option ends the program with one line that names it: exit 1 for files and machines,
// exit 2 for the command line. Random numbers are a pure function of what they are for, so that any thread,
// process or device draws the same ones in any order.

#ifdef USE_MPI
const char *program_name = "train_moe_mpi";
#else
const char *program_name = "train_moe";
#endif
size_t largest_message = 1 << 30; // bytes, since MPI counts in int
char unfinished_path[4096]; // a folder being written; fail() removes it, so that nothing half-written stays

// The processes that train one model together (make train_moe_mpi), and this one's place among them: see "ranks" below.
typedef struct Traffic {  // of this rank, since the log's last line
    double waited;        // seconds in which it waited for others
    double sent, reduced; // bytes that it sent by all-to-all, and for gradients and weights
} Traffic;

typedef struct Ranks {
    int size, rank;
    int ep, place;    // ranks of a group, which have all experts among them; rank = group number * ep + place
    int groups;       // size / ep, of which each has the same experts
    int watchdog;     // seconds
    int crowded;      // this machine has more ranks than cores, so that who waits had better sleep
    Traffic traffic;
} Ranks;
Ranks ranks = {1, 0, 1, 0, 1, 0, 0, {0, 0, 0}};
// One process alone has none of what follows: there the compiler leaves it out.
#ifdef USE_MPI
#define MANY (ranks.size > 1)
#else
#define MANY 0
#endif
#define APART (MANY && ranks.ep > 1) // the experts are on several ranks

__attribute__((noreturn)) void end_program(int status) {
#ifdef USE_MPI
    if (MANY)
        MPI_Abort(MPI_COMM_WORLD, status);
#endif
    exit(status);
}

void remove_tree(const char *path) {
    DIR *dir = opendir(path);
    if (dir) {
        char inner[4200];
        for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
                snprintf(inner, sizeof(inner), "%s/%s", path, entry->d_name) < (int)sizeof(inner) && unlink(inner) != 0)
                remove_tree(inner);
        }
        closedir(dir);
    }
    rmdir(path);
}

__attribute__((noreturn)) void fail_with(int status, const char *hint, const char *format, va_list args) {
    fflush(stdout);
    if (ranks.rank)
        sleep(3); // what all ranks find is said by the first, which ends the others
    fprintf(stderr, "%s: ", program_name);
    if (ranks.rank)
        fprintf(stderr, "rank %d: ", ranks.rank);
    vfprintf(stderr, format, args);
    fprintf(stderr, "%s\n", hint);
    if (unfinished_path[0])
        remove_tree(unfinished_path);
    end_program(status);
}

__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(1, "", format, args);
}

__attribute__((noreturn, format(printf, 1, 2))) void usage_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(2, " (-h lists the options)", format, args);
}

// Zeroed memory for count elements of size bytes; also for count 0. Large pages, where the system has some to give, save
// looking up where the small ones are.
void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        fail("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
#ifdef MADV_HUGEPAGE
    size_t page = 4096, skip = (page - (size_t)p % page) % page;
    if (count * size >= 1 << 22)
        madvise((char *)p + skip, (count * size - skip) / page * page, MADV_HUGEPAGE);
#endif
    return p;
}

void *reallocate(void *p, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size)
        fail("out of memory: %zu elements of %zu bytes", count, size);
    p = realloc(p, count && size ? count * size : 1);
    if (!p)
        fail("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
    return p;
}

real *allocate_reals(size_t count) {
    return (real *)allocate(count, sizeof(real));
}

// The whole file, with a NUL behind its last byte.
char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file)
        fail("%s: cannot open: %s", path, strerror(errno));
    size_t room = 1 << 16, used = 0, got;
    char *text = (char *)allocate(room, 1);
    while ((got = fread(text + used, 1, room - used - 1, file)) > 0) {
        used += got;
        if (room - used < 2)
            text = (char *)reallocate(text, room *= 2, 1);
    }
    if (ferror(file))
        fail("%s: cannot read: %s", path, strerror(errno));
    fclose(file);
    text[used] = 0;
    *size = used;
    return text;
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The memory that this process holds, in bytes; where /proc does not tell, the most that it has held.
double memory_now(void) {
    struct rusage use;
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    int known = file && fscanf(file, "%ld %ld", &pages, &resident) == 2;
    if (file)
        fclose(file);
    if (known)
        return (double)resident * (double)sysconf(_SC_PAGESIZE);
    getrusage(RUSAGE_SELF, &use);
#ifdef __APPLE__
    return (double)use.ru_maxrss;
#else
    return 1024.0 * (double)use.ru_maxrss;
#endif
}

int on_terminal(void) { // and not through mpirun, whose pipes look like one
    return !getenv("OMPI_COMM_WORLD_SIZE") && !getenv("PMI_SIZE") && isatty(1);
}

int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ---- random numbers

// A bijection of 64-bit numbers in which every input bit moves every output bit (SplitMix64's finaliser, Steele 2014).
BOTH uint64_t hash64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

enum { RANDOM_INIT, RANDOM_ORDER, RANDOM_JITTER, RANDOM_SAMPLE, RANDOM_NOISE, RANDOM_SECOND, RANDOM_EXEMPT }; // what a random number is for

// A stream of random numbers: one for each (seed, purpose, a, b), a and b being a step and a layer, say.
BOTH uint64_t random_stream(uint64_t seed, int purpose, uint64_t a, uint64_t b) {
    return hash64(hash64(hash64(hash64(seed) ^ (uint64_t)purpose) ^ a) ^ b);
}

// The i-th number of a stream, uniform in [0,1).
BOTH double random_uniform(uint64_t stream, uint64_t i) {
    return (double)(hash64(stream ^ hash64(i)) >> 11) * (1.0 / 9007199254740992.0);
}

// The i-th number of a stream, standard normal (Box and Muller 1958).
BOTH double random_normal(uint64_t stream, uint64_t i) {
    double u = 1.0 - random_uniform(stream, 2 * i), v = random_uniform(stream, 2 * i + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

// One small JSON reader, for the tokenizer, configurations, checkpoints and the log. A file becomes a tree: objects and
// arrays hold a list of children. All nodes and strings live in one allocation, so that a tree is freed by one call.
// It takes exactly what RFC 8259 allows and stops with a message at anything else.

typedef struct Json {
    char type;     // 'o' object, 'a' array, 's' string, 'n' number, 't' true, 'f' false, '0' null
    char *key;     // member name inside an object, else NULL
    char *text;    // string: its bytes unescaped to UTF-8, NUL-terminated
    size_t length; // string: number of bytes (may contain NUL)
    double number;
    struct Json *child, *next; // first element or member; next sibling
} Json;

// The length of the UTF-8 character at s (n bytes are left, at least one), and its code point. A byte that begins no
// valid character (overlong forms, surrogates and cut-off ones included) is a character of its own: length 1, code -1.
int utf8_decode(const char *s, size_t n, int32_t *code) {
    const unsigned char *u = (const unsigned char *)s;
    int length = u[0] < 0x80 ? 1 : u[0] < 0xc2 ? 0 : u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 : u[0] < 0xf5 ? 4 : 0;
    int32_t c = length <= 1 ? u[0] : u[0] & (0x7f >> length);
    int valid = length > 0 && (size_t)length <= n;
    for (int i = 1; valid && i < length; i++) {
        valid = (u[i] & 0xc0) == 0x80;
        c = c << 6 | (u[i] & 0x3f);
    }
    if ((length == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) || (length == 4 && (c < 0x10000 || c > 0x10ffff)))
        valid = 0;
    *code = valid ? c : -1;
    return valid ? length : 1;
}

char *utf8_encode(char *out, int32_t c) { // returns the end of what it wrote, one to four bytes
    int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    *out++ = (char)(more ? (0xff00 >> (more + 1) & 0xff) | c >> 6 * more : c);
    while (more--)
        *out++ = (char)(0x80 | (c >> 6 * more & 0x3f));
    return out;
}

typedef struct JsonReader {
    const char *name;
    char *copy, *at, *end; // of the text, with a NUL behind it; strings are unescaped where they stand
    Json *node;            // the next free node
} JsonReader;

void json_fail(const JsonReader *r, const char *expected) {
    char found[32] = "the end of the text";
    if (r->at < r->end)
        snprintf(found, sizeof(found), *r->at > ' ' && *r->at < 0x7f ? "'%c'" : "byte 0x%02x", (unsigned char)*r->at);
    fail("%s: bad JSON at byte %zu: expected %s, found %s", r->name, (size_t)(r->at - r->copy), expected, found);
}

int json_take(JsonReader *r, char c) { // steps over white space, and then over c: is it there?
    r->at += strspn(r->at, " \n\r\t");
    if (*r->at != c)
        return 0;
    r->at++;
    return 1;
}

int32_t json_escape(JsonReader *r) { // the character, or half a pair, that stands behind a backslash
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = (const char *)memchr(names, *r->at, sizeof(names) - 1);
    if (name) {
        r->at++;
        return values[name - names];
    }
    if (*r->at != 'u' || strspn(r->at + 1, "0123456789abcdefABCDEF") < 4)
        json_fail(r, "one of \"\\/bfnrt or u and four hexadecimal digits after a backslash");
    char digits[5] = "";
    memcpy(digits, r->at + 1, 4);
    r->at += 5;
    return (int32_t)strtol(digits, NULL, 16);
}

char *json_read_string(JsonReader *r, size_t *length) {
    if (!json_take(r, '"'))
        json_fail(r, "a string");
    char *start = r->at, *out = start;
    while (*r->at != '"') {
        int32_t code, low = 0;
        int n = utf8_decode(r->at, 4, &code); // the NUL stops it at the end of the text
        if (code < 0x20)
            json_fail(r, code < 0 ? "UTF-8" : "'\"' (control characters are escaped)");
        r->at += n;
        if (code == '\\')
            code = json_escape(r);
        if (code >= 0xd800 && code < 0xe000) { // half a pair; without the other U+FFFD
            char *second = r->at++;
            if (code < 0xdc00 && strncmp(second, "\\u", 2) == 0)
                low = json_escape(r);
            int pair = low >= 0xdc00 && low < 0xe000;
            code = pair ? 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00) : 0xfffd;
            r->at = pair ? r->at : second;
        }
        out = utf8_encode(out, code);
    }
    r->at++;
    *length = (size_t)(out - start);
    *out = 0;
    return start;
}

double json_read_number(JsonReader *r) {
    const unsigned char *s = (const unsigned char *)r->at + (*r->at == '-'), *point;
    char *end;
    double number = strtod(r->at, &end);
    point = (const unsigned char *)memchr(r->at, '.', (size_t)(end - r->at));
    // strtod also takes -.5, 007, 0x7, 7. and 7.e1
    if (!isdigit(*s) || (*s == '0' && isalnum(s[1]) && tolower(s[1]) != 'e') || (point && !isdigit(point[1])) ||
        isinf(number))
        json_fail(r, "a number that a double can hold");
    r->at = end;
    return number;
}

Json *json_read_value(JsonReader *r, int depth) {
    Json *json = r->node++;
    if (json_take(r, '{') || json_take(r, '[')) {
        int object = r->at[-1] == '{';
        json->type = object ? 'o' : 'a';
        if (depth == 100)
            json_fail(r, "at most 100 levels of nesting");
        if (json_take(r, object ? '}' : ']'))
            return json;
        Json **link = &json->child;
        do {
            size_t length;
            char *key = object ? json_read_string(r, &length) : NULL;
            if (object && !json_take(r, ':'))
                json_fail(r, "':'");
            *link = json_read_value(r, depth + 1);
            (*link)->key = key;
            link = &(*link)->next;
        } while (json_take(r, ','));
        if (!json_take(r, object ? '}' : ']'))
            json_fail(r, object ? "',' or '}'" : "',' or ']'");
    } else if (*r->at == '"') {
        json->type = 's';
        json->text = json_read_string(r, &json->length);
    } else if (*r->at == '-' || isdigit((unsigned char)*r->at)) {
        json->type = 'n';
        json->number = json_read_number(r);
    } else {
        const char *word = *r->at == 't' ? "true" : *r->at == 'f' ? "false" : "null";
        if (strncmp(r->at, word, strlen(word)) != 0)
            json_fail(r, "a value");
        json->type = *word == 'n' ? '0' : *word;
        r->at += strlen(word);
    }
    return json;
}

// The tree of a text of `size` bytes; `name` is the file that messages blame.
Json *json_parse(const char *text, size_t size, const char *name) {
    size_t nodes = 1; // every value but the first stands behind one of these
    for (size_t i = 0; i < size; i++)
        nodes += text[i] == ',' || text[i] == '[' || text[i] == '{';
    Json *root = (Json *)allocate(1, nodes * sizeof(Json) + size + 1);
    char *copy = (char *)memcpy(root + nodes, text, size);
    JsonReader r = {name, copy, copy, copy + size, root};
    json_read_value(&r, 0);
    json_take(&r, ' '); // trailing white space
    if (r.at != r.end)
        json_fail(&r, "the end of the text");
    return root;
}

// The member of an object, the last where several have this name; NULL where there is none, or no object.
Json *json_get(const Json *object, const char *key) {
    Json *found = NULL;
    for (Json *m = object && object->type == 'o' ? object->child : NULL; m; m = m->next) {
        if (strcmp(m->key, key) == 0)
            found = m;
    }
    return found;
}

void json_free(Json *json) {
    free(json);
}

// Quoted and escaped. Bytes that are no UTF-8 become U+FFFD, so that the output is always valid.
void json_write_string(FILE *file, const char *text, size_t length) {
    fputc('"', file);
    for (size_t i = 0; i < length;) {
        int32_t code;
        int n = utf8_decode(text + i, length - i, &code);
        if (code < 0)
            fputs("\xef\xbf\xbd", file);
        else if (code == '"' || code == '\\' || code == '\n')
            fprintf(file, "\\%c", code == '\n' ? 'n' : code);
        else if (code < 0x20)
            fprintf(file, "\\u%04x", code);
        else
            fwrite(text + i, 1, (size_t)n, file);
        i += (size_t)n;
    }
    fputc('"', file);
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

BOTH int div_up(int a, int b) {
    return (a + b - 1) / b;
}

// ---- ranks
//
// The few messages that everything else is made of; of one process nothing of it is there, so it can wait for a second
// reading. Each rank has its share of every batch; the experts are divided among the ranks of a group. Once MPI is set
// up, waiting is done in ranks_wait, which also keeps the watch: who has waited too long asks all others whether they
// live; those that wait answer, and so do those that compute, read or write, between two pieces of their work (ranks_tick,
// which keeps messages on their way, too). A process that hangs does not.

#ifdef USE_MPI
struct {
    MPI_Comm all, group, peers; // all ranks; those of the group; those with the same experts, of other groups
    MPI_Comm watch;             // all ranks, to ask who is alive
} comm;
typedef MPI_Request Request;
#define MPI_REALS (sizeof(real) == 8 ? MPI_DOUBLE : MPI_FLOAT)
enum { ASK, ALIVE };
double watch_patience = 10; // seconds to answer

void ranks_send_watch(int to, int tag) {
    static char nothing;
    Request request;
    MPI_Isend(&nothing, 1, MPI_CHAR, to, tag, comm.watch, &request);
    MPI_Request_free(&request);
}

// The rank that sent such a message, which is received; -1: none did.
int ranks_received_watch(int tag) {
    int there = 0;
    char nothing;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, tag, comm.watch, &there, &status);
    if (!there)
        return -1;
    MPI_Recv(&nothing, 1, MPI_CHAR, status.MPI_SOURCE, tag, comm.watch, MPI_STATUS_IGNORE);
    return status.MPI_SOURCE;
}

void ranks_answer(void) {
    for (int from; (from = ranks_received_watch(ASK)) >= 0;)
        ranks_send_watch(from, ALIVE);
}

// Asks all others whether they live, and ends the job where some do not answer.
void ranks_inspect(void) {
    double start = seconds();
    int missing = ranks.size - 1;
    unsigned char *heard = (unsigned char *)allocate(ranks.size, 1);
    heard[ranks.rank] = 1;
    while (ranks_received_watch(ALIVE) >= 0) // of an earlier time
        ;
    for (int r = 0; r < ranks.size; r++) {
        if (r != ranks.rank)
            ranks_send_watch(r, ASK);
    }
    while (missing && seconds() - start < watch_patience) {
        int from = ranks_received_watch(ALIVE);
        missing -= from >= 0 && !heard[from];
        if (from >= 0)
            heard[from] = 1;
        ranks_answer();
        usleep(1000);
    }
    char names[256] = "";
    for (int r = 0; missing && r < ranks.size; r++) {
        size_t n = strlen(names);
        if (!heard[r])
            snprintf(names + n, sizeof(names) - n, "%s%d", n ? ", " : "", r);
    }
    free(heard);
    if (missing) {
        fprintf(stderr, "%s: rank %s of %d does not answer: it hangs, or it died (rank %d waited for %.0f seconds); the "
                        "job ends here, and the last checkpoint is as it was\n",
                program_name, names, ranks.size, ranks.rank, ranks.watchdog + seconds() - start);
        end_program(1);
    }
}

// Again and again, by who waits since `start`.
void ranks_watch(double start) {
    static double looked, answered;
    double now = seconds();
    looked = looked > start ? looked : start;
    if (now - answered > 0.05) {
        ranks_answer();
        answered = now;
    }
    if (ranks.watchdog && now - looked > ranks.watchdog) {
        ranks_inspect();
        looked = seconds();
    }
    if (ranks.crowded || now - start > 0.001)
        usleep(20);
    sched_yield();
}

void ranks_wait(Request *requests, int count) {
    double start = seconds();
    for (int done = 0;;) {
        MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
        if (done) {
            ranks.traffic.waited += seconds() - start;
            return;
        }
        ranks_watch(start);
    }
}

// Between two pieces of work.
void ranks_tick(void) {
    if (MANY && thread_number() == 0)
        ranks_answer();
}

// v (n) = the sum of all ranks' v
void sum_over_ranks(double *v, int n) {
    Request request;
    if (!MANY)
        return;
    MPI_Iallreduce(MPI_IN_PLACE, v, n, MPI_DOUBLE, MPI_SUM, comm.all, &request);
    ranks_wait(&request, 1);
}

// Rank 0's bytes for all.
void broadcast(void *bytes, size_t size) {
    Request request;
    if (!MANY)
        return;
    MPI_Ibcast(bytes, (int)size, MPI_BYTE, 0, comm.all, &request);
    ranks_wait(&request, 1);
}

// Begins to sum v (n), of all ranks, or, where `peers`, of those that have the same experts.
void start_sum_of_reals(real *v, size_t n, int peers, Request *request) {
    MPI_Iallreduce(MPI_IN_PLACE, v, (int)n, MPI_REALS, MPI_SUM, peers ? comm.peers : comm.all, request);
}

// Begins to send to, or to receive from, a rank of the group.
void start_send(const real *v, size_t n, int rank, int tag, Request *request) {
    MPI_Isend(v, (int)n, MPI_REALS, rank, tag, comm.group, request);
}
void start_receive(real *v, size_t n, int rank, int tag, Request *request) {
    MPI_Irecv(v, (int)n, MPI_REALS, rank, tag, comm.group, request);
}

// Each rank of the group sends `each` numbers to each.
void all_to_all(const int *out, int *in, int each) {
    Request request;
    MPI_Ialltoall(out, each, MPI_INT, in, each, MPI_INT, comm.group, &request);
    ranks_wait(&request, 1);
}

MPI_Datatype pieces_of(size_t bytes) { // a count is an int, so pieces are counted, not bytes
    MPI_Datatype type;
    MPI_Type_contiguous((int)bytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    return type;
}

// Begins to send rows of `bytes` to the ranks of the group, sent[r] of them from row sent_at[r] on, and to receive such.
void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *request) {
    MPI_Datatype row = pieces_of(bytes);
    MPI_Ialltoallv(out, sent, sent_at, row, in, got, got_at, row, comm.group, request);
    MPI_Type_free(&row);
}

// All ranks' slices, one after another, each of n * 16 numbers, of which this rank has its own.
void gather_slices(real *v, size_t n) {
    Request request;
    MPI_Datatype sixteen = pieces_of(16 * sizeof(real));
    MPI_Iallgather(MPI_IN_PLACE, 0, sixteen, v, (int)n, sixteen, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&sixteen);
}

// All ranks' rows, each of `bytes`, one rank's after another's, to be freed; rows[r] is how many rank r has.
void *gather_rows(const void *mine, const int *rows, size_t bytes) {
    int *first = (int *)allocate((size_t)ranks.size + 1, sizeof(int));
    for (int r = 0; r < ranks.size; r++)
        first[r + 1] = first[r] + rows[r];
    char *all = (char *)allocate((size_t)first[ranks.size], bytes);
    MPI_Datatype row = pieces_of(bytes);
    Request request;
    MPI_Iallgatherv(mine, rows[ranks.rank], row, all, rows, first, row, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&row);
    free(first);
    return all;
}

// For rank 0: the parts of the first `count` ranks, one after another, each rank's of its own size, in `all`, or, where
// that is NULL, in memory to be freed.
void *gather_parts(const void *mine, size_t bytes, int count, void *all) {
    double *size = (double *)allocate(ranks.size, sizeof(double)), total = 0;
    size[ranks.rank] = ranks.rank < count ? (double)bytes : 0;
    sum_over_ranks(size, ranks.size);
    for (int r = 0; r < ranks.size; r++)
        total += size[r];
    if (!all)
        all = allocate(ranks.rank ? 0 : (size_t)total, 1);
    size_t at = 0;
    for (int r = 0; r < count; at += (size_t)size[r++]) {
        for (size_t done = 0; done < (size_t)size[r]; done += largest_message) {
            int n = (int)((size_t)size[r] - done < largest_message ? (size_t)size[r] - done : largest_message);
            Request request = MPI_REQUEST_NULL;
            if (!r && !ranks.rank)
                memcpy((char *)all + at + done, (const char *)mine + done, (size_t)n);
            else if (!ranks.rank)
                MPI_Irecv((char *)all + at + done, n, MPI_BYTE, r, 0, comm.all, &request);
            else if (r == ranks.rank)
                MPI_Isend((const char *)mine + done, n, MPI_BYTE, 0, 0, comm.all, &request);
            ranks_wait(&request, 1);
        }
    }
    free(size);
    return all;
}

// fsync by a thread of the C library's, while this one answers: a slow disk is no rank that hangs.
int sync_file(int file) {
    struct aiocb job;
    memset(&job, 0, sizeof(job));
    job.aio_fildes = file;
    job.aio_sigevent.sigev_notify = SIGEV_NONE;
    int error;
    if (aio_fsync(O_SYNC, &job) != 0) // no thread to be had
        return fsync(file);
    while ((error = aio_error(&job)) == EINPROGRESS) {
        ranks_tick();
        usleep(100);
    }
    aio_return(&job);
    errno = error;
    return error ? -1 : 0;
}

int ranks_of_machine(void) {
    int count;
    MPI_Comm here;
    MPI_Comm_split_type(comm.all, MPI_COMM_TYPE_SHARED, ranks.rank, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &count);
    MPI_Comm_free(&here);
    return count;
}

// `of`: all ranks; ep of them are a group.
void ranks_form(MPI_Comm of, int ep) {
    comm.all = of;
    MPI_Comm_rank(of, &ranks.rank);
    MPI_Comm_size(of, &ranks.size);
    ranks.ep = ep;
    ranks.place = ranks.rank % ep;
    ranks.groups = ranks.size / ep;
    MPI_Comm_split(of, ranks.rank / ep, ranks.rank, &comm.group);
    MPI_Comm_split(of, ranks.place, ranks.rank, &comm.peers);
    ranks.crowded = ranks_of_machine() > sysconf(_SC_NPROCESSORS_ONLN);
}
#else // of one process: nothing to do
typedef int Request;
int ranks_of_machine(void) { return 1; }
int sync_file(int file) { return fsync(file); }
void ranks_tick(void) { }
void ranks_wait(Request *request, int n) { (void)request, (void)n; }
void sum_over_ranks(double *v, int n) { (void)v, (void)n; }
void broadcast(void *bytes, size_t size) { (void)bytes, (void)size; }
void start_sum_of_reals(real *v, size_t n, int peers, Request *request) { (void)v, (void)n, (void)peers, (void)request; }
void start_send(const real *v, size_t n, int rank, int tag, Request *r) { (void)v, (void)n, (void)rank, (void)tag, (void)r; }
void start_receive(real *v, size_t n, int rank, int tag, Request *r) { (void)v, (void)n, (void)rank, (void)tag, (void)r; }
void all_to_all(const int *out, int *in, int each) { (void)out, (void)in, (void)each; }
void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *r) {
    (void)out, (void)sent, (void)sent_at, (void)in, (void)got, (void)got_at, (void)bytes, (void)r;
}
void gather_slices(real *v, size_t n) { (void)v, (void)n; }
void *gather_rows(const void *mine, const int *rows, size_t bytes) { return (void)mine, (void)rows, (void)bytes, (void *)0; }
void *gather_parts(const void *mine, size_t bytes, int n, void *all) { return (void)mine, (void)bytes, (void)n, all; }
#endif

// Waits until all ranks have come here.
void ranks_meet(void) {
    double nothing = 0;
    sum_over_ranks(&nothing, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The matrix product
//
// Nine tenths of the time goes here, so this is the one routine written for speed; everything else calls it. The idea
// (Goto and van de Geijn 2008): a core can do dozens of multiply-adds in the time of one load from far memory, so both
// operands are copied ("packed"), a block at a time, into the order in which they will be read, and a kernel keeps a
// tile of MR x NR results in registers while it runs along the summed dimension k.
//
//              NR columns of b
//              +--------+
//    MR rows   |  tile  |    For each k, NV vectors of b are loaded, one number of each row of a is multiplied
//    of a      |        |    with all of them and added to the row's sums: MR*NV multiply-adds for MR + NV loads.
//              +--------+
//
// Packing is also where transposition and gathering happen, hence one routine serves the forward pass (x W^T), both
// backward passes (dout W and dout^T x), and the experts, whose rows are picked out of the batch by index.
// Each result is summed by one thread in one order, so the bits do not depend on the number of threads.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__) // 32 vector registers
#define NV 4
#else // 16
#define NV 2
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
#define LANES  ((int)(VECTOR_BYTES / sizeof(real)))
#define MR     6
#define NR     (NV * LANES)
#define TILE_M 48  // rows of a packed at a time,
#define TILE_N ((int)(1024 / sizeof(real))) // columns of b,
#define TILE_K 256 // and k: both blocks stay in the second-level cache, MR rows of a in the first
#define ROW    (TILE_K + 16) // from one packed row of a to the next; no power of two, so that they share the cache

// A matrix in memory: row r starts at p + index[r]*ld, or at p + r*ld where index is NULL. A product sums over k; either
// k runs along a row, or each row belongs to one k. So with x (N,C), W (F,C) and dout (N,F):
//   out  (N,F) = x W^T       along_rows(x) times along_rows(W):          k is C, and runs along the rows of both
//   dx   (N,C) = dout W      along_rows(dout) times along_columns(W):    k is F, and each row of W belongs to one k
//   dW   (F,C) = dout^T x    along_columns(dout) times along_columns(x): k is N
typedef struct Operand {
    const real *p;
    size_t ld;
    const int *index;
    int row_is_k;
} Operand;

// out (m,n), its rows ld apart = a (m,k) times b (k,n)
typedef struct Product {
    real *out;
    size_t ld;
    Operand a, b;
    int m, n, k;
} Product;

Operand along_rows(const real *p, size_t ld, const int *index) {
    Operand o = {p, ld, index, 0};
    return o;
}

Operand along_columns(const real *p, size_t ld, const int *index) {
    Operand o = {p, ld, index, 1};
    return o;
}

const real *operand_row(const Operand *o, int r) {
    return o->p + (size_t)(o->index ? o->index[r] : r) * o->ld;
}

// out (rows,cols), of at most height x width*LANES, = or += a (rows,nk) times b (nk,width*LANES). Number (i,k) of a is
// a[i*row + k*step]. Inline, so that the compiler knows height, width and row, keeps all sums in registers and unrolls
// the loops over them.
static inline __attribute__((always_inline)) void kernel(int height, int width, int row, int step, real *out, size_t ld,
                                                         const real *a, const real *b, int nk, int rows, int cols,
                                                         int accumulate) {
    vec sum[2 * MR][NV], of_b[NV], zero = {0};
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            sum[i][j] = zero;
            __builtin_prefetch(out + (size_t)(i < rows ? i : 0) * ld + (size_t)(j * LANES), 1);
        }
    }
    for (int k = 0; k < nk; k++, a += step, b += width * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++)
            of_b[j] = *(const vec_in_memory *)(b + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < width; j++)
                sum[i][j] += a[i * row] * of_b[j];
        }
    }
    real edge[2 * MR * NR]; // where the tile sticks out of the result, it is written here first
    int whole = rows == height && cols == width * LANES;
#pragma GCC unroll 16
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            vec_in_memory *to = (vec_in_memory *)((whole ? out + (size_t)i * ld : edge + i * NR) + j * LANES);
            if (whole && accumulate)
                sum[i][j] += *to;
            *to = sum[i][j];
        }
    }
    for (int i = 0; !whole && i < rows; i++) {
        for (int j = 0; j < cols; j++)
            out[(size_t)i * ld + j] = edge[i * NR + j] + (accumulate ? out[(size_t)i * ld + j] : 0);
    }
}

// A panel of b is NR wide; the last one only NR/2 if that is enough, and then a tile has twice as many rows.
int panel_width(int cols) {
    return cols <= NR / 2 ? NR / 2 : NR;
}

// out (rows,cols) = or += a block of a times a panel of b (nk,panel_width(cols)). Number (i,k) of a is a[i*ROW + k]
// (row_is_k 0; step is not used) or a[k*step + i] (row_is_k 1). The last rows take a kernel of half the height if that
// is enough, so a must hold rows up to the next multiple of 2*MR, whatever is in them.
void product_panel(real *out, size_t ld, const real *a, int row_is_k, int step, const real *b, int nk, int rows,
                   int cols, int accumulate) {
    int high = panel_width(cols) == NR ? MR : 2 * MR;
    for (int left = rows; left > 0; left -= high, out += (size_t)high * ld, a += row_is_k ? high : high * ROW) {
        int n = min_int(left, high), half = n <= high / 2;
#define KERNEL(height, width)                                                                   \
    do {                                                                                        \
        if (row_is_k)                                                                           \
            kernel(height, width, 1, step, out, ld, a, b, nk, n, cols, accumulate);             \
        else                                                                                    \
            kernel(height, width, ROW, 1, out, ld, a, b, nk, n, cols, accumulate);              \
    } while (0)
        if (high == MR && !half)
            KERNEL(MR, NV);
        else if (high == MR)
            KERNEL(MR / 2, NV);
        else if (!half)
            KERNEL(2 * MR, NV / 2);
        else
            KERNEL(MR, NV / 2);
#undef KERNEL
    }
}

// Packs rows first... of a, and k0...: rows ROW apart, or k TILE_M apart. What lies beyond is zero.
void pack_a(real *packed, const Operand *o, int first, int rows, int k0, int nk) {
    int filled = div_up(rows, 2 * MR) * 2 * MR; // as many as a kernel may read
    for (int i = 0; !o->row_is_k && i < filled; i++) {
        if (i < rows)
            memcpy(packed + i * ROW, operand_row(o, first + i) + k0, (size_t)nk * sizeof(real));
        else
            memset(packed + i * ROW, 0, (size_t)nk * sizeof(real));
    }
    for (int k = 0; o->row_is_k && k < nk; k++) {
        const real *from = operand_row(o, k0 + k) + first;
        real *to = packed + k * TILE_M;
        if (rows == TILE_M)
            memcpy(to, from, TILE_M * sizeof(real));
        else
            for (int i = 0; i < filled; i++)
                to[i] = i < rows ? from[i] : 0;
    }
}

// to[k*width + i] = from[i][k] for LANES rows and LANES k. Write the number of a place as the bits of its row, then those
// of its column. Zipping rows i and i + LANES/2 (an element of one, then of the other) rotates these bits by one; after
// log2(LANES) rotations rows and columns have changed places.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CAN_ZIP
#endif
#endif
#if defined(CAN_ZIP) && VECTOR_BYTES == 64
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(CAN_ZIP) && VECTOR_BYTES == 32
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif defined(CAN_ZIP)
#define ZIP_LOW(a, b)  __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
static inline void transpose_square(real *to, int width, const real *const *from, int k) {
#ifdef CAN_ZIP
    if (sizeof(real) == 4) {
        enum { SIDE = VECTOR_BYTES / 4 };
        typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
        floats v[SIDE], z[SIDE];
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            memcpy(&v[i], from[i] + k, sizeof(v[i]));
#pragma GCC unroll 4
        for (int turn = 1; turn < SIDE; turn *= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < SIDE / 2; i++) {
                z[2 * i] = ZIP_LOW(v[i], v[i + SIDE / 2]);
                z[2 * i + 1] = ZIP_HIGH(v[i], v[i + SIDE / 2]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++)
                v[i] = z[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            memcpy(to + (k + i) * width, &v[i], sizeof(v[i]));
        return;
    }
#endif
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++)
            to[(k + j) * width + i] = from[i][k + j];
    }
}

// Packs columns first... of b, cols of them, and k0...: panel after panel. What lies beyond is zero.
void pack_b(real *packed, const Operand *o, int first, int cols, int k0, int nk) {
    for (int j = 0; j < cols; j += NR) {
        int used = min_int(NR, cols - j), width = panel_width(used);
        real *panel = packed + j * nk;
        for (int k = 0; o->row_is_k && k < nk; k++) {
            const real *from = operand_row(o, k0 + k) + first + j;
            if (used == NR)
                memcpy(panel + k * NR, from, NR * sizeof(real));
            else if (used == NR / 2)
                memcpy(panel + k * NR / 2, from, NR / 2 * sizeof(real));
            else
                for (int i = 0; i < width; i++)
                    panel[k * width + i] = i < used ? from[i] : 0;
        }
        for (int part = 0; !o->row_is_k && part < width; part += LANES) {
            const real *from[LANES];
            int rows = max_int(0, min_int(LANES, used - part)), k = 0;
            real *to = panel + part;
            for (int i = 0; i < rows; i++)
                from[i] = operand_row(o, first + j + part + i) + k0;
            for (; rows == LANES && k + LANES <= nk; k += LANES)
                transpose_square(to, width, from, k);
            for (; k < nk; k++) {
                for (int i = 0; i < LANES; i++)
                    to[k * width + i] = i < rows ? from[i][k] : 0;
            }
        }
    }
}

// A task: rows first... of a product, by one thread.
void product_rows(const Product *p, int first, int rows, int accumulate) {
    real a[TILE_M * ROW] __attribute__((aligned(64))), b[TILE_K * TILE_N] __attribute__((aligned(64)));
    for (int j0 = 0; j0 < p->n; j0 += TILE_N) {
        int cols = min_int(TILE_N, p->n - j0);
        for (int k0 = 0; k0 < max_int(p->k, 1); k0 += TILE_K) {
            int nk = min_int(TILE_K, p->k - k0);
            pack_b(b, &p->b, j0, cols, k0, nk);
            for (int i0 = first; i0 < first + rows; i0 += TILE_M) {
                int height = min_int(TILE_M, first + rows - i0);
                pack_a(a, &p->a, i0, height, k0, nk);
                for (int j = 0; j < cols; j += NR)
                    product_panel(p->out + (size_t)i0 * p->ld + (size_t)(j0 + j), p->ld, a, p->a.row_is_k, TILE_M,
                                  b + j * nk, nk, height, min_int(NR, cols - j), accumulate || k0 > 0);
            }
        }
    }
}

real vec_sum(vec v) {
    real total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += v[lane];
    return total;
}

real dot(const real *a, const real *b, int n) {
    vec sum[4] = {{0}, {0}, {0}, {0}}; // four, since one would have to wait for itself
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[j] += *(const vec_in_memory *)(a + i + j * LANES) * *(const vec_in_memory *)(b + i + j * LANES);
    }
    for (; i + LANES <= n; i += LANES)
        sum[0] += *(const vec_in_memory *)(a + i) * *(const vec_in_memory *)(b + i);
    real total = vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

// One or two rows (generation, mostly) are not worth packing W for: their results are plain dot products.
int few_rows(const Product *p) {
    return p->m <= 2 && !p->a.row_is_k && !p->b.row_is_k;
}

void product_of_few_rows(const Product *p, int first, int cols, int accumulate) {
    for (int i = 0; i < p->m; i++) {
        for (int j = first; j < first + cols; j++) {
            real total = dot(operand_row(&p->a, i), operand_row(&p->b, j), p->k);
            real *out = p->out + (size_t)i * p->ld + (size_t)j;
            *out = accumulate ? *out + total : total;
        }
    }
}

// All products of the list, by all threads: four tasks a thread of about equal work. Fewer would let one thread wait for
// another, more would pack b too often; the experts of a layer are mostly a task each.
void products(const Product *list, int count, int accumulate) {
    typedef struct Task {
        const Product *p;
        int first, count; // rows; of few rows: columns
    } Task;
    double work = 0;
    int tasks = 0, most = 0;
    for (int i = 0; i < count; i++)
        work += (double)list[i].m * list[i].n * list[i].k;
    Task *task = NULL;
    for (int i = 0; i < count; i++) {
        const Product *p = &list[i];
        int few = few_rows(p), total = few ? p->n : p->m, unit = few ? NR : 2 * MR;
        double share = (double)p->m * p->n * p->k / (work + 1) * 4 * thread_count();
        int pieces = max_int((int)(share + 0.5), 1 + total / 1024), step = div_up(div_up(total, pieces), unit) * unit;
        for (int first = 0; first < total; first += step) {
            if (tasks == most)
                task = (Task *)reallocate(task, (size_t)(most = 2 * most + 64), sizeof(Task));
            Task t = {p, first, min_int(step, total - first)};
            task[tasks++] = t;
        }
    }
#pragma omp parallel for schedule(dynamic) if (work > 20000)
    for (int t = 0; t < tasks; t++) {
        if (few_rows(task[t].p))
            product_of_few_rows(task[t].p, task[t].first, task[t].count, accumulate);
        else
            product_rows(task[t].p, task[t].first, task[t].count, accumulate);
        ranks_tick();
    }
    free(task);
}

// out (m,n) = or += a times b
void product(real *out, Operand a, Operand b, int m, int n, int k, int accumulate) {
    Product p = {out, (size_t)n, a, b, m, n, k};
    products(&p, 1, accumulate);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Norm, softmax, rotary positions, attention, embedding
//
// The layers that every transformer has: a forward and a backward function each, over plain arrays. A backward function
// adds to its gradients (dx, dw) unless its comment says that it writes them. Sums over tokens are taken in chunks of a
// fixed size and the chunks added in order, so that any number of threads gives the same bits.

#define CHUNK 128 // tokens

vec vec_load(const real *p, int n) { // the first n of LANES numbers, then zeros
    vec v = {0};
    if (n >= LANES)
        return *(const vec_in_memory *)p;
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}

void vec_store(real *p, vec v, int n) {
    if (n >= LANES)
        *(vec_in_memory *)p = v;
    else
        memcpy(p, &v, (size_t)n * sizeof(real));
}

// The lanes of a where the comparison holds, else those of b. (C, unlike C++, has no ?: for vectors.)
#define CHOOSE(where, a, b) \
    ((__typeof__(a))(((__typeof__(where))(a) & (where)) | ((__typeof__(where))(b) & ~(where))))

vec vec_max(vec a, vec b) {
    return CHOOSE(a > b, a, b);
}

// e^x in every lane. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial (Taylor, to 3 ulp in float) and 2^n goes
// straight into the exponent bits. Below -87 the result is about 1e-38 instead of less; in double, libm does it.
vec vec_exp(vec x) {
    if (sizeof(real) == 8) {
        for (int i = 0; i < LANES; i++)
            x[i] = exp(x[i]);
        return x;
    }
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
    floats v;
    memcpy(&v, &x, sizeof(v));
    floats least = {0}, most = {0};
    least -= 87.0f;
    most += 88.0f;
    v = CHOOSE(v < least, least, v); // NaN stays
    v = CHOOSE(v > most, most, v);
    floats shifted = v * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's low bits are n, rounded
    floats n = shifted - 12582912.0f;
    floats r = v - n * 0.693359375f + n * 2.12194440e-4f;
    floats e = r * (1.0f / 720) + (1.0f / 120);
    e = e * r + (1.0f / 24);
    e = e * r + (1.0f / 6);
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    e = (floats)((bits)e + ((bits)shifted << 23));
    memcpy(&x, &e, sizeof(x));
    return x;
}

// The largest of row (n) and of `least`, which also fills row up to a whole vector. This and the next function work on
// whole vectors, so row must have room for them.
real row_max(real *row, int n, real least) {
    vec top = {0};
    top += least;
    for (int j = n; j % LANES; j++)
        row[j] = least;
    for (int j = 0; j < n; j += LANES)
        top = vec_max(top, *(vec_in_memory *)(row + j));
    for (int lane = 0; lane < LANES; lane++)
        least = top[lane] > least ? top[lane] : least;
    return least;
}

// row[j] becomes exp(row[j] - shift) for j < n, 0 from there to end; returns the sum.
real row_exp(real *row, int n, int end, real shift) {
    vec sum = {0};
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec e = vec_exp(*(vec_in_memory *)(row + j) - shift);
        *(vec_in_memory *)(row + j) = e;
        sum += e;
    }
    int filled = j < n ? j + LANES : n;
    if (j < n)
        *(vec_in_memory *)(row + j) = vec_exp(*(vec_in_memory *)(row + j) - shift);
    memset(row + n, 0, (size_t)(max_int(end, filled) - n) * sizeof(real));
    if (j < n)
        sum += *(vec_in_memory *)(row + j);
    return vec_sum(sum);
}

// row (n) becomes softmax(row); returns log(sum(exp(row)))
real softmax(real *row, int n) {
    vec most = {0};
    real top = row[0];
    most += top;
    int whole = n / LANES * LANES;
    for (int j = 0; j < whole; j += LANES)
        most = vec_max(most, *(vec_in_memory *)(row + j));
    for (int lane = 0; lane < LANES; lane++)
        top = most[lane] > top ? most[lane] : top;
    for (int j = whole; j < n; j++)
        top = row[j] > top ? row[j] : top;
    vec sum = {0};
    for (int j = 0; j < n; j += LANES) {
        vec e = vec_exp(vec_load(row + j, n - j) - top);
        vec_store(row + j, e, n - j);
        sum += n - j >= LANES ? e : vec_load(row + j, n - j); // beyond n there is no term
    }
    real total = vec_sum(sum), scale = 1 / total;
    for (int j = 0; j < n; j++)
        row[j] *= scale;
    return top + (real)log((double)total);
}

// out (N,C) = x / rms(x) * w, w (C); rms(x) = sqrt(mean(x^2) + eps), its inverse kept in rstd (N).
// Zhang and Sennrich 2019, Root Mean Square Layer Normalization.
void rmsnorm_forward(real *out, real *rstd, const real *x, const real *w, int N, int C, double eps) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *row = x + (size_t)n * C;
        rstd[n] = (real)(1.0 / sqrt((double)dot(row, row, C) / C + eps));
        for (int c = 0; c < C; c++)
            out[(size_t)n * C + c] = row[c] * rstd[n] * w[c];
    }
}

// dx (N,C) += , dw (C) += . With y = x*rstd: dx = rstd * (dout*w - y * mean(dout*w*y)). partial (chunks of N, C).
void rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *rstd, const real *w, int N, int C,
                      real *partial) {
    int chunks = div_up(N, CHUNK);
#pragma omp parallel for
    for (int chunk = 0; chunk < chunks; chunk++) {
        real *part = partial + (size_t)chunk * C;
        memset(part, 0, (size_t)C * sizeof(real));
        for (int n = chunk * CHUNK; n < min_int(N, (chunk + 1) * CHUNK); n++) {
            const real *row = x + (size_t)n * C, *g = dout + (size_t)n * C;
            vec sum = {0};
            real scale = rstd[n];
            for (int c = 0; c < C; c += LANES) {
                vec gx = vec_load(g + c, C - c) * vec_load(row + c, C - c);
                vec_store(part + c, vec_load(part + c, C - c) + gx * scale, C - c);
                sum += gx * vec_load(w + c, C - c);
            }
            real mean = vec_sum(sum) * scale * scale * scale / (real)C;
            for (int c = 0; c < C; c++)
                dx[(size_t)n * C + c] += g[c] * w[c] * scale - row[c] * mean;
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int c = 0; c < C; c++)
            dw[c] += partial[(size_t)chunk * C + c];
    }
}

// Turns the first `heads` heads of each row of qkv (N rows, ld apart) by its token's position: pair (i, i + D/2) of a
// head by the angle position * theta^(-2i/D). direction -1 turns back, which is also the backward pass. Su et al. 2021,
// RoFormer, in the half-split order of Hugging Face. angles (positions, D/2, 2) holds cosines and sines.
void rope(real *qkv, size_t ld, int N, int T, int heads, int D, const real *angles, real direction) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        const real *angle = angles + (size_t)(n % T) * D;
        for (int h = 0; h < heads; h++) {
            real *head = qkv + (size_t)n * ld + (size_t)h * D;
            for (int i = 0; i < D / 2; i++) {
                real c = angle[2 * i], s = angle[2 * i + 1] * direction, a = head[i], b = head[i + D / 2];
                head[i] = a * c - b * s;
                head[i + D / 2] = b * c + a * s;
            }
        }
    }
}

// Causal grouped-query attention. qkv (B,T,(H+2KV)*D): H query heads, then KV keys, then KV values; query head h uses
// key and value head h/(H/KV). out (B,T,H*D); lse (B,H,T): log of the sum of exp of each query's scores, with which
// backward gets the probabilities again. Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries).
//
// There is no (T,T) array: QUERIES queries meet TILE_K keys at a time, in a tile of scores, and what they take from the
// values is scaled down whenever a later tile brings a higher score (Milakov and Gimelshein 2018; Dao et al. 2022).
// Tiles are the a of the kernel above as they are, rows ROW apart; keys and values are packed once for all queries of a
// head. Of the future only what shares a kernel with the past is computed. A kernel may read rows and columns of a tile
// that were not computed this time; what it makes of them is never stored.
#define QUERIES 96 // of a tile
#define STRIP   (2 * MR) // rows that are computed up to the same key, the last that any of them sees

size_t packed_width(int cols) { // numbers a packed row of so many columns takes
    return (size_t)(cols / NR * NR + (cols % NR ? panel_width(cols % NR) : 0));
}

// Scratch for one thread, as attention_backward lays it out (forward takes less): two tiles, queries and douts as a and
// as b, and over all T keys, values and keys_b.
size_t attention_room(int T, int D) {
    size_t tile = QUERIES * ROW, rows = (size_t)div_up(D, TILE_K) * tile, width = packed_width(D);
    return 3 * (size_t)(T + NR) * (width > (size_t)D ? width : (size_t)D) + 2 * tile + 2 * rows + 2 * QUERIES * width;
}

// x (rows <= QUERIES, D) as the a of a product over D: TILE_K of D after another; times scale.
void pack_queries(real *packed, const real *x, size_t ld, int rows, int D, real scale) {
    Operand o = along_rows(x, ld, NULL);
    for (int d = 0; d < D; d += TILE_K, packed += QUERIES * ROW) {
        pack_a(packed, &o, 0, rows, d, min_int(TILE_K, D - d));
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < min_int(TILE_K, D - d); j++)
                packed[i * ROW + j] *= scale;
        }
    }
}

// x (T,D) as the b of a product over D (transposed), or of one over T: TILE_K of T after another; times scale.
void pack_keys(real *packed, const real *x, size_t ld, int T, int D, int transposed, real scale) {
    Operand o = transposed ? along_rows(x, ld, NULL) : along_columns(x, ld, NULL);
    for (int t = 0; t < T; t += TILE_K) {
        int n = min_int(TILE_K, T - t);
        size_t size = transposed ? packed_width(n) * (size_t)D : packed_width(D) * (size_t)n;
        for (int d = 0; transposed && d < D; d += TILE_K)
            pack_b(packed + packed_width(n) * (size_t)d, &o, t, n, d, min_int(TILE_K, D - d));
        if (!transposed)
            pack_b(packed, &o, 0, D, t, n);
        for (size_t i = 0; scale != 1 && i < size; i++)
            packed[i] *= scale;
        packed += size;
    }
}

// tile (rows, n): queries first... times the n keys from `key` on, as far as some query sees them. Both packed.
void attention_scores(real *tile, const real *queries, const real *keys, int first, int rows, int key, int n, int D) {
    for (int d = 0; d < D; d += TILE_K, queries += QUERIES * ROW) {
        int nd = min_int(TILE_K, D - d);
        for (int j = 0; j < min_int(n, first + rows - key); j += NR) {
            int i = max_int(0, key + j - first) / STRIP * STRIP;
            product_panel(tile + i * ROW + j, ROW, queries + i * ROW, 0, 1,
                          keys + packed_width(n) * (size_t)d + (size_t)j * (size_t)nd, nd, rows - i, min_int(NR, n - j),
                          d > 0);
        }
    }
}

// out (rows,D), rows ld apart, = or += tile (rows,n) times the n keys (or values) from `key` on, packed over T.
void attention_take(real *out, size_t ld, const real *tile, const real *keys, int first, int rows, int key, int n,
                    int D, int accumulate) {
    for (int i = 0; i < rows; i += STRIP) {
        int height = min_int(STRIP, rows - i), nk = min_int(n, first + i + height - key);
        for (int j = 0; nk > 0 && j < D; j += NR)
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i * ROW, 0, 1, keys + (size_t)j * (size_t)n, nk,
                          height, min_int(NR, D - j), accumulate);
    }
}

// out (n,D), rows ld apart, += tile (rows,n) transposed times x (rows,D), packed over its rows.
void attention_give(real *out, size_t ld, const real *tile, const real *x, int first, int rows, int key, int n, int D) {
    int end = min_int(n, first + rows - key);
    for (int i = 0; i < end; i += STRIP) {
        int from = max_int(0, key + i - first); // queries before that see none of these keys
        for (int j = 0; j < D; j += NR)
            product_panel(out + (size_t)i * ld + (size_t)j, ld, tile + i + from * ROW, 1, ROW,
                          x + (size_t)j * (size_t)rows + (size_t)(from * panel_width(min_int(NR, D - j))), rows - from,
                          min_int(STRIP, end - i), min_int(NR, D - j), 1);
    }
}

void attention_forward(real *out, real *lse, const real *qkv, int B, int T, int H, int KV, int D, real *scratch) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, width = packed_width(D);
    real scale = (real)(1.0 / sqrt((double)D));
#pragma omp parallel for schedule(dynamic) if (B * T > 16)
    for (int task = 0; task < B * H; task++) {
        int b = task / H, h = task % H;
        const real *q = qkv + (size_t)b * T * ld + (size_t)h * D;
        const real *k = qkv + (size_t)b * T * ld + (size_t)(H + h / (H / KV)) * D;
        real *tile = scratch + (size_t)thread_number() * attention_room(T, D), *answer = tile + QUERIES * ROW;
        real *queries = answer + QUERIES * width, *keys = queries + (size_t)div_up(D, TILE_K) * QUERIES * ROW;
        real *values = keys + packed_width(T) * (size_t)D;
        pack_keys(keys, k, ld, T, D, 1, 1);
        pack_keys(values, k + (size_t)KV * D, ld, T, D, 0, 1);
        for (int first = 0; first < T; first += QUERIES) {
            int rows = min_int(QUERIES, T - first);
            real highest[QUERIES], total[QUERIES];
            pack_queries(queries, q + (size_t)first * ld, ld, rows, D, scale);
            for (int key = 0; key < first + rows; key += TILE_K) {
                int n = min_int(TILE_K, T - key);
                attention_scores(tile, queries, keys + (size_t)key * (size_t)D, first, rows, key, n, D);
                for (int i = 0; i < rows; i++) {
                    real *row = tile + i * ROW;
                    int seen = max_int(0, min_int(n, first + i + 1 - key)), end = min_int(n, first + rows - key);
                    real before = key ? highest[i] : -(real)1e30, top = row_max(row, seen, before);
                    real sum = row_exp(row, seen, end, top), shrink = key ? (real)exp((double)(before - top)) : 0;
                    total[i] = key ? total[i] * shrink + sum : sum;
                    highest[i] = top;
                    for (size_t j = 0; shrink != 1 && key && j < width; j++)
                        answer[(size_t)i * width + j] *= shrink;
                }
                attention_take(answer, width, tile, values + (size_t)key * width, first, rows, key, n, D, key > 0);
            }
            for (int i = 0; i < rows; i++) {
                real *to = out + ((size_t)b * T + first + i) * H * D + (size_t)h * D, one = 1 / total[i];
                for (int j = 0; j < D; j++)
                    to[j] = answer[(size_t)i * width + (size_t)j] * one;
                lse[((size_t)b * H + h) * T + first + i] = highest[i] + (real)log((double)total[i]);
            }
        }
        ranks_tick();
    }
}

// Writes dqkv (B,T,(H+2KV)*D). With P the probabilities: dV = P^T dout, dP = dout V^T, dS = P * (dP - rowsum(P * dP)) / sqrt(D),
// where rowsum(P * dP) = dout . out; dQ = dS K, dK = dS^T Q. One task owns one key/value head, so it alone adds to it.
void attention_backward(real *dqkv, const real *dout, const real *out, const real *lse, const real *qkv, int B, int T, int H,
                        int KV, int D, real *scratch) {
    size_t ld = (size_t)(H + 2 * KV) * (size_t)D, width = (size_t)H * D;
    real scale = (real)(1.0 / sqrt((double)D));
#pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < B * KV; task++) {
        int b = task / KV, kv = task % KV;
        size_t base = (size_t)b * T * ld, room = (size_t)div_up(D, TILE_K) * QUERIES * ROW;
        const real *k = qkv + base + (size_t)(H + kv) * D, *v = k + (size_t)KV * D;
        real *dk = dqkv + base + (size_t)(H + kv) * D, *dv = dk + (size_t)KV * D;
        // Packed: P and dS are tiles of scores; queries and douts the a of a product over D, queries_b and douts_b the b of
        // one over queries; keys and values the b of a product over D, keys_b the b of one over keys.
        real *P = scratch + (size_t)thread_number() * attention_room(T, D), *dS = P + QUERIES * ROW;
        real *queries = dS + QUERIES * ROW, *douts = queries + room, *queries_b = douts + room;
        real *douts_b = queries_b + QUERIES * packed_width(D), *keys = douts_b + QUERIES * packed_width(D);
        real *values = keys + packed_width(T) * (size_t)D, *keys_b = values + packed_width(T) * (size_t)D;
        pack_keys(keys, k, ld, T, D, 1, 1);
        pack_keys(values, v, ld, T, D, 1, 1);
        pack_keys(keys_b, k, ld, T, D, 0, scale);
        for (int t = 0; t < T; t++) {
            memset(dk + (size_t)t * ld, 0, (size_t)D * sizeof(real));
            memset(dv + (size_t)t * ld, 0, (size_t)D * sizeof(real));
        }
        for (int h = kv * (H / KV); h < (kv + 1) * (H / KV); h++) {
            for (int first = 0; first < T; first += QUERIES) {
                int rows = min_int(QUERIES, T - first);
                const real *q = qkv + base + (size_t)first * ld + (size_t)h * D;
                const real *o = out + ((size_t)b * T + first) * width + (size_t)h * D;
                const real *g = dout + ((size_t)b * T + first) * width + (size_t)h * D;
                real *dq = dqkv + base + (size_t)first * ld + (size_t)h * D, delta[QUERIES];
                pack_queries(queries, q, ld, rows, D, scale);
                pack_queries(douts, g, width, rows, D, 1);
                pack_keys(queries_b, q, ld, rows, D, 0, scale);
                pack_keys(douts_b, g, width, rows, D, 0, 1);
                for (int i = 0; i < rows; i++)
                    delta[i] = dot(g + (size_t)i * width, o + (size_t)i * width, D);
                for (int key = 0; key < first + rows; key += TILE_K) {
                    int n = min_int(TILE_K, T - key);
                    attention_scores(P, queries, keys + (size_t)key * (size_t)D, first, rows, key, n, D);
                    attention_scores(dS, douts, values + (size_t)key * (size_t)D, first, rows, key, n, D);
                    for (int i = 0; i < rows; i++) {
                        real *p = P + i * ROW, *ds = dS + i * ROW;
                        int seen = max_int(0, min_int(n, first + i + 1 - key)), end = min_int(n, first + rows - key);
                        row_exp(p, seen, end, lse[((size_t)b * H + h) * T + first + i]);
                        for (int j = 0; j < seen; j++)
                            ds[j] = p[j] * (ds[j] - delta[i]);
                        memset(ds + seen, 0, (size_t)(end - seen) * sizeof(real)); // the future
                    }
                    attention_give(dv + (size_t)key * ld, ld, P, douts_b, first, rows, key, n, D);
                    attention_give(dk + (size_t)key * ld, ld, dS, queries_b, first, rows, key, n, D);
                    attention_take(dq, ld, dS, keys_b + (size_t)key * packed_width(D), first, rows, key, n, D, key > 0);
                }
            }
        }
        ranks_tick();
    }
}

// Counting sort: order (n) lists 0..n-1 by key, stable; offset (keys+1) says where each key begins. Negative keys are
// left out. It sorts tokens by expert and, for the embedding's gradient, by vocabulary entry.
void counting_sort(int *order, int *offset, const int *key, int n, int keys) {
    memset(offset, 0, ((size_t)keys + 1) * sizeof(int));
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0)
            offset[key[i] + 1]++;
    }
    for (int k = 0; k < keys; k++)
        offset[k + 1] += offset[k];
    for (int i = 0; i < n; i++) {
        if (key[i] >= 0)
            order[offset[key[i]]++] = i;
    }
    for (int k = keys; k > 0; k--) // each offset has moved to its successor's place
        offset[k] = offset[k - 1];
    offset[0] = 0;
}

void copy_rows(real *to, const real *from, int N, int C) { // (N,C)
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++)
        memcpy(to + (size_t)n * C, from + (size_t)n * C, (size_t)C * sizeof(real));
}

// x (N,C) = embedding (V,C)[token]
void embedding_forward(real *x, const real *embedding, const int *tokens, int N, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++)
        memcpy(x + (size_t)n * C, embedding + (size_t)tokens[n] * C, (size_t)C * sizeof(real));
}

// dembedding (V,C) += ; each row is summed over its tokens in their order. order (N), offset (V+1) are scratch.
void embedding_backward(real *dembedding, const real *dx, const int *tokens, int N, int C, int V, int *order, int *offset) {
    counting_sort(order, offset, tokens, N, V);
#pragma omp parallel for
    for (int v = 0; v < V; v++) {
        for (int i = offset[v]; i < offset[v + 1]; i++) {
            for (int c = 0; c < C; c++)
                dembedding[(size_t)v * C + c] += dx[(size_t)order[i] * C + c];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The router and the experts
//
// The mixture of experts (Shazeer et al. 2017), in the order in which it happens. Every recipe is a way through these
// few steps; for mixtral they are what stands on the right.
//
//   scores   how much each token wants each expert              p (N,E) = softmax(h W_g^T)
//   select   which experts each token gets                      the K highest
//   gate     the weight with which each answer will count       p over the sum of the chosen ones
//   balance  losses that keep the load even                     Switch form
//   capacity who is refused by an expert that is full           nobody
//   plan     choices sorted by expert, so that an expert's tokens are rows offset[e]..offset[e+1] of one array
//   experts  each a small feed-forward over its own rows
//   combine  each token adds up its experts' answers, weighted
//
// Choosing is not differentiable, so the router learns in two ways only: through the weights of the experts it did
// choose, and through the balance losses, without which it soon sends everything to a few favourites.

// The integers of one layer's routing. A "choice" is n*K + k: token n's k-th expert. A "slot" is a row of the sorted
// order.
typedef struct Plan {
    int N, E, K;
    int *expert;  // (N*K) expert of each choice, best first; -1: no choice
    int *key;     // (N*K) the same, or -1 where it is not followed: declined by chance, or the expert was full
    int *slot;    // (N*K) slot of each choice, -1 where it has none
    int *choice;  // (N*K) choice of each slot, sorted by expert and then by token
    int *token;   // (N*K) token of each slot
    int *offset;  // (E+1) first slot of each expert; offset[E] slots in all
    int dropped;  // choices refused for want of room
} Plan;

// A gate: rows of E scores, of which K are chosen. Mostly a token has one row; with several routers it has one for
// each, and where a group is chosen first, one for each group.
typedef struct Gate {
    int per, E, K;   // per: rows of a token
    int column;      // of the logits (N,W): where a token's first row begins, row r's is E further for each
    real *p;         // (N*per, E) scores
    real *lse;       // (N*per) log of the sum of exp of the logits
    real *weight;    // (N*per, K) of the chosen
    int *expert;     // (N*per, K) the chosen, best first
} Gate;

// ---- scores

// to (N,C) = from times random numbers from 1-jitter to 1+jitter (Fedus et al. 2021, appendix C). first is the place of
// the first number in the whole batch of the step.
void apply_jitter(real *to, const real *from, size_t size, double jitter, uint64_t stream, uint64_t first) {
#pragma omp parallel for if (size > 1000)
    for (size_t i = 0; i < size; i++)
        to[i] = from[i] * (real)(1 + jitter * (2 * random_uniform(stream, first + i) - 1));
}

BOTH double noise_size(real raw) { // softplus, and a little so that it is never zero
    return fmax((double)raw, 0.0) + log1p(exp(-fabs((double)raw))) + 0.01;
}

BOTH double noise_slope(real raw) {
    return 1 / (1 + exp(-(double)raw));
}

// noisy (N,W) = logits + n * noise_size(raw), n standard normal: Shazeer et al. 2017, equation 4. logits (N,2W): W
// logits, then W raw sizes. train 0: no noise. first is the place of the first token in the whole batch of the step.
void noise_forward(real *noisy, const real *logits, int N, int W, int train, uint64_t stream, uint64_t first) {
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < W; j++) {
            size_t i = (size_t)n * 2 * W + j;
            double draw = train ? random_normal(stream, (first + n) * W + j) : 0;
            noisy[(size_t)n * W + j] = logits[i] + (real)(draw * noise_size(logits[i + W]));
        }
    }
}

// dlogits (N,2W) +=
void noise_backward(real *dlogits, const real *dnoisy, const real *logits, int N, int W, int train, uint64_t stream,
                    uint64_t first) {
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < W; j++) {
            size_t i = (size_t)n * 2 * W + j;
            double d = (double)dnoisy[(size_t)n * W + j], draw = train ? random_normal(stream, (first + n) * W + j) : 0;
            dlogits[i] += (real)d;
            dlogits[i + W] += (real)(d * draw * noise_slope(logits[i + W]));
        }
    }
}

// p of the gate from logits (N,W): softmax of each row, or the sigmoid of each number.
void scores_forward(Gate *g, const real *logits, int N, int W, int score) {
#pragma omp parallel for if (N > 64)
    for (int row = 0; row < N * g->per; row++) {
        real *p = g->p + (size_t)row * g->E;
        memcpy(p, logits + (size_t)(row / g->per) * W + g->column + row % g->per * g->E, (size_t)g->E * sizeof(real));
        if (score == SOFTMAX)
            g->lse[row] = softmax(p, g->E);
        for (int e = 0; score == SIGMOID && e < g->E; e++)
            p[e] = (real)(1 / (1 + exp(-(double)p[e])));
    }
}

// dlogits (N,W) += . Softmax: p * (dp - sum(dp * p)), and z * 2 lse p of the z-loss (z: its weight over the rows);
// sigmoid: dp * p * (1-p).
void scores_backward(real *dlogits, const real *dp, const Gate *g, int N, int W, int score, double z) {
#pragma omp parallel for if (N > 64)
    for (int row = 0; row < N * g->per; row++) {
        const real *d = dp + (size_t)row * g->E, *p = g->p + (size_t)row * g->E;
        real *to = dlogits + (size_t)(row / g->per) * W + g->column + row % g->per * g->E;
        real sum = 0, slope = score == SOFTMAX ? (real)(2 * z) * g->lse[row] : 0;
        for (int e = 0; e < g->E; e++)
            sum += d[e] * p[e];
        for (int e = 0; e < g->E; e++)
            to[e] += score == SOFTMAX ? p[e] * (d[e] - sum + slope) : d[e] * p[e] * (1 - p[e]);
    }
}

// A gated recurrent unit (Cho et al. 2014, in PyTorch's form): with a = x W_x^T + b_x and b = h W_h^T + b_h, three
// blocks of R each,
//   r = sigmoid(a_0 + b_0)   z = sigmoid(a_1 + b_1)   n = tanh(a_2 + r * b_2)   next = (1-z) * n + z * h
// x, h, next (N,R), h NULL: zeros; W (3R,R), b (3R). keep (N,4R): r, z, n and b_2 for the way back. room (N,6R).
void gru_forward(real *next, real *keep, const real *x, const real *h, const real *W_x, const real *W_h,
                 const real *b_x, const real *b_h, int N, int R, real *room) {
    real *a = room, *b = room + (size_t)N * 3 * R;
    product(a, along_rows(x, R, NULL), along_rows(W_x, R, NULL), N, 3 * R, R, 0);
    if (h)
        product(b, along_rows(h, R, NULL), along_rows(W_h, R, NULL), N, 3 * R, R, 0);
    else
        memset(b, 0, (size_t)N * 3 * R * sizeof(real));
    for (int n = 0; n < N; n++) {
        const real *an = a + (size_t)n * 3 * R, *bn = b + (size_t)n * 3 * R;
        real *kn = keep + (size_t)n * 4 * R;
        for (int j = 0; j < R; j++) {
            int J = j + R, K = J + R;
            double r = 1 / (1 + exp(-(double)(an[j] + b_x[j] + bn[j] + b_h[j]))),
                   z = 1 / (1 + exp(-(double)(an[J] + b_x[J] + bn[J] + b_h[J])));
            double hidden = (double)(bn[K] + b_h[K]), fresh = tanh((double)(an[K] + b_x[K]) + r * hidden);
            next[(size_t)n * R + j] = (real)((1 - z) * fresh + (h ? z * (double)h[(size_t)n * R + j] : 0));
            kn[j] = (real)r;
            kn[J] = (real)z;
            kn[K] = (real)fresh;
            kn[K + R] = (real)hidden;
        }
    }
}

// dx (N,R) =, dh (N,R) = (where h is not NULL), the weights' gradients +=
void gru_backward(real *dx, real *dh, real *dW_x, real *dW_h, real *db_x, real *db_h, const real *dnext,
                  const real *keep, const real *x, const real *h, const real *W_x, const real *W_h, int N, int R,
                  real *room) {
    real *da = room, *db = room + (size_t)N * 3 * R;
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < R; j++) {
            const real *k = keep + (size_t)n * 4 * R;
            real *an = da + (size_t)n * 3 * R, *bn = db + (size_t)n * 3 * R;
            real r = k[j], z = k[R + j], fresh = k[2 * R + j], d = dnext[(size_t)n * R + j];
            real dfresh = d * (1 - z) * (1 - fresh * fresh);
            an[j] = bn[j] = dfresh * k[3 * R + j] * r * (1 - r);
            an[R + j] = bn[R + j] = d * ((h ? h[(size_t)n * R + j] : 0) - fresh) * z * (1 - z);
            an[2 * R + j] = dfresh;
            bn[2 * R + j] = dfresh * r;
            if (h)
                dh[(size_t)n * R + j] = d * z;
            for (int i = j; i < 3 * R; i += R) {
                db_x[i] += an[i];
                db_h[i] += bn[i];
            }
        }
    }
    product(dx, along_rows(da, 3 * R, NULL), along_columns(W_x, R, NULL), N, R, 3 * R, 0);
    product(dW_x, along_columns(da, 3 * R, NULL), along_columns(x, R, NULL), 3 * R, R, N, 1);
    if (h) {
        product(dh, along_rows(db, 3 * R, NULL), along_columns(W_h, R, NULL), N, R, 3 * R, 1);
        product(dW_h, along_columns(db, 3 * R, NULL), along_columns(h, R, NULL), 3 * R, R, N, 1);
    }
}

// ---- select

// expert (N,K): the K largest of each row of p (N,E), largest first; of equals the lower index.
void select_topk(int *expert, const real *p, int N, int E, int K) {
#pragma omp parallel for if (N > 64)
    for (int n = 0; n < N; n++) {
        const real *row = p + (size_t)n * E;
        int *chosen = expert + (size_t)n * K;
        for (int k = 0, last = -1; k < K; k++) { // the best of those that come after the last one
            int best = -1;
            for (int e = 0; e < E; e++) {
                int after = last < 0 || row[e] < row[last] || (row[e] == row[last] && e > last);
                if (after && (best < 0 || row[e] > row[best]))
                    best = e;
            }
            chosen[k] = last = best < 0 ? k : best; // none only where a score is NaN
        }
    }
}

BOTH int group_of(int expert, int E, int D) {
    return expert * D / E;
}

// Experts outside the token's M best groups get a score of -infinity (0 would beat negative scores). A group counts as
// its best score (DeepSeek-V2) or the sum of its two best (DeepSeek-V3). score (N,E)
void mask_groups(real *score, int N, int E, int D, int M, int by) {
    real *value = allocate_reals(D);
    int *chosen = (int *)allocate(M, sizeof(int));
    for (int n = 0; n < N; n++) {
        real *row = score + (size_t)n * E;
        for (int d = 0; d < D; d++) {
            real best = (real)-INFINITY, second = (real)-INFINITY;
            for (int e = 0; e < E; e++) {
                real s = group_of(e, E, D) == d ? row[e] : (real)-INFINITY;
                second = s > best ? best : s > second ? s : second;
                best = s > best ? s : best;
            }
            value[d] = by == BEST_TWO && second > (real)-INFINITY ? best + second : best;
        }
        select_topk(chosen, value, 1, D, M);
        for (int e = 0; e < E; e++) {
            int in = 0;
            for (int k = 0; k < M; k++)
                in |= chosen[k] == group_of(e, E, D);
            row[e] = in ? row[e] : (real)-INFINITY;
        }
    }
    free(chosen);
    free(value);
}

// Of each token's experts, best first, only those with p above level[e] (above `all` where level is NULL) stay, and the
// best one if keep_best.
void select_above(int *expert, const real *p, int N, int E, int K, const real *level, double all, int keep_best) {
    for (int n = 0; n < N; n++) {
        int *chosen = expert + (size_t)n * K, kept = 0;
        for (int k = 0; k < K; k++) {
            int e = chosen[k];
            if ((keep_best && k == 0) || (double)p[(size_t)n * E + e] > (level ? (double)level[e] : all))
                chosen[kept++] = e;
        }
        for (; kept < K; kept++)
            chosen[kept] = -1;
    }
}

typedef struct Ranked {
    double score;
    int index;
} Ranked;

int compare_ranked(const void *a, const void *b) { // highest first, of equals the lower index
    const Ranked *x = (const Ranked *)a, *y = (const Ranked *)b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : x->index - y->index;
}

// Each expert takes its `take` best of the n tokens: Zhou et al. 2022. expert (n,E): those that took a token, best
// first, then -1. lowest (E) += the lowest score that each expert took.
void select_by_experts(int *expert, double *lowest, const real *p, int n, int E, int take) {
    unsigned char *taken = (unsigned char *)allocate((size_t)n * E, 1);
#pragma omp parallel for
    for (int e = 0; e < E; e++) {
        Ranked *list = (Ranked *)allocate(n, sizeof(Ranked));
        for (int i = 0; i < n; i++) {
            list[i].score = (double)p[(size_t)i * E + e];
            list[i].index = i;
        }
        qsort(list, n, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < take; i++)
            taken[(size_t)list[i].index * E + e] = 1;
        lowest[e] += list[take - 1].score;
        free(list);
        ranks_tick();
    }
    select_topk(expert, p, n, E, E);
    for (int i = 0; i < n; i++) {
        int *chosen = expert + (size_t)i * E, kept = 0;
        for (int k = 0; k < E; k++) {
            if (taken[(size_t)i * E + chosen[k]])
                chosen[kept++] = chosen[k];
        }
        for (; kept < E; kept++)
            chosen[kept] = -1;
    }
    free(taken);
}

// expert (n): the assignment with the largest sum of score (n,E) in which expert e has n/E tokens, and one more where e
// < n % E: the problem of Lewis et al. 2021, BASE Layers, solved exactly. Each token begins at its best expert; then,
// while an expert has too many, one token moves along the cheapest chain of experts that leads from any such to one
// with room: token t of a goes to b, one of b's goes on to c, ... (successive shortest paths; Bellman and Ford's
// algorithm over the E experts).
void select_balanced(int *expert, const real *score, int n, int E) {
    double *cost = (double *)allocate((size_t)E * E, sizeof(double)), *far = (double *)allocate(E, sizeof(double));
    int *mover = (int *)allocate((size_t)E * E, sizeof(int)), *from = (int *)allocate(E, sizeof(int));
    int *excess = (int *)allocate(E, sizeof(int)), *stale = (int *)allocate(E, sizeof(int));
    select_topk(expert, score, n, E, 1);
    for (int e = 0; e < E; e++) {
        excess[e] = -(n / E) - (e < n % E);
        stale[e] = 1;
    }
    for (int t = 0; t < n; t++)
        excess[expert[t]]++;
    for (;;) {
        int left = 0, end = -1;
        for (int a = 0; a < E; a++) { // cost[a][b]: what is lost by moving a's best token for it to b
            left += max_int(0, excess[a]);
            for (int b = 0; stale[a] && b < E; b++)
                cost[a * E + b] = INFINITY;
        }
        if (!left)
            break;
        for (int t = 0; t < n; t++) {
            int a = expert[t];
            for (int b = 0; stale[a] && b < E; b++) {
                double loss = (double)score[(size_t)t * E + a] - (double)score[(size_t)t * E + b];
                if (loss < cost[a * E + b]) {
                    cost[a * E + b] = loss;
                    mover[a * E + b] = t;
                }
            }
        }
        memset(stale, 0, (size_t)E * sizeof(int));
        for (int e = 0; e < E; e++) {
            far[e] = excess[e] > 0 ? 0 : INFINITY;
            from[e] = -1;
        }
        for (int again = 1, round = 0; again && round < E; round++) {
            again = 0;
            for (int a = 0; a < E; a++) {
                for (int b = 0; isfinite(far[a]) && b < E; b++) {
                    if (a != b && far[a] + cost[a * E + b] < far[b] - 1e-12) { // or rounding could go in circles
                        far[b] = far[a] + cost[a * E + b];
                        from[b] = a;
                        again = 1;
                    }
                }
            }
        }
        for (int e = 0; e < E; e++) {
            if (excess[e] < 0 && isfinite(far[e]) && (end < 0 || far[e] < far[end]))
                end = e;
        }
        if (end < 0) // only where a score is NaN
            break;
        excess[end]++;
        for (; from[end] >= 0; end = from[end]) {
            expert[mover[from[end] * E + end]] = end;
            stale[end] = stale[from[end]] = 1;
        }
        excess[end]--;
        ranks_tick();
    }
    free(cost), free(far), free(mover), free(from), free(excess), free(stale);
}

// A table from words to experts under which the experts' shares of the text are even (Roller et al. 2021, "balanced"):
// the most frequent word first, each goes to the expert with the least so far. frequency (V), NULL: all equal. The
// order differs a little from layer to layer, so that other words meet. table (V)
void balance_table(real *table, const double *frequency, int V, int E, uint64_t stream) {
    Ranked *list = (Ranked *)allocate(V, sizeof(Ranked));
    double *load = (double *)allocate(E, sizeof(double));
    for (int v = 0; v < V; v++) {
        list[v].score = (frequency ? frequency[v] : 1) * (0.8 + 0.2 * random_uniform(stream, (uint64_t)v));
        list[v].index = v;
    }
    qsort(list, V, sizeof(Ranked), compare_ranked);
    for (int i = 0; i < V; i++) {
        int best = 0, v = list[i].index;
        for (int e = 1; e < E; e++)
            best = load[e] < load[best] ? e : best;
        table[v] = (real)best;
        load[best] += frequency ? frequency[v] + 1 : 1; // words that were not seen are dealt out evenly, too
    }
    free(load);
    free(list);
}

// ---- gate

// weight (N,K) of the chosen experts: p as it is, or divided by the sum of the chosen ones' p; times scale.
void gate_forward(real *weight, const real *p, const int *expert, int N, int E, int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0;
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            weight[n * K + k] = e < 0 ? 0 : (real)scale * p[(size_t)n * E + e];
            sum += e < 0 ? 0 : p[(size_t)n * E + e];
        }
        for (int k = 0; gate == RENORMALIZED && k < K; k++)
            weight[n * K + k] /= sum;
    }
}

// dp (N,E) += . With w_k = scale * p_k / s, s the sum over the chosen: dp_k = (scale * dw_k - sum_j dw_j w_j) / s.
void gate_backward(real *dp, const real *dweight, const real *weight, const real *p, const int *expert, int N, int E,
                   int K, int gate, double scale) {
    for (int n = 0; n < N; n++) {
        real sum = 0, mean = 0;
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            sum += e < 0 ? 0 : p[(size_t)n * E + e];
            mean += dweight[n * K + k] * weight[n * K + k];
        }
        for (int k = 0; k < K; k++) {
            int e = expert[n * K + k];
            real d = dweight[n * K + k] * (real)scale;
            if (e >= 0)
                dp[(size_t)n * E + e] += gate == RENORMALIZED ? (d - mean) / sum : d;
        }
    }
}

// Two levels (Shazeer et al. 2017, appendix B): the experts j that a token's chosen groups i chose, with the product of
// the weights. groups: (N rows of D, M chosen); inner: (N*D rows of E/D, K/M chosen). expert (N,K), weight (N,K)
void join_gates_forward(int *expert, real *weight, const Gate *groups, const Gate *inner, int N) {
    int M = groups->K, each = inner->K, D = inner->per;
    for (int i = 0; i < N * M * each; i++) {
        int n = i / (M * each), m = n * M + i / each % M, row = n * D + groups->expert[m], k = row * each + i % each;
        expert[i] = groups->expert[m] * inner->E + inner->expert[k];
        weight[i] = groups->weight[m] * inner->weight[k];
    }
}

// dgroups (N,M) =, dinner (N*D,K/M) = : gradients by the two gates' weights
void join_gates_backward(real *dgroups, real *dinner, const real *dweight, const Gate *groups, const Gate *inner,
                         int N) {
    int M = groups->K, each = inner->K, D = inner->per;
    memset(dgroups, 0, (size_t)N * M * sizeof(real));
    memset(dinner, 0, (size_t)N * D * each * sizeof(real));
    for (int i = 0; i < N * M * each; i++) {
        int n = i / (M * each), m = n * M + i / each % M, row = n * D + groups->expert[m], k = row * each + i % each;
        dgroups[m] += dweight[i] * inner->weight[k];
        dinner[k] += dweight[i] * groups->weight[m];
    }
}

// ---- plan

// A second choice is followed with probability weight / threshold (Lepikhin et al. 2020: 0.5; Zoph et al. 2022: 0.2).
// key, weight (N,2); the weights are renormalised ones times scale.
void decline_second(int *key, const real *weight, int N, double threshold, double scale, uint64_t stream,
                    uint64_t first) {
    for (int n = 0; n < N; n++) {
        if (random_uniform(stream, first + n) * threshold * scale >= (double)weight[2 * n + 1])
            key[2 * n + 1] = -1;
    }
}

// A unit - an expert, or a group of experts - takes at most ceil(factor * K * n / units) of the choices of a group of n
// tokens; the key of a refused one becomes -1. Served first are, BY_CHOICE, first choices before second ones and early
// tokens before late ones (Lepikhin et al. 2020, algorithm 1); BY_SCORE, high weights (DeepSeek-V2); BY_TOKEN, early
// tokens with all their choices, so that no later token decides an earlier one's fate. exempt (N): tokens that lose
// nothing, NULL: none. p (N,E): a refused token goes to its best expert with room instead; NULL: it passes by. factor
// 0: no limit.
void plan_capacity(Plan *plan, int group_tokens, double factor, int units, int order, const real *weight,
                   const unsigned char *exempt, const real *p) {
    int E = plan->E, K = plan->K, choices = group_tokens * K;
    int capacity = (int)fmin(ceil(factor * K * group_tokens / units - 1e-9), (double)choices);
    plan->dropped = 0;
    if (factor <= 0)
        return;
    int *taken = (int *)allocate(units, sizeof(int));
    Ranked *list = (Ranked *)allocate(choices, sizeof(Ranked));
    for (int first = 0; first < plan->N; first += group_tokens) {
        memset(taken, 0, (size_t)units * sizeof(int));
        for (int i = 0; i < choices; i++) {
            list[i].index = first * K + (order == BY_CHOICE ? i % group_tokens * K + i / group_tokens : i);
            list[i].score = order == BY_SCORE ? (double)weight[list[i].index] : 0;
        }
        if (order == BY_SCORE)
            qsort(list, choices, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < choices; i++) {
            int choice = list[i].index, n = choice / K, e = plan->key[choice], best = -1;
            if (e < 0)
                continue;
            if (taken[group_of(e, E, units)] < capacity || (exempt && exempt[n])) {
                taken[group_of(e, E, units)]++;
                continue;
            }
            for (int other = 0; p && other < E; other++) {
                int is_chosen = 0;
                for (int k = 0; k < K; k++)
                    is_chosen |= plan->expert[n * K + k] == other;
                if (!is_chosen && taken[other] < capacity &&
                    (best < 0 || p[(size_t)n * E + other] > p[(size_t)n * E + best]))
                    best = other;
            }
            plan->key[choice] = best;
            plan->dropped += best < 0;
            if (best >= 0) {
                plan->expert[choice] = best;
                taken[best]++;
            }
        }
    }
    free(list);
    free(taken);
}

// Sorts what has a place by expert.
void plan_sort(Plan *plan) {
    int choices = plan->N * plan->K;
    counting_sort(plan->choice, plan->offset, plan->key, choices, plan->E);
    memset(plan->slot, -1, (size_t)choices * sizeof(int));
    for (int s = 0; s < plan->offset[plan->E]; s++) {
        plan->slot[plan->choice[s]] = s;
        plan->token[s] = plan->choice[s] / plan->K;
    }
}

// ---- balance
//
// Nearly all losses of the literature have one form: a sum over tokens and experts of p times a slope that depends on
// counts only, and counts carry no gradient. So each loss adds its slopes to one table, slope (groups of tokens, E),
// and one function each takes the sum and its gradient. All but the z-loss and the count of experts are 1 at perfect balance.

// count (groups*per, E): how often each expert stands among the first `first` of the K choices of each row. A gate with
// several rows a token (per) has counts for each of them. group_rows: rows of a group of tokens.
void count_choices(double *count, const int *choice, int rows, int E, int K, int first, int group_rows, int per) {
    memset(count, 0, (size_t)(rows / group_rows) * per * E * sizeof(double));
    for (int row = 0; row < rows; row++) {
        double *c = count + ((size_t)(row / group_rows) * per + row % per) * E;
        for (int k = 0; k < first; k++) {
            if (choice[(size_t)row * K + k] >= 0)
                c[choice[(size_t)row * K + k]] += 1;
        }
    }
}

// slope (E) += weight * E * f_e: the loss of Switch Transformers, E * sum_e f_e P_e, f_e the share of count, P_e the
// mean of p_e. width (E): a choice counts as much as its expert is wide; NULL: as 1.
void add_balance(double *slope, const double *count, const int *width, int E, double weight) {
    double total = 0;
    for (int e = 0; e < E; e++)
        total += count[e] * (width ? width[e] : 1);
    for (int e = 0; e < E && total > 0; e++)
        slope[e] += weight * E * count[e] * (width ? width[e] : 1) / total;
}

// slope (E) += : the device-level loss of Dai et al. 2024, DeepSeekMoE, sum over groups of experts of f'_g P'_g: f' is
// the mean of E * f in the group, P' the sum of P.
void add_device_balance(double *slope, const double *count, int E, int D, double weight) {
    double total = 0;
    for (int e = 0; e < E; e++)
        total += count[e];
    for (int first = 0, end; first < E; first = end) {
        double sum = 0;
        for (end = first; end < E && group_of(end, E, D) == group_of(first, E, D); end++)
            sum += count[end];
        for (int e = first; e < end; e++)
            slope[e] += weight * E * sum / total / (end - first);
    }
}

// slope (E) += : the communication loss of DeepSeek-V2, sum of f''_g P'_g with f''_g = D / (M n) * tokens sent to group
// g. expert (n,K). all: the tokens of the group on all ranks, over which it may be spread.
void add_communication_balance(double *slope, const int *expert, int n, int E, int K, int D, int M, double weight,
                               int all, int spread) {
    double *sent = (double *)allocate(D, sizeof(double));
    for (int i = 0; i < n * K; i++) {
        int seen = expert[i] < 0;
        for (int j = i / K * K; j < i && !seen; j++) // a token is sent to a group once
            seen = expert[j] >= 0 && group_of(expert[j], E, D) == group_of(expert[i], E, D);
        if (!seen)
            sent[group_of(expert[i], E, D)] += 1;
    }
    if (spread)
        sum_over_ranks(sent, D);
    for (int e = 0; e < E; e++)
        slope[e] += weight * D / ((double)M * all) * sent[group_of(e, E, D)];
    free(sent);
}

// The sum over rows of slope . p / rows; sigmoid scores are divided by their sum first.
double balance_forward(const Gate *g, const double *slope, int rows, int group_rows, int score) {
    double loss = 0;
    for (int row = 0; row < rows; row++) {
        const double *c = slope + ((size_t)(row / group_rows) * g->per + row % g->per) * g->E;
        double dot = 0, sum = 0;
        for (int e = 0; e < g->E; e++) {
            dot += c[e] * (double)g->p[(size_t)row * g->E + e];
            sum += (double)g->p[(size_t)row * g->E + e];
        }
        loss += score == SIGMOID ? dot / sum : dot;
    }
    return loss / rows;
}

// dp (rows,E) += scale * its gradient
void balance_backward(real *dp, const Gate *g, const double *slope, int rows, int group_rows, int score, double scale) {
#pragma omp parallel for if (rows > 16)
    for (int row = 0; row < rows; row++) {
        const double *c = slope + ((size_t)(row / group_rows) * g->per + row % g->per) * g->E;
        double dot = 0, sum = 0;
        for (int e = 0; score == SIGMOID && e < g->E; e++) {
            dot += c[e] * (double)g->p[(size_t)row * g->E + e];
            sum += (double)g->p[(size_t)row * g->E + e];
        }
        for (int e = 0; e < g->E; e++)
            dp[(size_t)row * g->E + e] += (real)(scale / rows * (score == SIGMOID ? (c[e] - dot / sum) / sum : c[e]));
    }
}

// 1 + the squared coefficient of variation of v (n): variance over mean^2, so 1 where all are equal. slope (n) = weight
// * its slope. mean: a mean known beforehand, to be taken as a constant; 0: that of v.
double cv_squared(const double *v, double *slope, int n, double mean, double weight) {
    double average = 0, variance = 0, fixed = mean;
    for (int i = 0; i < n; i++)
        average += v[i] / n;
    for (int i = 0; i < n; i++)
        variance += (v[i] - average) * (v[i] - average) / n;
    mean = fixed > 0 ? fixed : average;
    for (int i = 0; i < n; i++)
        slope[i] = weight * 2 / (n * mean * mean) * (v[i] - average - (fixed > 0 ? 0 : variance / mean));
    return 1 + variance / (mean * mean);
}

// How sure a noisy gate's choices are (Shazeer et al. 2017, appendix A): with new noise at (row, e), expert e would be
// among the K with probability Phi((logit - t) / size), t being the K-th highest of the other noisy logits. load
// (per,E) += these over the rows of n tokens from `first` on. live (N*per): rows that count, NULL: all. With dload
// (per,E) not NULL the slopes instead: dnoisy (N,W) +=, by t; dlogits (N,2W) +=, by logit and size.
void smooth_load(double *load, const double *dload, real *dnoisy, real *dlogits, const Gate *g, const real *noisy,
                 const real *logits, int W, int first, int n, const unsigned char *live) {
    for (int row = first * g->per; row < (first + n) * g->per; row++) {
        if (live && !live[row])
            continue;
        size_t at = (size_t)(row / g->per) * W + g->column + row % g->per * g->E, raw = at + (size_t)(row / g->per) * W;
        const real *h = noisy + at;
        const int *chosen = g->expert + (size_t)row * g->K;
        int next = -1; // the best of those not chosen
        for (int e = 0; e < g->E; e++) {
            int is_chosen = 0;
            for (int k = 0; k < g->K; k++)
                is_chosen |= chosen[k] == e;
            if (!is_chosen && (next < 0 || h[e] > h[next]))
                next = e;
        }
        for (int e = 0; e < g->E; e++) {
            int i = row % g->per * g->E + e, t = chosen[g->K - 1];
            for (int k = 0; k < g->K; k++)
                t = chosen[k] == e ? next : t;
            double size = noise_size(logits[raw + W + e]), v = ((double)logits[raw + e] - (double)h[t]) / size;
            if (!dload) {
                load[i] += 0.5 * (1 + erf(v * 0.7071067811865476));
                continue;
            }
            double slope = dload[i] * exp(-0.5 * v * v) * 0.3989422804014327 / size;
            dlogits[raw + e] += (real)slope;
            dnoisy[at + t] -= (real)slope;
            dlogits[raw + W + e] -= (real)(slope * v * noise_slope(logits[raw + W + e]));
        }
    }
}

// ---- experts

// The activation function f of one vector, and its slope f'.
void activate(int activation, vec x, vec *value, vec *slope) {
    vec zero = {0};
    if (activation == SWIGLU) { // SiLU: x * sigmoid(x)
        vec sigmoid = (real)1 / ((real)1 + vec_exp(-x));
        *value = x * sigmoid;
        *slope = sigmoid * ((real)1 + x * ((real)1 - sigmoid));
    } else if (activation == RELU) {
        *value = *slope = zero;
        for (int i = 0; i < LANES; i++) {
            (*value)[i] = x[i] > 0 ? x[i] : 0;
            (*slope)[i] = x[i] > 0 ? 1 : 0;
        }
    } else { // GELU: x * Phi(x), Phi the normal distribution function
        vec bell = vec_exp(x * x * (real)-0.5), phi = zero;
        if (sizeof(real) == 8) {
            for (int i = 0; i < LANES; i++)
                phi[i] = 0.5 * (1 + erf(x[i] * 0.7071067811865476));
        } else { // to 8e-8: Abramowitz and Stegun 1964, 26.2.17: 1 - Phi(|x|) is bell times a polynomial
            vec size = zero, t;
            for (int i = 0; i < LANES; i++)
                size[i] = x[i] < 0 ? -x[i] : x[i];
            t = (real)1 / ((real)1 + (real)0.23164189 * size);
            vec sum = (real)-0.7265760135 + t * (real)0.5307027145;
            sum = (real)-0.142248368 + t * ((real)0.7107068705 + t * sum);
            t = t * bell * ((real)0.127414796 + t * sum);
            for (int i = 0; i < LANES; i++)
                phi[i] = x[i] < 0 ? t[i] : 1 - t[i];
        }
        *value = x * phi;
        *slope = phi + x * bell * (real)0.3989422804014327;
    }
}

// act (rows,F) = f(gate) * up with hidden (rows,2F): F of gate, then F of up; ungated f(hidden) with hidden (rows,F).
// To be called by all threads of a team, or by one.
void activation_forward(real *act, const real *hidden, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp for nowait
    for (int r = 0; r < rows; r++) {
        const real *h = hidden + (size_t)r * F * (1 + gated), *up = h + F;
        for (int j = 0; j < F; j += LANES) {
            vec value, slope;
            activate(activation, vec_load(h + j, F - j), &value, &slope);
            if (gated)
                value *= vec_load(up + j, F - j);
            vec_store(act + (size_t)r * F + j, value, F - j);
        }
    }
}

// Given dact (rows,F), the gradient by act if each row's weight were 1, and weight (N*K, by choice; NULL: all 1;
// choice[r] is the choice of row r), writes
//   dweight (N*K, by choice; may be NULL) = dact . act: an answer is weight * (act W_out^T), so its slope by the weight
//   needs no
//                                 copy of the answer;
//   dhidden (rows,2F or F), in which the weight is counted;
//   dact    = weight * act, computed anew, which is what W_out's gradient wants.
void activation_backward(real *dhidden, real *dweight, real *dact, const real *hidden, const real *weight,
                         const int *choice, int rows, int F, int activation) {
    int gated = is_gated(activation);
#pragma omp for nowait
    for (int r = 0; r < rows; r++) {
        const real *h = hidden + (size_t)r * F * (1 + gated), *up = h + F;
        real *dh = dhidden + (size_t)r * F * (1 + gated), *d = dact + (size_t)r * F;
        real w = weight ? weight[choice[r]] : 1;
        vec sum = {0};
        for (int j = 0; j < F; j += LANES) {
            vec value, slope, g = vec_load(d + j, F - j), zero = {0}, u = zero + (real)1;
            activate(activation, vec_load(h + j, F - j), &value, &slope);
            if (gated) {
                u = vec_load(up + j, F - j);
                vec_store(dh + F + j, w * g * value, F - j);
            }
            vec_store(dh + j, w * g * u * slope, F - j);
            sum += g * u * value;
            vec_store(d + j, w * u * value, F - j);
        }
        if (dweight)
            dweight[choice[r]] = vec_sum(sum);
    }
}

// The feed-forwards of a layer, and who passes them. A dense layer is one expert with all tokens.
typedef struct Experts {
    int E, C;
    const int *width, *activation; // (E): F and f of each; H = 2F where f is gated, else F
    const real *w_in, *w_out;      // each expert's (H,C), one after another; each one's (C,F)
    const int *offset;             // (E+1): expert e has rows offset[e]..offset[e+1]
    const int *token;              // (rows): the token of each row; NULL: row r is token r
} Experts;

typedef struct Block { // one expert's share: rows, and where its numbers begin
    int rows, F, H, activation;
    const int *token;
    size_t slot, act, hidden, in, out; // its first row; in act and hidden; in w_in and w_out
} Block;

Block *expert_blocks(const Experts *x) { // (E), to be freed
    Block *list = (Block *)allocate(x->E + 1, sizeof(Block));
    for (int e = 0; e < x->E; e++) {
        Block *b = &list[e], *next = b + 1;
        b->rows = x->offset[e + 1] - x->offset[e];
        b->F = x->width[e];
        b->activation = x->activation[e];
        b->H = b->F * (1 + is_gated(b->activation));
        b->token = x->token ? x->token + b->slot : NULL;
        next->slot = b->slot + (size_t)b->rows;
        next->act = b->act + (size_t)b->rows * b->F;
        next->hidden = b->hidden + (size_t)b->rows * b->H;
        next->in = b->in + (size_t)b->H * x->C;
        next->out = b->out + (size_t)b->F * x->C;
    }
    return list;
}

Operand block_rows(const Block *b, const real *x, int C) { // of x (N,C), the rows of the expert's tokens
    return along_rows(b->token ? x : x + b->slot * C, C, b->token);
}

Operand transposed(Operand o) {
    o.row_is_k = !o.row_is_k;
    return o;
}

// hidden (rows,H), block after block, = x W_in^T; x (N,C).
void experts_hidden(real *hidden, const real *x, const Experts *experts) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(E, sizeof(Product));
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        Operand rows = block_rows(b, x, C), w = along_rows(experts->w_in + b->in, C, NULL);
        Product p = {hidden + b->hidden, (size_t)b->H, rows, w, b->rows, b->H, C};
        list[e] = p;
    }
    products(list, E, 0);
    free(list);
    free(blocks);
}

// out (rows,C) = or += act W_out^T, with act (rows,F) = f(hidden).
void experts_forward(real *out, real *hidden, real *act, const real *x, const Experts *experts, int accumulate) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(E, sizeof(Product));
    experts_hidden(hidden, x, experts);
#pragma omp parallel if (experts->offset[E] > 16)
    for (int e = 0; e < E; e++)
        activation_forward(act + blocks[e].act, hidden + blocks[e].hidden, blocks[e].rows, blocks[e].F,
                           blocks[e].activation);
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        Operand rows = along_rows(act + b->act, b->F, NULL), w = along_rows(experts->w_out + b->out, b->F, NULL);
        Product p = {out + b->slot * C, (size_t)C, rows, w, b->rows, C, b->F};
        list[e] = p;
    }
    products(list, E, accumulate);
    free(list);
    free(blocks);
}

// dx (rows,C) = or +=, dw_in += , dw_out += , dweight (choices) =; dout (N,C) is by token, unweighted. dact (rows,F)
// and dhidden (rows,H) are scratch. With weight NULL rows count as they are.
void experts_backward(real *dx, real *dw_in, real *dw_out, real *dweight, const real *dout, const real *x,
                      const real *hidden, const real *weight, const int *choice, real *dact, real *dhidden,
                      const Experts *experts, int accumulate) {
    int E = experts->E, C = experts->C;
    Block *blocks = expert_blocks(experts);
    Product *list = (Product *)allocate(2 * E, sizeof(Product));
    for (int e = 0; e < E; e++) { // dact = dout W_out
        const Block *b = &blocks[e];
        Operand rows = block_rows(b, dout, C), w = along_columns(experts->w_out + b->out, b->F, NULL);
        Product p = {dact + b->act, (size_t)b->F, rows, w, b->rows, b->F, C};
        list[e] = p;
    }
    products(list, E, 0);
#pragma omp parallel if (experts->offset[E] > 16)
    for (int e = 0; e < E; e++) {
        const Block *b = &blocks[e];
        activation_backward(dhidden + b->hidden, dweight, dact + b->act, hidden + b->hidden, weight,
                            choice ? choice + b->slot : NULL, b->rows, b->F, b->activation);
    }
    for (int e = 0; e < E; e++) { // dW_out += dout^T act, dW_in += dhidden^T x
        const Block *b = &blocks[e];
        Operand g = transposed(block_rows(b, dout, C)), y = along_columns(dact + b->act, b->F, NULL);
        Operand dh = along_columns(dhidden + b->hidden, b->H, NULL), rows = transposed(block_rows(b, x, C));
        Product to_out = {dw_out + b->out, (size_t)b->F, g, y, C, b->F, b->rows};
        Product to_in = {dw_in + b->in, (size_t)C, dh, rows, b->H, C, b->rows};
        list[2 * e] = to_out;
        list[2 * e + 1] = to_in;
    }
    products(list, 2 * E, 1);
    for (int e = 0; e < E; e++) { // dx = dhidden W_in
        const Block *b = &blocks[e];
        Operand rows = along_rows(dhidden + b->hidden, b->H, NULL), w = along_columns(experts->w_in + b->in, C, NULL);
        Product p = {dx + b->slot * C, (size_t)C, rows, w, b->rows, C, b->H};
        list[e] = p;
    }
    products(list, E, accumulate);
    free(list);
    free(blocks);
}

// out (N,C) += sum over k of weight[n,k] * rows[slot[n,k]], in the order of k; weight NULL: all 1. rows (slots,C)
void combine(real *out, const real *rows, const real *weight, const int *slot, int N, int K, int C) {
#pragma omp parallel for if (N > 16)
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++) {
            if (slot[n * K + k] < 0)
                continue;
            const real *row = rows + (size_t)slot[n * K + k] * C;
            real w = weight ? weight[n * K + k] : 1;
            for (int c = 0; c < C; c++)
                out[(size_t)n * C + c] += w * row[c];
        }
    }
}

// out (N,C): row token[r] += rows[r], all tokens different. rows (count,C)
void combine_rows(real *out, const real *rows, const int *token, int count, int C) {
#pragma omp parallel for if (count > 16)
    for (int r = 0; r < count; r++) {
        for (int c = 0; c < C; c++)
            out[(size_t)token[r] * C + c] += rows[(size_t)r * C + c];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. The whole model: weights, activations, forward and backward

// clang-format off
typedef struct LayerWeights { // all real *, in the order of the kinds below
    real *norm1;              // (C)
    real *qkv;                // ((H+2KV)*D, C): rows of all query heads, then keys, then values
    real *proj;               // (C, H*D)
    real *norm2;              // (C)
    real *router;             // (W, C), W from router_width(), or with noise (2W, C); like w_in and w_out only in layers
                              // with experts, and C/h wide with h sub-tokens
    real *w_in;               // (E, 2F, C)   each expert: F rows of gate, then F of up; (E, F, C) where not gated
    real *w_out;              // (E, C, F)
    real *dense_in;           // (2W, C)      the dense layer's, or the shared experts', together W wide
    real *dense_out;          // (C, W)
    real *split, *merge;      // (C, C)       of sub-tokens
    real *project;            // (R, C)       into the recurrent router
    real *bias;               // (E)          added to p for the choice. From here on: buffers, not trained but saved
    real *slow;               // (W, C)       moving average of router
    real *level;              // (E)          expert choice: the p above which evaluation chooses
    real *table;              // (V)          hash: the expert of each word
} LayerWeights;

typedef struct Weights {
    real *embed, *norm, *head;              // (V,C), (C), (V,C); head is embed where tied
    real *gru_x, *gru_h, *gru_bx, *gru_bh;  // (3R,R), (3R,R), (3R), (3R): the recurrent router's, one for all layers
    LayerWeights *layer;                    // (L)
} Weights;

enum {
    NORM1, QKV, PROJ, NORM2, ROUTER, W_IN, W_OUT, DENSE_IN, DENSE_OUT, SPLIT, MERGE, PROJECT, BIAS, SLOW, LEVEL, TABLE,
    LAYER_TENSORS, EMBED = LAYER_TENSORS, NORM, HEAD, GRU_X, GRU_H, GRU_BX, GRU_BH, KINDS
};
const char *const tensor_names[] = {
    "norm1", "qkv", "proj", "norm2", "router", "w_in", "w_out", "dense_in", "dense_out", "split", "merge", "project", "bias",
    "slow", "level", "table", "embed", "norm", "head", "gru_x", "gru_h", "gru_bx", "gru_bh"};

// clang-format on

typedef struct Tensor { // one row of the model's table of weights
    char name[40];
    int layer, kind;       // layer -1: EMBED and what follows
    int shape[3];          // padded with 1 in front
    size_t offset, size;   // in this process's memory
    size_t place, whole;   // in the memory of a process that is alone: where it begins, and its numbers
    size_t first;          // this rank has numbers first..first+size of the whole
} Tensor;

int tensor_is_norm(const Tensor *t) {
    return t->kind == NORM1 || t->kind == NORM2 || t->kind == NORM;
}

int tensor_is_expert(const Tensor *t) { // of which each rank has its own part
    return t->kind == W_IN || t->kind == W_OUT;
}

int tensor_is_buffer(const Tensor *t) {
    return t->kind >= BIAS && t->kind <= TABLE;
}

int tensor_is_vector(const Tensor *t) { // one dimension, and no weight decay
    return tensor_is_norm(t) || t->kind == BIAS || t->kind == LEVEL || t->kind == TABLE || t->kind == GRU_BX ||
           t->kind == GRU_BH;
}

// Appends a tensor of a x b x c numbers, if it has any.
void add_tensor(Tensor *list, int *count, int layer, int kind, const int shape[3]) {
    size_t size = (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2];
    if (!size)
        return;
    Tensor *t = &list[(*count)++];
    t->layer = layer;
    t->kind = kind;
    memcpy(t->shape, shape, sizeof(t->shape));
    t->whole = t->size = size;
    if (layer < 0)
        snprintf(t->name, sizeof(t->name), "%s", tensor_names[kind]);
    else
        snprintf(t->name, sizeof(t->name), "layer%d.%s", layer, tensor_names[kind]);
}

// Numbers of expert e's part of W_IN or W_OUT.
size_t expert_size(const Config *c, int kind, int e) {
    size_t size = (size_t)expert_width(c, e) * (size_t)(c->dim / c->subtokens);
    return kind == W_OUT ? size : size * (1 + is_gated(expert_activation(c, e)));
}

// Where each tensor lies: in the order of the table. Of several ranks, what all have in common comes first, filled up so
// that it divides evenly among them, into slices of a multiple of 16 numbers (gather_slices); then come this rank's
// experts, each tensor with room for as many large ones as it may have to copy from other ranks (whose moments' room is
// never used). Each begins at a multiple of `unit` numbers. Returns the numbers of all, *common those of the first part.
size_t place_tensors(const Config *c, Tensor *list, int count, size_t unit, size_t *common) {
    size_t place = 0, at = 0, even = (unit > 16 ? unit : 16) * (size_t)ranks.size;
    for (int i = 0; i < count; i++) {
        list[i].place = place;
        place += list[i].whole;
    }
    for (int part = 0; part < (MANY ? 2 : 1); part++) {
        for (int i = 0; i < count; i++) {
            Tensor *t = &list[i];
            if (MANY && tensor_is_expert(t) != part)
                continue;
            t->offset = at;
            t->first = 0;
            t->size = t->whole;
            size_t largest = 0, each = (size_t)(c->experts / ranks.ep), first = (size_t)ranks.place * each;
            for (size_t e = 0; MANY && part == 1 && e < (size_t)c->experts; e++) {
                size_t size = expert_size(c, t->kind, (int)e);
                t->first += e < first ? size : 0;
                t->size -= e < first || e >= first + each ? size : 0;
                largest = size > largest ? size : largest;
            }
            at += (t->size + largest * (size_t)c->replicate + unit - 1) / unit * unit;
        }
        if (part == 0)
            *common = at = MANY ? (at + even - 1) / even * even : at;
    }
    return at;
}

// The table of all weights, in the order in which a single process has them in memory. list has room for
// LAYER_TENSORS*L + KINDS.
int model_tensors(const Config *c, Tensor *list) {
    int count = 0, last, C = c->dim, D = C / c->heads, F = c->ffn, R = c->recurrent, moe = moe_layers(c, &last);
    size_t common;
    const int embed[3] = {1, c->vocab, C};
    add_tensor(list, &count, -1, EMBED, embed);
    for (int l = 0; l < c->layers; l++) {
        int has = is_moe(c, l), E = has ? c->experts : 0, W = has ? router_width(c) : 0, width = dense_width(c, l);
        int c1 = C / c->subtokens, read = R ? R : c1; // what experts and router read
        int in = 1 + is_gated(dense_activation(c, l)), rows = 0;
        for (int e = 0; e < E; e++)
            rows += expert_width(c, e) * (1 + is_gated(expert_activation(c, e)));
        const int split = has && c->subtokens > 1 ? C : 0, mixed = c->mixed && E;
        // clang-format off
        const int shapes[][3] = {
            {1, 1, C}, {1, (c->heads + 2 * c->kv_heads) * D, C}, {1, C, C}, {1, 1, C},
            {1, W * (1 + c->noise), read}, {mixed ? 1 : E, mixed ? rows : E ? rows / E : 0, c1}, {E, c1, F},
            {1, in * width, C}, {1, C, width}, {1, split, C}, {1, split, C}, {1, has ? R : 0, C},
            {1, 1, c->bias_rate > 0 ? E : 0}, {1, c->history_decay > 0 ? W : 0, read},
            {1, 1, c->select == EXPERT_CHOICE ? E : 0}, {1, 1, c->select == HASH && E ? c->vocab : 0}};
        // clang-format on
        for (int kind = 0; kind < LAYER_TENSORS; kind++)
            add_tensor(list, &count, l, kind, shapes[kind]);
    }
    R = moe ? R : 0;
    const int shapes[][3] = {
        {1, 1, C}, {1, c->untied ? c->vocab : 0, C}, {1, 3 * R, R}, {1, 3 * R, R}, {1, 1, 3 * R}, {1, 1, 3 * R}};
    for (int kind = NORM; kind < KINDS; kind++)
        add_tensor(list, &count, -1, kind, shapes[kind - NORM]);
    place_tensors(c, list, count, 1, &common);
    return count;
}

// All weights, and those that one token uses: the embedding once, as the output matrix; what a token passes several
// times (experts by its sub-tokens, the recurrent router in each layer) so often.
void count_parameters(const Config *c, double *total, double *active) {
    Tensor *list = (Tensor *)allocate((size_t)c->layers * LAYER_TENSORS + KINDS, sizeof(Tensor));
    int count = model_tensors(c, list), last, moe = moe_layers(c, &last);
    *total = *active = 0;
    for (int i = 0; i < count; i++) {
        const Tensor *t = &list[i];
        double uses = tensor_is_expert(t)   ? (double)c->topk / c->experts * c->subtokens
                      : t->kind == ROUTER ? c->subtokens
                      : t->kind >= GRU_X  ? moe
                                          : t->kind != HEAD;
        if (tensor_is_buffer(t))
            continue;
        *total += (double)t->whole;
        *active += (double)t->whole * uses;
    }
    free(list);
}

// Operations of a training step per token, a multiply-add counted as two: forward, and twice that backward. 6*L*T*C is
// attention: two products of (T,T) with (T,D), of which causality leaves half, three times.
double flops_per_token(const Config *c) {
    double total, active;
    count_parameters(c, &total, &active);
    return 6 * active + 6.0 * c->layers * c->seq * c->dim;
}

// What one layer keeps of its forward pass for its backward pass. n: N tokens, or N*h sub-tokens; c: C or C/h; R
// routers.
typedef struct LayerState {
    real *x;                     // (N,C): input
    // With --recompute all layers share what follows, and backward works it out anew:
    real *h1, *rstd1;            // (N,C), (N): norm of x
    real *qkv, *att, *lse;       // (N,(H+2KV)*D), (N,H*D), (B,H,T)
    real *mid, *h2, *rstd2;      // (N,C), (N,C), (N): after attention, its norm
    real *dense_hidden;          // (N, 2W) or (N, W)
    real *hidden;                // (n*K, 2F) or (n*K, F): the experts' first products
    // but not this:
    real *sub, *merged;          // (n,c): sub-tokens, and the experts' answers to them
    real *jittered;              // (n,c): the router's input in training, where it has jitter
    real *projected, *gru, *state; // (N,R), (N,4R), (N,R): of the recurrent router
    real *logits, *noisy;        // (n,W) or with noise (n,2W); (n,W)
    Gate gate, groups;           // the experts' gate; that of their groups where they are chosen first
    real *weight;                // (n,K) of each choice
    double *slope, *weight_slope; // (groups of tokens * R, E): of the balance losses by p; by the weights
    double *load_slope;          // (groups of tokens, E) and, behind them, (groups of tokens, D): of the smooth load
    Plan plan;
    double aux;                  // all balance losses, weighted
    struct Exchange *exchange;   // (2) what the other ranks' tokens are to this rank's experts
} LayerState;

typedef struct RouterStats { // of training, since the step began
    double *count;           // (E) choices
    double *lowest;          // (E) sum of the lowest scores that each expert took (expert choice)
    double entropy, dropped, active, tokens; // entropy of p in nats, summed over tokens; choices dropped, choices made
    double passes;           // sums in `lowest`
    double *recent;          // (E) load, averaged over about the last 50 steps
    int *idle;               // (E) steps since an expert had a token
} RouterStats;

typedef struct Room { // memory that grows with what arrives
    void *memory;
    size_t bytes;
} Room;

typedef struct Exchange { // half of the tokens of a layer: what was sent and what came
    int rows, came;                        // rows sent to all ranks of the group, received from all
    int *sent, *sent_at, *got, *got_at;    // (ep) rows sent to each, received from each, and where they begin
    int *token;                            // (rows) of this rank
    real *x, *weight, *hidden;             // (came,C), (came,K), and the experts' first products
    Plan plan;                             // of what came, for the experts here
    Room of_token, of_x, of_weight, of_hidden, of_plan;
} Exchange;

typedef struct Travel { // of half of a layer's tokens, while they are under way
    real *out, *in;               // (rows,C) there; (came,C) in backward
    real *choices_out, *choices;  // (rows,2K), (came,2K): weights, then the experts' numbers; -1: elsewhere
    real *answers, *back;         // (came,C), (rows,C)
    real *dweight, *dweight_back; // (came,K), (rows,K)
    Room of_out, of_in, of_choices_out, of_choices, of_answers, of_back, of_dweight, of_dweight_back;
    Request request[2];
    int requests;
} Travel;

typedef struct Placement { // of the experts of all layers on the ranks of a group
    int here, room;           // experts of this rank, and how many copies of others' it has room for
    int *host, *slot;         // (L,E) the rank with the second copy, -1: none, and its place among that rank's copies
    int *copy;                // (L,room) whose copies this rank has; -1: none
    int *width, *activation;  // (L,here+room)
} Placement;

// What memory is for. HARDLY_TOUCHED is room for the worst case (each token a group of its own); the system gives pages
// only to what is written, so print_memory leaves it out.
enum { FOR_WEIGHTS, FOR_GRADIENTS, FOR_MOMENTS, FOR_ACTIVATIONS, FOR_BUFFERS, HARDLY_TOUCHED, MEMORY_KINDS };

typedef struct Model {
    Config config;
    int max_tokens; // N that the buffers hold
    Tensor *tensors;
    int tensor_count;
    size_t size;     // numbers of all weights
    real *memory[4]; // weights, gradients, AdamW's two moments: (size) each, but of several ranks' moments see below
    // Of several ranks: all have the first `common` numbers and update slice..slice_end of them; moments are kept for
    // these and, behind them, for this rank's experts (ZeRO-1: Rajbhandari et al. 2020).
    size_t whole, common, slice, slice_end; // whole: numbers of all ranks
    real *whole_memory[4]; // what model_fetch has gathered
    struct Placement *placement; // of the experts
    struct Travel *travel;       // (2) rows on their way between ranks
    Room of_rows, of_act, of_dhidden; // the experts' scratch for what came
    int *rank_tokens;            // (ranks) tokens of the last forward pass
    int *came;                   // (L) rows that came to this rank's experts in it
    Weights weights, grads;
    int *expert_width, *expert_activation; // (E)
    LayerState *layers;            // (L)
    real *x, *h, *rstd;            // (N,C), (N,C), (N): last layer's output, its norm
    real *dx, *dh;                 // (N,C): gradients flowing back; dh also by the head, in forward
    real *dqkv, *datt;             // (N,(H+2KV)*D), (N,H*D)
    real *rows, *act, *dhidden;    // (n*K or N, C), (.., F or W), (.., 2F or 2W): the experts' scratch
    real *choice_score;            // (n,W): what decides, where it is not p
    real *dlogits, *dnoisy, *dp, *dgroups, *dweight, *dgate, *dgroup_weight; // of the gates
    real *drouter, *dsub, *dmerged; // (n,c): by the router's input, by sub-tokens, by the experts' answers
    real *dstate, *dprojected, *gru_room; // (N,R), (N,R), (N,6R); dstate also from the layer above
    double *counts;                // (groups of tokens * R, E)
    unsigned char *marks;          // (n*D)
    int *unbiased;                 // (n,K)
    real *logits, *nll;            // (head_rows,V), (N)
    real *partial, *attention, *angles; // norms' partial sums; attention's scratch; (seq, D/2, 2)
    int head_rows;
    int *order, *offset; // (N), (V+1): embedding's sort
    const int *tokens;   // of the last forward
    int B, T, mode;
    double grad_scale;
    uint64_t step, first_token; // of the last forward: they choose the random numbers
    int last_pass;              // it is the last one of its step
    double loss, total_aux, norm; // of the step: means over its passes so far, each times its grad_scale; of its gradients
    RouterStats *stats; // (L)
    size_t bytes[MEMORY_KINDS]; // of the allocations above, by what they are for
    int purpose;
    size_t passing, largest;    // numbers: activations that --recompute would not keep, of all layers and of one layer
    int at_hand;                // with --recompute: the layer whose activations are there
    void **owned;               // every allocation above, for model_free
    int owned_count;
    struct Model *one;  // a model of one token that shares the weights: generation
    real *cache;        // (L, seq, 2*KV*D): keys and values, position p at row p % seq
} Model;

enum { WEIGHTS, GRADS, MOMENT1, MOMENT2 };
// Training; evaluation: no chance, no capacity but eval-capacity-factor; and that with gradients, for whoever checks
// them.
enum { TRAIN_MODE, EVAL_MODE, CHECK_MODE };

// Zeroed memory that lives as long as the model, booked under m->purpose.
void *own(Model *m, size_t count, size_t size) {
    m->bytes[m->purpose] += count * size;
    if (m->owned_count % 64 == 0)
        m->owned = (void **)reallocate(m->owned, (size_t)m->owned_count + 64, sizeof(void *));
    return m->owned[m->owned_count++] = allocate(count, size);
}

real *own_reals(Model *m, size_t count) {
    return (real *)own(m, count, sizeof(real));
}

int halves_of(const Model *m) { // in which a batch travels
    return m->config.overlap ? 2 : 1;
}

// The table of weights, and how many numbers there are of what. list: room for the table; unit: see place_tensors
void lay_tensors(Model *m, Tensor *list, size_t unit) {
    const Config *c = &m->config;
    m->tensors = list;
    m->tensor_count = model_tensors(c, m->tensors);
    m->size = place_tensors(c, m->tensors, m->tensor_count, unit, &m->common);
    m->whole = m->tensors[m->tensor_count - 1].place + m->tensors[m->tensor_count - 1].whole;
    m->slice = m->common / (size_t)ranks.size * (size_t)ranks.rank;
    m->slice_end = m->slice + m->common / (size_t)ranks.size;
}

// Lays the struct of pointers over one allocation.
void point_weights(Model *m, Weights *w, real *memory) {
    w->layer = (LayerWeights *)own(m, m->config.layers, sizeof(LayerWeights));
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        real **pointers = t->layer >= 0 ? (real **)&w->layer[t->layer] : (real **)w - EMBED;
        pointers[t->kind] = memory + t->offset;
    }
    if (!w->head)
        w->head = w->embed;
}

// The weights of step 0. Their standard deviation: normal: 0.02, and 1/sqrt(2L) of it for what is added to the residual
// stream (Radford et al. 2019); truncated: sqrt(0.1/fan-in), nothing beyond two of them (Fedus et al. 2021). A noisy
// router begins at 0 (Shazeer et al. 2017). frequency (V) of each word in the training text, NULL: not known.
void model_init(Model *m, const double *frequency) {
    const Config *c = &m->config;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_INIT, (uint64_t)i, 0);
        real *w = m->memory[WEIGHTS] + t->offset;
        int residual = t->kind == PROJ || t->kind == W_OUT || t->kind == DENSE_OUT;
        int by_fan = t->kind == SPLIT || t->kind == MERGE || t->kind == GRU_X || t->kind == GRU_H;
        int truncated = c->init_scheme == TRUNCATED && t->kind != EMBED;
        double std = truncated  ? sqrt(0.1 / t->shape[2])
                     : by_fan   ? sqrt(0.5 / t->shape[2])
                     : residual ? 0.02 / sqrt(2.0 * c->layers)
                                : 0.02;
        if (tensor_is_vector(t) || tensor_is_buffer(t) || (t->kind == ROUTER && c->noise))
            std = 0;
#pragma omp parallel for
        for (size_t j = 0; j < t->size; j++) {
            double z = random_normal(stream, t->first + j);
            for (uint64_t again = 1; truncated && fabs(z) > 2; again++)
                z = random_normal(stream, t->first + j + again * t->whole);
            w[j] = (real)(std * z + tensor_is_norm(t));
        }
        size_t next = 0;
        for (int e = 0; c->mixed && tensor_is_expert(t) && e < c->experts; e++) { // from 0.5 to 1.5 times as large
            size_t first = next;
            next += expert_size(c, t->kind, e);
            for (size_t j = first; j < next; j++) {
                if (j >= t->first && j < t->first + t->size)
                    w[j - t->first] *= (real)(0.5 + (double)e / (c->experts - 1));
            }
        }
        if (t->kind == SLOW)
            memcpy(w, m->weights.layer[t->layer].router, t->size * sizeof(real));
        for (size_t e = 0; t->kind == LEVEL && e < t->size; e++)
            w[e] = (real)(1.0 / c->experts);
        if (t->kind == TABLE)
            balance_table(w, frequency, c->vocab, c->experts, stream);
    }
}

void rope_angles(real *angles, int first, int count, int D, double theta) {
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < D / 2; i++) {
            double angle = (first + t) * pow(theta, -2.0 * i / D);
            angles[(size_t)t * D + 2 * i] = (real)cos(angle);
            angles[(size_t)t * D + 2 * i + 1] = (real)sin(angle);
        }
    }
}

void own_gate(Model *m, Gate *g, int n, int per, int E, int K, int column) {
    Gate gate = {per, E, K, column, NULL, NULL, NULL, NULL};
    size_t rows = (size_t)n * per;
    gate.p = own_reals(m, rows * E);
    gate.lse = own_reals(m, rows);
    gate.weight = own_reals(m, rows * K);
    gate.expert = (int *)own(m, rows * K, sizeof(int));
    *g = gate;
}

// What the experts of one layer keep.
void allocate_experts(Model *m, int l, int N) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    int E = c->experts, K = places(c), R = c->routers, D = c->groups, W = router_width(c), n = N * c->subtokens,
        two = c->select == HIERARCHICAL;
    size_t nK = (size_t)n * K, C = (size_t)c->dim;
    own_gate(m, &s->gate, n, two ? D : R, two ? E / D : E, two ? K / c->group_topk : K / R, two ? D : 0);
    if (two)
        own_gate(m, &s->groups, n, 1, D, c->group_topk, 0);
    s->sub = c->subtokens > 1 ? own_reals(m, N * C) : NULL;
    s->merged = c->subtokens > 1 ? own_reals(m, N * C) : NULL;
    s->jittered = c->jitter > 0 ? own_reals(m, N * C) : NULL;
    s->projected = own_reals(m, (size_t)N * c->recurrent);
    s->gru = own_reals(m, (size_t)N * 4 * c->recurrent);
    s->state = own_reals(m, (size_t)N * c->recurrent);
    s->logits = own_reals(m, (size_t)n * W * (1 + c->noise));
    s->noisy = c->noise ? own_reals(m, (size_t)n * W) : s->logits;
    s->weight = two ? own_reals(m, nK) : s->gate.weight;
    size_t part = c->group == SEQUENCE ? (size_t)c->seq : (size_t)n; // tokens of a group: 1/part of this is touched
    m->bytes[FOR_ACTIVATIONS] += (size_t)n * ((size_t)(R + 2) * E + D) * sizeof(double) / part;
    m->purpose = HARDLY_TOUCHED;
    s->slope = (double *)own(m, (size_t)n * R * E, sizeof(double));
    s->weight_slope = (double *)own(m, (size_t)n * E, sizeof(double));
    s->load_slope = (double *)own(m, (size_t)n * (E + D), sizeof(double));
    m->purpose = FOR_ACTIVATIONS;
    int *ints = (int *)own(m, nK * 5 + E + 1, sizeof(int));
    Plan plan = {
        n, E, K, two ? ints : s->gate.expert, ints + nK, ints + nK * 2, ints + nK * 3, ints + nK * 4, ints + nK * 5, 0};
    s->plan = plan;
    s->exchange = (Exchange *)own(m, ranks.ep > 1 ? 2 : 0, sizeof(Exchange));
    for (int half = 0; half < 2 && ranks.ep > 1; half++) {
        Exchange *ex = &s->exchange[half];
        ex->sent = (int *)own(m, (size_t)ranks.ep * 4, sizeof(int));
        ex->sent_at = ex->sent + ranks.ep;
        ex->got = ex->sent_at + ranks.ep;
        ex->got_at = ex->got + ranks.ep;
    }
    if (ranks.ep > 1) // what comes with an even load
        m->bytes[FOR_ACTIVATIONS] += ((size_t)n * min_int(K, ranks.ep) * (C / c->subtokens + K) +
                                      nK * (size_t)c->ffn * (1 + is_gated(c->activation))) * sizeof(real);
    RouterStats *stats = &m->stats[l];
    stats->count = (double *)own(m, (size_t)E * 3, sizeof(double));
    stats->lowest = stats->count + E;
    stats->recent = stats->count + 2 * E;
    stats->idle = (int *)own(m, E, sizeof(int));
}

// Points to what --recompute shares of a layer's activations, one after another in `memory`; returns their numbers.
size_t place_activations(Model *m, int l, int N, real *memory) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    size_t C = (size_t)c->dim, used = 0, rows = is_moe(c, l) && ranks.ep == 1 ? (size_t)N * c->subtokens * places(c) : 0;
    size_t Q = C + 2 * C / c->heads * c->kv_heads, dense = (size_t)dense_width(c, l), hidden = 0;
    for (int e = 0; e < c->experts; e++)
        hidden = (size_t)max_int((int)hidden, m->expert_width[e] * (1 + is_gated(m->expert_activation[e])));
    const struct {
        real **to;
        size_t size;
    } list[] = {{&s->h1, N * C}, {&s->rstd1, (size_t)N}, {&s->qkv, N * Q}, {&s->att, N * C}, {&s->lse, (size_t)N * c->heads},
                {&s->mid, N * C}, {&s->h2, N * C}, {&s->rstd2, (size_t)N},
                {&s->dense_hidden, N * dense * (1 + is_gated(dense_activation(c, l)))}, {&s->hidden, rows * hidden}};
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        *list[i].to = memory ? memory + used : NULL;
        used += (list[i].size + 15) / 16 * 16;
    }
    return used;
}

// The widths of the experts that this rank has in layer l, copies included.
void place_experts(Model *m, int l) {
    Placement *p = m->placement;
    const Config *c = &m->config;
    for (int i = 0; i < p->here + p->room; i++) {
        int e = i < p->here ? ranks.place * p->here + i : p->copy[l * p->room + i - p->here];
        p->width[l * (p->here + p->room) + i] = e < 0 ? 0 : expert_width(c, e);
        p->activation[l * (p->here + p->room) + i] = e < 0 ? c->activation : expert_activation(c, e);
    }
}

void own_placement(Model *m) {
    const Config *c = &m->config;
    Placement *p = m->placement = (Placement *)own(m, 1, sizeof(Placement));
    p->here = c->experts / ranks.ep;
    p->room = ranks.ep > 1 ? c->replicate : 0;
    size_t all = (size_t)c->layers * c->experts, mine = (size_t)c->layers * (p->here + p->room);
    p->host = (int *)own(m, 2 * all, sizeof(int));
    p->slot = p->host + all;
    p->copy = (int *)own(m, (size_t)c->layers * p->room, sizeof(int));
    p->width = (int *)own(m, 2 * mine, sizeof(int));
    p->activation = p->width + mine;
    memset(p->host, -1, all * sizeof(int));
    memset(p->copy, -1, (size_t)c->layers * p->room * sizeof(int));
    for (int l = 0; l < c->layers; l++)
        place_experts(m, l);
}

// Where the moments of the weight at this offset are.
size_t moment_place(const Model *m, size_t offset) {
    return !MANY ? offset : offset < m->common ? offset - m->slice : offset - m->common + m->slice_end - m->slice;
}

// Buffers for N tokens. train 0: no gradients, no moments. weights: those of another model, or NULL for its own.
Model *model_allocate(const Config *config, int N, int train, real *weights) {
    Model *m = (Model *)allocate(1, sizeof(Model));
    const Config *c = &m->config;
    m->config = *config;
    m->max_tokens = N;
    int L = c->layers, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, E = c->experts, R = c->recurrent, last,
        Q = (H + 2 * KV) * D;
    int n = N * c->subtokens, W = router_width(c);
    size_t moe = moe_layers(c, &last) > 0, rows = N, width = 0, hidden = 0, nK = moe * n * places(c);
    size_t two = c->select == HIERARCHICAL ? 1 : 0, scores = moe * n * W;
    lay_tensors(m, (Tensor *)own(m, (size_t)L * LAYER_TENSORS + KINDS, sizeof(Tensor)), 1);
    m->came = (int *)own(m, L, sizeof(int));
    m->rank_tokens = (int *)own(m, ranks.size, sizeof(int));
    m->memory[WEIGHTS] = weights ? weights : own_reals(m, m->size);
    point_weights(m, &m->weights, m->memory[WEIGHTS]);
    m->purpose = FOR_ACTIVATIONS;
    m->expert_width = (int *)own(m, (size_t)2 * E, sizeof(int));
    m->expert_activation = m->expert_width + E;
    for (int e = 0; e < E; e++) {
        m->expert_width[e] = expert_width(c, e);
        m->expert_activation[e] = expert_activation(c, e);
    }
    m->layers = (LayerState *)own(m, L, sizeof(LayerState));
    m->stats = (RouterStats *)own(m, L, sizeof(RouterStats));
    for (int l = 0; l < L; l++) {
        size_t size = place_activations(m, l, N, NULL);
        m->passing += size;
        m->largest = size > m->largest ? size : m->largest;
    }
    real *shared = c->recompute ? own_reals(m, m->largest) : NULL;
    for (int l = 0; l < L; l++) {
        size_t dense = (size_t)N * dense_width(c, l), gated = 1 + is_gated(dense_activation(c, l));
        m->layers[l].x = own_reals(m, (size_t)N * C);
        place_activations(m, l, N, shared ? shared : own_reals(m, place_activations(m, l, N, NULL)));
        if (is_moe(c, l))
            allocate_experts(m, l, N);
        width = dense > width ? dense : width;
        hidden = dense * gated > hidden ? dense * gated : hidden;
    }
    if (ranks.ep > 1 && moe) {
        m->travel = (Travel *)own(m, 2, sizeof(Travel));
        own_placement(m);
        // With an even load, and a quarter more (room_for): rows under way, four times; the experts' scratch of a half.
        size_t row = (size_t)(C / c->subtokens), moving = (size_t)n * min_int(places(c), ranks.ep), slots = nK / halves_of(m);
        size_t scratch = row + (size_t)c->ffn * (1 + 2 * is_gated(c->activation));
        m->bytes[FOR_BUFFERS] += (moving * 4 * row + slots * scratch) * sizeof(real) / 4 * 5;
    }
    for (int e = 0; moe && e < E && ranks.ep == 1; e++) {
        size_t act = nK * m->expert_width[e], both = act * (1 + is_gated(m->expert_activation[e]));
        width = act > width ? act : width;
        hidden = both > hidden ? both : hidden;
    }
    rows = nK > rows ? nK : rows;
    m->x = own_reals(m, (size_t)N * C);
    m->h = own_reals(m, (size_t)N * C);
    m->rstd = own_reals(m, N);
    m->purpose = FOR_BUFFERS;
    m->rows = own_reals(m, ranks.ep == 1 ? rows * C * moe : 0);
    m->act = own_reals(m, width);
    m->choice_score = own_reals(m, scores);
    m->unbiased = (int *)own(m, nK, sizeof(int));
    m->gru_room = own_reals(m, moe * N * 6 * R);
    m->head_rows = max_int(1, min_int(N, (1 << 24) / c->vocab)); // 64 MiB of float logits at most
    m->logits = own_reals(m, (size_t)m->head_rows * c->vocab);
    m->nll = own_reals(m, N);
    m->attention = own_reals(m, attention_room(c->seq, D) * (size_t)thread_count());
    m->angles = own_reals(m, (size_t)c->seq * D);
    rope_angles(m->angles, 0, c->seq, D, c->rope_theta);
    m->order = (int *)own(m, N, sizeof(int));
    m->offset = (int *)own(m, (size_t)c->vocab + 2, sizeof(int));
    m->purpose = HARDLY_TOUCHED;
    m->counts = (double *)own(m, moe * n * c->routers * E, sizeof(double));
    m->marks = (unsigned char *)own(m, moe * n * c->groups, 1);
    if (train) {
        for (int i = GRADS; i <= MOMENT2; i++) {
            m->purpose = i == GRADS ? FOR_GRADIENTS : FOR_MOMENTS;
            m->memory[i] = own_reals(m, i == GRADS || !MANY ? m->size : moment_place(m, m->size));
        }
        point_weights(m, &m->grads, m->memory[GRADS]);
        m->purpose = FOR_BUFFERS;
        m->dx = own_reals(m, (size_t)N * C);
        m->dh = own_reals(m, (size_t)N * C);
        m->datt = own_reals(m, (size_t)N * C);
        m->dqkv = own_reals(m, (size_t)N * Q);
        m->dhidden = own_reals(m, hidden);
        m->dlogits = own_reals(m, scores * (1 + c->noise));
        m->dnoisy = own_reals(m, c->noise ? scores : 0);
        m->dp = own_reals(m, scores);
        m->dgroups = own_reals(m, two * n * c->groups);
        m->dweight = own_reals(m, nK);
        m->dgate = own_reals(m, two * nK * c->groups);
        m->dgroup_weight = own_reals(m, two * nK);
        m->drouter = own_reals(m, c->jitter > 0 ? (size_t)N * C : 0);
        m->dsub = own_reals(m, c->subtokens > 1 ? (size_t)N * C : 0);
        m->dmerged = own_reals(m, c->subtokens > 1 ? (size_t)N * C : 0);
        m->dstate = own_reals(m, moe * N * R * 2);
        m->dprojected = own_reals(m, moe * N * R);
        m->partial = own_reals(m, (size_t)div_up(N, CHUNK) * C);
    }
    return m;
}

void free_rooms(Room *list, int count) {
    for (int i = 0; i < count; i++)
        free(list[i].memory);
}

void model_free(Model *m) {
    if (m->one)
        model_free(m->one);
    for (int half = 0; half < 2 && m->travel; half++) {
        free_rooms(&m->travel[half].of_out, 8);
        for (int l = 0; l < m->config.layers; l++) {
            if (m->layers[l].exchange)
                free_rooms(&m->layers[l].exchange[half].of_token, 5);
        }
    }
    free_rooms(&m->of_rows, 3);
    for (int what = 0; what < 4; what++)
        free(m->whole_memory[what]);
    for (int i = 0; i < m->owned_count; i++)
        free(m->owned[i]);
    free(m->owned);
    free(m);
}

// The tokens of a group of tokens, of n in sequences of T.
int group_size(const Config *c, int n, int T) {
    return c->group == SEQUENCE ? T : n;
}

// Whether other ranks have tokens of the same group.
int is_spread(const Config *c) {
    return MANY && c->group != SEQUENCE;
}

// The tokens of a group of tokens, on all ranks together, of n on this one.
int whole_group_size(const Model *m, int n, int T) {
    int total = 0;
    if (!is_spread(&m->config))
        return group_size(&m->config, n, T);
    for (int r = 0; r < ranks.size; r++)
        total += m->rank_tokens[r] * m->config.subtokens;
    return total;
}

// All tokens' rows of the group, in order, where the group is spread over ranks: each token's `width` things of `size`
// bytes; to be freed. *first: how many tokens come before this rank's.
void *gather_tokens(const Model *m, const void *mine, int width, size_t size, int *first) {
    *first = 0;
    for (int r = 0; r < ranks.rank; r++)
        *first += m->rank_tokens[r] * m->config.subtokens;
    return gather_rows(mine, m->rank_tokens, (size_t)(width * m->config.subtokens) * size);
}

// The layer of experts below l, NULL where there is none: where the recurrent router comes from.
LayerState *experts_below(Model *m, int l) {
    while (--l >= 0 && !is_moe(&m->config, l))
        ;
    return l < 0 ? NULL : &m->layers[l];
}

uint64_t layer_stream(const Model *m, int purpose, int l) {
    return random_stream((uint64_t)m->config.seed, purpose, m->step, (uint64_t)l);
}

// Which experts each token gets: fills plan->expert, and the weights.
void choose(Model *m, int l, LayerState *s, const real *router_in, int n, int group_tokens) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int rows = n * g->per, E = c->experts, W = router_width(c), C = c->recurrent ? c->recurrent : c->dim / c->subtokens;
    const real *score = g->p;
    if (w->slow) { // highest logits are highest scores
        product(m->choice_score, along_rows(router_in, C, NULL), along_rows(w->slow, C, NULL), n, W, C, 0);
        score = m->choice_score;
    } else if (w->bias || (c->select == TOP_K && c->group_topk)) {
        for (size_t i = 0; i < (size_t)n * E; i++)
            m->choice_score[i] = g->p[i] + (w->bias ? w->bias[i % E] : 0);
        score = m->choice_score;
    }
    if (c->select == TOP_K && c->group_topk)
        mask_groups(m->choice_score, n, E, c->groups, c->group_topk, c->group_score);
    if ((c->select == EXPERT_CHOICE || c->select == BALANCED) && m->mode == TRAIN_MODE) {
        int take = max_int(1, (int)((double)group_tokens * c->topk / E)), K = g->K, all = n, mine = 0;
        const real *by = c->select == BALANCED ? s->logits : g->p;
        real *gathered = NULL;
        int *expert = g->expert;
        if (is_spread(c)) { // each rank chooses for all
            by = gathered = (real *)gather_tokens(m, by, E, sizeof(real), &mine);
            all = group_tokens;
            expert = (int *)allocate((size_t)all * K, sizeof(int));
        }
        for (int first = 0; first < all; first += group_tokens) {
            if (c->select == BALANCED) {
                select_balanced(expert + first, by + (size_t)first * E, group_tokens, E);
                continue;
            }
            select_by_experts(expert + (size_t)first * E, m->stats[l].lowest, by + (size_t)first * E, group_tokens, E, take);
            m->stats[l].passes += 1;
        }
        if (gathered) {
            memcpy(g->expert, expert + (size_t)mine * K, (size_t)n * K * sizeof(int));
            free(expert);
            free(gathered);
        }
    } else {
        select_topk(g->expert, score, rows, g->E, g->K);
    }
    if (c->select == THRESHOLD || (c->select == EXPERT_CHOICE && m->mode != TRAIN_MODE))
        select_above(g->expert, g->p, n, E, g->K, w->level, c->threshold > 0 ? c->threshold : 1.0 / E,
                     c->select == THRESHOLD);
    gate_forward(g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (c->select == HIERARCHICAL) {
        select_topk(s->groups.expert, s->groups.p, n, c->groups, c->group_topk);
        gate_forward(s->groups.weight, s->groups.p, s->groups.expert, n, c->groups, c->group_topk, c->gate, 1);
        join_gates_forward(plan->expert, s->weight, &s->groups, g, n);
    }
}

// m->marks (n,D): which groups of experts each token chose; all where groups are not chosen first.
void mark_groups(Model *m, const LayerState *s, int n) {
    const Config *c = &m->config;
    int D = c->groups, M = c->group_topk, two = c->select == HIERARCHICAL;
    memset(m->marks, !two, (size_t)n * D);
    for (int i = 0; two && i < n * M; i++)
        m->marks[i / M * D + s->groups.expert[i]] = 1;
}

// The losses of the smooth load, 1 + CV^2 for each group of tokens, and their slopes. Where groups of experts are
// chosen first, an expert's load is that of its group times its share of the tokens sent there (Shazeer et al. 2017,
// appendix B).
double load_losses(Model *m, LayerState *s, int n, int group_tokens) { // group_tokens: of this rank
    const Config *c = &m->config;
    int E = c->experts, D = c->groups, two = c->select == HIERARCHICAL, W = router_width(c);
    double loss = 0, weight = c->load_weight * group_tokens / n;
    double *inner = (double *)allocate((size_t)2 * (E + D), sizeof(double)), *load = inner + E, *outer = load + E,
           *sent = outer + D;
    mark_groups(m, s, n);
    for (int first = 0; first < n; first += group_tokens) {
        double *slope = s->load_slope + (size_t)(first / group_tokens) * (E + D);
        memset(inner, 0, (size_t)2 * (E + D) * sizeof(double));
        smooth_load(inner, NULL, NULL, NULL, &s->gate, s->noisy, s->logits, W, first, group_tokens, m->marks);
        if (two)
            smooth_load(outer, NULL, NULL, NULL, &s->groups, s->noisy, s->logits, W, first, group_tokens, NULL);
        for (int i = first * D; two && i < (first + group_tokens) * D; i++)
            sent[i % D] += m->marks[i];
        if (is_spread(c))
            sum_over_ranks(inner, 2 * (E + D));
        for (int e = 0; e < E; e++) {
            int d = group_of(e, E, D);
            load[e] = !two ? inner[e] : sent[d] > 0 ? outer[d] * inner[e] / sent[d] : 0;
        }
        loss += weight * cv_squared(load, slope, E, 0, weight);
        memset(slope + E, 0, (size_t)D * sizeof(double));
        for (int e = 0; two && e < E; e++) {
            int d = group_of(e, E, D);
            slope[E + d] += sent[d] > 0 ? slope[e] * inner[e] / sent[d] : 0;
            slope[e] *= sent[d] > 0 ? outer[d] / sent[d] : 0;
        }
        for (int i = 0; is_spread(c) && i < E + D; i++) // gradients are averaged over ranks, this is a slope of a sum
            slope[i] *= ranks.size;
    }
    free(inner);
    return loss;
}

// All balance losses of a layer, weighted, into s->aux, and their slopes.
void balance_losses(Model *m, int l, LayerState *s, int n, int group_tokens, int whole_group) {
    const Config *c = &m->config;
    Gate *g = &s->gate;
    const Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, R = c->routers, rows = n * R, groups = n / group_tokens,
        group_rows = group_tokens * R;
    double *counts = m->counts;
    s->aux = 0;
    memset(s->weight_slope, 0, (size_t)groups * E * sizeof(double));
    for (int row = 0; c->z_weight > 0 && row < n * g->per; row++)
        s->aux += c->z_weight * (double)g->lse[row] * (double)g->lse[row] / (n * g->per);
    for (int i = 0; c->sparsity_weight > 0 && i < n * K; i++)
        s->aux += plan->expert[i] >= 0 ? c->sparsity_weight / n / E : 0;
    if (c->load_weight > 0)
        s->aux += load_losses(m, s, n, group_tokens);
    if (c->balance == CV2 || c->balance == VARIANCE) { // of the weights given to each expert
        memset(counts, 0, (size_t)groups * E * sizeof(double));
        double mean = c->balance == VARIANCE ? (double)whole_group / E : 0, weight = c->aux_weight / groups;
        for (int i = 0; i < n * K; i++) {
            if (plan->expert[i] >= 0)
                counts[(size_t)(i / K / group_tokens) * E + plan->expert[i]] += (double)s->weight[i];
        }
        if (is_spread(c))
            sum_over_ranks(counts, E);
        for (int i = 0; i < groups && c->aux_weight > 0; i++)
            s->aux += weight * cv_squared(counts + (size_t)i * E, s->weight_slope + (size_t)i * E, E, mean, weight);
        for (int e = 0; is_spread(c) && e < E; e++) // as in load_losses
            s->weight_slope[e] *= ranks.size;
        if (c->select == HIERARCHICAL)
            return;
    }
    if (c->balance == UNBIASED)
        select_topk(m->unbiased, g->p, n, E, K);
    count_choices(counts, c->balance == UNBIASED ? m->unbiased : plan->key, rows, E, K / R, c->balance == GSHARD ? 1 : K / R, group_rows, R);
    if (c->group == STEP && m->mode == TRAIN_MODE) // all micro-steps so far (Qiu et al. 2025, Demons in the Detail)
        memcpy(counts, m->stats[l].count, (size_t)E * sizeof(double));
    if (is_spread(c))
        sum_over_ranks(counts, R * E);
    memset(s->slope, 0, (size_t)groups * R * E * sizeof(double));
    for (int i = 0; i < groups * R; i++) {
        double *slope = s->slope + (size_t)i * E, *count = counts + (size_t)i * E;
        if (c->balance <= WIDTH && c->aux_weight > 0)
            add_balance(slope, count, c->balance == WIDTH ? m->expert_width : NULL, E, c->aux_weight);
        if (c->device_weight > 0)
            add_device_balance(slope, count, E, c->groups, c->device_weight);
        if (c->comm_weight > 0)
            add_communication_balance(slope, plan->key + (size_t)i * group_tokens * K, group_tokens, E, K, c->groups,
                                      c->group_topk, c->comm_weight, whole_group, is_spread(c));
    }
    s->aux += balance_forward(g, s->slope, rows, group_rows, c->score);
}

// What the log shows of a layer's routing in training, and what some recipes steer by.
void add_router_stats(Model *m, int l, LayerState *s) {
    const Config *c = &m->config;
    RouterStats *stats = &m->stats[l];
    const Gate *g = &s->gate;
    int n = s->plan.N, choices = n * s->plan.K;
    for (int i = 0; i < choices; i++) {
        if (s->plan.key[i] >= 0) {
            stats->count[s->plan.key[i]] += 1;
            stats->active += 1;
        }
    }
    stats->tokens += n;
    int rows = c->select == HASH ? 0 : n * g->per, chunks = div_up(rows, CHUNK);
    double *part = (double *)allocate(chunks, sizeof(double));
#pragma omp parallel for
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int row = chunk * CHUNK; row < min_int(rows, (chunk + 1) * CHUNK); row++) {
            double share = c->select == HIERARCHICAL ? (double)s->groups.p[row] : 1.0 / g->per, sum = 0;
            for (int e = 0; c->score == SIGMOID && e < g->E; e++)
                sum += (double)g->p[(size_t)row * g->E + e];
            for (int e = 0; e < g->E; e++) {
                double p = (double)g->p[(size_t)row * g->E + e] / (c->score == SIGMOID ? sum : 1);
                part[chunk] -= p > 0 ? share * p * log(c->select == HIERARCHICAL ? p * share : p) : 0;
            }
        }
    }
    for (int chunk = 0; chunk < chunks; chunk++)
        stats->entropy += part[chunk];
    free(part);
}

// plan_capacity, where the group is spread over ranks: each rank does it for all and keeps what is its own.
void plan_whole_capacity(const Model *m, Plan *plan, int group_tokens, double factor, int units, int order,
                         const real *weight, const unsigned char *exempt, const real *p) {
    int K = plan->K, first;
    size_t mine = (size_t)plan->N * K;
    Plan all = *plan;
    all.N = group_tokens;
    all.key = (int *)gather_tokens(m, plan->key, K, sizeof(int), &first);
    all.expert = p ? (int *)gather_tokens(m, plan->expert, K, sizeof(int), &first) : NULL;
    real *weights = order == BY_SCORE ? (real *)gather_tokens(m, weight, K, sizeof(real), &first) : NULL;
    real *scores = p ? (real *)gather_tokens(m, p, plan->E, sizeof(real), &first) : NULL;
    unsigned char *marks = exempt ? (unsigned char *)gather_tokens(m, exempt, 1, 1, &first) : NULL;
    plan_capacity(&all, group_tokens, factor, units, order, weights, marks, scores);
    plan->dropped = 0;
    for (size_t i = 0; i < mine; i++)
        plan->dropped += plan->key[i] >= 0 && all.key[(size_t)first * K + i] < 0;
    memcpy(plan->key, all.key + (size_t)first * K, mine * sizeof(int));
    if (p)
        memcpy(plan->expert, all.expert + (size_t)first * K, mine * sizeof(int));
    free(all.key), free(all.expert), free(weights), free(scores), free(marks);
}

// Routes n tokens x (n,C) in sequences of T: fills s->plan, s->weight and the balance losses.
void router_forward(Model *m, int l, LayerState *s, const real *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    Plan *plan = &s->plan;
    int train = m->mode == TRAIN_MODE, W = router_width(c), R = c->recurrent, group_tokens = group_size(c, n, T),
        whole_group = whole_group_size(m, n, T);
    uint64_t first = m->first_token * (uint64_t)c->subtokens;
    plan->N = n;
    if (c->select == HASH) {
        for (int i = 0; i < n; i++) {
            plan->expert[i] = (int)w->table[m->tokens[i]];
            s->weight[i] = (real)c->scale;
        }
    } else {
        if (train && c->jitter > 0) {
            apply_jitter(s->jittered, x, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l), first * C);
            x = s->jittered;
        }
        if (R) {
            LayerState *below = experts_below(m, l);
            product(s->projected, along_rows(x, C, NULL), along_rows(w->project, C, NULL), n, R, C, 0);
            gru_forward(s->state, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x, m->weights.gru_h,
                        m->weights.gru_bx, m->weights.gru_bh, n, R, m->gru_room);
            x = s->state;
            C = R;
        }
        product(s->logits, along_rows(x, C, NULL), along_rows(w->router, C, NULL), n, W * (1 + c->noise), C, 0);
        if (c->noise)
            noise_forward(s->noisy, s->logits, n, W, train, layer_stream(m, RANDOM_NOISE, l), first);
        scores_forward(&s->gate, s->noisy, n, W, c->score);
        if (c->select == HIERARCHICAL)
            scores_forward(&s->groups, s->noisy, n, W, c->score);
        choose(m, l, s, x, n, whole_group);
    }
    memcpy(plan->key, plan->expert, (size_t)n * plan->K * sizeof(int));
    if (train && c->second_threshold > 0)
        decline_second(plan->key, s->weight, n, c->second_threshold, c->scale, layer_stream(m, RANDOM_SECOND, l),
                       first);
    if (train)
        add_router_stats(m, l, s);
    if (m->mode != EVAL_MODE && c->select != HASH)
        balance_losses(m, l, s, n, group_tokens, whole_group);
    if (train) {
        for (int i = 0; i < n && c->drop_exempt > 0; i++)
            m->marks[i] = random_uniform(random_stream((uint64_t)c->seed, RANDOM_EXEMPT, m->step, 0), (first + i) / T) <
                          c->drop_exempt;
    }
    double factor = train ? c->capacity_factor : c->eval_capacity_factor;
    int units = c->capacity_unit == EXPERT_GROUP ? c->groups : c->experts, order = train ? c->drop_order : BY_TOKEN;
    const unsigned char *exempt = train && c->drop_exempt > 0 ? m->marks : NULL;
    const real *p = c->overflow == NEXT ? s->gate.p : NULL;
    if (is_spread(c) && factor > 0)
        plan_whole_capacity(m, plan, whole_group, factor * c->topk / plan->K, units, order, s->weight, exempt, p);
    else
        plan_capacity(plan, group_tokens, factor * c->topk / plan->K, units, order, s->weight, exempt, p);
    if (c->overflow == NEXT)
        gate_forward(s->weight, s->gate.p, plan->expert, n, plan->E, plan->K, c->gate, c->scale);
    m->stats[l].dropped += train ? plan->dropped : 0;
    plan_sort(plan);
}

// Given m->dweight, the gradient by each choice's weight, adds to dx (n,C) and to the router's gradients.
void router_backward(Model *m, int l, LayerState *s, real *dx, const real *x, int n, int C, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    Gate *g = &s->gate;
    Plan *plan = &s->plan;
    int E = c->experts, K = plan->K, W = router_width(c), WW = W * (1 + c->noise), R = c->recurrent,
        group_tokens = group_size(c, n, T), rows = n * g->per;
    int two = c->select == HIERARCHICAL;
    double scale = m->grad_scale;
    uint64_t first = m->first_token * (uint64_t)c->subtokens;
    if (c->select == HASH)
        return;
    real *dlogits = m->dlogits, *dnoisy = c->noise ? m->dnoisy : dlogits; // by the logits, by the noisy ones
    memset(dlogits, 0, (size_t)n * WW * sizeof(real));
    memset(dnoisy, 0, (size_t)n * W * sizeof(real));
    memset(m->dp, 0, (size_t)n * W * sizeof(real));
    for (int i = 0; i < n * K; i++) { // importance
        if (plan->expert[i] >= 0)
            m->dweight[i] += (real)(scale * s->weight_slope[(size_t)(i / K / group_tokens) * E + plan->expert[i]]);
    }
    const real *dgate = m->dweight;
    if (two) {
        join_gates_backward(m->dgroup_weight, m->dgate, m->dweight, &s->groups, g, n);
        memset(m->dgroups, 0, (size_t)n * c->groups * sizeof(real));
        gate_backward(m->dgroups, m->dgroup_weight, s->groups.weight, s->groups.p, s->groups.expert, n, c->groups,
                      c->group_topk, c->gate, 1);
        scores_backward(dnoisy, m->dgroups, &s->groups, n, W, c->score, 0);
        dgate = m->dgate;
    }
    gate_backward(m->dp, dgate, g->weight, g->p, g->expert, rows, g->E, g->K, c->gate, c->scale / c->routers);
    if (!two)
        balance_backward(m->dp, g, s->slope, rows, group_tokens * c->routers, c->score, scale);
    scores_backward(dnoisy, m->dp, g, n, W, c->score, c->z_weight * scale / rows);
    mark_groups(m, s, n);
    for (int from = 0; c->load_weight > 0 && from < n; from += group_tokens) {
        double *slope = s->load_slope + (size_t)(from / group_tokens) * (E + c->groups);
        for (int e = 0; e < E + c->groups; e++)
            slope[e] *= scale;
        smooth_load(NULL, slope, dnoisy, dlogits, g, s->noisy, s->logits, W, from, group_tokens, m->marks);
        if (two)
            smooth_load(NULL, slope + E, dnoisy, dlogits, &s->groups, s->noisy, s->logits, W, from, group_tokens, NULL);
    }
    if (c->noise)
        noise_backward(dlogits, dnoisy, s->logits, n, W, m->mode == TRAIN_MODE, layer_stream(m, RANDOM_NOISE, l),
                       first);

    // from the logits back to the router's input
    int jitter = m->mode == TRAIN_MODE && c->jitter > 0;
    const real *input = jitter ? s->jittered : x, *read = R ? s->state : input;
    int width = R ? R : C;
    real *target = jitter ? m->drouter : dx;
    product(dw->router, along_columns(dlogits, WW, NULL), along_columns(read, width, NULL), WW, width, n, 1);
    if (R) {
        LayerState *below = experts_below(m, l);
        int last;
        moe_layers(c, &last);
        product(m->dstate, along_rows(dlogits, WW, NULL), along_columns(w->router, R, NULL), n, R, WW, l != last);
        memcpy(m->dstate + (size_t)n * R, m->dstate, (size_t)n * R * sizeof(real));
        gru_backward(m->dprojected, m->dstate, m->grads.gru_x, m->grads.gru_h, m->grads.gru_bx, m->grads.gru_bh,
                     m->dstate + (size_t)n * R, s->gru, s->projected, below ? below->state : NULL, m->weights.gru_x,
                     m->weights.gru_h, n, R, m->gru_room);
        product(dw->project, along_columns(m->dprojected, R, NULL), along_columns(input, C, NULL), R, C, n, 1);
        product(target, along_rows(m->dprojected, R, NULL), along_columns(w->project, C, NULL), n, C, R, target == dx);
    } else {
        product(target, along_rows(dlogits, WW, NULL), along_columns(w->router, C, NULL), n, C, WW, target == dx);
    }
    if (jitter) { // d(x * j)/dx = the same j
        apply_jitter(m->drouter, m->drouter, (size_t)n * C, c->jitter, layer_stream(m, RANDOM_JITTER, l), first * C);
        for (size_t i = 0; i < (size_t)n * C; i++)
            dx[i] += m->drouter[i];
    }
}

// ---- experts on several ranks
//
// A token's row is sent once to each rank that has some of its experts, with their numbers and weights. There it is a
// token like any other: the rank sorts what it has received by expert, lets its experts answer, adds each row's answers
// up and sends one row back. Where --ep divides the number of groups of experts, each of these lies whole on a rank, so
// a router that is held to M groups sends a row to M ranks at most. The tokens go in two halves, so that one can travel
// while the other is worked on.

void *room_for(Room *r, size_t count, size_t size) { // what was in it is lost when it grows
    if (count * size > r->bytes || !r->memory) {
        free(r->memory);
        r->bytes = count * size / 4 * 5;
        r->memory = allocate(r->bytes, 1);
    }
    return r->memory;
}

real *reals_for(Room *r, size_t count) {
    return (real *)room_for(r, count, sizeof(real));
}

// The rank of the group to which token n of the rank at `place` goes for expert e, and the expert's number there. Of two
// copies the one here is best; else even tokens go to one, odd ones to the other. here: experts of a rank; host, slot (E)
BOTH int rank_of_expert(const int *host, const int *slot, int here, int place, int e, int n, int *number) {
    int owner = e / here, there = host[e] >= 0 && owner != place && (host[e] == place || n % 2) ? host[e] : owner;
    *number = there == owner ? e - owner * here : here + slot[e];
    return there;
}

int expert_rank(const Model *m, int l, int e, int n, int *number) { // of layer l, for a token of this rank
    const Placement *p = m->placement;
    int first = l * m->config.experts;
    return rank_of_expert(p->host + first, p->slot + first, p->here, ranks.place, e, n, number);
}

// Sends row after row of `bytes` to the ranks of the group, and receives such.
void send_rows(Travel *t, const void *out, const int *sent, const int *sent_at, void *in, const int *got,
               const int *got_at, size_t bytes) {
    for (int r = 0; r < ranks.ep; r++)
        ranks.traffic.sent += r == ranks.place ? 0 : (double)bytes * sent[r];
    start_all_to_all(out, sent, sent_at, in, got, got_at, bytes, &t->request[t->requests++]);
}

void await_rows(Travel *t) {
    ranks_wait(t->request, t->requests);
    t->requests = 0;
}

// from (N,C) by token: packs the rows that go, and sends them.
void send_tokens(Exchange *ex, Travel *t, const real *from, real *in, int C) {
    t->out = reals_for(&t->of_out, (size_t)ex->rows * C);
#pragma omp parallel for if (ex->rows > 16)
    for (int r = 0; r < ex->rows; r++)
        memcpy(t->out + (size_t)r * C, from + (size_t)ex->token[r] * C, (size_t)C * sizeof(real));
    send_rows(t, t->out, ex->sent, ex->sent_at, in, ex->got, ex->got_at, (size_t)C * sizeof(real));
}

// Sends each of the n tokens x (n,C) to the ranks that have its experts.
void exchange_start(Model *m, int l, LayerState *s, const real *x, int n, int C) {
    const Plan *plan = &s->plan;
    int K = plan->K, ep = ranks.ep, halves = halves_of(m), number;
    int *sending = (int *)allocate((size_t)ep * 6, sizeof(int)), *arriving = sending + 2 * ep; // (ep,2): rows of each half
    int *next = sending + 4 * ep, *row = sending + 5 * ep; // (ep): the next row for each rank, and this token's
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        for (int filling = 0; filling < 2; filling++) { // count the rows, then write them down
            for (int i = (int)((long)n * half / halves); i < (int)((long)n * (half + 1) / halves); i++) {
                memset(row, -1, (size_t)ep * sizeof(int));
                for (int k = 0; k < K; k++) {
                    int expert = plan->key[i * K + k], there = expert < 0 ? 0 : expert_rank(m, l, expert, i, &number);
                    if (expert < 0)
                        continue;
                    if (row[there] < 0) {
                        row[there] = next[there]++;
                        if (filling)
                            ex->token[row[there]] = i;
                    }
                    if (filling) {
                        t->choices_out[(size_t)row[there] * 2 * K + k] = s->weight[i * K + k];
                        t->choices_out[(size_t)row[there] * 2 * K + K + k] = (real)number;
                    }
                }
            }
            ex->rows = filling ? ex->rows : 0;
            for (int r = 0; r < ep && !filling; r++) {
                sending[2 * r + half] = ex->sent[r] = next[r];
                ex->sent_at[r] = next[r] = ex->rows;
                ex->rows += ex->sent[r];
            }
            if (!filling) {
                ex->token = (int *)room_for(&ex->of_token, (size_t)ex->rows, sizeof(int));
                t->choices_out = reals_for(&t->of_choices_out, (size_t)ex->rows * 2 * K);
                for (size_t i = 0; i < (size_t)ex->rows * 2 * K; i++)
                    t->choices_out[i] = (real)(i / K % 2 ? -1 : 0);
            }
        }
        memset(next, 0, (size_t)ep * sizeof(int));
    }
    all_to_all(sending, arriving, 2);
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        ex->came = 0;
        for (int r = 0; r < ep; r++) {
            ex->got[r] = arriving[2 * r + half];
            ex->got_at[r] = ex->came;
            ex->came += ex->got[r];
        }
        ex->x = reals_for(&ex->of_x, (size_t)ex->came * C);
        t->choices = reals_for(&t->of_choices, (size_t)ex->came * 2 * K);
        send_rows(t, t->choices_out, ex->sent, ex->sent_at, t->choices, ex->got, ex->got_at, (size_t)2 * K * sizeof(real));
        send_tokens(ex, t, x, ex->x, C);
    }
    free(sending);
}

// The experts of layer l for the tokens of a plan: all of them, or those that this rank has, for what came.
Experts layer_experts(const Model *m, int l, const Plan *plan, int C) {
    const LayerWeights *w = &m->weights.layer[l];
    Experts all = {plan->E, C, m->expert_width, m->expert_activation, w->w_in, w->w_out, plan->offset, plan->token};
    if (APART) {
        all.width = m->placement->width + l * plan->E;
        all.activation = m->placement->activation + l * plan->E;
    }
    return all;
}

// Sorts what has come by expert, and makes room for the experts' work.
void exchange_plan(Model *m, int l, Exchange *ex, const Travel *t, int K) {
    Placement *p = m->placement;
    int E = p->here + p->room, widest = 1, wide = 1;
    size_t choices = (size_t)ex->came * K;
    int *ints = (int *)room_for(&ex->of_plan, 5 * choices + E + 1, sizeof(int));
    Plan plan = {ex->came, E, K, ints, ints, ints + choices, ints + 2 * choices, ints + 3 * choices, ints + 4 * choices, 0};
    ex->weight = reals_for(&ex->of_weight, choices);
    for (int r = 0; r < ex->came; r++) {
        for (int k = 0; k < K; k++) {
            ex->weight[r * K + k] = t->choices[(size_t)r * 2 * K + k];
            plan.key[r * K + k] = (int)t->choices[(size_t)r * 2 * K + K + k];
        }
    }
    plan_sort(&plan);
    ex->plan = plan;
    for (int i = l * E; i < (l + 1) * E; i++) {
        wide = max_int(wide, p->width[i]);
        widest = max_int(widest, p->width[i] * (1 + is_gated(p->activation[i])));
    }
    ex->hidden = reals_for(&ex->of_hidden, (size_t)plan.offset[E] * widest);
    reals_for(&m->of_act, (size_t)plan.offset[E] * wide);
    reals_for(&m->of_dhidden, (size_t)plan.offset[E] * widest);
}

// The experts' work on each half as it comes, and their answers' way back: to (n,C) +=
void exchange_forward(Model *m, int l, LayerState *s, real *to, int C) {
    int halves = halves_of(m), K = s->plan.K;
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        exchange_plan(m, l, ex, t, K);
        real *rows = reals_for(&m->of_rows, (size_t)ex->plan.offset[ex->plan.E] * C);
        Experts here = layer_experts(m, l, &ex->plan, C);
        experts_forward(rows, ex->hidden, (real *)m->of_act.memory, ex->x, &here, 0);
        t->answers = reals_for(&t->of_answers, (size_t)ex->came * C);
        t->back = reals_for(&t->of_back, (size_t)ex->rows * C);
        memset(t->answers, 0, (size_t)ex->came * C * sizeof(real));
        combine(t->answers, rows, ex->weight, ex->plan.slot, ex->came, K, C);
        send_rows(t, t->answers, ex->got, ex->got_at, t->back, ex->sent, ex->sent_at, (size_t)C * sizeof(real));
    }
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        for (int r = 0; r < ranks.ep; r++) // from one rank at most one row for a token
            combine_rows(to, t->back + (size_t)ex->sent_at[r] * C, ex->token + ex->sent_at[r], ex->sent[r], C);
    }
}

// Backward, first: dout (n,C), by token, goes where the tokens went.
void exchange_start_backward(Model *m, LayerState *s, const real *dout, int C) {
    for (int half = 0; half < halves_of(m); half++) {
        Travel *t = &m->travel[half];
        t->in = reals_for(&t->of_in, (size_t)s->exchange[half].came * C);
        send_tokens(&s->exchange[half], t, dout, t->in, C);
    }
}

// And then: the gradients by the experts' weights, dx (n,C) += , m->dweight (n,K) +=
void exchange_backward(Model *m, int l, LayerState *s, real *dx, int C) {
    int halves = halves_of(m), K = s->plan.K;
    const LayerWeights *dw = &m->grads.layer[l];
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        real *rows = reals_for(&m->of_rows, (size_t)ex->plan.offset[ex->plan.E] * C);
        Experts here = layer_experts(m, l, &ex->plan, C);
        t->dweight = reals_for(&t->of_dweight, (size_t)ex->came * K);
        t->answers = reals_for(&t->of_answers, (size_t)ex->came * C);
        t->back = reals_for(&t->of_back, (size_t)ex->rows * C);
        t->dweight_back = reals_for(&t->of_dweight_back, (size_t)ex->rows * K);
        memset(t->dweight, 0, (size_t)ex->came * K * sizeof(real));
        memset(t->answers, 0, (size_t)ex->came * C * sizeof(real));
        experts_backward(rows, dw->w_in, dw->w_out, t->dweight, t->in, ex->x, ex->hidden, ex->weight, ex->plan.choice,
                         (real *)m->of_act.memory, (real *)m->of_dhidden.memory, &here, 0);
        combine(t->answers, rows, NULL, ex->plan.slot, ex->came, K, C);
        send_rows(t, t->answers, ex->got, ex->got_at, t->back, ex->sent, ex->sent_at, (size_t)C * sizeof(real));
        send_rows(t, t->dweight, ex->got, ex->got_at, t->dweight_back, ex->sent, ex->sent_at, (size_t)K * sizeof(real));
    }
    for (int half = 0; half < halves; half++) {
        Exchange *ex = &s->exchange[half];
        Travel *t = &m->travel[half];
        await_rows(t);
        for (int r = 0; r < ranks.ep; r++) {
            combine_rows(dx, t->back + (size_t)ex->sent_at[r] * C, ex->token + ex->sent_at[r], ex->sent[r], C);
            combine_rows(m->dweight, t->dweight_back + (size_t)ex->sent_at[r] * K, ex->token + ex->sent_at[r], ex->sent[r], K);
        }
    }
}

// Shared experts, or a dense layer: out (N,C) +=
void dense_forward(Model *m, int l, LayerState *s, real *out, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_forward(out, s->dense_hidden, m->act, s->h2, &dense, 1);
}

void dense_backward(Model *m, int l, LayerState *s, real *dh, const real *dout, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_backward(dh, dw->dense_in, dw->dense_out, NULL, dout, s->h2, s->dense_hidden, NULL, NULL, m->act,
                         m->dhidden, &dense, 1);
}

// One layer's feed-forward: out (N,C) += dense part + mixture of experts, of s->h2 (N,C).
void ffn_forward(Model *m, int l, LayerState *s, real *out, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int C = c->dim, h = c->subtokens, apart = APART && is_moe(c, l);
    if (!apart)
        dense_forward(m, l, s, out, N);
    if (!is_moe(c, l))
        return;
    const real *x = s->h2;
    real *to = out;
    if (h > 1) { // sub-tokens: Wu et al. 2024
        product(s->sub, along_rows(s->h2, C, NULL), along_rows(w->split, C, NULL), N, C, C, 0);
        memset(s->merged, 0, (size_t)N * C * sizeof(real));
        x = s->sub;
        to = s->merged;
    }
    router_forward(m, l, s, x, N * h, C / h, T * h);
    m->came[l] = N * h;
    if (apart) {
        exchange_start(m, l, s, x, N * h, C / h);
        dense_forward(m, l, s, out, N); // while the rows travel
        exchange_forward(m, l, s, to, C / h);
        m->came[l] = s->exchange[0].came + s->exchange[1].came; // of one half: 0
    } else {
        Experts experts = layer_experts(m, l, &s->plan, C / h);
        experts_forward(m->rows, s->hidden, m->act, x, &experts, 0);
        combine(to, m->rows, s->weight, s->plan.slot, N * h, s->plan.K, C / h);
    }
    if (h > 1)
        product(out, along_rows(s->merged, C, NULL), along_rows(w->merge, C, NULL), N, C, C, 1);
}

// With --recompute: the hidden layers again, of s->h2 and the plan as it was.
void ffn_recompute(Model *m, int l, LayerState *s, int N) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l];
    int everyone[2] = {0, N}, width = dense_width(c, l), activation = dense_activation(c, l);
    Experts dense = {1, c->dim, &width, &activation, w->dense_in, w->dense_out, everyone, NULL};
    if (w->dense_in)
        experts_hidden(s->dense_hidden, s->h2, &dense);
    if (!is_moe(c, l) || APART) // what came from other ranks is kept
        return;
    Experts experts = layer_experts(m, l, &s->plan, c->dim / c->subtokens);
    experts_hidden(s->hidden, c->subtokens > 1 ? s->sub : s->h2, &experts);
}

// Given dout (N,C), writes dh (N,C), the gradient by s->h2, and adds to the weights' gradients.
void ffn_backward(Model *m, int l, LayerState *s, real *dh, const real *dout, int N, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
    int C = c->dim, h = c->subtokens, apart = APART && is_moe(c, l);
    const real *of_answers = dout;
    memset(dh, 0, (size_t)N * C * sizeof(real));
    if (!apart)
        dense_backward(m, l, s, dh, dout, N);
    if (!is_moe(c, l))
        return;
    const real *x = h > 1 ? s->sub : s->h2;
    real *dx = h > 1 ? m->dsub : dh;
    if (h > 1) {
        product(m->dmerged, along_rows(dout, C, NULL), along_columns(w->merge, C, NULL), N, C, C, 0);
        product(dw->merge, along_columns(dout, C, NULL), along_columns(s->merged, C, NULL), C, C, N, 1);
        memset(m->dsub, 0, (size_t)N * C * sizeof(real));
        of_answers = m->dmerged;
    }
    Plan *plan = &s->plan;
    memset(m->dweight, 0, (size_t)plan->N * plan->K * sizeof(real)); // dropped choices get none
    if (apart) {
        exchange_start_backward(m, s, of_answers, C / h);
        dense_backward(m, l, s, dh, dout, N);
        exchange_backward(m, l, s, dx, C / h);
    } else {
        Experts experts = layer_experts(m, l, plan, C / h);
        experts_backward(m->rows, dw->w_in, dw->w_out, m->dweight, of_answers, x, s->hidden, s->weight, plan->choice,
                         m->act, m->dhidden, &experts, 0);
        combine(dx, m->rows, NULL, plan->slot, plan->N, plan->K, C / h);
    }
    router_backward(m, l, s, dx, x, plan->N, C / h, T * h);
    if (h > 1) {
        product(dh, along_rows(m->dsub, C, NULL), along_columns(w->split, C, NULL), N, C, C, 1);
        product(dw->split, along_columns(m->dsub, C, NULL), along_columns(s->h2, C, NULL), C, C, N, 1);
    }
}

// A step of training begins.
void clear_router_stats(Model *m) {
    for (int l = 0; l < m->config.layers; l++) {
        RouterStats *s = &m->stats[l];
        if (s->count)
            memset(s->count, 0, (size_t)2 * m->config.experts * sizeof(double)); // and lowest
        s->entropy = s->dropped = s->active = s->tokens = s->passes = 0;
    }
}

// The step's counts of all ranks, of all layers in one message.
void sum_router_stats(Model *m) {
    int L = m->config.layers, E = m->config.experts, each = 2 * E + 5;
    double *all = (double *)allocate((size_t)L * each, sizeof(double));
    for (int l = 0; l < L; l++) {
        const RouterStats *s = &m->stats[l];
        double *counts = all + (size_t)l * each;
        double single[] = {s->entropy, s->dropped, s->active, s->tokens, s->passes};
        if (is_moe(&m->config, l)) {
            memcpy(counts, s->count, (size_t)2 * E * sizeof(double)); // and lowest
            memcpy(counts + 2 * E, single, sizeof(single));
        }
    }
    sum_over_ranks(all, L * each);
    for (int l = 0; l < L; l++) {
        RouterStats *s = &m->stats[l];
        const double *counts = all + (size_t)l * each, *single = counts + 2 * E;
        if (is_moe(&m->config, l))
            memcpy(s->count, counts, (size_t)2 * E * sizeof(double));
        s->entropy = single[0], s->dropped = single[1], s->active = single[2], s->tokens = single[3], s->passes = single[4];
    }
    free(all);
}

// What follows a step without a gradient: the buffers of the recipes that have some, and who has had tokens of late.
void router_update(Model *m) {
    const Config *c = &m->config;
    if (MANY)
        sum_router_stats(m);
    for (int l = 0; l < c->layers; l++) {
        LayerWeights *w = &m->weights.layer[l];
        RouterStats *s = &m->stats[l];
        int E = is_moe(c, l) ? c->experts : 0;
        double mean = s->active / c->experts;
        for (int e = 0; e < E; e++) {
            s->idle[e] = s->count[e] > 0 ? 0 : s->idle[e] + 1;
            s->recent[e] += 0.02 * (s->count[e] / fmax(mean, 1e-9) - s->recent[e]);
            if (w->bias) // DeepSeek-V3: against the sign of what is too much
                w->bias[e] += (real)(c->bias_rate * ((mean > s->count[e]) - (mean < s->count[e])));
            if (w->level && s->passes > 0)
                w->level[e] += (real)(0.1 * (s->lowest[e] / s->passes - (double)w->level[e]));
        }
        size_t size = w->slow ? (size_t)router_width(c) * (c->recurrent ? c->recurrent : c->dim / c->subtokens) : 0;
        for (size_t i = 0; i < size; i++)
            w->slow[i] += (real)(1 - c->history_decay) * (w->router[i] - w->slow[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Loss, AdamW, schedule

// The cross-entropy of N rows of hidden states h (N,C) against targets: nll (N), in nats. The logits of a few rows at a
// time are all that is ever in memory; so, with dh (N,C) and dhead (V,C) not NULL, their gradients are taken here and
// now, while the logits are there: dh =, dhead +=, both of scale * sum(nll). logits (head_rows,V) is scratch.
void head_loss(real *nll, real *dh, real *dhead, const real *h, const real *head, const int *targets, int N, int C,
               int V, double scale, real *logits, int head_rows) {
    for (int first = 0; first < N; first += head_rows) {
        int rows = min_int(head_rows, N - first);
        product(logits, along_rows(h + (size_t)first * C, C, NULL), along_rows(head, C, NULL), rows, V, C, 0);
#pragma omp parallel for
        for (int i = 0; i < rows; i++) {
            real *row = logits + (size_t)i * V, right = row[targets[first + i]];
            nll[first + i] = softmax(row, V) - right;
            row[targets[first + i]] -= 1; // d nll / d logits = p - onehot
            for (int v = 0; dh && v < V; v++)
                row[v] *= (real)scale;
        }
        if (dh) {
            product(dh + (size_t)first * C, along_rows(logits, V, NULL), along_columns(head, C, NULL), rows, C, V, 0);
            product(dhead, along_columns(logits, V, NULL), along_columns(h + (size_t)first * C, C, NULL), V, C, rows,
                    1);
        }
    }
}

// The first half of a layer, from s->x to s->h2.
void attend_forward(Model *m, int l) {
    const Config *c = &m->config;
    LayerState *s = &m->layers[l];
    const LayerWeights *w = &m->weights.layer[l];
    int N = m->B * m->T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    rmsnorm_forward(s->h1, s->rstd1, s->x, w->norm1, N, C, c->norm_eps);
    product(s->qkv, along_rows(s->h1, C, NULL), along_rows(w->qkv, C, NULL), N, Q, C, 0);
    rope(s->qkv, Q, N, m->T, H + KV, D, m->angles, 1);
    attention_forward(s->att, s->lse, s->qkv, m->B, m->T, H, KV, D, m->attention);
    copy_rows(s->mid, s->x, N, C);
    product(s->mid, along_rows(s->att, C, NULL), along_rows(w->proj, C, NULL), N, C, C, 1);
    rmsnorm_forward(s->h2, s->rstd2, s->mid, w->norm2, N, C, c->norm_eps);
    m->at_hand = l;
}

// The balance losses of the last forward pass, weighted: what is added to the loss for the gradient.
double model_aux(const Model *m) {
    double aux = 0;
    for (int l = 0; l < m->config.layers; l++)
        aux += m->layers[l].aux;
    return aux;
}

// m->rank_tokens: how many tokens each rank has.
void share_token_counts(Model *m, int N) {
    double *count = (double *)allocate(ranks.size, sizeof(double));
    count[ranks.rank] = N;
    sum_over_ranks(count, ranks.size);
    for (int r = 0; r < ranks.size; r++)
        m->rank_tokens[r] = (int)count[r];
    free(count);
}

// Runs B sequences of T tokens. Returns the mean cross-entropy per token; m->nll (N) holds each token's. In TRAIN_MODE
// capacity and chance are on. In all modes but EVAL_MODE the head's gradients are taken at once, scaled by grad_scale (1 /
// micro-steps). step, and the place of the first token in the step's whole batch, choose the random numbers.
double model_forward(Model *m, const int *tokens, const int *targets, int B, int T, int mode, double grad_scale,
                     long step, long first_token) {
    const Config *c = &m->config;
    int N = B * T, C = c->dim, L = c->layers;
    m->tokens = tokens;
    m->B = B;
    m->T = T;
    m->mode = mode;
    m->grad_scale = grad_scale;
    m->step = (uint64_t)step;
    m->first_token = (uint64_t)first_token;
    int begins = !first_token || first_token < (long)ranks.size * N; // the step's first micro-step
    m->last_pass = first_token / max_int(N, 1) / ranks.size == c->accum - 1;
    m->rank_tokens[ranks.rank] = N;
    if (is_spread(c))
        share_token_counts(m, N);
    if (mode == TRAIN_MODE && begins)
        clear_router_stats(m);
    embedding_forward(m->layers[0].x, m->weights.embed, tokens, N, C);
    for (int l = 0; l < L; l++) {
        LayerState *s = &m->layers[l];
        real *out = l + 1 < L ? m->layers[l + 1].x : m->x;
        attend_forward(m, l);
        copy_rows(out, s->mid, N, C);
        ffn_forward(m, l, s, out, N, T);
    }
    rmsnorm_forward(m->h, m->rstd, m->x, m->weights.norm, N, C, c->norm_eps);
    int train = mode != EVAL_MODE;
    head_loss(m->nll, train ? m->dh : NULL, train ? m->grads.head : NULL, m->h, m->weights.head, targets, N, C,
              c->vocab, grad_scale / max_int(N, 1), m->logits, m->head_rows);
    double loss = 0;
    for (int n = 0; n < N; n++)
        loss += (double)m->nll[n];
    m->loss = (begins ? 0 : m->loss) + grad_scale * loss / max_int(N, 1);
    m->total_aux = (begins ? 0 : m->total_aux) + grad_scale * model_aux(m);
    return loss / max_int(N, 1);
}

// ---- gradients of several ranks
//
// Gradients are summed while backward still runs: those of an expert's tensor as soon as its layer is done; all others
// are put together to buckets, and each begins its way as soon as it is full, or backward at its end.

size_t bucket = 1 << 20; // numbers

Request summing[4096];
int summing_count = 0;

void await_sums(void) {
    if (summing_count)
        ranks_wait(summing, summing_count);
    summing_count = 0;
}

// Begins to sum gradients from..end over all ranks, or, where `peers`, over those that have the same experts.
void start_sum(Model *m, size_t from, size_t end, int peers) {
    int sharing = peers ? ranks.groups : ranks.size;
    for (size_t n; from < end && sharing > 1; from += n) {
        if (summing_count == (int)(sizeof(summing) / sizeof(summing[0])))
            await_sums();
        n = end - from < largest_message / sizeof(real) ? end - from : largest_message / sizeof(real);
        ranks.traffic.reduced += 2.0 * (sharing - 1) / sharing * (double)(n * sizeof(real)); // what a ring sends
        start_sum_of_reals(m->memory[GRADS] + from, n, peers, &summing[summing_count++]);
    }
}

// After the backward pass of layer l (after that of the embedding: -1): sums what is finished. *from: where the gradients
// begin that are on their way already; start: start_sum, or the CUDA twin's.
void sum_layer(Model *m, int l, size_t *from, void (*start)(Model *m, size_t from, size_t end, int peers)) {
    size_t begin = m->common;
    for (int i = m->tensor_count - 1; i >= 0; i--) {
        const Tensor *t = &m->tensors[i];
        if (tensor_is_expert(t) && t->layer == l && !m->config.replicate)
            start(m, t->offset, t->offset + t->size, 1);
        else if (!tensor_is_expert(t) && t->layer == l && (l >= 0 || t->kind == EMBED))
            begin = t->offset; // the first one's in the end
    }
    if (begin < *from && (l < 0 || *from - begin >= bucket)) {
        start(m, begin, *from, 0);
        *from = begin;
    }
}

// Where this rank's expert `number` begins in memory, of tensor t; its own experts count first, then its copies.
size_t expert_offset(const Model *m, const Tensor *t, int number) {
    const Placement *p = m->placement;
    int at = t->layer * (p->here + p->room);
    size_t offset = t->offset, C = (size_t)(m->config.dim / m->config.subtokens);
    for (int i = at; i < at + number; i++)
        offset += C * p->width[i] * (t->kind == W_IN ? 1 + is_gated(p->activation[i]) : 1);
    return offset;
}

typedef struct Copy { // a matrix of an expert that has a second copy, of which this rank has one
    int partner, owned; // who has the other; whether this rank is the owner
    size_t at, size;  // where it is in memory[what]
} Copy;

Copy *list_copies(const Model *m, int *count) { // in the same order on all ranks; to be freed
    const Config *c = &m->config;
    const Placement *p = m->placement;
    Copy *list = (Copy *)allocate((size_t)m->tensor_count * c->experts, sizeof(Copy));
    *count = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        for (int e = 0; tensor_is_expert(t) && e < c->experts; e++) {
            int host = p->host[t->layer * c->experts + e], owner = e / p->here, owned = owner == ranks.place;
            int number = owned ? e - owner * p->here : p->here + p->slot[t->layer * c->experts + e];
            if (host < 0 || (!owned && host != ranks.place))
                continue;
            Copy copy = {owned ? host : owner, owned, expert_offset(m, t, number), expert_size(c, t->kind, e)};
            list[(*count)++] = copy;
        }
    }
    return list;
}

// Of experts with a second copy: the copies' gradients are added to their owners', or the owners' weights are copied.
void exchange_copies(Model *m, int what) {
    int count;
    size_t room = 0;
    Copy *list = list_copies(m, &count);
    for (int i = 0; i < count; i++)
        room += what == GRADS && list[i].owned ? list[i].size : 0;
    real *arrived = allocate_reals(room), *to = arrived;
    Request *requests = (Request *)allocate(count, sizeof(Request));
    for (int i = 0; i < count; i++) {
        const Copy *k = &list[i];
        real *own = m->memory[what] + k->at;
        if (k->owned == (what == GRADS)) {
            start_receive(what == GRADS ? to : own, k->size, k->partner, what, &requests[i]);
            to += k->size;
        } else {
            ranks.traffic.reduced += (double)(k->size * sizeof(real));
            start_send(own, k->size, k->partner, what, &requests[i]);
        }
    }
    ranks_wait(requests, count);
    free(requests);
    to = arrived;
    for (int i = 0; what == GRADS && i < count; i++) {
        real *own = m->memory[what] + list[i].at;
        for (size_t j = 0; j < list[i].size; j++)
            own[j] = list[i].owned ? own[j] + to[j] : 0;
        to += list[i].owned ? list[i].size : 0;
    }
    free(arrived);
    free(list);
}

// Gives each layer's busiest experts of late a second copy: one after the other on the rank that has least to do by then.
void choose_copies(Model *m) {
    const Config *c = &m->config;
    Placement *p = m->placement;
    int E = c->experts;
    Ranked *busy = (Ranked *)allocate(E, sizeof(Ranked));
    double *load = (double *)allocate(ranks.ep, sizeof(double));
    int *slots = (int *)allocate(ranks.ep, sizeof(int));
    memset(p->host, -1, (size_t)c->layers * E * sizeof(int));
    memset(p->copy, -1, (size_t)c->layers * p->room * sizeof(int));
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        memset(load, 0, (size_t)ranks.ep * sizeof(double));
        memset(slots, 0, (size_t)ranks.ep * sizeof(int));
        for (int e = 0; e < E; e++) {
            busy[e].score = m->stats[l].recent[e];
            busy[e].index = e;
            load[e / p->here] += m->stats[l].recent[e];
        }
        qsort(busy, E, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < min_int(p->room, E); i++) {
            int e = busy[i].index, owner = e / p->here, host = -1;
            for (int r = 0; r < ranks.ep; r++)
                host = r != owner && (host < 0 || load[r] < load[host]) ? r : host;
            load[owner] -= busy[i].score / 2;
            load[host] += busy[i].score / 2;
            p->host[l * E + e] = host;
            p->slot[l * E + e] = slots[host]++;
            if (host == ranks.place)
                p->copy[l * p->room + p->slot[l * E + e]] = e;
        }
        place_experts(m, l);
    }
    free(busy), free(load), free(slots);
}

// Adds the gradients of grad_scale * (loss + aux) of the last forward pass, which was not in EVAL_MODE.
void model_backward(Model *m) {
    const Config *c = &m->config;
    int B = m->B, T = m->T, N = B * T, C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D;
    int sums = MANY && m->last_pass;
    size_t tail = m->grads.norm ? (size_t)(m->grads.norm - m->memory[GRADS]) : 0, from = tail;
    memset(m->dx, 0, (size_t)N * C * sizeof(real));
    rmsnorm_backward(m->dx, m->grads.norm, m->dh, m->x, m->rstd, m->weights.norm, N, C, m->partial);
    for (int l = c->layers - 1; l >= 0; l--) {
        LayerState *s = &m->layers[l];
        const LayerWeights *w = &m->weights.layer[l], *dw = &m->grads.layer[l];
        if (c->recompute && l != m->at_hand) {
            attend_forward(m, l);
            ffn_recompute(m, l, s, N);
        }
        ffn_backward(m, l, s, m->dh, m->dx, N, T);
        rmsnorm_backward(m->dx, dw->norm2, m->dh, s->mid, s->rstd2, w->norm2, N, C, m->partial);
        product(m->datt, along_rows(m->dx, C, NULL), along_columns(w->proj, C, NULL), N, C, C, 0);
        product(dw->proj, along_columns(m->dx, C, NULL), along_columns(s->att, C, NULL), C, C, N, 1);
        attention_backward(m->dqkv, m->datt, s->att, s->lse, s->qkv, B, T, H, KV, D, m->attention);
        rope(m->dqkv, Q, N, T, H + KV, D, m->angles, -1);
        product(m->dh, along_rows(m->dqkv, Q, NULL), along_columns(w->qkv, C, NULL), N, C, Q, 0);
        product(dw->qkv, along_columns(m->dqkv, Q, NULL), along_columns(s->h1, C, NULL), Q, C, N, 1);
        rmsnorm_backward(m->dx, dw->norm1, m->dh, s->x, s->rstd1, w->norm1, N, C, m->partial);
        if (sums)
            sum_layer(m, l, &from, start_sum);
    }
    embedding_backward(m->grads.embed, m->dx, m->tokens, N, C, c->vocab, m->order, m->offset);
    if (sums) {
        sum_layer(m, -1, &from, start_sum);
        start_sum(m, tail, m->common, 0); // the last norm, and what all layers have in common
    }
    if (sums && m->placement && c->replicate) {
        exchange_copies(m, GRADS);
        start_sum(m, m->common, m->size, 1); // of copies it is 0
    }
}

// The learning rate of step 1, 2, ..., steps.
double learning_rate(const Config *c, int step) {
    double low = c->min_lr < 0 ? c->lr / 10 : c->min_lr;
    if (step <= c->warmup)
        return c->lr * step / c->warmup;
    if (c->schedule == CONSTANT || step >= c->steps)
        return c->schedule == CONSTANT ? c->lr : low;
    if (c->schedule == WSD) { // warm-up, stable, decay: a straight line over the last fifth (Hu et al. 2024, MiniCPM)
        double start = fmax(c->warmup, 0.8 * c->steps);
        return step <= start ? c->lr : c->lr + (low - c->lr) * (step - start) / (c->steps - start);
    }
    double done = (double)(step - c->warmup) / (c->steps - c->warmup);
    return low + (c->lr - low) * 0.5 * (1 + cos(3.141592653589793 * done));
}

#define UPDATE_CHUNK 16384

double sum_of_squares(const real *g, size_t n) {
    int chunks = (int)((n + UPDATE_CHUNK - 1) / UPDATE_CHUNK);
    double *part = (double *)allocate(chunks, sizeof(double)), total = 0;
#pragma omp parallel for
    for (int i = 0; i < chunks; i++) {
        size_t end = (size_t)(i + 1) * UPDATE_CHUNK;
        end = end < n ? end : n;
        double sum[16] = {0}; // side by side, so that vectors can do it
        size_t j = (size_t)i * UPDATE_CHUNK;
        for (; j + 16 <= end; j += 16) {
            for (int k = 0; k < 16; k++)
                sum[k] += (double)g[j + k] * (double)g[j + k];
        }
        for (; j < end; j++)
            sum[0] += (double)g[j] * (double)g[j];
        for (int k = 0; k < 16; k++)
            part[i] += sum[k];
    }
    for (int i = 0; i < chunks; i++)
        total += part[i];
    free(part);
    return total;
}

// The norm of all gradients together.
double gradient_norm(const Model *m) {
    const real *g = m->memory[GRADS];
    if (!MANY)
        return sqrt(sum_of_squares(g, m->size));
    double total = sum_of_squares(g + m->slice, m->slice_end - m->slice);
    for (int i = 0; i < m->tensor_count; i++) {
        if (tensor_is_expert(&m->tensors[i]))
            total += sum_of_squares(g + m->tensors[i].offset, m->tensors[i].size) / ranks.groups;
    }
    sum_over_ranks(&total, 1);
    return sqrt(total);
}

// After each rank has updated its slice of what all have.
void share_weights(Model *m) {
    size_t slice = m->slice_end - m->slice;
    ranks.traffic.reduced += (double)(slice * sizeof(real)) * (ranks.size - 1);
    gather_slices(m->memory[WEIGHTS], slice / 16);
}

// How many numbers of tensor t this rank updates, from *at on in its memory: of what all ranks have, those of its slice.
size_t updated_part(const Model *m, const Tensor *t, size_t *at) {
    size_t end = t->offset + t->size;
    *at = t->offset;
    if (MANY && !tensor_is_expert(t)) {
        *at = *at > m->slice ? *at : m->slice;
        end = end < m->slice_end ? end : m->slice_end;
    }
    return tensor_is_buffer(t) || end < *at ? 0 : end - *at;
}

// AdamW with decoupled decay of the matrices (Loshchilov and Hutter 2019), on gradients scaled down to norm clip; then
// clears the gradients. step counts from 1. norm is gradient_norm(m).
void model_update(Model *m, int step, double lr, double norm) {
    const Config *c = &m->config;
    real scale = (real)(c->clip > 0 && norm > c->clip ? c->clip / norm : 1), b1 = (real)c->beta1, b2 = (real)c->beta2;
    real fix1 = (real)(1 / (1 - pow(c->beta1, step))), fix2 = (real)(1 / (1 - pow(c->beta2, step)));
    real rate = (real)lr, eps = (real)1e-8;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t at, size = updated_part(m, t, &at);
        if (!size)
            continue;
        size_t moment = moment_place(m, at);
        real *w = m->memory[WEIGHTS] + at, *g = m->memory[GRADS] + at;
        real *m1 = m->memory[MOMENT1] + moment, *m2 = m->memory[MOMENT2] + moment;
        real keep = (real)(tensor_is_vector(t) ? 1 : 1 - lr * c->weight_decay);
#pragma omp parallel for if (size > UPDATE_CHUNK)
        for (size_t j = 0; j < size; j++) {
            real grad = g[j] * scale;
            m1[j] = b1 * m1[j] + (1 - b1) * grad;
            m2[j] = b2 * m2[j] + (1 - b2) * grad * grad;
            w[j] = keep * w[j] - rate * (m1[j] * fix1) / ((real)sqrt(m2[j] * fix2) + eps);
            g[j] = 0;
        }
    }
    if (MANY) {
        memset(m->memory[GRADS], 0, m->common * sizeof(real)); // the other ranks' slices, too
        share_weights(m);
    }
    router_update(m);
    if (MANY && m->placement && c->replicate) {
        if (step % c->replicate_every == 0)
            choose_copies(m);
        exchange_copies(m, WEIGHTS);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. The tokenizer
//
// Byte-level byte-pair encoding, as GPT-2 introduced it (Radford et al. 2019; BPE for text: Sennrich et
// al. 2016, arXiv:1508.07909). Three steps from text to ids:
//
//   1. <|endoftext|> and other added tokens are cut out: "A.<|endoftext|>It's" -> "A."  <|endoftext|>  "It's"
//   2. What lies between is cut into words, so that no token spans two words:      "A" "."  ...  "It" "'s"
//   3. Each word starts as its bytes. A list of merges, best first, says which neighbours become one token. Again and
//      again the pair of the lowest rank is merged, the leftmost of equals, until no neighbours are in the list.
//
// All 256 bytes are tokens, so there is no text that cannot be written, and what is not UTF-8 comes back as it was.
// The vocabulary is a Hugging Face tokenizer.json. Of what such a file can ask for we follow the GPT-2 way only, and
// refuse the rest rather than give other ids. data/tokenize.c trains such a vocabulary and turns text into token files.

// ---- two containers

// The list with room for one more element of `size` bytes behind its `count`: it doubles at every power of two.
void *grow(void *list, size_t count, size_t size) {
    return count & (count - 1) ? list : reallocate(list, count ? 2 * count : 1, size);
}

// A hash table from keys of any bytes to numbers other than 0, which means that a key is not there.
typedef struct Entry {
    size_t start, length; // the key, in Table.bytes
    int64_t value;
} Entry;

typedef struct Table {
    Entry *entries;      // (slots)
    char *bytes;         // of all keys
    size_t slots, count; // slots: a power of two; count: of keys
    size_t filled, room; // of bytes
} Table;

uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t h = n, chunk = 0;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&chunk, s, 8);
        h = hash64(h ^ chunk);
    }
    if (n == 0)
        return h;
    chunk = 0;
    memcpy(&chunk, s, n);
    return hash64(h ^ chunk);
}

Entry *table_slot(const Table *t, const char *key, size_t n) { // where the key stands or would stand
    for (size_t i = (size_t)hash_bytes(key, n);; i++) {
        Entry *e = &t->entries[i & (t->slots - 1)];
        if (!e->value || (e->length == n && memcmp(t->bytes + e->start, key, n) == 0))
            return e;
    }
}

int64_t table_get(const Table *t, const void *key, size_t n) {
    return t->slots ? table_slot(t, (const char *)key, n)->value : 0;
}

// The key's value, to be changed. A new key's is 0, and must be.
int64_t *table_put(Table *t, const void *key, size_t n) {
    if (2 * t->count >= t->slots) {
        Table old = *t;
        t->slots = old.slots ? 2 * old.slots : 1024;
        t->entries = (Entry *)allocate(t->slots, sizeof(Entry));
        for (size_t i = 0; i < old.slots; i++) {
            if (old.entries[i].value)
                *table_slot(t, t->bytes + old.entries[i].start, old.entries[i].length) = old.entries[i];
        }
        free(old.entries);
    }
    Entry *e = table_slot(t, (const char *)key, n);
    if (!e->value) {
        if (n > t->room - t->filled)
            t->bytes = (char *)reallocate(t->bytes, t->room = 2 * t->room + n, 1);
        memcpy(t->bytes + t->filled, key, n);
        e->start = t->filled;
        e->length = n;
        t->filled += n;
        t->count++;
    }
    return &e->value;
}

void table_free(Table *t) {
    free(t->entries);
    free(t->bytes);
    memset(t, 0, sizeof(*t));
}

// A heap: the smallest item comes out first.
typedef struct Item {
    int64_t first, second; // ordered by first, then by second
} Item;

typedef struct Heap {
    Item *items;
    size_t count;
} Heap;

int item_before(Item a, Item b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
}

void heap_push(Heap *h, int64_t first, int64_t second) {
    Item item = {first, second};
    h->items = (Item *)grow(h->items, h->count, sizeof(Item));
    size_t i = h->count++;
    for (; i > 0 && item_before(item, h->items[(i - 1) / 2]); i = (i - 1) / 2)
        h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = item;
}

Item heap_pop(Heap *h) {
    Item top = h->items[0], last = h->items[--h->count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->count; i = child) {
        child += child + 1 < h->count && item_before(h->items[child + 1], h->items[child]);
        if (!item_before(h->items[child], last))
            break;
        h->items[i] = h->items[child];
    }
    h->items[i] = last;
    return top;
}

// ---- cutting text into words

enum { OTHER, LETTER, NUMBER, SPACE }; // classes of characters

void mark_characters(unsigned char *class_of, const int32_t *ranges, size_t size, int kind) {
    for (const int32_t *range = ranges; range < ranges + size / sizeof(int32_t); range += 2)
        memset(class_of + range[0], kind, (size_t)(range[1] - range[0] + 1));
}

unsigned char *character_classes(void) { // the class of every code point, to be freed
    unsigned char *class_of = (unsigned char *)allocate(0x110000, 1);
    mark_characters(class_of, unicode_letters, sizeof(unicode_letters), LETTER);
    mark_characters(class_of, unicode_numbers, sizeof(unicode_numbers), NUMBER);
    mark_characters(class_of, unicode_spaces, sizeof(unicode_spaces), SPACE);
    return class_of;
}

// The class of the character at s and its number of bytes. A byte that is no UTF-8 is a character of class OTHER.
int character_class(const unsigned char *class_of, const char *s, size_t n, size_t *bytes) {
    int32_t code = (unsigned char)*s;
    *bytes = code < 0x80 ? 1 : (size_t)utf8_decode(s, n, &code);
    return code < 0 ? (int)OTHER : class_of[code];
}

// The length of the first word of s (n bytes, at least one), by GPT-2's rule, which reads as a regular expression
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// In words: the English contractions; letters, or numbers, or other signs, each with the one space before them; and
// white space, of which the last character is left to what follows.
size_t first_word(const unsigned char *class_of, const char *s, size_t n) {
    if (s[0] == '\'' && n > 1) {
        char a = s[1], b = n > 2 ? s[2] : ' ';
        if (a == 's' || a == 't' || a == 'm' || a == 'd')
            return 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
            return 3;
    }
    size_t i = s[0] == ' ' && n > 1, bytes, last = 0; // last: where the last character begins
    int kind = character_class(class_of, s + i, n - i, &bytes);
    if (kind == SPACE)
        i = 0;
    for (; i < n && character_class(class_of, s + i, n - i, &bytes) == kind; i += bytes)
        last = i;
    return kind == SPACE && i < n && last > 0 ? last : i;
}

// ---- encoding

typedef struct Merge {
    int rank, id; // rank: from 1, the lowest goes first; id: the token that the two become
} Merge;

// A word that was met before, with its ids. A word's hash decides its place; a new word drives out the old one.
typedef struct CachedWord {
    unsigned char length, count;
    char text[30];
    int ids[8];
} CachedWord;
enum { CACHED_WORDS = 1 << 15 };

typedef struct Tokenizer {
    int vocab;   // ids are 0 .. vocab - 1
    int eot;     // id of <|endoftext|>
    char **text; // vocab: the bytes of each token
    int *length; // vocab: their number
    char *json;  // the file as it was read
    size_t json_size;
    int byte_id[256];
    Table ids;     // of the tokens' bytes: id + 1
    Table pairs;   // of two ids: a place in merges
    Merge *merges; // by rank; 0: none
    int *added;    // ids that are found as a whole in the text, <|endoftext|> among them
    int added_count;
    unsigned char added_first[256]; // 1 where one of them begins with this byte
    unsigned char *class_of;        // of every code point
    CachedWord *cache;              // what encoding changes: a thread's own
    int shared;                     // everything but the cache belongs to another Tokenizer
} Tokenizer;

const Merge *find_merge(const Tokenizer *t, int left, int right) { // of rank 0 where there is none
    const int pair[2] = {left, right};
    return &t->merges[table_get(&t->pairs, pair, sizeof(pair))];
}

// A token of a word that is being merged, in a doubly linked list (-1: none).
typedef struct Symbol {
    int id, previous, next;
} Symbol;

void push_merge(const Tokenizer *t, Heap *heap, const Symbol *s, int i) { // of symbol i and its right neighbour
    int rank = i < 0 || s[i].next < 0 ? 0 : find_merge(t, s[i].id, s[s[i].next].id)->rank;
    if (rank)
        heap_push(heap, rank, i);
}

// The ids of one word of n bytes, in n log n time. ids has room for n.
size_t merge_word(const Tokenizer *t, const char *word, size_t n, int *ids) {
    if (n > INT32_MAX)
        fail("a word of %zu bytes is too long to encode", n);
    Symbol *s = (Symbol *)allocate(n, sizeof(Symbol));
    Heap heap = {NULL, 0};
    for (int i = 0; i < (int)n; i++) {
        s[i].id = t->byte_id[(unsigned char)word[i]];
        s[i].previous = i - 1;
        s[i].next = i + 1 < (int)n ? i + 1 : -1;
    }
    for (int i = 0; i < (int)n; i++)
        push_merge(t, &heap, s, i);
    while (heap.count > 0) {
        Item item = heap_pop(&heap);
        int i = (int)item.second, next = s[i].next;
        const Merge *m = next < 0 ? t->merges : find_merge(t, s[i].id, s[next].id);
        if (m->rank != item.first)
            continue; // this pair is gone: one of the two has merged elsewhere
        s[i].id = m->id;
        s[i].next = s[next].next;
        s[next].id = s[next].next = -1;
        if (s[i].next >= 0)
            s[s[i].next].previous = i;
        push_merge(t, &heap, s, i);
        push_merge(t, &heap, s, s[i].previous);
    }
    size_t count = 0;
    for (int i = 0; i >= 0; i = s[i].next)
        ids[count++] = s[i].id;
    free(s);
    free(heap.items);
    return count;
}

size_t encode_words(const Tokenizer *t, const char *s, size_t n, int *ids) {
    size_t count = 0;
    for (size_t length; n > 0; s += length, n -= length) {
        length = first_word(t->class_of, s, n);
        CachedWord *c = &t->cache[length <= sizeof(c->text) ? hash_bytes(s, length) % CACHED_WORDS : 0];
        if (c->length == length && memcmp(c->text, s, length) == 0) {
            for (int i = 0; i < c->count; i++)
                ids[count++] = c->ids[i];
            continue;
        }
        size_t added = merge_word(t, s, length, ids + count);
        if (length <= sizeof(c->text) && added <= sizeof(c->ids) / sizeof(c->ids[0])) {
            c->length = (unsigned char)length;
            c->count = (unsigned char)added;
            memcpy(c->text, s, length);
            memcpy(c->ids, ids + count, added * sizeof(int));
        }
        count += added;
    }
    return count;
}

// The longest added token that s begins with, -1 where there is none.
int added_token(const Tokenizer *t, const char *s, size_t n) {
    int best = -1;
    for (int i = 0; t->added_first[(unsigned char)*s] && i < t->added_count; i++) {
        int id = t->added[i], length = t->length[id];
        if ((size_t)length <= n && memcmp(t->text[id], s, (size_t)length) == 0 &&
            (best < 0 || length > t->length[best]))
            best = id;
    }
    return best;
}

// Text of `size` bytes to ids, for which there is room for size + 1 numbers. Returns how many there are.
size_t tokenizer_encode(Tokenizer *t, const char *text, size_t size, int *ids) {
    size_t count = 0;
    for (size_t start = 0, end = 0; start < size; start = end) {
        int id = -1;
        while (end < size && (id = added_token(t, text + end, size - end)) < 0)
            end++;
        count += encode_words(t, text + start, end - start, ids + count);
        if (id >= 0) {
            ids[count++] = id;
            end += (size_t)t->length[id];
        }
    }
    return count;
}

// The bytes of a token; those of several, one after the other, are the text again.
const char *tokenizer_text(const Tokenizer *t, int id, int *length) {
    *length = t->length[id];
    return t->text[id];
}

// ---- tokenizer.json

// GPT-2 writes tokens in JSON with one visible character for each byte: itself where it is visible in Latin-1, else the
// next of U+0100, U+0101, ... Hence "Ġ" (U+0120) for a space and "Ċ" (U+010A) for a newline.
void byte_alphabet(int32_t character[256]) {
    int32_t next = 256;
    for (int b = 0; b < 256; b++)
        character[b] = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae ? b : next++;
}

// From that alphabet to bytes. Returns how many, or -1 where a character is not of the alphabet.
int alphabet_to_bytes(const char *s, size_t n, char *out) {
    int32_t character[256], byte_of[0x144], code;
    byte_alphabet(character);
    memset(byte_of, -1, sizeof(byte_of));
    for (int b = 0; b < 256; b++)
        byte_of[character[b]] = b;
    int count = 0;
    for (size_t i = 0; i < n;) {
        i += (size_t)utf8_decode(s + i, n - i, &code);
        if (code < 0 || code >= 0x144 || byte_of[code] < 0)
            return -1;
        out[count++] = (char)byte_of[code];
    }
    return count;
}

// What a member must be, or is just as well without; anything else asks for other ids than ours. What wraps or cuts the
// finished ids (post-processor, truncation, padding) and the decoder do not matter here.
typedef struct Expected {
    const char *member, *value, *other;
} Expected;

void check_members(const char *path, const char *name, const Json *object, const Expected *list, size_t size) {
    for (const Expected *e = list; e < list + size / sizeof(*list); e++) {
        const Json *m = json_get(object, e->member);
        char number[32] = "null";
        const char *word = number;
        if (m && m->type == 'o')
            m = json_get(m, "type") ? json_get(m, "type") : m;
        if (m && m->type == 's')
            word = m->text;
        else if (m && m->type == 'n')
            snprintf(number, sizeof(number), "%g", m->number);
        else if (m && m->type != '0')
            word = m->type == 't' ? "true" : m->type == 'f' ? "false" : "something else";
        if (strcmp(word, e->value) != 0 && strcmp(word, e->other) != 0)
            fail("%s: %s %s is %s; this program follows \"%s\" only", path, name, e->member, word, e->value);
    }
}

// A token of n bytes (-1: not in the alphabet); `raw` is how the file writes it.
void read_token(Tokenizer *t, const char *path, const char *raw, const char *s, int n, const Json *id) {
    if (n <= 0)
        fail("%s: token \"%s\" is empty or not in GPT-2's byte alphabet", path, raw);
    if (!id || id->type != 'n' || !(id->number >= 0 && id->number < 1 << 24) || id->number != floor(id->number))
        fail("%s: the id of token \"%s\" is not a whole number from 0 to %d", path, raw, (1 << 24) - 1);
    int64_t *value = table_put(&t->ids, s, (size_t)n), number = (int64_t)id->number + 1;
    if (*value && *value != number)
        fail("%s: token \"%s\" is given twice, as %d and %d", path, raw, (int)*value - 1, (int)number - 1);
    *value = number;
}

// The vocabulary, from the model's "vocab" and from "added_tokens", which often are in both.
void read_vocabulary(Tokenizer *t, const char *path, const Json *vocab, const Json *added, char *bytes) {
    static const Expected flags[] = {
        {"single_word", "false", "null"}, {"lstrip", "false", "null"}, {"rstrip", "false", "null"}};
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        const Json *content = json_get(a, "content"), *id = json_get(a, "id");
        if (!content || content->type != 's')
            fail("%s: an added token has no \"content\"", path);
        check_members(path, content->text, a, flags, sizeof(flags));
        read_token(t, path, content->text, content->text, (int)content->length, id);
        t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
        t->added[t->added_count++] = (int)id->number;
    }
    for (const Json *v = vocab->child; v; v = v->next) {
        size_t n = strlen(v->key);
        int64_t known = table_get(&t->ids, v->key, n); // an added token once more, as it is
        if (!known || v->type != 'n' || v->number != (double)(known - 1))
            read_token(t, path, v->key, bytes, alphabet_to_bytes(v->key, n, bytes), v);
    }
    t->vocab = (int)t->ids.count;
    t->text = (char **)allocate(t->ids.count, sizeof(char *));
    t->length = (int *)allocate(t->ids.count, sizeof(int));
    for (const Entry *e = t->ids.entries; e < t->ids.entries + t->ids.slots; e++) {
        int id = (int)e->value - 1;
        if (id >= t->vocab || (id >= 0 && t->text[id]))
            fail("%s: token \"%.*s\" has id %d, but the ids of %d tokens are the numbers below that, each once", path,
                 (int)e->length, t->ids.bytes + e->start, id, t->vocab);
        if (id >= 0) {
            t->text[id] = t->ids.bytes + e->start;
            t->length[id] = (int)e->length;
        }
    }
}

// "merges": the rank is the place in the list; each is a string "left right" or a pair of strings.
void read_merges(Tokenizer *t, const char *path, const Json *merges, char *bytes) {
    int rank = 0;
    t->merges = (Merge *)allocate(1, sizeof(Merge));
    for (const Json *m = merges->child; m; m = m->next) {
        const Json *a = m->type == 'a' ? m->child : NULL, *b = a ? a->next : NULL;
        char *left = a ? a->text : m->text, *right = b && !b->next ? b->text : NULL;
        if (m->type == 's' && (right = strchr(left, ' ')) != NULL)
            *right++ = 0;
        if (!left || !right)
            fail("%s: merge %d is neither \"left right\" nor [\"left\", \"right\"]", path, rank + 1);
        int n = alphabet_to_bytes(left, strlen(left), bytes);
        int k = n < 0 ? -1 : alphabet_to_bytes(right, strlen(right), bytes + n);
        int64_t x = k < 0 ? 0 : table_get(&t->ids, bytes, (size_t)n);
        int64_t y = k < 0 ? 0 : table_get(&t->ids, bytes + n, (size_t)k);
        int64_t id = k < 0 ? 0 : table_get(&t->ids, bytes, (size_t)(n + k));
        if (!x || !y || !id)
            fail("%s: merge %d: \"%s\", \"%s\" and what they make are not all in the vocabulary", path, rank + 1, left,
                 right);
        const int pair[2] = {(int)x - 1, (int)y - 1};
        t->merges = (Merge *)grow(t->merges, (size_t)++rank, sizeof(Merge));
        t->merges[rank].rank = rank;
        t->merges[rank].id = (int)id - 1;
        *table_put(&t->pairs, pair, sizeof(pair)) = rank;
    }
}

Tokenizer *tokenizer_load(const char *path) {
    static const Expected in_root[] = {{"normalizer", "null", "null"}};
    static const Expected in_words[] = {
        {"type", "ByteLevel", "ByteLevel"}, {"use_regex", "true", "null"}, {"add_prefix_space", "false", "null"}};
    static const Expected in_model[] = {{"type", "BPE", "null"},
                                        {"dropout", "null", "0"},
                                        {"continuing_subword_prefix", "null", ""},
                                        {"end_of_word_suffix", "null", ""},
                                        {"byte_fallback", "false", "null"},
                                        {"ignore_merges", "false", "null"}};
    Tokenizer *t = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    t->json = read_file(path, &t->json_size);
    Json *root = json_parse(t->json, t->json_size, path);
    const Json *words = json_get(root, "pre_tokenizer"), *list = json_get(words, "pretokenizers");
    if (list && list->child && !list->child->next) // a sequence of one
        words = list->child;
    const Json *model = json_get(root, "model"), *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    check_members(path, "file's", root, in_root, sizeof(in_root));
    check_members(path, "model's", model, in_model, sizeof(in_model));
    check_members(path, "pre_tokenizer's", words, in_words, sizeof(in_words));
    if (!vocab || vocab->type != 'o' || !merges || merges->type != 'a')
        fail("%s: not a tokenizer.json: expected a \"model\" with an object \"vocab\" and a list \"merges\"", path);
    char *bytes = (char *)allocate(t->json_size, 1); // room for any token
    read_vocabulary(t, path, vocab, json_get(root, "added_tokens"), bytes);
    read_merges(t, path, merges, bytes);
    free(bytes);
    json_free(root);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = (int)table_get(&t->ids, &byte, 1) - 1;
        if (t->byte_id[b] < 0)
            fail("%s: byte 0x%02x has no token; a byte-level vocabulary has all 256", path, b);
    }
    t->eot = (int)table_get(&t->ids, "<|endoftext|>", 13) - 1;
    if (t->eot < 0)
        fail("%s: the vocabulary has no <|endoftext|>", path);
    t->added = (int *)grow(t->added, (size_t)t->added_count, sizeof(int));
    t->added[t->added_count++] = t->eot; // also where it is in "vocab" only
    for (int i = 0; i < t->added_count; i++)
        t->added_first[(unsigned char)t->text[t->added[i]][0]] = 1;
    t->class_of = character_classes();
    t->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return t;
}

// The same tokenizer for another thread: the tables are t's, which must outlive it; only the cache is its own.
Tokenizer *tokenizer_share(const Tokenizer *t) {
    Tokenizer *mine = (Tokenizer *)allocate(1, sizeof(Tokenizer));
    *mine = *t;
    mine->shared = 1;
    mine->cache = (CachedWord *)allocate(CACHED_WORDS, sizeof(CachedWord));
    return mine;
}

void tokenizer_free(Tokenizer *t) {
    if (t && !t->shared) {
        free(t->json);
        free(t->text);
        free(t->length);
        free(t->merges);
        free(t->added);
        free(t->class_of);
        table_free(&t->ids);
        table_free(&t->pairs);
    }
    if (t)
        free(t->cache);
    free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. The data loader
//
// Token files are llm.c's: a header of 256 int32 (magic, version, number of tokens), then the tokens as uint16. They are
// mapped, not read, so they may be larger than memory. A file is cut into windows of T tokens (and the next token, the
// last target); an epoch visits every window of every file once, in an order that the seed and the epoch fix, and each
// epoch shifts the cuts within what a file has left over.

#define TOKENS_MAGIC 20240520

typedef struct Shard {
    char *path;
    void *map;
    size_t map_size;
    const uint16_t *tokens;
    int count;       // tokens
    long first, end; // its windows are first..end of all
} Shard;

typedef struct Data {
    Shard *shards;
    int shard_count, T, vocab;
    long windows;
    double tokens;
    uint64_t seed;
    long epoch;      // which order[] is made for
    uint32_t *order; // (windows)
} Data;

int compare_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Maps dir/name and checks all that its header promises.
void shard_open(Shard *s, const char *path, int T) {
    s->path = strdup(path);
    int file = open(path, O_RDONLY | O_NONBLOCK); // a pipe of that name would wait for ever
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0)
        fail("%s: cannot open: %s", path, strerror(errno));
    s->map_size = (size_t)info.st_size;
    if (!S_ISREG(info.st_mode) || s->map_size < 1024)
        fail("%s: not a token file: expected a header of 1024 bytes, found %zu bytes", path, s->map_size);
    s->map = mmap(NULL, s->map_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (s->map == MAP_FAILED)
        fail("%s: cannot map: %s", path, strerror(errno));
    close(file);
    int32_t header[3];
    memcpy(header, s->map, sizeof(header));
    if (header[0] != TOKENS_MAGIC || header[1] != 1)
        fail("%s: not a token file: expected magic %d and version 1, found %d and %d", path, TOKENS_MAGIC, header[0],
             header[1]);
    if (header[2] < 0 || 1024 + 2 * (size_t)header[2] != s->map_size)
        fail("%s: damaged: the header says %d tokens, which is %zu bytes; the file has %zu", path, header[2],
             1024 + 2 * (size_t)(header[2] < 0 ? 0 : header[2]), s->map_size);
    s->tokens = (const uint16_t *)((const char *)s->map + 1024);
    s->count = header[2];
    s->end = s->count > T ? (s->count - 1) / T : 0;
}

// All files of dir whose name holds `kind` ("train" or "val") and ends in .bin, in order of name.
Data *data_open(const char *dir, const char *kind, int T, int vocab, uint64_t seed) {
    Data *d = (Data *)allocate(1, sizeof(Data));
    DIR *list = opendir(dir);
    if (!list)
        fail("%s: cannot open the data folder: %s", dir, strerror(errno));
    char **names = NULL;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
        size_t n = strlen(entry->d_name);
        if (n < 4 || strcmp(entry->d_name + n - 4, ".bin") || !strstr(entry->d_name, kind))
            continue;
        names = (char **)reallocate(names, (size_t)d->shard_count + 1, sizeof(char *));
        names[d->shard_count++] = strdup(entry->d_name);
    }
    closedir(list);
    if (!d->shard_count)
        fail("%s: no *%s*.bin there; data/tinystories.sh and data/tokenize make such folders", dir, kind);
    qsort(names, (size_t)d->shard_count, sizeof(char *), compare_text);
    d->shards = (Shard *)allocate((size_t)d->shard_count, sizeof(Shard));
    for (int i = 0; i < d->shard_count; i++) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        shard_open(&d->shards[i], path, T);
        d->shards[i].first = d->windows;
        d->windows = d->shards[i].end += d->windows;
        d->tokens += d->shards[i].count;
        free(names[i]);
    }
    free(names);
    if (!d->windows)
        fail("%s: the *%s*.bin files are too short: a window takes --seq %d tokens and one more", dir, kind, T);
    if (d->windows > UINT32_MAX)
        fail("%s: more than %u windows; a larger --seq makes fewer", dir, UINT32_MAX);
    d->T = T;
    d->vocab = vocab;
    d->seed = seed;
    d->epoch = -1;
    return d;
}

// A number that another text, or the same one in other files, would hardly have: of sizes and some thousand tokens.
double data_fingerprint(const Data *d) {
    uint64_t h = 0;
    for (int i = 0; i < d->shard_count; i++) {
        const Shard *s = &d->shards[i];
        h = hash64(h ^ (uint64_t)s->count);
        for (int k = 0; k < 4096 && s->count; k++)
            h = hash64(h ^ s->tokens[hash64((uint64_t)k) % (uint64_t)s->count]);
    }
    return (double)(h >> 12); // exact in JSON
}

// How often each of the first tokens comes, up to ten million of them. (vocab), to be freed.
double *data_frequency(const Data *d, int vocab) {
    double *frequency = (double *)allocate(vocab, sizeof(double));
    int left = 10000000;
    for (int i = 0; i < d->shard_count; i++) {
        for (int k = 0; k < d->shards[i].count && left-- > 0; k++)
            frequency[min_int(d->shards[i].tokens[k], vocab - 1)] += 1;
    }
    return frequency;
}

void data_close(Data *d) {
    for (int i = 0; i < d->shard_count; i++) {
        munmap(d->shards[i].map, d->shards[i].map_size);
        free(d->shards[i].path);
    }
    free(d->shards);
    free(d->order);
    free(d);
}

// inputs (T), targets (T): window w, its cuts shifted as in this epoch; epoch -1: not shifted.
void data_window(const Data *d, long w, long epoch, int *inputs, int *targets) {
    const Shard *s = d->shards;
    while (w >= s->end)
        s++;
    int T = d->T, left = (s->count - 1) % T;
    size_t at = (size_t)(w - s->first) * (size_t)T;
    if (epoch >= 0)
        at += random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, (uint64_t)(s - d->shards) + 1) % (uint64_t)(left + 1);
    for (int t = 0; t <= T; t++) {
        int token = s->tokens[at + (size_t)t];
        if (token >= d->vocab)
            fail("%s: token %zu is %d, but the tokenizer has %d; was the file made with another one?", s->path, at + t, token,
                 d->vocab);
        if (t < T)
            inputs[t] = token;
        if (t > 0)
            targets[t - 1] = token;
    }
}

// The sequences number first.. first+B-1 of training, counted from the start of the run. inputs, targets (B,T)
void data_batch(Data *d, long first, int B, int *inputs, int *targets) {
    for (int b = 0; b < B; b++) {
        long epoch = (first + b) / d->windows;
        if (epoch != d->epoch) { // Fisher and Yates's shuffle
            d->order = (uint32_t *)reallocate(d->order, (size_t)d->windows, sizeof(uint32_t));
            uint64_t stream = random_stream(d->seed, RANDOM_ORDER, (uint64_t)epoch, 0);
            for (long i = 0; i < d->windows; i++) {
                long j = (long)(random_uniform(stream, (uint64_t)i) * (double)(i + 1));
                d->order[i] = d->order[j];
                d->order[j] = (uint32_t)i;
            }
            d->epoch = epoch;
        }
        size_t at = (size_t)b * (size_t)d->T;
        data_window(d, d->order[(first + b) % d->windows], epoch, inputs + at, targets + at);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 11. Checkpoints
//
// A checkpoint is a Hugging Face model directory: config.json, model.safetensors, tokenizer.json and two small files
// about the tokenizer and generation, which transformers opens as they are; beside them optimizer.safetensors and
// trainer_state.json, to go on. A new one is written under another name, flushed to the disk and renamed, and only then
// does the link `latest` move: whenever the machine stops, the last checkpoint is whole.

typedef struct Part { // a slice of a weight under its Hugging Face name
    char name[96];
    size_t offset;  // in the model's memory
    int rows, cols; // rows 0: one dimension
} Part;

// What Mixtral's and Llama's files call each kind of tensor, and its row blocks where they store these apart. Weights that
// these have not get names in their manner.
const char *const part_names[][3] = {
    {"input_layernorm.weight"},
    {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    {"self_attn.o_proj.weight"},
    {"post_attention_layernorm.weight"},
    {"block_sparse_moe.gate.weight"},
    {"block_sparse_moe.experts.%d.w1.weight", "block_sparse_moe.experts.%d.w3.weight"},
    {"block_sparse_moe.experts.%d.w2.weight"},
    {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
    {"mlp.down_proj.weight"},
    {"block_sparse_moe.split.weight"},
    {"block_sparse_moe.merge.weight"},
    {"block_sparse_moe.project.weight"},
    {"block_sparse_moe.gate.e_score_correction_bias"},
    {"block_sparse_moe.gate.moving_average"},
    {"block_sparse_moe.gate.level"},
    {"block_sparse_moe.table"},
    {"model.embed_tokens.weight"},
    {"model.norm.weight"},
    {"lm_head.weight"},
    {"model.router_gru.weight_ih"},
    {"model.router_gru.weight_hh"},
    {"model.router_gru.bias_ih"},
    {"model.router_gru.bias_hh"},
};

void add_part(Part **list, int *count, const Tensor *t, const char *format, int expert, size_t *offset, int rows, int cols) {
    if (*count % 256 == 0)
        *list = (Part *)reallocate(*list, (size_t)*count + 256, sizeof(Part));
    Part *part = &(*list)[(*count)++];
    char name[72];
    snprintf(name, sizeof(name), format, expert);
    if (t->layer < 0)
        snprintf(part->name, sizeof(part->name), "%s", name);
    else
        snprintf(part->name, sizeof(part->name), "model.layers.%d.%s", t->layer, name);
    part->offset = *offset;
    part->rows = tensor_is_vector(t) ? 0 : rows;
    part->cols = cols;
    *offset += (size_t)rows * (size_t)cols;
}

// All weights of a model as Hugging Face files hold them.
Part *model_parts(const Config *c, int *count) {
    Tensor *tensors = (Tensor *)allocate((size_t)c->layers * LAYER_TENSORS + KINDS, sizeof(Tensor));
    int n = model_tensors(c, tensors), D = c->dim / c->heads;
    Part *list = NULL;
    *count = 0;
    for (int i = 0; i < n; i++) {
        const Tensor *t = &tensors[i];
        const char *const *names = part_names[t->kind];
        int expert = tensor_is_expert(t), dense = t->kind == DENSE_IN || t->kind == DENSE_OUT;
        size_t offset = t->place;
        for (int e = 0; e < (expert ? c->experts : 1); e++) {
            int F = expert_width(c, e), rows = t->shape[1], cols = t->shape[2], blocks = 1;
            if (t->kind == W_IN || t->kind == DENSE_IN) {
                blocks += is_gated(t->kind == W_IN ? expert_activation(c, e) : dense_activation(c, t->layer));
                rows = t->kind == W_IN ? F : rows / blocks;
            } else if (t->kind == W_OUT) {
                cols = F;
            } else if (t->kind == QKV) {
                blocks = 3;
            }
            for (int block = 0; block < blocks; block++) {
                char format[80];
                const char *name =
                    names[block + (t->kind == DENSE_IN && blocks == 1)]; // an ungated dense layer's is its up_proj
                snprintf(format, sizeof(format), "%s%s", dense && is_moe(c, t->layer) ? "mlp.shared_experts." : "",
                         name + (dense && is_moe(c, t->layer) ? 4 : 0));
                add_part(&list, count, t, format, e, &offset,
                         t->kind == QKV ? (block ? c->kv_heads : c->heads) * D : rows, cols);
            }
        }
    }
    free(tensors);
    return list;
}

FILE *open_for_writing(const char *dir, const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file)
        fail("%s: cannot create: %s", path, strerror(errno));
    return file;
}

// Returns once the file's bytes are on the disk.
void await_disk(FILE *file, const char *dir, const char *name) {
    if (fflush(file) != 0 || ferror(file) || (sync_file(fileno(file)) != 0 && errno != EINVAL))
        fail("%s/%s: cannot write: %s", dir, name, strerror(errno));
}

// Closes it once its bytes are there.
void close_written(FILE *file, const char *dir, const char *name) {
    await_disk(file, dir, name);
    fclose(file);
}

// Writes the parts of `copies` memories, each under its prefix. The format: the header's length as 8 bytes, the header in
// JSON, then the numbers. https://github.com/huggingface/safetensors
void write_safetensors(const char *dir, const char *name, const Part *parts, int count, real *const *memory,
                       const char *const *prefix, int copies) {
    char *header = NULL;
    size_t size = 0, at = 0;
    FILE *text = open_memstream(&header, &size);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int copy = 0; copy < copies; copy++) {
        for (int i = 0; i < count; i++) {
            const Part *p = &parts[i];
            size_t bytes = (size_t)max_int(p->rows, 1) * (size_t)p->cols * sizeof(real);
            fprintf(text, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", prefix[copy], p->name,
                    sizeof(real) == 8 ? "F64" : "F32");
            if (p->rows)
                fprintf(text, "%d,", p->rows);
            fprintf(text, "%d],\"data_offsets\":[%zu,%zu]}", p->cols, at, at + bytes);
            at += bytes;
        }
    }
    fprintf(text, "}");
    fflush(text);
    while (size % 8) {
        fputc(' ', text);
        fflush(text);
    }
    fclose(text);
    FILE *file = open_for_writing(dir, name);
    uint64_t length = size;
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, size, file);
    const size_t most = 1 << 22; // numbers to write at once
    size_t written = 0;          // since the disk was last waited for
    for (int copy = 0; copy < copies; copy++) {
        for (int i = 0; i < count; i++) {
            size_t n = (size_t)max_int(parts[i].rows, 1) * (size_t)parts[i].cols, piece;
            for (size_t done = 0; done < n; done += piece) {
                piece = n - done < most ? n - done : most;
                ranks_tick();
                fwrite(memory[copy] + parts[i].offset + done, sizeof(real), piece, file);
                written += piece;
                if (MANY && written >= most) { // or the system's buffers fill up, and fwrite waits, and answers nobody
                    await_disk(file, dir, name);
                    written = 0;
                }
            }
        }
    }
    free(header);
    close_written(file, dir, name);
}

typedef struct Safetensors { // a mapped file
    char path[4200];
    const char *map, *data;
    size_t size, data_size;
    Json *header;
} Safetensors;

void safetensors_open(Safetensors *s, const char *path) {
    snprintf(s->path, sizeof(s->path), "%s", path);
    int file = open(path, O_RDONLY);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0)
        fail("%s: cannot open: %s", path, strerror(errno));
    s->size = (size_t)info.st_size;
    void *map = s->size >= 8 ? mmap(NULL, s->size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (map == MAP_FAILED)
        fail("%s: not a safetensors file: %zu bytes", path, s->size);
    close(file);
    s->map = (const char *)map;
    uint64_t length;
    memcpy(&length, s->map, 8);
    if (length > s->size - 8)
        fail("%s: damaged: its header should have %llu bytes, the whole file has %zu", path, (unsigned long long)length,
             s->size);
    s->header = json_parse(s->map + 8, (size_t)length, path);
    s->data = s->map + 8 + length;
    s->data_size = s->size - 8 - (size_t)length;
}

void safetensors_close(Safetensors *s) {
    munmap((void *)s->map, s->size);
    json_free(s->header);
}

// One number of the types that model files use: F64, F32, F16, BF16.
double decode_number(const char *from, int type) {
    if (type == 0) {
        double number;
        memcpy(&number, from, 8);
        return number;
    }
    float number;
    uint32_t bits = 0;
    if (type == 1) {
        memcpy(&bits, from, 4);
    } else if (type == 2) { // sign, 5 bits of exponent, 10 of mantissa
        uint16_t half;
        memcpy(&half, from, 2);
        int exponent = half >> 10 & 31, mantissa = half & 1023;
        double value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(mantissa, -24)
                                       : ldexp(mantissa + 1024, exponent - 25);
        return half >> 15 ? -value : value;
    } else { // the upper half of a float
        uint16_t half;
        memcpy(&half, from, 2);
        bits = (uint32_t)half << 16;
    }
    memcpy(&number, &bits, 4);
    return number;
}

// Reads rows x cols numbers (rows 0: one dimension) of the tensor `name` to `to`. Where the file's has more dimensions than
// two, the first ones count as one; it should have `all` rows, of which those from `first` on are taken. Returns 0 where
// the file has no such name.
int read_tensor(const Safetensors *s, const char *name, int rows, int cols, int all, int first, real *to) {
    const Json *t = json_get(s->header, name);
    if (!t)
        return 0;
    const Json *dtype = json_get(t, "dtype"), *shape = json_get(t, "shape"), *range = json_get(t, "data_offsets");
    const char *const types[] = {"F64", "F32", "F16", "BF16", NULL};
    const int sizes[] = {8, 4, 2, 2};
    int type = dtype && dtype->type == 's' ? find_word(types, dtype->text) : -1;
    if (type < 0)
        fail("%s: %s has type %s; expected F64, F32, F16 or BF16", s->path, name,
             dtype && dtype->text ? dtype->text : "none");
    char found[128] = "no shape";
    double found_rows = 1, found_cols = 0;
    for (const Json *d = shape ? shape->child : NULL; d; d = d->next) {
        size_t used = d == shape->child ? 0 : strlen(found);
        snprintf(found + used, sizeof(found) - used, "%s%.0f", used ? " x " : "", d->number);
        if (d->next)
            found_rows *= d->number;
        else
            found_cols = d->number;
    }
    if (found_cols != cols || found_rows != max_int(all, 1))
        fail("%s: %s is %s; config.json makes it %.0d%s%d", s->path, name, found, all, all ? " x " : "", cols);
    const Json *from = range ? range->child : NULL, *end = from ? from->next : NULL;
    size_t width = (size_t)sizes[type], count = (size_t)max_int(rows, 1) * (size_t)cols;
    size_t bytes = (size_t)max_int(all, 1) * (size_t)cols * width;
    if (!end || !(from->number >= 0) || !(end->number <= (double)s->data_size) || end->number - from->number != (double)bytes)
        fail("%s: damaged: %s should have %zu bytes within the file's %zu", s->path, name, bytes, s->data_size);
    const char *p = s->data + (size_t)from->number + (size_t)first * (size_t)cols * width;
    if ((type == 0 && sizeof(real) == 8) || (type == 1 && sizeof(real) == 4)) {
        memcpy(to, p, count * width);
    } else {
        for (size_t i = 0; i < count; i++)
            to[i] = (real)decode_number(p + i * width, type);
    }
    return 1;
}

// The class of transformers that computes what this configuration does, or "" where there is none.
const char *matching_class(const Config *c) {
    int last, moe = moe_layers(c, &last), plain = c->activation == SWIGLU;
    if (moe == 0)
        return dense_activation(c, 0) == SWIGLU ? "LlamaForCausalLM" : "";
    plain &= !c->shared && !c->mixed && c->score == SOFTMAX && c->select == TOP_K && !c->group_topk &&
             c->routers == 1 && c->scale == 1;
    plain &= !c->noise && c->subtokens == 1 && !c->recurrent && !c->history_decay && !c->bias_rate &&
             !c->eval_capacity_factor;
    return plain && moe == c->layers && c->gate == RENORMALIZED ? "MixtralForCausalLM" : "";
}

// "name":value for every option but those of this call alone.
void write_options(FILE *file, const Config *config) {
    Config whole = *config, *c = &whole;
    c->batch *= ranks.size; // so that it does not matter how many ranks go on with it
    const char *comma = "";
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->kind == '-' || o->when == RUN)
            continue;
        char buffer[64];
        const char *text = option_text(c, o, buffer);
        fprintf(file, "%s\"%s\":", comma, o->name);
        if (o->kind == 's' || o->kind == 'e')
            json_write_string(file, text, strlen(text));
        else
            fputs(o->kind == 'f' ? (atoi(text) ? "true" : "false") : text, file);
        comma = ",";
    }
}

void write_config(const char *dir, const Config *c, int eot) {
    const char *name = matching_class(c);
    int moe = !strcmp(name, "MixtralForCausalLM"), dense = !strcmp(name, "LlamaForCausalLM");
    FILE *f = open_for_writing(dir, "config.json");
    fprintf(f, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n", *name ? name : "TrainMoeForCausalLM",
            moe ? "mixtral" : dense ? "llama" : "train_moe");
    if (!*name)
        fprintf(f, "  \"comment\": \"no class of transformers has this router; the object train_moe says what it "
                   "computes\",\n");
    fprintf(f, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n", c->vocab, c->dim,
            dense ? dense_width(c, 0) : c->ffn);
    fprintf(f, "  \"num_hidden_layers\": %d,\n  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n", c->layers,
            c->heads, c->kv_heads);
    fprintf(f, "  \"head_dim\": %d,\n  \"hidden_act\": \"%s\",\n  \"max_position_embeddings\": %d,\n", c->dim / c->heads,
            c->activation == SWIGLU ? "silu" : c->activation == RELU ? "relu" : "gelu", c->seq);
    char a[64], b[64];
    fprintf(f, "  \"rms_norm_eps\": %s,\n  \"rope_theta\": %s,\n", number_text(c->norm_eps, a),
            number_text(c->rope_theta, b));
    if (moe) // transformers' balance loss is K at balance, ours 1
        fprintf(f, "  \"num_local_experts\": %d,\n  \"num_experts_per_tok\": %d,\n  \"router_aux_loss_coef\": %s,\n",
                c->experts, c->topk, number_text(c->aux_weight / c->topk, a));
    const char *type = sizeof(real) == 8 ? "float64" : "float32";
    fprintf(f, "  \"tie_word_embeddings\": %s,\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n",
            c->untied ? "false" : "true", eot, eot);
    fprintf(f, "  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\",\n", type, type); // the newer and the older name
    fprintf(f, "  \"train_moe\": {");
    write_options(f, c);
    fprintf(f, "}\n}\n");
    close_written(f, dir, "config.json");
}

// A member that has to be there; `type` as in Json, 'i' for a whole number.
const Json *expect_member(const Json *object, const char *name, char type, const char *path) {
    const Json *m = json_get(object, name);
    if (!m || m->type != (type == 'i' ? 'n' : type) || (type == 'i' && m->number != floor(m->number)))
        fail("%s: expected %s \"%s\", found %s", path,
             type == 'o' ? "an object" : type == 's' ? "a text" : type == 'n' ? "a number" : "a whole number", name,
             m ? "something else" : "none");
    return m;
}

// The options in a JSON object of a file. Unknown ones are of a later version and passed over.
void read_options(Config *c, const Json *object, const char *path) {
    for (const Json *m = object->child; m; m = m->next) {
        char number[64];
        int i = find_option(m->key);
        if (i >= 0)
            set_option(c, &options[i], m->type == 's' ? keep_text(m->text) : m->type == 'n'   ? number_text(m->number, number)
                                              : m->type == 't' ? "1"
                                                               : "0",
                       path);
    }
}

// What dir/config.json says of the model: ours has every option in it, of Hugging Face's Mixtral and Llama we take what
// we can compute and refuse the rest.
void config_from_directory(Config *c, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/config.json", dir);
    size_t size;
    char *text = read_file(path, &size);
    Json *json = json_parse(text, size, path);
    c->vocab = (int)expect_member(json, "vocab_size", 'i', path)->number;
    if (c->vocab < 1 || c->vocab > 1 << 24)
        fail("%s: vocab_size %d is not possible", path, c->vocab);
    const Json *ours = json_get(json, "train_moe"), *type = expect_member(json, "model_type", 's', path);
    if (ours) {
        read_options(c, expect_member(json, "train_moe", 'o', path), path);
        find_recipe(c->recipe);
    } else {
        int moe = !strcmp(type->text, "mixtral");
        if (!moe && strcmp(type->text, "llama"))
            fail("%s: model_type is %s; expected mixtral, llama, or a checkpoint of train_moe", path, type->text);
        memset(c->given, 0, sizeof(c->given));
        config_recipe(c, moe ? "mixtral" : "dense");
        const char *const names[][2] = {{"hidden_size", "dim"},           {"num_hidden_layers", "layers"},
                                        {"num_attention_heads", "heads"}, {"num_key_value_heads", "kv-heads"},
                                        {"intermediate_size", "ffn"},     {"max_position_embeddings", "seq"},
                                        {"num_local_experts", "experts"}, {"num_experts_per_tok", "topk"}};
        c->topk = 1; // a dense layer is K*F wide
        c->shared = 0;
        for (int i = 0; i < (moe ? 8 : 6); i++) {
            char number[64];
            set_option(c, &options[find_option(names[i][1])],
                       number_text(expect_member(json, names[i][0], 'i', path)->number, number), path);
        }
        c->seq = min_int(c->seq, 4096); // the cache of generation
        c->norm_eps = expect_member(json, "rms_norm_eps", 'n', path)->number;
        const Json *rope = json_get(json, "rope_parameters"), *scaling = json_get(json, "rope_scaling"); // newer, older form
        c->rope_theta = expect_member(rope && rope->type == 'o' ? rope : json, "rope_theta", 'n', path)->number;
        const Json *kind = json_get(rope && rope->type == 'o' ? rope : scaling, "rope_type");
        if ((kind && kind->text && strcmp(kind->text, "default")) || (!kind && scaling && scaling->type == 'o'))
            fail("%s: its rotary positions are scaled, which this program does not compute", path);
        const Json *tied = json_get(json, "tie_word_embeddings"), *width = json_get(json, "head_dim");
        const Json *act = json_get(json, "hidden_act"), *window = json_get(json, "sliding_window");
        c->untied = !tied || tied->type != 't';
        if (act && act->text && strcmp(act->text, "silu"))
            fail("%s: hidden_act is %s; expected silu", path, act->text);
        if (width && width->type == 'n' && width->number * c->heads != c->dim)
            fail("%s: head_dim %.0f is not hidden_size %d / num_attention_heads %d", path, width->number, c->dim, c->heads);
        if (window && window->type == 'n' && window->number < c->seq)
            c->seq = (int)window->number;
        const char *const biases[] = {"attention_bias", "mlp_bias"};
        for (int i = 0; i < 2; i++) {
            if (json_get(json, biases[i]) && json_get(json, biases[i])->type == 't')
                fail("%s: %s is true; this model has no biases", path, biases[i]);
        }
    }
    json_free(json);
    free(text);
}

// Joins what a checkpoint says (c) with what the command line asked for: options of kinds not in `adopted` are as asked;
// of the others the command line's count where given, but where `fixed` they may not differ. Bits: 1 << MODEL...
void join_options(Config *c, const Config *asked, int adopted, int fixed, const char *path) {
    for (int i = 0; i < option_count; i++) {
        const Option *o = &options[i];
        if (o->kind == '-' || (!asked->given[i] && adopted >> o->when & 1))
            continue;
        char a[64], b[64];
        const char *mine = option_text(asked, o, a), *theirs = option_text(c, o, b);
        if (fixed >> o->when & 1 && asked->given[i] && strcmp(mine, theirs))
            usage_fail("--%s %s: in %s it is %s, and it cannot change now", o->name, mine, path, theirs);
        size_t size = o->kind == 's' ? sizeof(char *) : o->kind == 'd' ? sizeof(double) : sizeof(int);
        memcpy((char *)c + o->offset, (const char *)asked + o->offset, size);
    }
    memcpy(c->given, asked->given, sizeof(c->given));
}

// Reads a part under its own name or, as transformers 5 can store Mixtral's experts, out of one tensor of all experts.
int read_part(const Safetensors *s, const char *name, const Part *p, int experts, real *to) {
    int layer, expert, w, rows = p->rows, used = 0;
    char fused[96];
    if (read_tensor(s, name, rows, p->cols, rows, 0, to))
        return 1;
    if (sscanf(name, "model.layers.%d.block_sparse_moe.experts.%d.w%d%n", &layer, &expert, &w, &used) == 3) {
        snprintf(fused, sizeof(fused), "model.layers.%d.mlp.experts.%s", layer, w == 2 ? "down_proj" : "gate_up_proj");
        int each = w == 2 ? rows : 2 * rows;
        return read_tensor(s, fused, rows, p->cols, experts * each, expert * each + (w == 3 ? rows : 0), to);
    }
    if (sscanf(name, "model.layers.%d.block_sparse_moe.gate%n", &layer, &used) == 1 && used) {
        snprintf(fused, sizeof(fused), "model.layers.%d.mlp.gate.weight", layer);
        return read_tensor(s, fused, rows, p->cols, rows, 0, to);
    }
    return 0;
}

// Reads the parts, each under prefix, from dir/name: one file, or those that dir/name.index.json lists.
void read_weights(const char *dir, const char *name, const Part *parts, int count, int experts, const char *prefix,
                  real *memory) {
    char path[4200];
    Safetensors *files = NULL;
    int n = 0;
    snprintf(path, sizeof(path), "%s/%s.index.json", dir, name);
    if (access(path, F_OK) == 0) {
        size_t size;
        char *text = read_file(path, &size), index[4200];
        memcpy(index, path, sizeof(index));
        Json *json = json_parse(text, size, index);
        for (const Json *m = expect_member(json, "weight_map", 'o', index)->child; m; m = m->next) {
            if (m->type != 's')
                fail("%s: the file of %s is not a text", index, m->key);
            snprintf(path, sizeof(path), "%s/%s", dir, m->text);
            int known = 0;
            for (int i = 0; i < n; i++)
                known |= !strcmp(files[i].path, path);
            if (known)
                continue;
            files = (Safetensors *)reallocate(files, (size_t)n + 1, sizeof(Safetensors));
            safetensors_open(&files[n++], path);
        }
        json_free(json);
        free(text);
    } else {
        files = (Safetensors *)allocate(1, sizeof(Safetensors));
        snprintf(path, sizeof(path), "%s/%s", dir, name);
        safetensors_open(&files[n++], path);
    }
    for (int i = 0; i < count; i++) {
        char full[160];
        snprintf(full, sizeof(full), "%s%s", prefix, parts[i].name);
        int found = 0;
        for (int f = 0; f < n && !found; f++)
            found = read_part(&files[f], full, &parts[i], experts, memory + parts[i].offset);
        if (!found)
            fail("%s: there is no %s, which config.json asks for", path, full);
        ranks_tick();
    }
    for (int f = 0; f < n; f++)
        safetensors_close(&files[f]);
    free(files);
}

// ---------------------------------------------------------------------------------------------------------------------
// 12. Generation

// One token at `position`; logits (V) of the next. Keys and values of the last seq positions are in m->cache; a longer
// text forgets its beginning.
void model_generate(Model *m, int token, int position, real *logits) {
    const Config *c = &m->config;
    int C = c->dim, H = c->heads, KV = c->kv_heads, D = C / H, Q = (H + 2 * KV) * D, L = c->layers, width = 2 * KV * D;
    if (!m->one) {
        m->one = model_allocate(c, 1, 0, m->memory[WEIGHTS]);
        m->one->placement = m->placement;
        m->cache = own_reals(m, (size_t)L * c->seq * width);
    }
    Model *one = m->one;
    LayerState *s = one->layers;
    int seen = min_int(position + 1, c->seq), slot = position % c->seq;
    real *scores = one->attention, scale = (real)(1 / sqrt((double)D)); // (seen)
    rope_angles(one->angles, position, 1, D, c->rope_theta);
    one->tokens = &token;
    one->mode = EVAL_MODE;
    for (int r = 0; r < ranks.size; r++) // all ranks go on with the same token
        one->rank_tokens[r] = 1;
    embedding_forward(one->x, m->weights.embed, &token, 1, C);
    for (int l = 0; l < L; l++, s++) {
        const LayerWeights *w = &m->weights.layer[l];
        real *keys = m->cache + (size_t)l * c->seq * width, *values = keys + KV * D; // rows of width numbers
        rmsnorm_forward(s->h1, s->rstd1, one->x, w->norm1, 1, C, c->norm_eps);
        product(s->qkv, along_rows(s->h1, C, NULL), along_rows(w->qkv, C, NULL), 1, Q, C, 0);
        rope(s->qkv, Q, 1, 1, H + KV, D, one->angles, 1);
        memcpy(keys + (size_t)slot * width, s->qkv + H * D, (size_t)width * sizeof(real));
        for (int h = 0; h < H; h++) {
            const real *q = s->qkv + h * D;
            real *out = s->att + h * D;
            int kv = h / (H / KV) * D;
            for (int t = 0; t < seen; t++)
                scores[t] = dot(q, keys + (size_t)t * width + kv, D) * scale;
            softmax(scores, seen);
            memset(out, 0, (size_t)D * sizeof(real));
            for (int t = 0; t < seen; t++) {
                for (int i = 0; i < D; i++)
                    out[i] += scores[t] * values[(size_t)t * width + kv + i];
            }
        }
        product(one->x, along_rows(s->att, C, NULL), along_rows(w->proj, C, NULL), 1, C, C, 1);
        rmsnorm_forward(s->h2, s->rstd2, one->x, w->norm2, 1, C, c->norm_eps);
        ffn_forward(one, l, s, one->x, 1, 1);
    }
    rmsnorm_forward(one->h, one->rstd, one->x, m->weights.norm, 1, C, c->norm_eps);
    product(logits, along_rows(one->h, C, NULL), along_rows(m->weights.head, C, NULL), 1, c->vocab, C, 0);
}

// Draws one of n tokens: logits divided by temperature, of these the top_k likeliest, of these as few of the likeliest as
// hold top_p of the probability (Holtzman et al. 2020). u is uniform in [0,1). temperature 0: the likeliest.
int sample(const real *logits, int n, double temperature, int top_k, double top_p, double u) {
    Ranked *list = (Ranked *)allocate((size_t)n, sizeof(Ranked));
    for (int i = 0; i < n; i++) {
        list[i].score = (double)logits[i];
        list[i].index = i;
    }
    qsort(list, (size_t)n, sizeof(Ranked), compare_ranked);
    int kept = temperature == 0 ? 1 : top_k > 0 ? min_int(top_k, n) : n, chosen = 0;
    double total = 0, sum = 0, top = list[0].score;
    for (int i = 0; i < kept; i++) // from here on score holds the probability, not yet divided by the sum
        total += list[i].score = kept == 1 ? 1 : exp((list[i].score - top) / temperature);
    int nucleus = 0;
    while (nucleus < kept && (nucleus == 0 || sum < top_p * total))
        sum += list[nucleus++].score;
    for (double part = list[0].score; chosen < nucleus - 1 && part <= u * sum; part += list[chosen].score)
        chosen++;
    int id = list[chosen].index;
    free(list);
    return id;
}

// ---------------------------------------------------------------------------------------------------------------------
// 13. The backend: what the trainer below asks of a model
//
// Everything from here on - the training loop, files, log, command line - is the same on every device. A device fills in
// one such table; this file's own is cpu_backend.

typedef struct Backend {
    const char *name;
    Model *(*create)(const Config *config, int tokens, int train, real *weights); // buffers for that many tokens
    void (*release)(Model *model);
    void (*init)(Model *model, const double *frequency);
    void (*forward)(Model *model, const int *inputs, const int *targets, int B, int T, int mode, double grad_scale,
                    long step, long first_token);
    void (*backward)(Model *model);
    void (*update)(Model *model, int step, double lr); // not at all where the gradients' norm is not finite
    void (*losses)(Model *model, double *loss, double *aux, double *norm); // of the step; waits until all is done
    void (*generate)(Model *model, int token, int position, real *logits);
    const RouterStats *(*stats)(const Model *model, int layer);
    const Plan *(*plan)(const Model *model, int layer); // of the last forward pass
    real *(*fetch)(Model *model, int what); // WEIGHTS, GRADS, MOMENT1 or MOMENT2: all numbers, in the host's memory
    void (*store)(Model *model, int what);  // takes over what was changed there
    double (*peak)(void);                   // operations per second that the device can do at most, measured
    void (*device)(char name[128]);
    double (*memory)(void); // bytes of memory of its own; 0: it has the host's
} Backend;

void cpu_forward(Model *m, const int *inputs, const int *targets, int B, int T, int mode, double grad_scale, long step,
                 long first_token) {
    model_forward(m, inputs, targets, B, T, mode, grad_scale, step, first_token);
}

void cpu_update(Model *m, int step, double lr) {
    await_sums();
    m->norm = gradient_norm(m);
    if (isfinite(m->norm))
        model_update(m, step, lr, m->norm);
}

void model_losses(Model *m, double *loss, double *aux, double *norm) {
    double both[2] = {m->loss, m->total_aux};
    sum_over_ranks(both, 2);
    *loss = both[0];
    *aux = both[1];
    *norm = m->norm;
}

const RouterStats *model_stats(const Model *m, int layer) {
    return &m->stats[layer];
}

const Plan *model_plan(const Model *m, int layer) {
    return &m->layers[layer].plan;
}

// What all ranks have, gathered by rank 0 in the order of a single process; the others have but room for it.
real *model_fetch(Model *m, int what) {
    real *whole = m->whole_memory[what], *mine = m->memory[what], *all = NULL;
    size_t slice = m->slice_end - m->slice;
    int moments = what == MOMENT1 || what == MOMENT2;
    if (!MANY)
        return mine;
    if (!whole)
        whole = m->whole_memory[what] = allocate_reals(m->whole);
    if (moments)
        all = (real *)gather_parts(mine, slice * sizeof(real), ranks.size, NULL);
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        if (tensor_is_expert(t))
            gather_parts(mine + (moments ? moment_place(m, t->offset) : t->offset), t->size * sizeof(real), ranks.ep,
                         whole + t->place);
        else if (!ranks.rank)
            memcpy(whole + t->place, (moments ? all : mine) + t->offset, t->size * sizeof(real));
    }
    free(all);
    return whole;
}

// Takes this rank's part over from model_fetch's memory, after that was filled with what a single process would have.
void model_store(Model *m, int what) {
    const real *whole = m->whole_memory[what];
    int moments = what == MOMENT1 || what == MOMENT2;
    for (int i = 0; MANY && i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        for (size_t j = 0; j < t->size; j++) {
            size_t at = t->offset + j;
            if (!moments || tensor_is_expert(t) || (at >= m->slice && at < m->slice_end))
                m->memory[what][moments ? moment_place(m, at) : at] = whole[t->place + t->first + j];
        }
    }
}

void forget_whole(Model *m) {
    for (int what = 0; what < 4; what++) {
        free(m->whole_memory[what]);
        m->whole_memory[what] = NULL;
    }
}

volatile real peak_result[64]; // or the compiler would leave out what nobody reads

// Multiply-adds in registers alone, on all threads: a rate that no program can pass on this machine today.
double measured_peak(void) {
    const int rounds = 1 << 16;
    double best = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        double start = seconds();
#pragma omp parallel
        {
            vec sum[12], x = {0}, y = {0};
            x += (real)0.999; // towards y/(1-x), so that nothing overflows or becomes subnormal
            y += (real)1;
            for (int i = 0; i < 12; i++)
                sum[i] = y + (real)i;
            for (int k = 0; k < rounds; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < 12; i++)
                    sum[i] = sum[i] * x + y;
            }
            for (int i = 1; i < 12; i++)
                sum[0] += sum[i];
            peak_result[thread_number() % 64] = dot((real *)&sum[0], (real *)&sum[1], LANES);
        }
        best = fmax(best, 2.0 * 12 * LANES * rounds * thread_count() / (seconds() - start));
    }
    return best;
}

// The processor's name, as far as the system tells.
void cpu_name(char name[128]) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, 128, "cpu");
    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "model name : %127[^\n]", name) == 1)
            break;
    }
    if (file)
        fclose(file);
}

double cpu_memory(void) {
    return 0;
}

const Backend cpu_backend = {"cpu",          model_allocate, model_free,     model_init,    cpu_forward, model_backward,
                             cpu_update,     model_losses,   model_generate, model_stats,   model_plan,  model_fetch,
                             model_store,    measured_peak,  cpu_name,       cpu_memory};

// ---------------------------------------------------------------------------------------------------------------------
// 14. A run: its directory, log, checkpoints and progress

typedef struct Run {
    Config config;
    const Backend *backend;
    Model *model;
    Tokenizer *tokenizer;
    Data *train, *val;
    int *inputs, *targets; // (B,T)
    char out[2048];
    FILE *log, *trace;
    int step;          // steps done
    double peak;       // operations per second
    double val_loss, val_bpb, fluctuation;
    double flops;      // per token
    double before;     // bytes of memory that the process held before it had a model
    int trained;       // steps since this process began
    unsigned char *warned; // (L) what a warning was printed of: 1 a dead expert, 2 an uneven load
    uint64_t *probe;   // (L, tokens) the sets of experts chosen for the first validation batch at the last evaluation
} Run;

#define IDLE_STEPS 100 // without a token, after which an expert is called dead

volatile sig_atomic_t stop_asked = 0;

void ask_stop(int signal_number) {
    (void)signal_number;
    stop_asked = 1;
}

void check_log(Run *run) { // and sends it on its way
    if (fflush(run->log) != 0)
        fail("%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
}

// One object of the log; format continues after its type.
__attribute__((format(printf, 3, 4))) void log_line(Run *run, const char *type, const char *format, ...) {
    va_list args;
    fprintf(run->log, "{\"type\":\"%s\",", type);
    va_start(args, format);
    vfprintf(run->log, format, args);
    va_end(args);
    fprintf(run->log, "}\n");
    check_log(run);
}

int has_file(const char *dir, const char *name) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

void write_text(const char *dir, const char *name, const char *text, size_t size) {
    FILE *file = open_for_writing(dir, name);
    fwrite(text, 1, size, file);
    close_written(file, dir, name);
}

// The smallest step of the checkpoint-STEP folders in out, -1 where there is none; *count says how many there are.
long smallest_checkpoint(const char *out, int *count) {
    long step, smallest = -1;
    char rest;
    DIR *dir = opendir(out);
    *count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (sscanf(entry->d_name, "checkpoint-%ld%c", &step, &rest) != 1)
            continue;
        (*count)++;
        if (smallest < 0 || step < smallest)
            smallest = step;
    }
    if (dir)
        closedir(dir);
    return smallest;
}

void sync_directory(const char *path) {
    int dir = open(path, O_RDONLY);
    if (dir >= 0) {
        sync_file(dir);
        close(dir);
    }
}

void save_checkpoint(Run *run) {
    const Config *c = &run->config;
    const Model *shape = run->model;
    real *weights = run->backend->fetch(run->model, WEIGHTS);
    real *moments[2] = {run->backend->fetch(run->model, MOMENT1), run->backend->fetch(run->model, MOMENT2)};
    if (ranks.rank) { // rank 0 has it all and writes it as a single process would
        forget_whole(run->model);
        ranks_meet();
        return;
    }
    for (size_t i = 0; i < shape->whole; i++) {
        if (!isfinite(weights[i]))
            fail("step %d: a weight is %g; it is not saved, and the last checkpoint in %s is as it was", run->step,
                 (double)weights[i], run->out);
    }
    char final[4096], link[4200], name[64];
    snprintf(name, sizeof(name), "checkpoint-%d", run->step);
    snprintf(final, sizeof(final), "%s/%s", run->out, name);
    snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-checkpoint", run->out);
    remove_tree(unfinished_path); // of a run that was killed
    if (mkdir(unfinished_path, 0777) != 0)
        fail("%s: cannot create: %s", unfinished_path, strerror(errno));
    const char *dir = unfinished_path;
    int part_count;
    Part *parts = model_parts(c, &part_count);
    const char *const plain[] = {""}, *const moment_names[] = {"exp_avg.", "exp_avg_sq."};
    write_safetensors(dir, "model.safetensors", parts, part_count, &weights, plain, 1);
    write_safetensors(dir, "optimizer.safetensors", parts, part_count, moments, moment_names, 2);
    free(parts);
    write_config(dir, c, run->tokenizer->eot);
    write_text(dir, "tokenizer.json", run->tokenizer->json, run->tokenizer->json_size);
    char text[512];
    const char *const eot = "<|endoftext|>";
    int n = snprintf(
        text, sizeof(text),
        "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"bos_token\": \"%s\",\n  \"eos_token\": \"%s\",\n"
        "  \"unk_token\": \"%s\",\n  \"clean_up_tokenization_spaces\": false,\n"
        "  \"model_input_names\": [\"input_ids\", \"attention_mask\"],\n  \"model_max_length\": %d\n}\n",
        eot, eot, eot, c->seq);
    write_text(dir, "tokenizer_config.json", text, (size_t)n);
    n = snprintf(text, sizeof(text), "{\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": %d\n}\n",
                 run->tokenizer->eot, run->tokenizer->eot, run->tokenizer->eot);
    write_text(dir, "generation_config.json", text, (size_t)n);
    FILE *state = open_for_writing(dir, "trainer_state.json");
    fprintf(state, "{\"step\":%d,\"data_fingerprint\":%.0f}\n", run->step, data_fingerprint(run->train));
    close_written(state, dir, "trainer_state.json");
    sync_directory(dir);
    remove_tree(final);
    if (rename(dir, final) != 0)
        fail("%s: cannot rename to %s: %s", dir, final, strerror(errno));
    unfinished_path[0] = 0;
    sync_directory(run->out);
    snprintf(final, sizeof(final), "%s/latest", run->out);
    snprintf(link, sizeof(link), "%s/latest.new", run->out);
    unlink(link);
    if (symlink(name, link) != 0 || rename(link, final) != 0)
        fail("%s: cannot link to %s: %s", final, name, strerror(errno));
    sync_directory(run->out);
    int count;
    for (long old; (old = smallest_checkpoint(run->out, &count)) >= 0 && count > c->keep && old != run->step;) {
        snprintf(link, sizeof(link), "%s/checkpoint-%ld", run->out, old);
        remove_tree(link);
        ranks_tick();
        if (access(link, F_OK) == 0) // cannot be removed
            break;
    }
    forget_whole(run->model);
    ranks_meet();
}

void load_weights(Run *run, const char *dir, int moments) {
    int count;
    Part *parts = model_parts(&run->config, &count);
    const char *const prefix[] = {"", "", "exp_avg.", "exp_avg_sq."};
    for (int what = WEIGHTS; what <= (moments ? MOMENT2 : WEIGHTS); what++) {
        if (what == GRADS)
            continue;
        real *all = run->backend->fetch(run->model, what);
        read_weights(dir, what == WEIGHTS ? "model.safetensors" : "optimizer.safetensors", parts, count, run->config.experts,
                     prefix[what], all);
        for (int i = 0; what == WEIGHTS && i < run->model->tensor_count; i++) {
            const Tensor *t = &run->model->tensors[i];
            const real *w = all + t->place;
            for (size_t v = 0; t->kind == TABLE && v < t->size; v++) {
                if (!(w[v] >= 0 && w[v] < run->config.experts))
                    fail("%s: damaged: the table sends word %zu to expert %g of %d", dir, v, (double)w[v], run->config.experts);
            }
        }
        run->backend->store(run->model, what);
        forget_whole(run->model);
    }
    free(parts);
}

// Cuts the log back to what had happened by `step`.
void cut_log(const char *path, int step) {
    if (access(path, F_OK) != 0)
        return;
    size_t size;
    char *text = read_file(path, &size), *line = text;
    while (line < text + size) {
        char *end = (char *)memchr(line, '\n', (size_t)(text + size - line)), *at;
        if (!end) // cut off in the middle of a line
            break;
        *end = 0;
        if ((at = strstr(line, "\"step\":")) != NULL && strncmp(line, "{\"type\":\"run\"", 13) && atol(at + 7) > step)
            break;
        line = end + 1;
    }
    if (truncate(path, (off_t)(line - text)) != 0)
        fail("%s: cannot shorten: %s", path, strerror(errno));
    free(text);
}

// The share of tokens whose chosen experts are not the set that they were at the evaluation before, averaged over the
// layers; -1 at the first one (Dai et al. 2022, StableMoE, call it routing fluctuation).
double routing_fluctuation(Run *run) {
    const Config *c = &run->config;
    int last, moe = moe_layers(c, &last), first = !run->probe;
    size_t room = (size_t)c->batch * c->seq * c->subtokens;
    double changed = 0, tokens = 0;
    if (first)
        run->probe = (uint64_t *)allocate(room * c->layers, sizeof(uint64_t));
    for (int l = 0; l < c->layers; l++) {
        const Plan *plan = run->backend->plan(run->model, l);
        for (int n = 0; is_moe(c, l) && n < plan->N; n++, tokens++) {
            uint64_t *before = run->probe + room * l + n, set = 0; // a sum of hashes: the same in any order
            for (int k = 0; k < plan->K; k++)
                set += hash64((uint64_t)plan->expert[n * plan->K + k]);
            changed += *before != set;
            *before = set;
        }
    }
    double both[2] = {changed, tokens};
    sum_over_ranks(both, 2);
    return moe && !first ? both[0] / both[1] : -1;
}

// Validation: windows spread evenly over the validation files, always the same ones.
void evaluate(Run *run) {
    const Config *c = &run->config;
    int B = c->batch, T = c->seq;
    long windows = run->val->windows, wanted = c->eval_batches ? (long)c->eval_batches * B * ranks.size : windows;
    if (wanted > windows)
        wanted = windows;
    double nats = 0, bytes = 0;
    for (long begin = 0; begin < wanted; begin += (long)B * ranks.size) {
        long first = begin + (long)B * ranks.rank;
        int rows = (int)(first >= wanted ? 0 : wanted - first < B ? wanted - first : B);
        for (int b = 0; b < rows; b++) {
            size_t at = (size_t)b * (size_t)T;
            data_window(run->val, (long)((double)(first + b) * (double)windows / (double)wanted), -1, run->inputs + at,
                        run->targets + at);
        }
        double loss, aux, norm;
        run->backend->forward(run->model, run->inputs, run->targets, rows, T, EVAL_MODE, rows * T, 0, 0);
        run->backend->losses(run->model, &loss, &aux, &norm);
        nats += loss;
        if (begin == 0)
            run->fluctuation = routing_fluctuation(run);
        for (int i = 0; i < rows * T; i++) {
            if (run->targets[i] != run->tokenizer->eot && run->targets[i] < run->tokenizer->vocab)
                bytes += run->tokenizer->length[run->targets[i]];
        }
    }
    sum_over_ranks(&bytes, 1);
    run->val_loss = nats / ((double)wanted * T);
    run->val_bpb = nats / 0.6931471805599453 / fmax(bytes, 1);
}

// Goes on from a prompt of size bytes and calls emit with the bytes of each token. Returns the number of tokens.
int generate(Run *run, const char *prompt, size_t size, void (*emit)(void *to, const char *bytes, int length), void *to) {
    const Config *c = &run->config;
    const Tokenizer *t = run->tokenizer;
    size_t count = 0;
    int *ids = (int *)allocate(size + 2, sizeof(int)), made = 0, position = 0;
    ids[count++] = t->eot;
    count += tokenizer_encode(run->tokenizer, prompt, size, ids + count);
    real *logits = allocate_reals((size_t)c->vocab);
    uint64_t stream = random_stream((uint64_t)c->seed, RANDOM_SAMPLE, 0, 0);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] >= c->vocab)
            fail("the prompt's token %d is not in the model's vocabulary of %d", ids[i], c->vocab);
        run->backend->generate(run->model, ids[i], position++, logits);
    }
    while (made < c->tokens) {
        int id = sample(logits, min_int(c->vocab, t->vocab), c->temperature, c->top_k, c->top_p,
                        random_uniform(stream, (uint64_t)position));
        broadcast(&id, sizeof(id)); // by the logits' last bits the ranks might differ
        if (id == t->eot)
            break;
        emit(to, t->text[id], t->length[id]);
        if (++made < c->tokens)
            run->backend->generate(run->model, id, position++, logits);
    }
    free(logits);
    free(ids);
    return made;
}

// Text of the model's for people: control characters could do things to a terminal. one_line: newlines too.
void print_text(const char *text, int length, int one_line) {
    for (int i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)text[i];
        if ((byte < 32 || byte == 127) && (one_line || byte != '\n'))
            printf(byte == '\n' ? "\\n" : "\\x%02x", byte);
        else
            putchar(byte);
    }
}

void emit_to_file(void *to, const char *bytes, int length) {
    fwrite(bytes, 1, (size_t)length, (FILE *)to);
    fflush((FILE *)to);
}

void tell_story(Run *run) {
    char *story = NULL;
    size_t size = 0;
    FILE *memory = open_memstream(&story, &size);
    generate(run, "", 0, emit_to_file, memory);
    fclose(memory);
    fprintf(run->log, "{\"type\":\"sample\",\"step\":%d,\"text\":", run->step);
    json_write_string(run->log, story, size);
    fprintf(run->log, "}\n");
    check_log(run);
    printf("\n");
    print_text(story, (int)size, 0);
    printf("\n\n");
    free(story);
}

// Which words each expert of the last layer that has experts likes best: those it takes most above its usual share.
void show_experts(Run *run) {
    const Config *c = &run->config;
    int l, V = run->tokenizer->vocab, E = c->experts;
    if (!moe_layers(c, &l))
        return;
    double *seen = (double *)allocate((size_t)V, sizeof(double)), *taken = (double *)allocate((size_t)V * E, sizeof(double));
    int batches = (int)fmin(32, (double)run->val->windows / c->batch / ranks.size);
    for (int i = 0; i < batches; i++) {
        for (int b = 0; b < c->batch; b++)
            data_window(run->val, ((long)i * ranks.size + ranks.rank) * c->batch + b, -1, run->inputs + b * c->seq,
                        run->targets + b * c->seq);
        run->backend->forward(run->model, run->inputs, run->targets, c->batch, c->seq, EVAL_MODE, 1, 0, 0);
        const Plan *plan = run->backend->plan(run->model, l);
        for (int n = 0; n < plan->N; n++) {
            int token = run->inputs[n / c->subtokens];
            if (token >= V) // of a model whose vocabulary is padded
                continue;
            seen[token] += 1;
            for (int k = 0; k < plan->K; k++) {
                int e = plan->key[n * plan->K + k], again = 0; // two routers may send a token to the same expert
                for (int j = 0; j < k; j++)
                    again |= plan->key[n * plan->K + j] == e;
                if (e >= 0 && !again)
                    taken[(size_t)token * E + e] += 1;
            }
        }
    }
    sum_over_ranks(seen, V);
    sum_over_ranks(taken, V * E);
    printf("What the experts of layer %d like to read, and how much of it they take:\n", l + 1);
    for (int e = 0; e < min_int(E, 16); e++) {
        printf("  expert %2d:", e);
        for (int rank = 0; rank < 7; rank++) {
            int best = -1;
            double best_score = 0;
            for (int v = 0; v < V; v++) { // seldom seen words are worth less: they may be there by chance
                double score = seen[v] > 0 ? taken[(size_t)v * E + e] / (seen[v] + 20) : 0;
                if (score > best_score) {
                    best_score = score;
                    best = v;
                }
            }
            if (best < 0)
                break;
            const char *text = run->tokenizer->text[best];
            int skip = text[0] == ' ' && run->tokenizer->length[best] > 1;
            printf("%s", rank ? ", " : " ");
            print_text(text + skip, run->tokenizer->length[best] - skip, 1);
            printf(" %.0f%%", 100 * taken[(size_t)best * E + e] / seen[best]);
            taken[(size_t)best * E + e] = 0;
        }
        printf("\n");
    }
    printf("\n");
    free(seen);
    free(taken);
}

// share (E) of each expert in the choices since the stats were cleared; returns the largest share over the mean one.
double expert_load(const RouterStats *s, int E, double *share) {
    double total = 0, top = 0;
    for (int e = 0; e < E; e++)
        total += s->count[e];
    for (int e = 0; e < E; e++) {
        share[e] = total > 0 ? s->count[e] / total : 0;
        top = fmax(top, share[e]);
    }
    return top * E;
}

void log_router(Run *run) {
    const Config *c = &run->config;
    int E = c->experts;
    double *share = (double *)allocate((size_t)E, sizeof(double));
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        const RouterStats *s = run->backend->stats(run->model, l);
        double top = expert_load(s, E, share), chosen = s->active;
        int dead = 0;
        for (int e = 0; e < E; e++)
            dead += s->idle[e] >= IDLE_STEPS;
        fprintf(run->log, "{\"type\":\"router\",\"step\":%d,\"layer\":%d,\"load\":[", run->step, l);
        for (int e = 0; e < E; e++)
            fprintf(run->log, "%s%.6g", e ? "," : "", share[e]);
        fprintf(run->log, "],\"max_over_mean\":%.6g,\"entropy\":%.6g,\"dropped\":%.6g,\"active\":%.6g,\"dead\":%d}\n", top,
                s->entropy / s->tokens, s->dropped / fmax(chosen, 1), chosen / s->tokens, dead);
    }
    free(share);
    check_log(run);
}

// A line on the terminal, once for each layer, where an expert has had no token for IDLE_STEPS steps, or where the load
// of about the last 50 steps is beyond what the recipe is known for.
void warn_of_routing(Run *run) {
    const Config *c = &run->config;
    for (int l = 0; l < c->layers; l++) {
        const RouterStats *s = run->backend->stats(run->model, l);
        int idle = 0, top = 0;
        for (int e = 0; is_moe(c, l) && e < c->experts; e++) {
            idle = s->idle[e] > s->idle[idle] ? e : idle;
            top = s->recent[e] > s->recent[top] ? e : top;
        }
        double limit = find_recipe(c->recipe)->load;
        int dead = is_moe(c, l) && s->idle[idle] >= IDLE_STEPS;
        int uneven = is_moe(c, l) && limit > 0 && run->trained >= 2 * IDLE_STEPS && s->recent[top] > limit;
        const char *begin = on_terminal() ? "\r\033[K" : "";
        if (dead && !(run->warned[l] & 1))
            printf("%swarning: step %d: expert %d of layer %d has had no token for %d steps; a higher --aux-weight may "
                   "wake it\n",
                   begin, run->step, idle, l + 1, s->idle[idle]);
        if (uneven && !(run->warned[l] & 2))
            printf("%swarning: step %d: expert %d of layer %d takes %.1f times its share; %s is known to stay below "
                   "%.1f\n",
                   begin, run->step, top, l + 1, s->recent[top], c->recipe, limit);
        run->warned[l] |= (unsigned char)(dead | uneven << 1);
    }
}

// How the last step went: on a terminal one line that is written over and over, else a line each time.
void show_step(Run *run, double loss, double lr, double norm, double tokens_per_second, double left) {
    const Config *c = &run->config;
    char time_left[32], bars[256] = "";
    long rest = (long)fmin(left, 1e9);
    snprintf(time_left, sizeof(time_left), rest >= 3600 ? "%ld:%02ld:%02ld" : "%.0ld%ld:%02ld", rest / 3600,
             rest / 60 % 60, rest % 60);
    int l;
    if (moe_layers(c, &l)) { // the last layer's load: full height is twice the fair share
        double *share = (double *)allocate((size_t)c->experts, sizeof(double));
        expert_load(run->backend->stats(run->model, l), c->experts, share);
        strcat(bars, "  ");
        for (int e = 0; e < min_int(c->experts, 16); e++) {
            char bar[4] = "\xe2\x96\x81"; // U+2581, the lowest of eight blocks
            bar[2] = (char)(bar[2] + min_int(7, (int)(share[e] * c->experts * 4)));
            strcat(bars, bar);
        }
        free(share);
    }
    double sol = tokens_per_second * run->flops / run->peak;
    if (on_terminal()) {
        char done[13] = "............";
        memset(done, '#', (size_t)((double)run->step / c->steps * 12));
        printf("\r[%s] %d/%d  loss %.3f  %.0f tokens/s  left %s%s\033[K", done, run->step, c->steps, loss, tokens_per_second,
               time_left, bars);
    } else {
        printf("step %d/%d  loss %.4f  lr %.2e  norm %.2f  %.0f tokens/s  %.0f%% of peak  left %s%s\n", run->step,
               c->steps, loss, lr, norm, tokens_per_second, 100 * sol, time_left, bars);
    }
    fflush(stdout);
}

void show_evaluation(Run *run) {
    char changed[48] = "";
    if (run->fluctuation >= 0)
        snprintf(changed, sizeof(changed), ",\"fluctuation\":%.6g", run->fluctuation);
    log_line(run, "eval", "\"step\":%d,\"val_loss\":%.9g,\"val_bpb\":%.9g%s", run->step, run->val_loss, run->val_bpb,
             changed);
    printf("%sstep %d: validation loss %.4f nats per token, %.4f bits per byte%s\n", on_terminal() ? "\r" : "", run->step,
           run->val_loss, run->val_bpb, on_terminal() ? "\033[K" : "");
}

int due(int step, int every) {
    return every > 0 && step % every == 0;
}

// For the log: what a step's time went into, the mean of all ranks; and the bytes that all of them sent in a step. Then
// begins anew.
void describe_traffic(int steps, double ms, char text[256]) {
    Traffic *t = &ranks.traffic, none = {0, 0, 0};
    double all[3] = {t->waited * 1000 / ranks.size, t->sent, t->reduced};
    sum_over_ranks(all, 3);
    snprintf(text, 256, ",\"compute_ms\":%.4g,\"wait_ms\":%.4g,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f",
             ms - all[0] / steps, all[0] / steps, all[1] / steps, all[2] / steps);
    *t = none;
}

// One line a step in trace-RANK.jsonl: the same for this rank alone, since the last line of the log, and the rows that
// came to its experts in each layer's last forward pass (--ep 1: its tokens).
void trace_step(Run *run) {
    const Config *c = &run->config;
    fprintf(run->trace, "{\"step\":%d,\"seconds\":%.6f,\"waited\":%.6f,\"all_to_all_bytes\":%.0f,\"reduce_bytes\":%.0f,\"came\":[",
            run->step, seconds(), ranks.traffic.waited, ranks.traffic.sent, ranks.traffic.reduced);
    const char *comma = "";
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l))
            continue;
        fprintf(run->trace, "%s%d", comma, run->model->came[l]);
        comma = ",";
    }
    fprintf(run->trace, "]}\n");
    if (fflush(run->trace) != 0)
        fail("%s/trace-%d.jsonl: cannot write: %s", run->out, ranks.rank, strerror(errno));
}

// Steps until config.steps, or until Ctrl-C. Returns 1 where it was interrupted.
int train(Run *run) {
    const Config *c = &run->config;
    const Backend *backend = run->backend;
    int B = c->batch, T = c->seq, timed_step = run->step;
    int saved = run->step, stop = 0;
    const Traffic none = {0, 0, 0};
    ranks.traffic = none;
    double timed = seconds(), sequences = (double)c->accum * B * ranks.size; // of a step
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = ask_stop;
    action.sa_flags = (int)SA_RESETHAND | SA_RESTART; // the second Ctrl-C ends at once; the first breaks off no write
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
#ifdef USE_MPI
    sigaction(SIGUSR1, &action, NULL); // which mpirun passes on to all ranks
#endif
    signal(SIGPIPE, SIG_IGN); // training outlives who reads its progress
    while (run->step < c->steps && !stop && (MANY || !stop_asked)) { // no rank may stop alone
        int step = run->step + 1;
        double loss, aux, norm, lr = learning_rate(c, step);
        for (int micro = 0; micro < c->accum; micro++) {
            long first = ((long)micro * ranks.size + ranks.rank) * B;
            data_batch(run->train, run->step * (long)sequences + first, B, run->inputs, run->targets);
            backend->forward(run->model, run->inputs, run->targets, B, T, TRAIN_MODE, 1.0 / c->accum / ranks.size, step,
                             first * T);
            backend->backward(run->model);
        }
        backend->update(run->model, step, lr);
        backend->losses(run->model, &loss, &aux, &norm);
        if (!isfinite(loss) || !isfinite(norm))
            fail("step %d: the loss is %g and the gradient's norm %g; training stops here, and the last checkpoint in "
                 "%s is as it "
                 "was. A lower --lr or a longer --warmup may help",
                 step, loss, norm, run->out);
        run->step = step;
        run->trained++;
        if (run->trace)
            trace_step(run);
        warn_of_routing(run);
        double asked = stop_asked;
        sum_over_ranks(&asked, 1);
        stop = asked > 0;
        int last = step == c->steps || stop, evaluated = due(step, c->eval_every) || step == c->steps;
        if (due(step, c->log_every) || step == 1 || last) {
            double ms = (seconds() - timed) * 1000 / (step - timed_step), rate = sequences * T / ms * 1000;
            char sent[256] = "";
            if (MANY)
                describe_traffic(step - timed_step, ms, sent);
            log_line(run, "step",
                     "\"step\":%d,\"tokens\":%.0f,\"loss\":%.9g,\"aux\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"ms\":%."
                     "4g,\"tok_s\":%.6g,"
                     "\"gflops\":%.4g,\"sol\":%.4g%s",
                     step, step * sequences * T, loss, aux, norm, lr, ms, rate, rate * run->flops / 1e9,
                     rate * run->flops / run->peak, sent);
            log_router(run);
            show_step(run, loss, lr, norm, rate, ms * (c->steps - step) / 1000);
            timed = seconds();
            timed_step = step;
        }
        double pause = seconds();
        Traffic traffic = ranks.traffic;
        if (evaluated) {
            evaluate(run);
            show_evaluation(run);
        }
        if (due(step, c->sample_every) || step == c->steps)
            tell_story(run);
        if (due(step, c->save_every) || step == c->steps) {
            save_checkpoint(run);
            saved = step;
        }
        timed += seconds() - pause; // none of this is the step's time
        ranks.traffic = traffic;
    }
    if (saved != run->step)
        save_checkpoint(run);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    return run->step < c->steps;
}

// ---------------------------------------------------------------------------------------------------------------------
// 15. The command line, and main

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
// whose last checkpoint is the newest, among all, or among RECIPE's where the command line names a recipe.
void default_out(const Config *asked, int fresh, char out[2048]) {
    const char *recipe = asked->recipe;
    snprintf(out, 2048, "runs/%s", recipe);
    for (int n = 2; fresh && access(out, F_OK) == 0; n++)
        snprintf(out, 2048, "runs/%s-%d", recipe, n);
    struct timespec newest = {0, 0};
    DIR *dir = fresh ? NULL : opendir("runs");
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        char path[2048];
        struct stat info;
        size_t n = strlen(recipe);
        snprintf(path, sizeof(path), "runs/%.1000s/latest", entry->d_name);
        int wanted = !asked->given[find_option("recipe")] ||
                     (!strncmp(entry->d_name, recipe, n) && (!entry->d_name[n] || entry->d_name[n] == '-'));
        if (!wanted || lstat(path, &info) != 0 || info.st_mtim.tv_sec < newest.tv_sec ||
            (info.st_mtim.tv_sec == newest.tv_sec && info.st_mtim.tv_nsec < newest.tv_nsec))
            continue;
        newest = info.st_mtim;
        snprintf(out, 2048, "runs/%.1000s", entry->d_name);
    }
    if (dir)
        closedir(dir);
}

void make_directories(const char *path) {
    char part[2048];
    for (size_t i = 1; i <= strlen(path); i++) {
        if (path[i] && path[i] != '/')
            continue;
        snprintf(part, sizeof(part), "%.*s", (int)i, path);
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            fail("%s: cannot create: %s", part, strerror(errno));
    }
}

void use_threads(const Config *c) {
#ifdef _OPENMP
    int here = MANY ? ranks_of_machine() : 1; // all ranks ask, whatever their environments say
    if (c->threads)
        omp_set_num_threads(c->threads);
    else if (MANY && !getenv("OMP_NUM_THREADS")) // the cores are shared by all ranks of this machine
        omp_set_num_threads(max_int(1, min_int(omp_get_num_procs(), (int)sysconf(_SC_NPROCESSORS_ONLN) / here)));
#else
    if (c->threads > 1)
        fprintf(stderr, "%s: built without OpenMP, so --threads %d runs as one\n", program_name, c->threads);
#endif
}

// ./train_moe --prompt: the model in run->out goes on from a text.
void answer_prompt(Run *run, const Config *asked) {
    char dir[4096], path[4200], *text = NULL;
    Config *c = &run->config;
    int is_model = has_file(run->out, "config.json"); // a checkpoint or Hugging Face directory itself
    snprintf(dir, sizeof(dir), "%s%s", run->out, is_model ? "" : "/latest");
    if (!has_file(dir, "config.json"))
        fail("%s: no checkpoint there to generate from; train first, or name a run with --out", run->out);
    config_from_directory(c, dir);
    join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL, dir);
    c->batch = 1; // generation needs none, and the saved one is that of all ranks
    config_check(c);
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    run->tokenizer = tokenizer_load(c->tokenizer[0] ? c->tokenizer : path);
    run->model = run->backend->create(c, 1, 0, NULL);
    load_weights(run, dir, 0);
    fprintf(stderr, "%s, %s\n", dir, c->recipe);
    const char *prompt = c->prompt;
    size_t size = strlen(prompt);
    if (!strcmp(prompt, "-")) {
        prompt = text = read_file("/dev/stdin", &size);
        while (size && text[size - 1] == '\n')
            text[--size] = 0;
    }
    fwrite(prompt, 1, size, stdout);
    generate(run, prompt, size, emit_to_file, stdout);
    printf("\n");
    free(text);
    run->backend->release(run->model);
    tokenizer_free(run->tokenizer);
}

// The tokenizer that --tokenizer names, that of the data folder, or that of the checkpoint that is resumed.
void load_tokenizer(Run *run, const char *checkpoint) {
    const char *data = run->config.data, *dir = has_file(data, "tokenizer.json") || !checkpoint ? data : checkpoint;
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    if (!has_file(dir, "tokenizer.json") && !run->config.tokenizer[0])
        fail("%s: no tokenizer.json there; name the one that the data were made with by --tokenizer FILE", data);
    run->tokenizer = tokenizer_load(run->config.tokenizer[0] ? run->config.tokenizer : path);
}

// Stops unless the vocabulary of dir/tokenizer.json, where there is one, is the data's.
void compare_tokenizers(const Run *run, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    const Tokenizer *mine = run->tokenizer;
    if (mine->vocab > run->config.vocab)
        fail("%s: the model has %d tokens, the data's tokenizer %d", dir, run->config.vocab, mine->vocab);
    if (!has_file(dir, "tokenizer.json"))
        return;
    Tokenizer *other = tokenizer_load(path);
    for (int i = 0; i < mine->vocab; i++) {
        if (i >= other->vocab || mine->length[i] != other->length[i] ||
            memcmp(mine->text[i], other->text[i], mine->length[i]))
            fail("%s: token %d is not that of the data in %s; make the data with data/tokenize --tokenizer %s", path, i,
                 run->config.data, path);
    }
    tokenizer_free(other);
}

// Groups of ranks that have all experts among them.
void divide_experts(const Config *c) {
    (void)c;
#ifdef USE_MPI
    int last, moe = moe_layers(c, &last), ep = c->ep ? c->ep : 1;
    for (int n = 2; !c->ep && moe && n <= ranks.size; n++)
        ep = ranks.size % n == 0 && c->experts % n == 0 ? n : ep;
    if (!moe && ep > 1)
        usage_fail("--ep %d: this model has no experts to divide", ep);
    if (ranks.size % ep || (moe && c->experts % ep))
        usage_fail("--ep %d: it must divide the %d ranks and the %d experts", ep, ranks.size, c->experts);
    if (c->replicate && (ep == 1 || c->replicate > c->experts))
        usage_fail("--replicate %d: at most all %d experts can have a copy, and there must be another rank to have it (here: "
                   "--ep %d)", c->replicate, c->experts, ep);
    if (MANY)
        ranks_form(comm.all, ep);
#endif
}

// Stops where a rank was started with other options, other data or another checkpoint than rank 0.
void compare_ranks(Run *run) {
    const Config *c = &run->config;
    char *text = NULL;
    size_t size = 0;
    FILE *memory = open_memstream(&text, &size);
    write_options(memory, &run->config);
    fprintf(memory, "%d %d %d %d %d ", c->ep, c->overlap, c->replicate, c->replicate_every, c->tokens); // of this call
    fprintf(memory, "%d ", run->step);
    if (run->train) // of a run that is finished, nobody has read data
        fprintf(memory, "%d %.0f %.0f", c->vocab, data_fingerprint(run->train), data_fingerprint(run->val));
    fclose(memory);
    uint64_t mine = 0;
    for (size_t i = 0; i < size; i++)
        mine = hash64(mine ^ (unsigned char)text[i]);
    free(text);
    uint64_t first = mine;
    ranks_meet(); // what comes next waits inside MPI, where nobody keeps the watch
    broadcast(&first, sizeof(first));
    if (mine != first)
        fail("this rank has other options, other data or another checkpoint than rank 0 (step %d, data %s)", run->step,
             run->config.data);
}

// Everything before the first step; 0 where there is nothing left to do. Nothing is written before all is checked.
int open_run(Run *run, const Config *asked) {
    Config *c = &run->config;
    char checkpoint[4096], path[4200];
    snprintf(checkpoint, sizeof(checkpoint), "%s/latest", run->out);
    if (has_file(run->out, "config.json"))
        usage_fail("%s is a model, not a run directory: start from it by --init, or resume the run that holds it", run->out);
    int resumed = asked->resume && has_file(checkpoint, "config.json"), count;
    long left = smallest_checkpoint(run->out, &count);
    if (asked->resume && !resumed && left >= 0)
        fail("%s does not lead to a checkpoint, though there are some beside it: link it to one that is whole", checkpoint);
    if (resumed) {
        snprintf(path, sizeof(path), "%s/trainer_state.json", checkpoint);
        size_t size;
        char *text = read_file(path, &size);
        Json *state = json_parse(text, size, path);
        config_from_directory(c, checkpoint);
        long whole = (long)c->batch * c->accum;
        if (asked->given[find_option("batch")]) { // the same step in other pieces
            c->batch = asked->batch;
            c->accum = asked->given[find_option("accum")] ? asked->accum : (int)(whole / c->batch / ranks.size);
            if ((long)c->batch * c->accum * ranks.size != whole)
                usage_fail("%s: a step there has %ld sequences, and cannot have --batch %d times --accum %d on %d ranks",
                           checkpoint, whole, c->batch, c->accum, ranks.size);
        } else if (c->batch % ranks.size) {
            usage_fail("%s: a micro-step there has %d sequences, which %d ranks cannot share evenly; --batch makes other ones",
                       checkpoint, c->batch, ranks.size);
        } else {
            c->batch /= ranks.size;
        }
        join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL | 1 << ORDER, checkpoint);
        double step = expect_member(state, "step", 'i', path)->number;
        if (!(step >= 1 && step <= 2e9))
            fail("%s: step is %g; expected a number from 1 to 2e9", path, step);
        run->step = (int)step;
        if (run->step >= c->steps) {
            compare_ranks(run);
            printf("%s is finished: %d steps of %d. To go on, give more --steps\n", run->out, run->step, c->steps);
            json_free(state);
            free(text);
            return 0;
        }
        double fingerprint = expect_member(state, "data_fingerprint", 'n', path)->number;
        config_check(c);
        load_tokenizer(run, checkpoint);
        run->before = memory_now();
        run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
        if (data_fingerprint(run->train) != fingerprint)
            fail("%s: these are not the training tokens that the run in %s began with, and they may not change",
                 c->data, run->out);
        compare_tokenizers(run, checkpoint);
        json_free(state);
        free(text);
    } else {
        if (!asked->resume && (has_file(run->out, "log.jsonl") || left >= 0))
            usage_fail("%s holds a run already: go on with it by --resume, or choose another --out", run->out);
        if (c->init[0]) {
            Config mine = *asked;
            config_from_directory(c, c->init);
            if (!asked->given[find_option("recipe")]) // the checkpoint's, whose training options go with its model
                config_recipe(&mine, c->recipe);
            join_options(c, &mine, 1 << MODEL, 1 << MODEL, asked->init);
        }
        config_check(c);
        if (!c->data[0])
            c->data = has_file("data/tinystories", "tokenizer.json") ? "data/tinystories" : "data/stories";
        load_tokenizer(run, NULL);
        run->before = memory_now();
        c->vocab = c->init[0] ? c->vocab : run->tokenizer->vocab;
        if (c->init[0])
            compare_tokenizers(run, c->init);
        run->train = data_open(c->data, "train", c->seq, c->vocab, (uint64_t)c->seed);
    }
    compare_tokenizers(run, c->data);
    run->val = data_open(c->data, "val", c->seq, c->vocab, (uint64_t)c->seed);
    run->inputs = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    run->targets = (int *)allocate((size_t)c->batch * c->seq, sizeof(int));
    compare_ranks(run);
    divide_experts(c);
    run->model = run->backend->create(c, c->batch * c->seq, 1, NULL);
    if (resumed) {
        load_weights(run, checkpoint, 1);
    } else if (c->init[0]) {
        load_weights(run, c->init, 0);
    } else {
        double *frequency = data_frequency(run->train, c->vocab);
        run->backend->init(run->model, frequency);
        free(frequency);
    }
    run->warned = (unsigned char *)allocate(c->layers, 1);
    ranks_meet(); // before the first file is written, all have seen that there is none
    make_directories(run->out);
    if (ranks.rank)
        snprintf(path, sizeof(path), "/dev/null"); // this rank's log is nobody's
    else
        snprintf(path, sizeof(path), "%s/log.jsonl", run->out);
    run->log = fopen(path, "ab");
    if (!run->log)
        fail("%s: cannot open: %s", path, strerror(errno));
    if (!ranks.rank && flock(fileno(run->log), LOCK_EX | LOCK_NB) != 0)
        fail("%s: another process trains there", run->out);
    if (!ranks.rank)
        cut_log(path, run->step);
    ranks_meet();
    if (c->trace) {
        snprintf(path, sizeof(path), "%s/trace-%d.jsonl", run->out, ranks.rank);
        cut_log(path, run->step);
        run->trace = fopen(path, "ab");
        if (!run->trace)
            fail("%s: cannot open: %s", path, strerror(errno));
    }
    return 1;
}

void close_run(Run *run) {
    fclose(run->log);
    if (run->trace)
        fclose(run->trace);
    run->backend->release(run->model);
    tokenizer_free(run->tokenizer);
    data_close(run->train);
    data_close(run->val);
    free(run->inputs);
    free(run->targets);
    free(run->warned);
    free(run->probe);
}

// Where the memory goes, and what --recompute does about it: of all layers' activations that it need not keep, one
// layer's; and nearly the whole forward pass a second time.
void print_memory(Run *run) {
    static const char *const names[] = {"weights", "gradients", "moments", "activations", "buffers"};
    const Config *c = &run->config;
    const Model *m = run->model;
    double before = run->before + 2 * (run->train->tokens + run->val->tokens), sum = before, mib = 1048576, again = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        int whole = t->kind == QKV || t->kind == PROJ || t->kind == DENSE_IN;
        int some = t->kind == W_IN && ranks.ep == 1; // what came from other ranks is kept
        if (whole || some) // of the last layer nothing is lost
            again += 2.0 * (double)t->whole * (whole ? 1 : (double)c->topk / c->experts * c->subtokens) * (t->layer < c->layers - 1);
    }
    again += 2.0 * (c->layers - 1) * c->seq * c->dim;
    printf("memory in MiB:");
    for (int i = 0; i < HARDLY_TOUCHED; i++) {
        printf(" %s %.1f,", names[i], (double)m->bytes[i] / mib);
        sum += (double)m->bytes[i];
    }
    int bound = c->select == EXPERT_CHOICE || c->select == THRESHOLD; // room for more choices than there will be
    double device = run->backend->memory();
    if (device > 0)
        printf(" together %.1f of the device's %.0f\n", (sum - before) / mib, device / mib);
    else
        printf(" the program and its tokens %.1f; together %s%.1f\n", before / mib, bound ? "at most " : "", sum / mib);
    printf("%s --recompute: activations %.1f and %.0f%% %s operations\n", c->recompute ? "without" : "with",
           ((double)m->bytes[FOR_ACTIVATIONS] +
            (c->recompute ? 1 : -1) * (double)sizeof(real) * (double)(m->passing - m->largest)) / mib,
           100 * again / (run->flops + (c->recompute ? again : 0)), c->recompute ? "fewer" : "more");
    fprintf(run->log, "\"memory\":{");
    for (int i = 0; i < HARDLY_TOUCHED; i++)
        fprintf(run->log, "\"%s\":%zu,", names[i], m->bytes[i]);
    fprintf(run->log, "\"program\":%.0f},", before);
}

void announce(Run *run) {
    const Config *c = &run->config;
    double total, active;
    char device[128];
    count_parameters(c, &total, &active);
    run->backend->device(device);
    run->flops = flops_per_token(c);
    ranks_meet();
    run->peak = run->backend->peak();
    sum_over_ranks(&run->peak, 1);
    fprintf(run->log, "{\"type\":\"run\",");
    write_options(run->log, c);
    fprintf(run->log,
            ",\"vocab\":%d,\"params\":%.0f,\"active_params\":%.0f,\"flops_per_token\":%.0f,\"threads\":%d,\"ranks\":%d,",
            c->vocab, total, active, run->flops, thread_count(), ranks.size);
    if (MANY)
        fprintf(run->log, "\"ep\":%d,\"overlap\":%d,\"replicate\":%d,", ranks.ep, c->overlap, c->replicate);
    int last, moe = moe_layers(c, &last);
    printf("%s: %d layers of width %d, %d of them with %d experts of which a token sees %d\n", c->recipe, c->layers, c->dim, moe,
           moe ? c->experts + c->shared : 0, moe ? c->topk + c->shared : 0);
    printf("%.2f million weights, %.2f million at work for each token; vocabulary %d\n", total / 1e6, active / 1e6, c->vocab);
    printf("data %s: %.2f million tokens, %ld windows of %d; a step takes %d of them\n", c->data, run->train->tokens / 1e6,
           run->train->windows, c->seq, c->batch * c->accum * ranks.size);
    if (MANY)
        printf("%d ranks, %d sequences of a micro-step each; %d of %d experts on a rank%s\n", ranks.size, c->batch,
               moe ? c->experts / ranks.ep : 0, moe ? c->experts : 0, ranks.groups > 1 ? ", which others have, too" : "");
    print_memory(run);
    printf("%s, %d threads, peak %.0f GFLOP/s; run directory %s\n", device, thread_count(), run->peak / 1e9, run->out);
    fprintf(run->log, "\"start_step\":%d,\"peak_gflops\":%.4g,\"device\":", run->step, run->peak / 1e9);
    json_write_string(run->log, device, strlen(device));
    fprintf(run->log, "}\n");
    if (run->step)
        printf("going on after step %d\n", run->step);
    printf("\n");
    fflush(stdout);
}

// The whole program, on a device.
int trainer_main(int argc, char **argv, const Backend *backend) {
    static Run run;
    static Config asked;
    parse_command_line(&asked, argc, argv);
    if (asked.help || asked.list_recipes) {
        asked.help ? print_options() : print_recipes();
        return 0;
    }
    if (asked.init[0] && (asked.prompt || asked.resume))
        usage_fail("--init starts a new run from other weights; --%s goes on from --out: give one of them",
                   asked.prompt ? "prompt" : "resume");
    if (asked.prompt && MANY)
        usage_fail("--prompt: one process goes on from a text; start it without mpirun");
    use_threads(&asked);
    run.config = asked;
    run.backend = backend;
    if (strlen(asked.out) > 1900)
        usage_fail("--out: a path of %zu bytes is too long", strlen(asked.out));
    if (asked.out[0])
        snprintf(run.out, sizeof(run.out), "%s", asked.out);
    else
        default_out(&asked, !asked.resume && !asked.prompt, run.out);
    ranks.watchdog = 10 * asked.watchdog; // some may read longer than others
    broadcast(run.out, sizeof(run.out));
    if (asked.prompt) {
        answer_prompt(&run, &asked);
        return 0;
    }
    if (!open_run(&run, &asked))
        return 0;
    ranks.watchdog = asked.watchdog;
    announce(&run);
    int interrupted = train(&run);
    char begin[32] = "";
    const char *name = program_name;
    if (MANY)
        snprintf(begin, sizeof(begin), "mpirun -np %d ", ranks.size);
    if (interrupted) {
        printf("\nstopped after step %d of %d; go on with\n  %s./%s --out %s --resume\n", run.step, run.config.steps,
               begin, name, run.out);
    } else {
        show_experts(&run);
        printf("The run is in %s: log.jsonl, and in %s/latest the model, which Hugging Face's transformers %s.\n"
               "What next:\n"
               "  ./%s --out %s --prompt \"Once upon a time\"\n"
               "  %s./%s --out %s --resume --steps %d\n"
               "  data/tinystories.sh && %s./%s        (real stories; see README.md)\n",
               run.out, run.out, *matching_class(&run.config) ? "opens as it is" : "has no class for", name, run.out,
               begin, name, run.out, run.config.steps * 2, begin, name);
    }
    close_run(&run);
    return interrupted ? 130 : 0;
}

int run_program(int argc, char **argv, const Backend *backend) {
#ifdef _OPENMP
    // Waiting threads should sleep. OpenMP's default is to spin, which on a machine with anything else to do makes a step
    // ten times slower. Its runtime reads this before main, so the program begins once more.
    if (!getenv("OMP_WAIT_POLICY") && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) {
        setenv("OMP_STACKSIZE", "4M", 0); // product_rows packs on the stack, and some systems give a thread but 128 KiB
        execv("/proc/self/exe", argv);
    }
#endif
#ifdef USE_MPI
    int provided;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
    comm.all = MPI_COMM_WORLD;
    if (provided < MPI_THREAD_FUNNELED)
        fail("this MPI cannot be used by a program of several threads");
    MPI_Comm_rank(comm.all, &ranks.rank);
    MPI_Comm_size(comm.all, &ranks.size);
    MPI_Comm_dup(comm.all, &comm.watch);
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) // rank 0 alone speaks
        fail("/dev/null: cannot open: %s", strerror(errno));
#endif
    int status = trainer_main(argc, argv, backend);
    if (fflush(stdout) != 0)
        fail("standard output: cannot write: %s", strerror(errno));
#ifdef USE_MPI
    MPI_Finalize();
#endif
    return status;
}

#ifndef TRAIN_MOE_NO_MAIN
int main(int argc, char **argv) {
    return run_program(argc, argv, &cpu_backend);
}
#endif
