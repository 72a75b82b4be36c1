// The options of the command line, and the recipes, which are rows of options.
// Gives: options, recipes, add_options, config_defaults, config_recipe, config_check, parse_command_line, ...
// Needs: Config of train_moe.c, which includes it behind that; dev/routers/all.h, which adds the routers' options.
// An option is one field of Config and one row of a table: its name, default, check and help, and its entry in the log
// and in checkpoints. A recipe is a router of the literature, as a row of options, which the command line overrides.
#pragma once
#include "util.h"
#include "precision.h"
#include "../data/blocks.h"

const char *const activation_names[] = {"swiglu", "geglu", "relu", "gelu", NULL};
const char *const dense_names[] = {"swiglu", "geglu", "relu", "gelu", "same", NULL};
const char *const init_names[] = {"normal", "truncated", NULL};
const char *const score_names[] = {"softmax", "sigmoid", NULL};
const char *const select_names[] = {"topk", "hierarchical", "threshold", "expert-choice", "balanced", "hash", NULL};
const char *const gate_names[] = {"probability", "renormalized", NULL};
const char *const balance_names[] = {"switch", "gshard", "unbiased", "width", "cv2", "variance", NULL};
const char *const group_names[] = {"sequence", "batch", "step", NULL};
const char *const schedule_names[] = {"cosine", "wsd", "constant", NULL};
const char *const optimizer_names[] = {"adamw", "muon", NULL};
enum { MIX_ATTENTION, MIX_LSTM };
const char *const mixer_names[] = {"attention", "lstm", NULL};
enum { OVER_HEAD, OVER_ROW };
const char *const qk_norm_names[] = {"head", "row", NULL};
enum { ROPE_NONE, ROPE_LINEAR, ROPE_LLAMA3 };
const char *const rope_names[] = {"none", "linear", "llama3", NULL};
enum { NO_BLOCKS, ALL_Q8_0, ALL_Q4_0, MIXED, MIXED_OFTEN };
const char *const scheme_names[] = {"none", "q8_0", "q4_0", "mixed", "mixed-often", NULL};
enum { NO_CODEC, CODE_BF16, CODE_INT8, CODE_TOPK };
const char *const compress_names[] = {"none", "bf16", "int8", "topk", NULL};
const char *const moments_names[] = {"fp32", "bf16", NULL};

// MODEL says what the model computes. ORDER says which data it sees when, and which optimizer moves it, since none can go
// on with what another one remembers: Muon leaves second moments at 0, and AdamW would divide by them. A resumed run may
// change neither, but for the pieces of a step (--batch). TRAIN options are taken from the checkpoint where the command
// line does not give them, RUN options belong to this call alone.
enum { MODEL, ORDER, TRAIN, RUN };

typedef struct Option {
    const char *name;
    char kind;                // i integer, d number, s text, e one of `words`, f flag, which takes no value
    size_t offset;            // of its field in Config
    const char *standard;     // default, as one would type it
    double low, high;         // i, d: what is allowed
    const char *const *words; // e
    int when;
    const char *heading, *help;
} Option;

typedef struct Recipe {
    const char *name;
    int year;    // 0: no paper of its own
    double load; // the largest load over the mean one that goes without a warning, once trained a little; 0: any
    const char *summary, *choices, *paper;
} Recipe;

#define INTEGER(name, field, standard, low, high, when, heading, help)                                                 \
    {name, 'i', offsetof(Config, field), standard, low, high, NULL, when, heading, help}
#define NUMBER(name, field, standard, low, high, when, heading, help)                                                  \
    {name, 'd', offsetof(Config, field), standard, low, high, NULL, when, heading, help}
#define WORD(name, field, standard, words, when, heading, help)                                                        \
    {name, 'e', offsetof(Config, field), standard, 0, 0, words, when, heading, help}
#define TEXT(name, field, standard, when, heading, help)                                                               \
    {name, 's', offsetof(Config, field), standard, 0, 0, NULL, when, heading, help}
#define FLAG(name, field, when, heading, help)                                                                         \
    {name, 'f', offsetof(Config, field), "0", 0, 1, NULL, when, heading, help}
#define RANKS "Ranks: N processes, each with --batch sequences of a micro-step, started by mpirun -np N"
#define PACES "Paces, in steps; 0 turns off"

