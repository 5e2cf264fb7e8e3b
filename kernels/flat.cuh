// What the kernels over flat arrays share: N consecutive elements of bf16 or f32 as f32, and a walk over an array whose
// reads of several vectors are under way before the first is used. N is 8 or 4 (f32 in vectors of 16 bytes, 4 bf16 in
// vectors of 8; addresses are multiples of the vector) or 1 (any address).
#pragma once

#include "rows.cuh"

template <> __device__ __forceinline__ Lanes<4> load<4>(const __nv_bfloat16* p) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    return {{__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
             __uint_as_float(bits.y & 0xffff0000u)}};
}

template <> __device__ __forceinline__ void store<4>(__nv_bfloat16* p, const Lanes<4>& x) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.v[0], x.v[1]), high = __floats2bfloat162_rn(x.v[2], x.v[3]);
    *reinterpret_cast<uint2*>(p) =
        make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

template <int N> __device__ __forceinline__ Lanes<N> load(const float* p) {
    Lanes<N> out;
    if constexpr (N == 1) {
        out.v[0] = *p;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 x = *reinterpret_cast<const float4*>(p + i);
            out.v[i] = x.x, out.v[i + 1] = x.y, out.v[i + 2] = x.z, out.v[i + 3] = x.w;
        }
    }
    return out;
}

template <int N> __device__ __forceinline__ void store(float* p, const Lanes<N>& x) {
    if constexpr (N == 1) {
        *p = x.v[0];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            *reinterpret_cast<float4*>(p + i) = make_float4(x.v[i], x.v[i + 1], x.v[i + 2], x.v[i + 3]);
    }
}

// use<N>(i, read<N>(i)) for every vector of N elements of n, and for what is left behind the last vector with N = 1.
// Tiles of blockDim.x * U vectors go around the blocks; a thread reads U vectors before it uses them.
template <int N, int U, class Read, class Use>
__device__ __forceinline__ void walk(int64_t n, const Read& read, const Use& use) {
    const int64_t vectors = n / N, tile = int64_t(blockDim.x) * U;
    for (int64_t first = blockIdx.x * tile + threadIdx.x; first < vectors; first += gridDim.x * tile) {
        Lanes<N> x[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int64_t i = first + u * int64_t(blockDim.x);
            if (i < vectors) x[u] = read.template operator()<N>(i * N);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int64_t i = first + u * int64_t(blockDim.x);
            if (i < vectors) use.template operator()<N>(i * N, x[u]);
        }
    }
    if constexpr (N > 1) {
        const int64_t i = vectors * N + threadIdx.x;
        if (blockIdx.x == 0 && i < n) use.template operator()<1>(i, read.template operator()<1>(i));
    }
}
