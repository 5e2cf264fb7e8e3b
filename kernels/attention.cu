// What the attention library leaves to do. It writes one call's gradients of q, k and v in bf16, contiguous, for some heads; and
// a call of many documents wants to read in memory where each lies, and has log-sum-exps as [rows, heads].
//
//   attention_accumulate   to[r, j] += from[r, j] for r < rows, j < d
//   attention_documents    the seven lists of a packed call, from row numbers that come with the launch
//   attention_statistics   packed[r, h] = lse[h, r], or back, for r < rows, h < heads
//
// accumulate: to f32 with `stride` elements between rows (these heads' columns of dq [c, nq d], dk or dv [T, nk d]); from
// [rows, d] bf16. d is a multiple of 8. One thread adds 8 elements.
//
// documents: lists of LIST int64 each, n + 1 of them used: where documents start in q, in k and v, in the log-sum-exps, in dq, in
// dk and dv, in elements; then n queries and n keys of each document as int32, as far apart. One block.
//
// statistics: packed f32, contiguous; lse f32 with `stride` elements between heads.
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

constexpr int MOST_DOCUMENTS = 256;
constexpr int LIST = MOST_DOCUMENTS + 8;

// Rows of the documents of a call, and where all end: in q (and k, which has the same), in the call's own outputs; queries.
struct Documents {
    int32_t start[LIST], place[LIST], length[LIST];
};

extern "C" __global__ void __launch_bounds__(THREADS)
attention_documents(int64_t* lists, Documents documents, int64_t n, int64_t more_keys, int64_t q_stride, int64_t kv_stride,
                    int64_t heads, int64_t dq_stride, int64_t dkv_stride) {
    for (int64_t i = threadIdx.x; i <= n; i += THREADS) {
        const int64_t start = documents.start[i], place = documents.place[i];
        // Behind the last document come its keys' end and not its queries'.
        const int64_t more = i == n ? more_keys : 0;
        lists[i] = start * q_stride;
        lists[LIST + i] = (start + more) * kv_stride;
        lists[2 * LIST + i] = place * heads;
        lists[3 * LIST + i] = place * dq_stride;
        lists[4 * LIST + i] = (place + more) * dkv_stride;
        if (i == n) continue;
        reinterpret_cast<int32_t*>(lists + 5 * LIST)[i] = documents.length[i];
        reinterpret_cast<int32_t*>(lists + 6 * LIST)[i] = int32_t(documents.length[i] + more_keys);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_statistics(float* packed, float* lse, int64_t rows, int64_t heads, int64_t stride, int back) {
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (i >= rows * heads) return;
    const int64_t head = i / rows, row = i - head * rows;
    float* a = packed + row * heads + head;
    float* b = lse + head * stride + row;
    if (back) {
        *b = *a;
    } else {
        *a = *b;
    }
}
