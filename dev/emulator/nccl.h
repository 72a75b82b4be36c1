// nccl.h, the look-alike: as much of NCCL as train_moe.cu uses, between processes that mpirun has started and each of
// which emulates a GPU. MPI moves the bytes.
//
//   - A call does nothing but stand in its stream, in order with kernels and copies. Calls between ncclGroupStart and
//     ncclGroupEnd are one operation. While an operation waits for other ranks, other streams go on; so they do while
//     the host waits in MPI (section 6). The operations of a communicator happen one by one, as they were issued.
//   - What is sent is read when the operation starts; from then until it ends, what is received is full of signalling
//     NaNs. A stream that reads it without having waited for the event sees them, or what was there before.
//   - Sums are taken in the order of the ranks: the same bits on all of them, and run after run.
//   - What NCCL leaves undefined ends the program, with the rank and the call: memory that is not the device's, memory
//     that a group uses twice, a rank that calls something else than its peer, a peer that never comes (in
//     CUDACPU_PATIENCE seconds, 300). A send lasts until it is received, so what needs a group shows without one.
//   - What a rank sends, to itself too, must not change before it has arrived. A host whose stream's queue is full
//     waits (CUDACPU_QUEUE=n), so a send that another rank needs, and that would be started only then, never comes.
//   - Why a call returns an error is told by ncclGetLastError, and on stderr where NCCL_DEBUG is set.

#ifndef CUDACPU_NCCL_H
#define CUDACPU_NCCL_H

#include "cuda_bf16.h"
#include <climits>
#include <cmath>
#include <memory>
#include <mpi.h>
#include <set>
#include <string>
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// 1. Types

#define NCCL_MAJOR           2
#define NCCL_MINOR           28
#define NCCL_PATCH           9
#define NCCL_VERSION_CODE    22809
#define NCCL_UNIQUE_ID_BYTES 128
#define NCCL_SPLIT_NOCOLOR   -1
#define NCCL_COMM_NULL       NULL

typedef struct ncclComm *ncclComm_t;
struct ncclConfig_t; // only nullptr
struct ncclUniqueId {
    char internal[NCCL_UNIQUE_ID_BYTES];
};

#define CUDACPU_RESULTS(RESULT)                                                                                        \
    RESULT(ncclSuccess, 0, "no error")                                                                                 \
    RESULT(ncclUnhandledCudaError, 1, "unhandled cuda error (run with NCCL_DEBUG=INFO for details)")                   \
    RESULT(ncclSystemError, 2, "unhandled system error (run with NCCL_DEBUG=INFO for details)")                        \
    RESULT(ncclInternalError, 3, "internal error - please report this issue to the NCCL developers")                   \
    RESULT(ncclInvalidArgument, 4, "invalid argument (run with NCCL_DEBUG=WARN for details)")                          \
    RESULT(ncclInvalidUsage, 5, "invalid usage (run with NCCL_DEBUG=WARN for details)")                                \
    RESULT(ncclRemoteError, 6, "remote process exited or there was a network error")                                   \
    RESULT(ncclInProgress, 7, "NCCL operation in progress")
#define CUDACPU_RESULT_TEXT(name, number, text) result == name ? text:
enum ncclResult_t { CUDACPU_RESULTS(CUDACPU_ENUM) ncclNumResults = 8 };
inline const char *ncclGetErrorString(ncclResult_t result) {
    return CUDACPU_RESULTS(CUDACPU_RESULT_TEXT) "unknown result code";
}

enum ncclRedOp_t { ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg, ncclNumOps };

#define CUDACPU_TYPES(TYPE)                                                                                            \
    TYPE(ncclInt8, 0, int8_t)                                                                                          \
    TYPE(ncclUint8, 1, uint8_t)                                                                                        \
    TYPE(ncclInt32, 2, int32_t)                                                                                        \
    TYPE(ncclUint32, 3, uint32_t)                                                                                      \
    TYPE(ncclInt64, 4, int64_t)                                                                                        \
    TYPE(ncclUint64, 5, uint64_t)                                                                                      \
    TYPE(ncclFloat32, 7, float)                                                                                        \
    TYPE(ncclFloat64, 8, double)                                                                                       \
    TYPE(ncclBfloat16, 9, __nv_bfloat16)
