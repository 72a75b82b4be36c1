// GGUF files: what --export writes, read by a small reader of its own, which knows of the format only what its description
// says, and held against the model's weights; and what --export refuses. dev/test/check_gguf.py has llama.cpp read such files.

#include "dev/test/trainer.h"
#include "dev/test/model.h"
#include "dev/test/runs.h"

// ---------------------------------------------------------------------------------------------------------------------
// A reader

typedef struct Found { // a key's value, or a tensor
    char name[128];
    int type;                   // of the value, or of the tensor's numbers
    const unsigned char *bytes; // the value, or the numbers
    int dims;
    size_t size[4];             // of a tensor, the length of a row first
} Found;

typedef struct GgufFile {
    char *text;
    size_t size, at;
    Found keys[64], tensors[64];
    int key_count, tensor_count;
} GgufFile;

uint64_t get(GgufFile *f, int bytes) {
    uint64_t x = 0;
    assert_true(f->at + (size_t)bytes <= f->size);
    for (int i = 0; i < bytes; i++)
        x |= (uint64_t)(unsigned char)f->text[f->at + (size_t)i] << 8 * i;
    f->at += (size_t)bytes;
    return x;
}

void get_name(GgufFile *f, char name[128]) {
    size_t n = get(f, 8);
    assert_true(n < 128 && f->at + n <= f->size);
    memcpy(name, f->text + f->at, n);
    name[n] = 0;
    f->at += n;
}

void skip_value(GgufFile *f, int type) {
    static const int bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    assert_true(type <= 12);
    if (type == 8) {
        size_t n = get(f, 8);
        f->at += n;
    } else if (type == 9) {
        int of = (int)get(f, 4);
        for (size_t n = get(f, 8); n > 0; n--)
            skip_value(f, of);
    }
    f->at += (size_t)bytes[type];
    assert_true(f->at <= f->size);
}

// Reads scratch_file(name). Every byte has to belong to something.
GgufFile *read_gguf(const char *name) {
    static GgufFile file;
    GgufFile *f = &file;
    free(f->text);
    memset(f, 0, sizeof(*f));
    f->text = read_file(scratch_file(name), &f->size);
    assert_true(f->size > 24 && !memcmp(f->text, "GGUF", 4));
    f->at = 4;
    assert_int_equal(get(f, 4), 3);
    f->tensor_count = (int)get(f, 8);
    f->key_count = (int)get(f, 8);
    assert_true(f->tensor_count <= 64 && f->key_count <= 64);
    for (int i = 0; i < f->key_count; i++) {
        Found *k = &f->keys[i];
        get_name(f, k->name);
        k->type = (int)get(f, 4);
        k->bytes = (unsigned char *)f->text + f->at;
        skip_value(f, k->type);
    }
    size_t offset[64], end = 0;
    for (int i = 0; i < f->tensor_count; i++) {
        Found *t = &f->tensors[i];
        get_name(f, t->name);
        t->dims = (int)get(f, 4);
        assert_in_range(t->dims, 1, 3);
        t->size[1] = t->size[2] = 1;
        for (int d = 0; d < t->dims; d++)
            t->size[d] = get(f, 8);
        t->type = (int)get(f, 4);
        offset[i] = get(f, 8);
    }
    while (f->at % 32)
        assert_int_equal(get(f, 1), 0);

    // The tensors stand one behind the other, each from a multiple of 32 on, and zeros between them.
    for (int i = 0; i < f->tensor_count; i++) {
        Found *t = &f->tensors[i];
        size_t n = t->size[0] * t->size[1] * t->size[2], bytes = 4 * n;
        bytes = t->type == 1 ? 2 * n : bytes;
        bytes = t->type == 8 ? n / 32 * 34 : bytes;
        bytes = t->type == 2 ? n / 32 * 18 : bytes;
        assert_true(t->type == 0 || t->type == 1 || t->type == 2 || t->type == 8);
        assert_int_equal(offset[i], end);
        t->bytes = (unsigned char *)f->text + f->at + end;
        for (end += bytes; end % 32; end++)
            assert_int_equal(f->text[f->at + end], 0);
    }
    assert_int_equal(f->at + end, f->size);
    return f;
}

const Found *find_found(const Found *list, int count, const char *name) {
    for (int i = 0; i < count; i++) {
        if (!strcmp(list[i].name, name))
            return &list[i];
    }
    fail_msg("%s is not there", name);
    return NULL;
}

const Found *find_key(const GgufFile *f, const char *name) {
    return find_found(f->keys, f->key_count, name);
}

const Found *find_numbers(const GgufFile *f, const char *name) {
    return find_found(f->tensors, f->tensor_count, name);
}

int key_integer(const GgufFile *f, const char *name) {
    int32_t x;
    const Found *k = find_key(f, name);
    assert_int_equal(k->type, 4);
    memcpy(&x, k->bytes, 4);
    return x;
}

