// Campaigns against the programs that write files: every allocation and every call on files fails once, and the trainer is
// killed at every call and at random moments. dev/test/faults_preload.c, preloaded, does the harm; this program counts the
// calls in a run without harm, then does it to each in turn, in JOBS processes (2), and looks at what is left.
// Gives: make faults, make kills. Needs: dev/util.h, data/checksum.h; Linux; the programs and the library, already built.
//
//     faults faults [EVERY]             every fault, or each EVERY-th; FROM=N goes on from fault N of each scenario;
//                                       SCENARIO=train and KIND=memory take one scenario and one kind
//     faults kills [N]                  N kills (1000): of half of them each at another call, of the others at any moment
//     faults one SCENARIO CALL KIND     one fault, whose folder is kept to be looked at
//
// A program that fails says why in lines that begin with its name and exits 1. Then its old files are whole, or its new
// ones, and the same command without a fault leads to the files of a run that never failed. A program that exits 0 has done
// all of its work.
#include "data/checksum.h"
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------------------------
// What is run

#define TINY                                                                                                           \
    "--data ../data --out out --layers 1 --dim 16 --heads 2 --ffn 16 --experts 4 --seq 16 --batch 2 --eval-tokens 32 " \
    "--tokens 4 --threads 1 --log-every 1 --warmup 0 --save-every 1 --eval-every 2 --sample-every 2 "

enum { TRAINER, TOKENIZE, STORIES, PROGRAMS };
static const char *const program_paths[PROGRAMS] = {"train_moe", "data/tokenize", "data/make_stories"};
static const char *const program_variables[PROGRAMS] = {"TRAIN_MOE", "TOKENIZE", "MAKE_STORIES"};

// Commands run in a folder of their own, beside ../texts and ../data.
typedef struct Scenario {
    const char *name;
    int program;
    const char *before;  // a command that makes what is there before, or NULL
    const char *command; // what fails
    const char *again;   // what is added to the command when it is started once more; NULL: it cannot be
    int exact;           // is what it prints the same every time?
} Scenario;

static const Scenario scenarios[] = {
    {"train", TRAINER, NULL, TINY "--steps 3 --keep 1", "--resume", 0},
    {"resume", TRAINER, TINY "--steps 2 --keep 2", TINY "--steps 4 --keep 2 --resume", "", 0},
    {"init", TRAINER, NULL, TINY "--steps 1 --init ../model", NULL, 0},
    {"prompt", TRAINER, TINY "--steps 1", "--out out --threads 1 --tokens 8 --prompt Once", "", 1},
    {"export", TRAINER, TINY "--steps 1", "--out out --threads 1 --export out/model.gguf --export-type q8_0", NULL, 1},
    {"recipes", TRAINER, NULL, "--list-recipes", "", 1},
    {"vocabulary", TOKENIZE, "--threads 1 --out out --vocab 270 ../texts/old.txt ../texts/valid.txt",
     "--threads 1 --out out --vocab 300 ../texts/train.txt ../texts/valid.txt", "", 1},
    {"tokenizer", TOKENIZE, "--threads 1 --out out --vocab 270 ../texts/old.txt ../texts/valid.txt",
     "--threads 1 --out out --tokenizer ../data/tokenizer.json --clean ../texts/train.txt", "", 1},
    {"ids", TOKENIZE, NULL, "--tokenizer ../data/tokenizer.json --ids ../texts/valid.txt", "", 1},
    {"stories", STORIES, NULL, "--count 40", "", 1},
};

// The kinds of faults, and at which calls (letters of dev/test/faults_preload.c) they can come.
static const struct {
    const char *name, *kind, *calls;
    int stays;
} kinds[] = {
    {"memory", "memory", "moOpndyu", 0},  {"memory-stays", "memory", "m", 1},
    {"space", "space", "Ownydft", 0},    {"space-stays", "space", "w", 1},
    {"io", "io", "oOrwclsagnduyfktpxz", 0}, {"interrupt", "interrupt", "oOrwcfx", 0},
    {"short", "short", "rw", 0},
};

static char work[64], here[2048]; // the folder of the campaign; where it was started
static char programs[PROGRAMS][128], preload[128];
static int jobs = 2;

// ---------------------------------------------------------------------------------------------------------------------
// Running a program with a fault

typedef struct Fault {
    long at;          // number of the call; -1: none
    const char *kind; // of dev/test/faults_preload.c
    int stays;
    double kill_after; // seconds; 0: never
} Fault;

