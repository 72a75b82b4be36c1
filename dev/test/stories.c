// The built-in stories, data/make_stories: the same bytes on every machine, forty heroes, and all agrees to the end. And
// dev/build/check_stories, which says so, finds what does not agree.

#include "dev/test/shell.h"

const char *const story_cast[] = {"large", "small"};

// A lost flute. The parts in [ ] are what the tests of mistakes replace.
const char *const lost_flute =
    "In a hut of leaves by a wide river lived a little monkey named Kiki. She was very clever and she loved to roll in the mud. "
    "Her best thing in the whole world was a blue flute.\n\n"
    "One day, Kiki sat down in the tall grass with the [flute] and ate some coconuts. But in the evening, the flute was gone! "
    "\"Oh dear! Where is my [blue] flute?\" she cried. She looked near the river, but it was not there. [She] looked "
    "[behind the waterfall], but it was not there either.\n\n"
    "Raja the tiger saw that [Kiki] was sad. \"Think hard,\" said [Raja]. \"Where did you eat today?\" \"I ate [coconuts in] the tall "
    "grass!\" said Kiki. They ran there at once. Hurray! There, [in the tall grass], lay the blue flute! \"Drums and bananas!\" they "
    "shouted together. That night, the clever little [monkey] went to bed [with a smile].";

// Writes the story into s.txt, with the words in [ ] of the same text replaced.
const char *put_story(const char *story, const char *old, const char *replacement) {
    char text[2048], wanted[64];
    size_t n = 0;
    int replaced = 0;
    snprintf(wanted, sizeof(wanted), "[%s]", old);
    for (const char *t = story; *t; t++) {
        if (strncmp(t, wanted, strlen(wanted)) == 0) {
            n += (size_t)snprintf(text + n, sizeof(text) - n, "%s", replacement);
            t += strlen(wanted) - 1;
            replaced++;
        } else if (*t != '[' && *t != ']') {
            text[n++] = *t;
        }
    }
    assert_int_equal(replaced, 1);
    snprintf(text + n, sizeof(text) - n, "\n<|endoftext|>\n");
    return put_text("s.txt", text);
}

int stories_can_be_checked(void) { // the programs are there, and this process is no Valgrind's
    return !is_slow() && access("data/make_stories", X_OK) == 0 && access("dev/build/check_stories", X_OK) == 0;
}

// How many stories of how many agree in what a line of the checker's table is about; -1: there is no such line.
long agreeing(const char *what, long *of) {
    char start[64];
    snprintf(start, sizeof(start), "\n%s", what);
    const char *line = strstr(said, start);
    long agree = -1;
    *of = -1;
    if (line)
        sscanf(line + strlen(start), " %ld of %ld", &agree, of);
    return agree;
}

void test_stories_agree(void **state) { // all of them, in both casts
    (void)state;
    if (!stories_can_be_checked())
        skip();
    for (int i = 0; i < 2; i++) {
        expect(shell(said, sizeof(said), "data/make_stories --seed 3 --count 1000 --cast %s | dev/build/check_stories --list", story_cast[i]), 0,
               "of  1000  100.0%");
        long of;
        assert_null(strstr(said, "story "));
        assert_int_equal(agreeing("all of these", &of), 1000);
        assert_int_equal(agreeing("the hero's name  ", &of), 1000);
        assert_int_equal(agreeing("he or she  ", &of), 1000);
        assert_true(agreeing("the thing and its colour", &of) > 350 && agreeing("the places  ", &of) > 500);
        assert_true(agreeing("the friend's name", &of) > 700 && agreeing("the others, and who is what", &of) > 600);
    }
}

