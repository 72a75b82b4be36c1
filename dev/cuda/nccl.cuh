// Streams, events and NCCL: how work on the device waits for other work, and for other processes' devices.
// Gives: follow, wait_for, await, keep_pace, await_device, and what may travel: nccl_sum, nccl_send, ..., send_rows.
// Needs: dev/cuda/common.cuh; dev/ranks/comm.h and watch.h for what MPI does. A build without NCCL sends nothing.
//
// Each process has a device of its own (make train_moe_cu_nccl). NCCL moves what is on the devices, in a stream of its
// own and in the same order on all ranks. MPI starts the processes and moves what is on the hosts.
#ifndef CUDA_NCCL_CUH
#define CUDA_NCCL_CUH

cudaStream_t network;                // all that travels
cudaEvent_t milestone;               // follow()
cudaEvent_t reached, paces[4];       // await(), keep_pace()
enum { OF_ALL, OF_GROUP, OF_PEERS }; // comm.all, .group and .peers
#ifdef USE_NCCL
ncclComm_t comms[3];
#endif
struct Pause {
    cudaEvent_t begin, end;
} *pauses; // in which `stream` waited for others, since await_device()
int pause_count, pause_room;

// What is queued in `later` from now on comes after what is in `earlier` by now.
void follow(cudaStream_t later, cudaStream_t earlier) {
    CHECK(cudaEventRecord(milestone, earlier));
    CHECK(cudaStreamWaitEvent(later, milestone, 0));
}

// The work queued in `stream` from now on waits for the event. Booked in ranks.traffic.waited once it is known how long.
void wait_for(cudaEvent_t event) {
    if (pause_count == pause_room) {
        pauses = (Pause *)reallocate(pauses, (size_t)pause_room + 64, sizeof(Pause));
        for (; pause_room < pause_count + 64; pause_room++) {
            CHECK(cudaEventCreate(&pauses[pause_room].begin));
            CHECK(cudaEventCreate(&pauses[pause_room].end));
        }
    }
    Pause *p = &pauses[pause_count++];
    CHECK(cudaEventRecord(p->begin, stream));
    CHECK(cudaStreamWaitEvent(stream, event, 0));
    CHECK(cudaEventRecord(p->end, stream));
}

void wait_for_network() {
    CHECK(cudaEventRecord(milestone, network));
    wait_for(milestone);
}

// The host waits for an event; one of several ranks keeps the watch meanwhile, and hears of links that fail.
void await(cudaEvent_t event) {
#ifdef USE_NCCL
    double start = seconds();
    while (MANY && cudaEventQuery(event) == cudaErrorNotReady) {
        keep_watch(start);
        for (int i = 0; i < 3; i++) {
            ncclResult_t error = ncclSuccess;
            CHECK(ncclCommGetAsyncError(comms[i], &error));
            CHECK(error);
        }
    }
    (void)cudaGetLastError(); // "not ready" was no error
#endif
    CHECK(cudaEventSynchronize(event));
}

// Until the stream has done everything.
void await(cudaStream_t which) {
    CHECK(cudaEventRecord(reached, which));
    await(reached);
}

// Called once in each layer: waits until the device has come to where the host was four calls ago. A host that is too far
// ahead finds the device's queue full, and waits in the driver, where it keeps no watch.
void keep_pace() {
    static int turn;
    if (!MANY) {
        return;
    }
    turn = (turn + 1) % 4;
    await(paces[turn]);
    CHECK(cudaEventRecord(paces[turn], stream));
}

void await_device() {
    await(stream);
#ifdef USE_NCCL
    float ms;
    for (; pause_count > 0; pause_count--) {
        CHECK(cudaEventElapsedTime(&ms, pauses[pause_count - 1].begin, pauses[pause_count - 1].end));
        ranks.traffic.waited += ms / 1000;
    }
#endif
}

#ifdef USE_NCCL
// The device of this process, of the `count` that it sees, and the stream for what travels.
void start_network(int count) {
    int place, least, greatest;
    MPI_Comm machine;
    ranks_meet(); // MPI, and later NCCL, would wait without a watch
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &place);
    MPI_Comm_free(&machine);
    CHECK(cudaSetDevice(place % count)); // Slurm may show each process its own device only

    // What is sent shall not wait until the experts leave a multiprocessor.
    CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CHECK(cudaStreamCreateWithPriority(&network, cudaStreamNonBlocking, greatest));
    CHECK(cudaEventCreateWithFlags(&milestone, cudaEventDisableTiming));
}

