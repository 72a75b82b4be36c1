// Errors, memory, files, time, threads and random numbers, for every other file.
// Gives: fail, usage_fail, remark, allocate, is_there, next_name, read_file, seconds, thread_count, random_stream, ...
// Needs: the C library and POSIX, whose headers are included here once for the whole program.
// A wrong file or a wrong option ends the program with one line that names it: exit 1 for files and
// for the machine, exit 2 for the command line.
#pragma once
#include "portable.h" // first, because it decides what the system's headers declare
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// The type of every weight and activation: float, or double to check gradients (train_moe_double).
#ifndef REAL
#define REAL float
#endif
typedef REAL real;

// BOTH marks a function that the kernels of the CUDA twin call as well.
#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

// Elements of an array.
#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

BOTH int min_int(int a, int b) {
    return a < b ? a : b;
}

BOTH int max_int(int a, int b) {
    return a > b ? a : b;
}

// a / b rounded up, for a >= 0 and b > 0.
BOTH int div_up(int a, int b) {
    return (a + b - 1) / b;
}

typedef struct Ranked {
    double score;
    int index;
} Ranked;

// Orders Ranked for qsort: the highest score comes first, and of two equal scores the lower index.
int compare_ranked(const void *a, const void *b) {
    const Ranked *x = (const Ranked *)a;
    const Ranked *y = (const Ranked *)b;
    if (x->score != y->score) {
        return x->score < y->score ? 1 : -1;
    }
    return x->index - y->index;
}

// ---- errors

#ifdef PROGRAM // by a program of its own
#elif defined(USE_NCCL)
#define PROGRAM "train_moe_cu_nccl"
#elif defined(__CUDACC__)
#define PROGRAM "train_moe_cu"
#elif defined(USE_MPI)
#define PROGRAM "train_moe_mpi"
#else
#define PROGRAM "train_moe"
#endif
const char *program_name = PROGRAM;
int program_rank = 0;               // this process's number, if several work together
void (*end_all)(int status) = NULL; // ends all processes, if several work together
char unfinished_path[4096];         // a folder that is being written; fail() removes it

__attribute__((noreturn)) void end_program(int status) {
    if (end_all) {
        end_all(status);
    }
    exit(status);
}

// Prints a line that the user should see, once.
__attribute__((format(printf, 1, 2))) void remark(const char *format, ...) {
    if (program_rank) {
        return;
    }
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

// The next name in a folder, without . and ..; NULL at its end and where it cannot be read: then *error says why.
const char *read_name(DIR *folder, int *error) {
    const struct dirent *entry;
    do {
        errno = 0; // the end and an error differ in it alone
        entry = readdir(folder);
    } while (entry && (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0));
    *error = entry ? 0 : errno;
    return entry ? entry->d_name : NULL;
}

// Removes a folder and everything in it; of a link only itself. What cannot be removed stays: then it returns -1, and errno says why.
int remove_tree(const char *path) {
    DIR *folder = opendir(path);
    const char *name;
    char inner[4200];
    int error = 0;
    struct stat info;
    if (lstat(path, &info) == 0 && S_ISLNK(info.st_mode)) {
        if (folder) {
            closedir(folder);
        }
        return unlink(path);
    }

    // rmdir takes only an empty folder. unlink removes files; where it fails, there is a folder.
    while (folder && (name = read_name(folder, &error)) != NULL) {
        int length = snprintf(inner, sizeof(inner), "%s/%s", path, name);
        if (length < (int)sizeof(inner) && unlink(inner) != 0) {
            remove_tree(inner);
        }
    }
    if (folder) {
        closedir(folder);
    }
    if (rmdir(path) != 0 && errno != ENOENT && error == 0) {
        error = errno;
    }
    errno = error;
    return error ? -1 : 0;
}

// The same, and a line says so where it stays.
void clear_away(const char *path) {
    if (remove_tree(path) != 0) {
        remark("%s: cannot be removed: %s", path, strerror(errno));
    }
}

// Prints "program: [rank N: ]message hint" to standard error and ends the program.
__attribute__((noreturn)) void fail_with(int status, const char *hint, const char *format,
                                         va_list args) {
    fflush(stdout);

    // All ranks find the same mistake at the same time. The first one reports it and ends the
    // others while they sleep, so that the user reads it once.
    if (program_rank) {
        sleep(3);
    }
    fprintf(stderr, "%s: ", program_name);
    if (program_rank) {
        fprintf(stderr, "rank %d: ", program_rank);
    }
    vfprintf(stderr, format, args);
    fprintf(stderr, "%s\n", hint);

    // Files that are only partly written must not be taken for good ones.
    if (unfinished_path[0]) {
        remove_tree(unfinished_path);
    }
    end_program(status);
}

// For files and for the machine: exit status 1.
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(1, "", format, args);
}

