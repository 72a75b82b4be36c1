// What a checkpoint keeps of the routers besides their weights: how long each expert has had no token, its recent
// load, and what a warning was printed of. So a run that goes on warns of the same experts as one that was never
// stopped.
// Gives: write_router_state, read_router_state. Needs: Run of dev/run.h, which includes it; dev/statistics.h.
#pragma once

#define ROUTER_STATE "router_state.json"

// A small file of the checkpoint.
void write_router_state(const Run *run, const char *dir) {
    const Config *c = &run->config;
    const char *comma = "";
    FILE *file = open_for_writing(dir, ROUTER_STATE);
    fprintf(file, "{\"trained\":%d,\"layers\":[", run->trained);
    for (int l = 0; l < c->layers; l++) {
        if (!is_moe(c, l)) {
            continue;
        }
        const Statistics *s = run->backend->statistics(run->model, l);
        fprintf(file, "%s\n{\"layer\":%d,\"warned\":%d,\"idle\":[", comma, l, run->warned[l]);
        for (int e = 0; e < c->experts; e++) {
            fprintf(file, "%s%d", e ? "," : "", s->idle[e]);
        }
        fprintf(file, "],\"recent\":[");
        for (int e = 0; e < c->experts; e++) {
            char number[64];
            fprintf(file, "%s%s", e ? "," : "", number_text(s->recent[e], number));
        }
        fprintf(file, "]}");
        comma = ",";
    }
    fprintf(file, "]}\n");
    close_written(file, dir, ROUTER_STATE);
}

// The list of E numbers under this name in an object of `path`.
void read_experts(const Json *object, const char *name, int E, double *to, const char *path) {
    const Json *list = expect_member(object, name, 'a', path);
    int count = 0;
    for (const Json *e = list->child; e; e = e->next, count++) {
        if (count < E) {
            to[count] = e->type == 'n' ? e->number : -1;
        }
        if (count >= E || !(to[count] >= 0 && to[count] <= 2e9)) {
            fail("%s: damaged: %s has something else than %d numbers from 0 on", path, name, E);
        }
    }
    if (count != E) {
        fail("%s: damaged: %s has %d numbers, and there are %d experts", path, name, count, E);
    }
}

// Checkpoints of earlier days do not have the file: there the statistics begin anew.
void read_router_state(Run *run, const char *dir) {
    const Config *c = &run->config;
    char path[4200];
    size_t size;
    if (!has_file(dir, ROUTER_STATE)) {
        return;
    }
    snprintf(path, sizeof(path), "%s/%s", dir, ROUTER_STATE);
    char *text = read_file(path, &size);
    Json *state = json_parse(text, size, path);
    int *idle = (int *)allocate(c->experts, sizeof(int));
    double *recent = (double *)allocate(c->experts, sizeof(double)), *steps = (double *)allocate(c->experts, sizeof(double));
    double trained = expect_member(state, "trained", 'i', path)->number;
    if (!(trained >= 0 && trained <= 2e9)) {
        fail("%s: damaged: trained is %g; expected a number from 0 to 2e9", path, trained);
    }
    run->trained = (int)trained;
    for (const Json *at = expect_member(state, "layers", 'a', path)->child; at; at = at->next) {
        double l = expect_member(at, "layer", 'i', path)->number;
        if (!(l >= 0 && l < c->layers) || !is_moe(c, (int)l)) {
            fail("%s: damaged: layer %g has no experts", path, l);
        }
        read_experts(at, "idle", c->experts, steps, path);
        read_experts(at, "recent", c->experts, recent, path);
        for (int e = 0; e < c->experts; e++) {
            idle[e] = (int)steps[e];
        }
        run->backend->remember(run->model, (int)l, recent, idle);
        double warned = expect_member(at, "warned", 'i', path)->number;
        run->warned[(int)l] = (unsigned char)((int)fmin(fmax(warned, 0), 3));
    }
    free(idle);
    free(recent);
    free(steps);
    json_free(state);
    free(text);
}