// The options of the lesson's model and of the program. The headings stand in -h in the order in which they come here.
const Option base_options[] = {
    TEXT("data", data, "", TRAIN, "Files",
         "folder with token files (a word of the name is train or val), tokenizer.json "
         "[data/tinystories, else data/stories]"),
    TEXT("out", out, "", RUN, "Files",
         "run directory: log.jsonl and checkpoints [runs/RECIPE, a fresh one for each new run]"),
    TEXT("init", init, "", RUN, "Files", "start from the weights in this checkpoint or Hugging Face directory"),
    TEXT("tokenizer", tokenizer, "", RUN, "Files", "tokenizer.json to use where the data folder has none"),
    FLAG("resume", resume, RUN, "Files", "go on from the last checkpoint in --out; start where there is none"),
    FLAG("trust-weights", trust_weights, RUN, "Files",
         "load a checkpoint as it is, even where its files do not have the checksums that were written beside them"),
    TEXT("export", export_to, "", RUN, "Files",
         "write the model in --out, or in --init, to this new file, as a GGUF file for llama.cpp, and exit"),
    WORD("export-type", export_type, "f16", format_names, RUN, "Files",
         "numbers of that file: float32, float16, or 8 or 4 bits and one scale for 32 of them"),
    WORD("quantize", quantize, "none", scheme_names, RUN, "Files",
         "write the model in --out, or in --init, with experts of 8 or 4 bits, and exit; mixed: 4 for those chosen rarely"),
    TEXT("quantized", quantized, "", RUN, "Files", "the new folder of that model [OUT-q8_0 and the like]"),
    NUMBER("few", few, "0.5", 0, 1, RUN, "Files", "with --quantize mixed: the share of a layer's experts that have 4 bits"),
    FLAG("evaluate", evaluate, RUN, "Files", "print the validation loss of the model in --out, or in --init, and exit"),
    TEXT("recipe", recipe, "mixtral", MODEL, "Model", "which router: a row of the options below; see --list-recipes"),
    FLAG("list-recipes", list_recipes, RUN, "Model", "show the recipes and what each one chooses"),
    INTEGER("layers", layers, "2", 1, 1000, MODEL, "Model", "layers (L)"),
    INTEGER("dim", dim, "128", 2, 65536, MODEL, "Model", "width of the model (C)"),
    INTEGER("heads", heads, "8", 1, 1024, MODEL, "Model", "query heads (H)"),
    INTEGER("kv-heads", kv_heads, "0", 0, 1024, MODEL, "Model", "key and value heads (KV) [as many as --heads]"),
    INTEGER("head-width", head_width, "0", 0, 1 << 16, MODEL, "Model", "width of a head (D) [--dim / --heads]"),
    INTEGER("seq", seq, "256", 1, 1 << 20, ORDER, "Model", "tokens in a sequence (T)"),
    FLAG("untied", untied, MODEL, "Model", "give the output its own matrix instead of the embedding's"),
    NUMBER("norm-eps", norm_eps, "1e-5", 0, 1, MODEL, "Model", "epsilon inside RMSNorm's root"),
    NUMBER("rope-theta", rope_theta, "10000", 1, 1e12, MODEL, "Model", "base of the rotary position frequencies"),
    WORD("rope-scaling", rope_scaling, "none", rope_names, MODEL, "Model",
         "slower positions for longer texts: linear divides all frequencies by --rope-factor, llama3 only the low ones"),
    NUMBER("rope-factor", rope_factor, "8", 1, 1e6, MODEL, "Model", "what they are divided by"),
    NUMBER("rope-low", rope_low, "1", 0, 1e6, MODEL, "Model", "llama3: what turns fewer times in --rope-original tokens is slow"),
    NUMBER("rope-high", rope_high, "4", 0, 1e6, MODEL, "Model", "llama3: what turns more often than this stays as it is"),
    INTEGER("rope-original", rope_original, "8192", 1, 1 << 30, MODEL, "Model", "llama3: tokens of a text before the scaling"),
    FLAG("qkv-bias", qkv_bias, MODEL, "Model", "a bias is added to queries, keys and values"),
    FLAG("qk-norm", qk_norm, MODEL, "Model", "queries and keys have an RMSNorm of their own in each head"),
    WORD("qk-norm-over", qk_norm_over, "head", qk_norm_names, MODEL, "Model",
         "the numbers that share such a norm: those of a head, or all queries, and all keys, of a token"),
    INTEGER("ngrams", ngrams, "0", 0, 1 << 26, MODEL, "Model",
            "rows of a table of word pairs, found by a hash and added to the embedding; 0: no table"),
    INTEGER("ngram-order", ngram_order, "2", 2, 3, MODEL, "Model", "3: word triples have rows of that table, too"),
    FLAG("ngram-gate", ngram_gate, MODEL, "Model", "each layer takes from that table once more, through a gate of its own"),
    FLAG("value-embedding", value_embedding, MODEL, "Model",
         "in each layer every word has a vector that is added to its values in attention"),
    WORD("mixer", mixer, "attention", mixer_names, MODEL, "Model", "what mixes along the sequence"),
    INTEGER("norms", norms, "1", 0, 1, MODEL, "Model", "0: no RMSNorm, neither in the layers nor before the output"),
    INTEGER("last-feed", last_feed, "1", 0, 1, MODEL, "Model", "0: the last layer only mixes, and does not feed forward"),
    INTEGER("experts", experts, "8", 1, 4096, MODEL, "Experts", "routed experts (E)"),
    INTEGER("topk", topk, "2", 1, 256, MODEL, "Experts", "routed experts chosen for each token (K)"),
    INTEGER("shared", shared, "0", 0, 256, MODEL, "Experts", "shared experts, which see every token (S)"),
    INTEGER("ffn", ffn, "256", 1, 1 << 20, MODEL, "Experts",
         "hidden width of one expert (F); a dense layer has (K+S)*F"),
    INTEGER("shared-ffn", shared_ffn, "0", 0, 1 << 20, MODEL, "Experts", "width of the shared experts together [S*F]"),
    INTEGER("dense-ffn", dense_ffn, "0", 0, 1 << 20, MODEL, "Experts", "width of a dense layer [(K+S)*F]"),
    FLAG("shared-gate", shared_gate, MODEL, "Experts", "a token takes the sigmoid of a gate times the shared experts' answer"),
    INTEGER("moe-every", moe_every, "1", 0, 1000, MODEL, "Experts",
         "every n-th layer has experts, the others are dense; 0: none has"),
    INTEGER("dense-first", dense_first, "0", 0, 1000, MODEL, "Experts", "this many first layers are dense"),
    WORD("activation", activation, "swiglu", activation_names, MODEL, "Experts", "of the experts"),
    WORD("dense-activation", dense_activation, "same", dense_names, MODEL, "Experts",
         "of dense layers; same: that of the experts"),
    FLAG("moe-sigmoid", moe_sigmoid, MODEL, "Experts", "a layer with experts adds the sigmoid of what they answer"),
    WORD("init-scheme", init_scheme, "normal", init_names, MODEL, "Experts",
         "first weights: N(0,0.02), or truncated N(0,0.1/fan-in)"),
    WORD("score", score, "softmax", score_names, MODEL, "Router: scores", "what makes scores p of logits"),
    WORD("select", select, "topk", select_names, MODEL, "Router: choice and weight", "how experts are chosen"),
    NUMBER("bias-rate", bias_rate, "0", 0, 1, MODEL, "Router: choice and weight",
         "choose by p + b; b moves by this after a step, against the load; 0: no b"),
    WORD("gate", gate, "renormalized", gate_names, MODEL, "Router: choice and weight",
         "weight of a chosen expert: its p, or that over the chosen ones' sum"),
    NUMBER("scale", scale, "1", 1e-6, 1000, MODEL, "Router: choice and weight", "all weights times this"),
    WORD("balance", balance, "switch", balance_names, TRAIN, "Router: balance", "form of the balance loss"),
    NUMBER("aux-weight", aux_weight, "0.01", 0, 1e6, TRAIN, "Router: balance",
         "weight of the balance loss, which is 1 at balance"),
    NUMBER("z-weight", z_weight, "0", 0, 1e6, TRAIN, "Router: balance", "weight of the router's z-loss"),
    WORD("group", group, "batch", group_names, TRAIN, "Router: balance",
         "the tokens over which loads, capacities and losses are taken"),
    NUMBER("capacity-factor", capacity_factor, "0", 0, 1e6, TRAIN, "Router: balance",
         "an expert takes at most this times its fair share; 0: all that comes"),
    NUMBER("eval-capacity-factor", eval_capacity_factor, "0", 0, 1e6, TRAIN, "Router: balance",
         "the same at evaluation, of each sequence, early tokens first"),
    INTEGER("lora", lora, "0", 0, 4096, ORDER, "Adapters",
            "train low-rank pairs of this rank beside the weights of --init, which stay frozen; 0: train all weights"),
    NUMBER("lora-alpha", lora_alpha, "16", 1e-6, 1e6, ORDER, "Adapters", "what a pair adds is multiplied by this over the rank"),
    TEXT("lora-targets", lora_targets, "attention,experts", ORDER, "Adapters",
         "which matrices have a pair: a list of attention, experts, router"),
    TEXT("merge", merge, "", RUN, "Adapters",
         "write the model that the adapter in --out makes of its base, as a Hugging Face directory, and exit"),
    TEXT("teacher", teacher, "", TRAIN, "Distillation",
         "learn from this model, too: the folder of a checkpoint, a run, or a Hugging Face model with the same tokenizer"),
    NUMBER("distill-weight", distill_weight, "0.5", 0, 1, TRAIN, "Distillation",
           "what the teacher counts; the text counts 1 minus this"),
    NUMBER("distill-temperature", distill_temperature, "2", 0.01, 1000, TRAIN, "Distillation",
           "by which both models' logits are divided: above 1 unlikely words count more"),
    INTEGER("offload", offload, "0", 0, 4096, RUN, "Memory",
            "of each layer so many experts are in memory, the others in a file (on a GPU: in the host's) until needed; 0: all"),
    FLAG("offload-cold", offload_cold, RUN, "Memory",
         "an expert that leaves memory leaves the system's cache of files, too: it comes back from the disk"),
    TEXT("offload-dir", offload_dir, "", RUN, "Memory", "the folder of that file, which has no name and goes with the process [OUT]"),
    INTEGER("batch", batch, "2", 1, 1 << 20, ORDER, "Training", "sequences in a micro-step (B)"),
    INTEGER("accum", accum, "1", 1, 1 << 20, ORDER, "Training", "micro-steps in a step"),
    INTEGER("steps", steps, "4000", 1, 2000000000, TRAIN, "Training", "optimizer steps"),
    NUMBER("minutes", minutes, "0", 0, 1e6, TRAIN, "Training",
           "how long all of it takes; the speed of a short trial sets --steps, and with it the schedule; 0: off"),
    NUMBER("lr", lr, "4e-3", 0, 100, TRAIN, "Training", "learning rate at its highest"),
    NUMBER("min-lr", min_lr, "-1", -1, 100, TRAIN, "Training", "learning rate at the end [a tenth of --lr]"),
    INTEGER("warmup", warmup, "100", 0, 2000000000, TRAIN, "Training", "steps over which the learning rate rises"),
    WORD("schedule", schedule, "cosine", schedule_names, TRAIN, "Training",
         "then: cosine; wsd: constant, last fifth linear; constant"),
    NUMBER("weight-decay", weight_decay, "0.1", 0, 100, TRAIN, "Training", "decay of the matrices"),
    NUMBER("beta1", beta1, "0.9", 0, 0.999999, TRAIN, "Training", "AdamW: memory of the mean gradient"),
    NUMBER("beta2", beta2, "0.99", 0, 0.999999, TRAIN, "Training", "AdamW: memory of the mean squared gradient"),
    WORD("optimizer", optimizer, "muon", optimizer_names, ORDER, "Training",
         "what moves the matrices of the layers (dev/muon.h); all else has AdamW"),
    WORD("moments", moments, "fp32", moments_names, TRAIN, "Training",
         "how the optimizer stores its moments; bf16: half the memory on a GPU; a CPU rounds them alike and saves none"),
    WORD("precision", precision, PRECISION_STANDARD, precision_names, TRAIN, "Training",
         "in which matrices are multiplied; bf16: rounded to bfloat16, with sums in float32, as on a GPU"),
    NUMBER("dropout", dropout, "0", 0, 0.99, TRAIN, "Training",
           "of what a layer adds, each number becomes 0 with this probability"),
    NUMBER("clip", clip, "1", 0, 1e30, TRAIN, "Training", "largest gradient norm; 0: no clipping"),
    INTEGER("seed", seed, "1", 0, 2147483647, ORDER, "Training", "of weights, data order and sampling"),
    FLAG("recompute", recompute, RUN, "Training", "keep fewer activations, and work them out again on the way back"),
    INTEGER("threads", threads, "0", 0, 4096, RUN, "Training", "threads [all cores]"),
#ifdef USE_MPI
    INTEGER("ep", ep, "0", 0, 65536, RUN, RANKS,
         "the experts are divided among so many ranks [the largest common divisor of ranks and experts]"),
    INTEGER("overlap", overlap, "1", 0, 1, RUN, RANKS,
         "1: half of a batch travels while the experts work on the other half"),
    INTEGER("replicate", replicate, "0", 0, 4096, RUN, RANKS,
         "so many of a layer's busiest experts have a second copy on another rank"),
    INTEGER("replicate-every", replicate_every, "50", 1, 2000000000, RUN, RANKS,
         "they are chosen anew, and the first time, after so many steps"),
    WORD("compress", compress, "none", compress_names, RUN, RANKS,
         "gradients between ranks in fewer bits; what is lost is added in the next step"),
    NUMBER("compress-ratio", compress_ratio, "0.01", 1e-6, 1, RUN, RANKS, "topk: the share of the gradients that is sent"),
    FLAG("compress-rows", compress_rows, RUN, RANKS, "rows between ranks are rounded to bfloat16"),
    INTEGER("watchdog", watchdog, "30", 0, 86400, RUN, RANKS,
         "after so many seconds of waiting all are asked; who has not answered in 10 more ends the job; 0: never"),
    FLAG("trace", trace, RUN, RANKS, "each rank writes what it did in each step: trace-RANK.jsonl in --out"),
#endif
    INTEGER("log-every", log_every, "60", 0, 2000000000, TRAIN, PACES, "a line in the log"),
    INTEGER("eval-every", eval_every, "600", 0, 2000000000, TRAIN, PACES, "validation"),
    INTEGER("eval-tokens", eval_tokens, "32768", 0, 2000000000, TRAIN, PACES,
            "tokens of a validation, evenly spread; 0: all; the last one reads all where that is quick"),
    INTEGER("sample-every", sample_every, "1200", 0, 2000000000, TRAIN, PACES, "a story"),
    INTEGER("save-every", save_every, "600", 0, 2000000000, TRAIN, PACES,
         "a checkpoint; the last step always saves one"),
    INTEGER("keep", keep, "2", 1, 1000000, TRAIN, PACES, "checkpoints kept"),
    TEXT("prompt", prompt, NULL, RUN, "Generation",
         "go on from this text with the model in --out, and exit; - reads standard input; line breaks at its end do not count"),
    INTEGER("tokens", tokens, "300", 1, 2000000000, RUN, "Generation", "at most this many"),
    NUMBER("temperature", temperature, "0.5", 0, 1000, RUN, "Generation", "0: always the likeliest token"),
    INTEGER("top-k", top_k, "0", 0, 2000000000, RUN, "Generation", "choose among this many likeliest tokens; 0: all"),
    NUMBER("top-p", top_p, "0.95", 0, 1, RUN, "Generation",
         "choose among the likeliest tokens that hold this much probability"),
    FLAG("help", help, RUN, "Generation", "this list (also -h)"),
};

