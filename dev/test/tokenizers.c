// Tokenizers of other kinds than GPT-2's. The words and the ids that are expected here are those of PyPI tokenizers 0.23.3
// for the same tokenizer.json; dev/test/check_tokenizer.py compares more of them.

#include "data/tokenizer.h"
#include "dev/test/tokens.h"

// ---- cutting into words

typedef struct WordCase {
    Cut first, second;
    const char *cut; // the words, with | between them
} WordCase;

static void assert_words(const unsigned char *class_of, const WordCase *w) {
    char text[256] = "", cut[512] = "";
    for (const char *s = w->cut; *s; s++) {
        if (*s != '|') {
            strncat(text, s, 1);
        }
    }
    size_t n = strlen(text), outer, inner;
    for (size_t at = 0; at < n; at += outer) {
        outer = next_piece(class_of, w->first, text + at, n - at);
        for (size_t i = 0; i < outer; i += inner) {
            inner = next_piece(class_of, w->second, text + at + i, outer - i);
            snprintf(cut + strlen(cut), sizeof(cut) - strlen(cut), "%s%.*s", at + i ? "|" : "", (int)inner, text + at + i);
        }
    }
    if (strcmp(cut, w->cut) != 0) {
        fail_msg("rules %d and %d: expected \"%s\", got \"%s\"", (int)w->first, (int)w->second, w->cut, cut);
    }
}

void test_tokenizers_words(void **state) {
    (void)state;
    static const WordCase words[] = {
        {CUT_LLAMA3, CUT_NOTHING, "Hello| world|!!"},
        {CUT_LLAMA3, CUT_NOTHING, "It|'s| WE|'LL| I|'m| they|'VE| '|\xc5\xbf| '|x| don|'t"},
        {CUT_LLAMA3, CUT_NOTHING, "123|456|7| x|12|y| |\xc2\xb2\xc2\xbd"},
        {CUT_LLAMA3, CUT_NOTHING, "a|!b| !|c| | !!\n\n\n|d"},
        {CUT_LLAMA3, CUT_NOTHING, "  \n| | x| \t| y|  \r\n| z|   "},
        {CUT_LLAMA3, CUT_NOTHING, "\ttab|,|\xc2\xa0nbsp|\xe3\x80\x80x"},
        {CUT_LLAMA3, CUT_NOTHING, "\xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82\xe6\x96\x87\xe5\xad\x97| \xd9\x85\xd8\xb1\xd8\xad\xd8\xa8\xd8\xa7|\xd9\xa3\xd9\xa4\xd9\xa5|\xd9\xa6"},
        {CUT_LLAMA3, CUT_NOTHING, "e|\xcc\x81| \xf0\x9f\x99\x82\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd| a"},
        {CUT_LLAMA3, CUT_NOTHING, "x|=|12|.|50|;\n|\t|\ty|++;\n"},
        {CUT_LLAMA3, CUT_NOTHING, " \n \n"},
        {CUT_LLAMA3, CUT_NOTHING, "x|'\xc5\xbf|a| x|'S|a"},
        {CUT_QWEN2, CUT_NOTHING, "Hello| world|!!"},
        {CUT_QWEN2, CUT_NOTHING, "It|'s| WE|'LL| I|'m| they|'VE| '|\xc5\xbf| '|x| don|'t"},
        {CUT_QWEN2, CUT_NOTHING, "1|2|3|4|5|6|7| x|1|2|y| |\xc2\xb2|\xc2\xbd"},
        {CUT_QWEN2, CUT_NOTHING, "a|!b| !|c| | !!\n\n\n|d"},
        {CUT_QWEN2, CUT_NOTHING, "  \n| | x| \t| y|  \r\n| z|   "},
        {CUT_QWEN2, CUT_NOTHING, "\ttab|,|\xc2\xa0nbsp|\xe3\x80\x80x"},
        {CUT_QWEN2, CUT_NOTHING, "\xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82\xe6\x96\x87\xe5\xad\x97| \xd9\x85\xd8\xb1\xd8\xad\xd8\xa8\xd8\xa7|\xd9\xa3|\xd9\xa4|\xd9\xa5|\xd9\xa6"},
        {CUT_QWEN2, CUT_NOTHING, "e|\xcc\x81| \xf0\x9f\x99\x82\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd| a"},
        {CUT_QWEN2, CUT_NOTHING, "x|=|1|2|.|5|0|;\n|\t|\ty|++;\n"},
        {CUT_QWEN2, CUT_NOTHING, " \n \n"},
        {CUT_DIGITS, CUT_GPT2, "Hello| world|!!"},
        {CUT_DIGITS, CUT_GPT2, "It|'s| WE|'|LL| I|'m| they|'|VE| '|\xc5\xbf| '|x| don|'t"},
        {CUT_DIGITS, CUT_GPT2, "1|2|3|4|5|6|7| x|1|2|y| |\xc2\xb2|\xc2\xbd"},
        {CUT_DIGITS, CUT_GPT2, "a|!|b| !|c| | !!|\n\n|\n|d"},
        {CUT_DIGITS, CUT_GPT2, "  \n | x| \t| y|  \r\n| z|   "},
        {CUT_DIGITS, CUT_GPT2, "\t|tab|,|\xc2\xa0|nbsp|\xe3\x80\x80|x"},
        {CUT_DIGITS, CUT_GPT2, "\xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82|\xe6\x96\x87\xe5\xad\x97| \xd9\x85\xd8\xb1\xd8\xad\xd8\xa8\xd8\xa7|\xd9\xa3|\xd9\xa4|\xd9\xa5|\xd9\xa6"},
        {CUT_DIGITS, CUT_GPT2, "e|\xcc\x81| \xf0\x9f\x99\x82\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd| a"},
        {CUT_DIGITS, CUT_GPT2, "x|=|1|2|.|5|0|;|\n\t|\t|y|++;|\n"},
        {CUT_DIGITS, CUT_GPT2, " \n \n"},
        {CUT_DIGITS, CUT_GPT2, "a|\xf0\x91\xb7\xa3|\xf0\x96\xbf\xb4|!\xf0\x96\xbf\xb7"},
        {CUT_NUMBERS, CUT_GPT2, "1234567| x|12|y| |\xc2\xb2\xc2\xbd"},
        {CUT_NUMBERS, CUT_GPT2, "\xe4\xb8\xad\xe6\x96\x87|\xe3\x80\x82|\xe6\x96\x87\xe5\xad\x97| \xd9\x85\xd8\xb1\xd8\xad\xd8\xa8\xd8\xa7|\xd9\xa3\xd9\xa4\xd9\xa5\xd9\xa6"},
        {CUT_NUMBERS, CUT_GPT2, "x|=|12|.|50|;|\n\t|\t|y|++;|\n"},
    };
    unsigned char *class_of = character_classes();
    for (int i = 0; i < COUNT(words); i++) {
        assert_words(class_of, &words[i]);
    }
    free(class_of);
}