static const Fault no_fault = {-1, "", 0, 0};

static void prepare_child(const char *folder, const Fault *fault) {
    char text[32];
    int out = -1, err = -1;
    if (chdir(folder) == 0) {
        out = open("stdout", O_WRONLY | O_CREAT | O_TRUNC, 0666);
        err = open("stderr", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    }
    if (dup2(out, 1) < 0 || dup2(err, 2) < 0) {
        _exit(98);
    }
    close(out);
    close(err);
    setenv("OMP_WAIT_POLICY", "passive", 1); // else the trainer begins anew
    setenv("LD_PRELOAD", preload, 1);
    setenv("FAULT_LOG", "calls", 1);
    setenv("FAULT_KIND", fault->kind, 1);
    snprintf(text, sizeof(text), "%ld", fault->at);
    setenv("FAULT_AT", text, 1);
    if (fault->stays) {
        setenv("FAULT_STAYS", "1", 1);
    }
    alarm(30); // a program that hangs
}

// Runs a program in a folder, which then has what it wrote, `stdout` and `stderr`, and its `calls`. Returns the exit
// status, or the number of the signal that ended it, negative.
static int run(const char *folder, int program, const char *command, const char *more, const Fault *fault) {
    char text[2048], *words[64], *rest = NULL;
    int count = 1, status = 0;
    snprintf(text, sizeof(text), "%s %s", command, more);
    words[0] = programs[program];
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        words[count++] = word;
    }
    words[count] = NULL;
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) {
        fail("cannot start a process: %s", strerror(errno));
    }
    if (child == 0) {
        prepare_child(folder, fault);
        execv(words[0], words);
        _exit(97);
    }
    if (fault->kill_after > 0) {
        usleep((useconds_t)(1e6 * fault->kill_after));
        kill(child, SIGKILL);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// ---------------------------------------------------------------------------------------------------------------------
// Folders: copied and compared

// A path, which stays valid until sixteen more were made.
__attribute__((format(printf, 1, 2))) static const char *path_of(const char *format, ...) {
    static char paths[16][4200];
    static int next;
    char *path = paths[next++ % 16];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof(paths[0]), format, args);
    va_end(args);
    return path;
}

static const char *join(const char *a, const char *b) {
    return path_of("%s/%s", a, b);
}

static int lies_there(const char *path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

static char *file_text(const char *folder, const char *name, size_t *size) {
    return read_file(join(folder, name), size);
}

static void write_file(const char *path, const char *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) {
        fail("%s: cannot write: %s", path, strerror(errno));
    }
}

// The names in a folder, in order, each followed by a slash. To be freed.
static char *list_names(const char *folder) {
    struct dirent **entries;
    int count = scandir(folder, &entries, NULL, alphasort);
    char *names = (char *)allocate(1, 1 << 14), *end = names;
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        if (strcmp(name, ".") && strcmp(name, "..") && end - names < (1 << 14) - 300) {
            end += sprintf(end, "%s/", name);
        }
        free(entries[i]);
    }
    if (count >= 0) {
        free(entries);
    }
    return names;
}

