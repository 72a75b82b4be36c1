// The checkpoints of a run: written, found again, read.
// Gives: write_checkpoint, save_checkpoint, load_weights, cut_log; NewModel, begin_new_model, end_new_model.
// Needs: dev/directory.h; Run of dev/run.h, which includes it.
//
// A new checkpoint is written under another name, flushed to the disk and renamed, and only then does the link `latest`
// move: whenever the machine stops, the last checkpoint is complete. One that is removed gets another name first.
#pragma once
#include "directory.h"
#include "ranks/lost.h"
#include "unfinished.h"

void sync_directory(const char *path) {
    int dir = open(path, O_RDONLY);
    if (dir >= 0) {
        sync_file(dir);
        close(dir);
    }
}

// tokenizer_config.json: which tokens are special. A tokenizer without a token for what is unknown, or to begin with,
// has the end's.
void write_token_names(const Run *run, const char *dir, int bos) {
    const Tokenizer *t = run->tokenizer;
    const int unk = t->unk >= 0 ? t->unk : t->eot, ids[] = {bos, t->eot, unk, t->eot};
    const char *const names[] = {"bos_token", "eos_token", "unk_token", "pad_token"};
    FILE *f = open_for_writing(dir, "tokenizer_config.json");
    fprintf(f, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n");
    for (int i = 0; i < COUNT(names); i++) {
        fprintf(f, "  \"%s\": ", names[i]);
        json_write_string(f, t->raw[ids[i]], strlen(t->raw[ids[i]]));
        fprintf(f, ",\n");
    }
    fprintf(f, "  \"clean_up_tokenization_spaces\": false,\n  \"model_input_names\": [\"input_ids\", \"attention_mask\"],\n"
               "  \"model_max_length\": %d\n}\n", run->config.seq);
    close_written(f, dir, "tokenizer_config.json");
}

// The small files of a model: what transformers wants to know.
void write_model_files(const Run *run, const char *dir) {
    const Tokenizer *t = run->tokenizer;
    char text[512];
    int bos = t->bos >= 0 ? t->bos : t->eot;
    write_config(dir, &run->config, bos, t->eot);
    write_text(dir, "tokenizer.json", t->json, t->json_size);
    write_token_names(run, dir, bos);
    int n = snprintf(text, sizeof(text), "{\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": %d\n}\n", bos,
                     t->eot, t->eot);
    write_text(dir, "generation_config.json", text, (size_t)n);
}

// The small files of a checkpoint: those, and what is needed to go on.
void write_small_files(const Run *run, const char *dir, FILE *sums) {
    char text[512], taught[64];
    write_model_files(run, dir);
    teacher_in_state(taught);
    int n = snprintf(text, sizeof(text), "{\"step\":%d,\"data_fingerprint\":%.0f,\"val_fingerprint\":%.0f%s}\n", run->step,
                 run->train->fingerprint, run->val->fingerprint, taught);
    write_text(dir, "trainer_state.json", text, (size_t)n);
    write_router_state(run, dir);
    write_small_checksums(sums, dir);
}

// Points `latest` to the checkpoint of this name: a link, or a text file where the file system has no links.
void point_latest(const Run *run, const char *name) {
    char latest[4200], next[4200];
    snprintf(latest, sizeof(latest), "%s/latest", run->out);
    snprintf(next, sizeof(next), "%s/latest.new", run->out);
    unlink(next);
    if (!run->links) {
        char line[80];
        int n = snprintf(line, sizeof(line), "%s\n", name);
        write_text(run->out, "latest.new", line, (size_t)n);
    } else if (symlink(name, next) != 0) {
        fail("%s: cannot link to %s: %s", next, name, strerror(errno));
    }
    if (rename(next, latest) != 0) {
        int error = errno;
        unlink(next);
        fail("%s: cannot point it to %s: %s", latest, name, strerror(error));
    }
    sync_directory(run->out);
}

// Renames a checkpoint before it is removed, so that a half-removed folder never has a checkpoint's name. Returns 0 if it
// could not be renamed.
int set_aside(const Run *run, const char *path, char aside[4200]) {
    snprintf(aside, 4200, "%s/removed-checkpoint", run->out);
    remove_tree(aside); // of a run that was killed
    return rename(path, aside) == 0;
}

// Gives the finished folder `dir` its name and points `latest` to it. If a folder has that name already, it is removed
// afterwards.
void publish_checkpoint(const Run *run, const char *dir, const char *name) {
    char final[4200], aside[4200];
    sync_directory(dir);
    snprintf(final, sizeof(final), "%s/%s", run->out, name);
    int replaced = set_aside(run, final, aside);
    if (rename(dir, final) != 0) {
        int error = errno;
        if (replaced) {
            rename(aside, final);
        }
        fail("%s: cannot rename to %s: %s", dir, final, strerror(error));
    }
    unfinished_path[0] = 0;
    sync_directory(run->out);
    point_latest(run, name);
    if (replaced) {
        clear_away(aside);
    }
}

