// dev/bench/scale: how long would a training step of a Mixture-of-Experts model take on 8 to 2,048 devices, and what of it is
// computing, what all-to-all? A small model of time, not a measurement: arithmetic on bandwidths, rates and the
// experts' load, which comes from a log.jsonl of train_moe (--log) or is made up (--skew). `dev/bench/scale --check` holds it
// against figures that others have published; doc/scale.md says what it leaves out.
//
//   dev/bench/scale                                                      DeepSeekMoE 16B on H800s, even load
//   dev/bench/scale --model deepseek-v3 --overlap 1 --log runs/x/log.jsonl
//
// Units inside: seconds, bytes, operations. Devices stand in nodes; a token's row goes over links inside the node and
// over one network card (NIC) a device between nodes. W devices share the data, ep of them the experts (expert
// parallelism); d is a device of such a group, x a node of it.

#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"

// ---------------------------------------------------------------------------------------------------------------------
// Options and presets

enum { SEND_EXPERT, SEND_DEVICE, SEND_NODE };
enum { IN_ORDER, SPREAD };
const char *const send_names[] = {"expert", "device", "node", NULL};
const char *const placement_names[] = {"order", "spread", NULL};

typedef struct Setup {
    double node, torus, link, nic, link_latency, nic_latency, startup, peak, busy;
    double attention_share, dense_share, expert_share, speedup;
    double layers, dense_layers, dim, experts, topk, shared, ffn, seq, vocab, attention_weights, attention_width;
    double tokens, accum, ep, stages, bubble, groups, group_topk, send, placement, replicate, overlap, zero1;
    double dispatch_bytes, combine_bytes, gradient_bytes, weight_bytes, compress, compress_ratio;
    double devices, skew, seed, samples;
} Setup;

typedef struct Number { // one row of the options
    const char *name;
    size_t offset;
    char kind; // 'i' whole number, 'd' number, 'e' one of words
    double low, high;
    const char *standard, *help;
} Number;

#define AT(field) offsetof(Setup, field)
const Number numbers[] = {
    {"node", AT(node), 'i', 1, 4096, "8", "devices in a node"},
    {"link", AT(link), 'd', 1e-3, 1e6, "136", "GB/s of a device's links inside the node, each way"},
    {"nic", AT(nic), 'd', 1e-3, 1e6, "44", "GB/s of its network card, each way"},
    {"link-latency", AT(link_latency), 'd', 0, 1e6, "3.3", "microseconds"},
    {"nic-latency", AT(nic_latency), 'd', 0, 1e6, "3.7", "microseconds"},
    {"startup", AT(startup), 'd', 0, 1e6, "16", "microseconds that an all-to-all takes however small it is"},
    {"torus", AT(torus), 'i', 0, 1, "0", "1: no nodes, but a square torus of links (TPU)"},
    {"peak", AT(peak), 'd', 1e-3, 1e6, "989", "TFLOP/s of a device's BF16 products"},
    {"speedup", AT(speedup), 'd', 0.1, 16, "1", "of dense and expert products over BF16: 2 for FP8"},
    {"attention-share", AT(attention_share), 'd', 1e-3, 1, "0.35", "of the peak, reached by scores and sums"},
    {"dense-share", AT(dense_share), 'd', 1e-3, 1, "0.28", "of the peak times speedup: projections, shared experts"},
    {"expert-share", AT(expert_share), 'd', 1e-3, 1, "0.28", "the same for routed experts"},
    {"busy", AT(busy), 'd', 0, 0.9, "0.15", "of a device, taken by an all-to-all that is overlapped"},
    {"layers", AT(layers), 'i', 1, 1e4, "28", "transformer layers"},
    {"dense-layers", AT(dense_layers), 'i', 0, 1e4, "1", "of them without experts, as wide as what a token sees"},
    {"dim", AT(dim), 'i', 1, 1e6, "2048", "model width"},
    {"experts", AT(experts), 'i', 1, 4096, "64", "routed experts of a layer"},
    {"topk", AT(topk), 'i', 1, 64, "6", "routed experts a token"},
    {"shared", AT(shared), 'i', 0, 64, "2", "experts that every token sees"},
    {"ffn", AT(ffn), 'i', 1, 1e6, "1408", "width of an expert (three matrices, SwiGLU)"},
    {"seq", AT(seq), 'i', 1, 1e8, "4096", "tokens of a sequence"},
    {"vocab", AT(vocab), 'i', 1, 1e8, "102400", "vocabulary"},
    {"attention-weights", AT(attention_weights), 'd', 0, 1e12, "0", "of a layer; 0: 4 dim^2"},
    {"attention-width", AT(attention_width), 'd', 0, 1e9, "0", "heads times (key width + value width); 0: 2 dim"},
    {"tokens-per-device", AT(tokens), 'i', 1, 1e9, "4096", "in a micro-batch"},
    {"accum", AT(accum), 'i', 1, 1e6, "1", "micro-batches a step"},
    {"stages", AT(stages), 'i', 1, 4096, "1", "of the pipeline, which divide the layers"},
    {"bubble", AT(bubble), 'd', 0, 0.9, "0", "share of the step in which the pipeline waits"},
    {"ep", AT(ep), 'i', 0, 4096, "0", "devices that share the experts; 0: as many as can"},
    {"placement", AT(placement), 'e', 0, 0, "order", "order|spread: how experts are put on devices, spread by load"},
    {"groups", AT(groups), 'i', 1, 4096, "1", "of experts, in order"},
    {"group-topk", AT(group_topk), 'i', 1, 4096, "1", "groups that a token's experts may come from"},
    {"send", AT(send), 'e', 0, 0, "node", "expert|device|node: what a token sends a row to; on from a node over links"},
    {"replicate", AT(replicate), 'i', 0, 4096, "0", "hottest experts, of which every device has a copy"},
    {"overlap", AT(overlap), 'i', 0, 1, "0", "1: one half-batch computes while the other travels"},
    {"zero1", AT(zero1), 'i', 0, 1, "1", "1: optimizer state divided among the devices (ZeRO-1)"},
    {"dispatch-bytes", AT(dispatch_bytes), 'd', 0.01, 64, "2", "a number sent to an expert (FP8 with scales: 1.03125)"},
    {"combine-bytes", AT(combine_bytes), 'd', 0.01, 64, "2", "a number sent back"},
    {"gradient-bytes", AT(gradient_bytes), 'd', 0.01, 64, "4", "a number of a gradient"},
    {"compress", AT(compress), 'e', 0, 0, "none", "none|bf16|int8|topk: gradients as codes (dev/ranks/compress.h)"},
    {"compress-ratio", AT(compress_ratio), 'd', 1e-6, 1, "0.01", "topk: the share of them that is sent"},
    {"weight-bytes", AT(weight_bytes), 'd', 0.01, 64, "2", "a number of a weight"},
    {"devices", AT(devices), 'i', 0, 1 << 20, "0", "a single row; 0: 8, 16, ..., 2048"},
    {"skew", AT(skew), 'd', 0, 3, "0", "made-up load: log-normal of this deviation, 0 even"},
    {"seed", AT(seed), 'i', 0, 1e9, "1", "of the made-up load and the sampled tokens"},
    {"samples", AT(samples), 'i', 100, 1e6, "8192", "tokens drawn to count rows"},
};
enum { number_count = sizeof(numbers) / sizeof(*numbers) };

