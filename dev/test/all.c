// All tests of the C program in one, for the builds where compiling is slow: sanitizers, valgrind, other processors. Each
// file's main becomes a function, and this file's main calls them one after the other.

#define main main_of_proof
#include "test_moe.c"
#undef main
#define main main_of_layers
#include "dev/test/layers.c"
#undef main
#define main main_of_lstm
#include "dev/test/lstm.c"
#undef main
#define main main_of_precision
#include "dev/test/precision.c"
#undef main
#define main main_of_routers
#include "dev/test/routers.c"
#undef main
#define main main_of_attention
#include "dev/test/attention.c"
#undef main
#define main main_of_recipes
#include "dev/test/recipes.c"
#undef main
#define main main_of_training
#include "dev/test/training.c"
#undef main
#define main main_of_numbers
#include "dev/test/numbers.c"
#undef main
#define main main_of_json
#include "dev/test/json.c"
#undef main
#define main main_of_tokenizer
#include "dev/test/tokenizer.c"
#undef main
#define main main_of_tokenizers
#include "dev/test/tokenizers.c"
#undef main
#define main main_of_tokenize
#include "dev/test/tokenize.c"
#undef main
#define main main_of_loader
#include "dev/test/loader.c"
#undef main
#define main main_of_checkpoint
#include "dev/test/checkpoint.c"
#undef main
#define main main_of_options
#include "dev/test/options.c"
#undef main
#define main main_of_evaluate
#include "dev/test/evaluate.c"
#undef main
#define main main_of_minutes
#include "dev/test/minutes.c"
#undef main
#define main main_of_program
#include "dev/test/program.c"
#undef main
#define main main_of_stories
#include "dev/test/stories.c"
#undef main
#define main main_of_files
#include "dev/test/files.c"
#undef main
#define main main_of_machine
#include "dev/test/machine.c"
#undef main
#define main main_of_learning
#include "dev/test/learning.c"
#undef main

int main(void) {
    int (*const programs[])(void) = {
        main_of_proof, main_of_layers, main_of_lstm, main_of_precision, main_of_routers, main_of_attention,
        main_of_recipes,
        main_of_training, main_of_numbers, main_of_json, main_of_tokenizer, main_of_tokenizers, main_of_tokenize,
        main_of_loader, main_of_checkpoint, main_of_options, main_of_evaluate, main_of_minutes,
        main_of_program, main_of_stories, main_of_files, main_of_machine, main_of_learning};
    int failed = 0;
    for (size_t i = 0; i < sizeof(programs) / sizeof(programs[0]); i++)
        failed += programs[i]() != 0;
    return failed;
}
