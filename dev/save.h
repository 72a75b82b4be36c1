// The checkpoints of a run: written, found again, read.
// Gives: save_checkpoint, load_weights, smallest_checkpoint, cut_log. Needs: Run of dev/run.h, which includes it.
//
// A new checkpoint is written under another name, flushed to the disk and renamed, and only then does the link `latest`
// move: whenever the machine stops, the last checkpoint is complete.
#pragma once

// The smallest step of the checkpoint-STEP folders in out, -1 where there is none; *count says how many there are.
long smallest_checkpoint(const char *out, int *count) {
    long step, smallest = -1;
    char rest;
    DIR *dir = opendir(out);
    *count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (sscanf(entry->d_name, "checkpoint-%ld%c", &step, &rest) != 1) {
            continue;
        }
        (*count)++;
        if (smallest < 0 || step < smallest) {
            smallest = step;
        }
    }
    if (dir) {
        closedir(dir);
    }
    return smallest;
}

void sync_directory(const char *path) {
    int dir = open(path, O_RDONLY);
    if (dir >= 0) {
        sync_file(dir);
        close(dir);
    }
}

// The small files of a checkpoint: what transformers wants to know, and what is needed to go on.
void write_small_files(const Run *run, const char *dir) {
    const Tokenizer *t = run->tokenizer;
    const char *const eot = "<|endoftext|>";
    char text[512];
    write_config(dir, &run->config, t->eot);
    write_text(dir, "tokenizer.json", t->json, t->json_size);
    int n = snprintf(
        text, sizeof(text),
        "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"bos_token\": \"%s\",\n  \"eos_token\": \"%s\",\n"
        "  \"unk_token\": \"%s\",\n  \"clean_up_tokenization_spaces\": false,\n"
        "  \"model_input_names\": [\"input_ids\", \"attention_mask\"],\n  \"model_max_length\": %d\n}\n",
        eot, eot, eot, run->config.seq);
    write_text(dir, "tokenizer_config.json", text, (size_t)n);
    n = snprintf(text, sizeof(text), "{\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": %d\n}\n",
                 t->eot, t->eot, t->eot);
    write_text(dir, "generation_config.json", text, (size_t)n);
    n = snprintf(text, sizeof(text), "{\"step\":%d,\"data_fingerprint\":%.0f}\n", run->step,
                 data_fingerprint(run->train));
    write_text(dir, "trainer_state.json", text, (size_t)n);
}

// Gives the finished folder `dir` its name and turns the link `latest` to it.
void publish_checkpoint(const Run *run, const char *dir, const char *name) {
    char final[4200], link[4200];
    sync_directory(dir);
    snprintf(final, sizeof(final), "%s/%s", run->out, name);
    remove_tree(final);
    if (rename(dir, final) != 0) {
        fail("%s: cannot rename to %s: %s", dir, final, strerror(errno));
    }
    unfinished_path[0] = 0;
    sync_directory(run->out);
    snprintf(final, sizeof(final), "%s/latest", run->out);
    snprintf(link, sizeof(link), "%s/latest.new", run->out);
    unlink(link);
    if (symlink(name, link) != 0 || rename(link, final) != 0) {
        fail("%s: cannot link to %s: %s", final, name, strerror(errno));
    }
    sync_directory(run->out);
}

// Leaves the newest --keep checkpoints.
void remove_old_checkpoints(const Run *run) {
    int count;
    char path[4200];
    for (long old; (old = smallest_checkpoint(run->out, &count)) >= 0;) {
        if (count <= run->config.keep || old == run->step) {
            return;
        }
        snprintf(path, sizeof(path), "%s/checkpoint-%ld", run->out, old);
        remove_tree(path);
        ranks_tick();
        if (access(path, F_OK) == 0) { // it cannot be removed
            return;
        }
    }
}

