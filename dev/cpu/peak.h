// The processor's name, and how fast it could compute at most: what the log compares the training with.
// Gives: measured_peak, no_sheet, cpu_name. Needs: dev/cpu/vector.h.
#pragma once
#include "vector.h"

volatile real peak_result[64]; // the results are written here, or the compiler would leave the work out

// Operations per second of all threads, measured by multiply-adds that need no memory. No program can be
// faster on this machine today.
double measured_peak(void) {
    enum { SUMS = 12, ROUNDS = 1 << 16 }; // so many sums that none has to wait for its last multiply-add
    double best = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        double start = seconds();
#pragma omp parallel
        {
            vec sum[SUMS], x = {0}, y = {0};
            x += (real)0.999; // the sums go towards y / (1 - x), so none overflows
            y += (real)1;
            for (int i = 0; i < SUMS; i++) {
                sum[i] = y + (real)i;
            }
            for (int k = 0; k < ROUNDS; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < SUMS; i++) {
                    sum[i] = sum[i] * x + y;
                }
            }
            for (int i = 1; i < SUMS; i++) {
                sum[0] += sum[i];
            }
            peak_result[thread_number() % 64] = dot((real *)&sum[0], (real *)&sum[1], LANES);
        }
        best = fmax(best, 2.0 * SUMS * LANES * ROUNDS * thread_count() / (seconds() - start));
    }
    return best;
}

// The peak by the data sheet. A processor's has none that would hold for its clock today.
double no_sheet(void) {
    return 0;
}

// The processor's name, as far as the system tells.
void cpu_name(char name[128]) {
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, 128, "cpu");
    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "model name : %127[^\n]", name) == 1) {
            break;
        }
    }
    if (file) {
        fclose(file);
    }
}
