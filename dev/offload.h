// Experts that are in a file until they are needed (--offload N).
// Gives: Pool, offloaded, pool_of, find_pool, bytes_of_expert, is_held, use_expert, take_in, let_go, let_go_of_tensor,
// let_go_of_array, about_to_pass, passed_over, add_pool, folder_of_offload, nearest_folder, offload_array, offload_free, offload_bytes,
// bytes_in_file_only, offload_refuses, offload_refuses_ranks, print_offload, print_offload_memory.
// Needs: Model and Tensor of train_moe.c, which includes it by way of dev/memory.h and dev/parts.h; expert_size() of
// ranks/copies.h, moment_offset() of ranks/gradients.h. The products that fetch experts are in dev/offload_products.h.
//
// Of a mixture, each step or token needs few experts at a time: a layer multiplies by one after the other. With --offload N the
// experts' part of each array (weights; in training also gradients and both moments) is a file that is mapped into memory, so an
// expert has an address as it has without --offload, and whoever reads it gets its numbers from the file. At most N experts of
// each tensor are taken into memory. Before another one comes, the one whose last use is longest ago goes: its pages are given
// back to the system, which writes to the file what was changed. All numbers and all sums are the same, and so are the bits.
//
// All arrays of a model are in one file. It has no name, so it goes with the process, however that ends. All of its space is
// reserved at the start, so a disk that is too small is refused then, and not by a crash in the middle of the run. A checkpoint
// is as always, and what a run needs to go on is in the checkpoint alone.
//
// Of several processes each has its own experts, in a file of its own; dev/ranks/staged_sums.h sums up their gradients.
//
// "In memory" means: pages that this process holds. The system may keep a copy of the file's pages in its cache for as long as
// nobody else needs that memory; with --offload-cold it may not (doc/offload.md).
#ifdef CONFIG_FIELDS
    int offload;             // experts of each tensor that are in memory; 0: all
    int offload_cold;        // 1: the system's cache keeps none of the others
    const char *offload_dir; // the folder of the file; open_run() of dev/run.h puts the run directory here
#elif !defined(OFFLOAD_H)
#define OFFLOAD_H
#include <sys/statvfs.h>

// The experts of one tensor, in one of the arrays WEIGHTS, GRADS, ...
typedef struct Pool {
    const Model *owner;
    int what, tensor;
    int E, most;   // experts of this process; those that may be in memory
    real *base;    // the first number of expert 0
    size_t each;   // bytes of a number; on the CPU always those of a `real`
    size_t *from;  // (E+1) where each expert begins, in numbers
    int *held;     // (most) those that are in memory, the one whose last use is longest ago first
    int count;     // how many they are
} Pool;

// What is mapped for one array of a model.
typedef struct Mapped {
    const Model *owner;
    char *base;
    size_t size, first, end; // bytes; those from `first` to `end` are in the file
    size_t at;               // where they begin there
    int file;                // all arrays of a model have the same
    int cold;                // --offload-cold
} Mapped;

// Of all models in memory, and what was done for them.
struct {
    Pool *pools;
    int pool_count;
    Mapped arrays[8];
    int array_count;
    double asked, fetched, bytes; // experts that were needed; those of them that were not in memory; their bytes
    int fullest;                  // the most experts that a pool has held
    double on_host, on_device;    // CUDA: bytes of experts in the host's memory; of them those that may be on the device
} offloaded;

size_t expert_size(const Config *c, const Tensor *t, int e); // ranks/copies.h
size_t moment_offset(const Model *m, size_t offset);         // ranks/gradients.h

