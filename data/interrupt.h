// Interruption of data/tokenize: a thread waits for Ctrl-C and the like, so that no other work has to
// look for them.
// Gives: await_signals, naming. Needs: dev/util.h; POSIX threads.
// It ends the program at any time but one: while files get their names. What is unfinished is removed.
#pragma once
#include "../dev/util.h"
#include <pthread.h>

static pthread_mutex_t naming = PTHREAD_MUTEX_INITIALIZER; // held while a file is made or named
static sigset_t awaited;

static void *wait_for_signals(void *unused) {
    int number;
    (void)unused;
    if (sigwait(&awaited, &number) == 0) {
        pthread_sigmask(SIG_UNBLOCK, &awaited, NULL); // a second one ends the program at once
        pthread_mutex_lock(&naming);
        fprintf(stderr, "%s: interrupted; %s\n", program_name,
                unfinished_path[0] ? "nothing was changed" : "but all files were written already");
        if (unfinished_path[0]) {
            remove_tree(unfinished_path);
        }
        _exit(1);
    }
    return NULL;
}

// Starts the thread. All threads that come later leave these signals to it. Those that are ignored stay
// so (nohup).
static void await_signals(void) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action;
    pthread_t thread;
    sigemptyset(&awaited);
    for (int i = 0; i < COUNT(numbers); i++) {
        if (sigaction(numbers[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN) {
            sigaddset(&awaited, numbers[i]);
        }
    }
    signal(SIGPIPE, SIG_IGN); // where nobody reads what it prints (| head), it goes on, and its end says so
    int error = pthread_sigmask(SIG_BLOCK, &awaited, NULL);
    if (!error) {
        error = pthread_create(&thread, NULL, wait_for_signals, NULL);
    }
    if (error) {
        fail("cannot start a thread: %s", strerror(error));
    }
}
