// What differs between compilers, C libraries and systems, in one place.
// Gives: large files on 32 bits; a refusal of compilers and flags that compute something else; file_time,
// ask_large_pages, ask_single_pages, forget_pages, fetch_pages, drop_from_cache, map_memory, open_unnamed, reserve_file, begin_again,
// name_of_processor. Needs: nothing. dev/util.h includes it before all else.
// The rest of the C sources is C11 and POSIX 2008 with GCC's and Clang's extensions, and a few calls that
// glibc, musl and macOS have besides: flock, getopt_long, memmem, TIOCGWINSZ. `make test_posix` holds them to it.
#pragma once
#if !defined(_GNU_SOURCE) && !defined(STRICT_POSIX)
#define _GNU_SOURCE
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#include <sys/sysctl.h>
#endif

// ---- what is refused, since it would compute something else

#if defined(__TINYC__) || !defined(__GNUC__)
#error "This needs GCC or Clang, for vector types and functions that run before main: make CC=gcc"
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "Not with -Ofast, -ffast-math and their parts: exp would be wrong by 41%, and NaN would go unnoticed. Build with -O3"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 // 16: only half precision is computed in another type
#error "Here float is computed in another type (x87?), and exp would be wrong. Build with -msse2 -mfpmath=sse"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Token files and checkpoints are written in this processor's order of bytes, which must be little-endian"
#endif
typedef char files_may_be_large[sizeof(off_t) >= 8 ? 1 : -1]; // a system header came before this file

// Marks a function that runs before main, and before those of the kind that come later in the program. Apple's linker
// keeps their order by itself.
#ifdef __APPLE__
#define BEFORE_ALL __attribute__((constructor))
#else
#define BEFORE_ALL __attribute__((constructor(101)))
#endif

#ifdef STRICT_POSIX
void *memmem(const void *text, size_t size, const void *part, size_t part_size);
#endif

// ---- what has another name elsewhere

// When a file was last written to.
struct timespec file_time(const struct stat *info) {
#ifdef __APPLE__
    return info->st_mtimespec;
#else
    return info->st_mtim;
#endif
}

// With large pages the processor finds the memory behind an address faster. The advice must begin at a page
// boundary, and a system without them ignores it.
void ask_large_pages(void *p, size_t size) {
#ifdef MADV_HUGEPAGE
    size_t page = 4096, skip = (page - (size_t)p % page) % page;
    if (size >= 1 << 22) {
        madvise((char *)p + skip, (size - skip) / page * page, MADV_HUGEPAGE);
    }
#else
    (void)p;
    (void)size;
#endif
}

// Of a mapped file the system shall bring the pages that are asked for, and no others: it neither reads ahead nor makes large
// pages, which Linux maps as a whole. Who wants pages soon asks by fetch_pages().
void ask_single_pages(void *p, size_t size) {
    posix_madvise(p, size, POSIX_MADV_RANDOM);
}

// Pages of a mapped file that are not needed now need no memory; what was changed in them goes to the file. Whoever reads them
// again gets them from there.
void forget_pages(const void *p, size_t size) {
#ifdef MADV_DONTNEED
    size_t page = (size_t)sysconf(_SC_PAGESIZE), before = (size_t)p % page;
    if (size >= 16384) {
        madvise((char *)p - before, size + before, MADV_DONTNEED);
    }
#else
    (void)p;
    (void)size;
#endif
}

// Pages of a mapped file that will be needed soon: the system begins to read them, and does not wait for them.
void fetch_pages(const void *p, size_t size) {
    size_t before = (size_t)p % (size_t)sysconf(_SC_PAGESIZE);
    posix_madvise((char *)p - before, size + before, POSIX_MADV_WILLNEED);
}

// The system writes this part of an open file to the disk, if it was changed, and keeps no copy of it in its cache. Pages that are
// mapped stay.
void drop_from_cache(int file, size_t from, size_t size) {
#ifdef SYNC_FILE_RANGE_WRITE
    sync_file_range(file, (off_t)from, (off_t)size,
                    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
#else
    fsync(file);
#endif
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(file, (off_t)from, (off_t)size, POSIX_FADV_DONTNEED);
#else
    (void)from;
    (void)size;
#endif
}

// Zeroed memory at a multiple of a page, of which pages can be mapped to something else; for munmap(). NULL: there is none.
void *map_memory(size_t size) {
#ifdef MAP_ANONYMOUS
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
#else
    int zero = open("/dev/zero", O_RDWR);
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0);
    close(zero);
#endif
    return p == MAP_FAILED ? NULL : p;
}

// A new file in this folder that has no name, so that it goes when it is closed, or with the process. -1: errno says why there is
// none. Where the system or the file system has no such files, it has a name for a moment.
int open_unnamed(const char *dir) {
#ifdef O_TMPFILE
    int unnamed = open(dir, O_TMPFILE | O_RDWR | O_EXCL, 0600);
    if (unnamed >= 0) {
        return unnamed;
    }
#endif
    char path[4300];
    snprintf(path, sizeof(path), "%s/offload-XXXXXX", dir);
    int file = mkstemp(path);
    if (file >= 0) {
        unlink(path);
    }
    return file;
}

// Makes an open file so many bytes long, and has the disk keep room for all of them. Returns 0, or what errno would say.
int reserve_file(int file, size_t size) {
#ifdef __APPLE__ // which keeps no room
    return ftruncate(file, (off_t)size) == 0 ? 0 : errno;
#else
    return posix_fallocate(file, 0, (off_t)size);
#endif
}

// Starts this program once more in this process, with another environment. It returns where that is impossible.
// `self` is where Linux has the program, whatever became of its file; elsewhere the system or argv[0] tells.
void begin_again(const char *self, char **argv) {
    execv(self, argv);
#ifdef __APPLE__
    char path[4096];
    uint32_t size = sizeof(path);
    if (_NSGetExecutablePath(path, &size) == 0) {
        execv(path, argv);
    }
#endif
    if (argv[0]) {
        execvp(argv[0], argv);
    }
}

// The processor's name, where a call tells it; else name stays as it is, and /proc/cpuinfo may have it.
void name_of_processor(char name[128]) {
#ifdef __APPLE__
    size_t size = 128;
    sysctlbyname("machdep.cpu.brand_string", name, &size, NULL, 0);
#else
    (void)name;
#endif
}