// Why the options do not allow --offload; NULL: they do.
const char *offload_refuses(const Config *c) {
    static char text[160];
    if (!c->offload) {
        return NULL;
    }
    if (c->lora) {
        return "--offload is for experts that are trained, and --lora trains none of them: leave out --offload";
    }
    if (c->blocks) {
        return "--offload is for experts of float32, and this model has experts of few bits: give it without --offload";
    }
    if (c->replicate) {
        return "--replicate gives busy experts a second copy in memory, and --offload keeps most experts out of it: give one of "
               "the two";
    }
    if (c->moe_every && c->offload >= c->experts) {
        snprintf(text, sizeof(text), "--offload %d: a layer has %d experts, so there would be nothing to offload: give fewer",
                 c->offload, c->experts);
        return text;
    }
    return NULL;
}

// Ends the program where each of several processes has too few experts, and where several have GPUs. ep: the processes among which
// the experts are divided.
void offload_refuses_ranks(const Config *c, int ep) {
    int each = c->experts / ep;
#ifdef USE_NCCL
    if (c->offload && ranks.size > 1) {
        usage_fail("--offload %d: on GPUs it is for one process, and several have fewer experts each already: leave it out, or start "
                   "one process without mpirun",
                   c->offload);
    }
#endif
    if (c->moe_every && c->offload && c->offload >= each) {
        usage_fail("--offload %d: with --ep %d each rank has %d of a layer's %d experts, so there would be nothing to offload: %s",
                   c->offload, ep, each, c->experts, each > 1 ? "give fewer" : "leave it out, or give a smaller --ep");
    }
}

// ---- which experts are in memory

// The pool whose expert 0 begins at p; NULL: what is there is not in a file.
Pool *pool_of(const real *p) {
    for (int i = 0; i < offloaded.pool_count; i++) {
        if (offloaded.pools[i].base == p) {
            return &offloaded.pools[i];
        }
    }
    return NULL;
}

// The pool of a model's tensor in an array; NULL: it has none.
Pool *find_pool(const Model *m, int what, int tensor) {
    for (int i = 0; i < offloaded.pool_count; i++) {
        Pool *p = &offloaded.pools[i];
        if (p->owner == m && p->what == what && p->tensor == tensor) {
            return p;
        }
    }
    return NULL;
}

size_t bytes_of_expert(const Pool *p, int e) {
    return (p->from[e + 1] - p->from[e]) * p->each;
}

int is_held(const Pool *p, int e) {
    for (int i = 0; i < p->count; i++) {
        if (p->held[i] == e) {
            return 1;
        }
    }
    return 0;
}

// Takes entry i off the list.
void unlist(Pool *p, int i) {
    p->count--;
    memmove(p->held + i, p->held + i + 1, (size_t)(p->count - i) * sizeof(int));
}

// The part of the addresses from .. end that lies in the file of array i; returns whether there is one.
int in_file(int i, uintptr_t *from, uintptr_t *end) {
    const Mapped *a = &offloaded.arrays[i];
    uintptr_t first = (uintptr_t)a->base + a->first;
    uintptr_t last = (uintptr_t)a->base + a->end;
    *from = *from > first ? *from : first;
    *end = *end < last ? *end : last;
    return *from < *end;
}

// The bytes from .. end are not needed any more: those of them that are in a file go. Where a page is read, Linux maps up to 64 KiB
// around it, too (fault-around), so what is around them goes as well. Several threads may call it at the same time.
void let_go_of_bytes(uintptr_t from, uintptr_t end) {
    const uintptr_t at_a_time = 65536;
    for (int i = 0; i < offloaded.array_count; i++) {
        const Mapped *a = &offloaded.arrays[i];
        uintptr_t first = from / at_a_time * at_a_time;
        uintptr_t last = (end + at_a_time - 1) / at_a_time * at_a_time;
        if (in_file(i, &first, &last)) { // never beyond the file, where they would be lost
            forget_pages((const void *)first, (size_t)(last - first));
            if (a->cold) {
                drop_from_cache(a->file, a->at + (size_t)(first - (uintptr_t)a->base - a->first), (size_t)(last - first));
            }
        }
    }
}

