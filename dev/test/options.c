// The options of the command line: those that would have no effect are refused, unknown ones name the nearest, a warm-up is
// shorter than the run.

#include "dev/test/trainer.h"
#include "dev/test/runs.h"

// What a command line asks for, as for a new run; ends the process where it is refused.
Config asked_for(const char *text) {
    static char copy[2048];
    char *words[128] = {(char *)"train_moe"}, *rest = NULL;
    int count = 1;
    Config c;
    snprintf(copy, sizeof(copy), "%s", text);
    for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
        words[count++] = word;
    parse_command_line(&c, count, words);
    return c;
}

void check_command(void *arg) {
    Config c = asked_for((const char *)arg);
    config_check(&c);
    refuse_idle_options(&c, NULL);
    check_warmup(&c, NULL);
}

void expect_command(const char *text, int status, const char *message) {
    char words[1024];
    int found = dies(check_command, (void *)text, words, sizeof(words));
    if (found != status || (message && !strstr(words, message)))
        fail_msg("%s: status %d, expected %d and \"%s\"; it said: %s", text, found, status, message ? message : "", words);
}

// Each with what would give the option an effect.
void test_options_idle(void **state) {
    (void)state;
    static const char *const refused[][2] = {
        {"--threshold 0.2", "--threshold 0.2 would have no effect: it needs --select threshold"},
        {"--max-active 2", "it needs --select threshold"},
        {"--drop-order score", "--capacity-factor"},
        {"--drop-order token --eval-capacity-factor 1", "--capacity-factor"}, // at evaluation it is always by token
        {"--drop-exempt 0.1", "--capacity-factor"},
        {"--capacity-unit group --groups 4", "--capacity-factor"},
        {"--groups 4", "--group-topk"},
        {"--group-topk 1", "--groups"},
        {"--groups 4 --device-weight 0.1 --group-score top2", "--group-topk"},
        {"--recipe hierarchical --group-score top2", "--select topk"},
        {"--quantile-decay 0.5", "--quantile-sweeps"},
        {"--balance gshard --aux-weight 0", "--aux-weight"},
        {"--recipe jacobs --balance cv2", "--aux-weight"},
        {"--group sequence --aux-weight 0", "--aux-weight or --capacity-factor"},
        {"--group sequence --aux-weight 0 --eval-capacity-factor 1", "--aux-weight or --capacity-factor"},
        {"--recipe hash --score sigmoid", "--select topk"},
        {"--dense-activation relu", "--moe-every 2"},
        {"--recipe dense --experts 4", "--recipe dense takes away"},
        {"--recipe dense --aux-weight 0.1", "--recipe dense takes away"},
        {"--recipe dense --capacity-factor 1", "--recipe dense takes away"},
        {"--recipe dense --gate probability", "--recipe dense takes away"},
        {"--recipe dense --mixed 1", "--recipe dense takes away"},
        {"--recipe dense --dense-activation gelu --activation relu", "--dense-activation same"},
        {"--recipe cmoe --activation gelu", "--mixed 0"},
        {"--recipe threshold --topk 3", "--select topk"},
        {"--balance width", "--mixed 1"},
        {"--moe-every 0 --dense-first 1", "--recipe dense takes away"},
        {"--moe-every 0 --jitter 0.1", "--recipe dense takes away"},
        {"--schedule constant --min-lr 1e-4", "--schedule cosine or wsd"},
        {"--temperature 0 --top-k 5", "--temperature above 0"},
        {"--temperature 0 --top-p 0.5", "--temperature above 0"},
        {"--trust-weights", "--trust-weights would have no effect: it needs weights to read"},
        {"--attention-topk 3", "it needs experts in attention"},
        {"--attention-form moa", "it needs experts in attention"},
        {"--attention-aux-weight 0.1", "it needs experts in attention"},
        {"--attention-capacity-factor 1", "it needs experts in attention"},
        {"--attention-experts 1 --attention-topk 1 --aux-weight 0 --group sequence", "--aux-weight or --capacity-factor"},
        {"--recipe moa --attention-topk 3", "--attention-experts 4 and switchhead"},
        {"--recipe moa --kv-heads 2", "moa has one"},
        {"--recipe switchhead --attention-z-weight 0.1", "--attention-form moa"},
        {"--attention-experts 3 --attention-topk 4", "a head cannot choose more experts than it has"},
        {"--attention-experts 3 --attention-form moa", "a token cannot have more heads than there are"},
        {"--recipe moa --heads 1", "the weight of a single head would always be 1"},
        {"--recipe switchhead --head-width 7", "an even width"},
        {"--head-width 7", "an even width"},
        {"--mixer lstm --head-width 8", "it needs heads: --mixer attention"},
        {"--mixer lstm --qkv-bias", "--mixer attention and --attention-experts 0"},
        {"--recipe moa --qkv-bias", "--mixer attention and --attention-experts 0"},
        {"--recipe moa --qk-norm --qk-norm-over row", "--mixer attention and --attention-experts 0"},
        {"--qk-norm-over row", "it needs norms of queries and keys: --qk-norm"},
        {"--rope-factor 4", "--rope-scaling linear or llama3"},
        {"--rope-scaling linear --rope-low 2", "--rope-scaling llama3"},
        {"--rope-scaling llama3 --rope-low 4", "--rope-low must be less than --rope-high"},
        {"--mixer lstm --rope-scaling linear", "it needs heads: --mixer attention"},
        {"--shared-gate", "--shared-gate would have no effect: it needs shared experts beside routed ones: --shared 1"},
        {"--recipe dense --shared 1 --shared-ffn 8", "it needs shared experts beside routed ones"},
        {"--dense-ffn 8", "it needs dense layers"},
        {"--norms 0 --norm-eps 0.1", "--norm-eps 0.1 would have no effect: it needs norms: --norms 1"},
        {"--last-feed 0 --dense-activation relu", "--moe-every 2"},
        {"--warmup 4000", "--warmup 4000: a run of 4000 steps would be nothing but warm-up"},
        {"--warmup 100 --steps 20", "a shorter one, or more --steps"},
    };
    static const char *const accepted[] = {
        "",
        "--steps 20",                                       // with the default warm-up a run may be short
        "--warmup 0 --steps 1",
        "--threshold 0 --groups 1 --drop-order choice",     // defaults
        "--recipe dense --topk 4 --ffn 8 --shared 1",       // the width of a dense layer
        "--recipe dense --activation relu",
        "--recipe deepseek-v2 --capacity-factor 0",         // the recipe's own --drop-order is left over
        "--recipe deepseek-v2 --capacity-factor 0 --drop-order score", // which is said again
        "--recipe threshold --threshold 0.2 --max-active 3",
        "--recipe glam --dense-activation relu",
        "--groups 4 --device-weight 0.1",
        "--groups 4 --capacity-unit group --capacity-factor 1",
        "--group sequence --capacity-factor 1 --aux-weight 0",
        "--recipe base --group sequence",
        "--recipe expert-choice --group sequence",
        "--recipe quantile --group sequence --quantile-decay 0.9",
        "--schedule constant",
        "--temperature 0 --tokens 5",
        "--prompt hello --tokens 5 --top-k 5 --seed 3 --threads 1 --tokenizer x",
        "--eval-capacity-factor 1 --overflow next",
        "--norms 0 --norm-eps 0.1 --ngrams 50 --ngram-gate",
        "--last-feed 0 --layers 3 --moe-every 2 --dense-activation relu",
        "--attention-experts 4 --aux-weight 0 --group sequence",
        "--recipe dense --attention-experts 4 --group sequence", // of the heads' balance
        "--recipe dense --attention-experts 16 --attention-form moa --attention-z-weight 0.1",
    };
    for (int i = 0; i < COUNT(refused); i++)
        expect_command(refused[i][0], 2, refused[i][1]);
    for (int i = 0; i < COUNT(accepted); i++)
        expect_command(accepted[i], 0, NULL);
    for (int r = 0; r < recipe_count; r++) { // a recipe's own options are not refused, also where they are typed
        char text[1024];
        snprintf(text, sizeof(text), "--recipe %s %s", recipes[r].name, recipes[r].choices);
        expect_command(text, 0, NULL);
    }
}

