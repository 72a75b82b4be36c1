// Several processes: the few messages that everything else about them is made of.
// Gives: ranks (watch.h), sum_over_ranks, broadcast, gather_rows, gather_parts, send_to_first, start_all_to_all,
// start_exchange, start_gather, start_send, ranks_meet. Needs: dev/util.h; with USE_MPI, MPI. Of one process nothing of it is there, so it can wait for a
// second reading.
//
// What begins with start_ only begins: the arrays belong to the message until ranks_wait() has waited for its
// request.
#pragma once
#include "watch.h"

size_t largest_message = 1 << 30; // bytes, since MPI counts in int

#ifdef USE_MPI
#define MPI_REALS (sizeof(real) == 8 ? MPI_DOUBLE : MPI_FLOAT)

// v (n) = the sum of all processes' v
void sum_over_ranks(double *v, int n) {
    if (MANY) {
        Request request;
        MPI_Iallreduce(MPI_IN_PLACE, v, n, MPI_DOUBLE, MPI_SUM, comm.all, &request);
        ranks_wait(&request, 1);
    }
}

// All get the bytes of rank 0.
void broadcast(void *bytes, size_t size) {
    if (MANY) {
        Request request;
        MPI_Ibcast(bytes, (int)size, MPI_BYTE, 0, comm.all, &request);
        ranks_wait(&request, 1);
    }
}

// Begins to sum v (n): that of all processes, or with `peers` that of those that have the same experts.
void start_sum_of_reals(real *v, size_t n, int peers, Request *request) {
    MPI_Iallreduce(MPI_IN_PLACE, v, (int)n, MPI_REALS, MPI_SUM, peers ? comm.peers : comm.all, request);
}

// Begin to send n numbers to a member of the group, and to receive such.
void start_send(const real *v, size_t n, int member, int tag, Request *request) {
    MPI_Isend(v, (int)n, MPI_REALS, member, tag, comm.group, request);
}

void start_receive(real *v, size_t n, int member, int tag, Request *request) {
    MPI_Irecv(v, (int)n, MPI_REALS, member, tag, comm.group, request);
}

// Each member of the group sends `each` numbers to each.
void all_to_all(const int *out, int *in, int each) {
    Request request;
    MPI_Ialltoall(out, each, MPI_INT, in, each, MPI_INT, comm.group, &request);
    ranks_wait(&request, 1);
}

// MPI counts in int, so that rows are counted instead of their bytes.
MPI_Datatype rows_of(size_t bytes) {
    MPI_Datatype type;
    MPI_Type_contiguous((int)bytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    return type;
}

// Begins to send rows of `bytes` to the members of the group, to member r sent[r] rows from row sent_at[r] on, and to
// receive such rows from them.
void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *request) {
    MPI_Datatype row = rows_of(bytes);
    MPI_Ialltoallv(out, sent, sent_at, row, in, got, got_at, row, comm.group, request);
    MPI_Type_free(&row);
}

// Begins to send bytes to all processes, or with `peers` to those that have the same experts: sent[r] from sent_at[r] on
// to the r-th of them. What they send comes to got_at.
void start_exchange(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at, int peers,
                    Request *request) {
    MPI_Ialltoallv(out, sent, sent_at, MPI_BYTE, in, got, got_at, MPI_BYTE, peers ? comm.peers : comm.all, request);
}

// `all`: the parts of those processes, bytes[r] from at[r] on of the r-th. Each has its own, and begins to get the others'.
void start_gather(void *all, const int *bytes, const int *at, int peers, Request *request) {
    MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_BYTE, all, bytes, at, MPI_BYTE, peers ? comm.peers : comm.all, request);
}

// v: the slices of all processes, one behind the other, each of n * 16 numbers. Each process has its own, and gets
// the others.
void gather_slices(real *v, size_t n) {
    Request request;
    MPI_Datatype sixteen = rows_of(16 * sizeof(real));
    MPI_Iallgather(MPI_IN_PLACE, 0, sixteen, v, (int)n, sixteen, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&sixteen);
}

