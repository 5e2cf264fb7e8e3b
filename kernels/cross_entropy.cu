// Cross entropy over a tile of logits, gradient in place, with an online softmax (Milakov & Gimelshein 2018,
// arXiv 1805.02867) so that a row is read once for the loss and once more only for the gradient:
//
//   loss = m + log(sum(exp(x - m))) - x[label],  m the largest logit;  correct = the first largest logit is the label's
//   with gradient:  x <- (exp(x - m) / sum - onehot(label)) gradient,  and 0 in rows whose label is negative
//
// logits [t, V] bf16, labels [t, 1] int32 (negative: the row counts nothing), rows [t] of (loss, correct) f32, sums [1, 2]
// f32. A label of V or more is a broken invariant and makes the loss NaN. cross_entropy_sums adds the rows up in f64 and in
// a fixed order. Suffix _8: V is a multiple of 8 and rows are read 16 bytes a thread; suffix _1: any V. One block a row.
#include "rows.cuh"

constexpr int THREADS = 1024;

// Running maximum with the place of its first occurrence, and the sum of exponentials relative to it.
struct Softmax {
    float max;
    float sum;
    int at;
};

// Below every finite bf16, and finite: exp(-inf - LOWEST) is 0 where exp(-inf - -inf) would be NaN.
constexpr float LOWEST = -3.4028235e38f;

__device__ __forceinline__ Softmax join(Softmax a, Softmax b) {
    const float max = fmaxf(a.max, b.max);
    const float sum = a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max);
    const bool first = a.max > b.max || (a.max == b.max && a.at < b.at);
    return {max, sum, first ? a.at : b.at};
}

__device__ __forceinline__ Softmax join_block(Softmax x) {
    __shared__ Softmax parts[WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const Softmax other = {__shfl_xor_sync(0xffffffffu, x.max, step), __shfl_xor_sync(0xffffffffu, x.sum, step),
                               __shfl_xor_sync(0xffffffffu, x.at, step)};
        x = join(x, other);
    }
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    Softmax all = parts[0];
    for (int i = 1; i < THREADS / WARP; i++) all = join(all, parts[i]);
    return all;
}

template <int N>
__device__ __forceinline__ void one_row(float2* __restrict__ rows, __nv_bfloat16* __restrict__ logits,
                                        const int32_t* __restrict__ labels, int64_t vocab, int with_gradient,
                                        float gradient) {
    const int64_t label = labels[blockIdx.x];
    logits += blockIdx.x * vocab;
    if (label < 0) {
        if (threadIdx.x == 0) rows[blockIdx.x] = {0.f, 0.f};
        if (with_gradient)
            for (int64_t j = threadIdx.x * N; j < vocab; j += THREADS * N) store<N>(logits + j, Lanes<N>{});
        return;
    }
    Softmax mine = {LOWEST, 0.f, int(vocab)};
    for (int64_t j = threadIdx.x * N; j < vocab; j += THREADS * N) {
        const Lanes<N> x = load<N>(logits + j);
        float max = x.v[0];
#pragma unroll
        for (int i = 1; i < N; i++) max = fmaxf(max, x.v[i]);
        if (max > mine.max) {
            mine.sum *= __expf(mine.max - max);
            mine.max = max;
            int first = 0;
#pragma unroll
            for (int i = N - 1; i >= 0; i--)
                if (x.v[i] == max) first = i;
            mine.at = int(j) + first;
        }
#pragma unroll
        for (int i = 0; i < N; i++) mine.sum += __expf(x.v[i] - mine.max);
    }
    const Softmax all = join_block(mine);
    const bool valid = label < vocab;
    const float target = valid ? __bfloat162float(logits[label]) : NAN;
    if (threadIdx.x == 0) rows[blockIdx.x] = {logf(all.sum) + all.max - target, all.at == label ? 1.f : 0.f};
    if (!with_gradient) return;
    __syncthreads(); // the target is read before its logit is overwritten
    const float scale = gradient / all.sum;
    for (int64_t j = threadIdx.x * N; j < vocab; j += THREADS * N) {
        Lanes<N> x = load<N>(logits + j);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float p = __expf(x.v[i] - all.max) * scale;
            x.v[i] = j + i == label ? p - gradient : p;
        }
        store<N>(logits + j, x);
    }
}

extern "C" {

__global__ void __launch_bounds__(THREADS) cross_entropy_8(float2* rows, __nv_bfloat16* logits, const int32_t* labels,
                                                           int64_t vocab, int with_gradient, float gradient) {
    one_row<8>(rows, logits, labels, vocab, with_gradient, gradient);
}

__global__ void __launch_bounds__(THREADS) cross_entropy_1(float2* rows, __nv_bfloat16* logits, const int32_t* labels,
                                                           int64_t vocab, int with_gradient, float gradient) {
    one_row<1>(rows, logits, labels, vocab, with_gradient, gradient);
}

// sums[0] += losses, sums[1] += right guesses of t rows. One block.
__global__ void __launch_bounds__(THREADS) cross_entropy_sums(float* sums, const float2* rows, int64_t t) {
    __shared__ double2 parts[THREADS];
    double2 sum = {0.0, 0.0};
    for (int64_t i = threadIdx.x; i < t; i += THREADS) {
        const float2 row = rows[i];
        sum.x += row.x;
        sum.y += row.y;
    }
    parts[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            parts[threadIdx.x].x += parts[threadIdx.x + half].x;
            parts[threadIdx.x].y += parts[threadIdx.x + half].y;
        }
    }
    if (threadIdx.x == 0) {
        sums[0] += float(parts[0].x);
        sums[1] += float(parts[0].y);
    }
}

} // extern "C"