static void copy_tree(const char *from, const char *to) {
    char link[1024];
    struct stat info;
    if (lstat(from, &info) != 0) {
        return;
    }
    if (S_ISLNK(info.st_mode)) {
        ssize_t n = readlink(from, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        if (symlink(link, to) != 0) {
            fail("%s: cannot link: %s", to, strerror(errno));
        }
    } else if (S_ISDIR(info.st_mode)) {
        char *names = list_names(from), *rest = NULL;
        make_directories(to);
        for (char *name = strtok_r(names, "/", &rest); name; name = strtok_r(NULL, "/", &rest)) {
            char a[2100], b[2100];
            snprintf(a, sizeof(a), "%s/%s", from, name);
            snprintf(b, sizeof(b), "%s/%s", to, name);
            copy_tree(a, b);
        }
        free(names);
    } else {
        size_t size;
        char *bytes = read_file(from, &size);
        write_file(to, bytes, size);
        free(bytes);
    }
}

// Are two files, links or folders the same? Where not, puts the name of the first thing that differs into `what` (512).
static int same_tree(const char *a, const char *b, char *what) {
    struct stat x, y;
    snprintf(what, 512, "%s", strrchr(b, '/') + 1);
    if (lstat(a, &x) != 0 || lstat(b, &y) != 0) {
        return !lies_there(a) && !lies_there(b);
    }
    if ((x.st_mode & S_IFMT) != (y.st_mode & S_IFMT)) {
        return 0;
    }
    if (S_ISLNK(x.st_mode)) {
        char to[2][1024] = {"", ""};
        return readlink(a, to[0], 1023) > 0 && readlink(b, to[1], 1023) > 0 && !strcmp(to[0], to[1]);
    }
    if (S_ISREG(x.st_mode)) {
        size_t n, m;
        char *p = read_file(a, &n), *q = read_file(b, &m);
        int same = n == m && !memcmp(p, q, n);
        free(p);
        free(q);
        return same;
    }
    char *names = list_names(a), *others = list_names(b), *rest = NULL;
    int same = !strcmp(names, others);
    if (!same) {
        snprintf(what, 512, "%.50s has %.200s, not %.200s", strrchr(b, '/') + 1, others, names);
    }
    for (char *name = strtok_r(names, "/", &rest); same && name; name = strtok_r(NULL, "/", &rest)) {
        char p[2100], q[2100];
        snprintf(p, sizeof(p), "%s/%s", a, name);
        snprintf(q, sizeof(q), "%s/%s", b, name);
        same = same_tree(p, q, what);
    }
    free(names);
    free(others);
    return same;
}

// ---------------------------------------------------------------------------------------------------------------------
// What is as it should be: each of these returns 1, or 0 with the reason in `why` (1024)

static int wrong(char *why, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(why, 1024, format, args);
    va_end(args);
    return 0;
}

// What a program that exits 1 says: its last line begins with its name.
static int check_message(const char *folder, int program, char *why) {
    size_t size;
    const char *name = program == STORIES ? "make_stories" : program_paths[program];
    size_t n = strlen(name);
    char *text = file_text(folder, "stderr", &size), *line = text;
    for (char *end; (end = strchr(line, '\n')) != NULL && end[1];) {
        line = end + 1;
    }
    int good = !strncmp(line, name, n) && line[n] == ':' && strlen(line) > n + 4 && text[size - 1] == '\n';
    if (!good) {
        wrong(why, "exit 1, and the message is \"%.300s\"", text);
    }
    free(text);
    return good;
}

static int count_lines(const char *text) {
    int count = 0;
    for (const char *end = text; (end = strchr(end, '\n')) != NULL; end++) {
        count++;
    }
    return count;
}

// Of a finished program, what it printed is all there: the same, or as many lines where they have times in them, and perhaps
// a line that says what is missing.
static int check_output(const Scenario *s, const char *folder, const char *after, char *why) {
    size_t n, m;
    char *mine = file_text(folder, "stdout", &n), *whole = file_text(after, "stdout", &m);
    int good = s->exact ? n == m && !memcmp(mine, whole, n) : count_lines(mine) >= count_lines(whole);
    if (!good) {
        wrong(why, "exit 0, and it printed %zu bytes in %d lines, not %zu in %d", n, count_lines(mine), m,
              count_lines(whole));
    }
    free(mine);
    free(whole);
    return good;
}

// The log of a run: whole lines of JSON objects, and perhaps a piece of one more. With `last`: one line for each step.
static int check_run_log(const char *folder, int last, char *why) {
    size_t size;
    int step = 0, good = 1;
    const char *path = join(folder, "out/log.jsonl");
    if (!lies_there(path)) {
        return last ? wrong(why, "there is no log.jsonl") : 1;
    }
    char *text = read_file(path, &size), *line = text, *end;
    while (good && (end = (char *)memchr(line, '\n', (size_t)(text + size - line))) != NULL) {
        const char *step_line = "{\"type\":\"step\",\"step\":";
        good = *line == '{' && end[-1] == '}' && !memchr(line, 0, (size_t)(end - line));
        if (good && !strncmp(line, step_line, strlen(step_line))) {
            good = !last || atoi(line + strlen(step_line)) == ++step;
        }
        line = end + 1;
    }
    good = good && (!last || (step == last && line == text + size));
    if (!good) {
        wrong(why, "log.jsonl is not as it should be at: %.60s", line);
    }
    free(text);
    return good;
}

// Every checkpoint of a run is whole: that of this step in `all`. *newest is the largest step.
static int check_checkpoints(const char *folder, const char *all, int *newest, char *why) {
    char *names = list_names(join(folder, "out")), *rest = NULL, what[512];
    int good = 1, step;
    char more;
    *newest = 0;
    for (char *name = strtok_r(names, "/", &rest); good && name; name = strtok_r(NULL, "/", &rest)) {
        if (sscanf(name, "checkpoint-%d%c", &step, &more) == 1) {
            const char *path = path_of("%s/out/%s", folder, name), *whole = path_of("%s/out/%s", all, name);
            good = same_tree(whole, path, what) || wrong(why, "%s is not whole: %s", name, what);
            *newest = max_int(*newest, step);
        }
    }
    free(names);
    return good;
}

// What is in a run directory at the end: what a run that never failed has there.
static int check_finished(const char *folder, const char *after, int last, char *why) {
    char what[512];
    char *mine = list_names(join(folder, "out")), *whole = list_names(join(after, "out")), *rest = NULL;
    int good = !strcmp(mine, whole) || wrong(why, "the end: it has %.200s, not %.200s", mine, whole);
    for (char *name = strtok_r(whole, "/", &rest); good && name; name = strtok_r(NULL, "/", &rest)) {
        if (strcmp(name, "log.jsonl")) {
            const char *a = path_of("%s/out/%s", after, name), *b = path_of("%s/out/%s", folder, name);
            good = same_tree(a, b, what) || wrong(why, "the end: %s differs: %s", name, what);
        }
    }
    free(mine);
    free(whole);
    return good && check_run_log(folder, last, why);
}

// A failed or killed program left nothing that is half written: no name but those of a run before or behind.
static int check_names(const char *folder, char *why) {
    char *names = list_names(join(folder, "out")), *rest = NULL;
    int good = 1;
    for (char *name = strtok_r(names, "/", &rest); good && name; name = strtok_r(NULL, "/", &rest)) {
        int known = !strncmp(name, "checkpoint-", 11) || !strcmp(name, "latest") || !strcmp(name, "log.jsonl");
        good = known || wrong(why, "left behind: %s", name);
    }
    free(names);
    return good;
}

// ---------------------------------------------------------------------------------------------------------------------
// Preparing the campaign

// The folder of a scenario's state: "before", "after" (a run that never failed), "all" (of a run, with every checkpoint).
static const char *state_folder(const Scenario *s, const char *state) {
    static char paths[4][128];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof(paths[0]), "%s/%s-%s", work, s->name, state);
    return path;
}

