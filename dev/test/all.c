// All tests of the C program in one, which is built faster than a program for each subject, since train_moe.c is compiled
// once. Each file's main becomes a function, and this file's main calls them one after the other. In double precision only
// those of numbers run: files, texts and the command line are the same there.

#define main main_of_proof
#include "test_moe.c"
#undef main
#define main main_of_layers
#include "dev/test/layers.c"
#undef main
#define main main_of_lstm
#include "dev/test/lstm.c"
#undef main
#define main main_of_routers
#include "dev/test/routers.c"
#undef main
#define main main_of_attention
#include "dev/test/attention.c"
#undef main
#define main main_of_shapes
#include "dev/test/shapes.c"
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
#define main main_of_learning
#include "dev/test/learning.c"
#undef main
#define main main_of_precision
#include "dev/test/precision.c"
#undef main
#define main main_of_adapters
#include "dev/test/adapters.c"
#undef main
#define main main_of_quantized
#include "dev/test/quantized.c"
#undef main
#define main main_of_teacher
#include "dev/test/teacher.c"
#undef main
#define main main_of_compress
#include "dev/test/compress.c"
#undef main
#define main main_of_offload
#include "dev/test/offload.c"
#undef main
#define main main_of_classes
#include "dev/test/classes.c"
#undef main
#define main main_of_json
#include "dev/test/json.c"
#undef main
#define main main_of_tokenizer
#include "dev/test/tokenizer.c"
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
#define main main_of_program
#include "dev/test/program.c"
#undef main
#define main main_of_files
#include "dev/test/files.c"
#undef main
#define main main_of_machine
#include "dev/test/machine.c"
#undef main
#define main main_of_stories
#include "dev/test/stories.c"
#undef main
#define main main_of_minutes
#include "dev/test/minutes.c"
#undef main
#define main main_of_gguf
#include "dev/test/gguf.c"
#undef main
#define main main_of_tokenizers
#include "dev/test/tokenizers.c"
#undef main

int main(void) {
    const struct {
        int (*tests)(void);
        int in_double;
    } programs[] = {
        {main_of_proof, 1},
        {main_of_layers, 1},
        {main_of_lstm, 1},
        {main_of_routers, 1},
        {main_of_attention, 1},
        {main_of_shapes, 1},
        {main_of_recipes, 1},
        {main_of_training, 1},
        {main_of_numbers, 1},
        {main_of_learning, 1},
        {main_of_precision, 1},
        {main_of_adapters, 1},
        {main_of_quantized, 1},
        {main_of_teacher, 1},
        {main_of_compress, 1},
        {main_of_offload, 1},
        {main_of_classes, 0},
        {main_of_json, 0},
        {main_of_tokenizer, 0},
        {main_of_tokenize, 0},
        {main_of_loader, 0},
        {main_of_checkpoint, 0},
        {main_of_options, 0},
        {main_of_evaluate, 0},
        {main_of_program, 0},
        {main_of_files, 0},
        {main_of_machine, 0},
        {main_of_stories, 0},
        {main_of_minutes, 0},
        {main_of_gguf, 0},
        {main_of_tokenizers, 0},
    };
    int failed = 0;
    for (size_t i = 0; i < sizeof(programs) / sizeof(programs[0]); i++) {
        if (sizeof(real) == sizeof(float) || programs[i].in_double) {
            failed += programs[i].tests() != 0;
        }
    }
    return failed;
}
