// Cross entropy over a tile of logits, gradient in place, with an online softmax (Milakov & Gimelshein 2018,
// arXiv 1805.02867) so that a row is read once for the loss and once more only for the gradient:
//
//   loss = m + log(sum(exp(x - m))) - x[label],  m the largest logit;  correct = the first largest logit is the label's
//   with gradient:  x <- (exp(x - m) / sum - onehot(label)) gradient,  and 0 in rows whose label is negative
//
// logits [t, V] bf16, labels [t, 1] int32 (negative: the row counts nothing), rows [t] of (loss, correct) f32, sums [1, 2]
// f32. A label of V or more is a broken invariant and makes the loss NaN. cross_entropy_sums adds the rows up in f64 and in
// a fixed order. Suffix _8: V is a multiple of 8 and rows are read 16 bytes a thread; suffix _1: any V.
//
// One block a row, and one block a multiprocessor: the rows under way, 256 KB each at V = 128,256, would pass an H100's L2
// if there were two. Each thread keeps its first `kept` vectors in shared memory (all its own: no barrier), the oldest and so
// the first that the L2 would lose; the second pass finds the others there. The first pass reads AHEAD vectors at once and
// those of the next turn before it works on them. Exponentials are powers of 2 of x log2(e) - M with the M that the sum was
// made with, one fused operation each, so that the rounding of M cancels.
#include "rows.cuh"

constexpr int THREADS = 1024;
constexpr int AHEAD = 4;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Below every logit that makes sense, and finite after the change of base: exp2(-inf - M) is 0 where -inf - -inf is NaN.
constexpr float LOWEST = -1e38f;

// N logits as they lie in memory.
template <int N> struct Packed;

template <> struct Packed<8> {
    uint4 bits;

    static __device__ __forceinline__ Packed read(const __nv_bfloat16* p) { return {*reinterpret_cast<const uint4*>(p)}; }
    // For the last time: the L2 may drop it first.
    static __device__ __forceinline__ Packed read_last(const __nv_bfloat16* p) {
        return {__ldcs(reinterpret_cast<const uint4*>(p))};
    }
    // Minus infinity, which adds nothing.
    static __device__ __forceinline__ Packed nothing() {
        return {make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u)};
    }
    __device__ __forceinline__ Lanes<8> lanes() const {
        return load<8>(reinterpret_cast<const __nv_bfloat16*>(&bits));
    }
    // Two logits an instruction.
    __device__ __forceinline__ float max() const {
        const __nv_bfloat162* pair = reinterpret_cast<const __nv_bfloat162*>(&bits);
        const __nv_bfloat162 most = __hmax2(__hmax2(pair[0], pair[1]), __hmax2(pair[2], pair[3]));
        return fmaxf(__low2float(most), __high2float(most));
    }
};

template <> struct Packed<1> {
    __nv_bfloat16 bits;

    static __device__ __forceinline__ Packed read(const __nv_bfloat16* p) { return {*p}; }
    static __device__ __forceinline__ Packed read_last(const __nv_bfloat16* p) { return {*p}; }
    static __device__ __forceinline__ Packed nothing() { return {__ushort_as_bfloat16(0xff80u)}; }
    __device__ __forceinline__ Lanes<1> lanes() const { return {{__bfloat162float(bits)}}; }
    __device__ __forceinline__ float max() const { return __bfloat162float(bits); }
};

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The M of a largest logit. Rounded by itself: fused into a difference, it would not be the M that the sum was made with.
__device__ __forceinline__ float base_of(float max) { return __fmul_rn(max, LOG2_E); }

// Largest logit, largest of those before the label's vector, and the sum of exponentials over that of the largest.
struct Softmax {
    float max;
    float before;
    float sum;
};

__device__ __forceinline__ Softmax join(Softmax a, Softmax b) {
    const float max = fmaxf(a.max, b.max);
    const float base = base_of(max);
    const float of_a = __fmul_rn(a.sum, exp2_approx(base_of(a.max) - base));
    const float of_b = __fmul_rn(b.sum, exp2_approx(base_of(b.max) - base));
    return {max, fmaxf(a.before, b.before), __fadd_rn(of_a, of_b)}; // unfused: the same with a and b exchanged
}

// Every thread gets the same, joined in a fixed order.
__device__ __forceinline__ Softmax join_block(Softmax x) {
    __shared__ Softmax parts[WARP];
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            x = join(x, {__shfl_xor_sync(0xffffffffu, x.max, step), __shfl_xor_sync(0xffffffffu, x.before, step),
                         __shfl_xor_sync(0xffffffffu, x.sum, step)});
        if (pass == 1) break;
        if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
        __syncthreads();
        x = parts[threadIdx.x % WARP]; // there are as many warps as lanes
    }
    return x;
}