static void must_run(const char *folder, int program, const char *command, const char *more) {
    int status = run(folder, program, command, more, &no_fault);
    if (status == 99) { // of the preloaded library
        remove_tree(work);
        printf("not run: this system lets no program filter its own calls (seccomp)\n");
        exit(0);
    }
    if (status != 0) {
        size_t size;
        fail("without any fault %s %s %s ends with %d: %s", programs[program], command, more, status,
             file_text(folder, "stderr", &size));
    }
}

// In a checkpoint's config.json, --keep as the scenario has it: "all" was made with more. Its checksum follows.
static void set_keep(const char *checkpoint, const char *command) {
    size_t size, n;
    const char *keep = strstr(command, "--keep "), *entry = "\"config.json\":{\"bytes\":";
    char *text = file_text(checkpoint, "config.json", &size), *at = strstr(text, "\"keep\":99");
    char *sums = file_text(checkpoint, "checksums.json", &n), *sum = strstr(sums, entry);
    if (at && sum) { // not in one from before
        at[7] = keep ? keep[7] : '2';
        memmove(at + 8, at + 9, strlen(at + 9) + 1);
        write_file(join(checkpoint, "config.json"), text, --size);
        const char *behind = strchr(sum, '}');
        char *changed = (char *)allocate(n + 64, 1);
        sprintf(changed, "%.*s%s%zu,\"checksum\":\"%016llx\"%s", (int)(sum - sums), sums, entry, size,
                (unsigned long long)checksum_of(text, size), behind);
        write_file(join(checkpoint, "checksums.json"), changed, strlen(changed));
        free(changed);
    }
    free(text);
    free(sums);
}

