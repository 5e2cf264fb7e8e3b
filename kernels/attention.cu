// What the attention library leaves to do: it writes one call's gradients of q, k and v in bf16, contiguous, for some heads.
//
//   attention_accumulate   to[r, j] += from[r, j] for r < rows, j < d
//
// to f32 with `stride` elements between rows (these heads' columns of dq [c, nq d], dk or dv [T, nk d]); from [rows, d] bf16. d
// is a multiple of 8. One thread adds 8 elements.
#include "rows.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
attention_accumulate(float* to, const __nv_bfloat16* from, int64_t rows, int64_t d, int64_t stride) {
    const int64_t i = (blockIdx.x * int64_t(THREADS) + threadIdx.x) * 8;
    if (i >= rows * d) return;
    const int64_t row = i / d;
    const Lanes<8> x = load<8>(from + i);
    float4* out = reinterpret_cast<float4*>(to + row * stride + (i - row * d));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float4 sum = out[half];
        sum.x += x.v[4 * half];
        sum.y += x.v[4 * half + 1];
        sum.z += x.v[4 * half + 2];
        sum.w += x.v[4 * half + 3];
        out[half] = sum;
    }
}
