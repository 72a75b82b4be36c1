// dev/build/check_stories [--list] [FILE]: reads stories of the built-in kind, with <|endoftext|> between them, and says in how
// many of them the hero's name, "he" or "she", the lost thing, the places and all else agree to the end.
// Gives: a table on standard output; --list: each mistake too. Needs: data/worlds.h, whose tables the stories were made from.
//
// A plot is a pattern with marks, such as "{Name} looked {place}". The checker follows the story along a plot and finds which row
// of which table stands at every mark. Any row of any world may stand there; but marks that mean the same have the same row: where
// {place} was under the oak tree once, it is under the oak tree to the end.
//
// The words at one mark do not always tell which row it is: "was stuck in an old net" is in two worlds, and what cuts the net
// differs. So each mark is bound to the set of all rows that it can be. Every mention makes the set smaller, and a mention that
// would leave it empty is a mistake.

#include <ctype.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "data/worlds.h"

// ---- what can disagree

enum { HERO, FRIEND, OTHERS, PRONOUN, THING, WHERE, REST, WORLD, FOLLOWED, CHECKS };

static const char *const check_names[CHECKS] = {
    "the hero's name",
    "the friend's name",
    "the others, and who is what",
    "he or she",
    "the thing and its colour",
    "the places",
    "tools, food and what happens",
    "all is from one world",
    "one plot, from beginning to end",
};

// What a mention of table t disagrees about, if it does; person 0 is the hero. Pronouns are looked at apart.
static int check_of(int t, int person) {
    switch (t) {
    case NAME:
        return person == 0 ? HERO : FRIEND;
    case KIND:
    case ELDER:
    case PARENT:
    case STRANGER:
        return OTHERS;
    case TOY:
    case COLOUR:
    case LURE:
    case PRECIOUS:
        return THING;
    case PLACE:
    case MARK:
        return WHERE;
    default:
        return REST;
    }
}

// ---- the rows of all worlds

enum { ITEMS = 128, COLUMNS = 4, NUMBERS = 5, BOTH = -1 };

typedef struct {
    uint64_t bits[ITEMS / 64];
} Set;

typedef struct {
    const char *start, *end;
} Text;

// One row of a table; of a row for people, the boy's form or the girl's.
typedef struct {
    Text column[COLUMNS];
    Set alike[COLUMNS]; // the items with the same text in this column
    int girl;           // 0, 1 or BOTH
    unsigned worlds;    // a bit for each world that has the row
} Item;

static Item items[TABLES][ITEMS];
static int item_count[TABLES];

static int has(const Set *s, int i) {
    return (int)(s->bits[i / 64] >> i % 64 & 1);
}

static Set common(const Set *a, const Set *b) {
    Set c;
    for (int i = 0; i < ITEMS / 64; i++) {
        c.bits[i] = a->bits[i] & b->bits[i];
    }
    return c;
}

static int is_empty(const Set *s) {
    uint64_t any = 0;
    for (int i = 0; i < ITEMS / 64; i++) {
        any |= s->bits[i];
    }
    return any == 0;
}

static int same_text(const Text *a, const Text *b) {
    size_t n = (size_t)(a->end - a->start);
    return a->start && b->start && n == (size_t)(b->end - b->start) && memcmp(a->start, b->start, n) == 0;
}

// The first of the characters in `stops` that is outside of any [ ], or the end.
static const char *find_outside(const char *t, const char *end, const char *stops) {
    for (int depth = 0; t < end && (depth > 0 || !strchr(stops, *t)); t++) {
        depth += (*t == '[') - (*t == ']');
    }
    return t;
}

static Item *add_item(int t, int girl, unsigned in_worlds) {
    if (item_count[t] == ITEMS) {
        fprintf(stderr, "check_stories: table %d has more than %d rows\n", t, ITEMS);
        exit(1);
    }
    Item *item = &items[t][item_count[t]++];
    item->girl = girl;
    item->worlds = in_worlds;
    return item;
}

static void add_rows(const World *world, int t, unsigned in_worlds) {
    for (int i = 0; i < MAX_ROWS && world->rows[t][i]; i++) {
        const char *row = world->rows[t][i], *end = row + strlen(row);
        int people = tables[t].people, forms = people && strchr(row, '/');
        Item *item = people ? NULL : add_item(t, BOTH, in_worlds);
        for (int column = 0; row <= end; column++) {
            const char *stop = find_outside(row, end, "/");
            if (people) {
                item = add_item(t, forms ? column : BOTH, in_worlds);
            }
            item->column[people ? 0 : column].start = row;
            item->column[people ? 0 : column].end = stop;
            row = stop + 1;
        }
    }
}