void start_ranks() {
    const MPI_Comm of[] = {comm.all, comm.group, comm.peers};
    ranks_meet();
    for (int i = 0; i < 3 && !comms[OF_PEERS]; i++) {
        ncclUniqueId id;
        int rank, size;
        MPI_Comm_rank(of[i], &rank);
        MPI_Comm_size(of[i], &size);
        if (rank == 0) {
            CHECK(ncclGetUniqueId(&id));
        }
        MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, of[i]);
        CHECK(ncclCommInitRank(&comms[i], size, id, rank));
    }
    (void)cudaGetLastError(); // NCCL asks for what a device may not have, and may leave that as the last error
}

void end_ranks() {
    for (int i = 0; i < 3 && comms[i]; i++) {
        CHECK(ncclCommDestroy(comms[i]));
        comms[i] = NULL;
    }
}

// What may travel, all of it in `network`. In a build without NCCL nothing does.
void nccl_sum(float *v, size_t n, int of) { // in place
    CHECK(ncclAllReduce(v, v, n, ncclFloat, ncclSum, comms[of], network));
}
void nccl_sum(double *v, size_t n, int of) {
    CHECK(ncclAllReduce(v, v, n, ncclDouble, ncclSum, comms[of], network));
}
void nccl_gather(float *all, size_t mine, size_t n) { // each rank's n numbers, this one's are at `mine`
    CHECK(ncclAllGather(all + mine, all, n, ncclFloat, comms[OF_ALL], network));
}
void nccl_broadcast(const void *from, void *to, size_t bytes, int root) {
    CHECK(ncclBroadcast(from, to, bytes, ncclUint8, root, comms[OF_ALL], network));
}
void nccl_send(const void *from, size_t bytes, int rank, int of = OF_GROUP) {
    CHECK(ncclSend(from, bytes, ncclUint8, rank, comms[of], network));
}
void nccl_receive(void *to, size_t bytes, int rank, int of = OF_GROUP) {
    CHECK(ncclRecv(to, bytes, ncclUint8, rank, comms[of], network));
}
void nccl_begin() { // what is asked for from here on is one operation,
    CHECK(ncclGroupStart());
}
void nccl_end() { // which begins here
    CHECK(ncclGroupEnd());
}
#else
void start_network(int) {
}
void end_ranks() {
}
void nccl_sum(float *, size_t, int) {
}
void nccl_sum(double *, size_t, int) {
}
void nccl_gather(float *, size_t, size_t) {
}
void nccl_broadcast(const void *, void *, size_t, int) {
}
void nccl_send(const void *, size_t, int, int = OF_GROUP) {
}
void nccl_receive(void *, size_t, int, int = OF_GROUP) {
}
void nccl_begin() {
}
void nccl_end() {
}
#endif

// v (n), on the device, = the sum of all ranks' v
void sum_over_ranks(double *v, int n) {
    follow(network, stream);
    nccl_sum(v, (size_t)n, OF_ALL);
    wait_for_network();
}

// Sends row after row of `bytes` to the ranks of the group, and receives such: see the C twin.
void send_rows(const void *out, const int *sent, const int *sent_at, void *in, const int *got, const int *got_at,
               size_t bytes) {
    for (int r = 0; r < ranks.ep; r++) {
        ranks.traffic.sent += r == ranks.member ? 0 : (double)bytes * sent[r];
        if (sent[r]) {
            nccl_send((const char *)out + sent_at[r] * bytes, sent[r] * bytes, r);
        }
        if (got[r]) {
            nccl_receive((char *)in + got_at[r] * bytes, got[r] * bytes, r);
        }
    }
}

// What is sent between the two travels at once, after what `stream` has done by now; `arrived` happens when it has come.
void depart() {
    follow(network, stream);
    nccl_begin();
}
void arrive(cudaEvent_t arrived) {
    nccl_end();
    CHECK(cudaEventRecord(arrived, network));
}

#endif
