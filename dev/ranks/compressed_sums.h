// Several processes: sums of gradients that are sent in fewer bits (--compress).
// Gives: start_compressed_sum, await_compressed_sums; for checkpoints copy_lost; for the CUDA twin Parcel, lay_parcel,
// part_begin, part_numbers.
// Needs: comm.h, experts.h, compress.h, dev/offload.h; Model of train_moe.c.
//
// The gradients of a message are divided into as many parts as there are processes; each process owns one. It sends its
// gradients of each part to the owner, encoded; the owner adds them to its own, which are not rounded, and sends the sum to
// all, encoded again. All decode the same bytes, the owner too, so all have the same sum, bit for bit. What either code
// did not say is lost for this step, and kept for the next one, in one array as long as the gradients: by the sender of a
// part what it has not sent, by the owner what it has not passed on (Tang et al. 2019, DoubleSqueeze). The owner adds in the
// order of the ranks, so every run has the same bits.
//
// The first sending is under way while backward still runs. The second begins when the sums are waited for. With --offload the
// gradients are read and written piece by piece, and each piece goes back to the file at once; the codes stay in memory.
#ifndef RANKS_COMPRESSED_SUMS_H
#define RANKS_COMPRESSED_SUMS_H

typedef struct Parcel { // one message under way
    size_t from, n;     // of the gradients
    size_t each;        // numbers of a part; the last parts may be shorter, or empty
    int peers, sharing; // as in start_sum(); the processes that share it
    int mine;           // which of them this one is, and its part
    int *bytes, *at;    // (sharing) of each part's code: how long it is, and where it begins in `code`
    int *sent;          // (sharing) the same lengths, but for 0 instead of its own
    int *got, *got_at;  // (sharing) the bytes that come from each process for this one's part, and where they begin in `came`
    size_t all, coming; // bytes of the two arrays that follow
    unsigned char *code, *came;
    Request request;
} Parcel;

size_t decoded_piece = 256000; // numbers, in whole blocks of every code; a test makes it smaller

Parcel *parcels = NULL; // under way
int parcel_count = 0;

void (*copy_lost_of_gpu)(real *to, const real *from, size_t n, int back) = NULL; // the CUDA twin's

// Copies what codes have lost, one number for each gradient, from the model to `copy`, or with `back` from there to the model.
void copy_lost(const Model *m, real *copy, int back) {
    real *lost = m->crossing->lost;
    real *to = back ? lost : copy;
    const real *from = back ? copy : lost;
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

// lost (n) += g, and the gradients are not needed until the sum comes.
void add_gradients(real *lost, const real *g, size_t n) {
    for (size_t i = 0, k; i < n; i += k) {
        k = n - i < decoded_piece ? n - i : decoded_piece;
        about_to_pass(g + i, k);
        for (size_t j = i; j < i + k; j++) {
            lost[j] += g[j];
        }
        passed_over(g + i, k);
    }
}

// The gradients g (n) become what the code says.
void replace_gradients(Codec codec, real *g, const unsigned char *code, size_t n) {
    for (size_t i = 0, k; i < n; i += k) {
        k = n - i < decoded_piece ? n - i : decoded_piece;
        about_to_pass(g + i, k);
        memset(g + i, 0, k * sizeof(real));
        decode(codec, g + i, code + code_bytes(codec, i), k);
        passed_over(g + i, k);
    }
}

// Begins to sum the gradients from .. end of all processes, or with `peers` of those that have the same experts.
void start_compressed_sum(Model *m, size_t from, size_t end, int peers) {
    Codec codec = codec_of(&m->config);
    size_t most = largest_message / sizeof(real);
    if ((peers ? ranks.groups : ranks.size) == 1) {
        return;
    }
    for (size_t n; from < end; from += n) {
        n = end - from < most ? end - from : most;
        Parcel p = lay_parcel(codec, from, n, peers);
        p.code = (unsigned char *)allocate(p.all + 1, 1);
        p.came = (unsigned char *)allocate(p.coming + 1, 1);
        for (int r = 0; r < p.sharing; r++) {
            size_t begin = from + part_begin(&p, r);
            size_t size = r == p.mine ? 0 : part_numbers(&p, r);
            real *lost = m->crossing->lost + begin;
            add_gradients(lost, m->memory[GRADS] + begin, size);
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
    size_t begin = p->from + part_begin(p, p->mine);
    size_t size = part_numbers(p, p->mine);
    real *lost = m->crossing->lost + begin;
    real *g = m->memory[GRADS] + begin;
    ranks_wait(&p->request, 1);
    for (size_t i = 0, k; i < size; i += k) {
        k = size - i < decoded_piece ? size - i : decoded_piece;
        for (int r = 0; r < p->sharing; r++) {
            if (r != p->mine) {
                decode(codec, g + i, p->came + p->got_at[r] + code_bytes(codec, i), k);
            }
        }
        add_gradients(lost + i, g + i, k);
    }
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
        for (int r = 0; r < p->sharing; r++) {
            real *g = m->memory[GRADS] + p->from + part_begin(p, r);
            replace_gradients(codec_of(&m->config), g, p->code + p->at[r], part_numbers(p, r));
        }
        free(p->bytes);
        free(p->code);
    }
    free(parcels);
    parcels = NULL;
    parcel_count = 0;
}

#endif