#define CUDACPU_SIZE(name, number, T)      type == name ? sizeof(T):
#define CUDACPU_TYPE_NAME(name, number, T) type == name ? #name:
enum ncclDataType_t {
    CUDACPU_TYPES(CUDACPU_ENUM) ncclChar = 0,
    ncclInt = 2,
    ncclFloat = 7,
    ncclDouble = 8,
    ncclNumTypes = 12
};

// ---------------------------------------------------------------------------------------------------------------------
// 2. What waits for other ranks

namespace cudacpu {

enum Kind { SEND, RECEIVE, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };
inline const char *const kind_names[] = {"ncclSend",      "ncclRecv",          "ncclAllReduce",
                                         "ncclAllGather", "ncclReduceScatter", "ncclBroadcast"};
inline const char *const op_names[] = {"ncclSum", "ncclProd", "ncclMax", "ncclMin", "ncclAvg"};

inline size_t size_of(ncclDataType_t type) {
    return CUDACPU_TYPES(CUDACPU_SIZE) 0;
}

// What a rank calls: the head of each of its messages, so that whoever receives one knows whether it is the right one.
struct Head {
    Kind kind;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root; // or the peer
    int rank, world;
    uint64_t count;

    std::string text() const {
        std::string s = kind_names[kind] + (" of " + std::to_string(count)) + " ";
        s += CUDACPU_TYPES(CUDACPU_TYPE_NAME) "?";
        if (kind == ALL_REDUCE || kind == REDUCE_SCATTER)
            s += std::string(", ") + op_names[op];
        else if (kind != ALL_GATHER)
            s += (kind == SEND ? " to rank " : " from rank ") + std::to_string(root);
        return s;
    }
    bool fits(const Head &h) const { // h: of a message that has come
        bool same = kind == RECEIVE ? h.kind == SEND : kind == h.kind && op == h.op && root == h.root;
        return same && type == h.type && count == h.count;
    }
};

struct Group;
typedef std::shared_ptr<std::vector<char>> Message; // the head, and data

} // namespace cudacpu

struct ncclComm {
    MPI_Comm mpi; // its own; MPI_COMM_NULL: one rank alone
    int size, rank, world;
    std::deque<std::shared_ptr<cudacpu::Group>> groups; // that have not ended, as they were issued
    std::deque<cudacpu::Message> to_self[2];            // of sends, of the others
};

namespace cudacpu {

inline std::set<ncclComm *> communicators;

inline bool mpi_runs() {
    int begun = 0, ended = 0;
    MPI_Initialized(&begun);
    MPI_Finalized(&ended);
    return begun && !ended;
}

struct Clock { // how long something has been waited for in vain
    unsigned asked = 0;
    std::chrono::steady_clock::time_point since;

    bool late() {
        static const uint64_t patience = environment("CUDACPU_PATIENCE", 300);
        auto now = std::chrono::steady_clock::now();
        if (asked++ == 0)
            since = now;
        return asked > 1000 && now - since > std::chrono::seconds(patience);
    }
};

// start(&request) begins something of MPI, and while it lasts the streams go on.
template <class Start> int meanwhile(Start start, MPI_Status *status = MPI_STATUS_IGNORE) {
    MPI_Request request;
    int done = 0, e = start(&request);
    run_tasks([&] { return e != MPI_SUCCESS || ((e = PMPI_Test(&request, &done, status)), done); });
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Arithmetic, as NCCL's: in the type itself. The average of floats is a sum of parts, that of integers a quotient.

template <class T> T combined(ncclRedOp_t op, T a, T b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16(combined(op, __bfloat162float(a), __bfloat162float(b)));
    } else if constexpr (std::is_floating_point_v<T>) {
        bool less = std::isless(a, b); // unlike <, silent about a quiet NaN
        return op == ncclProd ? a * b : op == ncclMax ? (less ? b : a) : op == ncclMin ? (less ? a : b) : a + b;
    } else {
        typedef std::make_unsigned_t<T> U;
        return op == ncclProd  ? (T)((U)a * (U)b)
               : op == ncclMax ? std::max(a, b)
               : op == ncclMin ? std::min(a, b)
                               : (T)((U)a + (U)b);
    }
}

template <class T> T part(T x, int n) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __float2bfloat16(__bfloat162float(x) * (1 / (float)n));
    else
        return std::is_integral_v<T> ? x : (T)(x * (1 / (T)n));
}