// What a row does not say is as in the defaults above, which are mixtral's.
const Recipe base_recipes[] = {
    {"mixtral", 2024, 2.5, "top-2 of 8 SwiGLU experts, weights renormalised over the two, no token dropped",
     "--activation swiglu --gate renormalized --group batch --aux-weight 0.01", "Jiang et al., Mixtral of Experts"},
    {"jacobs", 1991, 0, "every expert answers, weighted by a softmax gate",
     "--topk 8 --ffn 64 --gate probability --aux-weight 0",
     "Jacobs, Jordan, Nowlan, Hinton, Adaptive Mixtures of Local Experts"},
    {"dense", 2017, 0, "no router: one feed-forward of width K*F, the same work per token as K experts",
     "--moe-every 0", "Vaswani et al., Attention Is All You Need"},
    {"deepseek-v3", 2024, 3, "sigmoid scores; a bias that follows the load chooses, the score alone weighs",
     "--experts 32 --topk 7 --shared 1 --ffn 64 --score sigmoid --scale 2.5 --group-score top2 --bias-rate 0.001 "
     "--group sequence --balance unbiased --aux-weight 0.0001 --dense-first 1",
     "DeepSeek-AI, DeepSeek-V3"},
    {"olmoe", 2024, 3.5, "top-8 of 64 narrow experts, weights as they are; z-loss",
     "--experts 64 --topk 8 --ffn 64 --gate probability --z-weight 0.001", "Muennighoff et al., OLMoE"},
    {"qwen3", 2025, 3.5, "top-8 of 64 narrow experts, renormalised; balanced over the whole step",
     "--experts 64 --topk 8 --ffn 64 --group step --aux-weight 0.008",
     "Qwen team, Qwen3; Qiu et al., Demons in the Detail"},
    {"fast", 0, 2.5, "the mixture that learns most by the clock: mixtral's router, Muon, and tables that are looked up",
     "--qk-norm --value-embedding --ngrams 16384 --optimizer muon",
     "doc/clock.md tells what was tried"},
};