// Every command of the texts is accepted.
void test_options_documented(void **state) {
    (void)state;
    if (access("README.md", R_OK) != 0) { // other builds run elsewhere
        skip();
    }
    static const char *const texts[] = {"README.md", "doc/recipes.md"};
    int count = 0;
    for (int i = 0; i < 2; i++) {
        size_t size;
        char *text = read_file(texts[i], &size), *rest = NULL;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
            if (strncmp(line, "./train_moe ", 12) || strstr(line, "--prompt"))
                continue;
            line[strcspn(line, "#")] = 0;
            expect_command(line + 12, 0, NULL);
            count++;
        }
        free(text);
    }
    assert_true(count > 20);
}

// The weights after three steps, and what is reported meanwhile and by an evaluation.
uint64_t outcome(const Config *config) {
    Config c = *config;
    c.vocab = 50;
    config_check(&c);
    int N = c.batch * c.seq, *tokens = (int *)allocate(N + 1, sizeof(int));
    double norm = 0;
    uint64_t bits = 0;
    Model *m = model_allocate(&c, N, 1, NULL);
    model_init(m, NULL);
    for (int step = 1; step <= 3; step++) {
        for (int micro = 0; micro < c.accum; micro++) {
            random_tokens(tokens, N + 1, c.vocab, (uint64_t)(step * c.accum + micro));
            Batch batch = {tokens, tokens + 1, c.batch, c.seq, TRAIN_MODE, 1.0 / c.accum, step, micro * N, micro == 0, micro == c.accum - 1};
            model_forward(m, &batch);
            model_backward(m);
        }
        norm = gradient_norm(m);
        model_update(m, step, learning_rate(&c, step), norm);
        const double report[] = {m->loss, m->aux, norm};
        for (int i = 0; i < 3; i++) {
            uint64_t word;
            memcpy(&word, &report[i], 8);
            bits = hash64(bits ^ word);
        }
    }
    Batch batch = {tokens, tokens + 1, 1, c.seq, EVAL_MODE, 1, 0, 0, 1, 1};
    model_forward(m, &batch);
    bits = bits_of(m->acts.nll, (size_t)c.seq, bits);
    bits = bits_of(m->memory[WEIGHTS], m->size, bits);
    model_free(m);
    free(tokens);
    return bits;
}

