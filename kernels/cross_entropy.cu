// Cross entropy over a tile of logits, gradient in place, with an online softmax (Milakov & Gimelshein 2018,
// arXiv 1805.02867):
//
//   loss = m + log(sum(exp(x - m))) - x[label],  m the largest logit;  correct = the first largest logit is the label's
//   with gradient:  x <- (exp(x - m) / sum - onehot(label)) gradient,  and 0 in rows whose label is negative
//
// logits [t, V] bf16, labels [t, 1] int32 (negative: the row counts nothing), rows [t] of (loss, correct) f32, sums [1, 2]
// f32. A label of V or more is a broken invariant and makes the loss NaN. cross_entropy_sums adds the rows up in f64 and in
// a fixed order. Suffix _8: V is a multiple of 8 and rows are read 16 bytes a thread; suffix _1: any V.
//
// One block a multiprocessor takes every gridDim.x-th row. A row stays on the chip between its two passes: a thread has `slots`
// pairs of vectors in shared memory (all its own: no barrier) and HELD in registers; what is beyond is read again. When this
// row needs a slot no more, the block's next row is copied into it, asynchronously: memory is read while exponentials are taken
// and gradients are written. Exponentials are powers of 2 of x log2(e) - M with the M that the sum was made with, one fused
// operation each, so that the rounding of M cancels.
#include "rows.cuh"

constexpr int THREADS = 1024;
// Slots are waited for in so many groups.
constexpr int GROUPS = 4;
constexpr int HELD = 2;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Below every logit that makes sense, and finite after the change of base: exp2(-inf - M) is 0 where -inf - -inf is NaN.
constexpr float LOWEST = -1e38f;

// N logits as they lie in memory.
template <int N> struct Packed;