// All options and recipes: those above, and what each router adds. collect_options() fills the lists before main.
Option options[MAX_OPTIONS];
int option_count = 0;
Recipe recipes[64];
int recipe_count = 0;

// Each option goes behind the last one of its heading.
void add_options(const Option *list, int count) {
    if (option_count + count > MAX_OPTIONS) {
        fail("there are more than %d options; raise MAX_OPTIONS", MAX_OPTIONS);
    }
    for (int i = 0; i < count; i++) {
        int at = option_count;
        while (at > 0 && strcmp(options[at - 1].heading, list[i].heading)) {
            at--;
        }
        at = at > 0 ? at : option_count; // a new heading
        memmove(&options[at + 1], &options[at], (size_t)(option_count - at) * sizeof(Option));
        options[at] = list[i];
        option_count++;
    }
}

// Recipes stand in the order of their years, those without a paper at the end.
void add_recipes(const Recipe *list, int count) {
    if (recipe_count + count > COUNT(recipes)) {
        fail("there are more than %d recipes", COUNT(recipes));
    }
    for (int i = 0; i < count; i++) {
        int at = recipe_count;
        while (at > 0 && list[i].year && (!recipes[at - 1].year || recipes[at - 1].year > list[i].year)) {
            at--;
        }
        memmove(&recipes[at + 1], &recipes[at], (size_t)(recipe_count - at) * sizeof(Recipe));
        recipes[at] = list[i];
        recipe_count++;
    }
}