static void collect_items(void) {
    for (int t = 0; t < TABLES; t++) {
        for (int w = 0; w < WORLDS; w++) {
            add_rows(&worlds[w], t, 1u << w);
        }
        add_rows(&everywhere, t, (1u << WORLDS) - 1);
        add_rows(&small_cast, t, (1u << WORLDS) - 1);

        for (int i = 0; i < item_count[t]; i++) {
            for (int j = 0; j < item_count[t]; j++) {
                for (int c = 0; c < COLUMNS; c++) {
                    uint64_t same = (uint64_t)same_text(&items[t][i].column[c], &items[t][j].column[c]);
                    items[t][i].alike[c].bits[j / 64] |= same << j % 64;
                }
            }
        }
    }
}

// ---- marks

typedef struct {
    int table, column, number, capital;
} Mark;

// Reads a mark such as {Toy2}, given without its braces.
static Mark read_mark(const char *mark, size_t n) {
    Mark m = {0, 0, 0, isupper((unsigned char)mark[0]) != 0};
    if (isdigit((unsigned char)mark[n - 1])) {
        m.number = mark[--n] - '1';
    }
    for (m.table = 0; m.table < TABLES; m.table++) {
        const char *name = tables[m.table].columns;
        for (m.column = 0; *name; m.column++) {
            size_t length = strcspn(name, " ");
            if (length == n && name[0] == tolower((unsigned char)mark[0]) && memcmp(name + 1, mark + 1, n - 1) == 0) {
                return m;
            }
            name += length + (name[length] == ' ');
        }
    }
    fprintf(stderr, "check_stories: no table has a column for the mark {%.*s}\n", (int)n, mark);
    exit(1);
}

// ---- what a story has said up to some word

enum { NOTES = 8 };

typedef struct {
    Set rows[TABLES][NUMBERS]; // what each mark can be
    int mentioned[TABLES][NUMBERS];
    int again[CHECKS]; // mentions that could disagree with an earlier one
    int wrong[CHECKS], mistakes;
    int girl[PEOPLE]; // by the name, or BOTH while there is none
    int said[PEOPLE]; // a bit for each of "he" and "she", and of "prince" and "princess"
    struct {
        int check;
        const char *at;
    } notes[NOTES]; // the first mistakes
} Reading;

static void note_mistake(Reading *r, int check, const char *at) {
    if (r->mistakes < NOTES) {
        r->notes[r->mistakes].check = check;
        r->notes[r->mistakes].at = at;
    }
    r->mistakes++;
    r->wrong[check]++;
}

// Two marks of one table with different numbers are two different rows.
static int is_taken(const Reading *r, int t, int number, const Item *item) {
    for (int other = 0; other < NUMBERS; other++) {
        if (other == number || !r->mentioned[t][other]) {
            continue;
        }
        for (int i = 0; i < item_count[t]; i++) {
            if (has(&r->rows[t][other], i) && same_text(&items[t][i].column[0], &item->column[0])) {
                return 1;
            }
        }
    }
    return 0;
}

// The name says whether a person is a boy or a girl, and all else has to fit.
static void see_person(Reading *r, int t, int person, int girl, const char *at) {
    if (girl == BOTH || person >= PEOPLE) {
        return;
    }
    if (t == NAME || t == ELDER || t == PARENT) {
        if (r->girl[person] == BOTH) {
            r->girl[person] = girl;
            if (r->said[person] & ~(1 << girl)) {
                note_mistake(r, PRONOUN, at);
            }
        }
        return;
    }
    r->said[person] |= 1 << girl;
    r->again[PRONOUN]++;
    if (r->girl[person] != BOTH && r->girl[person] != girl) {
        note_mistake(r, PRONOUN, at);
    }
}

// At the mark stands what the item says.
static void see_item(Reading *r, const Mark *m, const Item *item, const char *at) {
    int t = m->table, check = check_of(t, m->number);
    see_person(r, t, m->number, item->girl, at);
    if (t == HE || t == HIM || t == HIS) {
        return;
    }

    if (!r->mentioned[t][m->number]) {
        r->mentioned[t][m->number] = 1;
        r->rows[t][m->number] = item->alike[m->column];
        if (is_taken(r, t, m->number, item)) {
            note_mistake(r, check, at);
        }
        return;
    }
    r->again[check]++;
    Set both = common(&r->rows[t][m->number], &item->alike[m->column]);
    if (is_empty(&both)) {
        note_mistake(r, check, at);
    } else {
        r->rows[t][m->number] = both;
    }
}