typedef struct Preset {
    const char *name, *choices, *source;
} Preset;

// H800: 160 of 200 GB/s NVLink reachable, "exceeding 40 GB/s" of 50 on InfiniBand, latencies of Table 5, all in
// DeepSeek-AI, Insights into DeepSeek-V3 (arXiv 2505.09343), sections 4.2, 4.3, 5.2; within that, link, nic and startup
// are fitted to one row each of DeepEP's tables (see check). Peak: NVIDIA's H100 SXM data sheet, which H800 shares;
// busy: 20 of 132 SMs (DeepSeek-V3, arXiv 2412.19437, section 3.2.2). H100: the H800's share of its nominal 450 GB/s,
// an assumption.
const Preset machines[] = {
    {"h800", "", "NVLink 160 GB/s reachable, InfiniBand 50; arXiv 2505.09343"},
    {"h100", "--link 306", "NVLink 450 GB/s each way, of which the H800's share"},
    {"nvl72", "--node 64 --link 612 --peak 2500",
     "GB200: 900 GB/s each way (arXiv 2505.09343, 2.3.2), of which the H800's share"},
    {"tpu-v3", "--torus 1 --link 41 --peak 61.5 --startup 0 --link-latency 0",
     "a core: half of 4 links of 656 Gbit/s and of 123 TFLOP/s (Jouppi et al., CACM 2020)"},
};

// Sizes as published. MLA's weights a layer: query and key/value down and up, output (DeepSeek-V2, section 2.1); its
// width is 128 heads * (128 + 64 + 128). Bubble of V3: 2.06 s and the optimizer's 0.29 s of 19.926 s (arXiv 2505.09343,
// Table 4); of V2: not published, V3's taken. 15360 sequences a step over 2048/16 devices make 120 micro-batches of
// one.
const Preset models[] = {
    {"deepseekmoe-16b", "", "Dai et al. 2024, arXiv 2401.06066"},
    {"deepseek-v2",
     "--layers 60 --dense-layers 1 --dim 5120 --experts 160 --topk 6 --shared 2 --ffn 1536 --vocab 102400"
     " --attention-weights 149225472 --attention-width 40960 --stages 16 --bubble 0.118 --accum 72 --ep 8 --groups 8"
     " --group-topk 3 --send device",
     "arXiv 2405.04434, sections 3.1.2 and 3.1.3"},
    {"deepseek-v3",
     "--layers 61 --dense-layers 3 --dim 7168 --experts 256 --topk 8 --shared 1 --ffn 2048 --vocab 129280"
     " --attention-weights 187105280 --attention-width 40960 --stages 16 --bubble 0.118 --accum 120 --ep 64 --groups 8"
     " --group-topk 4 --speedup 2 --dispatch-bytes 1.03125",
     "arXiv 2412.19437, sections 3.2 and 4.2"},
};

void set_number(Setup *s, const char *name, const char *value) {
    for (int i = 0; i < number_count; i++) {
        const Number *n = &numbers[i];
        if (strcmp(n->name, name) != 0)
            continue;
        char *end;
        const char *const *words = n->offset == AT(send) ? send_names : placement_names;
        words = n->offset == AT(compress) ? compress_names : words;
        double x = n->kind == 'e' ? find_word(words, value) : strtod(value, &end);
        if (n->kind == 'e' && x < 0)
            usage_fail("--%s %s: expected one of %s", name, value, n->help);
        if (n->kind != 'e' &&
            (end == value || *end || !(x >= n->low && x <= n->high) || (n->kind == 'i' && x != floor(x))))
            usage_fail("--%s %s: expected %s from %g to %g (%s)", name, value,
                       n->kind == 'i' ? "a whole number" : "a number", n->low, n->high, n->help);
        *(double *)((char *)s + n->offset) = x;
        return;
    }
    usage_fail("there is no option --%s", name);
}

void set_choices(Setup *s, const char *choices) {
    char text[512], *rest = text;
    snprintf(text, sizeof(text), "%s", choices);
    for (char *name; (name = strtok_r(rest, " ", &rest)) != NULL;)
        set_number(s, name + 2, strtok_r(rest, " ", &rest));
}

void set_preset(Setup *s, const Preset *list, int count, const char *what, const char *name) {
    for (int i = 0; i < count; i++) {
        if (strcmp(list[i].name, name) == 0) {
            set_choices(s, list[i].choices);
            return;
        }
    }
    usage_fail("there is no --%s %s", what, name);
}

Setup make_setup(const char *machine, const char *model, const char *choices) {
    Setup s;
    for (int i = 0; i < number_count; i++)
        set_number(&s, numbers[i].name, numbers[i].standard);
    set_preset(&s, machines, COUNT(machines), "machine", machine);
    set_preset(&s, models, COUNT(models), "model", model);
    set_choices(&s, choices);
    return s;
}