int find_word(const char *const *words, const char *text) {
    for (int i = 0; words[i]; i++) {
        if (!strcmp(words[i], text)) {
            return i;
        }
    }
    return -1;
}

int find_option(const char *name) {
    for (int i = 0; i < option_count; i++) {
        if (!strcmp(options[i].name, name)) {
            return i;
        }
    }
    return -1;
}

__attribute__((noreturn)) void unknown_option(const char *word); // effects.h
__attribute__((noreturn)) void unknown_recipe(const char *name);

const Recipe *find_recipe(const char *name) {
    for (int i = 0; i < recipe_count; i++) {
        if (!strcmp(recipes[i].name, name)) {
            return &recipes[i];
        }
    }
    unknown_recipe(name);
}

// ---- one option as text

// Sets one field from text, which is kept by reference. path: the file that says so, or NULL for the command line.
void set_option(Config *config, const Option *option, const char *value, const char *path) {
    char *field = (char *)config + option->offset, expected[256] = "";
    if (option->kind == 's') {
        memcpy(field, &value, sizeof(value));
    } else if (option->kind == 'e') {
        int word = find_word(option->words, value);
        memcpy(field, &word, sizeof(word));
        for (int i = 0; word < 0 && option->words[i]; i++) {
            size_t used = strlen(expected);
            snprintf(expected + used, sizeof(expected) - used, "%s%s", i ? ", " : "one of: ", option->words[i]);
        }
    } else {
        char *end;
        errno = 0;
        double number = strtod(value, &end);
        int valid = end != value && !*end && !errno && number >= option->low && number <= option->high;
        if (option->kind != 'd') {
            valid = valid && number == floor(number) && !strpbrk(value, ".eExX");
        }
        if (!valid) {
            snprintf(expected, sizeof(expected), "%s from %.15g to %.15g",
                     option->kind == 'd' ? "a number" : "a whole number", option->low, option->high);
        } else if (option->kind == 'd') {
            memcpy(field, &number, sizeof(number));
        } else {
            int integer = (int)number;
            memcpy(field, &integer, sizeof(integer));
        }
    }
    if (*expected && path) {
        fail("%s: %s is '%s'; expected %s", path, option->name, value, expected);
    }
    if (*expected) {
        usage_fail("--%s: '%s' is not %s", option->name, value, expected);
    }
}

