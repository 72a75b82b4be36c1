// The scores of experts, and which are the highest: train_moe.c's scores_forward and select_topk, for LANES tokens at a time.
// Gives: fast_scores_forward and fast_select_topk, under the names scores_forward and select_topk. Needs:
// dev/cpu/rows.h; the plain functions of these names in train_moe.c, which includes it.
//
// Which score is the highest cannot be foreseen, so in the plain loop the processor guesses wrong at every other
// token, and each time loses what twenty additions would take. Here nothing branches: a comparison of two vectors
// says for each token whether it takes the one or the other.
#pragma once
#include "rows.h"

// p (rows,E) = softmax of each row of the logits, or sigmoid of each number; lse (rows): see softmax()
void fast_scores_forward(real *p, real *lse, const real *logits, int rows, int E, int score) {
    if (score != SOFTMAX) {
        scores_forward(p, lse, logits, rows, E, score);
        return;
    }
    memcpy(p, logits, (size_t)rows * E * sizeof(real));
    fast_softmax_rows(p, lse, rows, E);
}

// The K best of LANES tokens, first .. first+LANES; score (E): see load_rows(). Numbers of experts are kept as reals,
// because then they can be chosen as the scores are.
void choose_experts(int *expert, vec *score, int first, int N, int E, int K) {
    vec zero = {0}, last = zero - 1, limit = zero; // the expert that was chosen before, and its score
    for (int k = 0; k < K; k++) {
        // The best of those that come after the last one in the order of their scores.
        vec best = zero - 1, top = zero, index = zero;
        for (int e = 0; e < E; e++, index += 1) {
            __typeof__(zero < zero) after = (last < zero) | (score[e] < limit) | ((score[e] == limit) & (index > last));
            __typeof__(zero < zero) better = after & ((best < zero) | (score[e] > top));
            best = CHOOSE(better, index, best);
            top = CHOOSE(better, score[e], top);
        }

        // There is none only where a score is not a number.
        last = CHOOSE(best < zero, zero + (real)k, best);
        limit = CHOOSE(best < zero, score[k], top);
        for (int lane = 0; lane < min_int(LANES, N - first); lane++) {
            expert[(size_t)(first + lane) * K + k] = (int)last[lane];
        }
    }
}

// expert (N,K): the K largest numbers of each row of p (N,E), largest first; of equal ones the lower index comes
// first.
void fast_select_topk(int *expert, const real *p, int N, int E, int K) {
    if (E > SHORT) {
        select_topk(expert, p, N, E, K);
        return;
    }
#pragma omp parallel for if (is_worth_threads(N, K * E))
    for (int first = 0; first < N; first += LANES) {
        vec score[SHORT];
        load_rows(score, p, first, N, E);
        choose_experts(expert, score, first, N, E, K);
    }
}

#define scores_forward fast_scores_forward
#define select_topk    fast_select_topk