// A regular expression is known by its text.
void test_tokenizers_patterns(void **state) {
    (void)state;
    static const char llama[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
                                "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    static const char qwen[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
                               "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    int found;
    assert_int_equal(cut_of_pattern(llama, &found), CUT_LLAMA3);
    assert_true(found);
    assert_int_equal(cut_of_pattern(qwen, &found), CUT_QWEN2);
    assert_true(found);
    cut_of_pattern("\\w+|\\s", &found);
    assert_false(found);
}

// ---- ids

#define META(scheme, split) \
    "{\"type\": \"Metaspace\", \"replacement\": \"\xe2\x96\x81\", \"prepend_scheme\": \"" scheme "\", \"split\": " split "}"
#define REPLACE      "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\xe2\x96\x81\"}"
#define PREPEND      "{\"type\": \"Prepend\", \"prepend\": \"\xe2\x96\x81\"}"
#define SENTENCE     "{\"type\": \"Sequence\", \"normalizers\": [" PREPEND ", " REPLACE "]}"
#define NFC_SENTENCE "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}, " PREPEND ", " REPLACE "]}"
#define ADDED_TOKENS(id, text, flags) "{\"id\": " id ", \"content\": \"" text "\", \"single_word\": false, " flags "}"
#define PLAIN "\"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true"

typedef struct IdCase {
    const char *normalizer, *words, *added; // of the file; added: NULL or what comes behind </s>
    const char *ignore_merges;
    const char *text, *ids;
} IdCase;

// A tokenizer of characters, as Llama 2's and Mistral's are: <unk> <s> </s>, the bytes, and a few more.
static const char *sentence_tokenizer(const char *name, const IdCase *c) {
    static const char *const tokens[] = {"\xe2\x96\x81", "h", "e", "l", "o", "a", "he", "ll", "llo", "hello", "\xe2\x96\x81hello",
                                         "\xe2\x96\x81\xe2\x96\x81", ("\xe2\x96\x81" "a"), "\xc3\xa9", "\xe2\x96\x81h"};
    char *text = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&text, &size);
    fprintf(file,
            "{\"version\": \"1.0\", \"added_tokens\": [" ADDED_TOKENS("0", "<unk>", PLAIN) ", " ADDED_TOKENS("1", "<s>", PLAIN) ", "
            ADDED_TOKENS("2", "</s>", PLAIN) "%s%s], \"normalizer\": %s, \"pre_tokenizer\": %s, \"post_processor\": {\"type\": "
            "\"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}}, {\"Sequence\": "
            "{\"id\": \"A\", \"type_id\": 0}}], \"pair\": [{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}, {\"Sequence\": "
            "{\"id\": \"B\", \"type_id\": 0}}], \"special_tokens\": {\"<s>\": {\"id\": \"<s>\", \"ids\": [1], \"tokens\": "
            "[\"<s>\"]}}}, \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Fuse\"}, {\"type\": \"Strip\", "
            "\"content\": \" \", \"start\": 1, \"stop\": 0}]}, \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": "
            "\"<unk>\", \"fuse_unk\": true, \"byte_fallback\": true, \"ignore_merges\": %s, \"vocab\": {\"<unk>\": 0, "
            "\"<s>\": 1, \"</s>\": 2",
            c->added ? ", " : "", c->added ? c->added : "", c->normalizer, c->words, c->ignore_merges);
    for (int b = 0; b < 256; b++) {
        fprintf(file, ", \"<0x%02X>\": %d", b, 3 + b);
    }
    for (int i = 0; i < COUNT(tokens); i++) {
        fprintf(file, ", \"%s\": %d", tokens[i], 259 + i);
    }
    fprintf(file, "}, \"merges\": [\"h e\", \"l l\", \"ll o\", [\"he\", \"llo\"], \"\xe2\x96\x81 hello\", \"\xe2\x96\x81 \xe2\x96\x81\", "
                  "\"\xe2\x96\x81 a\"]}}");
    fclose(file);
    put_text("tokenizer_config.json", "{\"eos_token\": {\"content\": \"</s>\"}}");
    const char *path = put_text(name, text);
    free(text);
    return path;
}