// Is there a world that has all that was mentioned? Names and what the worlds share are at home everywhere.
static int is_one_world(const Reading *r) {
    unsigned possible = (1u << WORLDS) - 1;
    for (int t = 0; t < TABLES; t++) {
        for (int n = 0; n < NUMBERS; n++) {
            unsigned here = r->mentioned[t][n] && t != NAME ? 0 : ~0u;
            for (int i = 0; i < item_count[t]; i++) {
                here |= has(&r->rows[t][n], i) ? items[t][i].worlds : 0;
            }
            possible &= here;
        }
    }
    return possible != 0;
}

// ---- following a plot

// What is still to come: the rest of a pattern, and then the rest of the pattern around it.
typedef struct Rest {
    const char *t, *end;
    const struct Rest *next;
} Rest;

typedef struct {
    const char *end;     // of the story
    int most;            // a way with more mistakes is not followed
    int found;           // a way to the story's end
    Reading reading;     // of that way, or of the one that came farthest
    const char *reached; // how far it came
} Search;

static int follow(Search *s, Rest rest, const char *text, int capital, const Reading *r);

// The pattern does not go on as the story does, or both end here.
static int stop_here(Search *s, int at_end, const char *text, const Reading *r) {
    int better = text > s->reached || (text == s->reached && r->mistakes < s->reading.mistakes);
    if (at_end || (better && !s->found)) {
        s->reading = *r;
        s->reached = text;
        s->found = at_end;
    }
    return at_end;
}

// Follows the story with each item that may stand at the mark: first with those that agree with what was said before.
static int follow_mark(Search *s, const Rest *after, const Mark *m, const char *text, int capital, const Reading *r) {
    int t = m->table;
    const Set *before = &r->rows[t][m->number];
    for (int surprising = 0; surprising < 2; surprising++) {
        for (int i = 0; i < item_count[t]; i++) {
            const Item *item = &items[t][i];
            const Text *words = &item->column[m->column];
            Set both = common(&item->alike[m->column], before);
            int surprise = r->mentioned[t][m->number] && is_empty(&both);
            int repeated = 0;
            for (int j = 0; j < i && !repeated; j++) {
                repeated = has(&item->alike[m->column], j);
            }
            if (surprise != surprising || repeated) {
                continue;
            }
            Reading next = *r;
            see_item(&next, m, item, text);
            Rest row = {words->start, words->end, after};
            if (next.mistakes <= s->most && follow(s, row, text, capital, &next)) {
                return 1;
            }
        }
    }
    return 0;
}

// Is there a way from here to the end of the story? `capital`: the next letter is one.
static int follow(Search *s, Rest rest, const char *text, int capital, const Reading *r) {
    for (;;) {
        while (rest.t == rest.end) {
            if (!rest.next) {
                return stop_here(s, text == s->end, text, r);
            }
            rest = *rest.next;
        }
        char c = *rest.t;
        if (c == '{') {
            size_t n = strcspn(rest.t, "}") - 1;
            Mark m = read_mark(rest.t + 1, n);
            rest.t += n + 2;
            return follow_mark(s, &rest, &m, text, capital | m.capital, r);
        }
        if (c == '[') {
            const char *close = find_outside(rest.t + 1, rest.end, "]");
            Rest after = {close + 1, rest.end, rest.next};
            for (const char *t = rest.t + 1; t <= close;) {
                Rest choice = {t, find_outside(t, close, "|"), &after};
                if (follow(s, choice, text, capital, r)) {
                    return 1;
                }
                t = choice.end + 1;
            }
            return 0;
        }

        // A letter of the pattern stands in the story, too. After @, "an" goes with a vowel.
        char wanted = c == '@' ? 'a' : c;
        if (text == s->end || *text != (capital ? (char)toupper((unsigned char)wanted) : wanted)) {
            return stop_here(s, 0, text, r);
        }
        text++;
        capital = 0;
        rest.t++;
        if (c == '@') {
            int n = text < s->end && *text == 'n';
            text += n;
            if (s->end - text < 2 || (strchr("aeiou", text[1]) != NULL) != n) {
                return stop_here(s, 0, text, r);
            }
        }
    }
}

