// Several GPUs: sums of gradients while backward still runs, shares of the update, and second copies of busy experts. See
// dev/ranks of the C twin, whose functions have the same names.
// Gives: layer_done, norm_over_ranks, share_directions, share_weights, move_copies, sum_statistics.
// Needs: dev/cuda/nccl.cuh, crossing.cuh; sum_of_squares of train_moe.cu, which includes it.
#ifndef CUDA_RANKS_CUH
#define CUDA_RANKS_CUH

// ---- gradients

// Begins to sum the gradients from .. end of all processes, or with `peers` of those that have the same experts.
void start_sum(::Model *m, size_t from, size_t end, int peers) {
    int sharing = peers ? ranks.groups : ranks.size;
    if (from >= end || sharing == 1) {
        return;
    }
    if (m->config.compress) {
        gpu::start_compressed_sum(m, from, end, peers);
        return;
    }
    ranks.traffic.reduced +=
        2.0 * (sharing - 1) / sharing * (double)((end - from) * sizeof(float)); // what a ring sends
    follow(network, stream);
    nccl_sum(m->memory[GRADS] + from, end - from, peers ? OF_PEERS : OF_ALL);
}

// GRADS: adds the gradients of copies to the owners' and clears them. WEIGHTS: sends the owners' weights to the copies.
void exchange_copies(Model *m, int what) {
    int count;
    size_t coming = 0;
    float *arrived, *to;
    Copy *list = list_copies(m, &count);
    for (int i = 0; i < count; i++) {
        coming += what == GRADS && list[i].owned ? list[i].size : 0;
    }
    lay_pieces(&m->transit->memory, {{&arrived, coming * sizeof(float)}});
    to = arrived;
    depart();
    for (int i = 0; i < count; i++) {
        const Copy *copy = &list[i];
        int receives = copy->owned == (what == GRADS);
        float *own = m->memory[what] + copy->at;
        if (receives) {
            nccl_receive(what == GRADS ? to : own, copy->size * sizeof(float), copy->partner);
        } else {
            nccl_send(own, copy->size * sizeof(float), copy->partner);
        }
        ranks.traffic.reduced += receives ? 0 : (double)(copy->size * sizeof(float));
        to += receives ? copy->size : 0;
    }
    arrive(m->transit->travel[0].arrived);
    wait_for(m->transit->travel[0].arrived);
    to = arrived;
    for (int i = 0; what == GRADS && i < count; i++) {
        float *own = m->memory[what] + list[i].at;
        if (!list[i].owned) {
            zero(own, list[i].size * sizeof(float));
            continue;
        }
        add_kernel<<<blocks(list[i].size), THREADS, 0, stream>>>(own, to, list[i].size);
        CHECK(cudaGetLastError());
        to += list[i].size;
    }
    free(list);
}

// Backward has done with layer l, -1: with all. As ranks_layer_done of the C twin.
void layer_done(Model *m, int l) {
    if (!MANY || !m->batch.last) {
        return;
    }
    size_t tail = behind_layers(m);
    if (l == m->config.layers - 1) {
        m->crossing->summing = tail;
    }
    sum_layer(m, l, &m->crossing->summing, gpu::start_sum);
    if (l >= 0) {
        return;
    }
    gpu::start_sum(m, tail, m->common, 0);
    if (has_copies(m)) {
        gpu::exchange_copies(m, GRADS);
        gpu::start_sum(m, m->common, m->tables, 1);
    }
    sum_tables(m);
}

// ---- the update

size_t slice_of(const Model *m) { // the numbers that this process updates of what all have
    return m->crossing->slice_end - m->crossing->slice;
}

// *norm of all gradients of one process that has tables.
void norm_with_tables(Model *m, double *norm) {
    zero(norm, sizeof(double));
    int parts = gpu::sum_of_squares(m->norm_part, m->memory[GRADS], m->tables);
    add_sum(norm, Doubles{m->norm_part}, parts, 1);
    add_squares_of_read_rows(m, norm, m->norm_part);
    root_of_sum_kernel<<<1, 32, 0, stream>>>(norm, norm, 1);
    CHECK(cudaGetLastError());
}

// *norm of all processes' gradients: of this one's slice of what all have, of its experts, which `groups` have, and of tables,
// of which all have the same.
void norm_over_ranks(Model *m, double *norm) {
    const float *g = m->memory[GRADS];
    wait_for_network(); // for the gradients' sums
    zero(norm, sizeof(double));
    int parts = gpu::sum_of_squares(m->norm_part, g + m->crossing->slice, slice_of(m));
    add_sum(norm, Doubles{m->norm_part}, parts, 1);
    parts = gpu::sum_of_squares(m->norm_part, g + m->common, m->tables - m->common);
    add_sum(norm, Doubles{m->norm_part}, parts, 1.0 / ranks.groups);
    sum_over_ranks(norm, 1);
    add_squares_of_read_rows(m, norm, m->norm_part);
    root_of_sum_kernel<<<1, 32, 0, stream>>>(norm, norm, 1);
    CHECK(cudaGetLastError());
}

// --optimizer muon: as ranks_share_directions of the C twin.
void share_directions(Model *m) {
    if (!MANY) {
        return;
    }
    size_t slice = slice_of(m);
    ranks.traffic.reduced += (double)(slice * sizeof(float)) * (ranks.size - 1);
    follow(network, stream);
    nccl_gather(m->memory[GRADS], m->crossing->slice, slice);
    wait_for_network();
}

// Each process has updated its slice: all get the slices of the others.
void share_weights(Model *m) {
    if (!MANY) {
        return;
    }
    size_t slice = slice_of(m);
    zero(m->memory[GRADS], m->common * sizeof(float)); // the other processes' slices, too
    ranks.traffic.reduced += (double)(slice * sizeof(float)) * (ranks.size - 1);
    follow(network, stream);
    nccl_gather(m->memory[WEIGHTS], m->crossing->slice, slice);
    wait_for_network();
    round_weights(m, 0, m->common);
}

// Copies of busy experts get the owners' new weights, and from time to time other experts get the copies.
void move_copies(Model *m, int step) {
    if (!has_copies(m)) {
        return;
    }
    if (step % m->config.replicate_every == 0) {
        fetch_report(m);
        for (int l = 0; l < m->config.layers; l++) {
            gpu::model_statistics(m, l);
        }
        choose_copies(m);
        place_experts(m);
    }
    gpu::exchange_copies(m, WEIGHTS);
    round_weights(m, m->common, m->tables);
}

// The step's counts of all processes: all but recent, idle and AUX.
void sum_statistics(Model *m) {
    int E = m->config.experts;
    if (!MANY) {
        return;
    }
    follow(network, stream);
    nccl_begin();
    for (int l = 0; l < m->config.layers; l++) {
        double *count = layer_stats(m, l);
        nccl_sum(count, (size_t)2 * E, OF_ALL);
        nccl_sum(count + 4 * E, AUX, OF_ALL);
    }
    if (attention_routes(&m->config)) {
        nccl_sum(layer_stats(m, m->config.layers), m->config.layers * head_stats_size(&m->config), OF_ALL);
    }
    nccl_end();
    wait_for_network();
}

#endif
