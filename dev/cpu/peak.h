// The processor's name, and how fast it could compute at most: what the log compares the training with.
// Gives: peak_burst, measured_peak, no_sheet, cpu_name. Needs: dev/cpu/vector.h.
#pragma once
#include <sched.h>
#include "vector.h"

volatile real peak_result[64]; // the results are written here, or the compiler would leave the work out
volatile real peak_one = 1;    // the compiler cannot know that it stays so

// Operations per second of `threads` threads together, by multiply-adds in registers alone, in a stretch of so many
// seconds. It begins when all threads are awake, which can take longer than the stretch, and ends with the last one: so
// it is right, too, where threads have to share a processor.
double peak_burst(int threads, double stretch) {
    enum { SUMS = 12, ROUNDS = 1 << 12 }; // so many sums that none has to wait for its last multiply-add; 7 us
    double start = 0, end = 0, work = 0;
    int come = 0, go = 0;
    (void)threads; // without OpenMP
#pragma omp parallel num_threads(threads)
    {
        int team = 1;
#ifdef _OPENMP
        team = omp_get_num_threads();
#endif
        vec sum[SUMS], x = {0}, y = {0};
        x += (real)0.999 * peak_one; // the sums go towards y / (1 - x), so none overflows
        y += peak_one;
        for (int i = 0; i < SUMS; i++) {
            sum[i] = y + (real)i;
        }

        // The last thread that comes starts the clock.
        if (__atomic_add_fetch(&come, 1, __ATOMIC_ACQ_REL) == team) {
            start = seconds();
            __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
        }
        while (!__atomic_load_n(&go, __ATOMIC_ACQUIRE)) {
            sched_yield();
        }

        double mine = 0, now;
        do {
            for (int k = 0; k < ROUNDS; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < SUMS; i++) {
                    sum[i] = sum[i] * x + y;
                }
            }
            mine += 2.0 * SUMS * LANES * ROUNDS;
            now = seconds();
        } while (now - start < stretch);
        for (int i = 1; i < SUMS; i++) {
            sum[0] += sum[i];
        }
        peak_result[thread_number() % 64] = vec_sum(sum[0]);
#pragma omp critical
        {
            work += mine;
            end = fmax(end, now);
        }
    }
    return work / (end - start);
}

// What no program can exceed on this machine today: the best of several bursts, of what the quota leaves of it.
double measured_peak(void) {
    double best = 0, begin = seconds();
    int team = team_size();
    while (seconds() - begin < 0.04) {
        best = fmax(best, peak_burst(team, 3e-3));
    }
    return best * quota_share(team);
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
