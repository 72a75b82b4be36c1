// dev/bench/bench_cu: how fast train_moe.cu is on this device, and how fast it could be, in one
// run:
//
//     make bench_cu                                everything
//     dev/bench/bench_cu [--quick] [--batch N] WORD...   words: peak steps kernels experts
//     attention generate torch, and A to E
//
// A to E are the models below; without any, all are meant. --quick: tiny sizes, to see that it
// runs; its figures mean nothing. --batch: sequences in a step, else as many as fill the device.
// What is compared takes turns on the device, and medians are printed. Times are the device's,
// between two events in its stream. Operations are counted as flops_per_token() does, whatever a
// kernel does beyond them. Goals, and shares of a peak, are of the data sheet's where it is known
// (dev/cuda/peak.cuh), and shares of what cuBLAS holds for half a second stand beside them.
// TORCH_PYTHON names a python that has PyTorch.

#define TRAIN_MOE_NO_MAIN
#ifndef TWIN
#define TWIN "train_moe.cu"
#endif
#include TWIN
#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace gpu {

// F: a token's experts are together 4*C wide, as a dense feed-forward commonly is. Of D and E about
// half a billion weights are at work for each token. goal: share of the data sheet's peak, in
// percent.
const struct ModelRow {
    char letter;
    const char *options, *quick;
    double goal;
} models[] = {{'A', "--layers 12 --dim 1024 --heads 16 --experts 8 --topk 2 --ffn 2048 --seq 1024",
               "--layers 2 --dim 64 --heads 2 --experts 8 --topk 2 --ffn 64 --seq 16", 35},
              {'B', "--layers 12 --dim 512 --heads 8 --experts 8 --topk 2 --ffn 1024 --seq 1024",
               "--layers 2 --dim 32 --heads 1 --experts 8 --topk 2 --ffn 32 --seq 16", 25},
              {'C', "--layers 12 --dim 1024 --heads 16 --experts 64 --topk 8 --ffn 512 --seq 1024",
               "--layers 1 --dim 32 --heads 1 --experts 64 --topk 8 --ffn 16 --seq 16", 20},
              {'D', "--layers 12 --dim 1536 --heads 24 --experts 8 --topk 2 --ffn 3072 --seq 1024",
               "--layers 1 --dim 32 --heads 1 --experts 8 --topk 2 --ffn 32 --seq 16", 40},
              {'E', "--layers 12 --dim 1536 --heads 24 --experts 64 --topk 8 --ffn 768 --seq 1024",
               "--layers 1 --dim 32 --heads 1 --experts 64 --topk 8 --ffn 16 --seq 16", 25}};
enum { MODELS = sizeof(models) / sizeof(models[0]), FULL_STEP = 65536 }; // tokens

int quick, asked_batch, wanted_model[MODELS];
Peak peak;    // operations per second of cuBLAS, measured before all else
double sheet; // the same by the data sheet; 0: unknown

const char *options_of(int i) {
    return quick ? models[i].quick : models[i].options;
}

// A rate beside the peaks: "41.0% of the data sheet, 55.2% of cuBLAS".
std::string share(double rate) {
    char text[64];
    if (sheet > 0) {
        snprintf(text, sizeof(text), "%5.1f%% of the data sheet, %5.1f%% of cuBLAS",
                 100 * rate / sheet, 100 * rate / peak.sustained);
    } else {
        snprintf(text, sizeof(text), "%5.1f%% of cuBLAS", 100 * rate / peak.sustained);
    }
    return text;
}

void print_peak(const char *when) {
    printf("peak %s: cuBLAS %.1f TFLOP/s for half a second, %.1f in bursts; data sheet ", when,
           peak.sustained / 1e12, peak.burst / 1e12);
    if (sheet > 0) {
        printf("%.1f\n", sheet / 1e12);
    } else {
        printf("unknown\n");
    }
    fflush(stdout);
}

// ---- turns

struct Thing { // to be timed
    std::function<void()> call;
    double work; // operations or bytes of a call
    std::vector<double> rate;
};

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? 0 : (v[v.size() / 2] + v[(v.size() - 1) / 2]) / 2;
}

// Seconds of the device for a call, when there are so many of them.
double seconds_of(const std::function<void()> &call, int times) {
    static cudaEvent_t begin, end;
    float ms = 0;
    if (!begin) {
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
    }
    CHECK(cudaEventRecord(begin, stream));
    for (int i = 0; i < times; i++) {
        call();
    }
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    return fmax(1e-3 * ms, 1e-9) / times;
}

// Turns of 5 ms at least: a single call of less is mostly the starting of it.
void take_turns(std::vector<Thing> &list) {
    std::vector<int> times;
    for (Thing &t : list) {
        if (!quick) {
            seconds_of(t.call, 2); // warms up
        }
        times.push_back(quick ? 1 : max_int(1, (int)(5e-3 / seconds_of(t.call, 1))));
    }
    for (int round = 0; round < (quick ? 1 : 9); round++) {
        for (size_t i = 0; i < list.size(); i++) {
            list[i].rate.push_back(list[i].work / seconds_of(list[i].call, times[i]));
        }
    }
}

// ---- what the device can do

// Uniform numbers whose spread is that of N(0,0.02), about `mean`.
__global__ void random_floats_kernel(float *x, size_t size, float mean, float width) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) {
        x[i] = mean + width * ((float)random_uniform(2, i) - 0.5f);
    }
}

