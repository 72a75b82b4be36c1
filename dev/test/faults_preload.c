// What dev/test/faults.c preloads into a program: it counts the program's allocations and its calls on files, and makes the
// n-th of them fail, or kills the process there.
// Gives: a shared library, steered by the environment. Needs: Linux on x86-64 or 64-bit Arm, and glibc.
//     FAULT_LOG=FILE   writes one letter for each counted call: m an allocation, else a call on files (see calls[])
//     FAULT_AT=N       the number of the call, counted from 1
//     FAULT_KIND=K     memory, space, io, interrupt: the call fails so; short: it reads or writes half of what it was asked
//                      to; kill, half: the process is killed there, or after half of a write
//     FAULT_STAYS=1    all later calls of that kind fail too, as on a full disk
//
// Allocations are taken by their names. Calls on files are taken where they enter the kernel, by a filter of system calls
// (seccomp) that sends the process a signal, since a library cannot come between fwrite and the write inside the C library.
// Counted are the calls from the program and, for it, from the C library; those of OpenMP's runtime are not ours.
#define _GNU_SOURCE
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __x86_64__
#define MACHINE AUDIT_ARCH_X86_64
static const int arguments[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};
#define REGISTER(context, i) ((context)->uc_mcontext.gregs[arguments[i]])
#define RESULT(context)      ((context)->uc_mcontext.gregs[REG_RAX])
__asm__(".text\n"
        "pass_on: mov %rdi,%rax\n mov %rsi,%rdi\n mov %rdx,%rsi\n mov %rcx,%rdx\n mov %r8,%r10\n mov %r9,%r8\n"
        "mov 8(%rsp),%r9\n syscall\n"
        "passed_on: ret\n");
#elif defined(__aarch64__)
#define MACHINE AUDIT_ARCH_AARCH64
#define REGISTER(context, i) ((context)->uc_mcontext.regs[i])
#define RESULT(context)      ((context)->uc_mcontext.regs[0])
__asm__(".text\n"
        "pass_on: mov x8,x0\n mov x0,x1\n mov x1,x2\n mov x2,x3\n mov x3,x4\n mov x4,x5\n mov x5,x6\n svc 0\n"
        "passed_on: ret\n");
#else
#error "dev/test/faults_preload.c knows x86-64 and 64-bit Arm only"
#endif
// A system call that the filter lets pass, since it returns to passed_on. The result is -errno where it fails.
long pass_on(long number, long a, long b, long c, long d, long e, long f);
extern const char passed_on[];

// The calls on files, each with its letter in the log. To open for writing is O; to write to standard error is e, and never
// fails.
static const struct {
    int number;
    char letter;
} calls[] = {
    {SYS_openat, 'o'},    {SYS_read, 'r'},      {SYS_write, 'w'},      {SYS_readv, 'R'},    {SYS_writev, 'W'},
    {SYS_pread64, 'r'},   {SYS_pwrite64, 'w'},  {SYS_close, 'c'},      {SYS_lseek, 'l'},    {SYS_newfstatat, 's'},
    {SYS_fstat, 's'},     {SYS_statx, 's'},     {SYS_faccessat, 'a'},  {SYS_getdents64, 'g'}, {SYS_renameat, 'n'},
    {SYS_renameat2, 'n'}, {SYS_unlinkat, 'u'},  {SYS_mkdirat, 'd'},    {SYS_symlinkat, 'y'}, {SYS_linkat, 'y'},
    {SYS_readlinkat, 'k'}, {SYS_fsync, 'f'},    {SYS_fdatasync, 'f'},  {SYS_truncate, 't'}, {SYS_ftruncate, 't'},
    {SYS_flock, 'x'},     {SYS_mmap, 'p'},      {SYS_statfs, 's'},     {SYS_fstatfs, 's'},  {SYS_fallocate, 't'},
    {SYS_fcntl, 'z'},     {SYS_dup, 'z'},       {SYS_dup3, 'z'},
#ifdef SYS_faccessat2
    {SYS_faccessat2, 'a'},
#endif
#ifdef SYS_open
    {SYS_open, 'o'},      {SYS_creat, 'o'},     {SYS_stat, 's'},       {SYS_lstat, 's'},    {SYS_access, 'a'},
    {SYS_rename, 'n'},    {SYS_unlink, 'u'},    {SYS_rmdir, 'u'},      {SYS_mkdir, 'd'},    {SYS_symlink, 'y'},
    {SYS_link, 'y'},      {SYS_readlink, 'k'},  {SYS_dup2, 'z'},
#endif
};
enum { CALLS = sizeof(calls) / sizeof(calls[0]) };