// Leaves the newest --keep checkpoints.
void remove_old_checkpoints(const Run *run) {
    int count;
    char path[4200], aside[4200];
    for (long old; (old = smallest_checkpoint(run->out, &count)) >= 0;) {
        if (count <= run->config.keep || old == run->step) {
            return;
        }
        snprintf(path, sizeof(path), "%s/checkpoint-%ld", run->out, old);
        if (!set_aside(run, path, aside)) {
            remark("%s: cannot be removed: %s", path, strerror(errno));
            return;
        }
        sync_directory(run->out);
        clear_away(aside);
        ranks_tick();
    }
}

// Ends the program where one of so many weights of a tensor is not finite.
void refuse_to_save(const Run *run, int what, int tensor, const real *numbers, size_t size) {
    const Tensor *t = &run->model->tensors[tensor];
    size_t i = what == WEIGHTS ? first_not_finite(numbers, size) : size;
    if (i < size) {
        fail("step %d: a weight of %s is %g; it is not saved, and the last checkpoint in %s is as it was", run->step,
             t->name, shown((double)numbers[i]), run->out);
    }
}

// Is this part of a tensor read and written for itself? On the CPU the experts' parts are, so that not all experts of a tensor are
// in memory at a time (--offload).
int goes_alone(const Run *run, const Part *p) {
    return run->backend == &cpu_backend && run->model->tensors[p->tensor].of_experts && !p->experts;
}

// Gives rank 0 the numbers of a part that goes alone, or those of the whole tensor that begins with this part. Returns how many.
size_t read_for_file(const Run *run, int what, const Part *p, real *to) {
    if (goes_alone(run, p)) {
        ranks_read_expert(run->model, what, p->tensor, p->offset, part_size(p), to);
        return part_size(p);
    }
    run->backend->read(run->model, what, p->tensor, to);
    return run->model->tensors[p->tensor].whole;
}

// One file of a checkpoint: all tensors of each of the arrays that `what` lists, under the prefix of that array. The
// first of several processes writes what all have, and never has more than one whole tensor besides its own part. The
// checksums of the tensors go to `sums`.
void write_tensors(const Run *run, const char *name, const int *what, const char *const *prefix, int arrays, FILE *sums) {
    Model *m = run->model;
    int count;
    Part *parts = model_parts(m, &count);
    const char *dir = unfinished_path;
    FILE *file = ranks.rank ? NULL : start_safetensors(dir, name, parts, count, prefix, arrays, sums);
    real *numbers = allocate_tensor(m);
    for (int a = 0; a < arrays; a++) {
        for (const Part *p = parts, *next; p < parts + count; p = next) {
            next = p + 1;
            while (next < parts + count && next->tensor == p->tensor && !goes_alone(run, p)) {
                next++;
            }
            size_t size = read_for_file(run, what[a], p, numbers); // all processes; the first one writes
            if (!file) {
                continue;
            }
            refuse_to_save(run, what[a], p->tensor, numbers, size);
            write_numbers(file, dir, name, numbers, size);
            for (const Part *q = p; q < next; q++) {
                write_tensor_checksum(sums, a == 0 && q == parts, prefix[a], q->name, numbers + (q->offset - p->offset),
                                      part_size(q) * sizeof(real));
            }
        }
    }
    if (file) {
        end_checksums(sums);
        close_written(file, dir, name);
    }
    free(numbers);
    free(parts);
}

void write_adapter(const Run *run, FILE *sums); // dev/adapter.h

// Writes a checkpoint into the folder unfinished_path, which has no name of a checkpoint yet.
void write_checkpoint(Run *run) {
    int first = ranks.rank == 0, weights[] = {WEIGHTS}, moments[] = {MOMENT1, MOMENT2};
    const char *const plain[] = {""}, *const moment_names[] = {"exp_avg.", "exp_avg_sq."};
    char *list = NULL;
    size_t size = 0;
    refuse_changed_data();                       // nothing that was learned from other tokens is saved
    FILE *sums = open_memory(&list, &size); // checksums.json
    if (first) {
        snprintf(unfinished_path, sizeof(unfinished_path), "%s/unfinished-checkpoint", run->out);
        if (remove_tree(unfinished_path) != 0) { // of a run that was killed
            fail("%s: cannot remove: %s", unfinished_path, strerror(errno));
        }
        if (mkdir(unfinished_path, 0777) != 0) {
            fail("%s: cannot create: %s", unfinished_path, strerror(errno));
        }
    }
    fprintf(sums, "{");
    if (run->config.lora) {
        write_adapter(run, sums);
    } else {
        write_tensors(run, "model.safetensors", weights, plain, 1, sums);
        write_tensors(run, "optimizer.safetensors", moments, moment_names, 2, sums);
    }
    write_lost(run, sums); // --compress
    if (first) {
        write_small_files(run, unfinished_path, sums);
    }
    fprintf(sums, "}\n");
    close_memory(sums, &list);
    if (first) {
        write_text(unfinished_path, "checksums.json", list, size);
    }
    free(list);
}

