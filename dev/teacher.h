// Distillation (--teacher): a trained model teaches the one that is in training.
// Gives: Teacher, teacher, teacher_works, be_alone, batch_of_teacher, taught_loss, teacher_in_state. dev/open_teacher.h reads the teacher from its directory.
// Needs: chapters 1 and 2 of train_moe.c, which includes it by dev/parts.h; dev/ranks/comm.h.
//
// Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 2. A token's target is one word. A
// trained model says more: how likely all the other words are, too. With the student's logits z, the teacher's y, and
// softmax(z / T) at a temperature T, which for T > 1 is flatter and shows the unlikely words better, a token's loss is
//     (1 - w) * cross-entropy + w * T^2 * KL        KL = sum over words of q * log(q / p_T)
// with q = softmax(y / T) and p_T = softmax(z / T). The derivative of KL by z is (p_T - q) / T. It shrinks as 1 / T^2, since
// p_T - q shrinks as 1 / T too, and the factor T^2 makes up for that. So, with p = softmax(z),
//     dz = (1 - w) * (p - (1 for the word that came)) + w * T * (p_T - q)
// The teacher is a second model in memory. It has no gradients and no moments, and it reads a batch as it would at an
// evaluation: each sequence is a group of its own. Its logits are in memory for a few rows at a time, as the student's are.
#ifdef CONFIG_FIELDS
    const char *teacher; // the directory of its model; "": there is none
    double distill_weight, distill_temperature; // w, T
#elif !defined(TEACHER_H)
#define TEACHER_H

typedef struct Teacher {
    Model *model; // NULL: there is none
    double loss;  // T^2 * KL, this process's part of the step's mean so far; in the loss it is multiplied by w
    uint64_t fingerprint; // of its weights, as they stand in its files
} Teacher;

Teacher teacher;

double model_forward(Model *m, const Batch *batch); // train_moe.c

// With w = 0 the teacher has no part in the loss, so it does nothing: whatever its numbers are, they change no bit.
int teacher_works(const Config *c) {
    return teacher.model && c->distill_weight > 0;
}

// Each of several processes has a whole teacher for its own tokens. While the teacher works, the process does as if there were
// no others; what is returned goes back into `ranks` afterwards. An error is still reported under the process's own number,
// which is program_rank of util.h.
Ranks be_alone(void) {
    Ranks all = ranks;
    ranks.size = ranks.ep = ranks.groups = 1;
    ranks.rank = ranks.member = 0;
    return all;
}

// What a student's checkpoint says of its teacher, in trainer_state.json: open_teacher() compares it.
void teacher_in_state(char text[64]) {
    text[0] = 0;
    if (teacher.model) {
        snprintf(text, 64, ",\"teacher_fingerprint\":\"%016llx\"", (unsigned long long)teacher.fingerprint);
    }
}

// What the teacher is told of the student's batch.
Batch batch_of_teacher(const Batch *batch) {
    Batch b = *batch;
    b.mode = EVAL_MODE;
    b.scale = 1;
    return b;
}

// A word's part of KL, with x = log(p / q): q * log(q / p) - q + p, where -q + p changes nothing in the sum over all words, since q
// and p both add up to 1. No such part is negative, and where q and p are nearly equal, as they are at a high temperature, it is
// q * (x^2 / 2 + x^3 / 6 + ...): so rounding stays small beside the sum, which is multiplied by T^2.
BOTH double divergence_of_word(double q, double p, double x) {
    double series = 1. / 2 + x * (1. / 6 + x * (1. / 24 + x * (1. / 120 + x * (1. / 720 + x * (1. / 5040 + x / 40320)))));
    return fabs(x) < 0.1 ? q * x * x * series : p - q - q * x;
}

// The student's logits (count,V) come in, and become the gradient of scale * the sum of the losses. taught (count,V): the
// teacher's logits. nll (count) is the plain cross-entropy, kl (count) is T^2 * KL.
void distill_rows(real *nll, real *kl, real *logits, const real *taught, const int *targets, int count, int V, double w,
                  double temperature, double scale) {
    const int each = 8; // rows of a task
    real cool = (real)(1 / temperature);
    real of_target = (real)((1 - w) * scale);
    real of_teacher = (real)(w * temperature * scale);
#pragma omp parallel for
    for (int first = 0; first < count; first += each) {
        real *q = allocate_reals(V); // both at the temperature
        real *p = allocate_reals(V);
        for (int i = first; i < min_int(count, first + each); i++) {
            real *z = logits + (size_t)i * V;
            const real *y = taught + (size_t)i * V;
            int target = targets[i];
            real wanted = z[target];
            for (int v = 0; v < V; v++) {
                q[v] = y[v] * cool;
                p[v] = z[v] * cool;
            }
            double sum = 0, of_p = (double)softmax(p, V), of_q = (double)softmax(q, V);

            // log(p / q) = (z / T - log(sum exp(z / T))) - (y / T - log(sum exp(y / T)))
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) {
                double x = ((double)(z[v] * cool) - of_p) - ((double)(y[v] * cool) - of_q);
                sum += divergence_of_word((double)q[v], (double)p[v], x);
            }
            kl[i] = (real)(temperature * temperature * sum);

            nll[i] = softmax(z, V) - wanted;
            z[target] -= 1;
            for (int v = 0; v < V; v++) {
                z[v] = z[v] * of_target + of_teacher * (p[v] - q[v]);
            }
        }
        free(q);
        free(p);
    }
}

// In place of head_loss(): the loss of a batch and its gradient by h, `rows` rows at a time, where there is a teacher. Returns
// 0, and does nothing, where none works, or where the batch is not for training. Returns 1, and does nothing, where m is the
// teacher itself.
int taught_loss(Model *m, int rows) {
    const Config *c = &m->config;
    const Batch *b = &m->batch;
    Acts *a = &m->acts;
    Model *t = teacher.model;
    int N = b->B * b->T, C = c->dim, V = c->vocab;
    if (m == t) {
        return 1; // the loss of its own words does not matter
    }
    if (!teacher_works(c) || b->mode == EVAL_MODE) {
        return 0;
    }

    // The teacher reads the same tokens. Its last layer's output, after the last norm, stays in t->acts.h.
    Batch its = batch_of_teacher(b);
    Ranks all = be_alone();
    model_forward(t, &its);
    ranks = all;
    multiply_in(c->precision);

    scratch_reset(t);
    real *logits = scratch(m, (size_t)rows * V);
    real *taught = scratch(t, (size_t)rows * V);
    real *kl = t->acts.nll;
    double scale = b->scale / max_int(N, 1);
    double sum = 0;
    for (int first = 0; first < N; first += rows) {
        int count = min_int(rows, N - first);
        const real *h = a->h + (size_t)first * C;
        matmul(logits, h, m->params.head, count, C, V, SET);
        matmul(taught, t->acts.h + (size_t)first * t->config.dim, t->params.head, count, t->config.dim, V, SET);
        distill_rows(a->nll + first, kl + first, logits, taught, b->targets + first, count, V, c->distill_weight,
                     c->distill_temperature, scale);
        matmul_backward(a->dh + (size_t)first * C, m->grads.head, logits, h, m->params.head, count, C, V, SET);
    }
    for (int n = 0; n < N; n++) {
        sum += (double)kl[n] / N;
    }
    teacher.loss = (b->first ? 0 : teacher.loss) + b->scale * sum;
    return 1;
}

#endif
