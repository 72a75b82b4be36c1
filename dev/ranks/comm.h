// Several processes: the few messages that everything else about ranks is made of, and the watch that is kept while
// waiting. Gives: ranks, sum_over_ranks, broadcast, start_all_to_all, ... Needs: dev/util.h; with USE_MPI, MPI.
//
// The few messages that everything else is made of; of one process nothing of it is there, so it can wait for a second
// reading. Each rank has its share of every batch; the experts are divided among the ranks of a group. Once MPI is set
// up, waiting is done in ranks_wait, which also keeps the watch: who has waited too long asks all others whether they
// live; those that wait answer, and so do those that compute, read or write, between two pieces of their work (ranks_tick,
// which keeps messages on their way, too). A process that hangs does not.
#pragma once
#include "../util.h"
#ifdef USE_MPI
#include <aio.h>
#include <mpi.h>
#include <sched.h>
#endif

size_t largest_message = 1 << 30; // bytes, since MPI counts in int

// The processes that train one model together (make train_moe_mpi), and this one's place among them.
typedef struct Traffic {  // of this rank, since the log's last line
    double waited;        // seconds in which it waited for others
    double sent, reduced; // bytes that it sent by all-to-all, and for gradients and weights
} Traffic;

typedef struct Ranks {
    int size, rank;
    int ep, place;    // ranks of a group, which have all experts among them; rank = group number * ep + place
    int groups;       // size / ep, of which each has the same experts
    int watchdog;     // seconds
    int crowded;      // this machine has more ranks than cores, so that who waits had better sleep
    Traffic traffic;
} Ranks;
Ranks ranks = {1, 0, 1, 0, 1, 0, 0, {0, 0, 0}};
// One process alone has none of what follows: there the compiler leaves it out.
#ifdef USE_MPI
#define MANY (ranks.size > 1)
#else
#define MANY 0
#endif
#define APART (MANY && ranks.ep > 1) // the experts are on several ranks

#ifdef USE_MPI
struct {
    MPI_Comm all, group, peers; // all ranks; those of the group; those with the same experts, of other groups
    MPI_Comm watch;             // all ranks, to ask who is alive
} comm;
typedef MPI_Request Request;
#define MPI_REALS (sizeof(real) == 8 ? MPI_DOUBLE : MPI_FLOAT)
enum { ASK, ALIVE };
double watch_patience = 10; // seconds to answer

void abort_ranks(int status) { // all of them
    MPI_Abort(MPI_COMM_WORLD, status);
}

void ranks_send_watch(int to, int tag) {
    static char nothing;
    Request request;
    MPI_Isend(&nothing, 1, MPI_CHAR, to, tag, comm.watch, &request);
    MPI_Request_free(&request);
}

// The rank that sent such a message, which is received; -1: none did.
int ranks_received_watch(int tag) {
    int there = 0;
    char nothing;
    MPI_Status status;
    MPI_Iprobe(MPI_ANY_SOURCE, tag, comm.watch, &there, &status);
    if (!there)
        return -1;
    MPI_Recv(&nothing, 1, MPI_CHAR, status.MPI_SOURCE, tag, comm.watch, MPI_STATUS_IGNORE);
    return status.MPI_SOURCE;
}

void ranks_answer(void) {
    for (int from; (from = ranks_received_watch(ASK)) >= 0;)
        ranks_send_watch(from, ALIVE);
}

// Asks all others whether they live, and ends the job where some do not answer.
void ranks_inspect(void) {
    double start = seconds();
    int missing = ranks.size - 1;
    unsigned char *heard = (unsigned char *)allocate(ranks.size, 1);
    heard[ranks.rank] = 1;
    while (ranks_received_watch(ALIVE) >= 0) // of an earlier time
        ;
    for (int r = 0; r < ranks.size; r++) {
        if (r != ranks.rank)
            ranks_send_watch(r, ASK);
    }
    while (missing && seconds() - start < watch_patience) {
        int from = ranks_received_watch(ALIVE);
        missing -= from >= 0 && !heard[from];
        if (from >= 0)
            heard[from] = 1;
        ranks_answer();
        usleep(1000);
    }
    char names[256] = "";
    for (int r = 0; missing && r < ranks.size; r++) {
        size_t n = strlen(names);
        if (!heard[r])
            snprintf(names + n, sizeof(names) - n, "%s%d", n ? ", " : "", r);
    }
    free(heard);
    if (missing) {
        fprintf(stderr, "%s: rank %s of %d does not answer: it hangs, or it died (rank %d waited for %.0f seconds); the "
                        "job ends here, and the last checkpoint is as it was\n",
                program_name, names, ranks.size, ranks.rank, ranks.watchdog + seconds() - start);
        end_program(1);
    }
}