void random_floats(float *x, size_t size, float mean, float width) {
    random_floats_kernel<<<blocks(size), THREADS, 0, stream>>>(x, size, mean, width);
    CHECK(cudaGetLastError());
}

template <class T> T *room_for(size_t size) {
    void *p;
    CHECK(cudaMalloc(&p, size * sizeof(T)));
    return (T *)p;
}

floatX *random_low(size_t size) { // between -0.5 and 0.5
    floatX *x = room_for<floatX>(size);
    fill_kernel<<<blocks(size), THREADS, 0, stream>>>(x, size);
    CHECK(cudaGetLastError());
    return x;
}

void release(std::initializer_list<void *> list) {
    CHECK(cudaStreamSynchronize(stream));
    for (void *p : list) {
        CHECK(cudaFree(p));
    }
}

__global__ void read_kernel(uint4 *out, const uint4 *x, size_t size) {
    uint4 sum = {0, 0, 0, 0};
    size_t all = (size_t)gridDim.x * blockDim.x;
#pragma unroll 8
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += all) {
        uint4 v = x[i];
        sum.x ^= v.x;
        sum.y ^= v.y;
        sum.z ^= v.z;
        sum.w ^= v.w;
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x9e3779b9u) { // seldom, but the compiler cannot know
        *out = sum;
    }
}

// Bytes per second: reading alone, and copying, which reads and writes. More than any cache holds.
void measure_memory(double *reading, double *copying) {
    size_t bytes = quick ? 1 << 16 : (size_t)1 << 30;
    uint4 *x = room_for<uint4>(bytes / 16), *to = room_for<uint4>(bytes / 16);
    CHECK(cudaMemsetAsync(x, 1, bytes, stream));
    std::vector<Thing> t = {
        {[=] {
             read_kernel<<<quick ? 2 : 2048, 512, 0, stream>>>(to, x, bytes / 16);
             CHECK(cudaGetLastError());
         },
         (double)bytes,
         {}},
        {[=] { CHECK(cudaMemcpyAsync(to, x, bytes, cudaMemcpyDeviceToDevice, stream)); },
         2.0 * bytes,
         {}}};
    take_turns(t);
    *reading = median(t[0].rate);
    *copying = median(t[1].rate);
    release({x, to});
}

void print_clocks(void) {
    char line[256] = "";
    FILE *answer =
        popen("nvidia-smi -i \"${CUDA_VISIBLE_DEVICES:-0}\" --format=csv,noheader "
              "--query-gpu=driver_version,clocks.sm,"
              "clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu 2>/dev/null",
              "r");
    if (answer && fgets(line, sizeof(line), answer) && isdigit(*line)) { // no message of an error
        printf("driver, clock, highest clock, memory's, power, its limit, degrees C: %s", line);
    }
    if (answer) {
        pclose(answer);
    }
}

void bench_peak(void) {
    int n = quick ? 64 : 8192;
    double reading, copying;
    float *a = room_for<float>((size_t)n * n), *out = room_for<float>((size_t)n * n);
    random_floats(a, (size_t)n * n, 0, 1);
    std::vector<Thing> t = {{[=] { product(out, a, 0, a, 0, n, n, n, SET); }, 2.0 * n * n * n, {}}};
    take_turns(t);
    release({a, out});
    measure_memory(&reading, &copying);
    printf("cuBLAS: %s %.1f TFLOP/s, float32 without TF32 %.1f; memory: reading %.0f GB/s, copying "
           "%.0f GB/s\n",
           sizeof(floatX) == 2 ? "bfloat16" : "float32", peak.sustained / 1e12,
           median(t[0].rate) / 1e12, reading / 1e9, copying / 1e9);
}

// ---- models

struct Trainee {
    Config config;
    Model *model;
    std::vector<int> inputs, targets;
    double work, loss; // operations of a step
    int step;
};

Config read_config(const char *recipe, const char *options, int batch) {
    Config c;
    char text[512];
    char *words[64] = {NULL};
    int count = 0;
    snprintf(text, sizeof(text), "bench --recipe %s --batch %d %s", recipe, batch, options);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        words[count++] = word;
    }
    parse_command_line(&c, count, words);
    config_check(&c);
    c.vocab =
        quick
            ? 256
            : 50257; // GPT-2's, as its tokenizer has it: odd, which a trainer has to get over with
    return c;
}

// The largest power of two up to `most` tokens of which a step takes at most this share of the
// memory that is free.
int batch_for(const char *options, int most, double share) {
    size_t left, total;
    int batch = 1;
    start_device();
    CHECK(cudaMemGetInfo(&left, &total));
    for (Config c = read_config("mixtral", options, 1);
         !asked_batch && 2 * batch * c.seq <= (quick ? 32 : most); batch *= 2) {
        if (bytes_of(&c, 2 * batch * c.seq, 1) > share * (double)left) {
            break;
        }
    }
    return asked_batch ? asked_batch : batch;
}

// Does a step of the smallest batch fit? Says so where not.
int fits(int i) {
    size_t left, total;
    Config c = read_config("mixtral", options_of(i), 1);
    start_device();
    CHECK(cudaMemGetInfo(&left, &total));
    double need = bytes_of(&c, c.seq, 1);
    if (need > 0.93 * (double)left) {
        printf("\n  %c needs %.1f GB, more than there are\n", models[i].letter, need / 1e9);
    }
    return need <= 0.93 * (double)left;
}

