// The processor's name, and how fast it could compute at most: what the log compares the training with.
// Gives: peak_work, measured_peak, no_sheet, cpu_name. Needs: dev/cpu/vector.h; of bf16.h, how fast products are.
#pragma once
#include "vector.h"
#include "bf16.h"

volatile real peak_result[64]; // the results are written here, or the compiler would leave the work out
volatile real peak_one = 1;    // the compiler cannot know that it stays so

// work[i] = the operations that `threads` threads did together in the i-th of so many stretches of time, all as long as
// `stretch` seconds, by multiply-adds in registers alone. Between two stretches no thread rests. What is slow, such as a
// thread that is still asleep at the beginning, spoils the stretch in which it happens and no other; and where threads
// have to share a processor, no more is counted than they do.
void peak_work(int threads, double stretch, int stretches, double *work) {
    enum { SUMS = 12, ROUNDS = 1 << 12 }; // so many sums that none has to wait for its last multiply-add; 7 us
    double start = seconds();
    (void)threads; // without OpenMP
    memset(work, 0, (size_t)stretches * sizeof(double));
#pragma omp parallel num_threads(threads)
    {
        vec sum[SUMS], x = {0}, y = {0};
        x += (real)0.999 * peak_one; // the sums go towards y / (1 - x), so none overflows
        y += peak_one;
        for (int i = 0; i < SUMS; i++) {
            sum[i] = y + (real)i;
        }
        int at = 0, first = 0; // rounds in the first stretch: so many that the clock must stand still
        while (at < stretches && (at > 0 || first++ < 1 << 12)) {
            for (int k = 0; k < ROUNDS; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < SUMS; i++) {
                    sum[i] = sum[i] * x + y;
                }
            }
            at = (int)((seconds() - start) / stretch);
            if (at >= 0 && at < stretches) {
#pragma omp atomic
                work[at] += 2.0 * SUMS * LANES * ROUNDS;
            }
        }
        for (int i = 1; i < SUMS; i++) {
            sum[0] += sum[i];
        }
        peak_result[thread_number() % 64] = vec_sum(sum[0]);
    }
}

// Operations per second that no program can exceed on this machine today: those of the best stretch, of what the quota
// leaves of them.
double measured_peak(void) {
    enum { STRETCHES = 8, TURNS = 5 };
    const double stretch = 3e-3;
    double work[STRETCHES], best = 0, before = 0;
    int team = team_size();

    // The system may have put two threads on one processor. Each turn wakes them anew, and the last one is that which finds
    // no more than those before it.
    for (int turn = 0; turn < TURNS && (turn < 2 || best > 1.03 * before); turn++) {
        before = best;
        peak_work(team, stretch, STRETCHES, work);
        for (int i = 0; i < STRETCHES; i++) {
            best = fmax(best, work[i] / stretch);
        }
    }
    return best * quota_share(team) * products_gain;
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
    name_of_processor(name);
    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "model name : %127[^\n]", name) == 1) {
            break;
        }
    }
    if (file) {
        fclose(file);
    }
}
