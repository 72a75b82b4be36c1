// count.h: counts what kernels do. CUDACPU_COUNT=file writes a table at the program's end: for each kernel, product of
// cuBLAS, copy and memset its launches and the bytes of device memory that it read and wrote.
//
// Bytes are different ones: a number that a launch reads many times counts once. So they are the least that has to move
// between memory and chip if nothing stays in a cache from one kernel to the next; what is read and then written counts
// as both. Numbers need not be neighbours to count exactly: a bit stands for each byte.
//
// Bytes need a build of their own (make count_emulated): g++ -fsanitize=thread -DCUDACPU_BYTES -c, linked without that
// option. The compiler then announces each access by the calls with which ThreadSanitizer would look for races; here,
// they set bits. Other builds count launches alone.

#ifndef CUDACPU_COUNT_H
#define CUDACPU_COUNT_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <sys/mman.h>
#include <vector>

namespace cudacpu {

struct Count {
    uint64_t launches = 0, read = 0, written = 0;
};
inline std::map<std::string, Count> &counts = *new std::map<std::string, Count>; // never freed: used at exit

inline const char *count_file() {
    static const char *const file = getenv("CUDACPU_COUNT");
    return file;
}

inline void write_counts() {
    FILE *f = fopen(count_file(), "w");
    if (!f) {
        perror(count_file());
        return;
    }
    fprintf(f, "launches\tread\twritten\tkernel\n");
    for (auto &[name, c] : counts) {
#ifdef CUDACPU_BYTES
        fprintf(f, "%llu\t%llu\t%llu\t%s\n", (unsigned long long)c.launches, (unsigned long long)c.read,
                (unsigned long long)c.written, name.c_str());
#else
        fprintf(f, "%llu\t-\t-\t%s\n", (unsigned long long)c.launches, name.c_str());
#endif
    }
    fclose(f);
}

inline void count(const std::string &name, uint64_t read, uint64_t written) {
    static const bool at_exit = atexit(write_counts) == 0; // once
    Count &c = counts[name];
    c.launches += at_exit;
    c.read += read;
    c.written += written;
}

#ifdef CUDACPU_BYTES

const size_t COUNTED = (size_t)64 << 30; // addresses for device memory, which are given out once
#define CUDACPU_UNNOTED __attribute__((no_sanitize_thread))

CUDACPU_UNNOTED inline char *address_room(size_t n) {
    void *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : (char *)p;
}
inline char *const counted_memory = address_room(COUNTED);
inline size_t counted_used;
inline bool counting; // while a grid runs

struct Touched { // which bytes
    uint64_t *bits = (uint64_t *)(void *)address_room(COUNTED / 8);
    std::vector<size_t> words; // those that are not 0

    CUDACPU_UNNOTED void add(const void *p, size_t n) {
        size_t at = (size_t)((const char *)p - counted_memory);
        if (at >= COUNTED || !counting)
            return;
        while (n > 0) {
            size_t word = at / 64, bit = at % 64, some = n < 64 - bit ? n : 64 - bit;
            if (bits[word] == 0)
                words.push_back(word);
            bits[word] |= ~(uint64_t)0 >> (64 - some) << bit;
            at += some;
            n -= some;
        }
    }
    CUDACPU_UNNOTED uint64_t take() { // how many, and forgets them
        uint64_t n = 0;
        for (size_t word : words) {
            n += (uint64_t)__builtin_popcountll(bits[word]);
            bits[word] = 0;
        }
        words.clear();
        return n;
    }
};
inline Touched were_read, were_written;

inline char *take_counted(size_t n) { // aligned to 256; nullptr: no more
    size_t room = (n + 4095) / 4096 * 4096;
    if (!counted_memory || room > COUNTED - counted_used)
        return nullptr;
    counted_used += room;
    return counted_memory + counted_used - room;
}
inline void give_counted_back(char *p, size_t n) {
    madvise(p, (n + 4095) / 4096 * 4096, MADV_DONTNEED);
}

struct CountedGrid { // while it lives, accesses are counted
    const char *name;
    CountedGrid(const char *name) : name(name) {
        counting = count_file() != nullptr;
    }
    ~CountedGrid() {
        counting = false;
        if (count_file()) {
            uint64_t read = were_read.take(), written = were_written.take();
            count(name, read, written);
        }
    }
};

#else

struct CountedGrid {
    CountedGrid(const char *name) {
        if (count_file())
            count(name, 0, 0);
    }
};

#endif
} // namespace cudacpu

#ifdef CUDACPU_BYTES