// The shortest of two forms that gives the same number when read again.
const char *number_text(double number, char buffer[64]) {
    snprintf(buffer, 64, "%.15g", number);
    if (strtod(buffer, NULL) != number) {
        snprintf(buffer, 64, "%.17g", number);
    }
    return buffer;
}

// One field as text, into buffer where it is not text already.
const char *option_text(const Config *config, const Option *option, char buffer[64]) {
    const char *field = (const char *)config + option->offset;
    if (option->kind == 's') {
        const char *text;
        memcpy(&text, field, sizeof(text));
        return text ? text : "";
    }
    if (option->kind == 'd') {
        double number;
        memcpy(&number, field, sizeof(number));
        return number_text(number, buffer);
    }
    int integer;
    memcpy(&integer, field, sizeof(integer));
    if (option->kind == 'e') {
        return option->words[integer];
    }
    snprintf(buffer, 64, "%d", integer);
    return buffer;
}

// A copy of text that lives as long as the program.
const char *keep_text(const char *text) {
    static char **kept = NULL;
    static size_t count = 0;
    kept = (char **)reallocate(kept, count + 1, sizeof(char *));
    kept[count] = copy_text(text);
    return kept[count++];
}

// ---- defaults, recipe, command line

void config_defaults(Config *config) {
    memset(config, 0, sizeof(*config));
    for (int i = 0; i < option_count; i++) {
        if (options[i].standard) {
            set_option(config, &options[i], options[i].standard, NULL);
        }
    }
}

