// What the processor and the system give this program: instructions, processors, threads.
// Gives: ask_processor, which runs before all else; choose_waiting, share_processors, team_size,
// describe_threads, quota_share. Needs: dev/util.h, which includes it.
#pragma once

// ---- instructions

// What is marked so has none of the newer instructions that the compiler may use everywhere else.
#if defined(__x86_64__) && defined(__clang__)
#define OLD_INSTRUCTIONS __attribute__((target("no-avx,no-bmi,no-bmi2,no-movbe,no-lzcnt")))
#elif defined(__x86_64__)
#define OLD_INSTRUCTIONS __attribute__((target("arch=x86-64")))
#else
#define OLD_INSTRUCTIONS
#endif

// Writes one message in three parts, and ends the program. It allocates nothing, since it may run before main or where
// a signal came.
OLD_INSTRUCTIONS __attribute__((noreturn)) void exit_with_message(const char *first, const char *second,
                                                                  const char *third) {
    const char *const parts[] = {first, second, third};
    for (int i = 0; i < 3; i++) {
        size_t size = 0;
        while (parts[i][size]) {
            size++;
        }
        if (write(2, parts[i], size) < 0) {
            break;
        }
    }
    _exit(1);
}

OLD_INSTRUCTIONS __attribute__((noreturn)) void end_on_other_processor(const char *instructions) {
    exit_with_message(PROGRAM ": built for a processor that has ", instructions,
             ", and this one does not: run make clean " PROGRAM " here\n");
}

OLD_INSTRUCTIONS void on_illegal_instruction(int number) {
    (void)number;
    exit_with_message(PROGRAM ": an illegal instruction: ", "perhaps it was built for another processor; ",
             "run make clean " PROGRAM " here\n");
}

// Before main, and before all functions that also run before main: does this processor have what the compiler took
// for granted? The oldest set that it lacks is named. For sets that are not in this list there is the signal.
OLD_INSTRUCTIONS BEFORE_ALL void ask_processor(void) {
    signal(SIGILL, on_illegal_instruction);
#if defined(__x86_64__) || defined(__i386__)
    const char *missing = NULL;
    __builtin_cpu_init();
#define LOOK_FOR(set, name) missing = __builtin_cpu_supports(set) ? missing : name
#ifdef __AVX512BF16__
    LOOK_FOR("avx512bf16", "AVX-512 BF16");
#endif
#ifdef __AVX512VBMI2__
    LOOK_FOR("avx512vbmi2", "AVX-512 VBMI2");
#endif
#ifdef __AVX512VNNI__
    LOOK_FOR("avx512vnni", "AVX-512 VNNI");
#endif
#ifdef __AVX512VBMI__
    LOOK_FOR("avx512vbmi", "AVX-512 VBMI");
#endif
#ifdef __AVX512VL__
    LOOK_FOR("avx512vl", "AVX-512 VL");
#endif
#ifdef __AVX512DQ__
    LOOK_FOR("avx512dq", "AVX-512 DQ");
#endif
#ifdef __AVX512BW__
    LOOK_FOR("avx512bw", "AVX-512 BW");
#endif
#ifdef __AVX512F__
    LOOK_FOR("avx512f", "AVX-512");
#endif
#ifdef __AVX2__
    LOOK_FOR("avx2", "AVX2");
#endif
#ifdef __BMI2__
    LOOK_FOR("bmi2", "BMI2");
#endif
#ifdef __FMA__
    LOOK_FOR("fma", "FMA");
#endif
#ifdef __AVX__
    LOOK_FOR("avx", "AVX");
#endif
#ifdef __SSE4_2__
    LOOK_FOR("sse4.2", "SSE4.2");
#endif
#ifdef __SSSE3__
    LOOK_FOR("ssse3", "SSSE3");
#endif
#undef LOOK_FOR
    if (missing) {
        end_on_other_processor(missing);
    }
#endif
}

// ---- processors

// What this process may use; share_processors() fills it in.
struct {
    double quota;  // processors' worth of time that its control group has, 0: no limit
    int processes; // of one job on this machine, which share it
    int shared;    // 1: neither --threads nor OMP_NUM_THREADS decided how many threads there are
} machine = {0, 1, 0};

// The processors on which this process may run.
int processor_count(void) {
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return max_int(1, (int)sysconf(_SC_NPROCESSORS_ONLN));
#endif
}

// The processors that all processes of the job on this machine may run on.
int job_processors(void) {
    return machine.processes > 1 ? (int)sysconf(_SC_NPROCESSORS_ONLN) : processor_count();
}

// The first numbers of a file; returns how many were read. The file begins with "max" where there is no limit.
int read_two(const char *folder, const char *name, double *first, double *second) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    int count = file ? fscanf(file, "%lf %lf", first, second) : 0;
    if (file) {
        fclose(file);
    }
    return count;
}

// The smallest quota of a control group and of those around it, which are the folders above it up to `top`; 0: none
// has one. Version 2 has both numbers in cpu.max, version 1 in two files.
double quota_of_group(const char *top, const char *group) {
    char folder[4096];
    double least = 0;
    int end = snprintf(folder, sizeof(folder), "%s%s", top, group);
    int least_end = (int)strlen(top);
    while (end >= least_end && end < (int)sizeof(folder)) {
        double quota = 0, period = 0, unused;
        folder[end] = 0;
        if (read_two(folder, "cpu.max", &quota, &period) == 2 ||
            (read_two(folder, "cpu.cfs_quota_us", &quota, &unused) == 1 &&
             read_two(folder, "cpu.cfs_period_us", &period, &unused) == 1)) {
            if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) {
                least = quota / period;
            }
        }
        do {
            end--;
        } while (end > least_end && folder[end] != '/');
    }
    return least;
}

