// Errors, memory, files, time, threads and random numbers: what every other file stands on.
// Gives: fail, usage_fail, allocate, read_file, seconds, thread_count, random_stream, ... Needs: the C library.
//
// A wrong file or a wrong option ends the program with one line that names it: exit 1 for files and machines,
// exit 2 for the command line. Random numbers are a pure function of what they are for, so that any thread,
// process or device draws the same ones in any order.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
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

// `real` is the type of every weight and activation: float, or double to check gradients (make train_moe_double).
#ifndef REAL
#define REAL float
#endif
typedef REAL real;

// What a CUDA twin's kernels call too.
#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

BOTH int min_int(int a, int b) {
    return a < b ? a : b;
}

BOTH int max_int(int a, int b) {
    return a > b ? a : b;
}

BOTH int div_up(int a, int b) {
    return (a + b - 1) / b;
}

typedef struct Ranked {
    double score;
    int index;
} Ranked;

int compare_ranked(const void *a, const void *b) { // highest first, of equals the lower index
    const Ranked *x = (const Ranked *)a, *y = (const Ranked *)b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : x->index - y->index;
}

#ifdef USE_MPI
const char *program_name = "train_moe_mpi";
#else
const char *program_name = "train_moe";
#endif
int program_rank = 0;                // of several processes that work together: this one's number
void (*end_all)(int status) = NULL;  // of several processes: ends them all
char unfinished_path[4096]; // a folder being written; fail() removes it, so that nothing half-written stays

__attribute__((noreturn)) void end_program(int status) {
    if (end_all)
        end_all(status);
    exit(status);
}

void remove_tree(const char *path) {
    DIR *dir = opendir(path);
    if (dir) {
        char inner[4200];
        for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
                snprintf(inner, sizeof(inner), "%s/%s", path, entry->d_name) < (int)sizeof(inner) && unlink(inner) != 0)
                remove_tree(inner);
        }
        closedir(dir);
    }
    rmdir(path);
}

__attribute__((noreturn)) void fail_with(int status, const char *hint, const char *format, va_list args) {
    fflush(stdout);
    if (program_rank)
        sleep(3); // what all ranks find is said by the first, which ends the others
    fprintf(stderr, "%s: ", program_name);
    if (program_rank)
        fprintf(stderr, "rank %d: ", program_rank);
    vfprintf(stderr, format, args);
    fprintf(stderr, "%s\n", hint);
    if (unfinished_path[0])
        remove_tree(unfinished_path);
    end_program(status);
}

__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(1, "", format, args);
}

__attribute__((noreturn, format(printf, 1, 2))) void usage_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_with(2, " (-h lists the options)", format, args);
}

// Zeroed memory for count elements of size bytes; also for count 0. Large pages, where the system has some to give, save
// looking up where the small ones are.
void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        fail("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
#ifdef MADV_HUGEPAGE
    size_t page = 4096, skip = (page - (size_t)p % page) % page;
    if (count * size >= 1 << 22)
        madvise((char *)p + skip, (count * size - skip) / page * page, MADV_HUGEPAGE);
#endif
    return p;
}

void *reallocate(void *p, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size)
        fail("out of memory: %zu elements of %zu bytes", count, size);
    p = realloc(p, count && size ? count * size : 1);
    if (!p)
        fail("out of memory: could not allocate %.1f MiB", (double)count * (double)size / 1048576.0);
    return p;
}

real *allocate_reals(size_t count) {
    return (real *)allocate(count, sizeof(real));
}

// The whole file, with a NUL behind its last byte.
char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file)
        fail("%s: cannot open: %s", path, strerror(errno));
    size_t room = 1 << 16, used = 0, got;
    char *text = (char *)allocate(room, 1);
    while ((got = fread(text + used, 1, room - used - 1, file)) > 0) {
        used += got;
        if (room - used < 2)
            text = (char *)reallocate(text, room *= 2, 1);
    }
    if (ferror(file))
        fail("%s: cannot read: %s", path, strerror(errno));
    fclose(file);
    text[used] = 0;
    *size = used;
    return text;
}

void make_directories(const char *path) {
    char part[2048];
    for (size_t i = 1; i <= strlen(path); i++) {
        if (path[i] && path[i] != '/')
            continue;
        snprintf(part, sizeof(part), "%.*s", (int)i, path);
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            fail("%s: cannot create: %s", part, strerror(errno));
    }
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The memory that this process holds, in bytes; where /proc does not tell, the most that it has held.
double memory_now(void) {
    struct rusage use;
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    int known = file && fscanf(file, "%ld %ld", &pages, &resident) == 2;
    if (file)
        fclose(file);
    if (known)
        return (double)resident * (double)sysconf(_SC_PAGESIZE);
    getrusage(RUSAGE_SELF, &use);
#ifdef __APPLE__
    return (double)use.ru_maxrss;
#else
    return 1024.0 * (double)use.ru_maxrss;
#endif
}

int on_terminal(void) { // and not through mpirun, whose pipes look like one
    return !getenv("OMPI_COMM_WORLD_SIZE") && !getenv("PMI_SIZE") && isatty(1);
}

int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void use_threads(int threads) { // without OpenMP there is one, whatever is asked for
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    if (threads > 1)
        fprintf(stderr, "%s: built without OpenMP, so --threads %d runs as one\n", program_name, threads);
#endif
}

int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ---- random numbers

// A bijection of 64-bit numbers in which every input bit moves every output bit (SplitMix64's finaliser, Steele 2014).
BOTH uint64_t hash64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

enum { RANDOM_INIT, RANDOM_ORDER, RANDOM_JITTER, RANDOM_SAMPLE, RANDOM_NOISE, RANDOM_SECOND, RANDOM_EXEMPT }; // what a random number is for

// A stream of random numbers: one for each (seed, purpose, a, b), a and b being a step and a layer, say.
BOTH uint64_t random_stream(uint64_t seed, int purpose, uint64_t a, uint64_t b) {
    return hash64(hash64(hash64(hash64(seed) ^ (uint64_t)purpose) ^ a) ^ b);
}

// The i-th number of a stream, uniform in [0,1).
BOTH double random_uniform(uint64_t stream, uint64_t i) {
    return (double)(hash64(stream ^ hash64(i)) >> 11) * (1.0 / 9007199254740992.0);
}

// The i-th number of a stream, standard normal (Box and Muller 1958).
BOTH double random_normal(uint64_t stream, uint64_t i) {
    double u = 1.0 - random_uniform(stream, 2 * i), v = random_uniform(stream, 2 * i + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}