void print_help(void) {
    printf("dev/bench/scale: the simulated time of a training step of a Mixture-of-Experts model on many devices.\n\n"
           "  --log FILE                 load of the experts: the router lines of the last step in a log.jsonl of "
           "train_moe\n"
           "  --check                    published figures beside simulated ones; exit 1 where they disagree\n"
           "  --machine NAME             [h800]\n");
    for (int i = 0; i < COUNT(machines); i++)
        printf("      %-22s %s\n", machines[i].name, machines[i].source);
    printf("  --model NAME               [deepseekmoe-16b]\n");
    for (int i = 0; i < COUNT(models); i++)
        printf("      %-22s %s\n", models[i].name, models[i].source);
    for (int i = 0; i < number_count; i++)
        printf("  --%-24s %s [%s]\n", numbers[i].name, numbers[i].help, numbers[i].standard);
}

// ---------------------------------------------------------------------------------------------------------------------
// Load: which share of all choices falls on each expert

enum { MAX_LINES = 8 };

typedef struct Load {
    int lines, experts;
    double step;
    double *share; // (lines, experts), each line sums to 1
} Load;

// Adds a router line to the load; a line of a later step begins it anew.
void load_add(Load *load, const Json *line, const char *name) {
    const Json *step = json_get(line, "step"), *list = json_get(line, "load");
    int experts = 0;
    double sum = 0;
    if (!step || step->type != 'n' || !list || list->type != 'a')
        fail("%s: a router line has a step and a list load", name);
    for (const Json *x = list->child; x; x = x->next, experts++) {
        if (x->type != 'n' || x->number < 0)
            fail("%s: load holds what is no share of the choices", name);
        sum += x->number;
    }
    if (fabs(sum - 1) > 1e-3)
        fail("%s: the load of %d experts sums to %g, not to 1", name, experts, sum);
    if (load->share && experts != load->experts)
        fail("%s: load of %d experts, before it of %d", name, experts, load->experts);
    if (!load->share)
        load->share = allocate(MAX_LINES * experts, sizeof(double));
    load->experts = experts;
    load->lines = step->number == load->step ? load->lines : 0;
    load->step = step->number;
    if (load->lines < MAX_LINES) {
        double *share = load->share + load->lines++ * experts;
        for (const Json *x = list->child; x; x = x->next)
            *share++ = x->number / sum;
    }
}

// The router lines of the last step, at most MAX_LINES of them.
Load load_read(const char *path) {
    Load load = {0, 0, -1, NULL};
    size_t size;
    char *text = read_file(path, &size), *next, name[4200];
    int number = 1;
    for (char *line = text; *line; line = next, number++) {
        size_t length = strcspn(line, "\n");
        next = line + length + (line[length] == '\n');
        if (strspn(line, " \t\r") >= length)
            continue;
        snprintf(name, sizeof(name), "%s, line %d", path, number);
        Json *json = json_parse(line, length, name);
        const Json *type = json_get(json, "type");
        if (type && type->type == 's' && strcmp(type->text, "router") == 0)
            load_add(&load, json, name);
        json_free(json);
    }
    free(text);
    if (!load.lines)
        fail("%s: no router lines; a log.jsonl of train_moe has them for every recipe but dense", path);
    return load;
}

// Shares proportional to exp(skew * z), z standard normal.
Load load_made_up(const Setup *s) {
    Load load = {1, (int)s->experts, 0, allocate(s->experts, sizeof(double))};
    double sum = 0;
    for (int e = 0; e < load.experts; e++)
        sum += load.share[e] = exp(s->skew * random_normal(random_stream(s->seed, RANDOM_INIT, 0, 0), e));
    for (int e = 0; e < load.experts; e++)
        load.share[e] /= sum;
    return load;
}

// For E experts, `times` the log's: each of the log's experts becomes as many side by side, from as many lines
// (layers).
Load load_widen(const Load *from, const char *path, int E, int K) {
    if (E % from->experts != 0)
        fail("%s: load of %d experts, which do not divide --experts %d", path, from->experts, E);
    int times = E / from->experts;
    Load load = {from->lines, E, from->step, allocate(from->lines * E, sizeof(double))};
    for (int i = 0; i < load.lines * E; i++) {
        int e = i % E, line = (i / E + e % times) % from->lines;
        load.share[i] = from->share[line * from->experts + e / times] / times;
        if (load.share[i] * K > 1 + 1e-6)
            usage_fail("--topk %d: an expert has %.3g of the choices, and cannot have more than 1/%d", K, load.share[i],
                       K);
    }
    return load;
}

// ---------------------------------------------------------------------------------------------------------------------
// Routing: tokens are drawn until what they choose has the load's shares
//
// Each expert's key is an exponential number over its weight; a token takes the K experts of the smallest keys, which
// is drawing without replacement. With groups it takes them from the M groups whose smallest key is smallest. Weights
// are adjusted in a few rounds over the same random numbers.

typedef struct Routing {
    int E, K, samples;
    const double *share; // (E)
    int *expert;         // (samples, K)
} Routing;

Routing routing_draw(const Setup *s, const double *share) {
    int E = (int)s->experts, K = (int)s->topk, D = (int)s->groups, M = (int)s->group_topk, even = 1;
    Routing r = {E, K, (int)s->samples, share, allocate(s->samples * K, sizeof(int))};
    double *weight = allocate(E, sizeof(double)), *key = allocate(E, sizeof(double));
    double *best = allocate(D, sizeof(double)), *count = allocate(E, sizeof(double));
    for (int e = 0; e < E; e++) {
        weight[e] = fmax(share[e], 1e-9);
        even = even && fabs(share[e] * E - 1) < 1e-9;
    }
    for (int round = even ? 5 : 0; round < 6; round++) {
        memset(count, 0, E * sizeof(double));
        for (int t = 0; t < r.samples; t++) {
            uint64_t stream = random_stream(s->seed, RANDOM_SAMPLE, t, 0);
            for (int g = 0; g < D; g++)
                best[g] = INFINITY;
            for (int e = 0; e < E; e++) {
                key[e] = -log(1 - random_uniform(stream, e)) / weight[e];
                best[e * D / E] = fmin(best[e * D / E], key[e]);
            }
            for (int g = 0; g < D; g++) { // groups beyond the M best are closed
                int better = 0;
                for (int h = 0; h < D; h++)
                    better += best[h] < best[g];
                for (int e = g * E / D; better >= M && e < (g + 1) * E / D; e++)
                    key[e] = INFINITY;
            }
            for (int k = 0; k < K; k++) {
                int take = 0;
                for (int e = 1; e < E; e++)
                    take = key[e] < key[take] ? e : take;
                r.expert[t * K + k] = take;
                key[take] = INFINITY;
                count[take]++;
            }
        }
        for (int e = 0; e < E; e++)
            weight[e] *= (share[e] * r.samples * K + 1) / (count[e] + 1);
    }
    free(weight);
    free(key);
    free(best);
    free(count);
    return r;
}

