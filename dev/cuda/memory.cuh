// Memory of the device: what lives as long as a model, scratch memory for one layer, and buffers that grow.
// Gives: own, own_floats, own_low, own_host, own_by_group, need_scratch, scratch, upload, copy_ints, download, Buffer, lay_pieces.
// Needs: gpu::Model of train_moe.cu, which includes it.
//
// A model takes one piece of memory from the driver, which gives it in pieces of 2 MiB. A first model is made `dry`: it
// only counts what it would need, so that the second one knows how much to ask for, and the user hears at the start
// what would fit.
#ifndef CUDA_MEMORY_CUH
#define CUDA_MEMORY_CUH

// Memory, not zeroed, that lives as long as the model, booked under m->purpose. While m->dry the pointer leads nowhere.
void *own(Model *m, size_t count, size_t size) {
    size_t bytes = (count * size + 255) / 256 * 256;
    char *at = m->arena + m->arena_used;
    m->bytes[m->purpose] += bytes;
    m->arena_used += bytes;
    return at;
}

float *own_floats(Model *m, size_t count) {
    return (float *)own(m, count, sizeof(float));
}

floatX *own_low(Model *m, size_t count) {
    return (floatX *)own(m, count, sizeof(floatX));
}

int *own_ints(Model *m, size_t count) {
    return (int *)own(m, count, sizeof(int));
}

// Zeroed memory of the host.
void *own_host(Model *m, size_t count, size_t size) {
    if (m->owned_count % 64 == 0) {
        m->owned = (void **)reallocate(m->owned, (size_t)m->owned_count + 64, sizeof(void *));
    }
    return m->owned[m->owned_count++] = allocate(count, size);
}

// Groups of tokens in training: what tables of them have memory for.
int most_groups(const Model *m) {
    const Config *c = &m->config;
    return c->group == SEQUENCE ? div_up(m->max_tokens, c->seq) : 1;
}

// `each` numbers for every group of tokens, of which there may be most_groups().
double *own_by_group(Model *m, int n, int each) {
    (void)n;
    return (double *)own(m, (size_t)most_groups(m) * each, sizeof(double));
}

// ---- scratch memory of the part of a layer that works now

// Called while memory is laid out: `bytes` more may be taken between two calls of scratch_reset().
void need_scratch(Model *m, size_t bytes) {
    m->scratch_size += (bytes + 255) / 256 * 256;
}

void scratch_reset(Model *m) {
    m->scratch_used = 0;
}

void *scratch_bytes(Model *m, size_t bytes) {
    char *at = m->scratch_memory + m->scratch_used;
    m->scratch_used += (bytes + 255) / 256 * 256;
    if (m->scratch_used > m->scratch_size) {
        fail("internal error: a layer takes %zu bytes of scratch memory, of %zu", m->scratch_used, m->scratch_size);
    }
    return at;
}

float *scratch(Model *m, size_t count) {
    return (float *)scratch_bytes(m, count * sizeof(float));
}

// Bytes of a moment, and where number i of MOMENT1 or MOMENT2 is. m->memory says float, but with --moments bf16 they are
// bfloat16.
size_t moment_size(const Model *m) {
    return m->config.moments == MOMENTS_BF16 ? sizeof(__nv_bfloat16) : sizeof(float);
}

void *moment_at(const ::Model *m, int what, size_t i) {
    return (char *)m->memory[what] + i * moment_size((const Model *)m);
}

// ---- copies to the device

void upload(Model *m, void *to, const void *from, size_t bytes) { // waits; not for use in a step
    if (m->dry) {
        return;
    }
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
}

void copy_ints(int *to, const int *from, size_t n, cudaMemcpyKind kind) {
    CHECK(cudaMemcpyAsync(to, from, n * sizeof(int), kind, stream));
}

// Copies to the host once the device has done all. A copy to memory that is not pinned waits in the driver, where no
// watch is kept; so what comes before it is waited for here.
void download(void *to, const void *from, size_t bytes) {
    await_device();
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
    await_device();
}

// ---- memory that grows with what arrives from other processes

struct Buffer {
    void *memory;
    size_t bytes;
};

struct Piece {
    void *to; // the pointer that shall lead to it
    size_t bytes;
};

// Lays pieces one after another into the buffer. If it has to grow, what was in it is lost.
void lay_pieces(Buffer *b, std::initializer_list<Piece> list) {
    size_t bytes = 0, at = 0;
    for (const Piece &p : list) {
        bytes += (p.bytes + 255) / 256 * 256;
    }
    if (bytes > b->bytes) {
        await_device();
        await(network);
        CHECK(cudaFree(b->memory));
        b->memory = NULL;
        b->bytes = bytes / 4 * 5;
        cudaError_t error = cudaMalloc(&b->memory, b->bytes);
        if (error == cudaErrorMemoryAllocation) {
            fail("out of memory on the device: %.0f MiB for what other processes send to the experts here; a smaller "
                 "--batch, "
                 "or another --recipe that keeps the load even, needs less",
                 (double)b->bytes / 1048576);
        }
        CHECK(error);
    }
    for (const Piece &p : list) {
        *(void **)p.to = (char *)b->memory + at;
        at += (p.bytes + 255) / 256 * 256;
    }
}

#endif