#define CUDACPU_NOTE extern "C" __attribute__((used, no_sanitize_thread)) inline void
#define CUDACPU_NOTES(n)                                                                                               \
    CUDACPU_NOTE __tsan_read##n(void *p) {                                                                             \
        cudacpu::were_read.add(p, n);                                                                                  \
    }                                                                                                                  \
    CUDACPU_NOTE __tsan_write##n(void *p) {                                                                            \
        cudacpu::were_written.add(p, n);                                                                               \
    }                                                                                                                  \
    CUDACPU_NOTE __tsan_unaligned_read##n(void *p) {                                                                   \
        cudacpu::were_read.add(p, n);                                                                                  \
    }                                                                                                                  \
    CUDACPU_NOTE __tsan_unaligned_write##n(void *p) {                                                                  \
        cudacpu::were_written.add(p, n);                                                                               \
    }
CUDACPU_NOTES(1)
CUDACPU_NOTES(2)
CUDACPU_NOTES(4)
CUDACPU_NOTES(8)
CUDACPU_NOTES(16)
CUDACPU_NOTE __tsan_read_range(void *p, long n) {
    cudacpu::were_read.add(p, (size_t)n);
}
CUDACPU_NOTE __tsan_write_range(void *p, long n) {
    cudacpu::were_written.add(p, (size_t)n);
}
CUDACPU_NOTE __tsan_vptr_update(void *, void *) {
}
CUDACPU_NOTE __tsan_init() {
}
CUDACPU_NOTE __tsan_func_entry(void *) {
}
CUDACPU_NOTE __tsan_func_exit(void *) {
}

// The compiler's names for atomics, which read and write. The order in memory is always the strictest.
#undef CUDACPU_NOTE
#define CUDACPU_NOTE extern "C" __attribute__((used, no_sanitize_thread)) inline
#define CUDACPU_BOTH(p)                                                                                                \
    cudacpu::were_read.add((const void *)(p), sizeof(*(p)));                                                           \
    cudacpu::were_written.add((const void *)(p), sizeof(*(p)))
#define CUDACPU_FETCH(bits, T, name)                                                                                   \
    CUDACPU_NOTE T __tsan_atomic##bits##_fetch_##name(volatile void *at, T x, int) {                                   \
        volatile T *p = (volatile T *)at;                                                                              \
        CUDACPU_BOTH(p);                                                                                               \
        return __atomic_fetch_##name(p, x, __ATOMIC_SEQ_CST);                                                          \
    }
#define CUDACPU_ATOMIC(bits, T)                                                                                        \
    CUDACPU_FETCH(bits, T, add)                                                                                        \
    CUDACPU_FETCH(bits, T, sub)                                                                                        \
    CUDACPU_FETCH(bits, T, or)                                                                                         \
    CUDACPU_FETCH(bits, T, and)                                                                                        \
    CUDACPU_FETCH(bits, T, xor)                                                                                        \
    CUDACPU_NOTE T __tsan_atomic##bits##_load(const volatile void *at, int) {                                          \
        const volatile T *p = (const volatile T *)at;                                                                  \
        cudacpu::were_read.add((const void *)p, sizeof(T));                                                            \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    CUDACPU_NOTE void __tsan_atomic##bits##_store(volatile void *at, T x, int) {                                       \
        volatile T *p = (volatile T *)at;                                                                              \
        cudacpu::were_written.add((const void *)p, sizeof(T));                                                         \
        __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                                      \
    }                                                                                                                  \
    CUDACPU_NOTE T __tsan_atomic##bits##_exchange(volatile void *at, T x, int) {                                       \
        volatile T *p = (volatile T *)at;                                                                              \
        CUDACPU_BOTH(p);                                                                                               \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    CUDACPU_NOTE bool __tsan_atomic##bits##_compare_exchange_strong(volatile void *at, void *expected, T x, int,       \
                                                                    int) {                                             \
        volatile T *p = (volatile T *)at;                                                                              \
        CUDACPU_BOTH(p);                                                                                               \
        return __atomic_compare_exchange_n(p, (T *)expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
    }                                                                                                                  \
    CUDACPU_NOTE bool __tsan_atomic##bits##_compare_exchange_weak(volatile void *at, void *expected, T x, int, int) {  \
        volatile T *p = (volatile T *)at;                                                                              \
        CUDACPU_BOTH(p);                                                                                               \
        return __atomic_compare_exchange_n(p, (T *)expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
    }
CUDACPU_ATOMIC(8, unsigned char)
CUDACPU_ATOMIC(32, unsigned)
CUDACPU_ATOMIC(64, unsigned long)
CUDACPU_NOTE void __tsan_atomic_thread_fence(int) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
CUDACPU_NOTE void __tsan_atomic_signal_fence(int) {
}

#endif
#endif