static int log_file = -1, stays, prepared;
static long fault_at = -1, counted;
static const char *kind = "";
static char failing; // the letter of the call that failed, where it is to fail again
static uintptr_t ours[2], libc[2]; // where the program lies in memory, and where the C library does

static long plain(long number, long a, long b, long c) {
    return pass_on(number, a, b, c, 0, 0, 0);
}

static void die(void) {
    plain(SYS_kill, plain(SYS_getpid, 0, 0, 0), SIGKILL, 0);
}

// Does this call, of this letter, fail? Says so in the log, with the chain of callers.
static int is_failing(char letter) {
    static int inside;
    if (inside) { // what backtrace calls
        return 0;
    }
    long number = __atomic_add_fetch(&counted, 1, __ATOMIC_RELAXED);
    if (log_file >= 0) {
        plain(SYS_write, log_file, (long)&letter, 1);
    }
    int again = stays && failing && (letter == 'm') == (failing == 'm');
    if (fault_at < 0 || (number != fault_at && !again)) {
        return 0;
    }
    if (log_file >= 0 && number == fault_at) {
        void *callers[32];
        inside = 1;
        plain(SYS_write, log_file, (long)"\n", 1);
        backtrace_symbols_fd(callers, backtrace(callers, 32), log_file);
        inside = 0;
    }
    failing = letter;
    return 1;
}

// ---- allocations

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *p, size_t size);

