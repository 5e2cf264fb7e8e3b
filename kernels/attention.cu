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
// [rows, d] bf16. One thread adds a vector of 8 elements; d, and n of all rows, count vectors.
//
// Staged is [documents, groups, rows, width] bf16, `width` being the columns of a group's heads, and n of all, in vectors of 8. Of
// document i row r is row at[i].first + r of the tensor from at[i].from to before at[i].to, and group g is columns g width and on
// of the tensor, with `stride` elements, a multiple of 8, between rows. Rows outside are 0 when read, and are not written. One
// thread moves a vector. The tensor is bf16, where it is added to f32.
//
// Staged log-sum-exps are [documents, groups, heads, rows] f32, rows a multiple of 4; head h of group g is row g heads + h of lse
// [heads of all, stride]. A thread takes four; n counts these fours.
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

// Where a vector of 8 elements of a staged tensor belongs.
struct Place {
    bool inside;
    int64_t row;    // of the tensor
    uint32_t group; // of the document
    uint32_t inner; // which of the group's vectors in the row
};

// `width` in vectors. Counts of 32 bits: a division of 64 would cost more than moving the vector.
__device__ __forceinline__ Place place(const Entries& entries, uint32_t i, uint32_t rows, uint32_t width, uint32_t groups) {
    const uint32_t line = i / width, block = line / rows, document = block / groups;
    const int32_t r = int32_t(line - block * rows);
    const Entry entry = entries.at[document];
    return {r >= entry.from && r < entry.to, int64_t(entry.first) + r, block - document * groups, i - line * width};
}

// Where four log-sum-exps in turn belong: those of rows r to r + 3 of a document.
struct Fours {
    int64_t row;    // of the first, which may lie outside the tensor
    uint32_t group; // (group, head) of the document
    int32_t r, from, to;

    __device__ __forceinline__ bool inside(int j) const { return r + j >= from && r + j < to; }
};

__device__ __forceinline__ Fours fours(const Entries& entries, uint32_t i, uint32_t rows, uint32_t groups) {
    const uint32_t block = i / (rows / 4), document = block / groups;
    const int32_t r = int32_t((i - block * (rows / 4)) * 4);
    const Entry entry = entries.at[document];
    return {int64_t(entry.first) + r, block - document * groups, r, entry.from, entry.to};
}

__device__ __forceinline__ uint32_t thread_index() { return blockIdx.x * uint32_t(THREADS) + threadIdx.x; }

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
attention_accumulate(float* to, const __nv_bfloat16* from, uint32_t n, uint32_t d, int64_t stride) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const uint32_t row = i / d;
    add(to + row * stride + (i - row * d) * 8, load<8>(from + int64_t(i) * 8));
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_stage(uint4* staged, const __nv_bfloat16* tensor, Entries entries, uint32_t n, uint32_t rows, uint32_t width,
                uint32_t groups, int64_t stride) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (p.inside) bits = *reinterpret_cast<const uint4*>(tensor + p.row * stride + (p.group * width + p.inner) * 8);
    staged[i] = bits;
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_add_staged(const __nv_bfloat16* staged, float* tensor, Entries entries, uint32_t n, uint32_t rows, uint32_t width,
                     uint32_t groups, int64_t stride) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    if (p.inside) add(tensor + p.row * stride + (p.group * width + p.inner) * 8, load<8>(staged + int64_t(i) * 8));
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_stage_statistics(float4* staged, const float* lse, Entries entries, uint32_t n, uint32_t rows, uint32_t heads,
                           uint32_t groups, int64_t stride) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const Fours p = fours(entries, i, rows, groups * heads);
    const float* from = lse + p.group * stride + p.row;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = p.inside(j) ? from[j] : NOTHING_SEEN;
    staged[i] = make_float4(x[0], x[1], x[2], x[3]);
}

// `d` in vectors too.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_merge(const __nv_bfloat16* part, float* sums, const float* part_lse, const float* lse, Entries entries, uint32_t n,
                uint32_t rows, uint32_t width, uint32_t d, uint32_t groups, int64_t stride, int64_t lse_stride, int first) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const Place p = place(entries, i, rows, width, groups);
    if (!p.inside) return;
    Lanes<8> x = load<8>(part + int64_t(i) * 8);
    float4* sum = reinterpret_cast<float4*>(sums + p.row * stride + (p.group * width + p.inner) * 8);
    if (!first) {
        const uint32_t heads = width / d, head = p.inner / d, line = i / width, block = line / rows;
        const float a = lse[(p.group * heads + head) * lse_stride + p.row];
        const float b = part_lse[(block * heads + head) * int64_t(rows) + (line - block * rows)];
        const float most = fmaxf(a, b), of_sums = expf(a - most), of_part = expf(b - most);
        const float both = 1.f / (of_sums + of_part), share = of_sums * both, part_share = of_part * both;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 there = sum[half];
            x.v[4 * half] = there.x * share + x.v[4 * half] * part_share;
            x.v[4 * half + 1] = there.y * share + x.v[4 * half + 1] * part_share;
            x.v[4 * half + 2] = there.z * share + x.v[4 * half + 2] * part_share;
            x.v[4 * half + 3] = there.w * share + x.v[4 * half + 3] * part_share;
        }
    }
    sum[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    sum[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_merge_statistics(const float4* part, float* lse, Entries entries, uint32_t n, uint32_t rows, uint32_t heads,
                           uint32_t groups, int64_t stride, int first) {
    const uint32_t i = thread_index();
    if (i >= n) return;
    const Fours p = fours(entries, i, rows, groups * heads);
    float* there = lse + p.group * stride + p.row;
    const float4 of_part = part[i];
    const float b[4] = {of_part.x, of_part.y, of_part.z, of_part.w};
    float a[4];
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = first || !p.inside(j) ? b[j] : there[j];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float most = fmaxf(a[j], b[j]);
        if (p.inside(j)) there[j] = first ? b[j] : most + logf(expf(a[j] - most) + expf(b[j] - most));
    }
}