Model *random_model(const Config *c, int N, int train) {
    Model *m = (Model *)backend.create(c, N, train, NULL);
    for (int i = 0; i < m->tensor_count; i++) {
        int one = m->tensors[i].init == INIT_ONE;
        random_floats(m->memory[WEIGHTS] + m->tensors[i].offset, m->tensors[i].size, (float)one,
                      one ? 0 : 0.07f);
    }
    round_weights(m, 0, m->size);
    return m;
}

// dense: feed-forwards that are as wide as a token's experts together.
Trainee new_trainee(const char *options, int batch, int dense) {
    Trainee t;
    t.config = read_config(dense ? "dense" : "mixtral", options, batch);
    int N = batch * t.config.seq;
    t.model = random_model(&t.config, N, 1);
    t.work = N * flops_per_token(&t.config);
    t.step = 0;
    for (int i = 0; i < N; i++) {
        t.inputs.push_back((int)(hash64((uint64_t)i) % (uint64_t)t.config.vocab));
        t.targets.push_back((int)(hash64((uint64_t)i + 1) % (uint64_t)t.config.vocab));
    }
    return t;
}

// A step as the trainer takes it, but for the learning rate, which keeps the weights and so the
// experts' loads as they are. Returns the device's seconds, waiting for the batch included.
double train_step(Trainee *t) {
    const Config *c = &t->config;
    double aux, norm,
        time = seconds_of(
            [=] {
                t->step++;
                Batch batch = {t->inputs.data(),
                               t->targets.data(),
                               c->batch,
                               c->seq,
                               TRAIN_MODE,
                               1,
                               t->step,
                               0,
                               1,
                               1};
                backend.forward(t->model, &batch);
                backend.backward(t->model);
                backend.update(t->model, t->step, 1e-9);
            },
            1);
    backend.losses(t->model, &t->loss, &aux, &norm);
    if (!isfinite(t->loss) || !isfinite(norm)) {
        fail("a step's loss is %g, its gradients' norm %g", t->loss, norm);
    }
    return time;
}

void train_steps(Trainee *t, int warm, int count, std::vector<double> *times) {
    for (int i = quick ? warm : 0; i < warm + (quick ? 1 : count); i++) {
        double time = train_step(t);
        if (i >= warm) {
            times->push_back(time);
        }
    }
}

// Models are made anew for each turn, so that each has the whole memory for its batch.
void bench_steps(void) {
    printf("\nsteps: forward, backward, update; the tax is the time against dense feed-forwards of "
           "equal active size\n");
    for (int i = 0; i < MODELS; i++) {
        if (!wanted_model[i] || !fits(i)) {
            continue;
        }
        std::vector<double> times[2];
        double work[2];
        int batch = batch_for(options_of(i), FULL_STEP, 0.93), N = 0;
        printf("  %c: %s --batch %d\n", models[i].letter, options_of(i), batch);
        for (int turn = 0; turn < (quick ? 2 : 6); turn++) {
            int dense = turn % 2;
            Trainee t = new_trainee(options_of(i), batch, dense);
            train_steps(&t, 2, 4, &times[dense]);
            work[dense] = t.work;
            N = batch * t.config.seq;
            backend.release(t.model);
        }
        for (int dense = 0; dense < 2; dense++) {
            double time = median(times[dense]);
            printf("     %-7s %8.1f ms %9.0f tokens/s %7.1f TFLOP/s %s",
                   dense ? "dense" : "mixture", 1e3 * time, N / time, work[dense] / time / 1e12,
                   share(work[dense] / time).c_str());
            if (dense) {
                printf("; tax %.3f\n", median(times[0]) / time);
            } else {
                printf(" (goal %.0f%%)\n", models[i].goal); // of the first share
            }
        }
        fflush(stdout);
    }
}

// ---- kernels: who takes the time of a step

std::vector<cudaEvent_t> seen_at; // an event behind whatever a CHECK has started
std::vector<const char *> seen;   // the function that started it

void see(const char *function) { // may not use CHECK, which would call it
    cudaError_t error = cudaSuccess;
    if (seen.size() == seen_at.size()) {
        seen_at.push_back(NULL);
        error = cudaEventCreate(&seen_at.back());
    }
    if (error == cudaSuccess) {
        error = cudaEventRecord(seen_at[seen.size()], stream);
    }
    if (error != cudaSuccess) {
        fail("an event: %s", cudaGetErrorString(error));
    }
    seen.push_back(function);
}

// "void gpu::product(Out*, const In*, ...) [with Out = float; In = __nv_bfloat16; size_t = ...]" ->
// product<float,__nv_bfloat16>
std::string readable(const char *function) {
    static const char *const products[] = {"HIDDEN", "ANSWER", "DHIDDEN", "DROWS"};
    std::string all = function, name = all.substr(0, all.find_first_of("(<")), given;
    name = name.substr(name.find_last_of(" :*&") + 1);
    size_t at = all.find(" [");
    // "[with int W = 64; In = gpu::Something]": what each = gives
    while (at != std::string::npos && at + 2 < all.size()) {
        size_t equals = all.find(" = ", at), end = all.find_first_of(";,]", at + 2);
        if (equals == std::string::npos || end == std::string::npos || equals > end) {
            break;
        }
        std::string key = all.substr(at, equals - at),
                    value = all.substr(equals + 3, end - equals - 3);
        value = value.substr(value.find_last_of(":") + 1);
        bool says_more = key.find("_t") == std::string::npos &&
                         key.find("floatX") == std::string::npos; // not only a name
        if (says_more && key.find("STAGES") == std::string::npos) {
            given += (given.empty() ? "" : ",") +
                     (name == "start_rows" ? products[atoi(value.c_str()) % 4] : value);
        }
        at = end;
    }
    return given.empty() ? name : name + "<" + given + ">";
}