static void assert_encoded(Tokenizer *t, const char *text, const char *expected) {
    int *ids = (int *)allocate(tokenizer_bound(t, strlen(text)), sizeof(int));
    char list[1024] = "";
    size_t n = tokenizer_encode(t, text, strlen(text), ids);
    assert_true(n <= tokenizer_bound(t, strlen(text)));
    for (size_t i = 0; i < n; i++) {
        snprintf(list + strlen(list), sizeof(list) - strlen(list), i ? " %d" : "%d", ids[i]);
    }
    free(ids);
    if (strcmp(list, expected) != 0) {
        fail_msg("\"%s\": %s, expected %s", text, list, expected);
    }
}

// The most ids that a text can have for its length: a space, with a prefix, where "▁" is no token but three bytes.
void test_tokenizers_bound(void **state) {
    (void)state;
    static const IdCase c = {SENTENCE, "null", NULL, "false", "", ""};
    Tokenizer *t = tokenizer_load(sentence_tokenizer("tokenizer.json", &c));
    *table_put(&t->ids, UNDERSCORE, strlen(UNDERSCORE)) = 0;
    assert_encoded(t, " ", "229 153 132 229 153 132");
    assert_encoded(t, " </s> ", "229 153 132 229 153 132 2 229 153 132 229 153 132");
    tokenizer_free(t);
}

