// What the attention library leaves to do. It writes one call's gradients of q, k and v in bf16, contiguous, for some heads; and
// calls for packed documents have rows of their own, copied from where the documents lie.
//
//   attention_accumulate        to[r, j] += from[r, j] for r < rows, j < d
//   attention_stage             staged = the tensor's rows, or 0
//   attention_add_staged        the tensor's rows += staged
//   attention_stage_statistics  staged = log-sum-exps, or NOTHING_SEEN
//   attention_merge             sums of attention's output with another part of it: by log-sum-exps a of the sums and b of the
//                               part, sums = (sums e^a + part e^b) / (e^a + e^b); where `first`, sums = part
//   attention_merge_statistics  lse = log(e^a + e^b); where `first`, lse = b
//
// accumulate: to f32 with `stride` elements between rows (these heads' columns of dq [c, nq d], dk or dv [T, nk d]); from
// [rows, d] bf16. d is a multiple of 8. One thread adds 8 elements.
//
// Staged is [documents, groups, rows, width] bf16, `width` being the columns of a group's heads; `n` elements in all. Of
// document i row r is row at[i].first + r of the tensor from at[i].from to before at[i].to, and group g is columns g width and on
// of the tensor, with `stride` elements between rows. Rows outside are 0 when read, and are not written. width and stride are
// multiples of 8. One thread moves 8 elements. The tensor is bf16, where it is added to f32.
//
// Staged log-sum-exps are [documents, groups, heads, rows] f32; head h of group g is row g heads + h of lse [heads of all, stride].
// A thread takes one.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int MOST_STAGED = 64;
// e^(score - this) is 0 for any score.
constexpr float NOTHING_SEEN = 1e30f;

struct Entry {
    int32_t first, from, to;
};

struct Entries {
    Entry at[MOST_STAGED];
};

// Where 8 elements, or a log-sum-exp, of a staged tensor belong.
struct Place {
    bool inside;
    int64_t row;   // of the tensor
    int64_t group; // of the document
    int64_t inner; // column within the group's, or 0
};

__device__ __forceinline__ Place place(const Entries& entries, int64_t i, int64_t rows, int64_t width, int64_t groups) {
    const int64_t line = i / width, r = line % rows, block = line / rows;
    const Entry entry = entries.at[block / groups];
    return {r >= entry.from && r < entry.to, entry.first + r, block % groups, i - line * width};
}

__device__ __forceinline__ int64_t thread_index() { return blockIdx.x * int64_t(THREADS) + threadIdx.x; }

__device__ __forceinline__ void add(float* to, const Lanes<8>& x) {
    float4* out = reinterpret_cast<float4*>(to);
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

extern "C" __global__ void __launch_bounds__(THREADS)
attention_accumulate(float* to, const __nv_bfloat16* from, int64_t rows, int64_t d, int64_t stride) {
    const int64_t i = thread_index() * 8;
    if (i >= rows * d) return;
    const int64_t row = i / d;
    add(to + row * stride + (i - row * d), load<8>(from + i));
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_stage(__nv_bfloat16* staged, const __nv_bfloat16* tensor, Entries entries, int64_t n, int64_t rows, int64_t width,
                int64_t groups, int64_t stride) {
    const int64_t i = thread_index() * 8;
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (p.inside) bits = *reinterpret_cast<const uint4*>(tensor + p.row * stride + p.group * width + p.inner);
    *reinterpret_cast<uint4*>(staged + i) = bits;
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_add_staged(const __nv_bfloat16* staged, float* tensor, Entries entries, int64_t n, int64_t rows, int64_t width,
                     int64_t groups, int64_t stride) {
    const int64_t i = thread_index() * 8;
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    if (p.inside) add(tensor + p.row * stride + p.group * width + p.inner, load<8>(staged + i));
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_stage_statistics(float* staged, const float* lse, Entries entries, int64_t n, int64_t rows, int64_t heads,
                           int64_t groups, int64_t stride) {
    const int64_t i = thread_index();
    if (i >= n) return;
    const Place p = place(entries, i, rows, 1, groups * heads);
    staged[i] = p.inside ? lse[p.group * stride + p.row] : NOTHING_SEEN;
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_merge(const __nv_bfloat16* part, float* sums, const float* part_lse, const float* lse, Entries entries, int64_t n,
                int64_t rows, int64_t width, int64_t d, int64_t groups, int64_t stride, int64_t lse_stride, int first) {
    const int64_t i = thread_index() * 8;
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    if (!p.inside) return;
    Lanes<8> x = load<8>(part + i);
    float* sum = sums + p.row * stride + p.group * width + p.inner;
    if (!first) {
        const int64_t heads = width / d, head = p.inner / d, line = i / width;
        const float a = lse[(p.group * heads + head) * lse_stride + p.row];
        const float b = part_lse[(line / rows * heads + head) * rows + line % rows];
        const float most = fmaxf(a, b), of_sums = expf(a - most), of_part = expf(b - most);
#pragma unroll
        for (int j = 0; j < 8; j++) x.v[j] = (sum[j] * of_sums + x.v[j] * of_part) / (of_sums + of_part);
    }
    float4* out = reinterpret_cast<float4*>(sum);
    out[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    out[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_merge_statistics(const float* part, float* lse, Entries entries, int64_t n, int64_t rows, int64_t heads,
                           int64_t groups, int64_t stride, int first) {
    const int64_t i = thread_index();
    if (i >= n) return;
    const Place p = place(entries, i, rows, 1, groups * heads);
    if (!p.inside) return;
    float* there = lse + p.group * stride + p.row;
    const float b = part[i], a = first ? b : *there;
    const float most = fmaxf(a, b);
    *there = first ? b : most + logf(expf(a - most) + expf(b - most));
}