// Each option of the model, of the router and of the optimizer in each recipe, at a few other values: where some are accepted,
// one of them changes what is computed.
void test_options_effective(void **state) {
    (void)state;
    static const char *const other[] = {"0", "1", "2", "3", "0.3", "0.9"};
    static const char *const headings[] = {"Model", "Experts", "Router", "Training"};
    static const char *const other_ways[] = {"threads", "recompute", "recipe", "list-recipes", "steps", "warmup", "moments",
                                             "group-topk"}; // as many groups as chosen experts leave the choice as it is
    char missing[4096] = "";
    if (is_slow())
        skip();
    for (int r = 0; r < recipe_count; r++) {
        char base[512];
        int experts = strcmp(recipes[r].name, "dense") != 0;
        snprintf(base, sizeof(base), "--recipe %s --layers 2 --dim 16 %s --ffn 12 --seq 12 --batch 2 --accum 2 --steps 4 --warmup 1 --lr 0.02 %s %s",
                 recipes[r].name, strcmp(recipes[r].name, "shazeer-lstm") ? "--heads 2" : "", experts ? "--experts 4" : "", small_sizes(recipes[r].name));
        Config plain = asked_for(base);
        uint64_t without = outcome(&plain);
        for (int i = 0; i < option_count; i++) {
            const Option *o = &options[i];
            int looked_at = 0, accepted = 0, effective = 0;
            for (int h = 0; h < COUNT(headings); h++)
                looked_at |= !strncmp(o->heading, headings[h], strlen(headings[h]));
            for (int w = 0; w < COUNT(other_ways); w++)
                looked_at &= strcmp(o->name, other_ways[w]) != 0;
            int values = o->kind == 'e' ? 0 : COUNT(other);
            while (o->kind == 'e' && o->words[values])
                values++;
            values = o->kind == 'f' ? 1 : values;
            for (int v = 0; looked_at && !effective && v < values; v++) {
                char text[1024], said_there[512], now[64];
                double number = atof(other[v]);
                const char *value = o->kind == 'e' ? o->words[v] : other[v];
                if (o->kind == 'i' && number != floor(number))
                    continue;
                if (o->kind != 'e' && o->kind != 'f' && (number < o->low || number > o->high))
                    continue;
                if (!strcmp(option_text(&plain, o, now), o->kind == 'f' ? "1" : value) || !strcmp(value, o->standard))
                    continue; // as it is, or off
                snprintf(text, sizeof(text), "%s --%s %s", base, o->name, o->kind == 'f' ? "" : value);
                if (dies(check_command, text, said_there, sizeof(said_there)) != 0)
                    continue;
                Config c = asked_for(text);
                accepted++;
                effective += outcome(&c) != without;
            }
            if (accepted && !effective && strlen(missing) < sizeof(missing) - 100)
                snprintf(missing + strlen(missing), 100, "--recipe %s --%s\n", recipes[r].name, o->name);
        }
    }
    if (*missing)
        fail_msg("accepted, but without an effect:\n%s", missing);
}