#define ALL_CUBLAS "(cuBLAS, all product<> together)"

// What a function does in a step: operations, and bytes that it cannot but read or write, if it
// keeps in registers what it reads once. Functions that are not named do something in between, or
// little. The router is the lesson's, with its kernels for few experts (see has_fused_router); its
// operations are float32 without tensor cores.
typedef std::map<std::string, std::pair<double, double>> Work;

Work work_of_experts(const Config *c, double N) {
    double X = sizeof(floatX), C = c->dim, F = c->ffn, G = 1 + is_gated(c->activation),
           choices = N * c->topk;
    double one = 2 * choices * C * F * c->layers;   // operations of a product with W_out
    double column = c->layers * choices * X;        // bytes of a column of all rows
    double matrix = c->layers * c->experts * C * F; // numbers of all W_out
    Work work;
    work["start_rows<HIDDEN>"] = {G * one, column * (C + G * F + F) + X * G * matrix};
    work["start_rows<ANSWER>"] = {one, column * (F + C) + X * matrix};
    work["start_rows<DHIDDEN>"] = {one, column * (C + 2 * G * F + F) + X * matrix};
    work["start_rows<DROWS>"] = {G * one, column * (G * F + C) + X * G * matrix};
    work["start_weights"] = {(1 + G) * one, column * (2 * C + F + G * F) +
                                                8 * (1 + G) * matrix}; // float32: read, written
    return work;
}

Work work_of_functions(const Trainee *t) {
    const Config *c = &t->config;
    double X = sizeof(floatX), L = c->layers, C = c->dim, N = (double)c->batch * c->seq,
           K = c->topk, E = c->experts;
    double total, active, experts = 0, attention = 2 * N * c->seq * C * L, all = L * N * C,
                          router = 2 * N * E * C * L;
    double heads =
        (C + 2 * C / c->heads * c->kv_heads) / C; // q, k and v are so many times as wide as x
    double partials = (2 * L + 1) * N / BLOCK_ROWS * C;
    Work work = work_of_experts(c, N);
    for (const auto &product : work) {
        experts += product.second.first;
    }
    count_parameters(c, &total, &active);

    // All that has weights, but the experts and what the router's kernels do: 4 of its 6 operations
    // a weight and token.
    work[ALL_CUBLAS] = {6 * N * active - experts - 2 * router, 0};
    work["attention_forward_of"] = {attention, all * (heads + 1) * X}; // q, k, v; out
    work["attention_backward_of"] = {2 * attention,
                                     all * (2 * heads + 2) * X}; // q, k, v, out, dout; dq, dk, dv
    // The first norms: of the embedding, then of what a layer adds up to: x and the experts' rows,
    // whose sum is written.
    work["rmsnorm_forward"] = {0, N * C * (4 + X) + all * (8 + K * X + X)};
    work["start_router_forward"] = {router, all * (8 + 2 * X) + L * N * E * 4};
    work["start_router_backward"] = {router, all * (12 + K * X + X) + L * N * E * 8};
    work["rmsnorm_backward"] = {0, (all + N * C) * (16 + X) + 4 * partials};
    work["finish_gradients"] = {0, 4 * partials + L * E * C * 12};
    work["launch_place"] = {0, L * N * K * 16};
    work["cross_entropy"] = {0, N * c->vocab * (4 + X)};
    work["embedding_forward"] = {0, N * C * 8};
    work["embedding_backward"] = {0, N * C * 4 + t->model->word_count * C * 8};
    work["sum_of_squares"] = {0, total * 4};
    work["start_adamw"] = {0, total * (X < 4 ? 32 + X : 32)};
    return work;
}

struct Row { // of the table
    std::string name;
    double ms;
    int calls;
};

// The rows of the table, and their sum in ms, of one step. An event costs the device a microsecond
// or two, and the host as much again for each start: functions that take a few microseconds a call
// show more than they take. How much that is in all, the untraced step beside the sum says.
std::vector<Row> trace_step(Trainee *t, double *sum) {
    std::vector<Row> rows;
    Row blas = {ALL_CUBLAS, 0, 0};
    for (int twice = 0; twice < 2; twice++) { // the first time makes the events
        seen.clear();
        see("begin()");
        witness = see;
        train_step(t);
        witness = NULL;
    }
    CHECK(cudaStreamSynchronize(stream)); // for the events behind the losses
    *sum = 0;
    for (size_t k = 1; k < seen.size(); k++) {
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, seen_at[k - 1], seen_at[k]));
        std::string name = readable(seen[k]);
        auto row = std::find_if(rows.begin(), rows.end(),
                                [&](const Row &r) { return r.name == name; });
        if (row == rows.end()) {
            row = rows.insert(rows.end(), {name, 0, 0});
        }
        row->ms += ms;
        row->calls++;
        if (!name.compare(0, 8, "product<")) {
            blas.ms += ms;
            blas.calls++;
        }
        *sum += ms;
    }
    rows.push_back(blas);
    std::sort(rows.begin(), rows.end(), [](const Row &a, const Row &b) { return a.ms > b.ms; });
    return rows;
}