// Sets the recipe's choices, but for what the command line gave.
void config_recipe(Config *config, const char *name) {
    const Recipe *recipe = find_recipe(name);
    config->recipe = recipe->name;
    char *text = copy_text(recipe->choices), *rest = NULL;
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        int o = find_option(word + 2);
        const char *value = options[o].kind == 'f' ? "1" : strtok_r(NULL, " ", &rest);
        if (!config->given[o]) {
            set_option(config, &options[o], value, NULL);
        }
    }
    free(text);
}

#include "effects.h" // options that would have no effect

// What the command line asks for, over the recipe, over the defaults.
void parse_command_line(Config *c, int argc, char **argv) {
    config_defaults(c);
    for (int i = 1; i < argc; i++) {
        // --name value, --name=value, or --name alone for a flag.
        const char *name = strcmp(argv[i], "-h") ? argv[i] : "--help", *value = strchr(name, '=');
        char word[64];
        snprintf(word, sizeof(word), "%.*s", value ? (int)(value - name) : 63, name);
        int o = strncmp(word, "--", 2) ? -1 : find_option(word + 2);
        if (o < 0) {
            unknown_option(word);
        }
        if (options[o].kind == 'f' && value) {
            usage_fail("%s takes no value", word);
        }
        if (options[o].kind == 'f') {
            value = "1";
        } else if (value) {
            value++;
        } else {
            value = argv[++i];
        }
        if (!value) {
            usage_fail("%s needs a value", word);
        }
        set_option(c, &options[o], value, NULL);
        c->given[o] = 1;
    }
    config_recipe(c, c->recipe);
}

// ---- what does not go together

int moe_layers(const Config *c);             // train_moe.c
const char *routers_refuse(const Config *c); // dev/routers/all.h
const char *mixer_refuses(const Config *c);  // dev/mixers/all.h
const char *parts_refuse(const Config *c);   // dev/parts.h
int head_width(const Config *c);             // dev/mixers/attention_experts.h
const char *lora_refuses(const Config *c);   // dev/lora_tensors.h
int router_outputs(const Config *c);
int most_choices(const Config *c);

// A router's choices that do not go together are refused, each with its reason: here those of the lesson's router, in
// dev/routers those of single papers.
void config_check_router(const Config *c) {
    int topk = c->select == TOP_K, of_counts = c->balance == SWITCH || c->balance == WIDTH;
    const struct {
        int wrong;
        const char *reason;
    } rules[] = {
        {c->topk > c->experts * c->routers || c->max_active > c->experts,
         "a token cannot have more experts than there are"},
        {c->gate == RENORMALIZED && c->experts > 1 && most_choices(c) == c->routers,
         "where one is chosen, --gate renormalized makes its weight always 1, so the router would never learn; use "
         "--gate probability or choose more (for each router, and on each level)"},
        {c->z_weight > 0 && c->score == SIGMOID, "--z-weight is of softmax scores"},
        {c->bias_rate > 0 && !topk, "--bias-rate and --history-decay go with --select topk"},
        {c->balance == UNBIASED && !topk, "--balance unbiased goes with --select topk"},
        {c->group == STEP && !of_counts,
         "--group step goes with one router and with losses of counts: --balance switch or width, --device-weight"},
    };
    const char *reason = NULL;
    for (int i = 0; i < COUNT(rules) && !reason; i++) {
        reason = rules[i].wrong ? rules[i].reason : NULL;
    }
    reason = reason ? reason : routers_refuse(c);
    if (reason) {
        usage_fail("%s (here: --recipe %s, --experts %d, --topk %d)", reason, c->recipe, c->experts, c->topk);
    }
}

