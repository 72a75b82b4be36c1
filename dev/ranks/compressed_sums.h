// Several processes: sums of gradients that are sent in fewer bits (--compress).
// Gives: start_compressed_sum, await_compressed_sums; for checkpoints copy_lost; for the CUDA twin Parcel, lay_parcel.
// Needs: comm.h, experts.h, compress.h; Model of train_moe.c.
//
// The gradients of a message are divided into as many parts as there are processes; each process owns one. It sends its
// gradients of each part to the owner, encoded; the owner adds them to its own, which are not rounded, and sends the sum to
// all, encoded again. All decode the same bytes, the owner too, so all have the same sum, bit for bit. What either code
// did not say is kept for the next step, in one array as long as the gradients: by the sender of a part what it has not
// sent, by the owner what it has not passed on (Tang et al. 2019, DoubleSqueeze). The owner adds in the order of the ranks,
// so every run has the same bits.
//
// The first sending is under way while backward still runs. The second begins when the sums are waited for.
#ifndef RANKS_COMPRESSED_SUMS_H
#define RANKS_COMPRESSED_SUMS_H

typedef struct Parcel { // one message under way
    size_t from, n;     // of the gradients
    size_t each;        // numbers of a part; the last parts may be shorter, or empty
    int peers, sharing; // as in start_sum(); the processes that share it
    int mine;           // which of them this one is, and its part
    int *bytes, *at;    // (sharing) of each part's code: how long it is, and where it begins in `code`
    int *sent;          // (sharing) the same lengths, but for 0 instead of its own
    int *got, *got_at;  // (sharing) what comes from each process of this one's part
    size_t all, coming; // bytes of the two arrays that follow
    unsigned char *code, *came;
    Request request;
} Parcel;

Parcel *parcels = NULL; // under way
int parcel_count = 0;

void (*copy_lost_of_gpu)(real *to, const real *from, size_t n, int back) = NULL; // the CUDA twin's

// Copies what the model has kept, one number for each gradient, or with `back` into the model.
void copy_lost(const Model *m, real *kept, int back) {
    real *lost = m->crossing->lost, *to = back ? lost : kept;
    const real *from = back ? kept : lost;
    if (m->crossing->code) { // a model on a GPU
        copy_lost_of_gpu(to, from, m->tables, back);
    } else {
        memcpy(to, from, m->tables * sizeof(real));
    }
}

size_t part_begin(const Parcel *p, int part) {
    size_t begin = p->each * (size_t)part;
    return begin < p->n ? begin : p->n;
}

size_t part_numbers(const Parcel *p, int part) {
    return part_begin(p, part + 1) - part_begin(p, part);
}

// Divides a message. Memory for its codes is not there yet.
Parcel lay_parcel(Codec codec, size_t from, size_t n, int peers) {
    Parcel p;
    memset(&p, 0, sizeof(p));
    p.from = from;
    p.n = n;
    p.peers = peers;
    p.sharing = peers ? ranks.groups : ranks.size;
    p.mine = peers ? ranks.rank / ranks.ep : ranks.rank;
    size_t block = block_of(codec), even = (n + (size_t)p.sharing - 1) / (size_t)p.sharing;
    p.each = (even + block - 1) / block * block;
    p.bytes = (int *)allocate((size_t)5 * p.sharing, sizeof(int));
    p.at = p.bytes + p.sharing;
    p.sent = p.at + p.sharing;
    p.got = p.sent + p.sharing;
    p.got_at = p.got + p.sharing;
    int all = 0, mine = (int)code_bytes(codec, part_numbers(&p, p.mine));
    for (int r = 0; r < p.sharing; r++) {
        p.bytes[r] = (int)code_bytes(codec, part_numbers(&p, r));
        p.sent[r] = r == p.mine ? 0 : p.bytes[r];
        p.got[r] = r == p.mine ? 0 : mine;
        p.at[r] = all;
        p.got_at[r] = r ? p.got_at[r - 1] + p.got[r - 1] : 0;
        all += p.bytes[r];
    }
    p.all = (size_t)all;
    p.coming = (size_t)mine * (size_t)p.sharing;
    return p;
}

// Begins to sum the gradients from .. end of all processes, or with `peers` of those that have the same experts.
void start_compressed_sum(Model *m, size_t from, size_t end, int peers) {
    Codec codec = codec_of(&m->config);
    size_t most = largest_message / sizeof(real), n;
    for (; from < end && (peers ? ranks.groups : ranks.size) > 1; from += n) {
        n = end - from < most ? end - from : most;
        Parcel p = lay_parcel(codec, from, n, peers);
        p.code = (unsigned char *)allocate(p.all + 1, 1);
        p.came = (unsigned char *)allocate(p.coming + 1, 1);
        for (int r = 0; r < p.sharing; r++) {
            size_t begin = from + part_begin(&p, r), size = r == p.mine ? 0 : part_numbers(&p, r);
            real *lost = m->crossing->lost + begin;
            const real *g = m->memory[GRADS] + begin;
            for (size_t i = 0; i < size; i++) {
                lost[i] += g[i];
            }
            encode(codec, p.code + p.at[r], lost, size);
            ranks.traffic.reduced += p.sent[r];
        }
        if (parcel_count % 64 == 0) {
            parcels = (Parcel *)reallocate(parcels, (size_t)parcel_count + 64, sizeof(Parcel));
        }
        start_exchange(p.code, p.sent, p.at, p.came, p.got, p.got_at, peers, &p.request);
        parcels[parcel_count++] = p;
    }
}

// The owner's part of a message has come from all others: it adds them up and begins to send the sum to all.
void pass_on(Model *m, Parcel *p) {
    Codec codec = codec_of(&m->config);
    size_t begin = p->from + part_begin(p, p->mine), size = part_numbers(p, p->mine);
    real *lost = m->crossing->lost + begin, *g = m->memory[GRADS] + begin;
    ranks_wait(&p->request, 1);
    for (int r = 0; r < p->sharing; r++) {
        if (r != p->mine) {
            decode(codec, g, p->came + p->got_at[r], size);
        }
    }
    for (size_t i = 0; i < size; i++) {
        lost[i] += g[i];
    }
    passed_over(g, size); // --offload
    free(p->came);
    encode(codec, p->code + p->at[p->mine], lost, size);
    ranks.traffic.reduced += (double)p->bytes[p->mine] * (p->sharing - 1);
    start_gather(p->code, p->bytes, p->at, p->peers, &p->request);
}

// Waits for all sums that have begun.
void await_compressed_sums(Model *m) {
    for (int i = 0; i < parcel_count; i++) {
        pass_on(m, &parcels[i]);
    }
    for (int i = 0; i < parcel_count; i++) {
        Parcel *p = &parcels[i];
        ranks_wait(&p->request, 1);
        memset(m->memory[GRADS] + p->from, 0, p->n * sizeof(real));
        for (int r = 0; r < p->sharing; r++) {
            decode(codec_of(&m->config), m->memory[GRADS] + p->from + part_begin(p, r), p->code + p->at[r], part_numbers(p, r));
        }
        passed_over(m->memory[GRADS] + p->from, p->n);
        free(p->bytes);
        free(p->code);
    }
    free(parcels);
    parcels = NULL;
    parcel_count = 0;
}

#endif
