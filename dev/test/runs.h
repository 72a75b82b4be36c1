// Tiny runs of ./train_moe (or of the program that TRAIN_MOE names): their data, their command line, their log and their
// checkpoints. Gives: run_tiny, start_tiny, wait_for, logged, assert_log, ... Needs: dev/test/model.h, shell.h, tokens.h.

#pragma once
#include "dev/test/model.h"
#include "dev/test/shell.h"
#include "dev/test/tokens.h"

// Writes random tokens, some of them <|endoftext|>, to scratch_file(name), in the format of llm.c.
void put_tokens(const char *name, int count, int vocab, uint64_t seed) {
    int32_t header[256] = {TOKENS_MAGIC, 1, count};
    char *bytes = (char *)allocate(1024 + 2 * (size_t)count, 1);
    memcpy(bytes, header, 1024);
    for (int i = 0; i < count; i++) {
        uint64_t h = hash64(seed * 1000003 + (uint64_t)i);
        uint16_t token = (uint16_t)(h % 50 ? (h >> 8) % (h & 1 ? 20 : (uint64_t)vocab) : 0);
        memcpy(bytes + 1024 + 2 * (size_t)i, &token, 2);
    }
    put_file(name, bytes, 1024 + 2 * (size_t)count);
    free(bytes);
}

void make_data(void) { // scratch_file("data"), once in each scratch folder
    if (mkdir(scratch_file("data"), 0777) != 0)
        return;
    put_tokens("data/train_0.bin", 3000, 265, 1);
    put_tokens("data/train_1.bin", 777, 265, 2);
    put_tokens("data/val_0.bin", 30000, 265, 3);
    small_tokenizer("data/tokenizer.json", NULL, NULL);
}

// Every test that starts the program begins with this. The programs do not depend on the precision of the tests, so only the
// float build runs them.
void need_program(void) {
    const char *program = getenv("TRAIN_MOE");
    if (is_slow() || IS_DOUBLE)
        skip();
    if (access(program ? program : "./train_moe", X_OK) != 0)
        fail_msg("%s is not there; make train_moe, or set TRAIN_MOE", program ? program : "./train_moe");
    make_data();
    check_leaks(1);
    setenv("OMP_WAIT_POLICY", "passive", 1); // the machine may have other things to do
}

// The command line of a tiny run in the folder scratch_file(out), followed by more options. If these begin with --prompt, the sizes
// are left out, since they come from the checkpoint.
const char *command_line(const char *out, const char *more) {
    static char line[2048];
    const char *program = getenv("TRAIN_MOE"), *recipe = strstr(more, "--recipe ");
    char name[64] = "";
    if (!strncmp(more, "--prompt", 8)) {
        snprintf(line, sizeof(line), "%s --out %s --tokens 8 --threads 1 %s", program ? program : "./train_moe",
                 scratch_file(out), more);
        return line;
    }
    if (recipe)
        sscanf(recipe + 9, "%63s", name);
    // A warm-up as long as the run is refused, and so are experts and heads for a model that has none.
    const char *steps = strstr(more, "--steps "), *experts = strcmp(name, "dense") ? "--experts 4" : "";
    const char *heads = strcmp(name, "shazeer-lstm") ? "--heads 2" : "";
    int warmup = steps && atoi(steps + 8) <= 2 ? 0 : 2;
    snprintf(line, sizeof(line),
             "%s --data %s --out %s --layers 2 --dim 32 %s --ffn 32 %s --seq 32 --batch 2 --eval-tokens 64 "
             "--tokens 8 --threads 1 --log-every 1 --warmup %d --steps 12 --save-every 6 %s %s",
             program ? program : "./train_moe", scratch_file("data"), scratch_file(out), heads, experts, warmup, small_sizes(name), more);
    return line;
}

int run_tiny(const char *out, const char *more) {
    return shell(said, sizeof(said), "%s", command_line(out, more));
}

// Reads the JSON object of one line of a log, and moves *line to the next line.
Json *next_line(char **line, const char *end) {
    char *start = *line, *stop = (char *)memchr(start, '\n', (size_t)(end - start));
    if (!stop || strncmp(start, "{\"type\":\"", 9) || stop[-1] != '}')
        fail_msg("log.jsonl: not a whole line: %.*s", stop ? (int)(stop - start) : (int)(end - start), start);
    *line = stop + 1;
    return json_parse(start, (size_t)(stop - start), "log.jsonl");
}

