// Writes the built-in training text: short stories for small children, made up from tables.
// Gives: the program data/make_stories. Needs: the tables of data/worlds.h, and the C library.
//
// A tiny model trained for two minutes cannot learn all of English, but it can learn a small world of it.
// This program knows ten worlds (the sea, a castle, ...) and fourteen plots (something is lost, someone is stuck,
// ...), and every plot can happen in every world with that world's own characters, things and words. There are few
// forms of sentence and many fillings, and the fillings must agree from the first sentence to the last: the red shell
// stays red, Molly stays Molly and "she", the hook that Grandpa gave in the second paragraph gets the shell back in the
// third.
// So a model has long-range things to learn, and its experts have worlds to share out among themselves.
//
// Story i of seed S is a pure function of (S, i), the same bytes on every machine. Training and validation text
// are two ranges of i that do not overlap.
//
// build:  gcc -std=c11 -O2 -Wall -Wextra -o make_stories data/stories.c
// run:    ./make_stories --count 30000 > train.txt
//         ./make_stories --first 30000 --count 1000 > val.txt
//         ./make_stories --count 5 --worlds        # says before each story which world it is from
//
// The tables are in worlds.h. This file is the program that fills them in, and it is short.

#define _GNU_SOURCE // getopt_long
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "worlds.h"

// ---------------------------------------------------------------------------------------------------------------
// Random numbers: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)
// ---------------------------------------------------------------------------------------------------------------

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// A number from 0 to n-1; *state is a plain counter.
static int below(uint64_t *state, int n) {
    return (int)((mix((*state)++) >> 32) * (uint64_t)n >> 32);
}

// ---------------------------------------------------------------------------------------------------------------
// One story: everything is drawn first, so that a mark means the same wherever it stands; then the plot is expanded
// ---------------------------------------------------------------------------------------------------------------

enum { SMALL_CAST, LARGE_CAST };

typedef struct {
    uint64_t rng;
    const World *world;
    const char *const *rows[TABLES]; // the world's own rows, or those of everywhere
    int count[TABLES];               // how many rows
    int order[TABLES][MAX_ROWS];     // the rows shuffled: {toy} is the row order[TOY][0], {toy2} is order[TOY][1]
    int girl[PEOPLE];
    const char *cast[MAX_ROWS + 1]; // the large cast: the rows of the hero's name and the friend's
    int capital, article; // the next letter is to be a capital; an "a" was just written that may have to be "an"
    size_t length;
    char text[4096];
} Story;

// A mistake in a table is found when a story first uses it; the message says where it is.
static void table_error(const Story *s, const char *what, const char *mark, size_t n) {
    fprintf(stderr, "make_stories: world '%s': %s: %.*s\n", s->world->name, what, (int)n, mark);
    exit(1);
}

// Appends a character, as a capital if one is due. After "a" and a space, a vowel makes it "an".
static void put(Story *s, char c) {
    if (s->length + 3 > sizeof(s->text)) {
        table_error(s, "the story is too long", s->text, 60);
    }

    if (s->article && c != ' ') {
        if (strchr("aeiou", c)) {
            s->text[s->length - 1] = 'n';
            s->text[s->length++] = ' ';
        }
        s->article = 0;
    }
    s->text[s->length++] = s->capital ? (char)toupper((unsigned char)c) : c;
    s->capital = 0;
}

// The end of a part that starts at t: the first of the characters in `stops` that is outside of any [ ].
static const char *part_end(const char *t, const char *end, const char *stops) {
    for (int depth = 0; t < end; t++) {
        if (depth == 0 && strchr(stops, *t)) {
            break;
        }
        depth += (*t == '[') - (*t == ']');
    }
    return t;
}

// The part number `index` of the text from t to *end, which is divided by `bar`; null if there are fewer.
static const char *part(const char *t, const char **end, char bar, int index) {
    const char stops[2] = {bar, 0}, *stop = part_end(t, *end, stops);
    for (; index > 0 && stop < *end; index--) {
        t = stop + 1;
        stop = part_end(t, *end, stops);
    }
    *end = stop;
    return index == 0 ? t : NULL;
}

static void expand(Story *s, const char *t, const char *end);

