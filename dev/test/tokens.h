// A small tokenizer.json for tests. Gives: small_tokenizer. Needs: data/tokenizer.h.

#pragma once
#include "data/tokenizer.h"
#include "dev/test/common.h"

// Writes a tokenizer.json with <|endoftext|>, the 256 bytes and a few merges. The text `from` in it is replaced by `to`.
const char *small_tokenizer(const char *name, const char *from, const char *to) {
    static const char *const tokens[] = {"he", "ll", "hell", "hello", "\xc4\xa0h", "\xc4\xa0hello", "aa", "aaaa"};
    char *text = NULL;
    size_t size = 0;
    int32_t character[256];
    byte_alphabet(character);
    FILE *file = open_memstream(&text, &size);
    fprintf(file,
            "{\"version\": \"1.0\", \"added_tokens\": [{\"id\": 0, \"content\": \"<|endoftext|>\", \"lstrip\": false}],"
            "\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
            "\"use_regex\": true}, \"model\": {\"type\": \"BPE\", \"dropout\": null, \"byte_fallback\": false, "
            "\"vocab\": {\"<|endoftext|>\": 0");
    for (int i = 0; i < 264; i++) {
        char byte[5], *end = utf8_encode(byte, character[i % 256]);
        fprintf(file, ", ");
        json_write_string(file, i < 256 ? byte : tokens[i - 256],
                          i < 256 ? (size_t)(end - byte) : strlen(tokens[i - 256]));
        fprintf(file, ": %d", i + 1);
    }
    fprintf(file, "}, \"merges\": [\"h e\", \"l l\", \"he ll\", \"hell o\", \"\xc4\xa0 hello\", \"a a\", \"aa aa\"]}}");
    fclose(file);
    const char *found = from ? strstr(text, from) : NULL;
    assert_true(!from || found);
    char *changed = (char *)allocate(size + (to ? strlen(to) : 0) + 1, 1);
    sprintf(changed, "%.*s%s%s", found ? (int)(found - text) : (int)size, text, found ? to : "",
            found ? found + strlen(from) : "");
    const char *path = put_text(name, changed);
    free(changed);
    free(text);
    return path;
}
