// --offload N on the device: experts that are in the host's memory until they are needed. dev/offload.h has the same on the CPU.
// Gives: LOW_WEIGHTS, moving, move_in_group, through_experts, rows_by_expert, weights_by_expert, plan_of_layer, by_parts.
// Needs: Pool and its lists of dev/offload.h, plan_experts() of dev/offload_products.h; common.cuh and nccl.cuh; Experts of
// experts.cuh, which includes it. The arrays themselves are made in offload_memory.cuh.
//
// The arrays of weights, their rounded copies, gradients and moments are managed memory (CUDA's Unified Memory): an address
// leads to the number wherever it is at the moment, and all kernels stay as they are. An expert's home is the host's memory. A
// kernel that reads it there gets its numbers over the bus, and nothing moves by itself. What the plan of a layer says is needed
// is moved to the device before, by cudaMemPrefetchAsync in a stream of its own, one half of the N experts while the other
// half is multiplied by; and the one whose last use is longest ago is moved back.
//
// A product is started expert by expert: a tile is made by the same kernel with the same arguments, so the bits are the same. The
// host has to know which experts have rows, so with --offload it waits once in each layer and pass for the E+1 numbers of the
// plan.
#ifndef CUDA_OFFLOAD_CUH
#define CUDA_OFFLOAD_CUH

// The array of rounded weights, beside WEIGHTS ... MOMENT2. In float32 products read the weights themselves.
const int LOW_WEIGHTS = sizeof(floatX) == sizeof(float) ? WEIGHTS : MOMENT2 + 1;

struct {
    cudaStream_t stream;       // in which experts move
    cudaEvent_t arrived;       // the experts that were sent for last are on the device
    cudaEvent_t used;          // the kernels that were started for experts have ended
    int device;
    int *offset; // (E+1) of the layer at hand, pinned
    int most;    // numbers that it has memory for
} moving;

// ---- moving

#if CUDART_VERSION >= 13000
typedef cudaMemLocation Place;
const Place HOST_PLACE = {cudaMemLocationTypeHost, 0};
Place device_place() {
    return {cudaMemLocationTypeDevice, moving.device};
}
cudaError_t prefetch(const void *p, size_t bytes, Place to) {
    return cudaMemPrefetchAsync(p, bytes, to, 0, moving.stream);
}
#else
typedef int Place;
const Place HOST_PLACE = cudaCpuDeviceId;
Place device_place() {
    return moving.device;
}
cudaError_t prefetch(const void *p, size_t bytes, Place to) {
    return cudaMemPrefetchAsync(p, bytes, to, moving.stream);
}
#endif

const char *address_of_expert(const Pool *p, int e) {
    return (const char *)p->base + p->from[e] * p->each;
}

void move_expert(const Pool *p, int e, Place to) {
    CHECK(prefetch(address_of_expert(p, e), bytes_of_expert(p, e), to));
}

// Some experts work together: of one tensor in several arrays, or of two.
struct Pools {
    Pool *list[5];
    int count;
};

// Those at from .. from+each of the plan set out for the device, in all pools. To make room, others leave, but only after the kernels
// that were started for experts until now have ended.
void move_in_group(const Pools *pools, const int *plan, int count, int from) {
    int each = experts_at_a_time(pools->list[0]);
    CHECK(cudaStreamWaitEvent(moving.stream, moving.used, 0));
    for (int i = from; i < min_int(count, from + each); i++) {
        for (int j = 0; j < pools->count; j++) {
            int leaves;
            int comes = use_expert(pools->list[j], plan[i], &leaves);
            if (leaves >= 0) {
                move_expert(pools->list[j], leaves, HOST_PLACE);
            }
            if (comes) {
                move_expert(pools->list[j], plan[i], device_place());
            }
        }
    }
    CHECK(cudaEventRecord(moving.arrived, moving.stream));
}

// The first experts of what comes next, of which the plan is known already, set out.
void move_ahead(const Pools *next, const int *offset) {
    if (next->count) {
        int *plan = (int *)allocate(next->list[0]->E, sizeof(int));
        move_in_group(next, plan, plan_experts(next->list[0], offset, plan), 0);
        free(plan);
    }
}

// In the emulator: ends the program where an expert is not on the device when a kernel begins that was started for it.
void expect_on_device(const Pools *pools, int e) {
#ifdef CUDACPU
    for (int j = 0; j < pools->count; j++) {
        cudacpu::expect_on_device(stream, address_of_expert(pools->list[j], e), bytes_of_expert(pools->list[j], e));
    }
#else
    (void)pools;
    (void)e;
#endif
}