double key_number(const GgufFile *f, const char *name) {
    float x;
    const Found *k = find_key(f, name);
    assert_int_equal(k->type, 6);
    memcpy(&x, k->bytes, 4);
    return (double)x;
}

void assert_key_text(const GgufFile *f, const char *name, const char *text) {
    const Found *k = find_key(f, name);
    assert_int_equal(k->type, 8);
    assert_int_equal(k->bytes[0], strlen(text)); // shorter than 256 bytes
    assert_memory_equal(k->bytes + 8, text, strlen(text));
}

// One number of a tensor, by the description of its type.
double number_at(const Found *t, size_t i) {
    const unsigned char *block = t->bytes + i / 32 * (t->type == 8 ? 34 : 18);
    float x;
    uint16_t half;
    if (t->type == 0) {
        memcpy(&x, t->bytes + 4 * i, 4);
        return (double)x;
    }
    memcpy(&half, t->type == 1 ? t->bytes + 2 * i : block, 2);
    int power = half >> 10 & 31, digits = half & 1023;
    double scale = ldexp(power ? digits + 1024 : digits, (power ? power : 1) - 25);
    scale = half >> 15 ? -scale : scale;
    if (t->type == 1)
        return scale;
    if (t->type == 8)
        return scale * (signed char)block[2 + i % 32];
    return scale * (((i % 32 < 16 ? block[2 + i % 16] : block[2 + i % 16] >> 4) & 15) - 8);
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// Exports the model of scratch_file(out) to scratch_file(file). Returns the exit status.
int export_tiny(const char *out, const char *file, const char *more) {
    const char *program = getenv("TRAIN_MOE");
    return shell(said, sizeof(said), "%s --out %s --export %s --threads 1 %s", program ? program : "./train_moe",
                 scratch_file(out), scratch_file(file), more);
}

// A run of one step, scratch_file(name), with weights that are all different, and its file, scratch_file(name.gguf).
void make_file(const char *name, const char *recipe, const char *more) {
    char options[256], file[80];
    snprintf(options, sizeof(options), "%s --steps 1 --lr 0.1 --save-every 0 --eval-every 0 --sample-every 0", recipe);
    expect(run_tiny(name, options), 0, "What next");
    snprintf(file, sizeof(file), "%s.gguf", name);
    expect(export_tiny(name, file, more), 0, "as llama.cpp reads it");
}

// The model of a run, in this process. It lives until the next one is read.
Model *read_model(const char *name) {
    static Run run;
    char path[80];
    if (run.model)
        model_free(run.model);
    memset(&run, 0, sizeof(run));
    if (!name)
        return NULL;
    snprintf(path, sizeof(path), "%s/latest", name);
    config_from_directory(&run.config, scratch_file(path));
    config_check(&run.config);
    run.backend = &cpu_backend;
    run.model = model_allocate(&run.config, 8, 0, NULL);
    load_weights(&run, scratch_file(path), 0);
    return run.model;
}

// A tensor of the file is `matrices` times (rows, cols): row r of matrix i is row first + i * step + r of the weights; of heads
// of width `turned`, not 0, it is that which Hugging Face's permute() for llama.cpp puts there.
void assert_rows(const GgufFile *f, const char *name, const real *weights, int matrices, int rows, int cols, int first, int step,
                 int turned, double tolerance) {
    const Found *t = find_numbers(f, name);
    assert_int_equal(t->dims, matrices > 1 ? 3 : 1 + (rows > 1));
    assert_int_equal(t->size[0], cols);
    assert_int_equal(t->size[1] * t->size[2], (size_t)matrices * (size_t)rows);
    for (int i = 0; i < matrices; i++) {
        for (int r = 0; r < rows; r++) {
            int from = r; // w.reshape(heads, 2, D / 2, C).swapaxes(1, 2): what was [h][half][j] is [h][j][half]
            if (turned) {
                int h = r / turned, j = r % turned / 2, half = r % 2;
                from = h * turned + half * turned / 2 + j;
            }
            for (int c = 0; c < cols; c++) {
                double is = number_at(t, ((size_t)i * (size_t)rows + (size_t)r) * (size_t)cols + (size_t)c);
                double wanted = (double)weights[(size_t)(first + i * step + from) * (size_t)cols + (size_t)c];
                if (fabs(is - (double)(float)wanted) > tolerance)
                    fail_msg("%s: matrix %d, row %d, column %d is %g, not %g", name, i, r, c, is, wanted);
            }
        }
    }
}

// All of the file is the model. turned: rows of queries and keys are in llama's order.
void assert_model(const GgufFile *f, const Model *m, int turned, int own_output, double tolerance) {
    const Config *c = &m->config;
    int C = c->dim, D = head_width(c), Q = c->heads * D, KV = c->kv_heads * D, F = c->ffn, E = c->experts, count = 2;
    char name[64];
    assert_rows(f, "token_embd.weight", m->params.embed, 1, c->vocab, C, 0, 0, 0, tolerance);
    assert_rows(f, "output_norm.weight", m->params.norm, 1, 1, C, 0, 0, 0, 0);
    if (own_output || c->untied) {
        assert_rows(f, "output.weight", m->params.head, 1, c->vocab, C, 0, 0, 0, tolerance);
        count++;
    }
    for (int l = 0; l < c->layers; l++) {
        const LayerParams *w = &m->params.layer[l];
        int dense = dense_width(c, l), S = dense ? dense : F;
        real *zeros = take_reals((size_t)S * (size_t)C);
#define ROWS(what, ...) snprintf(name, sizeof(name), "blk.%d.%s.weight", l, what); assert_rows(f, name, __VA_ARGS__); count++
        ROWS("attn_norm", w->norm1, 1, 1, C, 0, 0, 0, 0);
        ROWS("ffn_norm", w->norm2, 1, 1, C, 0, 0, 0, 0);
        ROWS("attn_q", w->qkv, 1, Q, C, 0, 0, turned ? D : 0, tolerance);
        ROWS("attn_k", w->qkv, 1, KV, C, Q, 0, turned ? D : 0, tolerance);
        ROWS("attn_v", w->qkv, 1, KV, C, Q + KV, 0, 0, tolerance);
        ROWS("attn_output", w->proj, 1, C, Q, 0, 0, 0, tolerance);
        if (c->qk_norm) {
            int row = c->qk_norm_over == OVER_ROW;
            ROWS("attn_q_norm", w->q_norm, 1, 1, row ? Q : D, 0, 0, 0, 0);
            ROWS("attn_k_norm", w->k_norm, 1, 1, row ? KV : D, 0, 0, 0, 0);
        }
        if (is_moe(c, l)) {
            ROWS("ffn_gate_inp", w->router, 1, E, C, 0, 0, 0, 0);
            ROWS("ffn_gate_exps", w->w_in, E, F, C, 0, 2 * F, 0, tolerance);
            ROWS("ffn_up_exps", w->w_in, E, F, C, F, 2 * F, 0, tolerance);
            ROWS("ffn_down_exps", w->w_out, E, C, F, 0, C, 0, tolerance);
        }
        if (c->qkv_bias) {
            snprintf(name, sizeof(name), "blk.%d.attn_q.bias", l);
            assert_rows(f, name, w->qkv_bias, 1, 1, Q, 0, 0, 0, 0);
            snprintf(name, sizeof(name), "blk.%d.attn_k.bias", l);
            assert_rows(f, name, w->qkv_bias + Q, 1, 1, KV, 0, 0, 0, 0);
            snprintf(name, sizeof(name), "blk.%d.attn_v.bias", l);
            assert_rows(f, name, w->qkv_bias + Q + KV, 1, 1, KV, 0, 0, 0, 0);
            count += 3;
        }
        if (c->shared_gate) {
            ROWS("ffn_gate_inp_shexp", w->shared_router, 1, 1, C, 0, 0, 0, 0);
        }
        int beside = is_moe(c, l), empty = beside && !dense && (c->gate == PROBABILITY || c->scale != 1) && !c->qk_norm;
        if (dense || empty) { // where there is no shared expert, one of zeros
            ROWS(beside ? "ffn_gate_shexp" : "ffn_gate", dense ? w->dense_in : zeros, 1, S, C, 0, 0, 0, tolerance);
            ROWS(beside ? "ffn_up_shexp" : "ffn_up", dense ? w->dense_in : zeros, 1, S, C, dense ? S : 0, 0, 0, tolerance);
            ROWS(beside ? "ffn_down_shexp" : "ffn_down", dense ? w->dense_out : zeros, 1, C, S, 0, 0, 0, tolerance);
        }
    }
    if (c->rope_scaling == ROPE_LLAMA3) { // by the formula of Llama 3: slow pairs turn a factor slower
        const Found *t = find_numbers(f, "rope_freqs.weight");
        assert_int_equal(t->size[0], D / 2);
        for (int i = 0; i < D / 2; i++) {
            double wave = 2 * 3.141592653589793 / pow(c->rope_theta, -2.0 * i / D), original = c->rope_original;
            double smooth = (original / wave - c->rope_low) / (c->rope_high - c->rope_low), factor = c->rope_factor;
            double wanted = wave > original / c->rope_low ? factor : 1 / ((1 - smooth) / factor + smooth);
            assert_near(number_at(t, (size_t)i), wave < original / c->rope_high ? 1 : wanted, 1e-5);
        }
        count++;
    }
    assert_int_equal(count, f->tensor_count);
    free_taken();
}

// ---------------------------------------------------------------------------------------------------------------------
// Tests

// A small file, byte by byte.
void test_gguf_bytes(void **state) {
    (void)state;
    static const unsigned char wanted[] = {
        'G', 'G', 'U', 'F', 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, // version; 2 tensors, 4 keys
        1, 0, 0, 0, 0, 0, 0, 0, 'a', 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 'h', 'i',      // a = "hi"
        1, 0, 0, 0, 0, 0, 0, 0, 'b', 4, 0, 0, 0, 1, 2, 0, 0,                            // b = 513
        1, 0, 0, 0, 0, 0, 0, 0, 'c', 6, 0, 0, 0, 0, 0, 0x80, 0x3f,                      // c = 1.0
        1, 0, 0, 0, 0, 0, 0, 0, 'd', 7, 0, 0, 0, 1,                                     // d = true
        1, 0, 0, 0, 0, 0, 0, 0, 'x', 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, // x: rows of 3, 2 of them
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // float16, from byte 0 on
        1, 0, 0, 0, 0, 0, 0, 0, 'y', 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, // y
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // up to byte 192
        0, 0x3c, 0, 0x40, 0, 0x42, 0, 0xbc, 0, 0x38, 0, 0, // 1 2 3 -1 0.5 0
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0x20, 0x40, // 2.5
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const real rows[2][3] = {{1, 2, 3}, {-1, (real)0.5, 0}}, one[] = {(real)2.5};
    const int shape[] = {2, 3}, single[] = {1};
    Gguf g;
    size_t size;
    gguf_open(&g, scratch_file("bytes.gguf"));
    gguf_text(&g, "a", "hi");
    gguf_integer(&g, "b", 513);
    gguf_number(&g, "c", 1);
    gguf_flag(&g, "d", 1);
    gguf_tensor(&g, "x", FORMAT_F16, 2, shape);
    gguf_tensor(&g, "y", FORMAT_F32, 1, single);
    gguf_begin_data(&g);
    gguf_row(&g, rows[0]);
    gguf_row(&g, rows[1]);
    gguf_row(&g, one);
    assert_false(exists("bytes.gguf"));
    gguf_close(&g);
    assert_false(exists("bytes.gguf.unfinished"));
    char *found = read_file(scratch_file("bytes.gguf"), &size);
    for (size_t i = 0; i < size && i < sizeof(wanted); i++) {
        if ((unsigned char)found[i] != wanted[i])
            fail_msg("byte %zu is %d, not %d", i, (unsigned char)found[i], wanted[i]);
    }
    assert_int_equal(size, sizeof(wanted));
    free(found);
}

// Each architecture: its keys, and every number of its tensors.
void test_gguf_models(void **state) {
    (void)state;
    need_program();
    static const struct {
        const char *name, *options, *architecture;
        int turned, own_output;
    } cases[] = {
        {"mixtral", "--kv-heads 1", "llama", 1, 0},
        {"dense", "--recipe dense --untied --norm-eps 0.001", "llama", 1, 0},
        {"dense-qk", "--recipe dense --qk-norm --kv-heads 1", "qwen3", 0, 0},
        {"qwen3", "--recipe qwen3 --topk 2 --qk-norm --rope-theta 500", "qwen3moe", 0, 1},
        {"qwen3-plain", "--recipe qwen3 --topk 2 --untied", "llama", 1, 0},
        {"scale", "--shared 2 --scale 1.5", "bailingmoe", 1, 1},
        {"scale-alone", "--scale 1.5", "bailingmoe", 1, 1},
        {"granite", "--shared 1 --shared-ffn 48", "granitemoe", 1, 0},
        {"wide", "--head-width 32 --rope-scaling linear", "llama", 1, 0},
        {"llama3", "--recipe dense --rope-scaling llama3 --rope-original 16", "llama", 1, 0},
        {"qwen2", "--recipe dense --qkv-bias --kv-heads 1", "qwen2", 0, 0},
        {"qwen2moe", "--gate probability --qkv-bias --shared 1 --shared-gate --shared-ffn 64", "qwen2moe", 0, 1},
        {"row", "--gate probability --qk-norm --qk-norm-over row", "olmoe", 0, 1},
        {"olmoe", "--recipe olmoe --topk 3", "deepseek", 1, 1},
        {"first", "--gate probability --shared 1 --dense-first 1 --untied", "deepseek", 1, 1},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        char file[80], key[128];
        make_file(cases[i].name, cases[i].options, "--export-type f32");
        snprintf(file, sizeof(file), "%s.gguf", cases[i].name);
        const GgufFile *f = read_gguf(file);
        const Model *m = read_model(cases[i].name);
        const Config *c = &m->config;
        assert_key_text(f, "general.architecture", cases[i].architecture);
        assert_key_text(f, "general.name", cases[i].name);
        assert_int_equal(key_integer(f, "general.file_type"), 0);
#define KEY(name) (snprintf(key, sizeof(key), "%s.%s", cases[i].architecture, name), key)
        assert_int_equal(key_integer(f, KEY("block_count")), 2);
        assert_int_equal(key_integer(f, KEY("context_length")), 32);
        assert_int_equal(key_integer(f, KEY("embedding_length")), 32);
        assert_int_equal(key_integer(f, KEY("attention.head_count")), 2);
        assert_int_equal(key_integer(f, KEY("attention.head_count_kv")), c->kv_heads);
        assert_int_equal(key_integer(f, KEY("attention.key_length")), head_width(c));
        assert_int_equal(key_integer(f, KEY("rope.dimension_count")), head_width(c));
        assert_int_equal(key_integer(f, KEY("vocab_size")), 265);
        assert_near(key_number(f, KEY("attention.layer_norm_rms_epsilon")), c->norm_eps, 1e-10);
        assert_near(key_number(f, KEY("rope.freq_base")), c->rope_theta, 0);
        if (moe_layers(c)) {
            assert_int_equal(key_integer(f, KEY("expert_count")), c->experts);
            assert_int_equal(key_integer(f, KEY("expert_used_count")), c->topk);
            assert_int_equal(key_integer(f, KEY("expert_feed_forward_length")), 32);
        }
        assert_int_equal(key_integer(f, KEY("feed_forward_length")), is_moe(c, 0) ? 32 : dense_width(c, 0));
        if (c->rope_scaling == ROPE_LINEAR) {
            assert_key_text(f, KEY("rope.scaling.type"), "linear");
            assert_near(key_number(f, KEY("rope.scaling.factor")), c->rope_factor, 0);
        }
        if (c->shared && (c->shared_ffn || c->shared_gate)) {
            assert_int_equal(key_integer(f, KEY("expert_shared_feed_forward_length")), c->shared_ffn);
        } else if (!strcmp(cases[i].architecture, "deepseek") || c->shared || c->scale != 1) {
            assert_int_equal(key_integer(f, KEY("expert_shared_count")), c->shared ? c->shared : 1);
            assert_int_equal(key_integer(f, KEY("leading_dense_block_count")), c->dense_first);
            assert_near(key_number(f, KEY("expert_weights_scale")), c->scale, 0);
            assert_int_equal(find_key(f, KEY("expert_weights_norm"))->bytes[0], c->gate == RENORMALIZED);
        }
        assert_model(f, m, cases[i].turned, cases[i].own_output, 0);
    }
    read_model(NULL);
}

// The types: matrices have the one that was asked for, the router and the vectors are float32, and rows that are no whole
// blocks are float16.
void test_gguf_types(void **state) {
    (void)state;
    need_program();
    static const struct {
        const char *type;
        int number, file_type, wide;
        double error;
    } types[] = {{"f16", 1, 1, 1, 1e-3}, {"q8_0", 8, 7, 8, 1e-2}, {"q4_0", 2, 2, 8, 0.1}};
    make_file("types", "", "");
    make_file("narrow", "--ffn 20", "--export-type q8_0");
    expect(0, 0, "2 matrices have rows that are not whole blocks of 32 numbers; they are in f16");
    const GgufFile *f = read_gguf("narrow.gguf");
    assert_int_equal(find_numbers(f, "blk.0.ffn_down_exps.weight")->type, 1);
    assert_int_equal(find_numbers(f, "blk.0.ffn_gate_exps.weight")->type, 8);
    for (int i = 0; i < COUNT(types); i++) {
        char more[64];
        snprintf(more, sizeof(more), "--export-type %s", types[i].type);
        unlink(scratch_file("types.gguf"));
        expect(export_tiny("types", "types.gguf", i ? more : ""), 0, types[i].type); // f16 by itself
        f = read_gguf("types.gguf");
        assert_int_equal(key_integer(f, "general.file_type"), types[i].file_type);
        assert_int_equal(find_numbers(f, "blk.1.attn_q.weight")->type, types[i].number);
        assert_int_equal(find_numbers(f, "blk.1.ffn_up_exps.weight")->type, types[i].number);
        assert_int_equal(find_numbers(f, "token_embd.weight")->type, types[i].wide);
        assert_int_equal(find_numbers(f, "blk.1.ffn_gate_inp.weight")->type, 0);
        assert_int_equal(find_numbers(f, "output_norm.weight")->type, 0);
        assert_model(f, read_model("types"), 1, 0, types[i].error);
    }
    read_model(NULL);
}

// The tokenizer: its tokens, in GPT-2's alphabet, their types and the merges.
void test_gguf_tokenizer(void **state) {
    (void)state;
    need_program();
    make_file("words", "", "");
    GgufFile *f = read_gguf("words.gguf");
    char name[128];
    assert_key_text(f, "tokenizer.ggml.model", "gpt2");
    assert_key_text(f, "tokenizer.ggml.pre", "gpt-2");
    assert_int_equal(key_integer(f, "tokenizer.ggml.bos_token_id"), 0);
    assert_int_equal(key_integer(f, "tokenizer.ggml.eos_token_id"), 0);
    assert_int_equal(find_key(f, "tokenizer.ggml.add_bos_token")->bytes[0], 1);

    // The list of tokens, of which the tokenizer of these tests has 265.
    static const struct {
        int id;
        const char *text;
    } some[] = {{0, "<|endoftext|>"}, {1, "\xc4\x80"}, {33, "\xc4\xa0"}, {98, "a"}, {257, "he"}, {264, "aaaa"}};
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.tokens")->bytes - f->text);
    assert_int_equal(get(f, 4), 8);
    assert_int_equal(get(f, 8), 265);
    for (int id = 0; id < 265; id++) {
        get_name(f, name);
        for (int i = 0; i < COUNT(some); i++) {
            if (some[i].id == id)
                assert_string_equal(name, some[i].text);
        }
    }
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.token_type")->bytes - f->text);
    assert_int_equal(get(f, 4), 5);
    assert_int_equal(get(f, 8), 265);
    for (int id = 0; id < 265; id++)
        assert_int_equal(get(f, 4), id ? 1 : 3);
    static const char *const merges[] = {"h e", "l l", "he ll", "hell o", "\xc4\xa0 hello", "a a", "aa aa"};
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.merges")->bytes - f->text);
    assert_int_equal(get(f, 4), 8);
    assert_int_equal(get(f, 8), COUNT(merges));
    for (int i = 0; i < COUNT(merges); i++) {
        get_name(f, name);
        assert_string_equal(name, merges[i]);
    }
}

void load_words(void *arg) {
    Tokenizer *t = tokenizer_load((const char *)arg);
    Gguf g;
    gguf_open(&g, scratch_file("unwritten.gguf"));
    gguf_tokenizer(&g, t, (const char *)arg, t->vocab, 0, 0, 0);
}

void load_for_small_model(void *arg) { // one that has a token less
    Tokenizer *t = tokenizer_load((const char *)arg);
    Gguf g;
    gguf_open(&g, scratch_file("unwritten.gguf"));
    gguf_tokenizer(&g, t, (const char *)arg, t->vocab - 1, 0, 0, 0);
}

// A tokenizer with this pre-tokenizer has this name in llama.cpp; or NULL, and is refused with the text.
void check_cutter(const char *words, const char *members, const char *name, const char *refusal) {
    static const char plain[] = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true}, \"model\": {";
    char with[2048], message[1024];
    snprintf(with, sizeof(with), "%s, \"model\": {%s", words, members);
    const char *path = small_tokenizer("cutter.json", plain, with);
    if (!name) {
        assert_int_equal(dies(load_words, (void *)path, message, sizeof(message)), 1);
        if (!strstr(message, refusal))
            fail_msg("expected \"%s\": %s", refusal, message);
        return;
    }
    Tokenizer *t = tokenizer_load(path);
    Gguf g;
    gguf_open(&g, scratch_file("unwritten.gguf"));
    gguf_tokenizer(&g, t, path, 300, 0, 0, 0); // a model with more tokens
    close_memory(g.keys, &g.key_text);
    assert_non_null(memmem(g.key_text, g.key_size, name, strlen(name)));
    assert_non_null(memmem(g.key_text, g.key_size, "[PAD299]", 8));
    free(g.key_text);
    tokenizer_free(t);
}

// The pre-tokenizers that llama.cpp knows, and what it does not.
void test_gguf_cutters(void **state) {
    (void)state;
#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":"
#define LLAMA(numbers) "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|" numbers \
    "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
#define SPLIT(numbers) "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" LLAMA(numbers) \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}," BYTES "false}]}"
#define DIGITS(alone) "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":" alone "}," BYTES "true}]}"
    check_cutter(BYTES "true}", "", "gpt-2", NULL);
    check_cutter(DIGITS("true"), "", "smollm", NULL);
    check_cutter(SPLIT("\\\\p{N}"), "", "qwen2", NULL);
    check_cutter(SPLIT("\\\\p{N}{1,3}"), "\"ignore_merges\": true, ", "llama-bpe", NULL);
    check_cutter(DIGITS("false"), "", NULL, "for which llama.cpp has no name");
    check_cutter(BYTES "false}", "", NULL, "for which llama.cpp has no name");
    check_cutter(BYTES "true}", "\"ignore_merges\": true, ", NULL, "ignore_merges is true");
    check_cutter("{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", "", NULL, "add_prefix_space");
}

// A vocabulary in SentencePiece's manner, of the bytes, some letters and these tokens and merges. Returns its path.
const char *fallback_tokenizer(const char *tokens, const char *merges) {
    static char text[8192];
    size_t n = (size_t)sprintf(text, "{\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true},{\"id\":1,\"content\":\"<s>\","
                                     "\"special\":true},{\"id\":2,\"content\":\"</s>\",\"special\":true}],\"normalizer\":{\"type\":\"Sequence\","
                                     "\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\xe2\x96\x81\"},{\"type\":\"Replace\",\"pattern\":"
                                     "{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}]},\"pre_tokenizer\":null,\"post_processor\":null,"
                                     "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"
                                     "\"\xe2\x96\x81\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\","
                                     "\"content\":\" \",\"start\":1,\"stop\":0}]},\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\","
                                     "\"fuse_unk\":true,\"byte_fallback\":true,\"vocab\":{\"<unk>\":0,\"<s>\":1,\"</s>\":2");
    for (int b = 0; b < 256; b++)
        n += (size_t)sprintf(text + n, ",\"<0x%02X>\":%d", b, 3 + b);
    sprintf(text + n, ",\"\xe2\x96\x81\":259,\"a\":260,\"b\":261%s},\"merges\":[%s]}}", tokens, merges);
    mkdir(scratch_file("fallback"), 0777);
    put_text("fallback/tokenizer_config.json", "{\"eos_token\":\"</s>\"}");
    return put_text("fallback/tokenizer.json", text);
}

// SentencePiece's: scores that follow the ranks of merges; and what no scores can say.
void test_gguf_fallback(void **state) {
    (void)state;
    char message[1024], name[128];
    Tokenizer *t = tokenizer_load(fallback_tokenizer(",\"ab\":262,\"aba\":263,\"\xe2\x96\x81""a\":264",
                                                     "\"\xe2\x96\x81 a\",\"a b\",\"ab a\""));
    const int shape[] = {1};
    real one[] = {1};
    Gguf g;
    unlink(scratch_file("fallback.gguf"));
    gguf_open(&g, scratch_file("fallback.gguf"));
    gguf_tokenizer(&g, t, "x", t->vocab, 1, 1, 2);
    gguf_tensor(&g, "x", FORMAT_F32, 1, shape);
    gguf_begin_data(&g);
    gguf_row(&g, one);
    gguf_close(&g);
    tokenizer_free(t);
    GgufFile *f = read_gguf("fallback.gguf");
    assert_key_text(f, "tokenizer.ggml.model", "llama");
    assert_key_text(f, "tokenizer.ggml.pre", "default");
    assert_int_equal(find_key(f, "tokenizer.ggml.add_space_prefix")->bytes[0], 1);
    assert_int_equal(key_integer(f, "tokenizer.ggml.unknown_token_id"), 0);
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.tokens")->bytes - f->text) + 12;
    for (int id = 0; id < 265; id++)
        get_name(f, name);
    assert_string_equal(name, "\xe2\x96\x81""a");
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.token_type")->bytes - f->text) + 12;
    for (int id = 0; id < 265; id++) {
        int special = id ? 3 : 2, of_model = id < 259 ? 6 : 1;
        assert_int_equal(get(f, 4), id < 3 ? special : of_model);
    }
    static const float wanted[] = {0, 0, 0, -2, -3, -1};
    f->at = (size_t)((const char *)find_key(f, "tokenizer.ggml.scores")->bytes - f->text) + 12 + 4 * 259;
    for (int i = 0; i < 6; i++) {
        uint32_t bits = (uint32_t)get(f, 4);
        assert_memory_equal(&bits, &wanted[i], 4);
    }

    const char *path = fallback_tokenizer(",\"ab\":262", "\"a b\"");
    assert_int_equal(dies(load_for_small_model, (void *)path, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "it has 263 tokens, and the model only 262"));
    path = fallback_tokenizer(",\"ab\":262,\"ba\":263,\"aba\":264", "\"a b\",\"b a\",\"ab a\"");
    assert_int_equal(dies(load_words, (void *)path, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "\"a\" and \"ba\" are not merged"));
    path = fallback_tokenizer(",\"ab\":262,\"ba\":263,\"aba\":264,\"bb\":265", "\"a b\",\"b a\",\"ab a\",\"b b\",\"a ba\"");
    assert_int_equal(dies(load_words, (void *)path, message, sizeof(message)), 1);
    assert_non_null(strstr(message, "merge 5 makes \"aba\" as merge 3 does"));
}

void look_for_architecture(void *arg) {
    find_architecture((const Config *)arg, "runs/x");
}

// Models that llama.cpp does not compute: each is refused with its reason.
void test_gguf_refused(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"--recipe shazeer-lstm", "it has no LSTM and no attention with experts"},
        {"--recipe switchhead", "it has no LSTM and no attention with experts"},
        {"--norms 0", "--norms 0"},
        {"--last-feed 0", "--last-feed 0"},
        {"--recipe fast", "--ngrams, --value-embedding"},
        {"--moe-sigmoid 1", "--moe-sigmoid"},
        {"--activation relu", "its experts have --activation swiglu"},
        {"--recipe dense --activation gelu", "its dense layers have --activation swiglu"},
        {"--recipe mh-moe", "it has no router like this one"},
        {"--recipe expert-choice", "it has no router like this one"},
        {"--recipe hash", "it has no router like this one"},
        {"--recipe deepseek-v3", "--bias-rate"},
        {"--score sigmoid", "its scores are softmax"},
        {"--bias-rate 0.01", "its scores are softmax"},
        {"--eval-capacity-factor 1", "--eval-capacity-factor"},
        {"--moe-every 2", "none of its architectures has these parts together: --gate renormalized, dense layers"},
        {"--dense-first 1", "--gate renormalized, dense layers, --kv-heads"},
        {"--qk-norm 1 --gate probability", "--gate probability, --qk-norm"},
        {"--qk-norm 1 --shared 1", "--shared, --qk-norm"},
        {"--qk-norm 1 --scale 2", "--scale, --qk-norm"},
        {"--shared 1 --shared-gate 1", "--gate renormalized, --shared, --shared-gate"},
        {"--qk-norm 1 --qk-norm-over row --gate probability", "--gate probability, --qk-norm over rows, --kv-heads"},
        {"--qkv-bias 1", "--gate renormalized, --qkv-bias"},
        {"--recipe dense --qkv-bias 1 --qk-norm 1", "no experts, --qkv-bias, --qk-norm"},
        {"--recipe dense --qkv-bias 1 --head-width 8", "no experts, --qkv-bias, --kv-heads, --head-width"},
        {"--recipe dense --qk-norm 1 --rope-scaling llama3", "--qk-norm, --kv-heads, --rope-scaling llama3"},
    };
    char message[1024];
    for (int i = 0; i < COUNT(cases); i++) {
        Config c;
        char recipe[64] = "mixtral";
        sscanf(cases[i][0], "--recipe %63s", recipe);
        c = small_config(recipe);
        apply_options(&c, small_sizes(recipe));
        apply_options(&c, strncmp(cases[i][0], "--recipe", 8) ? cases[i][0] : cases[i][0] + 9 + strlen(recipe));
        config_check(&c);
        assert_int_equal(dies(look_for_architecture, &c, message, sizeof(message)), 1);
        if (!strstr(message, "runs/x: llama.cpp cannot compute this model") || !strstr(message, cases[i][1]))
            fail_msg("%s: expected \"%s\": %s", cases[i][0], cases[i][1], message);
    }
}

