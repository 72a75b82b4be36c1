// Weights of few bits in a model: which tensors are in blocks, where they lie, and how they come from a file.
// Gives: is_in_blocks, without_blocks, share_blocks, blocks_refuse, read_scheme, write_scheme, load_blocks. Needs: train_moe.c,
// which includes it by way of dev/parts.h and dev/memory.h; scheme_names of dev/options.h; dev/cpu/blocks.h, whose products
// dev/cpu/matmul.h takes for such weights.
//
// A directory that --quantize has written has the feed-forward matrices in blocks (data/blocks.h): those of the experts, of
// shared experts and of dense layers. All other tensors are as they were. In config.json the object train_moe says so by
// "blocks": "q8_0" or another scheme. In model.safetensors such a tensor has the type U8 and the shape (rows, bytes of a row),
// and the bytes of a row tell whether it has 8 bits (34 bytes for 32 numbers) or 4 (18 bytes). A model that has such weights can
// answer --prompt and --evaluate, and it can teach (--teacher), but it cannot be trained.
#ifdef CONFIG_FIELDS
    int blocks;                     // the scheme of the model that is read; NO_BLOCKS: all its weights are numbers
    int quantize, evaluate;         // --quantize, --evaluate: see dev/few_bits.h
    double few;
    const char *quantized;
#elif !defined(QUANTIZED_H)
#define QUANTIZED_H
#include "cpu/blocks.h"
#include "../data/safetensors.h"

// ---- which tensors

int is_in_blocks(const Config *c, const Tensor *t) {
    const char *const kinds[] = {"w_in", "w_out", "dense_in", "dense_out", NULL};
    return c->blocks != NO_BLOCKS && find_word(kinds, t->kind) >= 0;
}

// Ends the table of weights: a tensor in blocks has no numbers in the model's memory. Returns the table's length.
int without_blocks(const Config *c, Tensor *list, int count) {
    for (int i = 0; i < count; i++) {
        list[i].size = is_in_blocks(c, &list[i]) ? 0 : list[i].size;
    }
    return count;
}

// The model's pointer to the weights of tensor i, which belongs to a layer.
real **weights_of(const Model *m, int i) {
    const Tensor *t = &m->tensors[i];
    return (real **)(void *)((char *)&m->params.layer[t->layer] + t->field);
}

// `to` works with the weights in blocks that `from` has, which lives longer.
void share_blocks(Model *to, const Model *from) {
    for (int i = 0; i < from->tensor_count; i++) {
        if (is_in_blocks(&from->config, &from->tensors[i])) {
            *weights_of(to, i) = *weights_of(from, i);
        }
    }
}

// Why a model in blocks cannot do what the options ask for; NULL: it can.
const char *blocks_refuse(const Config *c) {
    static char text[4400];
    if (c->blocks == NO_BLOCKS || c->prompt || c->evaluate) {
        return NULL;
    }
    snprintf(text, sizeof(text), "--%s %.4000s: its weights have few bits (%s), which only --prompt, --evaluate and --teacher can read: "
             "to train, to export or to quantise, take the checkpoint that it was made of",
             c->init[0] ? "init" : "out", c->init[0] ? c->init : c->out, scheme_names[c->blocks]);
    return text;
}

// ---- config.json

// What the object train_moe of config.json says besides the options.
void read_scheme(Config *c, const Json *config, const char *path) {
    const Json *scheme = json_get(json_get(config, "train_moe"), "blocks");
    if (!scheme) {
        return;
    }
    c->blocks = scheme->type == 's' ? find_word(scheme_names, scheme->text) : -1;
    if (c->blocks <= NO_BLOCKS) {
        fail("%s: train_moe: blocks is %s; expected q8_0, q4_0, mixed or mixed-often", path,
             scheme->type == 's' ? scheme->text : "no text");
    }
}

void write_scheme(FILE *to, const Config *c) {
    if (c->blocks != NO_BLOCKS) {
        fprintf(to, ",\"blocks\":\"%s\"", scheme_names[c->blocks]);
    }
}

// ---- reading