// Reads one story: along the plot that it follows without a mistake, else to its end, else farthest.
static Reading read_story(const char *text, const char *end) {
    static Search s;
    memset(&s, 0, sizeof(s));
    s.end = end;
    s.reached = text;
    for (int careless = 0; careless < 2 && !s.found; careless++) {
        s.most = careless ? 1000 : 0;
        for (int p = 0; p < PLOTS && !s.found; p++) {
            Reading r;
            memset(&r, 0, sizeof(r));
            for (int i = 0; i < PEOPLE; i++) {
                r.girl[i] = BOTH;
            }
            Rest plot = {plots[p], plots[p] + strlen(plots[p]), NULL};
            follow(&s, plot, text, 0, &r);
        }
    }
    s.reading.again[FOLLOWED] = s.reading.again[WORLD] = 1;
    if (!s.found) {
        note_mistake(&s.reading, FOLLOWED, s.reached);
    }
    if (!is_one_world(&s.reading)) {
        note_mistake(&s.reading, WORLD, text);
    }
    return s.reading;
}

// ---- the table

typedef struct {
    long stories, four, all;
    long with[CHECKS], agree[CHECKS]; // stories that mention it again, and those of them without a mistake in it
} Count;

static void count_story(Count *count, const char *text, const char *end, int list) {
    Reading r = read_story(text, end);
    count->stories++;
    for (int c = 0; c < CHECKS; c++) {
        count->with[c] += r.again[c] > 0;
        count->agree[c] += r.again[c] > 0 && !r.wrong[c];
    }
    count->four += !r.wrong[HERO] && !r.wrong[PRONOUN] && !r.wrong[THING] && !r.wrong[WHERE] && !r.wrong[FOLLOWED];
    count->all += r.mistakes == 0;
    for (int i = 0; list && i < r.mistakes && i < NOTES; i++) {
        const char *at = r.notes[i].at;
        int length = (int)strcspn(at, "\n");
        length = length > end - at ? (int)(end - at) : length;
        printf("story %ld: %s: \"%.*s\"\n", count->stories, check_names[r.notes[i].check], length < 60 ? length : 60, at);
    }
}

static void print_line(const char *what, long agree, long with) {
    if (with) {
        printf("%-44s %5ld of %5ld  %5.1f%%\n", what, agree, with, 100.0 * (double)agree / (double)with);
    }
}

// Reads a file, or standard input, to its end. A null byte follows the text.
static char *read_all(const char *path, size_t *size) {
    FILE *file = path ? fopen(path, "rb") : stdin;
    size_t room = 1 << 16;
    char *text = (char *)malloc(room);
    *size = 0;
    while (file && text) {
        size_t n = fread(text + *size, 1, room - *size - 1, file);
        *size += n;
        if (n == 0) {
            break;
        }
        if (room - *size < 2) {
            text = (char *)realloc(text, room *= 2);
        }
    }
    if (!file || !text || ferror(file)) {
        fprintf(stderr, "check_stories: %s: cannot read: %s\n", path ? path : "standard input", strerror(errno));
        exit(1);
    }
    text[*size] = 0;
    if (path) {
        fclose(file);
    }
    return text;
}

int main(int argc, char **argv) {
    int list = argc > 1 && strcmp(argv[1], "--list") == 0;
    if (argc > 2 + list || (argc == 2 + list && argv[1 + list][0] == '-')) {
        fprintf(stderr, "usage: check_stories [--list] [FILE]\n");
        return 2;
    }
    size_t size;
    char *text = read_all(argv[1 + list], &size);
    collect_items();

    // The stories lie between the ends of documents, without the white space around them.
    static const char mark[] = "<|endoftext|>";
    static Count count;
    for (const char *t = text; t < text + size;) {
        const char *stop = strstr(t, mark), *end = stop ? stop : text + size;
        const char *next = stop ? stop + strlen(mark) : end;
        while (t < end && isspace((unsigned char)*t)) {
            t++;
        }
        while (t < end && isspace((unsigned char)end[-1])) {
            end--;
        }
        if (t < end) {
            count_story(&count, t, end, list);
        }
        t = next;
    }
    free(text);

    printf("stories in which this agrees to the end, of those that mention it again\n");
    for (int c = 0; c < CHECKS; c++) {
        print_line(check_names[c], count.agree[c], count.with[c]);
    }
    print_line("hero's name, he or she, thing and places", count.four, count.stories);
    print_line("all of these", count.all, count.stories);
    return 0;
}
