// The device: its start, what it cannot do, and whether a model fits into its memory.
// Gives: start_device, device_refuses, check_memory. Needs: new_model of train_moe.cu, which includes it.
#ifndef CUDA_DEVICE_CUH
#define CUDA_DEVICE_CUH

// Bytes of the device that a model takes, with what generation needs. Stops where the host has too little for --offload.
double bytes_of(const Config *c, int N, int train) {
    Model *m = new_model(c, N, train, NULL, 1);
    m->one = new_model(c, 1, 0, m, 1);
    check_host_memory(m, train);
    double sum = 0;
    for (int i = 0; i < MEMORY_KINDS; i++) {
        sum += (double)m->bytes[i] + (double)m->one->bytes[i];
    }
    gpu::model_free(m);
    return sum;
}

// Stops where the model does not fit, and says what would. Something is left for what comes later: cuBLAS's own memory,
// the kernels' code, measured_peak(), what the driver rounds up.
void check_memory(const Config *c, int N, int train) {
    size_t left, total;
    CHECK(cudaMemGetInfo(&left, &total));
    double need = bytes_of(c, N, train), mib = 1048576;
    left -= left / 32 < (size_t)512 << 20 ? left / 32 : (size_t)512 << 20;
    if (MANY) { // NCCL takes its buffers when it first sends to another process
        left -= left / 16 < (size_t)2 << 30 ? left / 16 : (size_t)2 << 30;
    }
    if (need <= (double)left) {
        return;
    }
    Config smaller = *c;
    char hint[160] = "no batch of this model does: it needs a smaller model or a larger device";
    for (int recompute = c->recompute, found = 0; train && recompute <= 1 && !found; recompute++) {
        smaller.recompute = recompute;
        for (int batch = N / c->seq; batch >= 1 && !found; batch = batch == 1 ? 0 : div_up(batch, 2)) {
            found = bytes_of(&smaller, batch * c->seq, train) <= (double)left;
            if (found) {
                int accum = c->accum * div_up(N / c->seq, batch);
                snprintf(hint, sizeof(hint), "--batch %d%s would fit (and --accum %d makes a step of %d sequences)",
                         batch, recompute > c->recompute ? " --recompute" : "", accum, accum * batch);
            }
        }
    }
    fail("out of memory on the device: the model needs %.0f MiB, %.0f of %.0f are free; %s", need / mib,
         (double)left / mib, (double)total / mib, hint);
}

// Why a GPU cannot do what the options ask for; NULL: it can. Its kernels read eight numbers at a time.
const char *device_refuses(const Config *c) {
    int head = head_width(c);
    for (int e = 0; e < c->experts && moe_layers(c) > 0; e++) {
        if (expert_width(c, e) % 8) {
            return "--ffn must be such that each expert's width is a multiple of 8 on a GPU";
        }
    }
    if (c->ffn % 8 || c->dim / c->subtokens % 8) {
        return "--dim and --ffn must be multiples of 8 on a GPU (with --subtokens, --dim of 8 times that)";
    }
    if (c->shared_ffn % 8 || c->dense_ffn % 8) {
        return "--shared-ffn and --dense-ffn must be multiples of 8 on a GPU";
    }
    if (mixer_kernels(c) && mixer_kernels(c)->refuses(c)) {
        return mixer_kernels(c)->refuses(c);
    }
    if (!mixer_of(c) && (head % 8 || head > 256)) {
        return "--heads: the width of a head, --dim / --heads or --head-width, must be a multiple of 8 and at most 256 on a GPU";
    }
    if (c->offload_cold || c->given[find_option("offload-dir")]) {
        return "--offload-dir and --offload-cold are for a file; with a GPU the experts are in the host's memory: leave them out";
    }
    if (c->recurrent % 4) {
        return "--recurrent must be a multiple of 4 on a GPU";
    }
    return NULL;
}

// The device's stream and cuBLAS, once.
void start_device(void) {
    int count = 0;
    if (stream) {
        return;
    }
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        fail("no NVIDIA GPU, or no driver for it: %s",
             error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    }
    start_network(count);
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
    for (int i = 0; i < 4; i++) {
        CHECK(cudaEventCreateWithFlags(&paces[i], cudaEventDisableTiming));
    }
    CHECK(cublasCreate(&cublas));
    CHECK(cublasSetStream(cublas, stream));
    CHECK(cublasSetMathMode(cublas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // sums are float32
}

#endif
