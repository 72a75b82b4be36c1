// --quantize: writes a model with few bits.
// Gives: quantize_model. Needs: dev/open_model.h; Run of dev/run.h.
//
// --quantize q8_0 and q4_0 give all feed-forward matrices 8 or 4 bits. With mixed the experts that a calibration text chooses
// rarely get 4 bits and the others 8: --few says which share of each layer's experts. What a rare expert computes worse, few
// tokens notice. mixed-often does the contrary, for comparison. Shared experts and dense layers, which every token passes, have 8
// bits in both. The calibration text is --eval-tokens of the training tokens in --data, so that the validation tokens, by which
// the result is judged, have no part in the choice.
#pragma once
#include "open_model.h"

// ---- which experts have 4 bits

// load (L,E): how often each expert is chosen in so many windows.
void count_loads(Run *run, long windows, double *load) {
    const Config *c = &run->config;
    for (long i = 0; i < windows; i++) {
        window_loss(run, i, windows);
        for (int l = 0; l < c->layers; l++) {
            const Route *r = is_moe(c, l) ? run->backend->route(run->model, l) : NULL;
            for (int choice = 0; r && choice < r->N * r->K; choice++) {
                if (r->expert[choice] >= 0) {
                    load[(size_t)l * c->experts + r->expert[choice]] += 1;
                }
            }
        }
    }
}

// few (L,E) = 1 where an expert has 4 bits: `share` of each layer's experts, those with the lowest loads, or the highest.
// Returns their share of all choices.
double cut_experts(const Config *c, const double *load, int often, double share, unsigned char *few) {
    int E = c->experts, count = (int)(share * E + 0.5);
    double cut = 0, all = 0;
    Ranked *list = (Ranked *)allocate(E, sizeof(Ranked));
    for (int l = 0; l < c->layers; l++) {
        for (int e = 0; e < E; e++) {
            double of_expert = load[(size_t)l * E + e];
            list[e].score = often ? of_expert : -of_expert;
            list[e].index = e;
            all += of_expert;
        }
        qsort(list, (size_t)E, sizeof(Ranked), compare_ranked);
        for (int i = 0; i < count && is_moe(c, l); i++) {
            few[(size_t)l * E + list[i].index] = 1;
            cut += load[(size_t)l * E + list[i].index];
        }
    }
    free(list);
    return cut / fmax(all, 1);
}

// Reads the calibration text, and says what comes of it. few (L,E) is written.
void calibrate(Run *run, const char *dir, unsigned char *few) {
    const Config *c = &run->config;
    if (!moe_layers(c)) {
        usage_fail("--quantize %s gives rarely chosen experts fewer bits, and %s has no experts; give q8_0 or q4_0",
                   scheme_names[c->quantize], dir);
    }
    double *load = (double *)allocate((size_t)c->layers * c->experts, sizeof(double));
    load_tokenizer(run, dir);
    compare_tokenizers(run, dir);
    compare_tokenizers(run, c->data);
    open_text(run, "train");
    long windows = evaluation_windows(run, 0);
    count_loads(run, windows, load);
    double choices = cut_experts(c, load, c->quantize == MIXED_OFTEN, c->few, few);
    printf("%.0f training tokens of %s: %d of %d experts of each layer have 4 bits, those that are chosen %s; theirs are %.1f%% of the "
           "choices\n",
           (double)windows * c->seq, c->data, (int)(c->few * c->experts + 0.5), c->experts,
           c->quantize == MIXED_OFTEN ? "most often" : "most rarely", 100 * choices);
    free(load);
}

// ---- --quantize

// What is written: the parts of the file, each with its format.
typedef struct Plan {
    Part *parts;
    int *format;        // of each part; FORMAT_F32: numbers as they are, of type real
    int count;
    double numbers[2];  // in blocks, and as they are
    double bytes[2];
} Plan;

size_t planned_bytes(const Plan *plan, int i) {
    size_t count = part_size(&plan->parts[i]);
    return plan->format[i] == FORMAT_F32 ? count * sizeof(real) : encoded_bytes(plan->format[i], count);
}

// few: see calibrate(). Ends the program where a row is no multiple of 32 numbers.
Plan make_plan(const Run *run, const char *dir, const unsigned char *few) {
    const Config *c = &run->config;
    const Model *m = run->model;
    Plan plan;
    memset(&plan, 0, sizeof(plan));
    plan.parts = model_parts(m, &plan.count);
    plan.format = (int *)allocate((size_t)plan.count, sizeof(int));
    int before = -1, e = 0, rows = 0;
    for (int i = 0; i < plan.count; i++) {
        const Part *p = &plan.parts[i];
        const Tensor *t = &m->tensors[p->tensor];
        e = p->tensor == before ? e : 0;
        rows = p->tensor == before ? rows : 0;
        before = p->tensor;
        if (is_in_blocks(c, t)) {
            plan.format[i] = c->blocks == ALL_Q4_0 ? FORMAT_Q4_0 : FORMAT_Q8_0;
            if (t->of_experts && few[(size_t)t->layer * c->experts + e]) {
                plan.format[i] = FORMAT_Q4_0;
            }
            if (!fits_blocks(plan.format[i], p->cols)) {
                fail("%s: a row of %s has %d numbers, which are no blocks of %d: such a model cannot have few bits", dir, p->name,
                     p->cols, BLOCK);
            }
            rows += p->rows;
            int whole = !strcmp(t->kind, "w_in") ? m->experts.hidden[e] : t->shape[1]; // rows of an expert's matrix
            e += t->of_experts && rows == whole;
            rows = rows == whole ? 0 : rows;
        }
        int as_is = plan.format[i] == FORMAT_F32;
        plan.numbers[as_is] += (double)part_size(p);
        plan.bytes[as_is] += (double)planned_bytes(&plan, i);
    }
    return plan;
}