template <> struct Packed<8> {
    uint4 bits;

    static __device__ __forceinline__ Packed read(const __nv_bfloat16* p) { return {*reinterpret_cast<const uint4*>(p)}; }
    // Arrives in the slot later: see wait.
    static __device__ __forceinline__ void fetch(Packed* slot, const __nv_bfloat16* p) {
        const uint32_t to = uint32_t(__cvta_generic_to_shared(slot));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
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
    static __device__ __forceinline__ void fetch(Packed* slot, const __nv_bfloat16* p) { slot->bits = *p; }
    static __device__ __forceinline__ Packed nothing() { return {__ushort_as_bfloat16(0xff80u)}; }
    __device__ __forceinline__ Lanes<1> lanes() const { return {{__bfloat162float(bits)}}; }
    __device__ __forceinline__ float max() const { return __bfloat162float(bits); }
};

// Two vectors of a thread, those of turns 2 p and 2 p + 1: a row's vector j is thread j % THREADS's in turn j / THREADS.
template <int N> struct Pair {
    Packed<N> of[2];
};

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The M of a largest logit. Rounded by itself: fused into a difference, it would not be the M that the sum was made with.
__device__ __forceinline__ float base_of(float max) { return __fmul_rn(max, LOG2_E); }

// Largest logit, largest of those before the label, and the sum of exponentials over that of the largest.
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

// Where warps leave what the others need. Rows use two in turn: before one is written again, all have passed a barrier behind
// their last read of it.
struct Board {
    Softmax parts[WARP];
    float target; // the label's logit
};

// Every thread gets the same, joined in a fixed order.
__device__ __forceinline__ Softmax join_block(Softmax x, Board& board) {
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            x = join(x, {__shfl_xor_sync(0xffffffffu, x.max, step), __shfl_xor_sync(0xffffffffu, x.before, step),
                         __shfl_xor_sync(0xffffffffu, x.sum, step)});
        if (pass == 1) break;
        if (threadIdx.x % WARP == 0) board.parts[threadIdx.x / WARP] = x;
        __syncthreads();
        x = board.parts[threadIdx.x % WARP]; // there are as many warps as lanes
    }
    return x;
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than `younger` of the groups are under way.
__device__ __forceinline__ void wait(int younger) {
    switch (younger) { // the instruction takes constants only
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    }
}

// A thread's share of every row.
template <int N> struct Share {
    Packed<N>* own; // slot of turn i at i THREADS
    int slots;      // pairs in shared memory
    int vectors;    // of a row
    int pairs;      // of a thread's, the last ones not whole

    __device__ __forceinline__ int vector(int turn) const { return turn * THREADS + threadIdx.x; }
    __device__ __forceinline__ int first_slot_of(int group) const { return slots * group / GROUPS; }

    __device__ __forceinline__ Pair<N> read(const __nv_bfloat16* row, int pair) const {
        Pair<N> x;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int64_t j = vector(2 * pair + u);
            x.of[u] = j < vectors ? Packed<N>::read(row + j * N) : Packed<N>::nothing();
        }
        return x;
    }
    // The pairs behind the slots.
    __device__ __forceinline__ void hold(Pair<N> (&held)[HELD], const __nv_bfloat16* row) const {
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (slots + i < pairs) held[i] = read(row, slots + i);
    }
    __device__ __forceinline__ Pair<N> kept(int pair) const {
        return {own[2 * pair * THREADS], own[(2 * pair + 1) * THREADS]};
    }
    // Slots behind the end of the rows.
    __device__ __forceinline__ void clear() const {
        for (int turn = 0; turn < 2 * slots; turn++)
            if (vector(turn) >= vectors) own[turn * THREADS] = Packed<N>::nothing();
    }
    __device__ __forceinline__ void fetch(const __nv_bfloat16* row, int pair) const {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int64_t j = vector(2 * pair + u);
            if (j < vectors) Packed<N>::fetch(own + (2 * pair + u) * THREADS, row + j * N);
        }
    }
    // Into all slots, of a row if there is one.
    __device__ __forceinline__ void fetch_all(const __nv_bfloat16* row) const {
        for (int group = 0; group < GROUPS; group++) {
            for (int p = first_slot_of(group); row && p < first_slot_of(group + 1); p++) fetch(row, p);
            end_group();
        }
    }

    __device__ __forceinline__ void add(Softmax& sum, const Pair<N>& x, int pair, int64_t label, Board& board) const {
        float max = sum.max;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int64_t first = int64_t(vector(2 * pair + u)) * N;
            const float most = x.of[u].max();
            max = fmaxf(max, most);
            if (first + N <= label) {
                sum.before = fmaxf(sum.before, most);
            } else if (first <= label) {
                const Lanes<N> lanes = x.of[u].lanes();
#pragma unroll
                for (int i = 0; i < N; i++) {
                    if (first + i < label) sum.before = fmaxf(sum.before, lanes.v[i]);
                    if (first + i == label) board.target = lanes.v[i];
                }
            }
        }
        const float base = base_of(max);
        float sums[2] = {sum.sum * exp2_approx(base_of(sum.max) - base), 0.f};
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const Lanes<N> lanes = x.of[u].lanes();
#pragma unroll
            for (int i = 0; i < N; i++) sums[u] += exp2_approx(fmaf(lanes.v[i], LOG2_E, -base));
        }
        sum.max = max;
        sum.sum = sums[0] + sums[1];
    }

    __device__ __forceinline__ void write_gradient(__nv_bfloat16* row, const Pair<N>& x, int pair, int64_t label, float base,
                                                   float scale, float gradient) const {
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int64_t j = vector(2 * pair + u);
            if (j >= vectors) continue;
            Lanes<N> lanes = x.of[u].lanes();
#pragma unroll
            for (int i = 0; i < N; i++) lanes.v[i] = exp2_approx(fmaf(lanes.v[i], LOG2_E, -base)) * scale;
            const int64_t at = label - j * N;
            if (at >= 0 && at < N) {
#pragma unroll
                for (int i = 0; i < N; i++) lanes.v[i] -= i == at ? gradient : 0.f;
            }
            store<N>(row + j * N, lanes);
        }
    }
};