// The expert of the largest share among those not yet done.
int hottest(const Routing *r, const char *done) {
    int top = -1;
    for (int e = 0; e < r->E; e++)
        top = !done[e] && (top < 0 || r->share[e] > r->share[top]) ? e : top;
    return top;
}

// device (E): where each expert is. Spread: the most loaded expert first, to the least loaded device that has room and,
// with groups, belongs to the expert's group (groups stay together on devices or nodes, as routing supposes).
void put_experts(int *device, const Setup *s, const Routing *r, int ep) {
    int E = r->E, room = E / ep, D = ep % (int)s->groups == 0 || (int)s->groups % ep == 0 ? (int)s->groups : 1;
    double *load = allocate(ep, sizeof(double));
    int *held = allocate(ep, sizeof(int));
    char *placed = allocate(E, 1);
    for (int e = 0; e < E; e++)
        device[e] = e / room;
    for (int i = 0; s->placement == SPREAD && i < E; i++) {
        int top = hottest(r, placed), to = -1;
        int group = top * D / E, first = group * ep / D, last = ep >= D ? (group + 1) * ep / D : first + 1;
        for (int d = first; d < last; d++)
            to = held[d] < room && (to < 0 || load[d] < load[to]) ? d : to;
        device[top] = to;
        placed[top] = 1;
        held[to]++;
        load[to] += r->share[top];
    }
    free(placed);
    free(load);
    free(held);
}

// What a token sends: rows[d] to device d (one for each choice if send is expert, else one for all choices there),
// node_rows[x] to node x, one for all choices there; choices[d] its choices there. Replicated experts cost no row:
// everybody has them, and `copied` counts the choices that they take. Shares are the load's own; only how many choices
// go in one row is sampled.
typedef struct Rows {
    int ep, nodes, group; // group = ep / nodes
    double *rows, *node_rows, *choices, copied;
} Rows;