// The time of a function beside its bytes and operations. Returns 0, printing nothing, for one that
// is not named and takes little.
int print_row(const Row &r, const Work &work, double sum) {
    auto found = work.find(r.name);
    if (found == work.end()) {
        found = work.find(r.name.substr(0, r.name.find('<')));
    }
    if (found == work.end() && r.ms < 0.002 * sum) {
        return 0;
    }
    printf("  %-34s %5d %9.3f ms %5.1f%%", r.name.c_str(), r.calls, r.ms, 100 * r.ms / sum);
    if (found != work.end()) {
        double operations = found->second.first, bytes = found->second.second;
        if (bytes > 0) {
            printf(" %9.1f MB %6.0f GB/s", bytes / 1e6, bytes / r.ms / 1e6);
        } else {
            printf(" %24s", "");
        }
        if (operations > 0) {
            printf(" %9.1f GFLOP %6.1f TFLOP/s, %s", operations / 1e9, operations / r.ms / 1e9,
                   share(1e3 * operations / r.ms).c_str());
        }
    }
    printf("\n");
    return 1;
}

void bench_kernels(void) {
    for (int i = 0; i < MODELS; i++) {
        if (!wanted_model[i] || !fits(i)) {
            continue;
        }
        std::vector<double> untraced;
        double sum, others = 0;
        Trainee t = new_trainee(options_of(i), batch_for(options_of(i), FULL_STEP, 0.93), 0);
        train_steps(&t, 2, 5, &untraced);
        std::vector<Row> rows = trace_step(&t, &sum);
        Work work = work_of_functions(&t);
        printf("\nkernels of a step of %c, %d tokens: %.1f ms between events, %.1f untraced; "
               "calls: the CHECKs in it\n",
               models[i].letter, t.config.batch * t.config.seq, sum, 1e3 * median(untraced));
        for (const Row &r : rows) {
            others += print_row(r, work, sum) ? 0 : r.ms;
        }
        printf("  %-34s       %9.3f ms %5.1f%%\n", "others, each less than 0.2%", others,
               100 * others / sum);
        backend.release(t.model);
        fflush(stdout);
    }
}

// ---- experts

struct Sizes { // out (m,n) = a times b, k summed; a and b by rows of so many numbers, which are k's
               // by_weight
    int m, n, k, a_ld, b_ld, a_by_k, b_by_k;
};

// One of the experts' products for so many slots; of an expert, or of all as one: of `experts` side
// by side by_weight.
Sizes sizes_of(int what, int slots, int experts, int C, int F, int H) {
    const Sizes list[] = {{slots, H, C, C, C, 0, 0},
                          {slots, C, F, F, F, 0, 0},
                          {slots, F, C, C, F, 0, 1},
                          {slots, C, H, H, C, 0, 1},
                          {C, experts * F, slots / experts, C, experts * F, 1, 1},
                          {H, experts * C, slots / experts, H, experts * C, 1, 1}};
    return list[what];
}

#if defined(CUBLAS_VER_MAJOR) && CUBLAS_VER_MAJOR * 100 + CUBLAS_VER_MINOR >= 1205
#define GROUPED
// cuBLAS's grouped product: it must know the sizes on the host, reads rows that lie together, and
// writes floatX only.
struct Grouped {
    std::vector<cublasOperation_t> of_a, of_b;
    std::vector<int> m, n, k, lda, ldb, one;
    std::vector<float> alpha, beta;
    void **pointers;

    Grouped(int what, const std::vector<int> &offset, int C, int F, int H, floatX *a, floatX *b,
            floatX *out) {
        size_t E = offset.size() - 1, by_weight = what >= DOUT;
        std::vector<void *> p(3 * E);
        one.assign(E, 1);
        alpha.assign(E, 1);
        beta.assign(E, 0);
        for (size_t e = 0; e < E; e++) { // as product() asks for it: the transpose, b^T a^T
            Sizes s = sizes_of(what, offset[e + 1] - offset[e], 1, C, F, H);
            size_t first = (size_t)offset[e];
            of_a.push_back(s.b_by_k ? CUBLAS_OP_N : CUBLAS_OP_T);
            of_b.push_back(s.a_by_k ? CUBLAS_OP_T : CUBLAS_OP_N);
            m.push_back(s.n);
            n.push_back(s.m);
            k.push_back(s.k);
            lda.push_back(s.b_ld);
            ldb.push_back(s.a_ld);
            p[e] = b + (by_weight ? first * s.b_ld : e * s.n * s.k);
            p[E + e] = a + first * s.a_ld;
            p[2 * E + e] = out + (by_weight ? e * s.m * s.n : first * s.n);
        }
        pointers = room_for<void *>(3 * E);
        CHECK(cudaMemcpyAsync(pointers, p.data(), 3 * E * sizeof(void *), cudaMemcpyHostToDevice,
                              stream));
        CHECK(cudaStreamSynchronize(stream));
    }
    bool run() { // false where cuBLAS does not do it
        const cudaDataType type = type_of((const floatX *)NULL);
        int E = (int)m.size();
        return cublasGemmGroupedBatchedEx(cublas, of_a.data(), of_b.data(), m.data(), n.data(),
                                          k.data(), alpha.data(), pointers, type, lda.data(),
                                          pointers + E, type, ldb.data(), beta.data(),
                                          pointers + 2 * E, type, m.data(), E, one.data(),
                                          CUBLAS_COMPUTE_32F) == CUBLAS_STATUS_SUCCESS;
    }
};
#endif

