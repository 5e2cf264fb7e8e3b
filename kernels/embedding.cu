// Embedding look-up and its backward, whose sums have an order: that of the tokens.
//
//   embedding            x[i] = table[ids[i]]; an id outside 0..V is a broken invariant and makes its row NaN
//   embedding_backward   dtable[ids[i]] += dx[i] for i in order, on the pairs (id, i) of a piece of the tokens, sorted by id
//
// x, dx [n, h], table [V, h] bf16, dtable [V, h] f32, ids [n, 1] int32. A pair is 64 bits, id << 32 | i, and ids outside 0..V
// become V, which no row has. The sort is by digits of 8 bits of the id, the lowest first, each pass stable: embedding_count
// counts the digits of every tile of pairs into counts [256, tiles], embedding_scan turns counts into the place of each
// tile's first pair of each digit, embedding_place moves the pairs. Only integers are added atomically.
//
// embedding_8: h is a multiple of 8; embedding_backward_2: h is a multiple of 2; suffix _1: any h.
#include "rows.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int DIGITS = 256; // one for each thread of a block
constexpr int ROUNDS = 8;
constexpr int TILE = THREADS * ROUNDS;
constexpr int SCAN_THREADS = 1024;
constexpr unsigned ALL = 0xffffffffu;

template <int N>
__device__ __forceinline__ void look_up(__nv_bfloat16* __restrict__ x, const int32_t* __restrict__ ids,
                                        const __nv_bfloat16* __restrict__ table, int64_t vocab, int64_t h) {
    const int64_t id = ids[blockIdx.x];
    const bool valid = id >= 0 && id < vocab;
    x += blockIdx.x * h;
    table += (valid ? id : 0) * h;
    for (int64_t j = threadIdx.x * N; j < h; j += THREADS * N) {
        Lanes<N> row = load<N>(table + j);
        if (!valid)
            for (int i = 0; i < N; i++) row.v[i] = NAN;
        store<N>(x + j, row);
    }
}

__device__ __forceinline__ uint32_t id_of(uint64_t pair) { return uint32_t(pair >> 32); }

__device__ __forceinline__ uint32_t digit_of(uint64_t pair, int shift) { return id_of(pair) >> shift & (DIGITS - 1); }

// The sums of one word's elements, in one access.
template <int N> struct alignas(4 * N) Sums {
    float v[N];
};

// One warp for each run of equal ids and slice of WARP words: the run's rows are added to dtable's in order. A word is N
// elements of a row, one access. What lies ahead of the additions, the words of 16 rows, is read together.
template <int N, class Word>
__device__ __forceinline__ void add_runs(float* __restrict__ dtable, const Word* __restrict__ dx,
                                         const uint64_t* __restrict__ pairs, int64_t n, int64_t vocab, int64_t words,
                                         int64_t blocks_of_a_row) {
    constexpr int AHEAD = 16;
    const int lane = threadIdx.x % WARP;
    int64_t at = blockIdx.x / blocks_of_a_row;
    const uint32_t id = id_of(pairs[at]);
    if (id >= vocab || (at > 0 && id_of(pairs[at - 1]) == id)) return;
    const int64_t slice = blockIdx.x % blocks_of_a_row * WARPS + threadIdx.x / WARP;
    if (slice * WARP >= words) return;
    const int64_t word = slice * WARP + lane;
    const bool inside = word < words;
    Sums<N>* to = reinterpret_cast<Sums<N>*>(dtable) + id * words + word;
    dx += word;
    Sums<N> sum = {};
    if (inside) sum = *to;
    uint64_t pair = at + lane < n ? pairs[at + lane] : ~0ull;
    for (;;) {
        // Pairs are sorted, so those of the run are the first of the warp's.
        const int rows = __popc(__ballot_sync(ALL, id_of(pair) == id));
        const uint32_t row = uint32_t(pair);
        at += WARP;
        pair = at + lane < n ? pairs[at + lane] : ~0ull;
        for (int start = 0; start < rows; start += AHEAD) {
            Word values[AHEAD];
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                const int64_t from = __shfl_sync(ALL, row, start + r);
                if (start + r < rows && inside) values[r] = dx[from * words];
            }
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                if (start + r >= rows) continue;
#pragma unroll
                for (int k = 0; k < N; k++) sum.v[k] += __uint_as_float(uint32_t(values[r] >> 16 * k) << 16);
            }
        }
        if (rows < WARP) break;
    }
    if (inside) *to = sum;
}