// For the command line: exit status 2.
__attribute__((noreturn, format(printf, 1, 2))) void usage_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(2, " (-h lists the options)", format, args);
}

// ---- memory and files

// Opens those of the descriptors 0 to 2 that are closed, so that no file takes their number and gets what is written for
// the terminal. They are opened the wrong way round: reading 0 and writing 1 and 2 still fail, as where they are closed.
void open_standard_files(void) {
    for (int i = 0; i < 3; i++) {
        if (fcntl(i, F_GETFD) < 0 && open("/dev/null", i ? O_RDONLY : O_WRONLY) < 0) {
            (void)!open("/", O_RDONLY); // there is no /dev
        }
    }
}

// Zeroed memory for count elements of size bytes; never NULL, not even for count 0.
void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) {
        fail("out of memory: could not allocate %.1f MiB",
             (double)count * (double)size / 1048576.0);
    }
    ask_large_pages(p, count * size);
    return p;
}

// Like realloc, but never returns NULL. The memory that is added is not zeroed.
void *reallocate(void *p, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) {
        fail("out of memory: %zu elements of %zu bytes", count, size);
    }
    p = realloc(p, count && size ? count * size : 1);
    if (!p) {
        fail("out of memory: could not allocate %.1f MiB",
             (double)count * (double)size / 1048576.0);
    }
    return p;
}

real *allocate_reals(size_t count) {
    return (real *)allocate(count, sizeof(real));
}

// Memory that is taken piece by piece and given back all at once. A piece that does not fit any more gets memory of its
// own; at the next reset the arena grows so that all pieces fit. Pieces begin at multiples of 64 bytes and are not zeroed.
typedef struct Arena {
    char *memory;
    size_t size, used;   // bytes; used counts the pieces outside, too
    void *outside[64];
    int outside_count;
} Arena;

void arena_reserve(Arena *a, size_t bytes) {
    free(a->memory);
    a->memory = (char *)allocate(bytes + 64, 1);
    a->size = bytes;
}

void arena_reset(Arena *a) {
    if (a->outside_count > 0) {
        while (a->outside_count > 0) {
            free(a->outside[--a->outside_count]);
        }
        arena_reserve(a, a->used);
    }
    a->used = 0;
}

void *arena_take(Arena *a, size_t count, size_t size) {
    size_t bytes = (count * size + 63) / 64 * 64, at = a->used;
    a->used += bytes;
    if (a->used <= a->size) {
        size_t skip = (64 - (size_t)a->memory % 64) % 64;
        return a->memory + skip + at;
    }
    if (a->outside_count == (int)(sizeof(a->outside) / sizeof(a->outside[0]))) {
        fail("the scratch memory of %zu bytes is too small by far", a->size);
    }
    return a->outside[a->outside_count++] = allocate(bytes, 1);
}

void arena_free(Arena *a) {
    while (a->outside_count > 0) {
        free(a->outside[--a->outside_count]);
    }
    free(a->memory);
    a->memory = NULL;
}

// After a call for a file or a folder that failed: returns 0 where it is not there. What cannot be looked at is not taken
// for missing: any other error ends the program.
int not_there(const char *path) {
    if (errno != ENOENT && errno != ENOTDIR) {
        fail("%s: cannot look whether it is there: %s", path, strerror(errno));
    }
    return 0;
}

// Is there a file or a folder of this name?
int is_there(const char *path) {
    return access(path, F_OK) == 0 || not_there(path);
}

// Is there a file of this name in a folder?
int has_file(const char *dir, const char *name) {
    char path[4500];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return is_there(path);
}

// Opens a folder; NULL where there is none. One that cannot be opened ends the program.
DIR *find_folder(const char *path) {
    DIR *folder = opendir(path);
    if (!folder && errno != ENOENT && errno != ENOTDIR) {
        fail("%s: cannot read the folder: %s", path, strerror(errno));
    }
    return folder;
}

// The next name in a folder, NULL behind the last one. A folder that cannot be read to its end ends the program.
const char *next_name(DIR *folder, const char *path) {
    int error;
    const char *name = read_name(folder, &error);
    if (error) {
        fail("%s: cannot read the folder: %s", path, strerror(error));
    }
    return name;
}

// A copy of a text, to be freed.
char *copy_text(const char *text) {
    size_t size = strlen(text) + 1;
    return (char *)memcpy(allocate(size, 1), text, size);
}

// All bytes that an open file still gives and a NUL behind the last one, to be freed; *size does not count the NUL. `name` is
// for messages.
char *read_stream(FILE *file, const char *name, size_t *size) {
    size_t allocated = 1 << 16, used = 0, got;
    char *text = (char *)allocate(allocated, 1);

    // A pipe does not say how long it is, so the buffer doubles whenever it is full.
    while ((got = fread(text + used, 1, allocated - used - 1, file)) > 0) {
        used += got;
        if (allocated - used < 2) {
            allocated *= 2;
            text = (char *)reallocate(text, allocated, 1);
        }
    }
    if (ferror(file)) {
        fail("%s: cannot read: %s", name, strerror(errno));
    }
    text[used] = 0;
    *size = used;
    return text;
}

