// Fills, casts, sums and squares over flat arrays of n elements, and the clipping factor:
//
//   fill_words, _halves  x = bits, for elements of 4 bytes (f32, int32) and of 2 (bf16, uint16)
//   cast                 to = from, bf16 to f32 or f32 to bf16 (to nearest even)
//   accumulate           to += from, each f32 or bf16, added in f32 and rounded once
//   sum_squares          partials[b] = the sum of x^2 over the tiles of block b; at most 32 squares are added in f32, the
//                        rest in f64. The number of blocks is constant, so the order depends on n alone.
//   sum_squares_total    sum[0] += partials, added in f64 in a fixed order
//   clip_scale           scale[0] = min(1, max_norm / (sqrt(sum[0]) + 1e-6)), or 1 when max_norm is 0
//
// to_wide, from_wide, wide: 1 when that array is f32, 0 when it is bf16. sum, scale f32 [1, 1]; partials f64 [blocks].
// Suffix _4: vectors of 4 elements, addresses are multiples of 16 bytes (f32) or 8 (bf16); suffix _1: any address.
#include "flat.cuh"

constexpr int THREADS = 256;
// Blocks of sum_squares; sum_squares_total has a thread for each.
constexpr int BLOCKS = 512;

// The value of the calling block's threads added up in thread 0, pairwise. Threads is the number of threads, a power of 2.
template <int Threads> __device__ __forceinline__ double block_total(double x) {
    __shared__ double parts[Threads];
    parts[threadIdx.x] = x;
#pragma unroll
    for (int half = Threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    return parts[0];
}

template <int N, class To, class From>
__device__ __forceinline__ void cast(To* __restrict__ to, const From* __restrict__ from, int64_t n) {
    walk<N, 4>(
        n, [&]<int M>(int64_t i) { return load<M>(from + i); },
        [&]<int M>(int64_t i, const Lanes<M>& x) { store<M>(to + i, x); });
}

template <int N> __device__ __forceinline__ void any_cast(void* to, const void* from, int64_t n, int to_wide) {
    if (to_wide)
        cast<N>(static_cast<float*>(to), static_cast<const __nv_bfloat16*>(from), n);
    else
        cast<N>(static_cast<__nv_bfloat16*>(to), static_cast<const float*>(from), n);
}

template <int N, class To, class From>
__device__ __forceinline__ void accumulate(To* __restrict__ to, const From* __restrict__ from, int64_t n) {
    walk<N, 4>(
        n,
        [&]<int M>(int64_t i) {
            Lanes<M> sum = load<M>(to + i);
            const Lanes<M> x = load<M>(from + i);
#pragma unroll
            for (int k = 0; k < M; k++) sum.v[k] += x.v[k];
            return sum;
        },
        [&]<int M>(int64_t i, const Lanes<M>& sum) { store<M>(to + i, sum); });
}

template <int N, class To>
__device__ __forceinline__ void accumulate_to(To* to, const void* from, int64_t n, int from_wide) {
    if (from_wide)
        accumulate<N>(to, static_cast<const float*>(from), n);
    else
        accumulate<N>(to, static_cast<const __nv_bfloat16*>(from), n);
}

template <int N>
__device__ __forceinline__ void any_accumulate(void* to, const void* from, int64_t n, int to_wide, int from_wide) {
    if (to_wide)
        accumulate_to<N>(static_cast<float*>(to), from, n, from_wide);
    else
        accumulate_to<N>(static_cast<__nv_bfloat16*>(to), from, n, from_wide);
}

template <int N, class X> __device__ __forceinline__ void sum_squares(double* partials, const X* __restrict__ x, int64_t n) {
    // U vectors are added in f32 before they join the f64 sum, which keeps f64 out of the way of the loads.
    constexpr int U = 8;
    double total = 0.0;
    float sum = 0.f;
    int added = 0;
    walk<N, U>(
        n, [&]<int M>(int64_t i) { return load<M>(x + i); },
        [&]<int M>(int64_t, const Lanes<M>& a) {
#pragma unroll
            for (int k = 0; k < M; k++) sum += a.v[k] * a.v[k];
            if (++added == U) {
                total += sum;
                sum = 0.f;
                added = 0;
            }
        });
    total = block_total<THREADS>(total + sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

extern "C" {

__global__ void __launch_bounds__(THREADS) fill_words(uint32_t* x, int64_t n, int bits) {
    for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < n; i += gridDim.x * int64_t(THREADS)) x[i] = bits;
}

__global__ void __launch_bounds__(THREADS) fill_halves(uint16_t* x, int64_t n, int bits) {
    for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < n; i += gridDim.x * int64_t(THREADS)) x[i] = bits;
}

__global__ void __launch_bounds__(THREADS) cast_4(void* to, const void* from, int64_t n, int to_wide) {
    any_cast<4>(to, from, n, to_wide);
}

__global__ void __launch_bounds__(THREADS) cast_1(void* to, const void* from, int64_t n, int to_wide) {
    any_cast<1>(to, from, n, to_wide);
}

__global__ void __launch_bounds__(THREADS)
accumulate_4(void* to, const void* from, int64_t n, int to_wide, int from_wide) {
    any_accumulate<4>(to, from, n, to_wide, from_wide);
}

__global__ void __launch_bounds__(THREADS)
accumulate_1(void* to, const void* from, int64_t n, int to_wide, int from_wide) {
    any_accumulate<1>(to, from, n, to_wide, from_wide);
}

__global__ void __launch_bounds__(THREADS) sum_squares_4(double* partials, const void* x, int64_t n, int wide) {
    if (wide)
        sum_squares<4>(partials, static_cast<const float*>(x), n);
    else
        sum_squares<4>(partials, static_cast<const __nv_bfloat16*>(x), n);
}

__global__ void __launch_bounds__(THREADS) sum_squares_1(double* partials, const void* x, int64_t n, int wide) {
    if (wide)
        sum_squares<1>(partials, static_cast<const float*>(x), n);
    else
        sum_squares<1>(partials, static_cast<const __nv_bfloat16*>(x), n);
}

__global__ void __launch_bounds__(BLOCKS) sum_squares_total(float* sum, const double* partials) {
    const double total = block_total<BLOCKS>(partials[threadIdx.x]);
    if (threadIdx.x == 0) sum[0] += float(total);
}

__global__ void __launch_bounds__(WARP) clip_scale(float* scale, const float* sum, double max_norm) {
    if (threadIdx.x > 0) return;
    scale[0] = max_norm == 0.0 ? 1.f : float(fmin(1.0, max_norm / (sqrt(double(sum[0])) + 1e-6)));
}

} // extern "C"
