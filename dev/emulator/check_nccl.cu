// check_nccl.cu: does the emulator's NCCL do what NCCL does, and does it see what it is there to see? Without mpirun it
// runs itself: with 1 to 4 ranks, in several shuffles, and then every mistake in a world of its own.

#include <cuda_runtime.h>
#include <nccl.h>
#include <string>

int failures, me, N;
ncclComm_t world, comm_two; // both of all ranks
cudaStream_t s, t;
#define EXPECT(what)                                                                                                   \
    ((what) ? (void)0                                                                                                  \
            : (void)(failures++, fprintf(stderr, "check_nccl.cu:%d: rank %d of %d: %s\n", __LINE__, me, N, #what)))
#define OK(call) EXPECT((call) == ncclSuccess)

template <class T> T *device(size_t n) {
    T *p = nullptr;
    EXPECT(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess);
    return p;
}
template <class T> T *device(const std::vector<T> &v) {
    T *p = device<T>(v.size());
    EXPECT(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    return p;
}
template <class T> std::vector<T> host(const T *p, size_t n, cudaStream_t stream = s) {
    std::vector<T> v(n);
    EXPECT(cudaMemcpyAsync(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost, stream) == cudaSuccess);
    EXPECT(cudaStreamSynchronize(stream) == cudaSuccess);
    return v;
}
template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
void free_all() {
    while (!cudacpu::memory.empty())
        EXPECT(cudaFree(cudacpu::memory.begin()->first) == cudaSuccess);
}

ncclComm_t communicator(int n, int rank, ncclUniqueId id) {
    ncclComm_t comm = nullptr;
    OK(ncclCommInitRank(&comm, n, id, rank));
    return comm;
}
ncclUniqueId id_of(int root) { // drawn by world rank `root`
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, root, MPI_COMM_WORLD);
    return id;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. Each call, with each type and operation, in place and not

template <class T> T number(double x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __float2bfloat16((float)x);
    else
        return (T)x;
}
template <class T> double value(T x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __bfloat162float(x);
    else
        return (double)x;
}

// What rank r gives: whole numbers for exact results, or fractions, whose sums depend on the order.
template <class T> std::vector<T> input(int r, size_t n, bool exact) {
    std::vector<T> v(n);
    cudacpu::Random random(r, n, exact);
    bool is_signed = value(number<T>(-1)) < 0, whole = exact || std::is_integral_v<T>;
    for (T &x : v) {
        double y = (double)random.below(7) - (is_signed ? 3 : 0);
        x = number<T>(whole ? y : y * ldexp(1 + random.below(1000) / 999., random.below(20)));
    }
    return v;
}

// The same by other means: in double, rounded to T after each step; the average as the documentation says it.
template <class T> std::vector<T> reduced(ncclRedOp_t op, size_t n, bool exact) {
    std::vector<T> all = input<T>(0, n, exact);
    bool floats = !std::is_integral_v<T>;
    T inverse = number<T>(1. / N);
    double scale = sizeof(T) == 2 ? 1.f / (float)N : value(inverse);
    for (T &x : all)
        x = op == ncclAvg && floats ? number<T>(value(x) * scale) : x;
    for (int r = 1; r < N; r++) {
        std::vector<T> v = input<T>(r, n, exact);
        for (size_t i = 0; i < n; i++) {
            double a = value(all[i]), b = value(v[i]);
            b = op == ncclAvg && floats ? value(number<T>(b * scale)) : b;
            all[i] = number<T>(op == ncclProd  ? a * b
                               : op == ncclMax ? std::max(a, b)
                               : op == ncclMin ? std::min(a, b)
                                               : a + b);
        }
    }
    for (T &x : all)
        x = op == ncclAvg && !floats ? number<T>(trunc(value(x) / N)) : x;
    return all;
}

template <class T> void check_type(ncclDataType_t type) {
    for (size_t n : {1, 5, 1000, 20000}) {
        bool exact = n % 2;
        std::vector<T> mine = input<T>(me, n * N, exact);
        for (int op = 0; op < 5; op++) {
            std::vector<T> right = reduced<T>((ncclRedOp_t)op, n * N, exact), part(&right[n * me], &right[n * me] + n);
            T *from = device(mine), *to = device<T>(n * N), *one = device<T>(n), *again = device(mine);
            OK(ncclAllReduce(from, to, n * N, type, (ncclRedOp_t)op, world, s));
            EXPECT(!memcmp(to, cudacpu::pattern.bytes, 1)); // not yet
            OK(ncclReduceScatter(from, one, n, type, (ncclRedOp_t)op, world, s));
            EXPECT(same(host(to, n * N), right) && same(host(one, n), part) && same(host(from, n * N), mine));
            OK(ncclReduceScatter(from, from + n * me, n, type, (ncclRedOp_t)op, world, s));
            OK(ncclAllReduce(again, again, n * N, type, (ncclRedOp_t)op, world, s));
            EXPECT(same(host(from + n * me, n), part) && same(host(again, n * N), right));
            free_all();
        }
        std::vector<T> all;
        for (int r = 0; r < N; r++) {
            std::vector<T> v = input<T>(r, n, exact);
            all.insert(all.end(), v.begin(), v.end());
        }
        T *from = device(input<T>(me, n, exact)), *to = device<T>(n * N), *again = device(input<T>(me, n, exact));
        OK(ncclAllGather(from, to, n, type, world, s));
        EXPECT(same(host(to, n * N), all));
        to = device<T>(n * N);
        cudaMemcpy(to + n * me, from, n * sizeof(T), cudaMemcpyDeviceToDevice);
        OK(ncclAllGather(to + n * me, to, n, type, world, s));
        EXPECT(same(host(to, n * N), all));
        for (int root = 0; root < N; root++) {
            T *copy = device<T>(n);
            OK(ncclBroadcast(from, copy, n, type, root, world, s));
            EXPECT(same(host(copy, n), input<T>(root, n, exact)));
        }
        OK(ncclBroadcast(again, again, n, type, N - 1, world, s));
        EXPECT(same(host(again, n), input<T>(N - 1, n, exact)));
        free_all();
    }
}

void check_types() {
#define CHECK_TYPE(name, number, T) check_type<T>(name);
    CUDACPU_TYPES(CHECK_TYPE)
    int8_t *x = device(std::vector<int8_t>(3, 100)); // wraps round, and is told to no sanitizer
    int *y = device(std::vector<int>(3, INT_MAX)), *none = nullptr;
    OK(ncclAllReduce(x, x, 3, ncclInt8, ncclSum, world, s));
    OK(ncclAllReduce(y, y, 3, ncclInt32, ncclProd, world, s));
    EXPECT(host(x, 3)[2] == (int8_t)(100 * N) && host(y, 3)[1] == (N % 2 ? INT_MAX : 1));
    OK(ncclAllReduce(none, none, 0, ncclInt32, ncclSum, world, s)); // nothing, of which nobody needs to hear
    float *inf = device(std::vector<float>{INFINITY, NAN, 1});
    OK(ncclAllReduce(inf, inf, 3, ncclFloat32, ncclMax, world, s)); // a quiet NaN raises no alarm
    EXPECT(host(inf, 3)[0] == INFINITY && host(inf, 3)[2] == 1);
    free_all();
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Groups, order, streams

// Two messages from each rank to each, itself included, many of them empty; calls in any order but that of a pair.
void check_ragged() {
    cudacpu::Random random(cudacpu::seed(), 7);
    for (int round = 0; round < 20; round++) {
        auto count = [=](int from, int to, int k) { return (size_t)(from * 5 + to * 3 + round + k) % 7 * (round % 3); };
        std::vector<int> in, right;
        std::vector<std::vector<std::function<void()>>> lists; // each in order
        size_t at[2] = {}, most = 24 * N;
        int *from = device<int>(most), *to = device<int>(most);
        for (int r = 0; r < N; r++) {
            lists.resize(lists.size() + 2);
            for (int k = 0; k < 2; k++) {
                size_t n = count(me, r, k), m = count(r, me, k), i = at[0], j = at[1];
                lists[2 * r].push_back([=] { OK(ncclSend(from + i, n, ncclInt32, r, world, s)); });
                lists[2 * r + 1].push_back([=] { OK(ncclRecv(to + j, m, ncclInt32, r, world, s)); });
                at[0] += n, at[1] += m;
                for (size_t v = 0; v < n; v++)
                    in.push_back(me * 1000 + r * 100 + k * 10 + (int)v);
                for (size_t v = 0; v < m; v++)
                    right.push_back(r * 1000 + me * 100 + k * 10 + (int)v);
            }
        }
        cudaMemcpyAsync(from, in.data(), in.size() * sizeof(int), cudaMemcpyHostToDevice, s);
        OK(ncclGroupStart());
        OK(ncclGroupStart()); // they nest
        for (size_t left = 4 * N; left--;) {
            size_t i;
            do
                i = random.below(2 * N);
            while (lists[i].empty());
            lists[i][0]();
            lists[i].erase(lists[i].begin());
        }
        OK(ncclGroupEnd());
        cudaStreamSynchronize(s);
        EXPECT(!memcmp(to, cudacpu::pattern.bytes, 1)); // not yet
        OK(ncclGroupEnd());
        EXPECT(same(host(to, right.size()), right));
        EXPECT(most == right.size() || host(to, most)[most - 1] == 0x7fa07fa0);
        free_all();
    }
}

__global__ void add_kernel(float *x, int n, float add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] += add;
}

__global__ void bits_kernel(unsigned *to, const float *x, int n) { // raises no alarm
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        to[i] = ((const unsigned *)x)[i];
}

// Two communicators on two streams, issued in opposite orders by odd and even ranks.
void check_two_communicators(ncclComm_t other) {
    float *x = device(std::vector<float>(100)), *y = device(std::vector<float>(100));
    float sx = 0, sy = 0;
    for (int i = 0; i < 30; i++) {
        auto one = [=] {
            add_kernel<<<1, 128, 0, s>>>(x, 100, 1);
            OK(ncclAllReduce(x, x, 100, ncclFloat32, ncclAvg, world, s));
        };
        auto two = [=] {
            add_kernel<<<1, 128, 0, t>>>(y, 100, 2);
            OK(ncclAllReduce(y, y, 100, ncclFloat32, ncclMax, other, t));
        };
        me % 2 ? one() : two();
        me % 2 ? two() : one();
        sx += 1, sy += 2;
        if (i % 10 == 9) // and they wait in opposite orders
            cudaStreamSynchronize(me % 2 ? s : t);
    }
    EXPECT(fabsf(host(x, 100)[99] - sx) < 1e-4f && host(y, 100, t)[0] == sy);
    // One communicator on two streams: still one after the other.
    for (int i = 0; i < 20; i++) {
        float *z = device(std::vector<float>(100, 1));
        OK(ncclAllReduce(z, z, 100, ncclFloat32, ncclSum, world, s));
        OK(ncclAllReduce(z, z, 100, ncclFloat32, ncclSum, world, t));
        EXPECT(host(z, 100, t)[7] == (float)(N * N));
    }
    // In a group, calls between two ranks and calls of all stand in any order.
    float *a = device(std::vector<float>(100, 1)), *b = device(std::vector<float>(100, (float)me)),
          *c = device<float>(100);
    ncclGroupStart();
    if (me % 2)
        OK(ncclAllReduce(a, a, 100, ncclFloat32, ncclSum, world, s));
    OK(ncclRecv(c, 100, ncclFloat32, (me + N - 1) % N, world, s));
    OK(ncclSend(b, 100, ncclFloat32, (me + 1) % N, world, s));
    if (me % 2 == 0)
        OK(ncclAllReduce(a, a, 100, ncclFloat32, ncclSum, world, s));
    OK(ncclGroupEnd());
    EXPECT(host(a, 100)[5] == N && host(c, 100)[7] == (me + N - 1) % N);
    // A group of two streams and two communicators starts when both have come to it.
    for (int i = 0; i < 20; i++) {
        float *a = device(std::vector<float>(100, 1)), *b = device(std::vector<float>(100, 2));
        add_kernel<<<1, 128, 0, s>>>(a, 100, 1);
        add_kernel<<<1, 128, 0, t>>>(b, 100, 1);
        ncclGroupStart();
        OK(ncclAllReduce(a, a, 100, ncclFloat32, ncclSum, world, s));
        OK(ncclAllReduce(b, b, 100, ncclFloat32, ncclSum, other, t));
        OK(ncclGroupEnd());
        add_kernel<<<1, 128, 0, t>>>(a, 100, 1); // t waits for all of the group
        EXPECT(host(a, 100, t)[3] == 2.f * N + 1 && host(b, 100, t)[3] == 3.f * N);
    }
    free_all();
}

// Compute on s, communication on t: with events it is always right; without the second, some look too early. (Without the
// first, what is sent changes under way: a mistake below.)
void check_events() {
    int seen[2] = {};
    cudaEvent_t ready, summed;
    cudaEventCreate(&ready);
    cudaEventCreate(&summed);
    for (int missing = 0; missing < 2; missing++) {
        for (int i = 0; i < 200; i++) {
            float *x = device(std::vector<float>(1000, 1)), *sum = device(std::vector<float>(1000, 99));
            unsigned *bits = device<unsigned>(1000);
            add_kernel<<<8, 128, 0, s>>>(x, 1000, 1);
            cudaEventRecord(ready, s);
            cudaStreamWaitEvent(t, ready, 0);
            OK(ncclAllReduce(x, sum, 1000, ncclFloat32, ncclSum, world, t));
            cudaEventRecord(summed, t);
            if (!missing)
                cudaStreamWaitEvent(s, summed, 0);
            bits_kernel<<<8, 128, 0, s>>>(bits, sum, 1000);
            unsigned b = host(bits, 1000)[i];
            seen[missing] += missing ? b == 0x7fa07fa0 : b != __float_as_uint(2.f * N);
            free_all(); // waits for both
        }
    }
    EXPECT(seen[0] == 0);
    EXPECT(seen[1] > 0);
    cudaEventDestroy(ready);
    cudaEventDestroy(summed);
}

// The host waits in MPI for a rank that waits for this one's stream.
void check_host_waits() {
    int *x = device(std::vector<int>(10, me)), last = 0, all = 0;
    for (int i = 0; i < 5; i++) {
        if (me == N - 1 && N > 1) {
            OK(ncclSend(x, 10, ncclInt32, 0, world, t));
        } else if (me == 0 && N > 1) {
            OK(ncclRecv(x, 10, ncclInt32, N - 1, world, t));
            EXPECT(host(x, 10, t)[9] == N - 1);
        }
        int mine = me;
        i == 0   ? MPI_Barrier(MPI_COMM_WORLD)
        : i == 1 ? MPI_Bcast(&last, 1, MPI_INT, 0, MPI_COMM_WORLD)
        : i == 2 ? MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD)
        : i > 3  ? 0
        : me > 0 ? MPI_Recv(&last, 1, MPI_INT, me - 1, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE)
                 : 0;
        if (i == 3 && me < N - 1)
            MPI_Send(&all, 1, MPI_INT, me + 1, 1, MPI_COMM_WORLD);
    }
    EXPECT(all == N * (N - 1) / 2 && last == (me ? all : 0));
    free_all(); // waits for t
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Communicators and errors

void check_communicators() {
    int n = -1, r = -1;
    ncclResult_t e = ncclSystemError;
    ncclComm_t half, none, some = nullptr;
    OK(ncclCommCount(world, &n));
    OK(ncclCommUserRank(world, &r));
    OK(ncclCommGetAsyncError(world, &e));
    EXPECT(n == N && r == me && e == ncclSuccess);
    OK(ncclCommSplit(world, me % 2, -me, &half, nullptr)); // backwards
    OK(ncclCommSplit(world, me == 0 ? NCCL_SPLIT_NOCOLOR : 5, 0, &none, nullptr));
    OK(ncclCommCount(half, &n));
    OK(ncclCommUserRank(half, &r));
    EXPECT(n == (N + 1 - me % 2) / 2 && r == n - 1 - me / 2 && !none == (me == 0));
    int *x = device(std::vector<int>(1, me)), *y = device<int>(N);
    OK(ncclAllGather(x, y, 1, ncclInt32, half, s));
    std::vector<int> in_half = host(y, n);
    for (int i = 0; i < n; i++)
        EXPECT(in_half[i] == me % 2 + 2 * (n - 1 - i));
    if (none) {
        OK(ncclAllReduce(x, y, 1, ncclInt32, ncclSum, none, s));
        EXPECT(host(y, 1)[0] == N * (N - 1) / 2);
        OK(ncclCommDestroy(none));
    }
    OK(ncclCommDestroy(half));
    // Some ranks alone, backwards; the id is drawn by one that stays outside.
    ncclUniqueId id = id_of(N - 1);
    if (me < N - 1) {
        some = communicator(N - 1, N - 2 - me, id);
        OK(ncclBroadcast(x, y, 1, ncclInt32, 0, some, s));
        EXPECT(host(y, 1)[0] == N - 2);
        OK(ncclCommDestroy(some));
    }
    // What nobody answers is given up.
    ncclComm_t lost = communicator(N, me, id_of(0));
    if (N > 1 && me == 0) {
        OK(ncclRecv(y, 1, ncclInt32, 1, lost, s));
        OK(ncclRecv(y, 1, ncclInt32, 1, lost, s));
    }
    OK(ncclCommAbort(lost));
    EXPECT(cudaStreamSynchronize(s) == cudaSuccess);
    free_all();
}

void check_errors() {
    float *x = device(std::vector<float>(16));
    ncclComm_t comm = nullptr;
    ncclUniqueId id = id_of(0), nonsense = {};
    int n;
    EXPECT(ncclSend(x, 1, ncclFloat32, N, world, s) == ncclInvalidArgument);
    EXPECT(strstr(ncclGetLastError(world), "ncclSend: no rank "));
    EXPECT(ncclRecv(x, 1, ncclFloat32, -1, world, s) == ncclInvalidArgument);
    EXPECT(ncclBroadcast(x, x, 1, ncclFloat32, N, world, s) == ncclInvalidArgument);
    EXPECT(ncclAllReduce(x, x, 1, (ncclDataType_t)6, ncclSum, world, s) == ncclInvalidArgument);
    EXPECT(ncclAllReduce(x, x, 1, ncclFloat32, (ncclRedOp_t)5, world, s) == ncclInvalidArgument);
    EXPECT(ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, nullptr, s) == ncclInvalidArgument);
    EXPECT(ncclCommCount(nullptr, &n) == ncclInvalidArgument && ncclCommDestroy(nullptr) == ncclInvalidArgument);
    EXPECT(ncclGroupEnd() == ncclInvalidUsage);
    EXPECT(ncclSend(x, 1, ncclFloat32, me, world, s) == ncclInvalidUsage); // to itself, without a receive
    OK(ncclGroupStart());
    OK(ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, world, s));
    EXPECT(ncclSend(x + 1, 1, ncclFloat32, N, world, s) == ncclInvalidArgument);
    EXPECT(ncclGroupEnd() == ncclInvalidArgument && world->groups.empty()); // and all of it is forgotten
    EXPECT(ncclCommInitRank(&comm, N, id, N) == ncclInvalidArgument);
    EXPECT(ncclCommInitRank(&comm, N, nonsense, me) == ncclInvalidArgument);
    EXPECT(ncclCommInitRank(&comm, N + 1, id, me) == ncclInvalidUsage);
    comm = communicator(N, me, id);
    EXPECT(ncclCommInitRank(&comm, N, id, me) == ncclInvalidUsage); // a second time
    OK(ncclCommDestroy(comm));
    EXPECT(ncclCommDestroy(comm) == ncclInvalidArgument);
    EXPECT(!strcmp(ncclGetErrorString(ncclInvalidUsage), "invalid usage (run with NCCL_DEBUG=WARN for details)"));
    free_all();
}

// Rank 0 starts twenty kernels behind a receive, and only then the send that the other rank waits for before it sends.
// This is right as long as the queue has room for the twenty.
void long_queue(float *x, float *y) {
    if (me == 0) {
        OK(ncclRecv(y, 4, ncclFloat32, 1, world, s));
        for (int i = 0; i < 20; i++)
            add_kernel<<<1, 32, 0, s>>>(y, 4, 1);
        OK(ncclSend(x, 4, ncclFloat32, 1, comm_two, t));
    } else if (me == 1) {
        OK(ncclRecv(y, 4, ncclFloat32, 0, comm_two, s));
        OK(ncclSend(x, 4, ncclFloat32, 0, world, s));
    }
}

void check_long_queue() {
    float *x = device(std::vector<float>(4, 3)), *y = device(std::vector<float>(4, 3));
    if (N > 1)
        long_queue(x, y);
    EXPECT(host(y, 4)[3] == (me == 0 && N > 1 ? 23 : 3));
    free_all();
}

// Each is made in a world of two ranks, which it ends with one of these messages. x has 4 numbers, y none yet.
struct Mistake {
    const char *name;
    void (*make)(float *x, float *y);
    std::vector<std::string> messages;
    const char *environment = "";
};
const char RANK[] = "(world rank ", INVALID[] = "an uninitialised or invalid number was used",
           VAIN[] = " waits in vain for ";
float on_host[4];
const std::vector<Mistake> mistakes = {
    {"host memory",
     [](float *, float *) { ncclSend(on_host, 4, ncclFloat32, 1 - me, world, s); },
     {RANK, "ncclSend of 4 ncclFloat32 to rank ", ": the 16 bytes at ", " are not all in one piece of device memory"}},
    {"past the end",
     [](float *x, float *y) { ncclAllGather(x, y + 1, 2, ncclFloat32, world, s); },
     {RANK, "ncclAllGather of 2 ncclFloat32: the 16 bytes at ", " are not all in one piece of device memory"}},
    {"odd address",
     [](float *, float *y) { ncclRecv((char *)y + 2, 1, ncclFloat32, 1 - me, world, s); },
     {RANK, ": address ", " is not a multiple of 4"}},
    {"overlap in a group",
     [](float *x, float *) {
         ncclGroupStart();
         ncclSend(x, 3, ncclFloat32, 1 - me, world, s);
         ncclRecv(x + 2, 1, ncclFloat32, 1 - me, world, s);
         ncclGroupEnd();
     },
     {RANK, "ncclRecv of 1 ncclFloat32 from rank ", " writes into memory of ncclSend of 3 ", ", in the same group"}},
    {"overlap in a call",
     [](float *x, float *) { ncclAllReduce(x, x + 1, 3, ncclFloat32, ncclSum, world, s); },
     {RANK, " writes into memory of ncclAllReduce ", ", in the same call"}},
    {"sum of what nobody has written",
     [](float *, float *y) { ncclAllReduce(y, y, 4, ncclFloat32, ncclMin, world, s); },
     {"ncclAllReduce of 4 ncclFloat32, ncclMin: ", INVALID}},
    {"sum of bfloat16 that nobody has written",
     [](float *, float *y) { ncclReduceScatter(y, y + me, 2, ncclBfloat16, ncclSum, world, s); },
     {"ncclReduceScatter of 2 ncclBfloat16, ncclSum: ", INVALID}},
    {"change of what is being sent",
     [](float *x, float *y) {
         for (int i = 0; i < 100; i++) {
             ncclAllReduce(x, y, 4, ncclFloat32, ncclSum, world, t);
             add_kernel<<<1, 32, 0, s>>>(x, 4, 1);
             cudaDeviceSynchronize();
         }
     },
     {RANK, "ncclAllReduce of 4 ncclFloat32, ncclSum: what is being sent was changed while it was under way"}},
    {"change of what a rank sends to itself",
     [](float *x, float *y) {
         for (int i = 0; i < 100; i++) {
             ncclGroupStart();
             ncclSend(x, 4, ncclFloat32, me, world, t);
             ncclRecv(y, 4, ncclFloat32, me, world, t);
             ncclGroupEnd();
             add_kernel<<<1, 32, 0, s>>>(x, 4, 1);
             cudaDeviceSynchronize();
         }
     },
     {RANK, "ncclSend of 4 ncclFloat32 to rank ", ": what is being sent was changed while it was under way"}},
    {"a full queue", long_queue, {VAIN}, "CUDACPU_QUEUE=10"},
    {"write where it receives",
     [](float *x, float *y) {
         for (int i = 0; i < 100; i++) {
             ncclAllReduce(x, y, 4, ncclFloat32, ncclSum, world, t);
             cudaMemsetAsync(y, 0, 4, s);
             cudaDeviceSynchronize();
         }
     },
     {RANK, "ncclAllReduce of 4 ncclFloat32, ncclSum: something else was written where it receives"}},
    {"read without an event",
     [](float *x, float *y) {
         for (int i = 0; i < 100; i++) {
             ncclAllReduce(x, y, 4, ncclFloat32, ncclSum, world, t);
             add_kernel<<<1, 32, 0, s>>>(y, 4, 1);
             cudaDeviceSynchronize();
         }
     },
     {"kernel add_kernel, block (0,0,0), thread (", INVALID}},
    {"different counts",
     [](float *x, float *y) {
         me ? ncclSend(x, 3, ncclFloat32, 0, world, s) : ncclRecv(y, 4, ncclFloat32, 1, world, s);
     },
     {"rank 0 of 2 (world rank 0): ncclRecv of 4 ncclFloat32 from rank 1 does not fit what rank 1 (world rank 1) "
      "calls: "
      "ncclSend of 3 ncclFloat32 to rank 0"}},
    {"none and some",
     [](float *x, float *y) {
         me ? ncclRecv(x, 0, ncclFloat32, 0, world, s) : ncclSend(y, 4, ncclFloat32, 1, world, s);
     },
     {"rank 1 of 2 (world rank 1): ncclRecv of 0 ncclFloat32 from rank 0 does not fit what rank 0 (world rank 0) "
      "calls: "}},
    {"different types",
     [](float *x, float *y) { ncclAllReduce(x, y, 4, me ? ncclFloat32 : ncclInt32, ncclSum, world, s); },
     {" does not fit what rank ", " calls: ncclAllReduce of 4 nccl"}},
    {"different operations",
     [](float *x, float *y) { ncclAllReduce(x, y, 4, ncclFloat32, me ? ncclSum : ncclMax, world, s); },
     {"4 ncclFloat32, ncclSum", " does not fit what rank ", "4 ncclFloat32, ncclMax"}},
    {"different roots",
     [](float *x, float *) { ncclBroadcast(x, x, 4, ncclFloat32, me, world, s); },
     {"ncclBroadcast of 4 ncclFloat32 from rank ", VAIN}},
    {"different calls",
     [](float *x, float *y) {
         me ? ncclAllReduce(x, y, 2, ncclFloat32, ncclSum, world, s) : ncclAllGather(x, y, 2, ncclFloat32, world, s);
     },
     {" does not fit what rank ", " calls: ncclAll"}},
    {"no group",
     [](float *x, float *y) {
         ncclSend(x, 4, ncclFloat32, 1 - me, world, s);
         ncclRecv(y, 4, ncclFloat32, 1 - me, world, s);
     },
     {"ncclSend of 4 ncclFloat32 to rank ", VAIN, ": would it need a group?"}},
    {"other order",
     [](float *x, float *y) {
         ncclAllReduce(x, x, 4, ncclFloat32, ncclSum, world, me ? s : t);
         me ? ncclSend(x, 4, ncclFloat32, 0, world, s) : ncclRecv(y, 4, ncclFloat32, 1, world, s);
         ncclRecv(x, 4, ncclFloat32, 1 - me, world, t);
     },
     {VAIN}},
    {"an id for each rank",
     [](float *, float *) {
         ncclUniqueId id;
         ncclGetUniqueId(&id);
         communicator(2, me, id);
     },
     {"ncclCommInitRank: rank ", VAIN, ": 1 with this id have come"}},
    {"a rank twice",
     [](float *, float *) { communicator(2, 1, id_of(0)); },
     {"ncclCommInitRank: world rank ", " is rank 1 of 2, but world rank ", " is rank 1 of 2"}},
    {"after MPI_Finalize",
     [](float *x, float *y) {
         MPI_Finalize();
         ncclAllReduce(x, y, 2, ncclFloat32, ncclSum, world, s);
     },
     {RANK, "ncclAllReduce of 2 ncclFloat32, ncclSum comes after MPI_Finalize"}},
};

// ---------------------------------------------------------------------------------------------------------------------
// 4. Worlds

std::string output;
int run(const char *program, const std::string &before, const std::string &after) {
    const char *mpirun = getenv("MPIRUN");
    std::string command = mpirun ? mpirun : "mpirun --allow-run-as-root --oversubscribe --bind-to none";
    command = before + " " + command + " " + after;
    command.replace(command.find('$'), 1, program);
    FILE *f = popen((command + " 2>&1").c_str(), "r");
    output.clear();
    char piece[4096];
    for (size_t n; (n = fread(piece, 1, sizeof(piece), f)) > 0;)
        output.append(piece, n);
    return pclose(f);
}

int run_worlds(const char *program) {
    int bad = 0;
    for (int i = 0; i < 8; i++) {
        std::string seed = std::to_string(i + 1), n = std::to_string(i % 4 + 1);
        if (run(program, "CUDACPU_SEED=" + seed, "-np " + n + " $") != 0 || output != "the emulator's NCCL is well\n")
            bad++, fprintf(stderr, "with %s ranks and CUDACPU_SEED=%s:\n%s\n", n.c_str(), seed.c_str(), output.c_str());
    }
    for (const Mistake &m : mistakes) {
        std::string environment = std::string("CUDACPU_PATIENCE=1 ") + m.environment;
        bool good = run(program, environment, std::string("-np 2 $ '") + m.name + "'") != 0;
        for (const std::string &message : m.messages)
            good &= output.find(message) != std::string::npos;
        if (!good)
            bad++, fprintf(stderr, "%s: not the failure expected, but:\n%s\n", m.name, output.c_str());
    }
    printf(bad ? "%d failures\n" : "the emulator's NCCL is well\n", bad);
    return bad != 0;
}

int main(int argc, char **argv) {
    if (!getenv("OMPI_COMM_WORLD_SIZE") && !getenv("PMI_SIZE"))
        return run_worlds(argv[0]);
    ncclUniqueId id;
    float *x = device(std::vector<float>(4, 3)), *y = device<float>(4);
    ncclComm_t comm;
    OK(ncclGetUniqueId(&id)); // without MPI
    EXPECT(ncclCommInitRank(&comm, 2, id, 0) == ncclInvalidUsage);
    comm = communicator(1, 0, id);
    OK(ncclAllReduce(x, y, 4, ncclFloat32, ncclSum, comm, nullptr));
    EXPECT(host(y, 4)[3] == 3);
    OK(ncclCommDestroy(comm));
    free_all();

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    MPI_Comm_size(MPI_COMM_WORLD, &N);
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking);
    world = communicator(N, me, id_of(0));
    comm_two = communicator(N, me, id_of(N - 1));
    for (const Mistake &m : mistakes) {
        if (argc > 1 && !strcmp(m.name, argv[1])) {
            m.make(device(std::vector<float>(4, 3)), device<float>(4));
            cudaDeviceSynchronize();
            return 0; // which it must not
        }
    }
    check_types();
    check_ragged();
    check_two_communicators(comm_two);
    check_events();
    check_host_waits();
    check_long_queue();
    check_communicators();
    check_errors();
    OK(ncclCommDestroy(comm_two));
    OK(ncclCommDestroy(world));
    int all;
    MPI_Allreduce(&failures, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (me == 0)
        printf(all ? "%d failures\n" : "the emulator's NCCL is well\n", all);
    MPI_Finalize();
    return all != 0;
}
