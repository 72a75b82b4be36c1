// Finite differences: the test that a gradient is one. Include it after the trainer.

#pragma once
#include "dev/test/model.h"

uint64_t decided; // a hash of the discrete decisions of the last objective; 0 where there are none

// Fourth-order central differences of f, `samples` places in x (n), against its gradient dx. The error is relative to
// the larger of the gradient and dx's root mean square. Returns how many places were skipped, since a decision changed
// there.
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
