// --teacher: the loss with a teacher. See dev/teacher.h, whose function has the same name and says what is computed.
// Gives: taught_loss, fetch_taught. Needs: dev/cuda/common.cuh, host.cuh; the head, layers_forward and Model of train_moe.cu,
// which includes it.
//
// The teacher is a second model on the device. Its logits and its T^2 * KL are in its own word_logits and nll, and the sum of a
// step is in TOTAL_AUX of its report, which it does not need, since it never trains.
#ifndef CUDA_TEACHER_CUH
#define CUDA_TEACHER_CUH

// The highest number of a block of at most 1024 threads, a multiple of 32; the same in every thread.
__device__ float block_max(float x) {
    __shared__ float part[32];
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    x = warp_max(x);
    __syncthreads(); // whoever reads part from the last time
    if (lane == 0) {
        part[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_max(lane < warps ? part[lane] : -INFINITY);
}

// A block has one row of both models' logits, W numbers of which V are words. cool: 1 / temperature.
__global__ void distill_kernel(float *nll, float *kl, floatX *dlogits, const float *logits, const float *taught,
                               const int *targets, int V, int W, float w, float temperature, float scale) {
    const float *z = logits + (size_t)blockIdx.x * W, *y = taught + (size_t)blockIdx.x * W;
    int target = targets[blockIdx.x];
    float a[4], b[4], cool = 1 / temperature, wanted = z[target], top_z = -INFINITY, top_y = -INFINITY;

    // The highest logits.
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) {
        load_pack(a, z + v);
        load_pack(b, y + v);
        for (int i = 0; i < 4; i++) {
            top_z = v + i < V ? fmaxf(top_z, a[i]) : top_z;
            top_y = v + i < V ? fmaxf(top_y, b[i]) : top_y;
        }
    }
    top_z = block_max(top_z);
    top_y = block_max(top_y);

    // The sums of the student's softmax, and of both at the temperature.
    float sum = 0, sum_p = 0, sum_q = 0;
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) {
        load_pack(a, z + v);
        load_pack(b, y + v);
        for (int i = 0; i < 4 && v + i < V; i++) {
            sum += expf(a[i] - top_z);
            sum_p += expf((a[i] - top_z) * cool);
            sum_q += expf((b[i] - top_y) * cool);
        }
    }
    sum = block_sum(sum);
    sum_p = block_sum(sum_p);
    sum_q = block_sum(sum_q);
    double of_logs = log((double)sum_p) - log((double)sum_q), apart = 0;

    // The divergence, and the gradient; 0 for words that do not exist.
    float of_target = (1 - w) * scale, of_teacher = w * temperature * scale;
    for (int v = 4 * threadIdx.x; v < W; v += 4 * blockDim.x) {
        load_pack(a, z + v);
        load_pack(b, y + v);
        for (int i = 0; i < 4; i++) {
            float p = expf(a[i] - top_z) / sum, came = v + i == target ? 1 : 0;
            float cold_z = (a[i] - top_z) * cool, cold_y = (b[i] - top_y) * cool;
            float p_cold = expf(cold_z) / sum_p, q = expf(cold_y) / sum_q;
            apart += v + i < V ? divergence_of_word((double)q, (double)p_cold, (double)cold_z - (double)cold_y - of_logs) : 0;
            a[i] = v + i < V ? of_target * (p - came) + of_teacher * (p_cold - q) : 0;
        }
        store_pack(dlogits + (size_t)blockIdx.x * W + v, a);
    }
    apart = block_sum(apart);
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = top_z + logf(sum) - wanted;
        kl[blockIdx.x] = temperature * temperature * (float)apart;
    }
}

// In place of head_loss(). Returns 0, and does nothing, where no teacher works, or where the batch is not for training.
int taught_loss(Model *m, int N, double scale) {
    const Config *c = &m->config;
    Model *t = (Model *)teacher.model;
    if (!teacher_works(c) || m->batch.mode == EVAL_MODE) {
        return 0;
    }

    // The teacher reads the same tokens. Its last layer's output stays in its h; it has no loss of its own.
    Ranks all = be_alone();
    t->batch = batch_of_teacher(&m->batch);
    send_batch(t, t->batch.inputs, t->batch.targets, N);
    if (m->batch.first) {
        zero(t->report + TOTAL_AUX, sizeof(double));
    }
    layers_forward(t);
    ranks = all;

    int C = c->dim, V = c->vocab, W = words_with_padding(V), most = min_int(m->head_rows, t->head_rows);
    const floatX *head = low_of(m, m->params.head), *its_head = low_of(t, t->params.head);
    for (int first = 0; first < N; first += most) {
        int rows = min_int(most, N - first);
        const floatX *h = m->h + (size_t)first * C;
        matmul(m->word_logits, h, head, rows, C, W, SET);
        matmul(t->word_logits, t->h + (size_t)first * t->config.dim, its_head, rows, t->config.dim, W, SET);
        distill_kernel<<<rows, row_threads(W, 4), 0, stream>>>(m->nll + first, t->nll + first, m->word_dlogits, m->word_logits,
                                                               t->word_logits, m->targets + first, V, W, (float)c->distill_weight,
                                                               (float)c->distill_temperature, (float)scale);
        CHECK(cudaGetLastError());
        matmul_dx(m->dh + (size_t)first * C, m->word_dlogits, head, rows, C, W, SET);
        matmul_dw(m->grads.head, m->word_dlogits, h, rows, C, W);
    }
    add_mean(t->report + TOTAL_AUX, t->nll, N, m->batch.scale);
    return 1;
}

// On the host: the teacher's part of the step's loss.
void fetch_taught(const ::Model *m) {
    if (teacher_works(&m->config) && m != teacher.model) {
        download(&teacher.loss, ((Model *)teacher.model)->report + TOTAL_AUX, sizeof(double));
    }
}

#endif