// out (count) of in (n,count)
template <class T> void reduce_ranks(T *out, const std::vector<const char *> &in, size_t count, ncclRedOp_t op) {
    int n = (int)in.size();
    bool average = op == ncclAvg && n > 1;
    for (size_t i = 0; i < count; i++) {
        T sum = T();
        for (int r = 0; r < n; r++) {
            T x = average ? part(((const T *)in[r])[i], n) : ((const T *)in[r])[i];
            sum = r == 0 ? x : combined(op, sum, x);
        }
        if constexpr (std::is_integral_v<T>)
            sum = average ? (T)(sum / (T)n) : sum;
        out[i] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Operations

struct Operation {
    ncclComm *comm;
    Head head;
    const char *from;
    char *to;
    size_t bytes, from_size, to_size; // bytes: of `count` numbers
    Stream *stream;

    bool sends_to(int r) const {
        return head.kind == SEND ? r == head.root
                                 : head.kind != RECEIVE && (head.kind != BROADCAST || comm->rank == head.root);
    }
    bool receives_from(int r) const {
        return head.kind == RECEIVE || head.kind == BROADCAST ? r == head.root : head.kind != SEND;
    }
    int tag() const { // sends and receives, and the others, are in no order in a group
        return head.kind > RECEIVE;
    }
    bool in_place() const {
        size_t mine = comm->rank * bytes;
        return head.kind == ALL_GATHER       ? from == to + mine
               : head.kind == REDUCE_SCATTER ? to == from + mine
                                             : head.kind > RECEIVE && from == to;
    }
    Message message(int r) const {
        Message m = std::make_shared<std::vector<char>>(sizeof(Head) + bytes);
        memcpy(m->data(), &head, sizeof(head));
        if (bytes)
            memcpy(m->data() + sizeof(Head), from + (head.kind == REDUCE_SCATTER ? r * bytes : 0), bytes);
        return m;
    }
    void store(const std::vector<const char *> &in) const { // from the ranks that it receives from
#define CUDACPU_REDUCE(name, number, T)                                                                                \
    if (head.type == name)                                                                                             \
        reduce_ranks((T *)(void *)to, in, head.count, head.op);
        if (head.kind == ALL_REDUCE || head.kind == REDUCE_SCATTER) {
            CUDACPU_TYPES(CUDACPU_REDUCE)
        } else {
            for (size_t i = 0; i < in.size() && bytes; i++)
                memcpy(to + i * bytes, in[i], bytes);
        }
    }
    // Says who calls what, and what is wrong with it.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void stop(const char *format, ...) const {
        char text[600];
        va_list values;
        va_start(values, format);
        vsnprintf(text, sizeof(text), format, values);
        va_end(values);
        fail("rank %d of %d (world rank %d): %s%s", head.rank, comm->size, head.world, head.text().c_str(), text);
    }
};

struct Sending {
    const Operation *operation;
    int to;
    Message message;
    MPI_Request request;
};

struct Receiving {
    const Operation *operation;
    int from;
    bool arrived;
    Message message; // nullptr: not yet found
    MPI_Request request;
};

// A call, or the calls of a group. It starts when all its streams have come to it, and its communicators too.
struct Group : std::enable_shared_from_this<Group> {
    enum { ISSUED, STARTED, ENDED } state = ISSUED;
    std::vector<Operation> operations;
    std::set<Stream *> streams;
    std::set<ncclComm *> comms;
    size_t arrived = 0;
    std::vector<Sending> sends;
    std::vector<Receiving> receives; // in the order of the operations, and of ranks
    Clock clock;

    bool may_start() {
        if (state != ISSUED)
            return true;
        if (arrived < streams.size())
            return false;
        for (ncclComm *c : comms) {
            if (c->groups.front().get() != this) {
                if (clock.late())
                    operations[0].stop(" waits in vain for %s, issued before it on the same communicator",
                                       c->groups.front()->operations[0].head.text().c_str());
                return false;
            }
        }
        return true;
    }
    void start() {
        for (const Operation &o : operations) {
            Message m;
            for (int r = 0; r < o.comm->size; r++) {
                if (o.sends_to(r)) {
                    if (!m || o.head.kind == REDUCE_SCATTER)
                        m = o.message(r);
                    send(o, r, m);
                }
                if (o.receives_from(r))
                    receives.push_back({&o, r, false, nullptr, MPI_REQUEST_NULL});
            }
        }
        for (const Operation &o : operations)
            poison(o.to, o.to_size);
        clock = Clock();
        state = STARTED;
    }
    void send(const Operation &o, int r, const Message &m) {
        if (r == o.comm->rank) {
            o.comm->to_self[o.tag()].push_back(m);
            sends.push_back({&o, r, m, MPI_REQUEST_NULL}); // for end() to look at
            return;
        }
        if (!mpi_runs())
            o.stop(" comes after MPI_Finalize, and the emulator needs MPI");
        if (m->size() > INT_MAX)
            o.stop(" is a message of %zu bytes, which are too many for the emulator", m->size());
        sends.push_back({&o, r, m, MPI_REQUEST_NULL}); // which lasts until it is received
        MPI_Issend(m->data(), (int)m->size(), MPI_BYTE, r, o.tag(), o.comm->mpi, &sends.back().request);
    }
    void find(Receiving &r) {
        ncclComm *c = r.operation->comm;
        int tag = r.operation->tag(), found, bytes;
        if (r.from == c->rank) {
            r.message = c->to_self[tag].front();
            c->to_self[tag].pop_front();
            return;
        }
        MPI_Message message;
        MPI_Status status;
        MPI_Improbe(r.from, tag, c->mpi, &found, &message, &status);
        if (found) {
            MPI_Get_count(&status, MPI_BYTE, &bytes);
            r.message = std::make_shared<std::vector<char>>(bytes);
            MPI_Imrecv(r.message->data(), bytes, MPI_BYTE, &message, &r.request);
        }
    }
    bool has_arrived(Receiving &r) {
        int done = 1;
        if (r.request != MPI_REQUEST_NULL)
            MPI_Test(&r.request, &done, MPI_STATUS_IGNORE);
        if (!done)
            return false;
        Head h;
        memcpy(&h, r.message->data(), sizeof(h));
        if (!r.operation->head.fits(h))
            r.operation->stop(" does not fit what rank %d (world rank %d) calls: %s", h.rank, h.world,
                              h.text().c_str());
        return r.arrived = true;
    }
    bool all_done() { // asks MPI, and so drives it
        if (state == ENDED)
            return true;
        std::set<std::tuple<ncclComm *, int, int>> without; // where no further message is
        Receiving *missing = nullptr;
        for (Receiving &r : receives) {
            auto source = std::make_tuple(r.operation->comm, r.from, r.operation->tag());
            if (!r.message && !without.count(source))
                find(r);
            if (!r.message)
                without.insert(source);
            if (!r.arrived && !(r.message && has_arrived(r)))
                missing = missing ? missing : &r;
        }
        Sending *unread = nullptr;
        for (Sending &s : sends) {
            int done = 1;
            if (s.request != MPI_REQUEST_NULL)
                MPI_Test(&s.request, &done, MPI_STATUS_IGNORE);
            unread = done || unread ? unread : &s;
        }
        if ((missing || unread) && clock.late())
            (missing ? missing->operation : unread->operation)
                ->stop(" waits in vain for rank %d%s", missing ? missing->from : unread->to,
                       operations.size() == 1 ? ": would it need a group?" : "");
        return !missing && !unread;
    }
    void end() {
        for (const Sending &s : sends) {
            const Operation &o = *s.operation;
            const char *sent = o.from + (o.head.kind == REDUCE_SCATTER ? s.to * o.bytes : 0);
            if (!o.in_place() && o.bytes && memcmp(s.message->data() + sizeof(Head), sent, o.bytes))
                o.stop(": what is being sent was changed while it was under way");
        }
        for (const Operation &o : operations) {
            if (o.to_size && !poisoned(o.to, o.to_size))
                o.stop(": something else was written where it receives");
        }
        auto r = receives.begin();
        for (const Operation &o : operations) {
            std::string name = "rank " + std::to_string(o.head.rank) + ": " + o.head.text();
            Handlers handlers;
            Traps traps(name.c_str());
            std::vector<const char *> in;
            for (; r != receives.end() && r->operation == &o; ++r)
                in.push_back(r->message->data() + sizeof(Head));
            if (o.to_size)
                o.store(in);
        }
        leave();
    }
    void leave() {
        sends.clear();
        receives.clear();
        state = ENDED;
        for (ncclComm *c : comms)
            c->groups.erase(std::find(c->groups.begin(), c->groups.end(), shared_from_this()));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 5. Calls

inline std::string last_nccl_error;
inline unsigned group_depth;
inline ncclResult_t group_error = ncclSuccess;
inline std::vector<Operation> group_calls;

__attribute__((format(printf, 2, 3))) inline ncclResult_t wrong(ncclResult_t error, const char *format, ...) {
    char text[500];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    last_nccl_error = text;
    if (getenv("NCCL_DEBUG"))
        fprintf(stderr, "%s\n", text);
    if (group_depth && group_error == ncclSuccess)
        group_error = error;
    return error;
}

// No two pieces of memory of a group may overlap if one is written, but for what NCCL calls in place.
inline void check_overlaps(const std::vector<Operation> &calls) {
    struct Piece {
        const char *p;
        size_t size;
        const Operation *of;
        bool written;
    };
    std::vector<Piece> pieces;
    for (const Operation &o : calls) {
        pieces.push_back({o.from, o.from_size, &o, false});
        pieces.push_back({o.to, o.to_size, &o, true});
    }
    for (const Piece &a : pieces) {
        for (const Piece &b : pieces) {
            if (&a != &b && a.written && a.p < b.p + b.size && b.p < a.p + a.size &&
                !(a.of == b.of && a.of->in_place()))
                a.of->stop(" writes into memory of %s, in the same %s", b.of->head.text().c_str(),
                           a.of == b.of ? "call" : "group");
        }
    }
}

inline ncclResult_t issue(std::vector<Operation> calls) {
    std::map<ncclComm *, int> to_self;
    for (const Operation &o : calls)
        to_self[o.comm] += o.head.kind > RECEIVE || o.head.root != o.head.rank ? 0 : o.head.kind == SEND ? 1 : -1;
    for (auto [comm, n] : to_self) {
        if (n)
            return wrong(ncclInvalidUsage, "rank %d sends to itself and does not receive, or the reverse", comm->rank);
    }
    check_overlaps(calls);
    for (const Operation &o : calls)
        wait_for_room(o.stream);
    auto g = std::make_shared<Group>();
    g->operations = std::move(calls);
    for (const Operation &o : g->operations) {
        g->streams.insert(o.stream);
        g->comms.insert(o.comm);
    }
    for (ncclComm *c : g->comms)
        c->groups.push_back(g);
    for (Stream *s : g->streams) {
        enqueue(
            s, [g] { g->arrived++; }, nullptr, false);
        enqueue(
            s, [g] { g->state == Group::ISSUED ? g->start() : (void)0; }, [g] { return g->may_start(); }, false);
        enqueue(
            s, [g] { g->state == Group::STARTED ? g->end() : (void)0; }, [g] { return g->all_done(); }, false);
        s = s ? s : &null_stream;
        s->tasks.back().counts = true; // one place for all three
        s->queued++;
    }
    return ncclSuccess;
}

inline ncclResult_t call(Kind kind, const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                         int root, ncclComm_t comm, cudaStream_t stream) {
    const char *name = kind_names[kind];
    size_t width = size_of(type), bytes = count * width, n;
    if (!communicators.count(comm))
        return wrong(ncclInvalidArgument, "%s: %p is no communicator", name, (void *)comm);
    if (width == 0)
        return wrong(ncclInvalidArgument, "%s: no data type %d here", name, (int)type);
    if ((unsigned)op >= ncclNumOps)
        return wrong(ncclInvalidArgument, "%s: no operation %d here", name, (int)op);
    if (root < 0 || root >= comm->size)
        return wrong(ncclInvalidArgument, "%s: no rank %d among %d", name, root, comm->size);
    if (count == 0 && kind > RECEIVE)
        return ncclSuccess;
    n = comm->size;
    Operation o = {comm,
                   {kind, type, op, root, comm->rank, comm->world, count},
                   (const char *)from,
                   (char *)to,
                   bytes,
                   (kind == REDUCE_SCATTER ? n : 1) * bytes,
                   bytes,
                   stream};
    if (kind == RECEIVE || (kind == BROADCAST && comm->rank != root))
        o.from = nullptr, o.from_size = 0;
    if (kind == SEND)
        o.to = nullptr, o.to_size = 0;
    if (kind == ALL_GATHER)
        o.to_size = n * bytes;
    std::pair<const char *, size_t> buffers[] = {{o.from, o.from_size}, {o.to, o.to_size}};
    for (auto [p, size] : buffers) {
        if (size && !on_device(p, size))
            o.stop(": the %zu bytes at %p are not all in one piece of device memory", size, (const void *)p);
        if (size && (uintptr_t)p % width)
            o.stop(": address %p is not a multiple of %zu", (const void *)p, width);
    }
    if (group_depth == 0)
        return issue({o});
    group_calls.push_back(o);
    return ncclSuccess;
}

inline ncclComm_t new_communicator(MPI_Comm mpi, int size, int rank) {
    int world = 0;
    if (mpi_runs())
        MPI_Comm_rank(MPI_COMM_WORLD, &world);
    ncclComm_t comm = new ncclComm{mpi, size, rank, world, {}, {}};
    communicators.insert(comm);
    return comm;
}

const char ID_MARK[] = "an id of cudacpu's NCCL"; // and after it a number of eight bytes
inline std::set<uint64_t> used_ids;

// Nobody knows which ranks of the world take part: each that does tells all of them, and waits for as many as must.
struct Hello {
    uint64_t id;
    int size, rank;
};

inline MPI_Comm meet(uint64_t id, int size, int rank) {
    static std::deque<Hello> hellos; // those to ranks outside are never received
    int *most, found, tag, world, me;
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &most, &found);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    tag = *most - 2 * (int)(id % (*most / 4)); // and the next is for MPI_Comm_create_group
    hellos.push_back({id, size, rank});
    for (int w = 0; w < world; w++) {
        MPI_Request request;
        MPI_Isend(&hellos.back(), sizeof(Hello), MPI_BYTE, w, tag, MPI_COMM_WORLD, &request);
        MPI_Request_free(&request);
    }
    std::vector<int> members(size, -1);
    for (int i = 0; i < size; i++) {
        Hello hello;
        MPI_Status status;
        MPI_Request request;
        Clock clock;
        MPI_Irecv(&hello, sizeof(hello), MPI_BYTE, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &request);
        run_tasks([&] {
            MPI_Test(&request, &found, &status);
            if (!found && clock.late())
                fail("ncclCommInitRank: rank %d of %d (world rank %d) waits in vain for others: %d with this id have "
                     "come",
                     rank, size, me, i);
            return found;
        });
        if (hello.id != id || hello.size != size || hello.rank < 0 || hello.rank >= size || members[hello.rank] >= 0)
            fail("ncclCommInitRank: world rank %d is rank %d of %d, but world rank %d is rank %d of %d", me, rank, size,
                 status.MPI_SOURCE, hello.rank, hello.size);
        members[hello.rank] = status.MPI_SOURCE;
    }
    MPI_Group all, ours;
    MPI_Comm mpi;
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    MPI_Group_incl(all, size, members.data(), &ours);
    MPI_Comm_create_group(MPI_COMM_WORLD, ours, tag - 1, &mpi);
    MPI_Group_free(&all);
    MPI_Group_free(&ours);
    return mpi;
}

} // namespace cudacpu

inline ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
inline const char *ncclGetLastError(ncclComm_t) {
    return cudacpu::last_nccl_error.c_str();
}
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static uint64_t drawn = 0;
    uint64_t number = cudacpu::Random(getpid(), clock64(), ++drawn).state;
    memset(id, 0, sizeof(*id));
    memcpy(id->internal, cudacpu::ID_MARK, sizeof(cudacpu::ID_MARK));
    memcpy(id->internal + sizeof(cudacpu::ID_MARK), &number, sizeof(number));
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank) {
    using namespace cudacpu;
    uint64_t number;
    int world = 1;
    memcpy(&number, id.internal + sizeof(ID_MARK), sizeof(number));
    if (mpi_runs())
        MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (nranks < 1 || rank < 0 || rank >= nranks)
        return wrong(ncclInvalidArgument, "ncclCommInitRank: no rank %d among %d", rank, nranks);
    if (memcmp(id.internal, ID_MARK, sizeof(ID_MARK)))
        return wrong(ncclInvalidArgument, "ncclCommInitRank: an id that ncclGetUniqueId has not made");
    if (nranks > world)
        return wrong(ncclInvalidUsage, "ncclCommInitRank: %d ranks, but %s", nranks,
                     mpi_runs() ? "MPI has fewer" : "MPI is not initialised");
    if (!used_ids.insert(number).second)
        return wrong(ncclInvalidUsage, "ncclCommInitRank: each communicator needs an id of its own");
    *comm = new_communicator(nranks == 1 ? MPI_COMM_NULL : meet(number, nranks, rank), nranks, rank);
    return ncclSuccess;
}
inline ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *) {
    using namespace cudacpu;
    MPI_Comm mpi = MPI_COMM_NULL;
    int size = 1, rank = 0;
    *newcomm = nullptr;
    if (!communicators.count(comm) || color < NCCL_SPLIT_NOCOLOR)
        return wrong(ncclInvalidArgument, "ncclCommSplit: no communicator, or no color: %d", color);
    if (comm->mpi != MPI_COMM_NULL) {
        meanwhile([&](MPI_Request *r) { return MPI_Ibarrier(comm->mpi, r); }); // then the next line waits for nobody
        MPI_Comm_split(comm->mpi, color < 0 ? MPI_UNDEFINED : color, key, &mpi);
        if (color >= 0) {
            MPI_Comm_size(mpi, &size);
            MPI_Comm_rank(mpi, &rank);
        }
    }
    if (color >= 0)
        *newcomm = new_communicator(mpi, size, rank);
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    using namespace cudacpu;
    if (!communicators.count(comm) || group_depth)
        return wrong(ncclInvalidArgument, "ncclCommDestroy: %s", group_depth ? "in a group" : "no communicator");
    run_tasks([=] { return comm->groups.empty(); });
    if (comm->mpi != MPI_COMM_NULL && mpi_runs())
        MPI_Comm_free(&comm->mpi);
    communicators.erase(comm);
    delete comm;
    return ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    using namespace cudacpu;
    static std::vector<Message> messages; // MPI may still use them
    if (!communicators.count(comm) || group_depth)
        return wrong(ncclInvalidArgument, "ncclCommAbort: %s", group_depth ? "in a group" : "no communicator");
    while (!comm->groups.empty()) {
        std::shared_ptr<Group> g = comm->groups.front();
        for (Sending &s : g->sends)
            messages.push_back(s.message);
        for (Receiving &r : g->receives)
            messages.push_back(r.message);
        g->leave();
    }
    communicators.erase(comm);
    delete comm;
    return ncclSuccess;
}

