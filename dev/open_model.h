// Opens a model for what is no training: --prompt, --merge, --export, --quantize, --evaluate.
// Gives: refuse_window, find_model, load_model, load_own_tokenizer, open_text, close_model. Needs: dev/quantized.h; Run of dev/run.h,
// and the files that it includes.
#pragma once
#include "quantized.h"

// Ends the program where the model in dir has a sliding window of attention that is shorter than the sequences. 0: it has none.
void refuse_window(const Config *c, int window, const char *dir) {
    if (window && window < c->seq) {
        fail("%s/config.json: sliding_window is %d: attention has no window here; give --seq %d or less, where it "
             "makes no difference (now: --seq %d)",
             dir, window, window, c->seq);
    }
}

// Finds the folder of the model that --init or --out names, a run, a checkpoint or a Hugging Face directory, and takes what it says
// into run->config. purpose: what the model is wanted for, for messages. Returns the length of attention's sliding window, 0: none.
int find_model(Run *run, const Config *asked, const char *purpose, char dir[4096]) {
    Config *c = &run->config;
    snprintf(dir, 4096, "%s", asked->init[0] ? model_directory(asked->init) : run->out);
    if (!has_file(dir, "config.json") && !find_checkpoint(run->out, 0, dir)) {
        fail("%s: no checkpoint there to %s; train first, or name a run with --out", run->out, purpose);
    }
    check_small_files(dir);
    int window = config_from_directory(c, dir);
    const Config before = *c;
    join_options(c, asked, 1 << MODEL | 1 << ORDER | 1 << TRAIN, 1 << MODEL, dir);
    refuse_window(c, window, dir);
    refuse_idle_options(c, &before);
    c->batch = 1; // the saved one is that of all processes
    config_check(c);
    c->data = !c->data[0] ? "data/stories" : c->data; // a model that was not trained here
    return window;
}

// Reads a model in blocks. Returns the bytes of the blocks in memory.
size_t load_quantized(Run *run, const char *dir) {
    Model *m = run->model;
    const char *const prefix[] = {""};
    int count;
    Part *parts = parts_to_read(m, &count);
    real *tensor = allocate_tensor(m);
    size_t before = m->bytes[FOR_WEIGHTS];
    WeightFiles files;
    open_weights(&files, dir, "model.safetensors", 1);
    const Part *p = parts;
    for (int i = 0; i < m->tensor_count; i++) {
        if (is_in_blocks(&m->config, &m->tensors[i])) {
            p += load_blocks(m, i, &files, p, (int)(parts + count - p));
            continue;
        }
        for (; p < parts + count && p->tensor == i; p++) {
            check_read(read_part(&files, "", p, tensor + p->offset), "", p, tensor + p->offset);
        }
        run->backend->write(m, WEIGHTS, i, tensor);
    }
    check_tensors(&files, &run->config, parts, count, prefix, 1);
    close_weights(&files);
    free(tensor);
    free(parts);
    return m->bytes[FOR_WEIGHTS] - before;
}

// The model in dir, for so many tokens at once. Returns the bytes of its blocks, 0 where it has none.
size_t load_model(Run *run, const char *dir, int tokens) {
    const Config *c = &run->config;
    if (c->blocks && run->backend != &cpu_backend) {
        fail("%s: its weights have few bits (%s), which this program cannot multiply on a GPU; ./train_moe does, on the CPU", dir,
             scheme_names[c->blocks]);
    }
#ifdef PLAIN
    if (c->blocks) {
        fail("%s: its weights have few bits (%s), and a program of plain loops (PLAIN=1) cannot multiply them; make train_moe "
             "builds one that can",
             dir, scheme_names[c->blocks]);
    }
#endif
    run->model = run->backend->create(c, tokens, 0, NULL);
    if (c->blocks) {
        return load_quantized(run, dir);
    }
    load_weights(run, dir, 0);
    return 0;
}

// The tokenizer of the model in dir, or that of --tokenizer.
void load_own_tokenizer(Run *run, const char *dir) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
    run->tokenizer = tokenizer_load(run->config.tokenizer[0] ? run->config.tokenizer : path);
}

// Memory for the windows of one of the run's texts, "train" or "val".
void open_text(Run *run, const char *kind) {
    const Config *c = &run->config;
    run->val = data_open(c->data, kind, c->seq, c->vocab, (uint64_t)c->seed);
    run->inputs = (int *)allocate((size_t)c->seq, sizeof(int));
    run->targets = (int *)allocate((size_t)c->seq, sizeof(int));
}

void close_model(Run *run) {
    run->backend->release(run->model);
    tokenizer_free(run->tokenizer);
    if (run->val) {
        data_close(run->val);
    }
    free(run->inputs);
    free(run->targets);
}