// One file of a checkpoint: all tensors of each of the arrays that `what` lists, under the prefix of that array. The
// first of several processes writes what all have, and never has more than one whole tensor besides its own part.
void write_tensors(const Run *run, const char *name, const int *what, const char *const *prefix, int arrays) {
    Model *m = run->model;
    int count;
    Part *parts = model_parts(m, &count);
    const char *dir = unfinished_path;
    FILE *file = ranks.rank ? NULL : start_safetensors(dir, name, parts, count, prefix, arrays);
    real *tensor = allocate_tensor(m);
    for (int i = 0; i < arrays * m->tensor_count; i++) {
        int array = what[i / m->tensor_count];
        size_t size = m->tensors[i % m->tensor_count].whole;
        run->backend->read(m, array, i % m->tensor_count, tensor);
        for (size_t j = 0; file && array == WEIGHTS && j < size; j++) {
            if (!isfinite(tensor[j])) {
                fail("step %d: a weight of %s is %g; it is not saved, and the last checkpoint in %s is as it was", run->step,
                     m->tensors[i % m->tensor_count].name, shown((double)tensor[j]), run->out);
            }
        }
        if (file) {
            write_numbers(file, dir, name, tensor, size);
        }
    }
    if (file) {
        close_written(file, dir, name);
    }
    free(tensor);
    free(parts);
}

void save_checkpoint(Run *run) {
    int first = ranks.rank == 0, weights[] = {WEIGHTS}, moments[] = {MOMENT1, MOMENT2};
    const char *const plain[] = {""}, *const moment_names[] = {"exp_avg.", "exp_avg_sq."};
    char name[64];
    snprintf(name, sizeof(name), "checkpoint-%d", run->step);
    if (first) {
        snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-checkpoint", run->out);
        remove_tree(unfinished_path); // of a run that was killed
        if (mkdir(unfinished_path, 0777) != 0) {
            fail("%s: cannot create: %s", unfinished_path, strerror(errno));
        }
    }
    write_tensors(run, "model.safetensors", weights, plain, 1);
    write_tensors(run, "optimizer.safetensors", moments, moment_names, 2);
    if (first) {
        write_small_files(run, unfinished_path);
        publish_checkpoint(run, unfinished_path, name);
        remove_old_checkpoints(run);
    }
    run->saved = run->step;
    ranks_meet();
}

// The table of hash layers has the numbers of experts.
void check_table(const Run *run, const char *dir, const real *table) {
    const Config *c = &run->config;
    for (int v = 0; v < c->vocab; v++) {
        if (!(table[v] >= 0 && table[v] < c->experts)) {
            fail("%s: damaged: the table sends word %d to expert %g of %d", dir, v, (double)table[v], c->experts);
        }
    }
}

// Reads the weights in dir, and with `moments` those of AdamW. Each of several processes reads all, and keeps its own.
void load_weights(Run *run, const char *dir, int moments) {
    Model *m = run->model;
    const char *const prefix[] = {"", "", "exp_avg.", "exp_avg_sq."};
    int count;
    Part *parts = model_parts(m, &count);
    real *tensor = allocate_tensor(m);
    for (int what = WEIGHTS; what <= (moments ? MOMENT2 : WEIGHTS); what++) {
        if (what == GRADS) {
            continue;
        }
        WeightFiles files;
        open_weights(&files, dir, what == WEIGHTS ? "model.safetensors" : "optimizer.safetensors");
        const Part *p = parts;
        for (int i = 0; i < m->tensor_count; i++) {
            for (; p < parts + count && p->tensor == i; p++) {
                read_part(&files, prefix[what], p, run->config.experts, tensor + p->offset);
                check_read(&files, prefix[what], p, tensor + p->offset);
            }

            // The run may have had float32 moments until now.
            size_t rounded = what != WEIGHTS && run->config.moments == MOMENTS_BF16 ? m->tensors[i].whole : 0;
            for (size_t j = 0; j < rounded; j++) {
                tensor[j] = nearest_bf16((float)tensor[j]);
            }
            if (what == WEIGHTS && !strcmp(m->tensors[i].kind, "table")) {
                check_table(run, dir, tensor);
            }
            run->backend->write(m, what, i, tensor);
        }
        close_weights(&files);
    }
    free(tensor);
    free(parts);
}

// Cuts the log back to what had happened by `step`.
void cut_log(const char *path, int step) {
    if (access(path, F_OK) != 0) {
        return;
    }
    size_t size;
    char *text = read_file(path, &size), *line = text;
    while (line < text + size) {
        char *end = (char *)memchr(line, '\n', (size_t)(text + size - line));
        if (!end) { // cut off in the middle of a line
            break;
        }
        *end = 0;
        const char *at = strstr(line, "\"step\":");
        if (at && strncmp(line, "{\"type\":\"run\"", 13) && atol(at + 7) > step) {
            break;
        }
        line = end + 1;
    }
    if (truncate(path, (off_t)(line - text)) != 0) {
        fail("%s: cannot shorten: %s", path, strerror(errno));
    }
    free(text);
}