extern "C" {

__global__ void __launch_bounds__(THREADS)
embedding_8(__nv_bfloat16* x, const int32_t* ids, const __nv_bfloat16* table, int64_t vocab, int64_t h) {
    look_up<8>(x, ids, table, vocab, h);
}

__global__ void __launch_bounds__(THREADS)
embedding_1(__nv_bfloat16* x, const int32_t* ids, const __nv_bfloat16* table, int64_t vocab, int64_t h) {
    look_up<1>(x, ids, table, vocab, h);
}

__global__ void __launch_bounds__(THREADS)
embedding_pairs(uint64_t* pairs, const int32_t* ids, int64_t n, int64_t vocab) {
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (i >= n) return;
    const int64_t id = ids[i];
    pairs[i] = uint64_t(id >= 0 && id < vocab ? id : vocab) << 32 | uint64_t(i);
}

// counts[digit, tile] of the tile of the block.
__global__ void __launch_bounds__(THREADS)
embedding_count(uint32_t* counts, const uint64_t* pairs, int64_t n, int shift) {
    __shared__ uint32_t bins[DIGITS];
    bins[threadIdx.x] = 0;
    __syncthreads();
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t i = blockIdx.x * int64_t(TILE) + round * THREADS + threadIdx.x;
        if (i < n) atomicAdd(&bins[digit_of(pairs[i], shift)], 1u);
    }
    __syncthreads();
    counts[threadIdx.x * int64_t(gridDim.x) + blockIdx.x] = bins[threadIdx.x];
}

// counts[i] <- the sum of all before it. One block.
__global__ void __launch_bounds__(SCAN_THREADS) embedding_scan(uint32_t* counts, int64_t n) {
    __shared__ uint32_t totals[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t before = 0;
    for (int64_t first = 0; first < n; first += SCAN_THREADS) {
        const int64_t i = first + threadIdx.x;
        const uint32_t own = i < n ? counts[i] : 0;
        uint32_t sum = own;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const uint32_t other = __shfl_up_sync(ALL, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == WARP - 1) totals[warp] = sum;
        __syncthreads();
        uint32_t warps_before = 0, all = 0;
        for (int w = 0; w < SCAN_THREADS / WARP; w++) {
            if (w < warp) warps_before += totals[w];
            all += totals[w];
        }
        if (i < n) counts[i] = before + warps_before + sum - own;
        before += all;
        __syncthreads(); // totals are read before the next round writes them
    }
}

// Moves the pairs of the block's tile to their places, pairs of equal digits in the order they have.
__global__ void __launch_bounds__(THREADS)
embedding_place(uint64_t* to, const uint64_t* from, const uint32_t* starts, int64_t n, int shift) {
    __shared__ uint32_t next[WARPS][DIGITS]; // where the warp's next pair of a digit goes
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int w = 0; w < WARPS; w++) next[w][threadIdx.x] = 0;
    __syncthreads();
    const int64_t first = blockIdx.x * int64_t(TILE) + warp * (TILE / WARPS) + lane;
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t i = first + round * WARP;
        if (i < n) atomicAdd(&next[warp][digit_of(from[i], shift)], 1u);
    }
    __syncthreads();
    uint32_t place = starts[threadIdx.x * int64_t(gridDim.x) + blockIdx.x];
    for (int w = 0; w < WARPS; w++) {
        const uint32_t count = next[w][threadIdx.x];
        next[w][threadIdx.x] = place;
        place += count;
    }
    __syncthreads();
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t i = first + round * WARP;
        const uint64_t pair = i < n ? from[i] : 0;
        const uint32_t digit = i < n ? digit_of(pair, shift) : DIGITS; // past the end: equal to no digit
        const unsigned peers = __match_any_sync(ALL, digit);
        const int earlier = __popc(peers & ((1u << lane) - 1));
        if (i < n) to[next[warp][digit] + earlier] = pair;
        __syncwarp();
        if (i < n && earlier == 0) next[warp][digit] += __popc(peers);
        __syncwarp();
    }
}

__global__ void __launch_bounds__(THREADS)
embedding_backward_2(float* dtable, const uint32_t* dx, const uint64_t* pairs, int64_t n, int64_t vocab, int64_t h,
                     int64_t blocks_of_a_row) {
    add_runs<2>(dtable, dx, pairs, n, vocab, h / 2, blocks_of_a_row);
}

__global__ void __launch_bounds__(THREADS)
embedding_backward_1(float* dtable, const uint16_t* dx, const uint64_t* pairs, int64_t n, int64_t vocab, int64_t h,
                     int64_t blocks_of_a_row) {
    add_runs<1>(dtable, dx, pairs, n, vocab, h, blocks_of_a_row);
}

} // extern "C"