// Again and again, by who waits since `start`.
void ranks_watch(double start) {
    static double looked, answered;
    double now = seconds();
    looked = looked > start ? looked : start;
    if (now - answered > 0.05) {
        ranks_answer();
        answered = now;
    }
    if (ranks.watchdog && now - looked > ranks.watchdog) {
        ranks_inspect();
        looked = seconds();
    }
    if (ranks.crowded || now - start > 0.001)
        usleep(20);
    sched_yield();
}

void ranks_wait(Request *requests, int count) {
    double start = seconds();
    for (int done = 0;;) {
        MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
        if (done) {
            ranks.traffic.waited += seconds() - start;
            return;
        }
        ranks_watch(start);
    }
}

// Between two pieces of work.
void ranks_tick(void) {
    if (MANY && thread_number() == 0)
        ranks_answer();
}

// v (n) = the sum of all ranks' v
void sum_over_ranks(double *v, int n) {
    Request request;
    if (!MANY)
        return;
    MPI_Iallreduce(MPI_IN_PLACE, v, n, MPI_DOUBLE, MPI_SUM, comm.all, &request);
    ranks_wait(&request, 1);
}

// Rank 0's bytes for all.
void broadcast(void *bytes, size_t size) {
    Request request;
    if (!MANY)
        return;
    MPI_Ibcast(bytes, (int)size, MPI_BYTE, 0, comm.all, &request);
    ranks_wait(&request, 1);
}

// Begins to sum v (n), of all ranks, or, where `peers`, of those that have the same experts.
void start_sum_of_reals(real *v, size_t n, int peers, Request *request) {
    MPI_Iallreduce(MPI_IN_PLACE, v, (int)n, MPI_REALS, MPI_SUM, peers ? comm.peers : comm.all, request);
}

// Begins to send to, or to receive from, a rank of the group.
void start_send(const real *v, size_t n, int rank, int tag, Request *request) {
    MPI_Isend(v, (int)n, MPI_REALS, rank, tag, comm.group, request);
}
void start_receive(real *v, size_t n, int rank, int tag, Request *request) {
    MPI_Irecv(v, (int)n, MPI_REALS, rank, tag, comm.group, request);
}

// Each rank of the group sends `each` numbers to each.
void all_to_all(const int *out, int *in, int each) {
    Request request;
    MPI_Ialltoall(out, each, MPI_INT, in, each, MPI_INT, comm.group, &request);
    ranks_wait(&request, 1);
}

MPI_Datatype pieces_of(size_t bytes) { // a count is an int, so pieces are counted, not bytes
    MPI_Datatype type;
    MPI_Type_contiguous((int)bytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    return type;
}

// Begins to send rows of `bytes` to the ranks of the group, sent[r] of them from row sent_at[r] on, and to receive such.
void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *request) {
    MPI_Datatype row = pieces_of(bytes);
    MPI_Ialltoallv(out, sent, sent_at, row, in, got, got_at, row, comm.group, request);
    MPI_Type_free(&row);
}

// All ranks' slices, one after another, each of n * 16 numbers, of which this rank has its own.
void gather_slices(real *v, size_t n) {
    Request request;
    MPI_Datatype sixteen = pieces_of(16 * sizeof(real));
    MPI_Iallgather(MPI_IN_PLACE, 0, sixteen, v, (int)n, sixteen, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&sixteen);
}

// All ranks' rows, each of `bytes`, one rank's after another's, to be freed; rows[r] is how many rank r has.
void *gather_rows(const void *mine, const int *rows, size_t bytes) {
    int *first = (int *)allocate((size_t)ranks.size + 1, sizeof(int));
    for (int r = 0; r < ranks.size; r++)
        first[r + 1] = first[r] + rows[r];
    char *all = (char *)allocate((size_t)first[ranks.size], bytes);
    MPI_Datatype row = pieces_of(bytes);
    Request request;
    MPI_Iallgatherv(mine, rows[ranks.rank], row, all, rows, first, row, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&row);
    free(first);
    return all;
}