// How many processors' worth of time the control groups of this process leave it, as containers and services set
// them; 0: no limit. `root` is "" except in tests.
double processor_quota(const char *root) {
    char path[1024], line[3000], top[2048];
    double least = 0;
    snprintf(path, sizeof(path), "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = 0;

        // A line is number:controllers:group. Version 2 names no controllers.
        char *kinds = strchr(line, ':'), *group = kinds ? strchr(kinds + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *group++ = 0;
        kinds++;
        snprintf(top, sizeof(top), ",%s,", kinds);
        if (kinds[0] && !strstr(top, ",cpu,")) {
            continue;
        }
        const char *const folders[] = {kinds, kinds[0] ? "cpu" : "unified"};
        for (int i = 0; i < 2; i++) {
            snprintf(top, sizeof(top), "%.900s/sys/fs/cgroup%s%.1000s", root, folders[i][0] ? "/" : "", folders[i]);
            double quota = quota_of_group(top, group);
            least = quota > 0 && (least == 0 || quota < least) ? quota : least;
        }
    }
    if (file) {
        fclose(file);
    }
    return least;
}

// The part of what `threads` could compute that the quota lets them have.
double quota_share(int threads) {
    double wanted = (double)threads * machine.processes;
    return machine.quota > 0 && machine.quota < wanted ? machine.quota / wanted : 1;
}

// ---- threads

// How long a thread that waits for the others stays awake, in seconds: about as long as it takes to fall asleep and to
// be woken. So waiting never costs more than twice what it must (Karlin et al. 1991, Empirical Studies of Competitive
// Spinning). Many waits between the parallel loops of a step are shorter, and a program that wants the processor gets
// it after this time. doc/measured.md has what 10 to 50 us gain on a quiet machine and lose on a busy one.
#define AWAKE 20e-6

// How often a waiting thread can look in so many seconds, in the manner of GCC's libgomp: a look, then a pause of the
// processor, which is 10 to 150 clock cycles long. The best of a few tries counts, as this thread may be interrupted.
long looks_in(double time) {
    enum { LOOKS = 200, TRIES = 20 };
    static volatile int never = 0;
    double best = 1;
    for (int i = 0; i < TRIES; i++) {
        double start = seconds();
        for (int k = 0; k < LOOKS && !never; k++) {
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
        }
        best = fmin(best, seconds() - start);
    }
    return (long)(time / fmax(best, 1e-8) * LOOKS);
}

// Waiting threads should stay awake for a moment, and then sleep. OpenMP has only the two extremes: "active", its
// default, where a step becomes ten times slower on a machine with anything else to do; and "passive", where two
// threads lose a quarter of their time, because they fall asleep and are woken a hundred times in a short step. GCC's
// libgomp has the middle as GOMP_SPINCOUNT. It holds only where no more threads than processors wait: with more, they
// sleep at once. LLVM's libomp knows whole milliseconds, which are too long, so there waiting threads sleep. The runtimes
// read this before main, so the program begins once more; what the user has set stays.
void choose_waiting(char **argv) {
#ifdef _OPENMP
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME")) {
        return;
    }
    char looks[32];
    snprintf(looks, sizeof(looks), "%ld", looks_in(AWAKE));
    if (setenv("GOMP_SPINCOUNT", looks, 1) == 0 && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) {
        begin_again("/proc/self/exe", argv);
    }
#else
    (void)argv;
#endif
}

// How many of `threads` one of so many processes should have: no more than it has processors, or parts of one, at
// work for it. Threads beyond the quota would be stopped in the middle of a step, and the others wait for them.
int fair_threads(int threads, int processors, double quota, int processes) {
    if (quota > 0 && quota < processors) {
        processors = (int)ceil(quota);
    }
    return max_int(1, min_int(threads, processors / processes));
}

// Takes `threads`, or, where that is 0 and the environment names no number, this process's share of the processors.
void share_processors(int threads, int processes) {
    machine.quota = processor_quota("");
    machine.processes = processes;
    machine.shared = !threads && !getenv("OMP_NUM_THREADS");
    if (threads) {
        use_threads(threads);
    } else if (machine.shared) {
        use_threads(fair_threads(thread_count(), job_processors(), machine.quota, processes));
    }
}

// The threads that work together, which the system may make fewer than those that were asked for.
int team_size(void) {
    int team = 1;
#ifdef _OPENMP
#pragma omp parallel
    if (thread_number() == 0) {
        team = omp_get_num_threads();
    }
#endif
    return team;
}

// What a user should know about the number of threads, in one line; "" if there is nothing.
void describe_threads(char text[256], int asked, int team, int processors) {
    double usable = machine.quota > 0 && machine.quota < processors ? machine.quota : processors;
    int best = fair_threads(asked, processors, machine.quota, machine.processes);
    text[0] = 0;
#ifndef _OPENMP
    snprintf(text, 256, "built without OpenMP: one thread, whatever the machine has");
    (void)usable, (void)best, (void)team;
    return;
#endif
    if (team < asked) {
        snprintf(text, 256, "threads asked for: %d; OMP_THREAD_LIMIT or OMP_DYNAMIC allows no more than %d", asked, team);
    } else if (machine.shared && usable < processors) {
        snprintf(text, 256, "the processor quota here is %.3g of %d processors, so there %s %d thread%s; --threads takes "
                 "another number", usable, processors, team > 1 ? "are" : "is", team, team > 1 ? "s" : "");
    } else if (best < team) {
        snprintf(text, 256, "%d threads for %.3g processor%s%s: they will wait for each other; --threads %d is faster",
                 team * machine.processes, usable, usable == 1 ? "" : "s",
                 usable < processors ? " (the quota here)" : "", best);
    }
}