// All get the rows of all processes, one process behind the other, in memory to be freed. A row has `bytes`, and
// process r has rows[r] of them.
void *gather_rows(const void *mine, const int *rows, size_t bytes) {
    int *first = (int *)allocate((size_t)ranks.size + 1, sizeof(int));
    for (int r = 0; r < ranks.size; r++) {
        first[r + 1] = first[r] + rows[r];
    }
    char *all = (char *)allocate((size_t)first[ranks.size], bytes);
    MPI_Datatype row = rows_of(bytes);
    Request request;
    MPI_Iallgatherv(mine, rows[ranks.rank], row, all, rows, first, row, comm.all, &request);
    ranks_wait(&request, 1);
    MPI_Type_free(&row);
    free(first);
    return all;
}

// Rank r gives bytes of `from` to rank 0's `to`. The other processes do nothing.
void send_to_first(void *to, const void *from, size_t bytes, int r) {
    for (size_t done = 0, n; done < bytes; done += n) {
        n = bytes - done < largest_message ? bytes - done : largest_message;
        Request request = MPI_REQUEST_NULL;
        if (ranks.rank == 0) {
            MPI_Irecv((char *)to + done, (int)n, MPI_BYTE, r, 0, comm.all, &request);
        } else if (ranks.rank == r) {
            MPI_Isend((const char *)from + done, (int)n, MPI_BYTE, 0, 0, comm.all, &request);
        }
        ranks_wait(&request, 1);
    }
}

// `all` has `bytes` of this process. Rank 0 gets what the first `count` processes have, one behind the other; its own
// part comes first, and is there.
void gather_parts(void *all, size_t bytes, int count) {
    if (count == 1) {
        return;
    }
    double *size = (double *)allocate(ranks.size, sizeof(double));
    size[ranks.rank] = ranks.rank < count ? (double)bytes : 0;
    sum_over_ranks(size, ranks.size);
    char *to = (char *)all + (size_t)size[0]; // on rank 0
    for (int r = 1; r < count; r++) {
        send_to_first(to, all, (size_t)size[r], r);
        to += (size_t)size[r];
    }
    free(size);
}
#else // one process: nothing to do
void sum_over_ranks(double *v, int n) {
    (void)v, (void)n;
}

void broadcast(void *bytes, size_t size) {
    (void)bytes, (void)size;
}

void start_sum_of_reals(real *v, size_t n, int peers, Request *request) {
    (void)v, (void)n, (void)peers, (void)request;
}

void start_send(const real *v, size_t n, int member, int tag, Request *request) {
    (void)v, (void)n, (void)member, (void)tag, (void)request;
}

void start_receive(real *v, size_t n, int member, int tag, Request *request) {
    (void)v, (void)n, (void)member, (void)tag, (void)request;
}

void all_to_all(const int *out, int *in, int each) {
    (void)out, (void)in, (void)each;
}

void start_all_to_all(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
                      size_t bytes, Request *request) {
    (void)out, (void)sent, (void)sent_at, (void)in, (void)got, (void)got_at, (void)bytes, (void)request;
}

void start_exchange(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at, int peers,
                    Request *request) {
    (void)out, (void)sent, (void)sent_at, (void)in, (void)got, (void)got_at, (void)peers, (void)request;
}

void start_gather(void *all, const int *bytes, const int *at, int peers, Request *request) {
    (void)all, (void)bytes, (void)at, (void)peers, (void)request;
}

void gather_slices(real *v, size_t n) {
    (void)v, (void)n;
}

void *gather_rows(const void *mine, const int *rows, size_t bytes) {
    (void)mine, (void)rows, (void)bytes;
    return NULL;
}

void send_to_first(void *to, const void *from, size_t bytes, int r) {
    (void)to, (void)from, (void)bytes, (void)r;
}

void gather_parts(void *all, size_t bytes, int count) {
    (void)all, (void)bytes, (void)count;
}
#endif

// Waits until all processes have come here.
void ranks_meet(void) {
    double nothing = 0;
    sum_over_ranks(&nothing, 1);
}
