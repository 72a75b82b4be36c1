// What a token file is, for the programs that write and read them.
// Gives: TOKENS_MAGIC, WIDE_MAGIC, token_bytes, CHECKSUM_MARK, REPLACED, open_folder, is_bin_name, compare_text, is_half_replaced,
// refuse_half_replaced. Needs: dev/util.h.
// Token files are llm.c's: a header of 256 int32 (magic, version, number of tokens), then the tokens as
// uint16, all in little-endian order. Where a vocabulary has more than 65,536 tokens they are uint32, behind the magic
// and version that llm.c has for Llama 3. In the part of the header that llm.c leaves zero, data/tokenize
// writes CHECKSUM_MARK and then, as two int32, the lower half first, the checksum (data/checksum.h) of
// the tokens' bytes.
//
// A folder of them has a tokenizer.json besides, and roles.h says what each file is for.
#pragma once
#include "../dev/util.h"

#define TOKENS_MAGIC  20240520 // version 1: uint16
#define WIDE_MAGIC    20240801 // version 7: uint32
#define CHECKSUM_MARK 0x6d757363 // "csum"

// The folder in such a folder where data/tokenize keeps the old files while new ones take their places.
#define REPLACED "replaced-tokens"

// The bytes of a token in a file whose header begins so; 0 if it is no token file.
int token_bytes(int32_t magic, int32_t version) {
    if (magic == WIDE_MAGIC && version == 7) {
        return 4;
    }
    return magic == TOKENS_MAGIC && version == 1 ? 2 : 0;
}

// Opens a folder, which has to be there.
DIR *open_folder(const char *dir) {
    DIR *folder = find_folder(dir);
    if (!folder) {
        fail("%s: cannot open the data folder: %s", dir, strerror(errno));
    }
    return folder;
}

int is_bin_name(const char *name) {
    size_t n = strlen(name);
    return n >= 4 && strcmp(name + n - 4, ".bin") == 0;
}

// For qsort: pointers to strings, in order of their bytes.
int compare_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Was data/tokenize killed while files in the folder `dir` took the places of others? Then it has no tokenizer.
int is_half_replaced(const char *dir) {
    return has_file(dir, REPLACED) && !has_file(dir, "tokenizer.json");
}

// Nobody shall train on a part of the files.
void refuse_half_replaced(const char *dir) {
    if (is_half_replaced(dir)) {
        fail("%s: data/tokenize was ended while it replaced the files there; run it again (the old ones are "
             "in %s/" REPLACED ")",
             dir, dir);
    }
}
