// managed.h: Unified Memory of the look-alike, as CUDA 13 declares it: cudaMallocManaged, cudaMemPrefetchAsync, cudaMemAdvise.
//
// Managed memory is the host's memory, as all is here. What is kept of it is where its bytes are: on the device, from when a prefetch to
// there is done in its stream until one to the host is done. A real device moves whole pages; here it is 16 bytes, so that a
// test can count. A prefetch leaves the device less free memory, and one that finds too little ends the program, where a real one
// would send other pages away. Advice is checked and forgotten: a real device moves a page that is used elsewhere than at its
// preferred location, unless it may read it there. Environment variable: CUDACPU_MANAGED=0, a device that cannot share memory
// with the host while it works.
//
// cuda_runtime.h includes this behind its streams and its memory.

#ifndef CUDACPU_MANAGED_H
#define CUDACPU_MANAGED_H

enum cudaMemLocationType {
    cudaMemLocationTypeInvalid = 0,
    cudaMemLocationTypeDevice = 1,
    cudaMemLocationTypeHost = 2
};
struct cudaMemLocation {
    cudaMemLocationType type;
    int id;
};
enum cudaMemoryAdvise {
    cudaMemAdviseSetReadMostly = 1,
    cudaMemAdviseUnsetReadMostly,
    cudaMemAdviseSetPreferredLocation,
    cudaMemAdviseUnsetPreferredLocation,
    cudaMemAdviseSetAccessedBy,
    cudaMemAdviseUnsetAccessedBy
};
enum cudaDeviceAttr { cudaDevAttrConcurrentManagedAccess = 89 };
const unsigned cudaMemAttachGlobal = 1, cudaMemAttachHost = 2;

namespace cudacpu {

const size_t MANAGED_PIECE = 16;
inline std::map<char *, std::vector<bool>> managed; // of each piece of 16 bytes, whether it is on the device
inline size_t managed_there = 0, managed_most = 0;  // bytes on the device now, and the most that ever were

inline bool can_share() {
    return environment("CUDACPU_MANAGED", 1) != 0;
}

// The managed memory that has all of these bytes; managed.end(): none has.
inline std::map<char *, std::vector<bool>>::iterator find_managed(const void *p, size_t n) {
    auto found = managed.upper_bound((char *)p);
    if (found == managed.begin() || !on_device(p, n))
        return managed.end();
    --found;
    return (char *)p < found->first + found->second.size() * MANAGED_PIECE ? found : managed.end();
}

// How many of these bytes are on the device.
inline size_t bytes_there(const void *p, size_t n) {
    auto found = find_managed(p, n);
    size_t count = 0;
    if (found == managed.end())
        return 0;
    for (size_t i = ((char *)p - found->first) / MANAGED_PIECE; i * MANAGED_PIECE < (size_t)((char *)p - found->first) + n; i++)
        count += found->second[i] * MANAGED_PIECE;
    return std::min(count, n);
}

inline void move_managed(const void *p, size_t n, bool to_device) {
    auto found = find_managed(p, n);
    for (size_t i = ((char *)p - found->first) / MANAGED_PIECE; i * MANAGED_PIECE < (size_t)((char *)p - found->first) + n; i++) {
        size_t change = found->second[i] != to_device ? MANAGED_PIECE : 0;
        found->second[i] = to_device;
        managed_there += to_device ? change : -change;
        memory_used += to_device ? change : -change;
    }
    managed_most = std::max(managed_most, managed_there);
    if (memory_used > memory_size())
        fail("a prefetch of %zu bytes finds too little memory on the device", n);
}

// When the stream comes here, these bytes have to be on the device: a kernel that follows was meant to find them there.
inline void expect_on_device(Stream *stream, const void *p, size_t n) {
    enqueue(stream, [=] {
        if (bytes_there(p, n) != n)
            fail("%zu bytes at %p are not all on the device when a kernel begins that they were sent for", n, p);
    }, nullptr, false);
}

// Before memory is given back: takes what is known of it off the lists, and returns the bytes of the device that it held.
inline size_t leave_device(char *p, size_t n) {
    auto found = managed.find(p);
    if (found == managed.end())
        return n;
    size_t held = 0;
    for (bool there : found->second)
        held += there * MANAGED_PIECE;
    managed_there -= held;
    managed.erase(found);
    return held;
}

} // namespace cudacpu

inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int device) {
    *value = cudacpu::can_share();
    return cudacpu::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaMallocManaged(void **p, size_t n, unsigned flags = cudaMemAttachGlobal) {
    *p = nullptr;
    if (n == 0 || flags != cudaMemAttachGlobal)
        return cudacpu::result(cudaErrorInvalidValue);
    size_t whole = cudacpu::FRONT + n + cudacpu::BACK;
    char *base = cudacpu::take_memory(whole);
    if (!base)
        return cudacpu::result(cudaErrorMemoryAllocation);
    cudacpu::poison(base, whole);
    *p = base + cudacpu::FRONT;
    cudacpu::memory[(char *)*p] = n;
    cudacpu::managed[(char *)*p] = std::vector<bool>((n + cudacpu::MANAGED_PIECE - 1) / cudacpu::MANAGED_PIECE);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocManaged(T **p, size_t n, unsigned flags = cudaMemAttachGlobal) {
    return cudaMallocManaged((void **)(void *)p, n, flags);
}
inline cudaError_t check_location(const void *p, size_t n, cudaMemLocation location) {
    if (n == 0 || cudacpu::find_managed(p, n) == cudacpu::managed.end())
        return cudacpu::result(cudaErrorInvalidValue);
    if (location.type != cudaMemLocationTypeHost && location.type != cudaMemLocationTypeDevice)
        return cudacpu::result(cudaErrorInvalidValue);
    bool known = location.type == cudaMemLocationTypeHost || (location.id == 0 && cudacpu::can_share());
    return known ? cudaSuccess : cudacpu::result(cudaErrorInvalidDevice);
}
inline cudaError_t cudaMemAdvise(const void *p, size_t n, cudaMemoryAdvise, cudaMemLocation location) {
    return check_location(p, n, location);
}
inline cudaError_t cudaMemPrefetchAsync(const void *p, size_t n, cudaMemLocation location, unsigned flags,
                                        cudaStream_t stream = nullptr) {
    if (flags != 0)
        return cudacpu::result(cudaErrorInvalidValue);
    cudaError_t error = check_location(p, n, location);
    if (error == cudaSuccess)
        cudacpu::enqueue(stream, [=] { cudacpu::move_managed(p, n, location.type == cudaMemLocationTypeDevice); });
    return error;
}

#endif