// The last number called `name` in a run's log, in lines of this type and step; NaN if there is none. Every line has to be JSON.
double logged(const char *out, const char *type, int step, const char *name) {
    char file[300];
    size_t size;
    double found = NAN;
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    char *text = read_file(scratch_file(file), &size);
    for (char *line = text; line < text + size;) {
        Json *json = next_line(&line, text + size);
        const Json *at = json_get(json, "step"), *value = json_get(json, name);
        if (!strcmp(json->child->text, type) && (!at || at->number == step) && value)
            found = value->number;
        json_free(json);
    }
    free(text);
    return found;
}

void parse_log(void *arg) { // in a process of its own, since a line that is no JSON ends it
    size_t size;
    char *text = read_file((const char *)arg, &size), *line = text, *end;
    while ((end = (char *)memchr(line, '\n', (size_t)(text + size - line))) != NULL) {
        json_free(json_parse(line, (size_t)(end - line), "log.jsonl"));
        line = end + 1;
    }
    free(text);
}

// Checks that the log has, in order, one step line for each step from 1 to last, and one router line for each layer with experts.
void assert_log(const char *out, int last, int routers) {
    char file[300];
    size_t size;
    int step = 0, router = 0;
    char message[1024];
    snprintf(file, sizeof(file), "%s/log.jsonl", out);
    if (dies(parse_log, (void *)scratch_file(file), message, sizeof(message)) != 0)
        fail_msg("%s: %s", file, message);
    char *text = read_file(scratch_file(file), &size);
    for (char *line = text; line < text + size;) {
        Json *json = next_line(&line, text + size);
        const char *type = json->child->text;
        const Json *at = json_get(json, "step");
        if (!strcmp(type, "step")) {
            assert_true(router == step * routers);
            assert_int_equal((int)at->number, ++step);
        } else if (!strcmp(type, "router")) {
            double sum = 0;
            for (const Json *e = json_get(json, "load")->child; e; e = e->next)
                sum += e->number;
            assert_near(sum, 1, 1e-4);
            assert_int_equal((int)at->number, step);
            router++;
        } else if (strcmp(type, "run")) {
            assert_true(!strcmp(type, "eval") || !strcmp(type, "sample") || !strcmp(type, "attention"));
            assert_int_equal((int)at->number, step);
        }
        json_free(json);
    }
    assert_int_equal(step, last);
    free(text);
}

void assert_latest(const char *out, const char *name) {
    char link[256], path[300];
    snprintf(path, sizeof(path), "%s/latest", out);
    ssize_t n = readlink(scratch_file(path), link, sizeof(link) - 1);
    assert_true(n > 0);
    link[n] = 0;
    assert_string_equal(link, name);
}

// ---- runs that are not waited for, and what they leave

// Starts a command line and does not wait for it; what it says goes to scratch_file("said").
pid_t start_line(const char *line) {
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        int file = open(scratch_file("said"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dup2(file, 1);
        dup2(file, 2);
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    return child;
}

// The same for a tiny run.
pid_t start_tiny(const char *out, const char *more) {
    char line[2100];
    snprintf(line, sizeof(line), "exec %s", command_line(out, more));
    return start_line(line);
}

// Waits until the file contains this text, or the process has ended. Returns -1 if the process still runs, else its status as
// waitpid() gives it.
int wait_for(pid_t child, const char *path, const char *text) {
    int status;
    for (int found = 0; !found;) {
        if (waitpid(child, &status, WNOHANG) == child)
            return status;
        usleep(500);
        if (access(path, F_OK) == 0) {
            size_t size;
            char *now = read_file(path, &size);
            found = strstr(now, text) != NULL;
            free(now);
        }
    }
    return -1;
}

int exists(const char *name) {
    return access(scratch_file(name), F_OK) == 0;
}

void assert_same_weights(const char *a, const char *b) {
    const char *const files[] = {"model.safetensors", "optimizer.safetensors"};
    for (int i = 0; i < 2; i++) {
        char x[200], y[200];
        snprintf(x, sizeof(x), "%s/latest/%s", a, files[i]);
        snprintf(y, sizeof(y), "%s/latest/%s", b, files[i]);
        assert_same_file(scratch_file(x), scratch_file(y));
    }
}
