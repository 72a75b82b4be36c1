// Several GPUs: sums of gradients that are sent in fewer bits (--compress). See dev/ranks/compress.h and compressed_sums.h of
// the C twin: the same codes, the same parts, the same order of adding.
// Gives: own_lost, start_compressed_sum. Needs: dev/cuda/memory.cuh, nccl.cuh, tables.cuh; train_moe.cu includes it.
//
// All of a sum is queued in the stream `network`, both sendings with the kernels between them, so the host waits for nothing, and
// one buffer serves all messages. A thread encodes a whole block, with the function of the C twin. That is simple, and slower than
// a warp for each block would be; no GPU has measured it.
#ifndef CUDA_COMPRESS_CUH
#define CUDA_COMPRESS_CUH

const size_t compressed_message = 1 << 24; // numbers, at most

size_t most_compressed(const ::Model *m) {
    size_t most = largest_message / sizeof(float) < compressed_message ? largest_message / sizeof(float) : compressed_message;
    return most < m->tables ? most : m->tables;
}

void copy_lost_of_device(float *to, const float *from, size_t n, int back) {
    await(stream);
    await(network);
    CHECK(cudaMemcpy(to, from, n * sizeof(float), back ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost));
}

// Memory for what is lost, and for the codes of a message.
void own_lost(Model *m) {
    Codec codec = codec_of(&m->config);
    if (!MANY || !m->config.compress) {
        return;
    }
    size_t most = code_bytes(codec, most_compressed(m) + ((size_t)ranks.size + 1) * block_of(codec));
    m->crossing->lost = own_floats(m, m->tables);
    m->crossing->code = (unsigned char *)own(m, most, 1);
    m->crossing->coming = (unsigned char *)own(m, most, 1);
    copy_lost_of_gpu = copy_lost_of_device;
    if (!m->dry) {
        zero(m->crossing->lost, m->tables * sizeof(float));
    }
}

// lost (n) += g; then the code of it, and what that does not say is lost.
__global__ void encode_kernel(Codec codec, unsigned char *code, float *lost, const float *g, size_t n) {
    size_t block = block_of(codec), b = thread_of_grid();
    if (b * block >= n) {
        return;
    }
    for (size_t i = b * block; i < n && i < (b + 1) * block; i++) {
        lost[i] += g[i];
    }
    encode_block(codec, code, lost, n, b);
}

__global__ void decode_kernel(Codec codec, float *v, const unsigned char *code, size_t n) {
    size_t b = thread_of_grid();
    if (b * block_of(codec) < n) {
        decode_block(codec, v, code, n, b);
    }
}

void encode_part(Codec codec, unsigned char *code, float *lost, const float *g, size_t n) {
    if (n) {
        encode_kernel<<<blocks(blocks_in(codec, n)), THREADS, 0, network>>>(codec, code, lost, g, n);
        CHECK(cudaGetLastError());
    }
}

void decode_part(Codec codec, float *v, const unsigned char *code, size_t n) {
    if (n) {
        decode_kernel<<<blocks(blocks_in(codec, n)), THREADS, 0, network>>>(codec, v, code, n);
        CHECK(cudaGetLastError());
    }
}

// Sends out + out_at[r] to the other ranks r, sent[r] bytes, and receives got[r] bytes from them at in + in_at[r].
void exchange_codes(const Parcel *p, const unsigned char *out, const int *sent, const int *out_at, unsigned char *in,
                    const int *got, const int *in_at) {
    int of = p->peers ? OF_PEERS : OF_ALL;
    nccl_begin();
    for (int r = 0; r < p->sharing; r++) {
        if (r != p->mine && sent[r]) {
            nccl_send(out + out_at[r], (size_t)sent[r], r, of);
        }
        if (r != p->mine && got[r]) {
            nccl_receive(in + in_at[r], (size_t)got[r], r, of);
        }
    }
    nccl_end();
}

// One message.
void sum_parcel(::Model *m, Parcel *p) {
    Codec codec = codec_of(&m->config);
    unsigned char *code = m->crossing->code, *came = m->crossing->coming;
    float *g = m->memory[GRADS] + p->from, *lost = m->crossing->lost + p->from;
    size_t begin = part_begin(p, p->mine), size = part_numbers(p, p->mine);

    // The gradients of each part go to its owner.
    for (int r = 0; r < p->sharing; r++) {
        size_t at = part_begin(p, r);
        if (r != p->mine) {
            encode_part(codec, code + p->at[r], lost + at, g + at, part_numbers(p, r));
        }
        ranks.traffic.reduced += p->sent[r];
    }
    exchange_codes(p, code, p->sent, p->at, came, p->got, p->got_at);

    // The owner adds them up, and sends the sum to all.
    for (int r = 0; r < p->sharing; r++) {
        if (r != p->mine) {
            decode_part(codec, g + begin, came + p->got_at[r], size);
        }
    }
    encode_part(codec, code + p->at[p->mine], lost + begin, g + begin, size);
    for (int r = 0; r < p->sharing; r++) { // the same bytes to each
        p->got_at[r] = p->at[p->mine];
        p->got[r] = p->bytes[p->mine];
    }
    ranks.traffic.reduced += (double)p->bytes[p->mine] * (p->sharing - 1);
    exchange_codes(p, code, p->got, p->got_at, code, p->bytes, p->at);
    CHECK(cudaMemsetAsync(g, 0, p->n * sizeof(float), network));
    for (int r = 0; r < p->sharing; r++) {
        decode_part(codec, g + part_begin(p, r), code + p->at[r], part_numbers(p, r));
    }
}

// Begins to sum the gradients from .. end of all processes, or with `peers` of those that have the same experts.
void start_compressed_sum(::Model *m, size_t from, size_t end, int peers) {
    size_t most = most_compressed(m);
    follow(network, stream);
    for (size_t n; from < end; from += n) {
        n = end - from < most ? end - from : most;
        Parcel p = lay_parcel(codec_of(&m->config), from, n, peers);
        sum_parcel(m, &p);
        free(p.bytes);
    }
}

#endif