// An unknown word names the nearest one, if one is near.
void test_options_unknown(void **state) {
    (void)state;
    expect_command("--warmpu 5", 2, "there is no option --warmpu; the nearest is --warmup");
    expect_command("--exprts 5", 2, "there is no option --exprts; the nearest is --experts");
    expect_command("--eval-token=5", 2, "there is no option --eval-token; the nearest is --eval-tokens");
    expect_command("-steps 5", 2, "there is no option -steps; the nearest is --steps");
    expect_command("--nonsense", 2, "there is no option --nonsense (");
    expect_command("steps", 2, "the nearest is --steps");
    expect_command("--eval-batches 2", 2, "--eval-tokens N says how many tokens an evaluation reads");
    expect_command("--recipe mixtrall", 2, "there is no recipe 'mixtrall'; the nearest is mixtral; --list-recipes");
    expect_command("--recipe deepseek-v4", 2, "the nearest is deepseek-v");
    expect_command("--recipe nosuch", 2, "there is no recipe 'nosuch'; --list-recipes");
    assert_int_equal(edit_distance("kitten", "sitting"), 3);
    assert_int_equal(edit_distance("", "abc"), 3);
    assert_int_equal(edit_distance("abc", ""), 3);
}

// The program refuses before anything is written, goes on with the same command line, and says where a warm-up is long.
void test_options_program(void **state) {
    (void)state;
    char more[512];
    need_program();
    check_leaks(0);
    expect(run_tiny("idle", "--threshold 0.2"), 2, "it needs --select threshold");
    assert_true(access(scratch_file("idle"), F_OK) != 0);
    expect(run_tiny("idle", "--recipe threshold --threshold 0.3 --steps 4"), 0, "What next");
    expect(run_tiny("idle", "--recipe threshold --threshold 0.3 --steps 5 --resume"), 0, "What next");
    expect(run_tiny("idle", "--resume --steps 6 --drop-order score"), 2, "--capacity-factor");
    expect(run_tiny("idle", "--resume --steps 6 --warmup 6"), 2, "a run of 6 steps would be nothing but warm-up");
    expect(run_tiny("idle", "--resume --steps 6 --init-scheme truncated"), 2, "--init-scheme truncated"); // it has its weights
    expect(run_tiny("idle", "--prompt hello --steps 9"), 2, "it needs training, and --prompt only goes on");
    expect(run_tiny("idle", "--prompt hello --recompute"), 2, "it needs training");
    expect(run_tiny("idle", "--prompt hello --seed 2 --top-k 3"), 0, "hello");
    expect(run_tiny("idle", "--prompt hello --temperature 0 --top-k 3"), 2, "a --temperature above 0");

    // A checkpoint of earlier days whose command line had no effect goes on by the same one.
    expect(run_tiny("older", "--steps 4"), 0, NULL);
    shell(said, sizeof(said), "sed -i 's/\"drop-order\":\"choice\"/\"drop-order\":\"score\"/' %s/latest/config.json", scratch_file("older"));
    expect(run_tiny("older", "--steps 6 --resume --drop-order score"), 0, "What next");

    snprintf(more, sizeof(more), "%s --data %s --out %s --steps 3 --dim 32 --ffn 32 --seq 32 --eval-tokens 64 --tokens 1 --threads 1",
             getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe", scratch_file("data"), scratch_file("brief"));
    expect(shell(said, sizeof(said), "%s", more), 0, "the learning rate only rises, to 0.00012: the warm-up of 100 steps");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options_idle),
        cmocka_unit_test(test_options_documented),
        cmocka_unit_test(test_options_effective),
        cmocka_unit_test(test_options_unknown),
        cmocka_unit_test(test_options_program),
    };
    begin_tests();
    return cmocka_run_group_tests_name("options", tests, NULL, scratch_done);
}