// The same of the file `path`.
char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fail("%s: cannot open: %s", path, strerror(errno));
    }
    char *text = read_stream(file, path, size);
    fclose(file);
    return text;
}

// A file in memory. Once it is closed, *text has its bytes, to be freed.
FILE *open_memory(char **text, size_t *size) {
    FILE *file = open_memstream(text, size);
    if (!file) {
        fail("out of memory");
    }
    return file;
}

// All that was written to it is there, or the program ends.
void flush_memory(FILE *file) {
    if (fflush(file) != 0 || ferror(file)) {
        fail("out of memory");
    }
}

void close_memory(FILE *file, char **text) {
    flush_memory(file);
    if (fclose(file) != 0 || !*text) {
        fail("out of memory");
    }
}

// Makes the folder `path` and those above it. Folders that exist are no error.
void make_directories(const char *path) {
    char part[2048];

    // Each '/', and the end, completes the name of one folder.
    for (size_t i = 1; i <= strlen(path); i++) {
        if (path[i] && path[i] != '/') {
            continue;
        }
        snprintf(part, sizeof(part), "%.*s", (int)i, path);
        if (mkdir(part, 0777) != 0 && errno != EEXIST) {
            fail("%s: cannot create: %s", part, strerror(errno));
        }
    }
}

// ---- time, memory in use, threads

// A clock that never goes back. Only differences mean something.
double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The memory that this process holds, in bytes. Where there is no /proc: the most that it has held.
double memory_now(void) {
    struct rusage use;
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    int known = file && fscanf(file, "%ld %ld", &pages, &resident) == 2;
    if (file) {
        fclose(file);
    }
    if (known) {
        return (double)resident * (double)sysconf(_SC_PAGESIZE);
    }

    // macOS counts in bytes, the other systems in KiB.
    getrusage(RUSAGE_SELF, &use);
#ifdef __APPLE__
    return (double)use.ru_maxrss;
#else
    return 1024.0 * (double)use.ru_maxrss;
#endif
}

int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Without OpenMP there is one thread, whatever number is asked for.
void use_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    if (threads > 1) {
        remark("built without OpenMP, so --threads %d runs as one", threads);
    }
#endif
}

int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Is a loop over so many rows, with so many numbers each, long enough for several threads? To begin and end a parallel
// loop takes microseconds, and one thread alone does a few of these numbers in a nanosecond.
size_t not_worth_threads = 1 << 16; // tests take 0, so that small models have parallel loops, too
int is_worth_threads(int rows, int width) {
    return (size_t)rows * (size_t)width > not_worth_threads;
}

#include "terminal.h" // what is written over, and how wide it may be
#include "machine.h"  // what the processor and the system give: instructions, processors, threads

// ---- random numbers
//
// A random number is a pure function of its purpose and its number, so that any thread, process or
// device draws the same ones in any order.

// A bijection of 64-bit numbers in which every input bit changes every output bit
// (the last step of SplitMix64, Steele 2014).
BOTH uint64_t hash64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The purposes of random numbers. A purpose keeps its number, or every run would end differently.
enum {
    RANDOM_INIT,   // first weights
    RANDOM_ORDER,  // the order of the training data
    RANDOM_JITTER, // factors on the router's input
    RANDOM_SAMPLE, // tokens of a generated text
    RANDOM_NOISE,  // noise on the router's scores
    RANDOM_SECOND, // which tokens decline their second expert
    RANDOM_EXEMPT, // which sequences drop no tokens
    RANDOM_MOMENTS, // which way the optimizer's moments are rounded
    RANDOM_DROPOUT // which numbers --dropout makes 0
};

// One stream of random numbers for each (seed, purpose, a, b), where a and b are, say, a step and
// a layer.
BOTH uint64_t random_stream(uint64_t seed, int purpose, uint64_t a, uint64_t b) {
    return hash64(hash64(hash64(hash64(seed) ^ (uint64_t)purpose) ^ a) ^ b);
}

// The i-th number of a stream, uniform in [0,1): the upper 53 bits, which a double holds exactly.
BOTH double random_uniform(uint64_t stream, uint64_t i) {
    return (double)(hash64(stream ^ hash64(i)) >> 11) * (1.0 / 9007199254740992.0);
}

// The i-th number of a stream, standard normal (Box and Muller 1958).
BOTH double random_normal(uint64_t stream, uint64_t i) {
    double u = 1.0 - random_uniform(stream, 2 * i); // in (0,1], since log(0) is infinite
    double v = random_uniform(stream, 2 * i + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}