// Gives a layer a plan in which each expert has its share of all N*K choices: the same one, or
// falling with the expert's number as 1/sqrt(1+e): of 8 the busiest has 1.8 times the mean then, of
// 64 4.4 times, which training shows, too. A token's choices lie as anywhere. Returns the offsets.
std::vector<int> set_loads(Model *m, int N, int E, int K, int uneven) {
    const Route *r = &m->acts.layer[0].route;
    std::vector<int> offset(1), token((size_t)N * K), choice((size_t)N * K);
    std::vector<int2> tile;
    double sum = 0, so_far = 0;
    for (int e = 0; e < E; e++) {
        sum += uneven ? 1 / sqrt(1.0 + e) : 1;
    }
    for (int e = 0; e < E; e++) {
        so_far += (uneven ? 1 / sqrt(1.0 + e) : 1) / sum;
        offset.push_back(e == E - 1 ? N * K : (int)(so_far * N * K));
        for (int i = offset[e], n = offset[e + 1] - offset[e]; i < offset[e + 1]; i++) {
            token[i] = (int)((double)(i - offset[e]) * N / n);
            choice[i] = i;
        }
        for (int i = offset[e]; i < offset[e + 1]; i += TM) {
            tile.push_back(make_int2(e, i));
        }
    }
    tile.resize(m->layers[0].tiles, make_int2(-1, 0)); // as many as there can be; -1: there is none
    copy_ints(r->offset, offset.data(), offset.size(), cudaMemcpyHostToDevice);
    copy_ints(r->token, token.data(), token.size(), cudaMemcpyHostToDevice);
    copy_ints(r->choice, choice.data(), choice.size(), cudaMemcpyHostToDevice);
    CHECK(cudaMemcpyAsync(m->layers[0].tile, tile.data(), tile.size() * sizeof(int2),
                          cudaMemcpyHostToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
    return offset;
}

// What the experts' products of one layer work on, and what they are compared with.
struct Layer {
    int N, E, K, C, F, H, slots;
    Model *m;
    Experts experts;
    std::vector<int> offset;
    floatX *a, *b; // of the products that are compared with them
    float *out;
};

// Times one of the experts' products, or the launch that has DOUT and DIN, against one product of
// cuBLAS, and against its grouped one.
void bench_product(Layer *l, const char *name, int what, const std::function<void()> &mine) {
    std::vector<int> parts = {what};
    if (what == DOUT) {
        parts.push_back(DIN);
    }
    double work = 0;
    for (int part : parts) {
        Sizes z = sizes_of(part, l->slots, l->E, l->C, l->F, l->H);
        work += 2.0 * z.m * z.n * z.k;
    }
    auto dense = [=] {
        for (int part : parts) {
            Sizes z = sizes_of(part, l->slots, l->E, l->C, l->F, l->H);
            if (part >= DOUT) {
                product(l->out, l->a, z.a_by_k, l->b, z.b_by_k, z.m, z.n, z.k, ADD);
            } else {
                product((floatX *)l->out, l->a, z.a_by_k, l->b, z.b_by_k, z.m, z.n, z.k, SET);
            }
        }
    };
    std::vector<Thing> things = {{mine, work, {}}, {dense, work, {}}};
#ifdef GROUPED
    std::vector<Grouped> grouped;
    for (int part : parts) {
        grouped.push_back(
            Grouped(part, l->offset, l->C, l->F, l->H, l->a, l->b, (floatX *)l->out));
    }
    auto all_grouped = [&] {
        for (Grouped &part : grouped) {
            part.run();
        }
    };
    if (grouped[0].run()) {
        things.push_back({all_grouped, work, {}});
    }
#endif
    take_turns(things);
    double ours = median(things[0].rate), whole = median(things[1].rate);
    printf("    %-8s %7.1f TFLOP/s %s; %5.1f%% of one product's %7.1f", name, ours / 1e12,
           share(ours).c_str(), 100 * ours / whole, whole / 1e12);
    if (things.size() > 2) {
        double rate = median(things[2].rate);
        printf("; %.2f times as fast as grouped, %.1f", ours / rate, rate / 1e12);
    }
    printf("\n");
#ifdef GROUPED
    for (Grouped &part : grouped) {
        release({part.pointers});
    }
#endif
}

// All products of a layer: what experts_forward() and experts_backward() start.
void bench_layer(Layer *l) {
    Model *m = l->m;
    const LayerActs *s = &m->layers[0];
    const LayerParams *w = &m->params.layer[0], *dw = &m->grads.layer[0];
    const Experts *x = &l->experts;
    RowsJob hidden = {}, answer = {}, dhidden = {}, drows = {};
    hidden.a = s->h2;
    hidden.b = low_of(m, w->w_in);
    hidden.out = s->hidden;
    hidden.act = m->act;
    answer.a = m->act;
    answer.b = low_of(m, w->w_out);
    answer.out = m->rows;
    answer.weight = m->acts.layer[0].route.weight;
    dhidden.a = m->dx_low;
    dhidden.b = answer.b;
    dhidden.hidden = s->hidden;
    dhidden.out = m->dhidden;
    dhidden.act = m->act;
    dhidden.weight = answer.weight;
    dhidden.part = m->dweight_part;
    dhidden.slots = (size_t)l->slots;
    drows.a = m->dhidden;
    drows.b = hidden.b;
    drows.out = m->rows;
    WeightsJob weights = {m->dx_low, m->act, m->dhidden, s->h2, dw->w_out, dw->w_in, 0, 0, 0};
    bench_product(l, "HIDDEN", HIDDEN, [=] { rows_product<HIDDEN>(x, hidden); });
    bench_product(l, "ANSWER", ANSWER, [=] { rows_product<ANSWER>(x, answer); });
    bench_product(l, "DHIDDEN", DHIDDEN, [=] { rows_product<DHIDDEN>(x, dhidden); });
    bench_product(l, "DROWS", DROWS, [=] { rows_product<DROWS>(x, drows); });
    bench_product(l, "DOUT,DIN", DOUT, [=] { weights_product(x, weights); });
    fflush(stdout);
}

void bench_experts(void) {
    const int list[2][2][5] = {{{16384, 8, 2, 1024, 2048}, {16384, 64, 8, 1024, 512}},
                               {{32, 8, 2, 32, 32}, {32, 64, 8, 32, 16}}}; // N, E, K, C, F
    printf("\nexperts: beside one product of cuBLAS of the same operations (goal: 55%% of it with "
           "mma, 70%% with wgmma), and\n"
           "beside its grouped product, which is told all sizes by the host; both read rows that "
           "lie together already\n");
    for (int i = 0; i < 2; i++) {
        const int *of = list[quick][i];
        Layer l = {};
        l.N = of[0];
        l.E = of[1];
        l.K = of[2];
        l.C = of[3];
        l.F = of[4];
        l.H = 2 * l.F;
        l.slots = l.N * l.K;
        char options[256];
        snprintf(options, sizeof(options),
                 "--layers 1 --dim %d --heads %d --experts %d --topk %d --ffn %d --seq %d", l.C,
                 div_up(l.C, 64), l.E, l.K, l.F, l.N / 16);
        Trainee t = new_trainee(options, 16, 0);
        train_step(&t); // all arrays have something in them now
        l.m = t.model;
        size_t room = std::max((size_t)l.slots * max_int(l.H, l.C), (size_t)l.E * l.H * l.C);
        l.a = random_low(room);
        l.b = random_low(room);
        l.out = room_for<float>(room);
        random_floats(l.out, room, 0, 1);
        for (int uneven = 0; uneven < 2; uneven++) {
            l.offset = set_loads(l.m, l.N, l.E, l.K, uneven);
            l.experts = experts_of(l.m, 0);
            printf("  %d experts of width %d, top %d, %d tokens of width %d; the busiest has %.1f "
                   "times the mean\n",
                   l.E, l.F, l.K, l.N, l.C, (double)l.offset[1] * l.E / l.slots);
            bench_layer(&l);
        }
        release({l.a, l.b, l.out});
        backend.release(l.m);
    }
}

// ---- attention

void bench_attention(void) {
    printf("\nattention: half of all pairs counted, backward as twice forward\n");
    for (int i = 0; i < 4; i++) {
        int T = (i < 2 ? 1024 : 4096) / (quick ? 64 : 1), D = (i % 2 ? 128 : 64) / (quick ? 4 : 1),
            N = quick ? 64 : 16384;
        int C = quick ? 32 : 1024, H = C / D, B = N / T;
        double work = 2.0 * N * T * C;
        floatX *qkv = random_low((size_t)N * 3 * C), *dqkv = random_low((size_t)N * 3 * C),
               *out = random_low((size_t)N * C);
        floatX *dout = random_low((size_t)N * C);
        std::vector<float> turns((size_t)T * D);
        float *angles = room_for<float>(turns.size());
        rope_angles(turns.data(), 0, T, D, 10000);
        CHECK(cudaMemcpyAsync(angles, turns.data(), turns.size() * sizeof(float),
                              cudaMemcpyHostToDevice, stream));
        float *lse = room_for<float>((size_t)N * H), *delta = room_for<float>((size_t)N * H);
        std::vector<Thing> t = {
            {[=] { gpu::attention_forward(out, lse, qkv, angles, B, T, H, H, D); }, work, {}},
            {[=] {
                 gpu::attention_backward(dqkv, dout, out, lse, qkv, angles, B, T, H, H, D, delta);
             },
             2 * work,
             {}}};
        take_turns(t);
        double forward = median(t[0].rate), backward = median(t[1].rate);
        printf("  %2d sequences x %4d tokens x %2d heads x %3d wide: forward %6.1f TFLOP/s, %s; "
               "backward %6.1f, "
               "%s\n",
               B, T, H, D, forward / 1e12, share(forward).c_str(), backward / 1e12,
               share(backward).c_str());
        fflush(stdout);
        release({qkv, dqkv, out, dout, angles, lse, delta});
    }
}

// ---- generation

void bench_generation(void) {
    double reading, copying;
    measure_memory(&reading, &copying);
    printf("\ngeneration at batch 1, beside the time to read the active weights once at %.0f GB/s; "
           "keys and values not counted\n",
           reading / 1e9);
    for (int i = 0; i < MODELS; i++) {
        if (!wanted_model[i]) {
            continue;
        }
        Config c = read_config("mixtral", options_of(i), 1);
        Model *m = random_model(&c, 1, 0);
        std::vector<real> logits((size_t)c.vocab);
        std::vector<double> times;
        double total, active;
        count_parameters(&c, &total, &active);
        for (int n = 0; n < (quick ? 3 : 150);
             n++) { // the host's time: it has the logits in the end
            double start = seconds();
            backend.generate(m, (int)(hash64((uint64_t)n) % (uint64_t)c.vocab), n, logits.data());
            if (n >= (quick ? 1 : 50)) {
                times.push_back(seconds() - start);
            }
        }
        double bound = active * sizeof(floatX) / reading;
        printf(
            "  %c: %7.0f tokens/s; %.3f ms a token, of which reading %.1f MB takes %.3f, %.0f%%\n",
            models[i].letter, 1 / median(times), 1e3 * median(times), active * sizeof(floatX) / 1e6,
            1e3 * bound, 100 * bound / median(times));
        fflush(stdout);
        backend.release(m);
    }
}

#ifdef CUDACPU
#define WHERE "--cpu --eager"
#else
#define WHERE ""
#endif

// ---- PyTorch, which takes steps whenever a line reaches it and answers with their milliseconds
// and the loss

void bench_torch(void) {
    printf("\nPyTorch, our steps and its by turns (goal: 1.5 times as fast)\n");
    for (int i = 0; i < MODELS; i++) {
        if (!wanted_model[i] || !fits(i)) {
            continue;
        }
        // Both are on the device at once, and PyTorch keeps about twice as much.
        int batch = batch_for(options_of(i), FULL_STEP / 4, 0.36), ends[2];
        double total, active, loss = 0, ms = 0;
        char command[1024], name[256] = "";
        const char *python = getenv("TORCH_PYTHON");
        Trainee t = new_trainee(options_of(i), batch, 0);
        std::vector<double> ours, theirs, ratio;
        count_parameters(&t.config, &total, &active);
        if (pipe(ends) != 0) {
            fail("no pipe: %s", strerror(errno));
        }
        fcntl(ends[1], F_SETFD, FD_CLOEXEC);
        // PyTorch gets a vocabulary that is a multiple of 128, as its careful users do.
        snprintf(command, sizeof(command),
                 "%s dev/bench/torch_step_cu.py %s --batch %d --vocab %d --turns " WHERE
                 " < /dev/fd/%d",
                 python ? python : "python3", options_of(i), batch,
                 div_up(t.config.vocab, 128) * 128, ends[0]);
        printf("  %c: %s --batch %d\n", models[i].letter, options_of(i), batch);
        fflush(stdout);
        train_steps(&t, 2, 1, &ours);
        ours.clear();
        FILE *answers = popen(command, "r");
        close(ends[0]);
        int ready = 0;
        while (answers && !ready &&
               fgets(name, sizeof(name), answers)) { // whatever else it may say first
            ready = !strncmp(name, "ready: ", 7);
        }
        for (int round = 0; ready && round < (quick ? 1 : 5); round++) {
            std::vector<double> turn;
            train_steps(&t, 1, 3, &turn);
            ours.push_back(median(turn));
            ready = write(ends[1], "\n", 1) == 1 && fscanf(answers, "%lf %lf", &ms, &loss) == 2;
            theirs.push_back(1e-3 * ms);
            ratio.push_back(theirs.back() / ours.back());
        }
        close(ends[1]);
        int status = answers ? pclose(answers) : 1;
        if (ready) {
            printf("     ours    %8.1f ms %9.0f tokens/s; loss %.3f, %.0f parameters\n",
                   1e3 * median(ours), batch * t.config.seq / median(ours), t.loss, total);
            printf("     PyTorch %8.1f ms %9.0f tokens/s; loss %.3f, %s     ours is %.2f times as "
                   "fast\n",
                   1e3 * median(theirs), batch * t.config.seq / median(theirs), loss, name + 7,
                   median(ratio));
        } else {
            printf("     no answer (status %d): %s\n", status, name);
        }
        backend.release(t.model);
        fflush(stdout);
    }
}

const struct Part {
    const char *name;
    void (*call)(void);
} parts[] = {{"peak", bench_peak},           {"steps", bench_steps},
             {"kernels", bench_kernels},     {"experts", bench_experts},
             {"attention", bench_attention}, {"generate", bench_generation},
             {"torch", bench_torch}};
enum { PARTS = sizeof(parts) / sizeof(parts[0]) };

int bench(int argc, char **argv) {
    int wanted[PARTS] = {0}, any = 0, any_model = 0;
    for (int i = 1; i < argc; i++) {
        int known = !strcmp(argv[i], "--quick");
        quick |= known;
        if (!strcmp(argv[i], "--batch") && i + 1 < argc) {
            known = (asked_batch = atoi(argv[++i])) > 0;
        }
        for (int k = 0; k < PARTS; k++) {
            known |= !strcmp(argv[i], parts[k].name) && (wanted[k] = any = 1);
        }
        for (int k = 0; k < MODELS; k++) {
            known |=
                argv[i][0] == models[k].letter && !argv[i][1] && (wanted_model[k] = any_model = 1);
        }
        if (!known) {
            fail("%s is none of --quick, --batch N, peak, steps, kernels, experts, attention, "
                 "generate, torch, A to E",
                 argv[i]);
        }
    }
    for (int k = 0; k < MODELS; k++) {
        wanted_model[k] |= !any_model;
    }
    char name[128];
    time_t now = time(NULL);
    double start = seconds();
    signal(SIGPIPE, SIG_IGN);
    start_device();
    backend.device(name);
    for (int i = 0; i < argc; i++) {
        printf("%s ", argv[i]);
    }
    printf("\n%s, %.1f GiB; %s", name, backend.memory() / (1 << 30), ctime(&now));
    print_clocks();
    peak = measure_peak();
    sheet = backend.sheet_peak();
    print_peak("before");
    for (int k = 0; k < PARTS; k++) {
        if (wanted[k] || !any) {
            parts[k].call();
        }
    }
    printf("\nall this took %.0f s\n", seconds() - start);
    peak = measure_peak();
    print_peak("after");
    print_clocks();
    return 0;
}

} // namespace gpu

int main(int argc, char **argv) {
    program_name = "bench_cu";
    return gpu::bench(argc, argv);
}
