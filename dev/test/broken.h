// A library that is preloaded into the trainer and makes calls of the system fail, as the environment says.
// Gives: broken(). Needs: dev/test/shell.h.

#pragma once
#include "dev/test/shell.h"

static const char *const broken_source =
    "#define _GNU_SOURCE\n"
    "#include <dirent.h>\n"
    "#include <dlfcn.h>\n"
    "#include <errno.h>\n"
    "#include <signal.h>\n"
    "#include <stdio.h>\n"
    "#include <stdlib.h>\n"
    "#include <string.h>\n"
    "#include <time.h>\n"
    "#include <unistd.h>\n"
    "static const char *said(const char *name) { const char *text = getenv(name); return text ? text : \"\"; }\n"
    // flock and symlink fail with the error of this number
    "int flock(int file, int how) {\n"
    "    if (*said(\"BREAK_FLOCK\")) { errno = atoi(said(\"BREAK_FLOCK\")); return -1; }\n"
    "    return ((int (*)(int, int))dlsym(RTLD_NEXT, \"flock\"))(file, how);\n"
    "}\n"
    // or the process is killed where a checkpoint is to be linked
    "int symlink(const char *to, const char *from) {\n"
    "    const char *error = said(\"BREAK_SYMLINK\");\n"
    "    if (!strcmp(error, \"kill\") && !strncmp(to, \"checkpoint-\", 11)) raise(SIGKILL);\n"
    "    if (atoi(error)) { errno = atoi(error); return -1; }\n"
    "    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, \"symlink\"))(to, from);\n"
    "}\n"
    // where the model of a checkpoint that has, or had, a name is to be removed
    "int unlink(const char *path) {\n"
    "    if (*said(\"BREAK_UNLINK\") && strstr(path, \"/model.safetensors\") && !strstr(path, \"unfinished\")) raise(SIGKILL);\n"
    "    return ((int (*)(const char *))dlsym(RTLD_NEXT, \"unlink\"))(path);\n"
    "}\n"
    // where a finished checkpoint gets its name
    "int rename(const char *from, const char *to) {\n"
    "    if (*said(\"BREAK_RENAME\") && strstr(from, \"unfinished-checkpoint\")) raise(SIGKILL);\n"
    "    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, \"rename\"))(from, to);\n"
    "}\n"
    // folders whose path ends so cannot be read to their end
    "static int unread(DIR *folder) {\n"
    "    char link[64], path[4096];\n"
    "    const char *end = said(\"BREAK_READDIR\");\n"
    "    snprintf(link, sizeof(link), \"/proc/self/fd/%d\", dirfd(folder));\n"
    "    long n = *end ? readlink(link, path, sizeof(path) - 1) : 0;\n"
    "    path[n > 0 ? n : 0] = 0;\n"
    "    if (*end && n >= (long)strlen(end) && !strcmp(path + n - strlen(end), end)) { errno = EIO; return 1; }\n"
    "    return 0;\n"
    "}\n"
    "struct dirent *readdir(DIR *folder) {\n"
    "    return unread(folder) ? NULL : ((struct dirent *(*)(DIR *))dlsym(RTLD_NEXT, \"readdir\"))(folder);\n"
    "}\n"
    "#ifdef __GLIBC__\n" // with large files
    "struct dirent64 *readdir64(DIR *folder) {\n"
    "    return unread(folder) ? NULL : ((struct dirent64 *(*)(DIR *))dlsym(RTLD_NEXT, \"readdir64\"))(folder);\n"
    "}\n"
    "#endif\n"
    // folders whose path ends so may not be opened
    "DIR *opendir(const char *path) {\n"
    "    const char *end = said(\"BREAK_OPENDIR\");\n"
    "    size_t n = strlen(path), k = strlen(end);\n"
    "    if (k && n >= k && !strcmp(path + n - k, end)) { errno = EACCES; return NULL; }\n"
    "    return ((DIR *(*)(const char *))dlsym(RTLD_NEXT, \"opendir\"))(path);\n"
    "}\n"
    // a clock that stands still, or runs backwards
    "int clock_gettime(clockid_t which, struct timespec *time) {\n"
    "    static long calls;\n"
    "    const char *how = said(\"BREAK_CLOCK\");\n"
    "    if (!*how) return ((int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, \"clock_gettime\"))(which, time);\n"
    "    time->tv_sec = 1000000 - (*how == 'b' ? __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) : 0);\n"
    "    time->tv_nsec = 0;\n"
    "    return 0;\n"
    "}\n";

// The beginning of a command line that preloads it: "LD_PRELOAD=... what ". Built once. Skips the test where that cannot be.
const char *broken(const char *what) {
    static char line[4][512];
    static int built, next;
    if (!built) {
        put_text("broken.c", broken_source);
        const char *cc = getenv("CC");
        built = shell(said, sizeof(said), "%s -shared -fPIC -O1 -o %s %s -ldl", cc ? cc : "cc", scratch_file("broken.so"),
                      scratch_file("broken.c")) == 0 ? 1 : -1;
        if (built < 0)
            fprintf(stderr, "no library can be preloaded here:\n%s\n", said);
    }
    if (built < 0)
        skip();
    next = (next + 1) % 4;
    snprintf(line[next], sizeof(line[next]), "ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 LD_PRELOAD=%s %s ",
             scratch_file("broken.so"), what);
    return line[next];
}
