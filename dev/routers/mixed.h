// Mixed experts: they differ in width and activation (expert_width and expert_activation of train_moe.c), and in the
// size of their first weights. The balance loss counts a choice by its expert's width, since a wide one is more work.
// A custom mixture of the source documents. The recipe: cmoe.
#ifdef CONFIG_FIELDS
    int mixed; // 1: experts differ
#elif !defined(MIXED_H)
#define MIXED_H

extern const Router mixed_loss;

int mixed_wanted(const Config *c) {
    return c->mixed || c->balance == WIDTH;
}

const char *mixed_refuses(const Config *c) {
    int fits = c->ffn % 2 == 0 && c->experts % 4 == 0;
    return c->mixed && !fits ? "--mixed needs an even --ffn and --experts divisible by 4" : NULL;
}

// First weights from 0.5 to 1.5 times as large, from the first expert to the last.
void mixed_init(const Model *m, int i, real *w, const double *frequency) {
    (void)frequency;
    const Config *c = &m->config;
    const Tensor *t = &m->tensors[i];
    size_t end = 0;
    for (int e = 0; c->mixed && t->of_experts && e < c->experts; e++) {
        real factor = (real)(0.5 + (double)e / (c->experts - 1));
        size_t first = end;
        end += expert_size(c, t, e);
        for (size_t j = first; j < end; j++) {
            if (j >= t->first && j < t->first + t->size) { // several processes: these are here
                w[j - t->first] *= factor;
            }
        }
    }
}

// The form of Switch Transformers (see add_balance), with counts times widths.
void mixed_forward(Model *m, int l, const real *x) {
    (void)x;
    const Config *c = &m->config;
    Route *r = &m->acts.layer[l].route;
    int E = r->E;
    if (c->balance != WIDTH || !r->slope) {
        return;
    }
    double *wide = (double *)allocate(E, sizeof(double));
    for (int i = 0; i < r->N / r->group; i++) {
        for (int e = 0; e < E; e++) {
            wide[e] = r->count[(size_t)i * E + e] * expert_width(c, e);
        }
        add_balance(r->slope + (size_t)i * E, wide, E, c->aux_weight);
    }
    free(wide);
}

const Option mixed_options[] = {
    INTEGER("mixed", mixed, "0", 0, 1, MODEL, "Experts",
            "1: experts differ: widths F/2, F, F, 3F/2; SwiGLU and GELU by turns; first weights 0.5 to 1.5 times as "
            "large"),
};

int widths_count(const Config *c) {
    return c->balance != WIDTH || c->mixed;
}

const Effect mixed_effects[] = {
    {"balance", widths_count, "experts that differ in width: --mixed 1"},
};

const Recipe mixed_recipes[] = {
    {"cmoe", 0, 3, "top-2 of experts that differ in width, activation and scale; balance weighed by width",
     "--mixed 1 --balance width --optimizer adamw", "a custom mixture of the source documents"},
};

const Router mixed_loss = {
    .place = LOSS,
    .wanted = mixed_wanted,
    .refuses = mixed_refuses,
    .init = mixed_init,
    .forward = mixed_forward,
    .options = mixed_options,
    .option_count = COUNT(mixed_options),
    .effects = mixed_effects,
    .effect_count = COUNT(mixed_effects),
    .recipes = mixed_recipes,
    .recipe_count = COUNT(mixed_recipes),
};

#endif