// Files and options: nothing is overwritten, and nothing half-written is left.
void test_gguf_files(void **state) {
    (void)state;
    need_program();
    const char *program = getenv("TRAIN_MOE") ? getenv("TRAIN_MOE") : "./train_moe";
    char latest[300];
    make_file("files", "", "");
    check_leaks(0);
    expect(export_tiny("files", "files.gguf", ""), 1, "files.gguf: there is something of that name already");
    read_gguf("files.gguf");
    expect(export_tiny("files", "nowhere/files.gguf", ""), 1, "nowhere/files.gguf.unfinished: cannot create");
    expect(export_tiny("files", "folder/", ""), 1, "folder/' names no file");
    expect(export_tiny("nothing", "nothing.gguf", ""), 1, "no checkpoint there to export");
    expect(export_tiny("files", "more.gguf", "--prompt x"), 2, "--prompt does nothing else: give it without --export");
    expect(export_tiny("files", "more.gguf", "--lr 0.3"), 2, "training, and --export only writes a file");
    expect(export_tiny("files", "more.gguf", "--layers 3"), 2, "--layers 3");
    expect(export_tiny("files", "more.gguf", "--export-type q5"), 2, "one of: f32, f16, q8_0, q4_0");
    expect(shell(said, sizeof(said), "%s --export-type q8_0 --steps 1 --out %s", program, scratch_file("more")), 2, "--export FILE");
    expect(shell(said, sizeof(said), "%s --out %s --quantize q8_0 --quantized %s --threads 1", program, scratch_file("files"),
                 scratch_file("few")),
           0, NULL);
    expect(export_tiny("few", "more.gguf", ""), 2, "few bits");
    assert_false(exists("more.gguf"));

    // A full disk, and what a program that was killed had left.
    expect(shell(said, sizeof(said), "trap '' XFSZ; ulimit -f 16; %s --out %s --export %s --threads 1", program, scratch_file("files"),
                 scratch_file("full.gguf")),
           1, "full.gguf: cannot write: File too large");
    assert_false(exists("full.gguf") || exists("full.gguf.unfinished"));
    assert_int_equal(mkdir(scratch_file("full.gguf.unfinished"), 0777), 0);
    put_text("full.gguf.unfinished/model.gguf", "half");
    check_leaks(1);
    expect(export_tiny("files", "full.gguf", ""), 0, "as llama.cpp reads it");
    assert_false(exists("full.gguf.unfinished"));
    assert_same_file(scratch_file("files.gguf"), scratch_file("full.gguf"));

    // The same from the directory itself, as another maker's directory is read.
    snprintf(latest, sizeof(latest), "%s/latest", scratch_file("files"));
    expect(shell(said, sizeof(said), "%s --init %s --export %s --threads 1", program, latest, scratch_file("init.gguf")), 0, "llama");
    const GgufFile *f = read_gguf("init.gguf");
    assert_model(f, read_model("files"), 1, 0, 1e-3);
    read_model(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gguf_bytes),   cmocka_unit_test(test_gguf_models), cmocka_unit_test(test_gguf_types),
        cmocka_unit_test(test_gguf_tokenizer), cmocka_unit_test(test_gguf_cutters), cmocka_unit_test(test_gguf_fallback),
        cmocka_unit_test(test_gguf_refused),
        cmocka_unit_test(test_gguf_files),
    };
    begin_tests();
    return cmocka_run_group_tests_name("gguf", tests, NULL, scratch_done);
}