static void prepare_scenario(const Scenario *s) {
    const char *before = state_folder(s, "before"), *after = state_folder(s, "after");
    make_directories(before);
    if (s->before) {
        must_run(before, s->program, s->before, "");
    }
    make_directories(after);
    copy_tree(join(before, "out"), join(after, "out"));
    must_run(after, s->program, s->command, "");
    if (s->program != TRAINER || !strstr(s->command, "--steps")) {
        return;
    }
    const char *all = state_folder(s, "all");
    make_directories(all);
    copy_tree(join(before, "out"), join(all, "out"));
    must_run(all, s->program, s->command, "--keep 99");
    char *names = list_names(join(all, "out")), *rest = NULL;
    for (char *name = strtok_r(names, "/", &rest); name; name = strtok_r(NULL, "/", &rest)) {
        if (!strncmp(name, "checkpoint-", 11)) {
            set_keep(path_of("%s/out/%s", all, name), s->command);
        }
    }
    free(names);
}

// The campaign has copies, which stay while others build.
static void copy_program(const char *from, const char *to) {
    copy_tree(from, to);
    if (chmod(to, 0755) != 0) {
        fail("%s: not there; build it first", from);
    }
}

// Texts, tokens and a model, in a folder of memory where there is one.
static void prepare_campaign(const char *self) {
    const char *memory = "/dev/shm";
    snprintf(work, sizeof(work), "%s/train_moe_faults-XXXXXX", access(memory, W_OK) == 0 ? memory : "/tmp");
    if (!mkdtemp(work) || !getcwd(here, sizeof(here))) {
        fail("%s: cannot create: %s", work, strerror(errno));
    }
    strcpy(unfinished_path, work); // fail() removes it
    for (int i = 0; i < PROGRAMS; i++) {
        const char *given = getenv(program_variables[i]);
        snprintf(programs[i], sizeof(programs[i]), "%s/program-%d", work, i);
        copy_program(given ? given : program_paths[i], programs[i]);
    }
    snprintf(preload, sizeof(preload), "%s/preload.so", work);
    copy_program(path_of("%s_preload.so", self), preload);
    char texts[128];
    snprintf(texts, sizeof(texts), "%s/texts", work);
    make_directories(texts);
    static const char *const made[][2] = {
        {"train.txt", "--count 60"}, {"old.txt", "--count 50 --seed 2"}, {"valid.txt", "--count 9 --seed 3"}};
    for (int i = 0; i < 3; i++) {
        must_run(texts, STORIES, made[i][1], "");
        if (rename(join(texts, "stdout"), join(texts, made[i][0])) != 0) {
            fail("%s: cannot rename: %s", made[i][0], strerror(errno));
        }
    }
    must_run(texts, TOKENIZE, "--threads 1 --vocab 300 --out ../data train.txt valid.txt", "");
    must_run(texts, TRAINER, TINY "--steps 1", "");
    copy_tree(join(texts, "out/checkpoint-1"), join(work, "model"));
}

// A scenario's calls, one letter each, as they were in the run that never failed. To be freed.
static char *scenario_calls(const Scenario *s, size_t *count) {
    return file_text(state_folder(s, "after"), "calls", count);
}