// Replaces the mark {toy2}, given without its braces: finds the column of that name, then the row, and expands it.
static void expand_mark(Story *s, const char *mark, size_t n) {
    char name[16] = "";
    int digit = isdigit((unsigned char)mark[n - 1]) != 0;
    int number = digit ? mark[n - 1] - '1' : 0;
    if (n - (size_t)digit < sizeof(name)) {
        memcpy(name, mark, n - (size_t)digit);
    }
    s->capital |= isupper((unsigned char)name[0]) != 0;
    name[0] = (char)tolower((unsigned char)name[0]);

    // Look for the name among the columns of all tables.
    for (int t = 0; t < TABLES; t++) {
        const char *next = tables[t].columns;
        for (int column = 0; *next; column++) {
            const char *column_name = next;
            size_t length = strcspn(next, " ");
            next += length + (next[length] == ' ');
            if (strlen(name) != length || strncmp(name, column_name, length) != 0) {
                continue;
            }
            if (s->count[t] == 0 || (tables[t].people && number >= PEOPLE)) {
                table_error(s, "no row for the mark", mark, n);
            }

            // The number chooses the row; for people it also chooses the person, a boy or a girl.
            const char *row = s->rows[t][s->order[t][number % s->count[t]]];
            const char *start = row, *end = row + strlen(row);
            if (!tables[t].people) {
                start = part(row, &end, '/', column);
            } else if (strchr(row, '/')) {
                start = part(row, &end, '/', s->girl[number]);
            }
            if (!start) {
                table_error(s, "a column is missing in the row", row, strlen(row));
            }
            expand(s, start, end);
            return;
        }
    }
    table_error(s, "no table has a column for the mark", mark, n);
}

// Writes the text from t to end, with its marks and choices replaced.
static void expand(Story *s, const char *t, const char *end) {
    while (t < end) {
        if (*t == '{') {
            size_t n = strcspn(t, "}") - 1;
            expand_mark(s, t + 1, n);
            t += n + 2;
        } else if (*t == '[') {
            const char *close = part_end(t + 1, end, "]");
            const char *choice_end = close;
            int choices = 1;
            for (const char *bar = t + 1; (bar = part_end(bar, close, "|")) < close; bar++) {
                choices++;
            }
            const char *choice = part(t + 1, &choice_end, '|', below(&s->rng, choices));
            expand(s, choice, choice_end);
            t = close + 1;
        } else {
            put(s, *t == '@' ? 'a' : *t);
            s->article |= *t++ == '@';
        }
    }
}

// The hero and the friend are a boy and a girl, so that "he" and "she" say who is meant. In the large cast, they have
// any two of all worlds' names: a name says nothing of the world, so a model has to look back to know it. In the small
// one, every world has one hero and one friend, as picture books have. Names have random numbers of their own, so that
// the rest of a story is the same with either cast, but for its opening.
static void name_hero_and_friend(Story *s, int cast, int world) {
    uint64_t rng = mix(s->rng);
    s->girl[0] = cast == LARGE_CAST ? below(&rng, 2) : world % 2;
    s->girl[1] = !s->girl[0];
    s->order[NAME][0] = 0;
    s->order[NAME][1] = 1;
    if (cast == LARGE_CAST) {
        for (int i = 0; i < 2; i++) {
            s->cast[i] = worlds[below(&rng, WORLDS)].rows[NAME][below(&rng, NAMES)];
        }
        s->rows[NAME] = s->cast;
        s->count[NAME] = 2;
    }
}

