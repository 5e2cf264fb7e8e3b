// RMSNorm and its backward (Zhang & Sennrich 2019, arXiv 1910.07467), by row of h elements, r = 1 / sqrt(mean(x^2) + eps):
//
//   rmsnorm            y = x r w
//   rmsnorm_backward   dx += r (dy w - x r^2 dot / h),  dot = sum(dy w x)
//                      dw += sum over rows of dy x r, in two stages so that its bits do not depend on scheduling:
//                      block b sums rows b, b + blocks, ... into partials[b, :]; rmsnorm_gain adds the partials in order.
//
// x, y, dy, dx [n, h] and w [1, h] bf16; dw [1, h] and partials [blocks, h] f32. Suffix _8: h is a multiple of 8 and rows
// are read 16 bytes a thread; suffix _1: any h. One block of 256 threads a row; the second pass over a row hits the L1.
#include "rows.cuh"

constexpr int THREADS = 256;

template <int N>
__device__ __forceinline__ void forward(__nv_bfloat16* __restrict__ y, const __nv_bfloat16* __restrict__ x,
                                        const __nv_bfloat16* __restrict__ w, int64_t h, float eps) {
    x += blockIdx.x * h;
    y += blockIdx.x * h;
    float2 sum = {0.f, 0.f};
    for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N) {
        const Lanes<N> a = load<N>(x + j);
#pragma unroll
        for (int i = 0; i < N; i++) sum.x += a.v[i] * a.v[i];
    }
    const float r = rsqrtf(block_sum(sum).x / h + eps);
    for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N) {
        Lanes<N> a = load<N>(x + j);
        const Lanes<N> gain = load<N>(w + j);
#pragma unroll
        for (int i = 0; i < N; i++) a.v[i] *= r * gain.v[i];
        store<N>(y + j, a);
    }
}

template <int N>
__device__ __forceinline__ void backward(__nv_bfloat16* __restrict__ dx, float* __restrict__ partials,
                                         const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ x,
                                         const __nv_bfloat16* __restrict__ w, int64_t n, int64_t h, float eps) {
    // Each thread adds into columns of its own, so the block's sums of dw need no barrier.
    extern __shared__ float gain_sums[];
    for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N)
#pragma unroll
        for (int i = 0; i < N; i++) gain_sums[j + i] = 0.f;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const __nv_bfloat16 *xr = x + row * h, *dyr = dy + row * h;
        __nv_bfloat16* dxr = dx + row * h;
        float2 sums = {0.f, 0.f};
        for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N) {
            const Lanes<N> a = load<N>(xr + j), g = load<N>(dyr + j), gain = load<N>(w + j);
#pragma unroll
            for (int i = 0; i < N; i++) {
                sums.x += a.v[i] * a.v[i];
                sums.y += g.v[i] * gain.v[i] * a.v[i];
            }
        }
        sums = block_sum(sums);
        const float r = rsqrtf(sums.x / h + eps);
        const float pull = sums.y * r * r / h;
        for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N) {
            const Lanes<N> a = load<N>(xr + j), g = load<N>(dyr + j), gain = load<N>(w + j);
            Lanes<N> out = load<N>(dxr + j);
#pragma unroll
            for (int i = 0; i < N; i++) {
                gain_sums[j + i] += g.v[i] * a.v[i] * r;
                out.v[i] += r * (g.v[i] * gain.v[i] - a.v[i] * pull);
            }
            store<N>(dxr + j, out);
        }
    }
    for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N)
#pragma unroll
        for (int i = 0; i < N; i++) partials[blockIdx.x * h + j + i] = gain_sums[j + i];
}

extern "C" {

__global__ void __launch_bounds__(THREADS) rmsnorm_8(__nv_bfloat16* y, const __nv_bfloat16* x, const __nv_bfloat16* w,
                                                     int64_t h, float eps) {
    forward<8>(y, x, w, h, eps);
}

__global__ void __launch_bounds__(THREADS) rmsnorm_1(__nv_bfloat16* y, const __nv_bfloat16* x, const __nv_bfloat16* w,
                                                     int64_t h, float eps) {
    forward<1>(y, x, w, h, eps);
}

__global__ void __launch_bounds__(THREADS)
rmsnorm_backward_8(__nv_bfloat16* dx, float* partials, const __nv_bfloat16* dy, const __nv_bfloat16* x,
                   const __nv_bfloat16* w, int64_t n, int64_t h, float eps) {
    backward<8>(dx, partials, dy, x, w, n, h, eps);
}

__global__ void __launch_bounds__(THREADS)
rmsnorm_backward_1(__nv_bfloat16* dx, float* partials, const __nv_bfloat16* dy, const __nv_bfloat16* x,
                   const __nv_bfloat16* w, int64_t n, int64_t h, float eps) {
    backward<1>(dx, partials, dy, x, w, n, h, eps);
}

// dw[j] += sum of partials[:, j]: 32 columns a block, 8 groups of rows a column, groups added in order.
__global__ void __launch_bounds__(THREADS) rmsnorm_gain(float* dw, const float* partials, int64_t blocks, int64_t h) {
    constexpr int GROUPS = THREADS / WARP;
    __shared__ float groups[GROUPS][WARP];
    const int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
    const int64_t j = blockIdx.x * int64_t(WARP) + lane;
    float sum = 0.f;
    if (j < h)
        for (int64_t b = group; b < blocks; b += GROUPS) sum += partials[b * h + j];
    groups[group][lane] = sum;
    __syncthreads();
    if (group == 0 && j < h) {
        for (int g = 1; g < GROUPS; g++) sum += groups[g][lane];
        dw[j] += sum;
    }
}

} // extern "C"