Rows count_traffic(const Setup *s, const Routing *r, int ep) {
    int E = r->E, K = r->K, group = ep < s->node ? ep : (int)s->node, nodes = ep / group;
    double *memory = allocate(2 * ep + nodes, sizeof(double));
    Rows t = {ep, nodes, group, memory, memory + 2 * ep, memory + ep, 0};
    int *device = allocate(E, sizeof(int)), *seen = allocate(4 * ep, sizeof(int));
    int *seen_node = seen + ep;
    double *drawn = allocate(4 * ep, sizeof(double)), *sent = drawn + ep;
    double *node_drawn = sent + ep, *node_sent = node_drawn + nodes;
    char *copied = allocate(E, 1);
    put_experts(device, s, r, ep);
    for (int i = 0; i < s->replicate; i++)
        copied[hottest(r, copied)] = 1;
    for (int e = 0; e < E; e++)
        *(copied[e] ? &t.copied : &t.choices[device[e]]) += K * r->share[e];
    for (int i = 0; i < r->samples * K; i++) {
        int e = r->expert[i], d = device[e], x = d / group, token = i / K + 1;
        if (copied[e])
            continue;
        drawn[d]++;
        node_drawn[x]++;
        sent[d] += seen[d] != token;
        node_sent[x] += seen_node[x] != token;
        seen[d] = seen_node[x] = token;
    }
    for (int d = 0; d < ep; d++) {
        t.rows[d] = t.choices[d] * (s->send == SEND_EXPERT || !drawn[d] ? 1 : sent[d] / drawn[d]);
        t.node_rows[d / group] += t.choices[d];
    }
    for (int x = 0; x < nodes; x++)
        t.node_rows[x] *= node_drawn[x] ? node_sent[x] / node_drawn[x] : 1;
    free(device);
    free(seen);
    free(drawn);
    free(copied);
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

// Dispatch (or combine, which is the same backwards) of n tokens a device, `bytes` a row: the busiest link or NIC
// decides. Rows to a node go to the device of the sender's place in it, which hands them on over links while more
// arrive.
double all_to_all_time(const Setup *s, const Rows *t, double n, double bytes) {
    double total = 0, node_total = 0, link = 0, nic = 0, ep = t->ep, g = t->group;
    for (int d = 0; d < t->ep; d++)
        total += t->rows[d];
    for (int x = 0; x < t->nodes; x++)
        node_total += t->node_rows[x];
    for (int d = 0; d < t->ep; d++) {
        int x = d / t->group;
        double rows = t->rows[d], node_rows = t->node_rows[x], here = 0;
        for (int i = x * t->group; i < (x + 1) * t->group; i++)
            here += t->rows[i];
        if (s->torus) { // sqrt(ep)/2 hops a row, over the 4 links of a device
            link = fmax(link, ep > 1 ? ep * rows * sqrt(ep) / 8 : 0);
        } else if (s->send == SEND_NODE) { // the more of what it receives and what it sends
            link = fmax(link, fmax(ep * rows, t->nodes * here) * (g - 1) / g);
            nic = fmax(nic, fmax((t->nodes - 1) * node_rows, node_total - node_rows));
        } else {
            link = fmax(link, fmax((g - 1) * rows, here - rows));
            nic = fmax(nic, fmax((ep - g) * rows, total - here));
        }
    }
    if (link + nic == 0)
        return 0;
    link = link > 0 ? 1e-6 * s->link_latency + n * bytes * link / (1e9 * s->link) : 0;
    nic = nic > 0 ? 1e-6 * s->nic_latency + n * bytes * nic / (1e9 * s->nic) : 0;
    return 1e-6 * s->startup + fmax(link, nic);
}

// Reduce-scatter, or all-gather, of `bytes` over `ranks` devices of which `local` stand in each node: inside the node,
// then each device's part between nodes; a ring's (n - 1) / n of the data pass each device.
double scatter(const Setup *s, double bytes, double ranks, double local) {
    local = s->torus ? ranks : fmin(local, ranks);
    double nodes = ranks / local, inside = local - 1, between = nodes - 1;
    return 1e-6 * (s->link_latency * inside + s->nic_latency * between) + bytes * inside / local / (1e9 * s->link) +
           bytes / local * between / nodes / (1e9 * s->nic);
}

// Codes of gradients (--compress), `bytes` of all of them, from each device directly to the owners of their parts, or from the owners
// directly to all: codes cannot be added up inside a node first. So dev/ranks/compressed_sums.h and its CUDA twin send them.
double exchange_codes(const Setup *s, double bytes, double ranks, double local) {
    local = fmin(local, ranks);
    if (ranks <= 1)
        return 0;
    if (s->torus) // sqrt(ranks)/2 hops, over the 4 links of a device
        return 1e-6 * s->startup + bytes * (ranks - 1) / ranks * sqrt(ranks) / 8 / (1e9 * s->link);
    double link = 1e-6 * s->link_latency + bytes * (local - 1) / ranks / (1e9 * s->link);
    double nic = ranks > local ? 1e-6 * s->nic_latency + bytes * (ranks - local) / ranks / (1e9 * s->nic) : 0;
    return 1e-6 * s->startup + fmax(link, nic);
}

// A layer in the steady state: attention, dispatch, experts, combine, the second and fourth over links, the others in
// the processor, each in turn for every half of the batch. With one half nothing overlaps.
double layer_time(double attention, double dispatch, double experts, double combine, int halves) {
    double time[4] = {attention, dispatch, experts, combine}, free_at[2] = {0, 0}, ready[2] = {0, 0}, middle = 0;
    for (int i = 0; i < 64; i++) {
        for (int h = 0; h < halves; h++) {
            double *unit = &free_at[i & 1];
            ready[h] = *unit = fmax(*unit, ready[h]) + time[i & 3];
        }
        if (i == 31)
            middle = ready[halves - 1];
    }
    return (ready[halves - 1] - middle) / 8;
}

typedef struct Result { // seconds of a step, but where it says otherwise
    int ep;
    double computing, exposed, hidden, waiting, reduce, bubble, step, ideal, experts;
    double rate, bytes; // tokens/s of a device; bytes of its weights, gradients and optimizer state
} Result;

double expert_weights(const Setup *s) {
    return 3 * s->dim * s->ffn;
}

// Operations a token, forward and backward: 6 a weight, and causal attention's half of the scores and sums.
double operations(const Setup *s) {
    double layer = s->attention_weights + (s->topk + s->shared) * expert_weights(s);
    double router = (s->layers - s->dense_layers) * s->dim * s->experts;
    return 6 * (s->layers * layer + router + s->dim * s->vocab) + 3 * s->layers * s->seq * s->attention_width;
}

// Bytes that a gradient has in a code.
double code_width(const Setup *s) {
    Codec codec = {(int)s->compress, s->compress_ratio};
    size_t block = 256000; // a multiple of any code's blocks
    return (double)code_bytes(codec, block) / (double)block;
}

// The largest number of devices up to --ep that divides experts, W, and nodes or is divided by them.
int expert_parallel(const Setup *s, int W) {
    int E = (int)s->experts, most = s->ep ? (int)s->ep : E, ep = 1;
    for (int n = 1; n <= W && n <= most; n++)
        ep = E % n == 0 && W % n == 0 && ((int)s->node % n == 0 || n % (int)s->node == 0 || s->torus) ? n : ep;
    return ep;
}

// One layer's part of r is added up over layers; traffic t is that layer's.
void add_layer(Result *r, const Setup *s, const Rows *t, double layers, int moe) {
    double n = s->tokens, peak = 1e12 * s->peak, fast = peak * s->speedup, top = 0;
    int halves = s->overlap ? 2 : 1;
    double slow = moe && s->overlap && t->ep > 1 ? 1 / (1 - s->busy) : 1;
    double dense = s->attention_weights + s->shared * expert_weights(s) + moe * s->dim * s->experts;
    double attention =
        n * s->seq * s->attention_width / (peak * s->attention_share) + 2 * n * dense / (fast * s->dense_share);
    double choice =
        2 * n * expert_weights(s) / (fast * s->expert_share); // seconds, if each token of a device chose one
    for (int d = 0; moe && d < t->ep; d++)
        top = fmax(top, t->ep * t->choices[d]);
    double mean = choice * s->topk, most = moe ? choice * (top + t->copied) : mean;
    for (int pass = 1; pass <= 2; pass++) { // forward; backward, with twice the operations
        double a = pass * attention * slow / halves, e = pass * most * slow / halves;
        double go = moe ? all_to_all_time(s, t, n / halves, s->dim * s->dispatch_bytes) : 0;
        double back = moe ? all_to_all_time(s, t, n / halves, s->dim * s->combine_bytes) : 0;
        double still = layer_time(a, 0, e, 0, halves), full = layer_time(a, go, e, back, halves);
        double compute = pass * (attention + mean) * slow;
        r->computing += layers * compute;
        r->waiting += layers * fmax(0, still - compute);
        r->exposed += layers * fmax(0, full - still);
        r->hidden += layers * fmax(0, halves * (go + back) - (full - still));
        r->ideal += layers * pass * (attention + mean);
        r->experts += layers * moe * pass * mean;
    }
}

// `layer` (lines): the load's lines, which stand for the layers in turn.
Result simulate(const Setup *s, const Routing *layer, int lines, int devices) {
    Result r = {0};
    int W = devices / (int)s->stages, ep = r.ep = expert_parallel(s, W);
    double moe = (s->layers - s->dense_layers) / s->stages, dense = s->dense_layers / s->stages;
    for (int i = 0; i < lines; i++) {
        Rows t = count_traffic(s, &layer[i], ep);
        add_layer(&r, s, &t, moe / lines, 1);
        if (i == 0)
            add_layer(&r, s, &t, dense, 0);
        free(t.rows);
    }
    double head = 6 * s->tokens * s->dim * s->vocab / (1e12 * s->peak * s->dense_share) / s->stages;
    r.computing += head;
    r.ideal += head;
    double backward_link = (r.exposed + r.hidden) / 2;

    // Gradients of what all W devices hold, then of experts, which every ep-th device holds.
    double common = (s->layers * s->attention_weights + 2 * s->dim * s->vocab) / s->stages +
                    moe * (s->shared * expert_weights(s) + s->dim * s->experts + s->replicate * expert_weights(s)) +
                    dense * (s->topk + s->shared) * expert_weights(s);
    double own = moe * (s->experts / ep) * expert_weights(s), copies = W / ep, near = fmax(1, s->node / ep);
    double width = s->zero1 ? s->weight_bytes : s->gradient_bytes, down, up;
    down = scatter(s, common * s->gradient_bytes, W, s->node) + scatter(s, own * s->gradient_bytes, copies, near);
    up = scatter(s, common * width, W, s->node) + scatter(s, own * width, copies, near);
    if (s->compress) { // twice: all get the sums. With ZeRO-1 they get the new weights besides.
        down = 2 * (exchange_codes(s, common * code_width(s), W, s->node) + exchange_codes(s, own * code_width(s), copies, near));
        up = s->zero1 ? up : 0;
    }
    // Overlapped: down behind the last backward pass, up behind the next forward pass, as far as all-to-all leaves
    // links free.
    double pass = r.computing + r.waiting + r.exposed;
    double room_down = s->overlap ? fmax(0, pass * 2 / 3 - backward_link) : 0;
    double room_up = s->overlap ? fmax(0, pass / 3 - backward_link) : 0;
    r.reduce = fmax(0, down - room_down) + fmax(0, up - room_up);

    double *parts[] = {&r.computing, &r.exposed, &r.hidden, &r.waiting, &r.ideal, &r.experts};
    for (int i = 0; i < COUNT(parts); i++)
        *parts[i] *= s->accum;
    double work = r.computing + r.exposed + r.waiting;
    r.bubble = work * s->bubble / (1 - s->bubble);
    r.step = work + r.bubble + r.reduce;
    r.rate = s->tokens * s->accum / s->stages / r.step;
    r.bytes = (common + own) * (s->weight_bytes + s->gradient_bytes) + // 12: master weight and two moments in float32
              12 * (s->zero1 ? common / W + own / copies : common + own) +
              4 * (s->compress ? common + own : 0); // what has not arrived, in float32
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tables

Routing *route_all(const Setup *s, const Load *load) {
    Routing *layer = allocate(load->lines, sizeof(Routing));
    for (int i = 0; i < load->lines; i++)
        layer[i] = routing_draw(s, load->share + i * load->experts);
    return layer;
}

void free_routes(Routing *layer, int lines) {
    for (int i = 0; i < lines; i++)
        free(layer[i].expert);
    free(layer);
}

void print_table(const Setup *s, const Load *load) {
    Routing *layer = route_all(s, load);
    printf("| devices | ep | computing | all-to-all exposed | hidden | waiting | all-reduce | bubble | step | tokens/s "
           "a device | of ideal "
           "| GB |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (int n = s->devices ? (int)s->devices : 8; n <= (s->devices ? s->devices : 2048); n *= 2) {
        if (n % (int)s->stages != 0)
            continue;
        Result r = simulate(s, layer, load->lines, n);
        printf("| %d | %d | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f | %.0f | %.0f%% | %.0f |\n", n, r.ep,
               1e3 * r.computing, 1e3 * r.exposed, 1e3 * r.hidden, 1e3 * r.waiting, 1e3 * r.reduce, 1e3 * r.bubble,
               1e3 * r.step, r.rate, 100 * r.ideal / r.step, 1e-9 * r.bytes);
    }
    free_routes(layer, load->lines);
}

// From how many devices on, and up to 2048, the all-to-all that nothing hides takes longer than the experts' products.
void print_crossing(const char *how, const Setup *s, const Load *load) {
    Routing *layer = route_all(s, load);
    Result r = {0};
    double most = 0;
    char from[32] = "";
    for (int n = 8; n <= 2048; n *= 2) {
        if (n % (int)s->stages != 0)
            continue;
        r = simulate(s, layer, load->lines, n);
        if (r.exposed <= r.experts)
            strcpy(from, "never");
        else if (!isdigit((unsigned char)from[0]))
            snprintf(from, sizeof(from), "%d devices", n);
        most = fmax(most, r.exposed / r.experts);
    }
    printf("| %s | %s | %.2f | %.0f%% |\n", how, from, most, 100 * r.ideal / r.step);
    free_routes(layer, load->lines);
}

// With each remedy alone and with all of them; where the options do not say how much of one, 3/8 of 8 groups and 1/32
// of experts.
void print_crossings(const Setup *s, const Load *load) {
    Setup bare = *s, limited = *s, copied = *s, hidden = *s, all = *s;
    bare.groups = bare.group_topk = copied.groups = copied.group_topk = hidden.groups = hidden.group_topk = 1;
    bare.replicate = bare.overlap = limited.replicate = limited.overlap = copied.overlap = hidden.replicate = 0;
    hidden.overlap = all.overlap = 1;
    if (s->groups == 1 && (int)s->experts % 8 == 0) {
        limited.groups = all.groups = 8;
        limited.group_topk = all.group_topk = fmax(3, ceil(s->topk * 8 / s->experts));
    }
    if (!s->replicate)
        copied.replicate = all.replicate = ceil(s->experts / 32);
    char groups[64], copies[64];
    snprintf(groups, sizeof(groups), "limited to %g of %g groups", limited.group_topk, limited.groups);
    snprintf(copies, sizeof(copies), "%g hottest experts replicated", copied.replicate);
    printf("\n| routing | exposed all-to-all exceeds the experts' products from | ratio of the two, at most | of ideal "
           "on most devices |\n"
           "| --- | --- | --- | --- |\n");
    print_crossing("as the router says", &bare, load);
    print_crossing(groups, &limited, load);
    print_crossing(copies, &copied, load);
    print_crossing("overlapped", &hidden, load);
    print_crossing("all three", &all, load);
}

// ---------------------------------------------------------------------------------------------------------------------
// Published figures

int wrong;

// `fitted`: the row that one of the simulation's numbers was taken from, which proves nothing.
void compare(const char *what, double published, double simulated, double tolerance, const char *source) {
    double ratio = simulated / published;
    int bad = !(fabs(ratio - 1) <= tolerance);
    wrong += bad;
    printf("| %s | %.4g | %.4g | %.3f | %s%g%% | %s |\n", what, published, simulated, ratio, bad ? "**beyond** " : "",
           100 * tolerance, source);
}

// Seconds of an all-to-all of evenly loaded experts, and the rows that a token sends: to devices, and to nodes.
double even_all_to_all(const Setup *s, int ep, double bytes, double *rows, double *node_rows) {
    Load load = load_made_up(s);
    Routing r = routing_draw(s, load.share);
    Rows t = count_traffic(s, &r, ep);
    double time = all_to_all_time(s, &t, s->tokens, s->dim * bytes);
    *rows = *node_rows = 0;
    for (int d = 0; d < ep; d++)
        *rows += t.rows[d];
    for (int x = 0; x < t.nodes; x++)
        *node_rows += t.node_rows[x];
    free(r.expert);
    free(load.share);
    free(t.rows);
    return time;
}

Result even_step(const Setup *s, int devices) {
    Load load = load_made_up(s);
    Routing *layer = route_all(s, &load);
    Result r = simulate(s, layer, 1, devices);
    free_routes(layer, 1);
    free(load.share);
    return r;
}

typedef struct Kernel { // a row of DeepEP's tables (docs/legacy.md)
    int ep;
    double dispatch, combine;
    const char *fitted;
} Kernel;

// GB/s; 4096 tokens, top 8 of 256 experts within the best 4 nodes. Rows to the own device or node count, as in its
// test.
const Kernel normal[] = {{8, 153, 158, " (fitted)"}, {16, 43, 43, ""}, {32, 58, 57, " (fitted)"}, {64, 51, 50, ""}};
// Microseconds; 128 tokens, a row for each choice.
const Kernel low_latency[] = {{8, 77, 114, ""},    {16, 118, 195, ""}, {32, 155, 273, ""}, {64, 173, 314, " (fitted)"},
                              {128, 192, 369, ""}, {256, 194, 360, ""}};

void check_kernels(void) {
    char what[128];
    double rows, node_rows;
    for (int i = 0; i < COUNT(normal) * 2; i++) {
        const Kernel *k = &normal[i / 2];
        Setup s = make_setup("h800", "deepseek-v3", "");
        s.groups = k->ep / 8;
        s.group_topk = fmin(s.groups, 4);
        double bytes = i & 1 ? s.combine_bytes : s.dispatch_bytes,
               time = even_all_to_all(&s, k->ep, bytes, &rows, &node_rows);
        double rate = 1e-9 * s.tokens * s.dim * bytes * (k->ep > 8 ? node_rows : rows) / time;
        snprintf(what, sizeof(what), "%s, EP%d, GB/s%s", i & 1 ? "combine" : "dispatch", k->ep, i & 1 ? "" : k->fitted);
        compare(what, i & 1 ? k->combine : k->dispatch, rate, 0.15, "DeepEP, normal kernels");
    }
    for (int i = 0; i < COUNT(low_latency) * 2; i++) {
        const Kernel *k = &low_latency[i / 2];
        Setup s = make_setup("h800", "deepseek-v3", "--groups 1 --group-topk 1 --send expert --tokens-per-device 128");
        double time = even_all_to_all(&s, k->ep, i & 1 ? s.combine_bytes : s.dispatch_bytes, &rows, &node_rows);
        snprintf(what, sizeof(what), "small %s, EP%d, us%s", i & 1 ? "combine" : "dispatch", k->ep,
                 i & 1 ? "" : k->fitted);
        compare(what, i & 1 ? k->combine : k->dispatch, 1e6 * time, 0.15, "DeepEP, low latency");
    }
}

int check(void) {
    double rows, node_rows, exact = 32, gshard[3];
    printf("| figure | published | simulated | ratio | tolerance | source |\n| --- | --- | --- | --- | --- | --- |\n");
    Setup v3 = make_setup("h800", "deepseek-v3", "--overlap 1"), v2 = make_setup("h800", "deepseek-v2", "");
    compare("DeepSeek-V3, GFLOP a token", 250, 1e-9 * operations(&v3), 0.02, "2505.09343, Table 2");
    compare("DeepSeek-V2, GFLOP a token", 155, 1e-9 * operations(&v2), 0.02, "2505.09343, Table 2");

    Setup open = make_setup("h800", "deepseek-v3", "--groups 1 --group-topk 1");
    even_all_to_all(&open, 32, 1, &rows, &node_rows);
    for (int k = 0; k < 8; k++) // 32 (1 - (248 over 8) / (256 over 8))
        exact *= (248.0 - k) / (256 - k);
    compare("devices of 32 that 8 of 256 experts are on", 32 - exact, rows, 0.01, "exact");
    check_kernels();

    // Their formula has 7K numbers a row, 9 rows a token, no latency and nothing that stays at home.
    Setup limit = make_setup("h800", "deepseek-v3",
                             "--groups 1 --group-topk 1 --send expert --tokens-per-device 32 --topk 9 --dim 7000"
                             " --nic 50 --startup 0 --link-latency 0 --nic-latency 0");
    compare("decoding limit, InfiniBand, us", 120.96, 1e6 * even_all_to_all(&limit, 256, 3, &rows, &node_rows), 0.05,
            "2505.09343, 2.3.2");
    set_choices(&limit, "--link 900 --node 72 --experts 72");
    compare("decoding limit, NVL72, us", 6.72, 1e6 * even_all_to_all(&limit, 72, 3, &rows, &node_rows), 0.05,
            "2505.09343, 2.3.2");

    Result r = even_step(&v3, 2048), old = even_step(&v2, 2048);
    compare("DeepSeek-V3, 2048 H800, s a step (fitted)", 19.926, r.step, 0.05, "2505.09343, Table 4");
    compare("the same, thousand GPU hours for 1T tokens", 180, 1e9 / r.rate / 3600, 0.05, "2412.19437, section 1");
    compare("the same, thousand GPU hours for 14.8T", 2664, 14.8e9 / r.rate / 3600, 0.05, "2412.19437, Table 1");
    compare("DeepSeek-V2, thousand GPU hours for 1T tokens", 172.8, 1e9 / old.rate / 3600, 0.25, "2405.04434, 3.2.3");
    // "approximately 1:1", of what is not said. Products alone reach 0.62 of the FP8 peak: DeepGEMM's 1297 and 1099
    // TFLOP/s for these sizes, two parts of the one and one of the other.
    v3.overlap = 0;
    v3.dense_share = v3.expert_share = 0.62;
    r = even_step(&v3, 2048);
    compare("DeepSeek-V3, products over all-to-all", 1, r.computing / r.exposed, 0.5, "2412.19437, 3.2.1; rough");

    for (int i = 0; i < 3; i++) {
        Setup tpu = make_setup("tpu-v3", "deepseekmoe-16b", "--topk 2 --experts 2048 --samples 2000 --send expert");
        gshard[i] = even_all_to_all(&tpu, i == 0 ? 16 : i == 1 ? 128 : 2048, 4, &rows, &node_rows);
    }
    double rest = gshard[1] * (1 - 0.16) / 0.16; // on 128 cores 16% of the time is all-to-all
    compare("GShard, all-to-all on 2048 over 16 TPU cores", 9, gshard[2] / gshard[0], 0.35, "2006.16668, 5.3");
    compare("GShard, all-to-all on 2048 over 128", 3.75, gshard[2] / gshard[1], 0.35, "2006.16668, 5.2");
    compare("GShard, its share on 2048, of 0.16 on 128", 0.36, gshard[2] / (gshard[2] + rest), 0.35, "2006.16668, 5.2");
    compare("GShard, step on 2048 over 128", 1.7, (gshard[2] + rest) / (gshard[1] + rest), 0.35, "2006.16668, 5.2");
    fflush(stdout);
    if (wrong)
        fprintf(stderr, "scale: %d figures are beyond their tolerance\n", wrong);
    return wrong > 0;
}

// ---------------------------------------------------------------------------------------------------------------------

void check_setup(const Setup *s) {
    int E = (int)s->experts, K = (int)s->topk, D = (int)s->groups, M = (int)s->group_topk;
    if (E % D != 0)
        usage_fail("--groups %d does not divide --experts %d", D, E);
    if (M > D || K > M * (E / D))
        usage_fail("--topk %d experts do not fit into --group-topk %d of --groups %d with %d experts each", K, M, D,
                   E / D);
    if (s->ep && E % (int)s->ep != 0)
        usage_fail("--ep %g does not divide --experts %d", s->ep, E);
    if (s->ep && (int)s->ep % (int)s->node != 0 && (int)s->node % (int)s->ep != 0 && !s->torus)
        usage_fail("--ep %g neither divides --node %g nor is a multiple of it", s->ep, s->node);
    if (!s->devices && 2048 % (int)s->stages != 0)
        usage_fail("--stages %g does not divide 2048, the most devices of the table; --devices asks for another number",
                   s->stages);
    if (s->devices && (int)s->devices % (int)(s->stages * fmax(1, s->ep)) != 0)
        usage_fail("--devices %g is no multiple of --stages %g times --ep %g", s->devices, s->stages, fmax(1, s->ep));
    if (s->dense_layers >= s->layers)
        usage_fail("--dense-layers %g leaves no layer of --layers %g with experts", s->dense_layers, s->layers);
    if (s->replicate > E)
        usage_fail("--replicate %g of --experts %d", s->replicate, E);
}

int main(int argc, char **argv) {
    program_name = "scale";
    const char *log = NULL, *machine = "h800", *model = "deepseekmoe-16b";
    Setup s = {0};
    for (int pass = 0; pass < 2; pass++) { // the presets first, what overrides them after
        for (int i = 1; i < argc; i++) {
            if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0) {
                print_help();
                return 0;
            }
            if (strcmp(argv[i], "--check") == 0)
                return check();
            if (strncmp(argv[i], "--", 2) != 0)
                usage_fail("there is no option %s", argv[i]);
            const char *name = argv[i] + 2, *value = argv[++i];
            if (!value)
                usage_fail("--%s needs a value", name);
            if (strcmp(name, "log") == 0)
                log = value;
            else if (strcmp(name, "machine") == 0)
                machine = value;
            else if (strcmp(name, "model") == 0)
                model = value;
            else if (pass == 1)
                set_number(&s, name, value);
        }
        if (pass == 0)
            s = make_setup(machine, model, "");
    }
    check_setup(&s);
    s.attention_weights = s.attention_weights ? s.attention_weights : 4 * s.dim * s.dim;
    s.attention_width = s.attention_width ? s.attention_width : 2 * s.dim;
    Load read = log ? load_read(log) : load_made_up(&s), load = load_widen(&read, log, (int)s.experts, (int)s.topk);
    double top = 0;
    for (int i = 0; i < load.lines * load.experts; i++)
        top = fmax(top, load.share[i] * load.experts);
    printf("%s on %s, %g x %g tokens a device and step; load %s, fullest expert %.2f times the mean\n", model, machine,
           s.accum, s.tokens,
           log          ? log
           : s.skew > 0 ? "made up"
                        : "even",
           top);
    printf("simulated milliseconds of a step:\n\n");
    print_table(&s, &load);
    if (!s.devices)
        print_crossings(&s, &load);
    free(read.share);
    free(load.share);
    return 0;
}