// A thread is about to pass over n numbers, which lie anywhere: the system begins to read those that are in a file.
void about_to_pass(const real *x, size_t n) {
    for (int i = 0; i < offloaded.array_count; i++) {
        uintptr_t from = (uintptr_t)x;
        uintptr_t end = (uintptr_t)(x + n);
        if (in_file(i, &from, &end)) {
            fetch_pages((const void *)from, (size_t)(end - from));
        }
    }
}

// It has passed over them, and does not need them any more.
void passed_over(const real *x, size_t n) {
    let_go_of_bytes((uintptr_t)x, (uintptr_t)(x + n));
}

// Expert e of a pool goes.
void let_go_of_expert(const Pool *p, int e) {
    let_go_of_bytes((uintptr_t)(p->base + p->from[e]), (uintptr_t)(p->base + p->from[e + 1]));
}

// From now on expert e is the one that was used last. Returns whether it has to be fetched. *leaves: the one that has to leave
// before, whose last use is longest ago; -1: none.
int use_expert(Pool *p, int e, int *leaves) {
    int at = 0;
    *leaves = -1;
    while (at < p->count && p->held[at] != e) {
        at++;
    }
    int comes = at == p->count;
    if (!comes) {
        unlist(p, at);
    } else {
        if (p->count == p->most) {
            *leaves = p->held[0];
            unlist(p, 0);
        }
        offloaded.fetched++;
        offloaded.bytes += (double)bytes_of_expert(p, e);
    }
    p->held[p->count++] = e;
    offloaded.fullest = max_int(offloaded.fullest, p->count);
    return comes;
}

// Expert e will be needed next: the system begins to read it. (On the CPU. On a GPU move_in_group() of dev/cuda/offload.cuh does it.)
void take_in(Pool *p, int e) {
    int leaves;
    int comes = use_expert(p, e, &leaves);
    if (leaves >= 0) {
        let_go_of_expert(p, leaves);
    }
    if (comes) {
        fetch_pages(p->base + p->from[e], bytes_of_expert(p, e));
    }
}

// All experts of the pool go.
void let_go(Pool *p) {
    for (int e = 0; e < p->E; e++) {
        let_go_of_expert(p, e);
    }
    p->count = 0;
}

// What has read or written a whole tensor calls this: its experts go.
void let_go_of_tensor(const Model *m, int what, int tensor) {
    Pool *p = find_pool(m, what, tensor);
    if (p) {
        let_go(p);
    }
}

void let_go_of_array(const Model *m, int what) {
    for (int i = 0; i < m->tensor_count && offloaded.pool_count; i++) {
        let_go_of_tensor(m, what, i);
    }
}

// ---- the file, and the memory that it is mapped to

// The folder of the file: that of --offload-dir, or the run directory `out`; what only reads a model takes the current folder
// where there is no run directory. Kept for the whole program.
const char *folder_of_offload(const Config *c, const char *out) {
    int reads = c->prompt || c->evaluate || c->export_to[0] || c->quantize != NO_BLOCKS;
    const char *dir = c->offload_dir;
    if (c->offload && !dir[0]) {
        dir = reads && !is_there(out) ? "." : keep_text(out);
    }
    return dir;
}

// The folder in which the file is made: `dir`. A new run has none yet, and its file is in the nearest folder above, which is on the
// same disk. So nothing is left behind of a run that does not begin.
void nearest_folder(const char *dir, char path[4200]) {
    struct stat info;
    snprintf(path, 4200, "%s", dir);
    while (strcmp(path, ".") && lstat(path, &info) != 0 && errno == ENOENT) {
        char *end = path + strlen(path);
        while (end > path + 1 && end[-1] == '/') {
            end--;
        }
        while (end > path && end[-1] != '/') {
            end--;
        }
        snprintf(end, 2, "%s", end > path ? "" : ".");
    }
}

// Where the weight at this offset has its number in an array: of common moments each of several processes has a slice only.
size_t place_in_array(const Model *m, int what, size_t offset) {
    return what < MOMENT1 ? offset : moment_offset(m, offset);
}