// For rank 0: the parts of the first `count` ranks, one after another, each rank's of its own size, in `all`, or, where
// that is NULL, in memory to be freed.
void *gather_parts(const void *mine, size_t bytes, int count, void *all) {
    double *size = (double *)allocate(ranks.size, sizeof(double)), total = 0;
    size[ranks.rank] = ranks.rank < count ? (double)bytes : 0;
    sum_over_ranks(size, ranks.size);
    for (int r = 0; r < ranks.size; r++)
        total += size[r];
    if (!all)
        all = allocate(ranks.rank ? 0 : (size_t)total, 1);
    size_t at = 0;
    for (int r = 0; r < count; at += (size_t)size[r++]) {
        for (size_t done = 0; done < (size_t)size[r]; done += largest_message) {
            int n = (int)((size_t)size[r] - done < largest_message ? (size_t)size[r] - done : largest_message);
            Request request = MPI_REQUEST_NULL;
            if (!r && !ranks.rank)
                memcpy((char *)all + at + done, (const char *)mine + done, (size_t)n);
            else if (!ranks.rank)
                MPI_Irecv((char *)all + at + done, n, MPI_BYTE, r, 0, comm.all, &request);
            else if (r == ranks.rank)
                MPI_Isend((const char *)mine + done, n, MPI_BYTE, 0, 0, comm.all, &request);
            ranks_wait(&request, 1);
        }
    }
    free(size);
    return all;
}

// fsync by a thread of the C library's, while this one answers: a slow disk is no rank that hangs.
int sync_file(int file) {
    struct aiocb job;
    memset(&job, 0, sizeof(job));
    job.aio_fildes = file;
    job.aio_sigevent.sigev_notify = SIGEV_NONE;
    int error;
    if (aio_fsync(O_SYNC, &job) != 0) // no thread to be had
        return fsync(file);
    while ((error = aio_error(&job)) == EINPROGRESS) {
        ranks_tick();
        usleep(100);
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

// `of`: all ranks; ep of them are a group.
void ranks_form(MPI_Comm of, int ep) {
    comm.all = of;
    MPI_Comm_rank(of, &ranks.rank);
    MPI_Comm_size(of, &ranks.size);
    program_rank = ranks.rank;
    ranks.ep = ep;
    ranks.place = ranks.rank % ep;
    ranks.groups = ranks.size / ep;
    MPI_Comm_split(of, ranks.rank / ep, ranks.rank, &comm.group);
    MPI_Comm_split(of, ranks.place, ranks.rank, &comm.peers);
    ranks.crowded = ranks_of_machine() > sysconf(_SC_NPROCESSORS_ONLN);
}
#else // of one process: nothing to do
typedef int Request;
int ranks_of_machine(void) { return 1; }
int sync_file(int file) { return fsync(file); }
void ranks_tick(void) { }
void ranks_wait(Request *request, int n) { (void)request, (void)n; }
void sum_over_ranks(double *v, int n) { (void)v, (void)n; }
void broadcast(void *bytes, size_t size) { (void)bytes, (void)size; }
void start_sum_of_reals(real *v, size_t n, int peers, Request *request) { (void)v, (void)n, (void)peers, (void)request; }
void start_send(const real *v, size_t n, int rank, int tag, Request *r) { (void)v, (void)n, (void)rank, (void)tag, (void)r; }
void start_receive(real *v, size_t n, int rank, int tag, Request *r) { (void)v, (void)n, (void)rank, (void)tag, (void)r; }
void all_to_all(const int *out, int *in, int each) { (void)out, (void)in, (void)each; }
void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *r) {
    (void)out, (void)sent, (void)sent_at, (void)in, (void)got, (void)got_at, (void)bytes, (void)r;
}
void gather_slices(real *v, size_t n) { (void)v, (void)n; }
void *gather_rows(const void *mine, const int *rows, size_t bytes) { return (void)mine, (void)rows, (void)bytes, (void *)0; }
void *gather_parts(const void *mine, size_t bytes, int n, void *all) { return (void)mine, (void)bytes, (void)n, all; }
#endif

// Waits until all ranks have come here.
void ranks_meet(void) {
    double nothing = 0;
    sum_over_ranks(&nothing, 1);
}