// Fills in what follows from other fields and refuses what does not go together.
void config_check(Config *c) {
    if (!c->kv_heads) {
        c->kv_heads = c->heads;
    }
    const char *reason = mixer_refuses(c) ? mixer_refuses(c) : parts_refuse(c);
    if (reason) {
        usage_fail("%s", reason);
    }
    int heads = c->mixer == MIX_ATTENTION, shares = heads && !c->head_width; // a head has its share of --dim
    if (shares && c->dim % c->heads) {
        usage_fail("--dim %d is not divisible by --heads %d", c->dim, c->heads);
    }
    if (shares && c->dim / c->heads % 2) {
        usage_fail("--dim %d / --heads %d: heads must have an even width for rotary positions", c->dim, c->heads);
    }
    if (heads && c->heads % c->kv_heads) {
        usage_fail("--heads %d is not divisible by --kv-heads %d", c->heads, c->kv_heads);
    }
    if (c->moe_every && !moe_layers(c)) {
        usage_fail(
            "--moe-every %d with --dense-first %d%s leaves none of %d layers with experts; --recipe dense says so openly",
            c->moe_every, c->dense_first, c->last_feed ? "" : " and --last-feed 0", c->layers);
    }
    if (c->moe_every) {
        config_check_router(c);
    }
    if (c->lora && !c->given[find_option("optimizer")]) {
        c->optimizer = ADAMW;
    }
    if (lora_refuses(c)) {
        usage_fail("%s", lora_refuses(c));
    }
    check_precision(c);

    // Rows of a batch are counted by int, and so are their numbers.
    double tokens = (double)c->batch * c->seq, widest = fmax(3.0 * c->dim, 2.0 * (c->topk + c->shared) * c->ffn);
    widest = fmax(widest, fmax((c->heads + 2.0 * c->kv_heads) * head_width(c), 2.0 * fmax(c->dense_ffn, c->shared_ffn)));
    if (c->moe_every) {
        double scores = fmax(router_outputs(c), most_choices(c) * (double)c->groups);
        widest = fmax(widest, 2.0 * c->subtokens * scores);
    }
    widest = fmax(widest, c->mixer == MIX_LSTM ? 4.0 * fmax(c->cell, c->dim) : 0);
    if (c->attention_experts) { // the scores, and the answers of all choices before they are summed
        double answers = c->attention_topk * fmax(c->dim, c->head_width);
        widest = fmax(widest, c->heads * fmax(c->attention_experts, answers));
    }
    if (c->moe_every && 3.0 * c->experts * c->ffn > INT_MAX) {
        usage_fail("--experts %d times --ffn %d is too much", c->experts, c->ffn);
    }
    if (tokens * widest > INT_MAX) {
        usage_fail("--batch %d times --seq %d tokens at once is too much for this width; take a smaller batch and "
                   "--accum",
                   c->batch, c->seq);
    }
    if (c->optimizer == MUON && c->mixed && c->moe_every) {
        usage_fail("--optimizer muon takes experts of one width; with --mixed use --optimizer adamw");
    }
    if (c->min_lr > c->lr) {
        usage_fail("--min-lr %g is more than --lr %g", c->min_lr, c->lr);
    }
}

// ---- -h and --list-recipes

void print_option(const Option *o) {
    char left[256];
    int n = snprintf(left, sizeof(left), "--%s", o->name);
    if (o->kind == 'i' || o->kind == 'd' || o->kind == 's') {
        const char *argument = o->kind == 'i' ? "N" : "X";
        n += snprintf(left + n, sizeof(left) - (size_t)n, " %s", o->kind == 's' ? "TEXT" : argument);
    }
    for (int w = 0; o->kind == 'e' && o->words[w]; w++) {
        n += snprintf(left + n, sizeof(left) - (size_t)n, "%s%s", w ? "|" : " ", o->words[w]);
    }
    printf("  %-26s %s", left, o->help);
    int explained = strchr(o->help, '[') != NULL;
    printf(o->kind == 'f' || explained || !o->standard ? "\n" : " [%s]\n", o->standard);
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
        if (!i || strcmp(options[i].heading, options[i - 1].heading)) {
            printf("\n%s\n", options[i].heading);
        }
        print_option(&options[i]);
    }
    printf("\nCtrl-C, SIGTERM, SIGHUP, or the end of the program that reads the output (| head) end the step, save, and exit;\n"
           "a second Ctrl-C or SIGTERM ends at once. Exit status: 0 done, 1 a file or the machine, 2 the command line,\n"
           "130 stopped and saved.\n");
}

void print_recipes(void) {
    printf("Recipes: each is a row of options over the defaults, which are mixtral's; later options override it.\n"
           "Each stands with its year, what it chooses, and its paper; doc/recipes.md explains them.\n");
    for (int i = 0; i < recipe_count; i++) {
        const Recipe *r = &recipes[i];
        char year[16] = "no paper";
        if (r->year) {
            snprintf(year, sizeof(year), "%d", r->year);
        }
        printf("\n%s (%s): %s\n    %s\n    %s\n", r->name, year, r->summary, r->choices, r->paper);
    }
}