// The bytes of an array that are in the file: the experts' pages, and what shares the first and the last one with them.
void part_in_file(const Model *m, int what, size_t *first, size_t *end) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    *first = place_in_array(m, what, m->common) * sizeof(real) / page * page;
    *end = (place_in_array(m, what, m->tables) * sizeof(real) + page - 1) / page * page;
}

// Ends the program where there is no room for the file, which has to be as large as `size`. folder: where it was made.
void refuse_full_disk(const Config *c, const char *folder, int file, size_t size, int last, int error) {
    struct statvfs disk;
    char have[64] = "";
    (void)!ftruncate(file, 0); // gives back what could be reserved, so that statvfs counts it as free
    close(file);
    if (statvfs(folder, &disk) == 0) {
        snprintf(have, sizeof(have), " (%.1f MiB are free)", (double)disk.f_bavail * (double)disk.f_frsize / 1048576);
    }
    fail("--offload: %s: cannot reserve %.1f MiB for experts' weights%s%s: %s; make room, or name another folder by --offload-dir",
         c->offload_dir, (double)size / 1048576, last == WEIGHTS ? "" : ", gradients and moments", have, strerror(error));
}

// The file for the arrays what .. last of a model, with all of its space reserved. It goes when it is closed and no longer mapped.
int offload_file(const Model *m, int what, int last) {
    const Config *c = &m->config;
    size_t size = 0, first, end;
    char folder[4200];
    for (int i = what; i <= last; i++) {
        part_in_file(m, i, &first, &end);
        size += end - first;
    }
    nearest_folder(c->offload_dir, folder);
    int file = open_unnamed(folder);
    if (file < 0) {
        fail("--offload: %s: cannot create a file in it: %s; --offload-dir names another folder", c->offload_dir, strerror(errno));
    }
    int error = reserve_file(file, size);
    if (error) {
        refuse_full_disk(c, folder, file, size, last, error);
    }
    return file;
}

// Bytes of the experts of t that may be in memory, in an array of numbers of `each` bytes.
size_t offload_bytes(const Config *c, const Tensor *t, size_t each) {
    size_t largest = 0, all = 0;
    int E = c->experts / ranks.ep;
    for (int e = ranks.member * E; e < (ranks.member + 1) * E; e++) {
        size_t size = expert_size(c, t, e);
        largest = size > largest ? size : largest;
        all += size;
    }
    size_t most = largest * (size_t)c->offload;
    return (most < all ? most : all) * each;
}

// Bytes of an array of the model that are in the file and not in memory, as many experts as may be there are. On a GPU there is no file.
size_t bytes_in_file_only(const Model *m, int what) {
    size_t bytes = 0;
    for (int i = 0; i < m->tensor_count && offloaded.array_count; i++) {
        const Pool *p = find_pool(m, what, i);
        bytes += p ? p->from[p->E] * p->each - offload_bytes(&m->config, &m->tensors[i], p->each) : 0;
    }
    return bytes;
}

// A pool for the experts of a tensor, which begin at `base` and have numbers of `each` bytes.
void add_pool(const Model *m, int what, int tensor, void *base, size_t each) {
    const Config *c = &m->config;
    offloaded.pools = (Pool *)reallocate(offloaded.pools, (size_t)offloaded.pool_count + 1, sizeof(Pool));
    Pool *p = &offloaded.pools[offloaded.pool_count++];
    memset(p, 0, sizeof(*p));
    p->owner = m;
    p->what = what;
    p->tensor = tensor;
    p->E = c->experts / ranks.ep;
    p->most = c->offload;
    p->base = (real *)base;
    p->each = each;
    p->from = (size_t *)allocate((size_t)p->E + 1, sizeof(size_t));
    p->held = (int *)allocate(p->most, sizeof(int));
    for (int e = 0; e < p->E; e++) {
        p->from[e + 1] = p->from[e] + expert_size(c, &m->tensors[tensor], ranks.member * p->E + e);
    }
}