template <int N>
__device__ __forceinline__ void all_rows(float2* __restrict__ rows, __nv_bfloat16* logits, const int32_t* __restrict__ labels,
                                         int64_t t, int64_t vocab, bool with_gradient, float gradient, int slots) {
    extern __shared__ uint4 shared_memory[];
    __shared__ Board boards[2];
    const int vectors = int(vocab / N), pairs = (vectors + 2 * THREADS - 1) / (2 * THREADS);
    const Share<N> mine = {reinterpret_cast<Packed<N>*>(shared_memory) + threadIdx.x, slots, vectors, pairs};
    mine.clear();
    int64_t label = labels[blockIdx.x];
    mine.fetch_all(label < 0 ? nullptr : logits + blockIdx.x * vocab);
    Pair<N> held[HELD];
    mine.hold(held, logits + blockIdx.x * vocab);
    int turn = 0;
    for (int64_t r = blockIdx.x; r < t; r += gridDim.x, turn ^= 1) {
        __nv_bfloat16* const row = logits + r * vocab;
        const int64_t next_label = r + gridDim.x < t ? labels[r + gridDim.x] : -1;
        const __nv_bfloat16* const next = next_label < 0 ? nullptr : row + gridDim.x * vocab;
        const int64_t this_label = label;
        label = next_label;
        if (this_label < 0) {
            if (threadIdx.x == 0) rows[r] = {0.f, 0.f};
            for (int64_t j = threadIdx.x; with_gradient && j < vectors; j += THREADS)
                store<N>(row + j * N, Lanes<N>{});
            mine.fetch_all(next);
            if (next) mine.hold(held, next);
            continue;
        }
        Board& board = boards[turn];
        Softmax sum = {LOWEST, LOWEST, 0.f};
        for (int p = slots + HELD; p < pairs; p++) mine.add(sum, mine.read(row, p), p, this_label, board);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (slots + i < pairs) mine.add(sum, held[i], slots + i, this_label, board);
        if (!with_gradient && next) mine.hold(held, next);
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++) {
            // Without a gradient this row's groups are followed by the next one's as they are used up.
            wait(with_gradient ? GROUPS - 1 - group : GROUPS - 1);
            for (int p = mine.first_slot_of(group); p < mine.first_slot_of(group + 1); p++) {
                mine.add(sum, mine.kept(p), p, this_label, board);
                if (!with_gradient && next) mine.fetch(next, p);
            }
            if (!with_gradient) end_group();
        }
        const Softmax all = join_block(sum, board);
        const float base = base_of(all.max);
        if (threadIdx.x == 0) {
            const float target = this_label < vocab ? board.target : NAN;
            const float lse = base * LN_2 + logf(all.sum);
            rows[r] = {lse - target, target == all.max && all.before < all.max ? 1.f : 0.f};
        }
        if (!with_gradient) continue;
        const float scale = gradient / all.sum;
        const auto write = [&](const Pair<N>& x, int pair) {
            mine.write_gradient(row, x, pair, this_label, base, scale, gradient);
        };
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++) {
            for (int p = mine.first_slot_of(group); p < mine.first_slot_of(group + 1); p++) {
                write(mine.kept(p), p);
                if (next) mine.fetch(next, p);
            }
            end_group();
        }
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (slots + i < pairs) write(held[i], slots + i);
        if (next) mine.hold(held, next);
        for (int p = slots + HELD; p < pairs; p++) write(mine.read(row, p), p);
    }
}

extern "C" {

__global__ void __launch_bounds__(THREADS)
cross_entropy_8(float2* rows, __nv_bfloat16* logits, const int32_t* labels, int64_t t, int64_t vocab, int with_gradient,
                float gradient, int slots) {
    all_rows<8>(rows, logits, labels, t, vocab, with_gradient, gradient, slots);
}

__global__ void __launch_bounds__(THREADS)
cross_entropy_1(float2* rows, __nv_bfloat16* logits, const int32_t* labels, int64_t t, int64_t vocab, int with_gradient,
                float gradient, int slots) {
    all_rows<1>(rows, logits, labels, t, vocab, with_gradient, gradient, slots);
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