// The same bytes on every machine: their number and FNV-1a hash.
void test_stories_same(void **state) {
    (void)state;
    const uint64_t wanted[] = {0x217386e9e1566c06, 0x0113bf20e0e2001e};
    if (!stories_can_be_checked())
        skip();
    for (int i = 0; i < 2; i++) {
        size_t n;
        assert_int_equal(shell(said, sizeof(said), "data/make_stories --count 300 --cast %s > %s", story_cast[i], scratch_file("same.txt")), 0);
        char *text = read_file(scratch_file("same.txt"), &n);
        uint64_t hash = 0xCBF29CE484222325u;
        for (size_t j = 0; j < n; j++)
            hash = (hash ^ (unsigned char)text[j]) * 0x100000001B3u;
        if (hash != wanted[i])
            fail_msg("--cast %s: hash 0x%llx", story_cast[i], (unsigned long long)hash);
        free(text);
    }
}

void test_stories_cast(void **state) { // every name is a hero's and a friend's; the small cast has one of each in a world
    (void)state;
    const int heroes[] = {40, 10};
    if (!stories_can_be_checked())
        skip();
    for (int i = 0; i < 2; i++) {
        // "... a shy little lamb named Molly", and then "Tom the calf came to help".
        shell(said, sizeof(said), "data/make_stories --count 4000 --cast %s > %s", story_cast[i], scratch_file("cast.txt"));
        shell(said, sizeof(said), "grep -oE 'named [A-Z][a-z]+' %s | sort -u | wc -l", scratch_file("cast.txt"));
        assert_int_equal(atoi(said), heroes[i]);
        shell(said, sizeof(said), "grep -oE '[A-Z][a-z]+ the [a-z]+ (came|was slow|gave|sat down)' %s | sed 's/ .*//' | "
              "sort -u | wc -l", scratch_file("cast.txt"));
        assert_int_equal(atoi(said), heroes[i]);
    }
    expect(shell(said, sizeof(said), "data/make_stories --cast huge"), 2, "--cast is small or large, not 'huge'");
}

// One planted mistake makes one line of the table say 0 of 1, and the sums; all else still agrees.
void test_stories_mistakes(void **state) {
    (void)state;
    const struct {
        const char *old, *replacement, *line, *listed;
        int four; // whether the hero's name, pronoun, thing and places still agree
    } cases[] = {
        {"Kiki", "Molly", "the hero's name  ", "the hero's name: \"Molly was sad.", 0},
        {"Kiki", "Raja", "the hero's name  ", "the hero's name: \"Raja was sad.", 0},
        {"Raja", "Kiki", "the friend's name", "the friend's name: \"Kiki. \"Where did", 1},
        {"She", "He", "he or she  ", "he or she: \"He looked behind", 0},
        {"flute", "mask", "the thing and its colour", "colour: \"mask and ate", 0},
        {"blue", "red", "the thing and its colour", "colour: \"red flute?", 0},
        {"in the tall grass", "by the old temple", "the places  ", "the places: \"by the old temple, lay", 0},
        {"behind the waterfall", "near the river", "the places  ", "the places: \"near the river, but", 0},
        {"behind the waterfall", "near the moat", "all is from one world", "all is from one world: \"In a hut", 1},
        {"coconuts in", "mangoes in", "tools, food and what happens", "what happens: \"mangoes in", 1},
        {"monkey", "panda", "the others, and who is what", "who is what: \"panda went to bed", 1},
        {"with a smile", "at nine", "one plot, from beginning to end", "to end: \"at nine.\"", 0},
    };
    static const char *const lines[] = {
        "the hero's name  ", "the friend's name", "the others, and who is what", "he or she  ", "the thing and its colour",
        "the places  ", "tools, food and what happens", "all is from one world", "one plot, from beginning to end",
    };
    if (!stories_can_be_checked())
        skip();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const char *path = put_story(lost_flute, cases[i].old, cases[i].replacement);
        expect(shell(said, sizeof(said), "dev/build/check_stories --list %s", path), 0, cases[i].listed);
        for (size_t j = 0; j < sizeof(lines) / sizeof(lines[0]); j++) {
            long of, agree = agreeing(lines[j], &of);
            if (agree != (strcmp(lines[j], cases[i].line) != 0) || of != 1)
                fail_msg("'%s' for '%s': %s: %ld of %ld\n%s", cases[i].replacement, cases[i].old, lines[j], agree, of, said);
        }
        long of;
        assert_int_equal(agreeing("hero's name, he or she, thing and places", &of), cases[i].four);
        assert_int_equal(agreeing("all of these", &of), 0);
    }
}

