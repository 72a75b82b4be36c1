// cuda_bf16.h, the look-alike: bfloat16, the upper half of a float, for the kernels that dev/emulator runs on the CPU.
// Nothing is converted silently, which nvcc's own header would do.

#ifndef CUDACPU_CUDA_BF16_H
#define CUDACPU_CUDA_BF16_H

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    unsigned short x;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 b) {
    return __uint_as_float((unsigned)b.x << 16);
}

// To nearest, ties to even: adds half of what is cut off, less one bit where the last one kept is 0.
inline __nv_bfloat16 __float2bfloat16(float f) {
    unsigned bits = __float_as_uint(f);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        volatile float quiet = f; // a signalling NaN traps here: it must not become a quiet one unseen
        quiet = quiet + 0;
        return {0x7fff};
    }
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    return __float2bfloat16(f);
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return {x, y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 b) {
    return {__bfloat162float(b.x), __bfloat162float(b.y)};
}
inline float __low2float(__nv_bfloat162 b) {
    return __bfloat162float(b.x);
}
inline float __high2float(__nv_bfloat162 b) {
    return __bfloat162float(b.y);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) {
    return b.x;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
    return {x};
}

#endif
