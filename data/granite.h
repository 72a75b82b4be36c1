// Granite's four factors, folded into the weights when they are read, so that the model itself needs none.
// Gives: Config's factors; take_factors, fold_factors, write_factors. Needs: Config of train_moe.c, which includes it
// twice by way of dev/parts.h; data/hugging_face.h and dev/save.h call it.
//
// A Granite (IBM; the class GraniteMoe of transformers) computes, with E its embedding and m, a, r, s the fields
// embedding_multiplier, attention_multiplier, residual_multiplier and logits_scaling:
//     x = m E[token];  scores = a q.k;  x = x + r attention(...);  x = x + r experts(...);  logits = norm(x) E^T / s
// Here a score is q.k / sqrt(D). So the rows of queries become a sqrt(D) times as large, what writes to x becomes r
// times as large, the embedding m times, and the last norm 1 / s times, and once more 1 / m where E is also the
// output's matrix. The model computes the same. It is written back with these weights, and with factors that are 1 and
// 1 / sqrt(D).
#ifdef CONFIG_FIELDS
    double fold_embedding, fold_queries, fold_residual, fold_logits; // weights that are read, times these; 0: as they are
#elif !defined(GRANITE_H)
#define GRANITE_H

int head_width(const Config *c); // dev/mixers/attention_experts.h

const char *const granite_factors[] = {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"};

// Notes the factors m, a, r, s of a file.
void take_factors(Config *c, const double factor[4]) {
    double plain = 1 / sqrt((double)head_width(c));
    c->fold_embedding = factor[0];
    c->fold_queries = factor[1] == plain ? 1 : factor[1] / plain;
    c->fold_residual = factor[2];
    c->fold_logits = 1 / factor[3];
}

void multiply_numbers(real *numbers, size_t count, double by) {
    if (by != 0 && by != 1) {
        for (size_t i = 0; i < count; i++) {
            numbers[i] = (real)((double)numbers[i] * by);
        }
    }
}

// Folds the factors into a whole tensor that was read.
void fold_factors(const Config *c, const Tensor *t, real *numbers) {
    static const char *const residual[] = {"proj", "w_out", "dense_out", NULL};
    double by = 1;
    if (c->fold_embedding == 0) {
        return;
    }
    if (!strcmp(t->kind, "qkv")) {
        multiply_numbers(numbers, (size_t)c->heads * (size_t)head_width(c) * (size_t)c->dim, c->fold_queries);
        return;
    }
    if (!strcmp(t->kind, "embed")) {
        by = c->fold_embedding;
    } else if (!strcmp(t->kind, "norm")) {
        by = c->fold_logits / (c->untied ? 1 : c->fold_embedding);
    } else if (find_word(residual, t->kind) >= 0) {
        by = c->fold_residual;
    }
    multiply_numbers(numbers, t->whole, by);
}

// The factors of a model that has none: its fields of config.json.
void write_factors(FILE *file, const Config *c) {
    char number[64];
    for (int i = 0; i < COUNT(granite_factors); i++) {
        const char *factor = i == 1 ? number_text(1 / sqrt((double)head_width(c)), number) : "1.0";
        fprintf(file, "  \"%s\": %s,\n", granite_factors[i], factor);
    }
}

#endif