// A prince is no she, also before he has a name; a tool that fits the trouble of another world does not fit this one.
void test_stories_rows(void **state) {
    (void)state;
    const char *prince = "In a tall stone castle lived a little [prince] named Leo. He was very shy and he loved to wave the flags. "
                         "He always carried a golden key. \"You never know,\" he liked to say.\n\n"
                         "One day, Leo heard a cry. \"Help! Help!\" It was Rosa the knight. Rosa was shut in the tower. Leo tried to pull "
                         "her out, but the lock was too strong. King Otto tried it too, but the lock was too strong even for King Otto. "
                         "\"Must I stay here forever?\" asked Rosa.\n\nThen Leo remembered the golden key. He opened the tower with "
                         "the [golden] key. Pop! Rosa was free! Rosa gave Leo a big hug. \"Now I know why you always carry a "
                         "golden key,\" said Rosa. \"You never know,\" said Leo with a smile.";
    long of;
    if (!stories_can_be_checked())
        skip();
    shell(said, sizeof(said), "dev/build/check_stories %s", put_story(prince, "prince", "prince"));
    assert_int_equal(agreeing("all of these", &of), 1);
    expect(shell(said, sizeof(said), "dev/build/check_stories --list %s", put_story(prince, "prince", "princess")), 0, "he or she: \"Leo.");
    assert_int_equal(agreeing("he or she  ", &of), 0);
    assert_int_equal(agreeing("tools, food and what happens", &of), 1);
    expect(shell(said, sizeof(said), "dev/build/check_stories --list %s", put_story(prince, "golden", "silver")), 0, NULL);
    assert_int_equal(agreeing("all of these", &of), 0);
}

// Stories that are cut off or end as another does, white space, nothing at all, and files that are not there.
void test_stories_input(void **state) {
    (void)state;
    long of;
    if (!stories_can_be_checked())
        skip();
    shell(said, sizeof(said), "data/make_stories --count 3 | head -c -40 | dev/build/check_stories");
    assert_int_equal(agreeing("one plot, from beginning to end", &of), 2);
    assert_int_equal(of, 3);
    shell(said, sizeof(said), "(data/make_stories --count 2; echo; echo '<|endoftext|>'; printf 'Once\\0upon') | dev/build/check_stories --list");
    assert_int_equal(agreeing("all of these", &of), 2);
    assert_int_equal(of, 3);
    expect(shell(said, sizeof(said), "dev/build/check_stories < /dev/null"), 0, "stories in which");
    assert_int_equal(agreeing("all of these", &of), -1);
    expect(shell(said, sizeof(said), "dev/build/check_stories %s", scratch_file("not_there")), 1, "not_there: cannot read: No such file");
    expect(shell(said, sizeof(said), "dev/build/check_stories --lists"), 2, "usage: ");
    expect(shell(said, sizeof(said), "dev/test/stories.sh"), 2, "usage: ");
    expect(shell(said, sizeof(said), "dev/test/stories.sh %s 0", scratch_file("not_there")), 2, "usage: ");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories_agree),
        cmocka_unit_test(test_stories_same),
        cmocka_unit_test(test_stories_cast),
        cmocka_unit_test(test_stories_mistakes),
        cmocka_unit_test(test_stories_rows),
        cmocka_unit_test(test_stories_input),
    };
    begin_tests();
    return cmocka_run_group_tests_name("stories", tests, NULL, scratch_done);
}