// Makes story number `index` of a seed.
static void make_story(Story *s, int cast, uint64_t seed, uint64_t index) {
    s->rng = mix(mix(seed) + index); // mixed again: neighbours must not walk through each other's numbers
    int world = below(&s->rng, WORLDS);
    s->world = &worlds[world];
    const char *plot = plots[below(&s->rng, PLOTS)];

    // Shuffle the rows of every table, so that {toy} and {toy2} are two different ones.
    for (int t = 0; t < TABLES; t++) {
        const World *shared = cast == SMALL_CAST && small_cast.rows[t][0] ? &small_cast : &everywhere;
        s->rows[t] = s->world->rows[t][0] ? s->world->rows[t] : shared->rows[t];
        int n = 0;
        for (; n < MAX_ROWS && s->rows[t][n]; n++) {
            int j = below(&s->rng, n + 1);
            s->order[t][n] = s->order[t][j];
            s->order[t][j] = n;
        }
        s->count[t] = n;
    }
    for (int i = 0; i < PEOPLE; i++) {
        s->girl[i] = below(&s->rng, 2);
    }

    name_hero_and_friend(s, cast, world);

    // Everything is drawn, so write the story.
    s->length = 0;
    s->capital = s->article = 0;
    expand(s, plot, plot + strlen(plot));
    s->text[s->length] = 0;
}

// ---------------------------------------------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------------------------------------------

static const char usage[] =
    "usage: make_stories [options]\n"
    "Writes short children's stories, each followed by a line <|endoftext|>, to standard output.\n"
    "  --count N      how many stories (default 10)\n"
    "  --first I      the number of the first story (default 0)\n"
    "  --seed S       another seed, other stories (default 1)\n"
    "  --cast small   one hero and one friend for each world; by default every story has its own (large)\n"
    "  --worlds       write the story's world, such as [sea], on a line before each story\n"
    "  --list-worlds  write the names of the worlds and stop\n"
    "  -h, --help     write this and stop\n";

// The number of an option; anything else ends the program with a message.
static uint64_t parse_number(const char *option, const char *text) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)text[0]) || *end || errno) {
        fprintf(stderr, "make_stories: --%s wants a whole number from 0 to %" PRIu64 ", not '%s'\n", option, UINT64_MAX,
                text);
        exit(2);
    }
    return value;
}

static int parse_cast(const char *text) {
    if (strcmp(text, "small") != 0 && strcmp(text, "large") != 0) {
        fprintf(stderr, "make_stories: --cast is small or large, not '%s'\n", text);
        exit(2);
    }
    return text[0] == 'l' ? LARGE_CAST : SMALL_CAST;
}

// A full disk shows only when the buffer is written out, so the last word is fclose's.
static int finish(void) {
    int failed = ferror(stdout);
    if (fclose(stdout) != 0 || failed) {
        fprintf(stderr, "make_stories: cannot write the stories: %s\n", strerror(errno));
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    enum { COUNT = 256, FIRST, SEED, CAST, SHOW_WORLDS, LIST_WORLDS };
    static const struct option options[] = {
        {"count", required_argument, NULL, COUNT},
        {"first", required_argument, NULL, FIRST},
        {"seed", required_argument, NULL, SEED},
        {"cast", required_argument, NULL, CAST},
        {"worlds", no_argument, NULL, SHOW_WORLDS},
        {"list-worlds", no_argument, NULL, LIST_WORLDS},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    uint64_t count = 10, first = 0, seed = 1;
    int cast = LARGE_CAST, show_worlds = 0;
    int option;
    signal(SIGXFSZ, SIG_IGN); // a file that may not grow is an error of writing
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case COUNT:
            count = parse_number("count", optarg);
            break;
        case FIRST:
            first = parse_number("first", optarg);
            break;
        case SEED:
            seed = parse_number("seed", optarg);
            break;
        case CAST:
            cast = parse_cast(optarg);
            break;
        case SHOW_WORLDS:
            show_worlds = 1;
            break;
        case LIST_WORLDS:
            for (int w = 0; w < WORLDS; w++) {
                puts(worlds[w].name);
            }
            return finish();
        case 'h':
            fputs(usage, stdout);
            return finish();
        default:
            fprintf(stderr, "%s", usage);
            return 2; // getopt_long has printed the mistake
        }
    }
    if (optind < argc) {
        fprintf(stderr, "make_stories: unexpected '%s'; everything is given by options\n%s", argv[optind], usage);
        return 2;
    }

    static Story story;
    for (uint64_t i = 0; i < count && !ferror(stdout); i++) {
        make_story(&story, cast, seed, first + i);
        if (show_worlds) {
            printf("[%s]\n", story.world->name);
        }
        printf("%s\n<|endoftext|>\n", story.text);
    }
    return finish();
}
