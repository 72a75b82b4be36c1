// Several processes: which of them this one is, and a watch over the others while this one waits: are they alive?
// Gives: Ranks, ranks, MANY, Request, ranks_wait, ranks_tick, ranks_form, sync_file. Needs: dev/util.h; with
// USE_MPI, MPI.
//
// Once MPI is set up, a process waits for messages in ranks_wait() only. One that has waited too long asks all
// others whether they live. Those that wait answer it there; those that compute, read or write answer it in
// ranks_tick(), between two pieces of their work. A process that hangs does not answer. Then the job ends, with a
// line that names it.
#pragma once
#include "../util.h"
#ifdef USE_MPI
#include <aio.h>
#include <mpi.h>
#include <sched.h>
#endif

typedef struct Traffic { // of this process, since the log's last line
    double waited;       // seconds in which it waited for others
    double sent;         // bytes that it sent by all-to-all
    double reduced;      // bytes that it sent for sums of gradients, and for new weights
} Traffic;

// The processes that train one model together (make train_moe_mpi). Each has its share of every batch. They form
// groups; the experts are divided among the processes of a group, so that each group has all of them.
typedef struct Ranks {
    int size, rank;   // how many processes; the number of this one
    int ep, member;   // processes of a group; the number of this one in its group: rank = group * ep + member
    int groups;       // size / ep: so many processes have the same experts
    int watchdog;     // seconds of waiting after which all are asked whether they live; 0: never
    int crowded;      // this machine has more processes than cores, so one that waits had better sleep
    Traffic traffic;
} Ranks;

Ranks ranks = {1, 0, 1, 0, 1, 0, 0, {0, 0, 0}};

// One process alone has none of what follows: the compiler leaves out what stands behind if (MANY).
#ifdef USE_MPI
#define MANY (ranks.size > 1)
#else
#define MANY 0
#endif

#ifdef USE_MPI
typedef MPI_Request Request;

struct {
    MPI_Comm all;   // all processes
    MPI_Comm group; // those of this one's group
    MPI_Comm peers; // those of other groups that have the same experts
    MPI_Comm watch; // all processes, to ask which of them live
} comm;

enum { ASK, ALIVE };        // the two messages of the watch
double watch_patience = 10; // seconds in which a process has to answer

void abort_ranks(int status) { // all of them
    MPI_Abort(MPI_COMM_WORLD, status);
}

void send_watch(int to, int message) {
    static char nothing;
    Request request;
    MPI_Isend(&nothing, 1, MPI_CHAR, to, message, comm.watch, &request);
    MPI_Request_free(&request);
}

// Receives such a message, if there is one. Returns the process that sent it, -1: there is none.
int receive_watch(int message) {
    int there = 0;
    char nothing;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, message, comm.watch, &there, &status);
    if (!there) {
        return -1;
    }
    MPI_Recv(&nothing, 1, MPI_CHAR, status.MPI_SOURCE, message, comm.watch, MPI_STATUS_IGNORE);
    return status.MPI_SOURCE;
}

void answer_watch(void) {
    for (int from = receive_watch(ASK); from >= 0; from = receive_watch(ASK)) {
        send_watch(from, ALIVE);
    }
}

// Asks all others whether they live, and ends the job where some do not answer.
void ask_all(void) {
    double start = seconds();
    int missing = ranks.size - 1;
    unsigned char *heard = (unsigned char *)allocate(ranks.size, 1);
    heard[ranks.rank] = 1;

    // Answers that come only now, to what was asked before, would count as answers to this.
    while (receive_watch(ALIVE) >= 0) {
    }
    for (int r = 0; r < ranks.size; r++) {
        if (r != ranks.rank) {
            send_watch(r, ASK);
        }
    }
    while (missing && seconds() - start < watch_patience) {
        int from = receive_watch(ALIVE);
        if (from >= 0) {
            missing -= !heard[from];
            heard[from] = 1;
        }
        answer_watch();
        usleep(1000);
    }

    char names[256] = "";
    for (int r = 0; r < ranks.size; r++) {
        size_t n = strlen(names);
        if (!heard[r]) {
            snprintf(names + n, sizeof(names) - n, "%s%d", n ? ", " : "", r);
        }
    }
    free(heard);
    if (missing) {
        fprintf(stderr,
                "%s: rank %s of %d does not answer: it hangs, or it died (rank %d waited for %.0f seconds); the job "
                "ends here, and the last checkpoint is as it was\n",
                program_name, names, ranks.size, ranks.rank, ranks.watchdog + seconds() - start);
        end_program(1);
    }
}

// A process that has waited since `start` calls this again and again.
void keep_watch(double start) {
    static double looked, answered;
    double now = seconds();
    looked = looked > start ? looked : start;
    if (now - answered > 0.05) {
        answer_watch();
        answered = now;
    }
    if (ranks.watchdog && now - looked > ranks.watchdog) {
        ask_all();
        looked = seconds();
    }
    if (ranks.crowded || now - start > 0.001) {
        usleep(20);
    }
    sched_yield();
}

// Waits until all these messages have been sent or have come.
void ranks_wait(Request *requests, int count) {
    double start = seconds();
    int done = 0;
    MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
    while (!done) {
        keep_watch(start);
        MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
    }
    ranks.traffic.waited += seconds() - start;
}

// Between two pieces of work: answers the others. With that, MPI also moves on what is under way.
void ranks_tick(void) {
    if (MANY && thread_number() == 0) {
        answer_watch();
    }
}

// fsync by a thread of the C library, while this one answers the others: with a slow disk a process does not hang.
int sync_file(int file) {
    struct aiocb job;
    memset(&job, 0, sizeof(job));
    job.aio_fildes = file;
    job.aio_sigevent.sigev_notify = SIGEV_NONE;
    if (aio_fsync(O_SYNC, &job) != 0) { // the system has no thread to give
        return fsync(file);
    }
    int error = aio_error(&job);
    while (error == EINPROGRESS) {
        ranks_tick();
        usleep(100);
        error = aio_error(&job);
    }
    aio_return(&job);
    errno = error;
    return error ? -1 : 0;
}

int ranks_of_machine(void) {
    int count;
    MPI_Comm here;
    MPI_Comm_split_type(comm.all, MPI_COMM_TYPE_SHARED, ranks.rank, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &count);
    MPI_Comm_free(&here);
    return count;
}

// The processes of this communicator train together, in groups of ep.
void ranks_form(MPI_Comm of, int ep) {
    comm.all = of;
    MPI_Comm_rank(of, &ranks.rank);
    MPI_Comm_size(of, &ranks.size);
    program_rank = ranks.rank;
    ranks.ep = ep;
    ranks.member = ranks.rank % ep;
    ranks.groups = ranks.size / ep;
    MPI_Comm_split(of, ranks.rank / ep, ranks.rank, &comm.group);
    MPI_Comm_split(of, ranks.member, ranks.rank, &comm.peers);
    ranks.crowded = ranks_of_machine() > sysconf(_SC_NPROCESSORS_ONLN);
}
#else // one process: nothing to do
typedef int Request;

int ranks_of_machine(void) {
    return 1;
}

int sync_file(int file) {
    return fsync(file);
}

void ranks_tick(void) {
}

void ranks_wait(Request *requests, int count) {
    (void)requests, (void)count;
}
#endif