void test_tokenizers_fallback(void **state) {
    (void)state;
    static const char mask[] = ADDED_TOKENS("274", "<x>", "\"lstrip\": true, \"rstrip\": true, \"normalized\": false, \"special\": true");
    static const char norm[] = ADDED_TOKENS("274", "a hello", "\"lstrip\": false, \"rstrip\": false, \"normalized\": true, \"special\": false");
    static const char first[] = META("first", "false"), always[] = META("always", "true"), never[] = META("never", "false");
    static const char old[] = "{\"type\": \"Metaspace\", \"replacement\": \"\xe2\x96\x81\", \"add_prefix_space\": true}";
    static const IdCase cases[] = {
        {SENTENCE, "null", NULL, "false", "hello hello", "269 269"},
        {SENTENCE, "null", NULL, "false", "  hello", "270 269"},
        {SENTENCE, "null", NULL, "false", "h\xc3\xa9\xe4\xb8\xad\n", "259 260 272 231 187 176 13"},
        {SENTENCE, "null", NULL, "false", "hello</s>hello", "269 2 269"},
        {SENTENCE, "null", NULL, "false", "", ""},
        {SENTENCE, "null", NULL, "false", "</s>", "2"},
        {SENTENCE, "null", mask, "false", "hello  <x> hello <x><x> a", "269 274 269 274 274 271"},
        {SENTENCE, "null", mask, "false", " <x> ", "274"},
        {SENTENCE, "null", norm, "false", "a hello a hello", "274 274"},
        {REPLACE, "null", NULL, "false", "hello hello", "268 269"},
        {REPLACE, "null", NULL, "false", " hello", "269"},
        {NFC_SENTENCE, "null", NULL, "false", "he\xcc\x81 \xe1\x84\x80\xe1\x85\xa1", "259 260 272 259 237 179 131"},
        {"null", first, NULL, "false", "hello  hello", "269 259 269"},
        {"null", first, NULL, "false", "</s>hello", "2 268"},
        {"null", first, NULL, "false", " hello", "269"},
        {"null", first, NULL, "false", "\xe2\x96\x81hello", "269"},
        {"null", always, NULL, "false", "hello  hello", "269 259 269"},
        {"null", always, NULL, "false", "</s>hello", "2 269"},
        {"null", always, NULL, "false", " hello", "269"},
        {"null", never, NULL, "false", "hello hello", "268 269"},
        {"null", old, NULL, "false", "hello  hello", "269 259 269"},
        {"null", always, norm, "false", "a hello", "274"},
        {"null", always, NULL, "true", "h he hello", "273 259 265 269"},
        {"null", never, NULL, "true", " h", "273"},
        {"null", never, NULL, "true", "h h", "260 259 260"},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        Tokenizer *t = tokenizer_load(sentence_tokenizer("tokenizer.json", &cases[i]));
        assert_encoded(t, cases[i].text, cases[i].ids);
        assert_int_equal(t->eot, 2);
        assert_int_equal(t->bos, 1);
        assert_int_equal(t->unk, 0);
        assert_int_equal(t->type[3], TOKEN_BYTE);
        assert_int_equal(t->type[2], TOKEN_CONTROL);
        tokenizer_free(t);
    }
}

// The same for bytes: GPT-2's alphabet with other steps before it.
void test_tokenizers_byte_level(void **state) {
    (void)state;
    static const char prefix[] = "\"add_prefix_space\": true", no_prefix[] = "\"add_prefix_space\": false";
    static const char nfc[] = "\"normalizer\": {\"type\": \"NFC\"}", null[] = "\"normalizer\": null";
    static const char regex[] = "\"use_regex\": true", whole[] = "\"use_regex\": false";
    static const char model[] = "\"dropout\": null", ignore[] = "\"dropout\": null, \"ignore_merges\": true";
    static const char *const cases[][4] = {
        {no_prefix, prefix, "hello<|endoftext|>hello<|endoftext|> hello", "262 0 262 0 262"},
        {null, nfc, "e\xcc\x81x\xe2\x84\xab", "196 170 121 196 134"},
        {null, nfc, "hello", "260"},
        {null, nfc, "\xe0\xa5\x98", "225 165 150 225 165 189"},
        {regex, whole, "a hello", "98 262"},
        {model, ignore, " h ha", "261 33 105 98"},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        Tokenizer *t = tokenizer_load(small_tokenizer("t.json", cases[i][0], cases[i][1]));
        assert_encoded(t, cases[i][2], cases[i][3]);
        tokenizer_free(t);
    }
}