// The header of the file of weights, to be freed; see data/safetensors.h.
char *planned_header(const Plan *plan, size_t *size) {
    char *header = NULL;
    size_t at = 0;
    FILE *text = open_memory(&header, size);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < plan->count; i++) {
        const Part *p = &plan->parts[i];
        size_t end = at + planned_bytes(plan, i);
        const char *type = sizeof(real) == 8 ? "F64" : "F32";
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", p->name, plan->format[i] == FORMAT_F32 ? type : "U8");
        if (p->rows) {
            fprintf(text, "%d,", p->rows);
        }
        fprintf(text, "%zu],\"data_offsets\":[%zu,%zu]}",
                plan->format[i] == FORMAT_F32 ? (size_t)p->cols : encoded_bytes(plan->format[i], (size_t)p->cols), at, end);
        at = end;
    }
    fprintf(text, "}");
    flush_memory(text);
    while (*size % 8) { // the numbers begin at a multiple of 8 bytes
        fputc(' ', text);
        flush_memory(text);
    }
    close_memory(text, &header);
    return header;
}

// A part of a tensor in its format, to be freed; `from` has all of the tensor's numbers.
unsigned char *encode_part(const Plan *plan, int i, const char *dir, const real *from) {
    const Part *p = &plan->parts[i];
    unsigned char *bytes = (unsigned char *)allocate(planned_bytes(plan, i), 1);
    if (plan->format[i] == FORMAT_F32) {
        memcpy(bytes, from + p->offset, planned_bytes(plan, i));
        return bytes;
    }
    size_t row = encoded_bytes(plan->format[i], (size_t)p->cols);
    for (int r = 0; r < p->rows; r++) {
        if (!encode_row(plan->format[i], bytes + (size_t)r * row, from + p->offset + (size_t)r * (size_t)p->cols, p->cols)) {
            fail("%s: row %d of %s has a number that is not finite, or too large for blocks (8e6)", dir, r, p->name);
        }
    }
    return bytes;
}

// Writes the file of weights into the folder `to`, and its checksums to sums.
void write_planned(Run *run, const Plan *plan, const char *dir, const char *to, FILE *sums) {
    const char *const name = "model.safetensors";
    Model *m = run->model;
    size_t size = 0, bytes = 8;
    char *header = planned_header(plan, &size);
    uint64_t length = size;
    for (int i = 0; i < plan->count; i++) {
        bytes += planned_bytes(plan, i);
    }
    begin_checksums(sums, name, bytes + size, header, size);
    FILE *file = open_for_writing(to, name);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, size, file);
    real *tensor = allocate_tensor(m);
    for (int i = 0, p = 0; i < m->tensor_count; i++) {
        run->backend->read(m, WEIGHTS, i, tensor);
        for (; p < plan->count && plan->parts[p].tensor == i; p++) {
            unsigned char *encoded = encode_part(plan, p, dir, tensor);
            fwrite(encoded, 1, planned_bytes(plan, p), file);
            write_tensor_checksum(sums, p == 0, "", plan->parts[p].name, encoded, planned_bytes(plan, p));
            free(encoded);
        }
    }
    end_checksums(sums);
    close_written(file, to, name);
    free(tensor);
    free(header);
}

// Writes the new directory `to`.
void write_quantized(Run *run, const Plan *plan, const char *dir, const char *to) {
    NewModel n;
    begin_new_model(&n, to);
    write_planned(run, plan, dir, unfinished_path, n.sums);
    end_new_model(&n, run, NULL);
}

// --quantize: reads the model in dir and writes it with few bits.
void quantize_model(Run *run, const Config *asked, const char *dir) {
    char to[4096];
    Config *c = &run->config;
    const char *source = asked->init[0] ? asked->init : run->out;
    int length = (int)strlen(source);
    while (length > 1 && source[length - 1] == '/') {
        length--;
    }
    if (c->quantized[0]) {
        without_slashes(to, c->quantized);
    } else {
        snprintf(to, sizeof(to), "%.*s-%s", length, source, scheme_names[c->quantize]);
    }
    if (is_there(to)) {
        usage_fail("%s is there already: remove it, or name another folder by --quantized", to);
    }
    unsigned char *few = (unsigned char *)allocate((size_t)c->layers * c->experts, 1);
    load_model(run, dir, c->quantize >= MIXED ? c->seq : 1);
    if (c->quantize >= MIXED) {
        calibrate(run, dir, few);
        Config stored;
        config_from_directory(&stored, dir);
        c->eval_tokens = stored.eval_tokens; // those of the calibration are no property of the model: --evaluate reads as many as before
    }
    if (!run->tokenizer) {
        load_own_tokenizer(run, dir);
    }
    c->blocks = run->model->config.blocks = c->quantize;
    Plan plan = make_plan(run, dir, few);
    write_quantized(run, &plan, dir, to);
    char *name = quote_for_shell(to);
    printf("%s is %s with few bits: %.0f weights in %.2f MiB, %.2f bits each, instead of %.2f MiB; the other %.0f take %.2f MiB as "
           "before. What next:\n"
           "  ./%s --out %s --evaluate\n  ./%s --out %s --prompt \"Once upon a time\"\n",
           to, dir, plan.numbers[0], plan.bytes[0] / 1048576, 8 * plan.bytes[0] / plan.numbers[0],
           plan.numbers[0] * sizeof(real) / 1048576, plan.numbers[1], plan.bytes[1] / 1048576, program_name, name, program_name, name);
    free(name);
    free(plan.parts);
    free(plan.format);
    free(few);
    close_model(run);
}