template <int N>
__device__ __forceinline__ void one_row(float2* __restrict__ rows, __nv_bfloat16* __restrict__ logits,
                                        const int32_t* __restrict__ labels, int64_t vocab, int with_gradient,
                                        float gradient, int kept) {
    extern __shared__ uint4 shared_memory[];
    Packed<N>* own = reinterpret_cast<Packed<N>*>(shared_memory) + threadIdx.x; // vector i of the thread at i * THREADS
    const int64_t label = labels[blockIdx.x];
    const int vectors = int(vocab / N);
    logits += blockIdx.x * vocab;
    if (label < 0) {
        if (threadIdx.x == 0) rows[blockIdx.x] = {0.f, 0.f};
        if (with_gradient)
            for (int j = threadIdx.x; j < vectors; j += THREADS) store<N>(logits + int64_t(j) * N, Lanes<N>{});
        return;
    }
    const int label_vector = int(label / N);

    Softmax mine = {LOWEST, LOWEST, 0.f};
    Packed<N> next[AHEAD];
    const auto read = [&](int first) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int64_t j = int64_t(first) + u * THREADS;
            next[u] = j < vectors ? Packed<N>::read(logits + j * N) : Packed<N>::nothing();
        }
    };
    read(threadIdx.x);
    for (int first = threadIdx.x, turn = 0; first < vectors; first += AHEAD * THREADS, turn += AHEAD) {
        Packed<N> x[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) x[u] = next[u];
        read(first + AHEAD * THREADS);
        float max = mine.max;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const float most = x[u].max();
            max = fmaxf(max, most);
            if (first + u * THREADS < label_vector) mine.before = fmaxf(mine.before, most);
            if (turn + u < kept) own[(turn + u) * THREADS] = x[u];
        }
        const float base = base_of(max);
        float sums[AHEAD] = {mine.sum * exp2_approx(base_of(mine.max) - base)};
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const Lanes<N> lanes = x[u].lanes();
#pragma unroll
            for (int i = 0; i < N; i++) sums[u] += exp2_approx(fmaf(lanes.v[i], LOG2_E, -base));
        }
        mine = {max, mine.before, (sums[0] + sums[1]) + (sums[2] + sums[3])};
    }
    const Softmax all = join_block(mine);
    const float base = base_of(all.max);
    if (threadIdx.x == 0) {
        const float target = label < vocab ? __bfloat162float(logits[label]) : NAN;
        float before = all.before;
        for (int64_t j = int64_t(label_vector) * N; j < label && j < vocab; j++)
            before = fmaxf(before, __bfloat162float(logits[j]));
        const float lse = base * LN_2 + logf(all.sum);
        rows[blockIdx.x] = {lse - target, target == all.max && before < all.max ? 1.f : 0.f};
    }
    if (!with_gradient) return;
    __syncthreads(); // the label's vector is read before it is overwritten
    const float scale = gradient / all.sum;
    for (int first = threadIdx.x, turn = 0; first < vectors; first += AHEAD * THREADS, turn += AHEAD) {
        Packed<N> x[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int64_t j = int64_t(first) + u * THREADS;
            if (j < vectors) x[u] = turn + u < kept ? own[(turn + u) * THREADS] : Packed<N>::read_last(logits + j * N);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int64_t j = int64_t(first) + u * THREADS;
            if (j >= vectors) continue;
            Lanes<N> lanes = x[u].lanes();
#pragma unroll
            for (int i = 0; i < N; i++) lanes.v[i] = exp2_approx(fmaf(lanes.v[i], LOG2_E, -base)) * scale;
            if (j == label_vector) {
#pragma unroll
                for (int i = 0; i < N; i++)
                    if (i == int(label % N)) lanes.v[i] -= gradient;
            }
            store<N>(logits + j * N, lanes);
        }
    }
}

extern "C" {

__global__ void __launch_bounds__(THREADS)
cross_entropy_8(float2* rows, __nv_bfloat16* logits, const int32_t* labels, int64_t vocab, int with_gradient, float gradient,
                int kept) {
    one_row<8>(rows, logits, labels, vocab, with_gradient, gradient, kept);
}

__global__ void __launch_bounds__(THREADS)
cross_entropy_1(float2* rows, __nv_bfloat16* logits, const int32_t* labels, int64_t vocab, int with_gradient, float gradient,
                int kept) {
    one_row<1>(rows, logits, labels, vocab, with_gradient, gradient, kept);
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
