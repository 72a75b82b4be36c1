// --offload N on the device: the arrays whose experts are in the host's memory. offload.cuh says how they come and go.
// Gives: own_array, free_arrays. Needs: memory.cuh, offload.cuh; Model of train_moe.cu, which includes it.
//
// An array is one piece of managed memory. What all experts have in common, and tables, have their home on the device, and the
// experts have theirs in the host's memory. The device can read it there (cudaMemAdviseSetAccessedBy), so that what goes over
// whole arrays, as the norm of all gradients does, moves nothing.
#ifndef CUDA_OFFLOAD_MEMORY_CUH
#define CUDA_OFFLOAD_MEMORY_CUH

struct ManagedArray {
    const ::Model *owner;
    void *memory;
    double elsewhere, there; // bytes of experts, in all and at most on the device
} managed[16];
int managed_count;
double to_come; // bytes of experts that the model at hand has not taken yet, as it was measured

// The stream in which experts move, once; stops where the device has no such memory.
void start_moving(void) {
    int can = 0;
    if (moving.stream) {
        return;
    }
    CHECK(cudaGetDevice(&moving.device));
    CHECK(cudaDeviceGetAttribute(&can, cudaDevAttrConcurrentManagedAccess, moving.device));
    if (!can) {
        fail("--offload: this device cannot share memory with the host while it works (its concurrentManagedAccess is 0, as on "
             "Windows and in some virtual machines): train without --offload, or on the CPU by ./train_moe --offload");
    }
    CHECK(cudaStreamCreateWithFlags(&moving.stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&moving.arrived, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&moving.used, cudaEventDisableTiming));
}

// Stops where the machine has less memory than the experts of all arrays will take. They are `bytes` more than those that are there
// already. It is called before the first array is taken, since filling it would take long, and memory from other programs.
void check_host_memory(double bytes) {
    double has = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE), mib = 1048576;
    if (has > 0 && offloaded.elsewhere + bytes > has) {
        fail("--offload: the experts need %.0f MiB of the host's memory, which has %.0f: it needs a smaller model or a larger machine",
             (offloaded.elsewhere + bytes) / mib, has / mib);
    }
}

// Gives the numbers first .. end of an array a home: the host's memory, or the device's.
void settle(char *memory, size_t first, size_t end, size_t each, int on_host) {
    char *from = memory + first * each;
    size_t bytes = (end - first) * each;
    if (bytes == 0) {
        return;
    }
    CHECK(cudaMemAdvise(from, bytes, cudaMemAdviseSetPreferredLocation, on_host ? HOST_PLACE : device_place()));
    CHECK(cudaMemAdvise(from, bytes, cudaMemAdviseSetAccessedBy, device_place()));
    CHECK(prefetch(from, bytes, on_host ? HOST_PLACE : device_place()));
}

// Memory for `count` numbers, of `each` bytes, of the array `what`: WEIGHTS ... MOMENT2 or LOW_WEIGHTS. Not zeroed. With --offload its
// experts are in the host's memory, and the device's memory is booked for N of each tensor.
void *own_array(Model *m, int what, size_t count, size_t each) {
    if (!m->config.offload) {
        return own(m, count, each);
    }
    size_t experts = (m->tables - m->common) * each, there = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        there += m->tensors[i].of_experts ? offload_bytes(&m->config, &m->tensors[i], each) : 0;
    }
    m->bytes[m->purpose] += count * each - experts + there;
    if (m->dry) {
        to_come = (what == WEIGHTS ? 0 : to_come) + (double)experts;
        return m->arena; // leads nowhere
    }

    start_moving();
    check_host_memory(to_come);
    to_come -= (double)experts;
    char *memory;
    cudaError_t error = cudaMallocManaged((void **)&memory, count * each, cudaMemAttachGlobal);
    if (error != cudaSuccess || managed_count == COUNT(managed)) {
        fail("--offload: cannot get %.1f MiB of memory that the device shares with the host: %s; train without --offload, or on the CPU",
             (double)(count * each) / 1048576, error == cudaSuccess ? "too many models" : cudaGetErrorString(error));
    }
    settle(memory, m->common, m->tables, each, 1);
    settle(memory, 0, m->common, each, 0);
    settle(memory, m->tables, count, each, 0);
    CHECK(cudaStreamSynchronize(moving.stream));
    for (int i = 0; i < m->tensor_count; i++) {
        if (m->tensors[i].of_experts) {
            add_pool(m, what, i, memory + m->tensors[i].offset * each, each);
        }
    }
    managed[managed_count++] = {m, memory, (double)experts, (double)there};
    offloaded.elsewhere += (double)experts;
    offloaded.there += (double)there;
    return memory;
}

// Gives back the arrays of a model.
void free_arrays(const Model *m) {
    int left = 0;
    for (int i = 0; i < managed_count; i++) {
        const ManagedArray *a = &managed[i];
        if (a->owner == m) {
            CHECK(cudaStreamSynchronize(moving.stream));
            CHECK(cudaFree(a->memory));
            offloaded.elsewhere -= a->elsewhere;
            offloaded.there -= a->there;
        } else {
            managed[left++] = *a;
        }
    }
    managed_count = left;
    offload_free(m); // the lists
}

#endif
