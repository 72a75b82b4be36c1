// A checksum, by which damaged files are found: a 64-bit hash, taken as fast as memory gives the bytes.
// Gives: Checksum, checksum_begin, checksum_add, checksum_end, checksum_of. Needs: dev/util.h.
//
// Eight numbers of 64 bits each take every eighth word of the bytes. A step (xor with the word, times an odd number, xor
// with the own upper half) can be undone, so two texts that differ in one word never have the same checksum; others
// have it by a chance of 2^-64.
#pragma once
#include "../dev/util.h"

typedef struct Checksum { // of the bytes that came so far
    uint64_t lane[8];
    unsigned char block[64]; // bytes that do not fill eight words yet
    size_t size;             // bytes in all
} Checksum;

Checksum checksum_begin(void) {
    Checksum c = {{1, 2, 3, 4, 5, 6, 7, 8}, {0}, 0};
    return c;
}

// Takes `blocks` blocks of 64 bytes.
void checksum_blocks(Checksum *c, const unsigned char *bytes, size_t blocks) {
    uint64_t lane[8], word[8];
    memcpy(lane, c->lane, sizeof(lane));
    for (size_t i = 0; i < blocks; i++) {
        memcpy(word, bytes + 64 * i, sizeof(word));
        for (int k = 0; k < 8; k++) {
            uint64_t next = (lane[k] ^ word[k]) * 0x9e3779b97f4a7c15ull;
            __asm__("" : "+r"(next)); // keeps the compiler from vectors, which multiply 64 bits at half the speed
            lane[k] = next ^ next >> 32;
        }
    }
    memcpy(c->lane, lane, sizeof(lane));
}

// Adds n bytes behind those that came before: however they are cut into pieces, the checksum is the same.
void checksum_add(Checksum *c, const void *bytes, size_t n) {
    const unsigned char *from = (const unsigned char *)bytes;
    size_t held = c->size % 64;
    c->size += n;
    if (held > 0) {
        size_t taken = n < 64 - held ? n : 64 - held;
        memcpy(c->block + held, from, taken);
        from += taken;
        n -= taken;
        if (held + taken < 64) {
            return;
        }
        checksum_blocks(c, c->block, 1);
    }
    checksum_blocks(c, from, n / 64);
    memcpy(c->block, from + n / 64 * 64, n % 64);
}

// The checksum of all that was added; never 0.
uint64_t checksum_end(const Checksum *c) {
    Checksum last = *c;
    size_t held = c->size % 64;
    if (held > 0) {
        memset(last.block + held, 0, 64 - held);
        checksum_blocks(&last, last.block, 1);
    }
    uint64_t h = hash64(c->size);
    for (int k = 0; k < 8; k++) {
        h = hash64(h ^ last.lane[k]);
    }
    return h ? h : 1;
}

uint64_t checksum_of(const void *bytes, size_t n) {
    Checksum c = checksum_begin();
    checksum_add(&c, bytes, n);
    return checksum_end(&c);
}
