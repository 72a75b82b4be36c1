// What the program does instead of training: it goes on from a text, measures a model, or writes it in another form.
// Gives: task_of, refuse_empty_names, refuse_two_tasks, do_task. Needs: Run of dev/run.h, which includes it, and the files
// that dev/run.h includes.
#pragma once
#include "open_model.h" // finds and reads a model
#include "few_bits.h"   // --quantize
#include "export.h"     // --export: the model as a GGUF file

enum { NO_TASK, PROMPT, EVALUATE, MERGE, QUANTIZE, EXPORT };

const char *const task_options[] = {"", "prompt", "evaluate", "merge", "quantize", "export"};

// The first of them that the command line asks for, behind `after`; NO_TASK: none.
int next_task(const Config *c, int after) {
    const int asked[] = {0, c->prompt != NULL, c->evaluate, c->merge[0] != 0, c->quantize != 0, c->export_to[0] != 0};
    for (int i = after + 1; i < COUNT(asked); i++) {
        if (asked[i]) {
            return i;
        }
    }
    return NO_TASK;
}

int task_of(const Config *c) {
    return next_task(c, NO_TASK);
}

// An empty name, as of a shell's variable that is not set, asks for no task, and a training would begin instead.
void refuse_empty_names(const Config *asked) {
    const char *const options[] = {"merge", "export", "quantized"}, *values[] = {asked->merge, asked->export_to, asked->quantized};
    for (int i = 0; i < COUNT(options); i++) {
        if (asked->given[find_option(options[i])] && !values[i][0]) {
            usage_fail("--%s: the name is empty; say what the new %s is called", options[i], i == 1 ? "file" : "folder");
        }
    }
}

// Each task is done by itself, by one process.
void refuse_two_tasks(const Config *asked) {
    int task = task_of(asked), other = next_task(asked, task);
    const char *name = task_options[task];
    refuse_empty_names(asked);
    if (!task) {
        return;
    }
    if (other || asked->resume) {
        usage_fail("--%s does nothing else: give it without --%s", name, other ? task_options[other] : "resume");
    }
    if (ranks.size > 1) {
        usage_fail("--%s: one process does it; start it without mpirun", name);
    }
    if (task == MERGE && asked->init[0]) {
        usage_fail("--merge takes the adapter in --out, which knows its base: leave --init out");
    }
    if (task == MERGE && is_there(asked->merge)) {
        usage_fail("--merge %s: it is there already; choose another name, or remove it", asked->merge);
    }
}

// The model in run->out goes on from a text.
void answer_prompt(Run *run, const char *dir) {
    const Config *c = &run->config;
    char *text = NULL;
    load_own_tokenizer(run, dir);
    load_model(run, dir, 1);
    fprintf(stderr, "%s, %s%s%s\n", dir, c->recipe, c->blocks ? ", " : "", c->blocks ? scheme_names[c->blocks] : "");
    const char *prompt = c->prompt;
    size_t size = strlen(prompt);
    if (!strcmp(prompt, "-")) {
        prompt = text = read_stream(stdin, "standard input", &size);
    }
    while (size && (prompt[size - 1] == '\n' || prompt[size - 1] == '\r')) { // as an editor or a shell leaves them there
        size--;
    }
    fwrite(prompt, 1, size, stdout);
    generate(run, prompt, size, stdout);
    printf("\n");
    free(text);
    print_offload(c, stderr);
    close_model(run);
}

// Prints the loss of a model on the validation tokens of its data, or of --data, as the last evaluation of its run did.
void evaluate_model(Run *run, const Config *asked, const char *dir) {
    char error[32], errors[64] = "";
    const Config *c = &run->config;
    load_tokenizer(run, dir);
    compare_tokenizers(run, dir);
    compare_tokenizers(run, c->data);
    open_text(run, "val");
    size_t blocks = load_model(run, dir, c->seq);
    Evaluation e = evaluate(run, evaluation_windows(run, !asked->given[find_option("eval-tokens")]));
    if (isfinite(e.bpb_error)) {
        snprintf(errors, sizeof(errors), ", standard error %s", error_text(e.bpb_error, error));
    }
    printf("%s, %s%s%s: validation loss %.5f nats per token, %.5f bits per byte%s, from %s%.0f tokens of %s\n", dir, c->recipe,
           c->blocks ? ", " : "", c->blocks ? scheme_names[c->blocks] : "", e.loss, e.bpb, errors,
           e.windows == run->val->windows ? "all " : "", (double)e.windows * c->seq, c->data);
    size_t bytes = run->model->size * sizeof(real) - bytes_in_file_only(run->model, WEIGHTS);
    double numbers = (double)bytes / 1048576, few = (double)blocks / 1048576;
    printf("weights in memory: %.2f MiB", numbers + few);
    if (c->blocks) {
        printf(", of which %.2f MiB are blocks of few bits", few);
    }
    printf("\n");
    close_model(run);
}

// Writes the model of an adapter and its base into the folder --merge.
void merge_model(Run *run, const char *dir) {
    if (!run->config.lora) {
        usage_fail("--merge: %s is a whole model, and no adapter that --lora has trained", dir);
    }
    load_own_tokenizer(run, dir);
    load_model(run, dir, 1);
    merge_adapter(run, dir, run->config.merge);
    close_model(run);
}

void do_task(Run *run, const Config *asked) {
    const char *const purposes[] = {"", "generate from", "evaluate", "merge", "quantise", "export"};
    char dir[4096];
    int task = task_of(asked), window = find_model(run, asked, purposes[task], dir);
    if (run->config.lora && (task == QUANTIZE || task == EXPORT)) {
        fail("%s is an adapter: make one model of it and its base by --merge, and --%s that", dir, task_options[task]);
    }
    switch (task) {
    case PROMPT:
        answer_prompt(run, dir);
        break;
    case EVALUATE:
        evaluate_model(run, asked, dir);
        break;
    case MERGE:
        merge_model(run, dir);
        break;
    case QUANTIZE:
        quantize_model(run, asked, dir);
        break;
    case EXPORT:
        export_model(run, asked, dir, window);
        break;
    }
}
