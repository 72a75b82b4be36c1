// jacobs.c: why experts compete. A toy of Jacobs, Jordan, Nowlan and Hinton 1991, Adaptive Mixtures of Local Experts.
//
//   cc -O2 doc/jacobs.c -o doc/jacobs -lm && doc/jacobs
//
// The data: 100 numbers x in [-1,1], and for each the number d that is wanted, a curve of three straight pieces. The
// model: I = 4 experts, each a straight line o_i = a_i x + b_i, and a gate p = softmax of the lines v_i x + c_i. Two
// objectives, from the same first weights:
//
//   blend     the squared error of the mixture,  (d - y)^2 with y = sum_i p_i o_i
//   compete   the paper's objective,             -log sum_i p_i exp(-1/2 (d - o_i)^2)
//
// Under the first an expert is corrected for what the others leave over, so the experts lean on each other. Under the
// second each expert is compared with d itself, and corrected the more, the better it already is: the winner takes it.
// A language model's mixture is of the first kind: its loss sees the blend only, and no layer has a d of its own.

#include <math.h>
#include <stdint.h>
#include <stdio.h>

enum { BLEND, COMPETE };
enum { I = 4, N = 100, STEPS = 12000, COLUMNS = 60, ROWS = 17 };
const char *const objective_names[] = {"blend", "compete"};

typedef struct Mixture {
    double a[I], b[I], v[I], c[I]; // expert i: a x + b; its logit: v x + c
} Mixture;

double point(int n, int count) { // the n-th of count points that are evenly spread over [-1,1]
    return -1 + 2 * (n + 0.5) / count;
}

double target(double x) { // three pieces: up, down, up
    return x < -0.33 ? 9 * (x + 0.66) : x < 0.33 ? -9 * x : 9 * (x - 0.66);
}

// o (I): what each expert answers to x; p (I): the weight that the gate gives it. Returns the blend y = sum p_i o_i.
double forward(const Mixture *m, double x, double *o, double *p) {
    double top = -INFINITY, sum = 0, y = 0;
    for (int i = 0; i < I; i++)
        top = fmax(top, m->v[i] * x + m->c[i]);
    for (int i = 0; i < I; i++)
        sum += p[i] = exp(m->v[i] * x + m->c[i] - top);
    for (int i = 0; i < I; i++) {
        o[i] = m->a[i] * x + m->b[i];
        p[i] /= sum;
        y += p[i] * o[i];
    }
    return y;
}

// The loss at (x, d); g += its gradient / N.
//   blend:    dL/do_i = -2 p_i (d - y)         dL/dlogit_i = -2 (d - y) p_i (o_i - y)
//   compete:  dL/do_i = -h_i (d - o_i)         dL/dlogit_i = p_i - h_i
// h_i = p_i exp(-1/2 (d - o_i)^2) over the sum of these: how likely it was expert i that made d, now that d is known.
double backward(const Mixture *m, Mixture *g, int objective, double x, double d) {
    double o[I], p[I], h[I], sum = 0, y = forward(m, x, o, p);
    for (int i = 0; i < I; i++)
        sum += h[i] = p[i] * exp(-0.5 * (d - o[i]) * (d - o[i])) + 1e-300; // or 0 / 0 where all are far off
    for (int i = 0; i < I; i++) {
        double by_answer = objective == BLEND ? -2 * p[i] * (d - y) : -h[i] / sum * (d - o[i]);
        double by_logit = objective == BLEND ? -2 * (d - y) * p[i] * (o[i] - y) : p[i] - h[i] / sum;
        g->a[i] += by_answer * x / N;
        g->b[i] += by_answer / N;
        g->v[i] += by_logit * x / N;
        g->c[i] += by_logit / N;
    }
    return objective == BLEND ? (d - y) * (d - y) : -log(sum);
}

void train(Mixture *m, int objective) { // plain gradient descent, on all points at once
    const double rate = 0.2;
    for (int step = 0; step < STEPS; step++) {
        Mixture g = {{0}, {0}, {0}, {0}};
        for (int n = 0; n < N; n++)
            backward(m, &g, objective, point(n, N), target(point(n, N)));
        for (int i = 0; i < I; i++) {
            m->a[i] -= rate * g.a[i];
            m->b[i] -= rate * g.b[i];
            m->v[i] -= rate * g.v[i];
            m->c[i] -= rate * g.c[i];
        }
    }
}

// Draws the wanted curve as dots and, over it, each expert's letter where its own answer lies, if its p is 0.1 or more.
// The line below names the expert with the largest p: a capital where that is 0.9 or more.
void draw(const Mixture *m) {
    char picture[ROWS][COLUMNS + 1], owner[COLUMNS + 1] = "";
    double o[I], p[I];
    for (int row = 0; row < ROWS; row++)
        snprintf(picture[row], COLUMNS + 1, "%*s", COLUMNS, "");
    for (int column = 0, best = 0; column < COLUMNS; column++) {
        double x = point(column, COLUMNS);
        forward(m, x, o, p);
        picture[(int)round(8 - 1.2 * target(x))][column] = '.';
        for (int i = 0; i < I; i++) {
            double row = round(8 - 1.2 * o[i]);
            best = p[i] > p[best] ? i : best;
            if (p[i] >= 0.1 && row >= 0 && row < ROWS)
                picture[(int)row][column] = (char)('A' + i);
        }
        owner[column] = (char)((p[best] >= 0.9 ? 'A' : 'a') + best);
    }
    for (int row = 0; row < ROWS; row++)
        printf("  |%s|\n", picture[row]);
    printf("  |%s|  <- largest p\n", owner);
}

void report(const Mixture *m, int objective) {
    double o[I], p[I], blend = 0, alone = 0, work = 0;
    for (int n = 0; n < N; n++) {
        double x = point(n, N), d = target(x), y = forward(m, x, o, p), entropy = 0;
        int best = 0;
        for (int i = 0; i < I; i++) {
            best = p[i] > p[best] ? i : best;
            entropy -= p[i] > 0 ? p[i] * log(p[i]) : 0;
        }
        blend += (d - y) * (d - y) / N;
        alone += (d - o[best]) * (d - o[best]) / N;
        work += exp(entropy) / N;
    }
    printf("%s\n", objective_names[objective]);
    draw(m);
    printf("  mean squared error of the blend           %7.3f\n", blend);
    printf("  of the expert with the largest p, alone   %7.3f\n", alone);
    printf("  experts at work for one x, exp(entropy p) %7.3f\n\n", work);
}

int main(void) {
    Mixture start = {{0}, {0}, {0}, {0}};
    double *const weights[] = {start.a, start.b, start.v}; // from -3 to 3; c begins at 0
    uint64_t seed = 977;
    for (int k = 0; k < 3 * I; k++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u; // Knuth's MMIX
        weights[k % 3][k / 3] = 6 * ((double)(seed >> 11) / 9007199254740992.0) - 3;
    }
    for (int objective = BLEND; objective <= COMPETE; objective++) {
        Mixture m = start;
        train(&m, objective);
        report(&m, objective);
    }
    return 0;
}