// A job's own folder, as it is before the scenario.
static void set_up_folder(const Scenario *s, const char *folder) {
    remove_tree(folder);
    make_directories(folder);
    copy_tree(join(state_folder(s, "before"), "out"), join(folder, "out"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults

typedef struct Tally {
    long tried, reported, harmless, bad, kills;
} Tally;

static int last_step(const Scenario *s) {
    const char *steps = strstr(s->command, "--steps ");
    return steps ? atoi(steps + 8) : 0;
}

// What could not be removed, and a line said so, does no harm: the next start or the next save removes it. So it is with
// the last save of a run, behind which no other comes.
static void forgive_leftovers(const char *folder, const char *after) {
    static const char *const left[] = {"removed-checkpoint", "replaced-tokens", "unfinished-tokens", "model.gguf.unfinished"};
    for (int i = 0; i < COUNT(left); i++) {
        remove_tree(path_of("%s/out/%s", folder, left[i]));
    }
    char *names = list_names(join(folder, "out")), *rest = NULL;
    for (char *name = strtok_r(names, "/", &rest); name; name = strtok_r(NULL, "/", &rest)) {
        if (!strncmp(name, "checkpoint-", 11) && !lies_there(path_of("%s/out/%s", after, name))) {
            remove_tree(path_of("%s/out/%s", folder, name));
        }
    }
    free(names);
}

// After exit 1: the old files or the new ones, and the same command works.
static int check_left(const Scenario *s, const char *folder, int stays, char *why) {
    char what[512];
    const char *before = state_folder(s, "before"), *after = state_folder(s, "after");
    int newest = -1;
    if (s->program == TRAINER && last_step(s)) {
        if (!check_checkpoints(folder, state_folder(s, "all"), &newest, why) || !check_run_log(folder, 0, why) ||
            (!stays && !check_names(folder, why))) {
            return 0;
        }
    } else if (!stays || !(lies_there(join(folder, "out/unfinished-tokens")) || lies_there(join(folder, "out/model.gguf.unfinished")))) {
        if (!same_tree(join(after, "out"), join(folder, "out"), what) &&
            !same_tree(join(before, "out"), join(folder, "out"), what)) {
            return wrong(why, "neither the old files nor the new ones: %s", what);
        }
    }
    if (!s->again) {
        return 1;
    }
    int status = run(folder, s->program, s->command, s->again, &no_fault);
    if (status != 0) {
        size_t size;
        char *said = file_text(folder, "stderr", &size);
        wrong(why, "then, without a fault, the same command ends with %d: %.300s", status, said);
        free(said);
        return 0;
    }
    if (newest == last_step(s)) {
        forgive_leftovers(folder, after);
    }
    if (s->program == TRAINER && last_step(s)) {
        return check_finished(folder, after, last_step(s), why);
    }
    return same_tree(join(after, "out"), join(folder, "out"), what) ||
           wrong(why, "then, without a fault, the same command does not give the same: %s", what);
}

// Runs a scenario with one fault. Returns 1 if all is as it should be.
static int try_fault(const Scenario *s, const char *folder, const Fault *fault, Tally *tally, char *why) {
    const char *after = state_folder(s, "after");
    char what[512];
    set_up_folder(s, folder);
    int status = run(folder, s->program, s->command, "", fault);
    tally->tried++;
    if (status == 0) {
        tally->harmless++;
        struct stat info;
        if (stat(join(folder, "stderr"), &info) == 0 && info.st_size > 0) {
            forgive_leftovers(folder, after);
        }
        int good = check_output(s, folder, after, why);
        if (good && s->program == TRAINER && last_step(s)) {
            return check_finished(folder, after, last_step(s), why);
        }
        return good && (same_tree(join(after, "out"), join(folder, "out"), what) ||
                        wrong(why, "exit 0, but the files are not the new ones: %s", what));
    }
    if (status != 1) {
        size_t size;
        char *said = file_text(folder, "stderr", &size);
        wrong(why, "it ends with %d: %.300s", status, said);
        free(said);
        return 0;
    }
    tally->reported++;
    return check_message(folder, s->program, why) && check_left(s, folder, fault->stays, why);
}

// A line of the report, for the terminal and for the campaign's file.
static void report(const char *format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof(line) - 1, format, args);
    va_end(args);
    n = min_int(n, (int)sizeof(line) - 2);
    for (int i = 0; i < n; i++) {
        line[i] = line[i] == '\n' ? ' ' : line[i];
    }
    line[n++] = '\n';
    int file = open(join(here, "dev/build/faults.txt"), O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (write(1, line, (size_t)n) < 0 || write(file, line, (size_t)n) < 0) {
        _exit(3);
    }
    close(file);
}

// All faults of a scenario that are this job's.
static void fault_scenario(const Scenario *s, int job, int every, long from, Tally *tally) {
    size_t count;
    long number = 0;
    char folder[128], why[1024];
    char *calls = scenario_calls(s, &count);
    snprintf(folder, sizeof(folder), "%s/job-%d", work, job);
    for (size_t i = 0; i < count; i++) {
        for (int k = 0; k < COUNT(kinds); k++) {
            const char *only = getenv("KIND");
            if (!strchr(kinds[k].calls, calls[i]) || (only && strcmp(only, kinds[k].name))) {
                continue;
            }
            number++;
            if (number < from || number % every || number / every % jobs != job) {
                continue;
            }
            Fault fault = {(long)i + 1, kinds[k].kind, kinds[k].stays, 0};
            if (!try_fault(s, folder, &fault, tally, why)) {
                tally->bad++;
                report("%s %zu %s (call %c): %s", s->name, i + 1, kinds[k].name, calls[i], why);
            }
        }
    }
    free(calls);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kills

// A run of six steps, each saved, of which two checkpoints stay.
#define KILLED TINY "--steps 6 --keep 2"
static const Scenario killed = {"killed", TRAINER, NULL, KILLED, "--resume", 0};
// Where it was killed at its end, the last step was saved, and it goes on to two more.
static const Scenario longer = {"longer", TRAINER, KILLED, KILLED " --resume --steps 8", "", 0};

// The number of the n-th call on files among `calls`.
static long file_call(const char *calls, size_t count, long n) {
    for (size_t i = 0; i < count; i++) {
        if (calls[i] != 'm' && n-- == 0) {
            return (long)i + 1;
        }
    }
    return (long)count;
}

// After the last kill: on to the end, from the newest checkpoint or the one before, where the link is one behind.
static int go_on(const char *folder, int newest, char *why) {
    char latest[64] = "";
    int done = readlink(join(folder, "out/latest"), latest, sizeof(latest) - 1) > 0 && !strcmp(latest, "checkpoint-6");
    const Scenario *s = done ? &longer : &killed;
    size_t size;
    int status = run(folder, TRAINER, s->command, "--resume", &no_fault);
    char *said = file_text(folder, "stdout", &size), *complaint = file_text(folder, "stderr", &size);
    const char *line = "going on after step ", *begun = strstr(said, line);
    int first = begun ? atoi(begun + strlen(line)) : 0;
    int good = status == 0 || wrong(why, "--resume ends with %d: %.300s", status, complaint);
    good = good && (first >= newest - 1 || wrong(why, "checkpoint-%d is there, and --resume began after %d", newest, first));
    free(said);
    free(complaint);
    return good && check_finished(folder, state_folder(s, "after"), done ? 8 : 6, why);
}

// One kill, or several one after the other: kill number i of n. Then the run goes on to its end.
static int try_kill(const char *folder, const char *calls, size_t count, double duration, long i, long n, Tally *tally,
                    char *why) {
    uint64_t stream = random_stream(1, 0, (uint64_t)i, 0), draws = 0;
    const char *all = state_folder(&killed, "all");
    long file_calls = 0, planned = (n + 1) / 2;
    int newest = 0, before = 0, status = 0;
    for (size_t k = 0; k < count; k++) {
        file_calls += calls[k] != 'm';
    }
    set_up_folder(&killed, folder);
    for (int again = 0; again == 0 || random_uniform(stream, draws++) < 0.4; again++) {
        Fault fault = no_fault;
        if (i < planned && !again) { // these go through all calls; each fourth is a write of half
            long span = planned < file_calls ? file_calls : planned;
            fault.at = file_call(calls, count, (long)((double)i * (double)span / (double)planned) % file_calls);
            fault.kind = i >= file_calls || i % 4 == 3 ? "half" : "kill";
        } else {
            fault.kill_after = duration * random_uniform(stream, draws++) + 1e-6;
        }
        status = run(folder, TRAINER, killed.command, again ? "--resume" : "", &fault);
        tally->kills += status == -SIGKILL;
        if (status != 0 && status != -SIGKILL) {
            size_t size;
            char *said = file_text(folder, "stderr", &size);
            wrong(why, "--resume after a kill ends with %d: %.300s", status, said);
            free(said);
            return 0;
        }
        before = newest;
        if (!check_checkpoints(folder, all, &newest, why) || !check_run_log(folder, 0, why)) {
            return 0;
        }
        if (newest < before) {
            return wrong(why, "checkpoint-%d is lost", before);
        }
    }
    tally->tried++;
    return go_on(folder, newest, why);
}

static void kill_job(int job, long n, long from, Tally *tally) {
    size_t count;
    char folder[128], why[1024], *calls = scenario_calls(&killed, &count);
    snprintf(folder, sizeof(folder), "%s/job-%d", work, job);

    // How long a run takes that is not killed.
    double start = seconds();
    set_up_folder(&killed, folder);
    run(folder, TRAINER, killed.command, "", &no_fault);
    double duration = seconds() - start;
    for (long i = from; i < n; i++) {
        if (i % jobs == job && !try_kill(folder, calls, count, duration, i, n, tally, why)) {
            tally->bad++;
            report("kill %ld: %s", i, why);
        }
    }
    free(calls);
}

// ---------------------------------------------------------------------------------------------------------------------
// The campaigns

// Starts the jobs, each with its share, and adds up what they found. Returns the exit status.
static Tally run_jobs(int kills, long n) {
    Tally sum = {0, 0, 0, 0, 0}, mine;
    int ends[2];
    const char *from = getenv("FROM"), *only = getenv("SCENARIO");
    if (pipe(ends) != 0) {
        fail("cannot open a pipe: %s", strerror(errno));
    }
    fflush(NULL);
    for (int job = 0; job < jobs; job++) {
        pid_t child = fork();
        if (child) {
            continue;
        }
        unfinished_path[0] = 0;
        memset(&mine, 0, sizeof(mine));
        if (kills) {
            kill_job(job, n, from ? atol(from) : 0, &mine);
        }
        for (int i = 0; !kills && i < COUNT(scenarios); i++) {
            if (!only || !strcmp(only, scenarios[i].name)) {
                Tally before = mine;
                fault_scenario(&scenarios[i], job, (int)n, from ? atol(from) : 0, &mine);
                report("  %s: %ld faults: %ld reported, %ld harmless, %ld bad", scenarios[i].name,
                       mine.tried - before.tried, mine.reported - before.reported, mine.harmless - before.harmless,
                       mine.bad - before.bad);
            }
        }
        _exit(write(ends[1], &mine, sizeof(mine)) != sizeof(mine));
    }
    close(ends[1]);
    int ended = 0;
    while (read(ends[0], &mine, sizeof(mine)) == sizeof(mine)) {
        sum.tried += mine.tried;
        sum.reported += mine.reported;
        sum.harmless += mine.harmless;
        sum.bad += mine.bad;
        sum.kills += mine.kills;
        ended++;
    }
    if (ended != jobs) {
        fail("%d of %d jobs did not end as they should", jobs - ended, jobs);
    }
    return sum;
}

static int one_fault(char **argv) {
    for (int i = 0; i < COUNT(scenarios); i++) {
        for (int k = 0; k < COUNT(kinds); k++) {
            if (!strcmp(argv[2], scenarios[i].name) && !strcmp(argv[4], kinds[k].name)) {
                Fault fault = {atol(argv[3]), kinds[k].kind, kinds[k].stays, 0};
                Tally tally = {0, 0, 0, 0, 0};
                char folder[128], why[1024] = "all is as it should be";
                prepare_scenario(&scenarios[i]);
                snprintf(folder, sizeof(folder), "%s/one", work);
                set_up_folder(&scenarios[i], folder);
                int status = run(folder, scenarios[i].program, scenarios[i].command, "", &fault);
                snprintf(folder, sizeof(folder), "%s/job-0", work);
                int good = try_fault(&scenarios[i], folder, &fault, &tally, why);
                printf("exit %d; %s\nin %s: one, after the fault (calls has the callers), and job-0, gone on with\n",
                       status, why, work);
                return !good;
            }
        }
    }
    usage_fail("%s %s: there is no such scenario or no such kind of fault", argv[2], argv[4]);
}

int main(int argc, char **argv) {
    program_name = "faults";
    int kills = argc > 1 && !strcmp(argv[1], "kills"), one = argc == 5 && !strcmp(argv[1], "one");
    if (!kills && !one && (argc < 2 || strcmp(argv[1], "faults"))) {
        usage_fail("say faults [EVERY], kills [N] or one SCENARIO CALL KIND");
    }
    double start = seconds();
    long n = kills ? 1000 : 1;
    if (argc > 2 && !one) {
        n = max_int(1, atoi(argv[2]));
    }
    if (getenv("JOBS")) {
        jobs = max_int(1, atoi(getenv("JOBS")));
    }
    prepare_campaign(argv[0]);
    if (!getenv("FROM")) {
        unlink("dev/build/faults.txt");
    }
    if (one) {
        return one_fault(argv);
    }
    if (kills) {
        prepare_scenario(&killed);
        prepare_scenario(&longer);
    }
    for (int i = 0; !kills && i < COUNT(scenarios); i++) {
        prepare_scenario(&scenarios[i]);
    }
    Tally sum = run_jobs(kills, n);
    if (kills) {
        report("kills: %ld runs with %ld kills, each gone on with to the end: %ld bad; %.0f s", sum.tried, sum.kills,
               sum.bad, seconds() - start);
    } else {
        report("faults: %ld, of which %ld were reported and %ld did no harm: %ld bad; %.0f s", sum.tried, sum.reported,
               sum.harmless, sum.bad, seconds() - start);
    }
    remove_tree(work);
    return sum.bad > 0;
}