void save_checkpoint(Run *run) {
    char name[64];
    write_checkpoint(run);
    if (ranks.rank == 0) {
        snprintf(name, sizeof(name), "checkpoint-%d", run->step);
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

int is_adapter(const char *dir); // dev/adapter.h
void load_adapter(Run *run, const char *dir, int moments);

// Reads the weights in dir, and with `moments` those of the optimizer. Each of several processes reads all, and keeps
// its own.
void load_weights(Run *run, const char *dir, int moments) {
    Model *m = run->model;
    const char *const prefix[] = {"", "", "exp_avg.", "exp_avg_sq."};
    int count;
    if (is_adapter(dir)) {
        load_adapter(run, dir, moments);
        return;
    }
    Part *parts = parts_to_read(m, &count);
    real *tensor = allocate_tensor(m);
    for (int what = WEIGHTS; what <= (moments ? MOMENT2 : WEIGHTS); what++) {
        if (what == GRADS) {
            continue;
        }
        WeightFiles files;
        open_weights(&files, dir, what == WEIGHTS ? "model.safetensors" : "optimizer.safetensors", 1);
        const Part *p = parts;
        for (int i = 0; i < base_tensors(m); i++) {
            int alone = goes_alone(run, p);
            for (; p < parts + count && p->tensor == i; p++) {
                real *to = tensor + (alone ? 0 : p->offset);
                const char *file = read_part(&files, prefix[what], p, to);
                check_read(file, prefix[what], p, to);

                // The run may have had float32 moments until now.
                size_t rounded = what != WEIGHTS && run->config.moments == MOMENTS_BF16 ? part_size(p) : 0;
                for (size_t j = 0; j < rounded; j++) {
                    to[j] = nearest_bf16((float)to[j]);
                }
                if (alone) {
                    ranks_write_part(m, what, i, p->offset, part_size(p), to);
                }
            }
            if (alone) {
                continue;
            }
            if (what == WEIGHTS && !strcmp(m->tensors[i].kind, "table")) {
                check_table(run, dir, tensor);
            }
            if (what == WEIGHTS) {
                fold_factors(&run->config, &m->tensors[i], tensor); // Granite's
            }
            run->backend->write(m, what, i, tensor);
        }
        if (what != MOMENT2) {
            check_tensors(&files, &run->config, parts, count, prefix + what, what == WEIGHTS ? 1 : 2);
        }
        close_weights(&files);
    }
    free(tensor);
    free(parts);
}

// Cuts the log back to what had happened by `step`.
void cut_log(const char *path, int step) {
    if (!is_there(path)) {
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

// ---- a new model directory: --merge, --quantize

typedef struct NewModel {
    char dir[4096];  // its name, which it gets when all of it is written
    FILE *sums;      // its checksums
    char *list;
    size_t size;
} NewModel;

// Begins the directory dir, which is not there yet, in a folder beside it: unfinished_path. The weights follow.
void begin_new_model(NewModel *n, const char *dir) {
    memset(n, 0, sizeof(*n));
    without_slashes(n->dir, dir);
    make_directories(n->dir); // and those above it; this one is removed again, so that it appears as a whole
    if (rmdir(n->dir) != 0) {
        fail("%s: cannot be written anew: %s", dir, strerror(errno));
    }
    begin_unfinished(n->dir);
    n->sums = open_memory(&n->list, &n->size);
    fprintf(n->sums, "{");
}

// What other programs know of the model in `from` besides its weights stays as it was: how a chat is written, which tokens end a text.
void copy_model_files(const char *from) {
    static const char *const names[] = {"tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                                        "chat_template.jinja"};
    for (int i = 0; i < COUNT(names); i++) {
        char path[4200];
        size_t size;
        snprintf(path, sizeof(path), "%s/%s", from, names[i]);
        if (is_there(path)) {
            char *text = read_file(path, &size);
            write_text(unfinished_path, names[i], text, size);
            free(text);
        }
    }
}

// Writes what stands beside the weights, and gives the directory its name. from: see above, or NULL.
void end_new_model(NewModel *n, const Run *run, const char *from) {
    write_model_files(run, unfinished_path);
    if (from) {
        copy_model_files(from);
    }
    write_small_checksums(n->sums, unfinished_path);
    fprintf(n->sums, "}\n");
    close_memory(n->sums, &n->list);
    write_text(unfinished_path, "checksums.json", n->list, n->size);
    free(n->list);
    sync_directory(unfinished_path);
    if (rename(unfinished_path, n->dir) != 0) {
        fail("%s: cannot rename to %s: %s", unfinished_path, n->dir, strerror(errno));
    }
    end_unfinished();
}

#include "adapter.h" // --lora: checkpoints without the base, --merge