namespace cudacpu {
inline ncclResult_t answer(const char *name, ncclComm_t comm, int ncclComm::*what, int *to) {
    if (!comm || !communicators.count(comm))
        return wrong(ncclInvalidArgument, "%s: %p is no communicator", name, (void *)comm);
    *to = comm->*what;
    return ncclSuccess;
}
} // namespace cudacpu
inline ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    return cudacpu::answer("ncclCommCount", comm, &ncclComm::size, count);
}
inline ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    return cudacpu::answer("ncclCommUserRank", comm, &ncclComm::rank, rank);
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { // CUDACPU_NCCL_ERROR: of which call
    static long calls = 0, failing = getenv("CUDACPU_NCCL_ERROR") ? atol(getenv("CUDACPU_NCCL_ERROR")) : 0;
    int size;
    *error = ++calls == failing ? ncclRemoteError : ncclSuccess;
    return cudacpu::answer("ncclCommGetAsyncError", comm, &ncclComm::size, &size);
}

inline ncclResult_t ncclGroupStart() {
    cudacpu::group_depth++;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupEnd() { // an error within makes nothing of all of it
    using namespace cudacpu;
    if (group_depth == 0)
        return wrong(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth)
        return ncclSuccess;
    std::vector<Operation> calls = std::move(group_calls);
    ncclResult_t error = group_error;
    group_calls.clear();
    group_error = ncclSuccess;
    return error != ncclSuccess || calls.empty() ? error : issue(std::move(calls));
}

inline ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    return cudacpu::call(cudacpu::SEND, from, nullptr, count, type, ncclSum, peer, comm, stream);
}
inline ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    return cudacpu::call(cudacpu::RECEIVE, nullptr, to, count, type, ncclSum, peer, comm, stream);
}
inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm, cudaStream_t stream) {
    return cudacpu::call(cudacpu::ALL_REDUCE, from, to, count, type, op, 0, comm, stream);
}
inline ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    return cudacpu::call(cudacpu::ALL_GATHER, from, to, count, type, ncclSum, 0, comm, stream);
}
inline ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                      ncclComm_t comm, cudaStream_t stream) {
    return cudacpu::call(cudacpu::REDUCE_SCATTER, from, to, count, type, op, 0, comm, stream);
}
inline ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root,
                                  ncclComm_t comm, cudaStream_t stream) {
    return cudacpu::call(cudacpu::BROADCAST, from, to, count, type, ncclSum, root, comm, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. A GPU works while its host waits in MPI for another rank, which may need what the GPU is to send. So these take
// the place of the library's, whose own functions have a P before the name.

#define CUDACPU_MPI extern "C" __attribute__((used)) inline int

CUDACPU_MPI MPI_Barrier(MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Ibarrier(comm, r); });
}
CUDACPU_MPI MPI_Bcast(void *p, int n, MPI_Datatype t, int root, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Ibcast(p, n, t, root, comm, r); });
}
CUDACPU_MPI MPI_Reduce(const void *from, void *to, int n, MPI_Datatype t, MPI_Op op, int root, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Ireduce(from, to, n, t, op, root, comm, r); });
}
CUDACPU_MPI MPI_Allreduce(const void *from, void *to, int n, MPI_Datatype t, MPI_Op op, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Iallreduce(from, to, n, t, op, comm, r); });
}
CUDACPU_MPI MPI_Gather(const void *from, int n, MPI_Datatype t, void *to, int m, MPI_Datatype u, int root,
                       MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Igather(from, n, t, to, m, u, root, comm, r); });
}
CUDACPU_MPI MPI_Allgather(const void *from, int n, MPI_Datatype t, void *to, int m, MPI_Datatype u, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Iallgather(from, n, t, to, m, u, comm, r); });
}
CUDACPU_MPI MPI_Alltoall(const void *from, int n, MPI_Datatype t, void *to, int m, MPI_Datatype u, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Ialltoall(from, n, t, to, m, u, comm, r); });
}
CUDACPU_MPI MPI_Send(const void *p, int n, MPI_Datatype t, int to, int tag, MPI_Comm comm) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Isend(p, n, t, to, tag, comm, r); });
}
CUDACPU_MPI MPI_Recv(void *p, int n, MPI_Datatype t, int from, int tag, MPI_Comm comm, MPI_Status *status) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return PMPI_Irecv(p, n, t, from, tag, comm, r); }, status);
}
CUDACPU_MPI MPI_Wait(MPI_Request *request, MPI_Status *status) {
    return cudacpu::meanwhile([&](MPI_Request *r) { return *r = *request, *request = MPI_REQUEST_NULL, 0; }, status);
}
CUDACPU_MPI MPI_Testall(int n, MPI_Request *requests, int *done, MPI_Status *statuses) {
    int asked = 0; // a task of a stream is done between two tests
    cudacpu::run_tasks([&] { return asked++ > 0; });
    return PMPI_Testall(n, requests, done, statuses);
}
CUDACPU_MPI MPI_Finalize() {
    cudacpu::run_all();
    MPI_Barrier(MPI_COMM_WORLD);
    return PMPI_Finalize();
}
#ifdef CUDACPU_ASAN
extern "C" __attribute__((used)) inline int __lsan_is_turned_off() { // MPI's libraries leak
    return 1;
}
#endif

#undef CUDACPU_MPI
#endif
