// Finite differences: the test that a gradient is one.
// Gives: check_slopes. Needs: dev/test/model.h.

#pragma once
#include "dev/test/model.h"

// A hash of the discrete decisions that the last call of the objective took (which experts were chosen, which numbers ReLU let
// through). 0 if there are none.
uint64_t decided;

// Compares the gradient dx of f with central differences of fourth order, in `samples` of the n numbers of x. The error is
// measured by the larger of the gradient itself and the root mean square of dx, and may be 1e-6. Where a decision changes
// between two of the four points, f has a kink and no slope: such numbers are skipped, and the function returns how many.
int check_slopes(const char *what, real *x, size_t n, const real *dx, double (*f)(void *), void *ctx, int samples) {
    const double h = 1e-3, steps[4] = {2 * h, h, -h, -2 * h};
    double rms = sqrt(inner(dx, dx, n) / (double)n), value[4];
    int skipped = 0;
    if (!IS_DOUBLE)
        return 0;
    if (!(rms > 0))
        fail_msg("%s: the gradient is zero or NaN", what);
    f(ctx);
    uint64_t before = decided;
    for (int sample = 0; sample < samples; sample++) {
        size_t i = hash64((uint64_t)sample + n) % n;
        real kept = x[i];
        int kink = 0;
        for (int j = 0; j < 4; j++) {
            x[i] = kept + (real)steps[j];
            value[j] = f(ctx);
            kink |= decided != before;
        }
        x[i] = kept;
        skipped += kink;
        double slope = (-value[0] + 8 * value[1] - 8 * value[2] + value[3]) / (12 * h), grad = (double)dx[i];
        double error = fabs(slope - grad) / fmax(fabs(grad), rms);
        if (!kink && !(error <= 1e-6))
            fail_msg("%s[%zu]: gradient %.12g, finite difference %.12g, error %.2g", what, i, grad, slope, error);
    }
    return skipped;
}