// Where the file has the part's blocks, whose format is written to *format; ends the program unless they are whole.
const unsigned char *find_blocks(const Safetensors *s, const Json *t, const Part *p, int *format) {
    const Json *dtype = json_get(t, "dtype"), *shape = json_get(t, "shape"), *range = json_get(t, "data_offsets");
    const Json *rows = shape ? shape->child : NULL, *bytes = rows ? rows->next : NULL, *from = range ? range->child : NULL;
    const Json *end = from ? from->next : NULL;
    size_t count = part_size(p);
    *format = -1;
    for (int f = FORMAT_Q8_0; bytes && f <= FORMAT_Q4_0; f++) {
        *format = bytes->number == (double)encoded_bytes(f, (size_t)p->cols) ? f : *format;
    }
    if (!dtype || dtype->type != 's' || strcmp(dtype->text, "U8") != 0 || *format < 0 || p->cols % BLOCK || rows->number != p->rows) {
        fail("%s: %s has type %s; config.json says that it is in blocks: U8, %d x %zu bytes for 8 bits or %d x %zu for 4", s->path,
             p->name, dtype && dtype->text ? dtype->text : "none", p->rows, encoded_bytes(FORMAT_Q8_0, (size_t)p->cols), p->rows,
             encoded_bytes(FORMAT_Q4_0, (size_t)p->cols));
    }
    size_t size = encoded_bytes(*format, count);
    if (!end || !(from->number >= 0) || !(end->number <= (double)s->data_size) || end->number - from->number != (double)size) {
        fail("%s: damaged: %s should have %zu bytes within the file's %zu", s->path, p->name, size, s->data_size);
    }
    const unsigned char *blocks = (const unsigned char *)s->data + (size_t)from->number;
    check_tensor(s->sums, s->path, p->name, blocks, size);
    size_t bad = check_blocks(*format, blocks, count);
    if (bad < count) {
        fail("%s: damaged: the block of %s at row %zu, column %zu has a scale that is not finite", s->path, p->name,
             bad / (size_t)p->cols, bad % (size_t)p->cols);
    }
    return blocks;
}

// Reads some parts, which together are a matrix.
BlockMatrix load_matrix(Model *m, const WeightFiles *files, const Part *parts, int count) {
    BlockMatrix matrix = {NULL, -1};
    unsigned char *to = NULL;
    for (int k = 0; k < count; k++) {
        const Part *p = &parts[k];
        const Safetensors *s = NULL;
        for (int i = 0; i < files->count && !s; i++) {
            s = json_get(files->list[i].header, p->name) ? &files->list[i] : NULL;
        }
        if (!s) {
            fail("%s: there is no %s, which config.json asks for", files->path, p->name);
        }
        int format, scheme = m->config.blocks;
        const unsigned char *from = find_blocks(s, json_get(s->header, p->name), p, &format);
        int asked = scheme == ALL_Q8_0 ? (int)FORMAT_Q8_0 : (int)FORMAT_Q4_0;
        if ((k > 0 && format != matrix.format) || (scheme < MIXED && format != asked)) {
            fail("%s: damaged: %s has blocks of the format %s, unlike what config.json or another part of the matrix says", s->path,
                 p->name, format_names[format]);
        }
        size_t packed = packed_bytes(format, p->cols);
        if (k == 0) {
            size_t rows = 0;
            for (int i = 0; i < count; i++) {
                rows += (size_t)parts[i].rows;
            }
            matrix.format = format;
            matrix.rows = to = (unsigned char *)own(m, rows * packed, 1);
        }
        for (int row = 0; row < p->rows; row++, to += packed) {
            pack_row(to, format, from, p->cols);
            from += encoded_bytes(format, (size_t)p->cols);
        }
    }
    return matrix;
}

// Reads tensor i, which is in blocks and of which `parts` are the parts. Returns how many they are.
int load_blocks(Model *m, int i, const WeightFiles *files, const Part *parts, int limit) {
    const Tensor *t = &m->tensors[i];
    m->purpose = FOR_WEIGHTS;
    Blocks *b = (Blocks *)own(m, 1, sizeof(Blocks));
    b->count = t->of_experts ? m->config.experts : 1;
    b->matrix = (BlockMatrix *)own(m, b->count, sizeof(BlockMatrix));
    int at = 0;
    for (int e = 0; e < b->count; e++) {
        int hidden = !strcmp(t->kind, "w_in") ? m->experts.hidden[e] : t->shape[1], first = at, rows = 0;
        while (at < limit && parts[at].tensor == i && rows < hidden) {
            rows += parts[at++].rows;
        }
        b->matrix[e] = load_matrix(m, files, parts + first, at - first);
    }
    *weights_of(m, i) = as_weights(b);
    return at;
}

#endif
