// Tables of which a token looks up one row, on the GPU: which rows has a step read? See dev/tables.h and dev/ranks/tables.h.
// Gives: Tables, allocate_lookup, allocate_row_staging, free_row_staging, add_kernel, sort_by_row, note_read_rows, send_read_rows,
// add_squares_of_read_rows, sum_tables.
// Needs: dev/cuda/memory.cuh, nccl.cuh; gpu::Model of train_moe.cu, which includes it.
//
// The host has the tokens, so it keeps the lists. When a step's gradients are complete, they go to the device, and the
// kernels of norm and AdamW visit the rows that are on them.
#ifndef CUDA_TABLES_CUH
#define CUDA_TABLES_CUH

// What the host keeps besides Lookup, and where the lists are on the device.
struct Tables {
    ReadRows batch[TABLE_KINDS]; // rows of the batch at hand, of the host
    int *list[TABLE_KINDS];      // (rows) on the device: what is on Lookup.read
    int *staging;                // all lists on their way to the device, until the event `sent`
    cudaEvent_t sent;
    Buffer packed;               // several processes: gradients of the rows
    float *taken;                // with --ngram-gate, (N,C): the residual stream and what a layer takes
    float *slopes, *part;        // (3,N); (2,chunks,C): its way back, see dev/cuda/ngrams.cuh
};

const int TAKE_CHUNK = 128; // tokens whose gradients by key and value one block adds up

// As in the C twin. The lists are the host's; with --ngram-gate the vectors of the tokens are the device's.
void allocate_lookup(Model *m, int N, int train) {
    const Config *c = &m->config;
    const int rows[TABLE_KINDS] = {0, c->vocab, c->ngrams}; // the embedding's rows are sorted by word, too
    Lookup *lookup = m->lookup = (Lookup *)own_host(m, 1, sizeof(Lookup));
    Tables *t = m->tables_there = (Tables *)own_host(m, 1, sizeof(Tables));
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        int is_table = kind == BY_NGRAM || c->value_embedding;
        ReadRows *lists[] = {&t->batch[kind], &lookup->read[kind]};
        for (int i = 0; i < (train && is_table ? 2 : 1); i++) {
            lists[i]->rows = rows[kind];
            lists[i]->list = (int *)own_host(m, (size_t)2 * rows[kind], sizeof(int));
            lists[i]->place = lists[i]->list + rows[kind];
        }
        t->list[kind] = own_ints(m, lookup->read[kind].rows);
    }
    size_t NC = c->ngram_gate ? (size_t)N * c->dim : 0;
    lookup->sum = own_floats(m, NC);
    t->taken = own_floats(m, NC);
    if (train && c->ngram_gate) {
        lookup->dsum = own_floats(m, NC);
        t->slopes = own_floats(m, (size_t)3 * N);
        t->part = own_floats(m, (size_t)2 * div_up(N, TAKE_CHUNK) * c->dim);
    }
}

// Of a model that trains: memory of the host from which lists go to the device. (Lookup.row lies in the batch's staging.)
void allocate_row_staging(Model *m) {
    size_t rows = 0;
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        rows += m->lookup->read[kind].rows;
    }
    if (rows > 0) {
        CHECK(cudaMallocHost((void **)&m->tables_there->staging, rows * sizeof(int)));
        CHECK(cudaEventCreateWithFlags(&m->tables_there->sent, cudaEventDisableTiming));
    }
}

void free_row_staging(Model *m) {
    Tables *t = m->tables_there;
    if (t && t->staging) {
        CHECK(cudaFreeHost(t->staging));
        CHECK(cudaEventDestroy(t->sent));
    }
    if (t) {
        CHECK(cudaFree(t->packed.memory));
    }
}

__global__ void add_kernel(float *to, const float *from, size_t size) {
    size_t i = thread_of_grid();
    if (i < size) {
        to[i] += from[i];
    }
}

// ---- the rows of a batch

// Sorts tokens by the row (n) of a table that each of them looks up, for embedding_backward: order, rows and offset, one
// list behind the other from `lists` on, `most` apart. Returns how many rows there are. Number i of row is that of token
// i % N: with triples there are two for each token. `batch` has memory for the table's rows, and is empty.
int sort_by_row(int *lists, int most, const int *row, int n, int N, ReadRows *batch) {
    int *order = lists, *rows = order + most, *offset = rows + most, *key = rows;
    note_rows(batch, row, n);
    for (int i = 0; i < n; i++) {
        key[i] = batch->place[row[i]] - 1;
    }
    int count = batch->count;
    ::counting_sort(order, offset, key, n, count);
    for (int i = 0; i < n; i++) {
        order[i] %= N;
    }
    memcpy(rows, batch->list, (size_t)count * sizeof(int));
    forget_rows(batch);
    return count;
}