// NFC by its definition: Hangul, marks in another order, a mark that is blocked, bytes that are no UTF-8.
void test_tokenizers_nfc(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab\xea\xb0\x80\xe1\x86\xa8", "\xed\x95\x9c\xea\xb0\x81"},
        {"a\xcc\x81\xcc\xa3", "\xe1\xba\xa1\xcc\x81"}, // the dot below comes first
        {"a\xcc\xb4\xcc\x81", "\xc3\xa1\xcc\xb4"},
        {"a\xcc\x80\xcc\x81", "\xc3\xa0\xcc\x81"},      // the second accent is blocked by the first
        {"a\xcc\x8d\xcc\x81", "a\xcc\x8d\xcc\x81"},      // blocked by one that has no common character with the letter
        {"\xcc\x81" "a", "\xcc\x81" "a"},
        {"\xff\xcc\x81" "e\xcc\x81\xc3", "\xff\xcc\x81\xc3\xa9\xc3"},
    };
    Nfc *nfc = nfc_load();
    Bytes out = {NULL, 0, 0};
    for (int i = 0; i < COUNT(cases); i++) {
        const char *from = cases[i][0], *to = cases[i][1];
        int changed = nfc_text(nfc, &out, from, strlen(from));
        size_t n = changed ? out.count : strlen(from);
        if (n != strlen(to) || memcmp(changed ? out.list : from, to, n) != 0) {
            fail_msg("case %d: \"%.*s\", expected \"%s\"", i, (int)n, changed ? out.list : from, to);
        }
        assert_false(nfc_text(nfc, &out, "caf\xc3\xa9 \xed\x95\x9c", 9));
    }
    free(out.list);
    nfc_free(nfc);
}

// What is decoded is the text, but for the first space.
void test_tokenizers_fallback_text(void **state) {
    (void)state;
    const IdCase plain = {SENTENCE, "null", NULL, "false", "", ""};
    const char *const text = "hello \xe4\xb8\xad  a\xff\n h\xc3\xa9";
    Tokenizer *t = tokenizer_load(sentence_tokenizer("tokenizer.json", &plain));
    int *ids = (int *)allocate(tokenizer_bound(t, strlen(text)), sizeof(int)), length;
    size_t count = tokenizer_encode(t, text, strlen(text), ids), n = 0;
    char back[256];
    for (size_t i = 0; i < count; i++) {
        const char *piece = tokenizer_text(t, ids[i], &length);
        memcpy(back + n, piece, (size_t)length);
        n += (size_t)length;
    }
    assert_true(t->shape.strip);
    assert_int_equal(n, strlen(text) + 1);
    assert_int_equal(back[0], ' ');
    assert_memory_equal(back + 1, text, strlen(text));
    assert_string_equal(t->raw[3 + 10], "<0x0A>");
    assert_string_equal(tokenizer_pre(t), "default");
    free(ids);
    tokenizer_free(t);
}

// A text that no merge can cut is not looked at again and again, and one with a cut is the same with and without.
void test_tokenizers_fallback_long(void **state) {
    (void)state;
    const IdCase plain = {SENTENCE, "null", NULL, "false", "", ""};
    Tokenizer *t = tokenizer_load(sentence_tokenizer("tokenizer.json", &plain));
    size_t n = is_slow() ? 20000 : 200000;
    char *text = (char *)allocate(n + 1, 1);
    for (size_t i = 0; i < n; i++) {
        text[i] = "helo a \n"[hash64(i) % 8];
    }
    int *cut = (int *)allocate(tokenizer_bound(t, n), sizeof(int)), *whole = (int *)allocate(tokenizer_bound(t, n), sizeof(int));
    size_t count = tokenizer_encode(t, text, n, cut);
    memset(t->joins, 1, sizeof(t->joins));
    assert_int_equal(tokenizer_encode(t, text, n, whole), count);
    assert_memory_equal(cut, whole, count * sizeof(int));
    free(text);
    free(cut);
    free(whole);
    tokenizer_free(t);
}

// Which token ends a text: the files beside the tokenizer say it, the first that names one.
void test_tokenizers_end_of_text(void **state) {
    (void)state;
    static const struct {
        const char *file, *text;
        int eot;
    } cases[] = {
        {"config.json", "{\"eos_token_id\": 5}", 5},
        {"config.json", "{\"eos_token_id\": 999}", 0}, // no token of this tokenizer
        {"generation_config.json", "{\"eos_token_id\": [7, 5]}", 7},
        {"tokenizer_config.json", "{\"eos_token\": null}", 7},
        {"tokenizer_config.json", "{\"eos_token\": {\"content\": \"hello\"}}", 260},
        {"tokenizer_config.json", "{\"eos_token\": \"hell\"}", 259},
    };
    mkdir(scratch_file("ends"), 0777);
    for (int i = 0; i < COUNT(cases); i++) {
        char name[64];
        snprintf(name, sizeof(name), "ends/%s", cases[i].file);
        put_text(name, cases[i].text);
        small_tokenizer("ends/tokenizer.json", NULL, NULL);
        Tokenizer *t = tokenizer_load(scratch_file("ends")); // a folder
        assert_int_equal(t->eot, cases[i].eot);
        assert_int_equal(t->bos, -1);
        tokenizer_free(t);
    }
}