// start(e) for each expert that has rows by `offset`, those first that are on the device already. Group by group, while the next
// group is on its way, as product_of_offloaded() of dev/offload_products.h does it.
template <class Start> void through_experts(const Pools *pools, const Pools *next, const int *offset, Start start) {
    const Pool *first = pools->list[0];
    int *plan = (int *)allocate(first->E, sizeof(int));
    int count = plan_experts(first, offset, plan);
    int each = experts_at_a_time(first);
    offloaded.asked += (double)count * pools->count;
    move_in_group(pools, plan, count, 0);
    for (int from = 0; from < count; from += each) {
        // With one expert at a time nothing can be on its way meanwhile.
        if (first->most == 1 && from > 0) {
            move_in_group(pools, plan, count, from);
        }
        CHECK(cudaStreamWaitEvent(stream, moving.arrived, 0)); // as it was last recorded: for this group
        if (first->most > 1) {
            move_in_group(pools, plan, count, from + each);
        }
        if (from + each >= count) {
            move_ahead(next, offset);
        }
        for (int i = from; i < min_int(count, from + each); i++) {
            expect_on_device(pools, plan[i]);
            start(plan[i]);
        }
        CHECK(cudaEventRecord(moving.used, stream));
    }
    free(plan);
}

// ---- the products of a layer

// The layer's plan on the host, for Experts.plan; NULL: all experts are on the device. Valid until the next call.
const int *plan_of_layer(const Config *c, const int *offset) {
    if (!c->offload) {
        return NULL;
    }
    if (c->experts >= moving.most) {
        await(stream);
        CHECK(cudaFreeHost(moving.offset));
        moving.most = c->experts + 1;
        CHECK(cudaMallocHost((void **)&moving.offset, (size_t)moving.most * sizeof(int)));
    }
    CHECK(cudaMemcpyAsync(moving.offset, offset, ((size_t)c->experts + 1) * sizeof(int), cudaMemcpyDeviceToHost, stream));
    await(stream);
    return moving.offset;
}

// Adds the pool of a tensor in an array of p's model.
void add_to(Pools *pools, const Pool *p, int what, int tensor) {
    Pool *found = find_pool(p->owner, what, tensor);
    if (!found) {
        fail("internal error: tensor %d of array %d has no experts in the host's memory", tensor, what);
    }
    pools->list[pools->count++] = found;
}

// Starts a product of rows, that of `matrices`, for the experts of the layer's plan. start(x) starts it for the experts whose tiles
// x lists.
template <class Start> void rows_by_expert(const Experts *x, int what, const floatX *matrices, Start start) {
    Pools pools = {{pool_of((const real *)(const void *)matrices)}, 1};
    Pools next = {{NULL}, 0};
    const Pool *p = pools.list[0];
    if (what == HIDDEN) {
        add_to(&next, p, LOW_WEIGHTS, p->tensor + 1); // w_out is the row behind w_in
    } else if (what == DHIDDEN) {
        add_to(&next, p, GRADS, p->tensor);
        add_to(&next, p, GRADS, p->tensor - 1);
    }
    through_experts(&pools, &next, x->plan, [&](int e) {
        Experts one = *x;
        one.plan = NULL;
        for (int before = 0; before < e; before++) {
            one.tile += div_up(x->plan[before + 1] - x->plan[before], TM);
        }
        one.tiles = div_up(x->plan[e + 1] - x->plan[e], TM);
        start(&one);
    });
}

// The same for the gradients of both matrices.
template <class Start> void weights_by_expert(const Experts *x, const float *dw_out, Start start) {
    Pools pools = {{pool_of(dw_out)}, 1};
    Pools next = {{NULL}, 0};
    const Pool *p = pools.list[0];
    add_to(&pools, p, GRADS, p->tensor - 1);
    add_to(&next, p, LOW_WEIGHTS, p->tensor - 1); // for the gradient by the rows
    through_experts(&pools, &next, x->plan, [&](int e) {
        Experts one = *x; // as if expert e were the only one
        one.plan = NULL;
        one.E = 1;
        one.width += e;
        one.activation += e;
        one.matrix += e;
        one.matrix_in += e;
        one.offset += e;
        start(&one);
    });
}

// ---- the update

// start(part) for the parts of an update `a` of one tensor by AdamW: one part, or with --offload one for each expert.
template <class Adam, class Start> void by_parts(const Adam &a, Start start) {
    Pool *p = pool_of(a.w);
    if (!p) {
        start(a);
        return;
    }
    Pools pools = {{NULL}, 0};
    Pools none = {{NULL}, 0};
    for (int what = WEIGHTS; what <= (LOW_WEIGHTS == WEIGHTS ? MOMENT2 : LOW_WEIGHTS); what++) {
        add_to(&pools, p, what, p->tensor);
    }
    int *all = (int *)allocate((size_t)p->E + 1, sizeof(int)); // a plan in which each expert has a row
    for (int e = 0; e <= p->E; e++) {
        all[e] = e;
    }
    through_experts(&pools, &none, all, [&](int e) {
        Adam part = a;
        size_t at = p->from[e];
        part.w += at;
        part.g += at;
        part.low += at;
        part.m1 = (char *)a.m1 + at * pools.list[MOMENT1]->each;
        part.m2 = (char *)a.m2 + at * pools.list[MOMENT2]->each;
        part.size = p->from[e + 1] - at;
        part.first += at;
        start(part);
    });
    free(all);
}

#endif