static int fails_to_allocate(const void *caller) {
    uintptr_t at = (uintptr_t)caller;
    int counts = (at >= ours[0] && at < ours[1]) || (at >= libc[0] && at < libc[1]);
    if (!prepared || !counts || !is_failing('m')) {
        return 0;
    }
    if (strcmp(kind, "memory")) {
        if (!strcmp(kind, "kill")) {
            die();
        }
        return 0;
    }
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) {
    return fails_to_allocate(__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    return fails_to_allocate(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *p, size_t size) {
    return fails_to_allocate(__builtin_return_address(0)) ? NULL : __libc_realloc(p, size);
}

// ---- calls on files

// The error that a call fails with; 0: this kind of fault does not happen to it, so that it goes on.
static int error_of(char letter) {
    if (letter == 'e') {
        return 0;
    }
    if (!strcmp(kind, "memory")) {
        return ENOMEM;
    }
    if (!strcmp(kind, "space")) {
        return strchr("OwWndyft", letter) ? ENOSPC : 0;
    }
    if (!strcmp(kind, "interrupt")) {
        return strchr("oOrRwWcfx", letter) ? EINTR : 0;
    }
    return !strcmp(kind, "io") ? EIO : 0;
}

static void on_call(int signal_number, siginfo_t *info, void *context) {
    ucontext_t *c = (ucontext_t *)context;
    long number = info->si_syscall, a[6];
    char letter = '?';
    (void)signal_number;
    for (int i = 0; i < CALLS; i++) {
        letter = calls[i].number == number ? calls[i].letter : letter;
    }
    for (int i = 0; i < 6; i++) {
        a[i] = (long)REGISTER(c, i);
    }
    if (letter == 'o' && (number == SYS_openat ? a[2] : a[1]) & (O_CREAT | O_WRONLY | O_RDWR)) {
        letter = 'O';
    }
    if (letter == 'w' && a[0] == 2) {
        letter = 'e';
    }
    if (prepared && is_failing(letter)) {
        int error = error_of(letter);
        if ((!strcmp(kind, "short") || !strcmp(kind, "half")) && strchr("rw", letter) && a[2] > 1) {
            a[2] /= 2;
        }
        if (!strcmp(kind, "kill")) {
            die();
        }
        if (error) {
            if (letter == 'c') { // it is closed all the same
                plain(number, a[0], 0, 0);
            }
            RESULT(c) = -error;
            return;
        }
    }
    RESULT(c) = pass_on(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (failing && !strcmp(kind, "half") && counted == fault_at) {
        die();
    }
}

// Sends a signal at each of these calls but ours; at mmap only where it maps a file.
static int install_filter(void) {
    uint64_t from = (uint64_t)(uintptr_t)passed_on;
    struct sock_filter code[CALLS + 16];
    int n = 0;
    const int data = BPF_LD | BPF_W | BPF_ABS, equal = BPF_JMP | BPF_JEQ | BPF_K, answer = BPF_RET | BPF_K;
#define ADD(...)                                                                                                       \
    do {                                                                                                               \
        struct sock_filter line = __VA_ARGS__;                                                                         \
        code[n++] = line;                                                                                              \
    } while (0)
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, arch)));
    ADD(BPF_JUMP(equal, MACHINE, 1, 0));
    ADD(BPF_STMT(answer, SECCOMP_RET_ALLOW));
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, instruction_pointer)));
    ADD(BPF_JUMP(equal, (uint32_t)from, 0, 3));
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, instruction_pointer) + 4));
    ADD(BPF_JUMP(equal, (uint32_t)(from >> 32), 0, 1));
    ADD(BPF_STMT(answer, SECCOMP_RET_ALLOW));
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, nr)));
    ADD(BPF_JUMP(equal, SYS_mmap, 0, 3));
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, args[4])));
    ADD(BPF_JUMP(equal, (uint32_t)-1, CALLS + 1, 0));
    ADD(BPF_STMT(data, offsetof(struct seccomp_data, nr)));
    for (int i = 0; i < CALLS; i++) {
        ADD(BPF_JUMP(equal, (uint32_t)calls[i].number, (unsigned char)(CALLS - i), 0));
    }
    ADD(BPF_STMT(answer, SECCOMP_RET_ALLOW));
    ADD(BPF_STMT(answer, SECCOMP_RET_TRAP));
    struct sock_fprog program = {(unsigned short)n, code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static int find_ranges(struct dl_phdr_info *info, size_t size, void *first) {
    uintptr_t *range = NULL;
    (void)size;
    if (!*(int *)first) {
        range = ours;
        *(int *)first = 1;
    } else if (strstr(info->dlpi_name, "/libc.so") || strstr(info->dlpi_name, "/libc-")) {
        range = libc;
    }
    for (int i = 0; range && i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + p->p_vaddr;
        if (p->p_type == PT_LOAD && p->p_flags & PF_X) {
            range[0] = start;
            range[1] = start + p->p_memsz;
        }
    }
    return 0;
}

__attribute__((constructor)) static void prepare(void) {
    const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_AT");
    int found = 0;
    void *callers[4];
    backtrace(callers, 4); // its first call allocates
    dl_iterate_phdr(find_ranges, &found);
    kind = getenv("FAULT_KIND") ? getenv("FAULT_KIND") : "";
    fault_at = at ? atol(at) : -1;
    stays = getenv("FAULT_STAYS") != NULL;
    if (log) { // under a high number, so that the program's descriptors are as ever
        int file = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        log_file = fcntl(file, F_DUPFD_CLOEXEC, 700);
        close(file);
    }
    unsetenv("LD_PRELOAD");
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_call;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    if (sigaction(SIGSYS, &action, NULL) != 0 || !install_filter()) {
        static const char message[] = "faults_preload: this system lets no program filter its own calls\n";
        plain(SYS_write, 2, (long)message, sizeof(message) - 1);
        _exit(99);
    }
    prepared = 1;
}