// Zeroed memory for one of the model's arrays, of `count` numbers, whose experts are in a file; until offload_free(). It is asked
// for in the order of WEIGHTS, GRADS, ...; last: the last one that the model will have.
real *offload_array(Model *m, int what, size_t count, int last) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    Mapped a = {m, NULL, 0, 0, 0, 0, -1, m->config.offload_cold};
    part_in_file(m, what, &a.first, &a.end);
    a.size = (count * sizeof(real) + page - 1) / page * page;
    a.base = (char *)map_memory(a.size);
    for (int i = 0; i < offloaded.array_count; i++) {
        const Mapped *before = &offloaded.arrays[i];
        if (before->owner == m) {
            a.file = before->file;
            a.at = before->at + before->end - before->first;
        }
    }
    a.file = a.file < 0 ? offload_file(m, what, last) : a.file;
    int shared = MAP_SHARED | MAP_FIXED;
    if (!a.base || mmap(a.base + a.first, a.end - a.first, PROT_READ | PROT_WRITE, shared, a.file, (off_t)a.at) == MAP_FAILED) {
        fail("--offload: cannot map %.1f MiB of experts: %s", (double)a.size / 1048576, strerror(errno));
    }
    if (offloaded.array_count == COUNT(offloaded.arrays)) {
        fail("--offload: there are more than %d arrays", COUNT(offloaded.arrays));
    }
    offloaded.arrays[offloaded.array_count++] = a;
    ask_large_pages(a.base, a.first);
    ask_single_pages(a.base + a.first, a.end - a.first);
    m->bytes[m->purpose] += (count - (m->tables - m->common)) * sizeof(real);
    for (int i = 0; i < m->tensor_count; i++) {
        if (m->tensors[i].of_experts) {
            add_pool(m, what, i, a.base + place_in_array(m, what, m->tensors[i].offset) * sizeof(real), sizeof(real));
            m->bytes[m->purpose] += offload_bytes(&m->config, &m->tensors[i], sizeof(real));
        }
    }
    return (real *)(void *)a.base;
}

// Gives back what offload_array() has given to this model.
void offload_free(const Model *m) {
    int pools = 0; // of other models
    int arrays = 0;
    for (int i = 0; i < offloaded.pool_count; i++) {
        Pool *p = &offloaded.pools[i];
        if (p->owner == m) {
            free(p->from);
            free(p->held);
        } else {
            offloaded.pools[pools++] = *p;
        }
    }
    for (int i = 0; i < offloaded.array_count; i++) {
        Mapped *a = &offloaded.arrays[i];
        if (a->owner == m) {
            munmap(a->base, a->size);
            if (a->at == 0) {
                close(a->file);
            }
        } else {
            offloaded.arrays[arrays++] = *a;
        }
    }
    offloaded.pool_count = pools;
    offloaded.array_count = arrays;
    if (!pools) {
        free(offloaded.pools);
        offloaded.pools = NULL;
    }
}

// Behind the table of memory: what a GPU has of the experts, and what the host has.
void print_offload_memory(void) {
    if (offloaded.on_host > 0) {
        printf("--offload: %.1f MiB of experts are in the host's memory; the table counts the %.1f MiB that the device may hold of "
               "them\n",
               offloaded.on_host / 1048576, offloaded.on_device / 1048576);
    }
}

// How often an expert was in memory when it was needed.
void print_offload(const Config *c, FILE *to) {
    if (c->offload && offloaded.asked > 0) {
        fflush(stdout); // a story ends there
        fprintf(to, "--offload %d: of %.0f times that an expert was needed, it was in memory %.0f times; %.1f MiB were fetched\n",
                c->offload, offloaded.asked, offloaded.asked - offloaded.fetched, offloaded.bytes / 1048576);
    }
}

#endif
