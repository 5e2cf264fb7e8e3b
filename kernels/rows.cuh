// What the row kernels share: bf16 vectors of 16 bytes with their f32 values, and sums over a block in a fixed order.
// Storage is bf16; every sum and every intermediate is f32, rounded once (to nearest even) on the way out.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

constexpr int WARP = 32;

// N consecutive bf16 elements as f32. N is 8 (one 16-byte access; rows must be multiples of 16 bytes) or 1.
template <int N> struct Lanes {
    float v[N];
};

template <int N> __device__ __forceinline__ Lanes<N> load(const __nv_bfloat16* p);

template <> __device__ __forceinline__ Lanes<1> load<1>(const __nv_bfloat16* p) {
    return {{__bfloat162float(*p)}};
}

template <> __device__ __forceinline__ Lanes<8> load<8>(const __nv_bfloat16* p) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    Lanes<8> out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // A bf16 is the high half of an f32.
        out.v[2 * i] = __uint_as_float(words[i] << 16);
        out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return out;
}

template <int N> __device__ __forceinline__ void store(__nv_bfloat16* p, const Lanes<N>& x);

template <> __device__ __forceinline__ void store<1>(__nv_bfloat16* p, const Lanes<1>& x) {
    *p = __float2bfloat16_rn(x.v[0]);
}

template <> __device__ __forceinline__ void store<8>(__nv_bfloat16* p, const Lanes<8>& x) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Sums of two values over the block, the same in every thread. Fixed order: tree within warps, then warps in order.
// Every thread of the block must call it; blockDim.x is a multiple of 32 and at most 1024.
__device__ __forceinline__ float2 block_sum(float2 x) {
    __shared__ float2 parts[WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x.x += __shfl_xor_sync(0xffffffffu, x.x, step);
        x.y += __shfl_xor_sync(0xffffffffu, x.y, step);
    }
    __syncthreads(); // the last call's readers are done with parts
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float2 sum = parts[0];
    for (int i = 1; i < blockDim.x / WARP; i++) {
        sum.x += parts[i].x;
        sum.y += parts[i].y;
    }
    return sum;
}