// ---- the rows of a step

// A batch's gradients will be there: puts its rows onto the list.
void note_read_rows(Model *m, int kind, const int *row, int n) {
    if (m->lookup->read[kind].rows) {
        note_rows(&m->lookup->read[kind], row, n);
    }
}

// All lists to the device, before the update; and the host begins new ones.
void send_read_rows(Model *m) {
    Tables *t = m->tables_there;
    int *from = t->staging;
    if (!from) {
        return;
    }
    await(t->sent);
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        const ReadRows *r = &m->lookup->read[kind];
        if (r->count > 0) { // a model may have no table of this kind, and so no list
            memcpy(from, r->list, (size_t)r->count * sizeof(int));
            copy_ints(t->list[kind], from, (size_t)r->count, cudaMemcpyHostToDevice);
        }
        from += r->rows;
    }
    CHECK(cudaEventRecord(t->sent, stream));
}

// part[block] = the sum of the squares of rows list[block], list[block + blocks], ... of g, by a warp each of THREADS / 32.
__global__ void squares_of_rows_kernel(double *part, const float *g, const int *list, int count, int C) {
    double sum = 0;
    float a[4];
    for (size_t i = row_of_warp(); i < (size_t)count; i += (size_t)gridDim.x * (THREADS / 32)) {
        const float *row = g + (size_t)list[i] * C;
        for (int c = 4 * (threadIdx.x % 32); c < C; c += 128) {
            load_pack(a, row + c);
            for (int j = 0; j < 4; j++) {
                sum += (double)a[j] * (double)a[j];
            }
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = sum;
    }
}

// *sum += that of the squares of all tables' gradients. part (NORM_PARTS) is scratch.
void add_squares_of_read_rows(Model *m, double *sum, double *part) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        int count = t->looked_up ? rows_of_table(m, t)->count : 0;
        if (count > 0) {
            int parts = min_int(row_blocks((size_t)count), NORM_PARTS);
            squares_of_rows_kernel<<<parts, THREADS, 0, stream>>>(part, m->memory[GRADS] + t->offset,
                                                                  m->tables_there->list[t->looked_up], count, t->shape[2]);
            CHECK(cudaGetLastError());
            add_sum(sum, Doubles{part}, (size_t)parts, 1);
        }
    }
}

// ---- several processes

// packed (count,C) = the rows list[0] .. list[count-1] of g, or with `back` the other way round.
__global__ void pack_rows_kernel(float *packed, float *g, const int *list, size_t size, int C, int back) {
    size_t i = 4 * thread_of_grid();
    float a[4];
    if (i < size) {
        float *row = g + (size_t)list[i / C] * C + i % C;
        load_pack(a, back ? packed + i : row);
        store_pack(back ? row : packed + i, a);
    }
}

void pack_read_rows(Model *m, float *packed, int back) {
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        size_t size = t->looked_up ? (size_t)rows_of_table(m, t)->count * (size_t)t->shape[2] : 0;
        if (size > 0) {
            pack_rows_kernel<<<blocks(size, 4 * THREADS), THREADS, 0, stream>>>(
                packed, m->memory[GRADS] + t->offset, m->tables_there->list[t->looked_up], size, t->shape[2], back);
            CHECK(cudaGetLastError());
            packed += size;
        }
    }
}

// As ranks_sum_tables of the C twin.
void sum_tables(Model *m) {
    float *packed;
    for (int kind = BY_WORD; kind < TABLE_KINDS; kind++) {
        if (m->lookup->read[kind].rows) {
            unite_rows(&m->lookup->read[kind]);
        }
    }
    send_read_rows(m);
    size_t numbers = count_read_numbers(m);
    if (numbers == 0) {
        return;
    }
    lay_pieces(&m->tables_there->packed, {{&packed, numbers * sizeof(float)}});
    pack_read_rows(m, packed, 0);
    ranks.traffic.reduced += 2.0 * (ranks.size - 1) / ranks.size * (double)(numbers * sizeof(float)); // what a ring sends
    follow(network, stream);
    nccl_sum(packed, numbers, OF_ALL);
    wait_for_network();
    pack_read_rows(m, packed, 1);
}

#endif