static void load_fallback(void *arg) {
    tokenizer_free(tokenizer_load(sentence_tokenizer("bad.json", (const IdCase *)arg)));
}

void test_tokenizers_bad(void **state) {
    (void)state;
    static const IdCase cases[] = { // the last member: what is said
        {"{\"type\": \"NFKC\"}", "null", NULL, "false", "", "normalizer is NFKC"},
        {"{\"type\": \"Lowercase\"}", "null", NULL, "false", "", "normalizer is Lowercase"},
        {"{\"type\": \"Prepend\", \"prepend\": \"x\"}", "null", NULL, "false", "", "Prepend is of \" \" and \"x\""},
        {"{\"type\": \"Replace\", \"pattern\": {\"Regex\": \" \"}, \"content\": \"_\"}", "null", NULL, "false", "", "String"},
        {"{\"type\": \"Sequence\", \"normalizers\": [" PREPEND ", " PREPEND "]}", "null", NULL, "false", "", "a second time"},
        {"{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Sequence\"}]}", "null", NULL, "false", "", "Sequence in a"},
        {SENTENCE, META("first", "false"), NULL, "false", "", "a second time"},
        {"null", META("last", "false"), NULL, "false", "", "prepend_scheme is last"},
        {"null", "{\"type\": \"Metaspace\", \"replacement\": \"_\"}", NULL, "false", "", "replacement is _"},
        {"null", "{\"type\": \"ByteLevel\"}", NULL, "false", "", "byte_fallback is true"},
        {"null", "{\"type\": \"BertPreTokenizer\"}", NULL, "false", "", "type is BertPreTokenizer"},
        {"null", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\w+\"}}", NULL, "false", "", "does not know: \\w+"},
        {"null", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\p{N}\"}, \"behavior\": \"Removed\"}", NULL, "false", "",
         "behavior is Removed"},
        {"null", "null", ADDED_TOKENS("3", "<y>", PLAIN), "false", "", "has id"},
        {"null", "null", ADDED_TOKENS("274", "hello", PLAIN), "false", "", "given twice"},
        {"null", "null", ADDED_TOKENS("300", "<y>", PLAIN), "false", "", "has id 300"},
        {"null", "null", "{\"id\": 274, \"content\": \"<y>\", \"single_word\": true}", "false", "", "single_word"},
        {"null", "null", NULL, "1", "", "ignore_merges"},
    };
    char message[1024];
    for (int i = 0; i < COUNT(cases); i++) {
        assert_int_equal(dies(load_fallback, (void *)&cases[i], message, sizeof(message)), 1);
        if (!strstr(message, cases[i].ids) || !strstr(message, "bad.json")) {
            fail_msg("case %d: expected \"%s\", got \"%s\"", i, cases[i].ids, message);
        }
    }
}

// Another rule of cutting, or another merge, is another tokenizer.
void test_tokenizers_differs(void **state) {
    (void)state;
    Tokenizer *plain = tokenizer_load(small_tokenizer("plain.json", NULL, NULL));
    Tokenizer *other = tokenizer_load(small_tokenizer("other.json", "\"use_regex\": true", "\"use_regex\": false"));
    assert_int_equal(tokenizer_differs(plain, plain), -1);
    assert_int_equal(tokenizer_differs(other, plain), plain->vocab);
    assert_string_equal(tokenizer_pre(plain), "gpt-2");
    tokenizer_free(plain);
    tokenizer_free(other);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizers_words),
        cmocka_unit_test(test_tokenizers_patterns),
        cmocka_unit_test(test_tokenizers_bound),
        cmocka_unit_test(test_tokenizers_fallback),
        cmocka_unit_test(test_tokenizers_byte_level),
        cmocka_unit_test(test_tokenizers_nfc),
        cmocka_unit_test(test_tokenizers_fallback_text),
        cmocka_unit_test(test_tokenizers_fallback_long),
        cmocka_unit_test(test_tokenizers_end_of_text),
        cmocka_unit_test(test_tokenizers_bad),
        cmocka_unit_test(test_tokenizers_differs),
    };
    begin_tests();
    return cmocka_run_group_tests_name("tokenizers", tests, NULL, scratch_done);
}
