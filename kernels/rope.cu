// Rotary positions (Su et al. 2021, arXiv 2104.09864) in the half-split form: element j of a head of d turns with j + d/2.
//
//   rope_table            table[i, j] = cos(a), table[i, d/2 + j] = sin(a),  a = positions[i] frequencies[j]; all in f64
//   rope_split            qkv -> q, k turned (low cos - high sin, high cos + low sin) and v as it is
//   rope_merge_backward   dq, dk turned back, dv as it is -> dqkv
//
// table [c, d] f32, positions [c, 1] int32; qkv, dqkv [c, (nq + 2 nk) d], q, dq [c, nq d], k, v [c, nk d] bf16; dk, dv
// [c, nk d] f32. Absent parts of rope_split have nq or nk 0. Suffix _8: d is a multiple of 16 and a thread turns 8 pairs in
// 16-byte accesses; suffix _1: any even d. d is at most 256. One block a row; a thread keeps its angles for all heads.
#include "flat.cuh"

constexpr int TABLE_THREADS = 256;
constexpr int THREADS = 128; // as many as a head of 256 elements has pairs

struct Frequencies {
    double of[128];
};

// N pairs of a head, and N angles.
template <int N> struct Pairs {
    Lanes<N> low, high;
};

template <int N, class T> __device__ __forceinline__ Pairs<N> load_pairs(const T* head, int half) {
    return {load<N>(head), load<N>(head + half)};
}

template <int N> __device__ __forceinline__ void store_pairs(__nv_bfloat16* head, int half, const Pairs<N>& x) {
    store<N>(head, x.low);
    store<N>(head + half, x.high);
}

// sign 1 turns, -1 turns back. angles: low holds the cosines, high the sines.
template <int N> __device__ __forceinline__ Pairs<N> turn(const Pairs<N>& x, const Pairs<N>& angles, float sign) {
    Pairs<N> out;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float sine = sign * angles.high.v[i];
        out.low.v[i] = x.low.v[i] * angles.low.v[i] - x.high.v[i] * sine;
        out.high.v[i] = x.high.v[i] * angles.low.v[i] + x.low.v[i] * sine;
    }
    return out;
}

// Where the thread works in every head: pairs from `at` on, in heads `first`, `first + step`, ...
struct Place {
    int at, first, step;

    __device__ __forceinline__ Place(int half, int n) {
        const int threads = half / n; // of a head
        at = threadIdx.x % threads * n;
        first = threadIdx.x / threads;
        step = THREADS / threads;
        if (first >= step) first = 1 << 30; // left over when a head's threads do not divide the block's
    }
};

template <int N>
__device__ __forceinline__ void split(__nv_bfloat16* __restrict__ q, __nv_bfloat16* __restrict__ k,
                                      __nv_bfloat16* __restrict__ v, const __nv_bfloat16* __restrict__ qkv,
                                      const float* __restrict__ table, int nq, int nk, int d) {
    const int64_t row = blockIdx.x;
    const int half = d / 2;
    const Place place(half, N);
    q += row * nq * d + place.at;
    k += row * nk * d + place.at;
    v += row * nk * d + place.at;
    qkv += row * (nq + 2 * nk) * d + place.at;
    const Pairs<N> angles = load_pairs<N>(table + row * d + place.at, half);
    for (int head = place.first; head < nq + 2 * nk; head += place.step) {
        Pairs<N> x = load_pairs<N>(qkv + head * d, half);
        if (head < nq + nk) x = turn(x, angles, 1.f);
        __nv_bfloat16* to = head < nq ? q + head * d : head < nq + nk ? k + (head - nq) * d : v + (head - nq - nk) * d;
        store_pairs<N>(to, half, x);
    }
}

template <int N>
__device__ __forceinline__ void merge_backward(__nv_bfloat16* __restrict__ dqkv, const __nv_bfloat16* __restrict__ dq,
                                               const float* __restrict__ dk, const float* __restrict__ dv,
                                               const float* __restrict__ table, int nq, int nk, int d) {
    const int64_t row = blockIdx.x;
    const int half = d / 2;
    const Place place(half, N);
    dq += row * nq * d + place.at;
    dk += row * nk * d + place.at;
    dv += row * nk * d + place.at;
    dqkv += row * (nq + 2 * nk) * d + place.at;
    const Pairs<N> angles = load_pairs<N>(table + row * d + place.at, half);
    for (int head = place.first; head < nq + 2 * nk; head += place.step) {
        Pairs<N> x;
        if (head < nq)
            x = load_pairs<N>(dq + head * d, half);
        else
            x = load_pairs<N>(head < nq + nk ? dk + (head - nq) * d : dv + (head - nq - nk) * d, half);
        if (head < nq + nk) x = turn(x, angles, -1.f);
        store_pairs<N>(dqkv + head * d, half, x);
    }
}

extern "C" {

__global__ void __launch_bounds__(TABLE_THREADS)
rope_table(float* table, const int32_t* positions, int64_t c, int half, const __grid_constant__ Frequencies frequencies) {
    for (int64_t i = blockIdx.x * int64_t(TABLE_THREADS) + threadIdx.x; i < c * half;
         i += gridDim.x * int64_t(TABLE_THREADS)) {
        const int64_t row = i / half;
        const int j = int(i - row * half);
        double sine, cosine;
        sincos(double(positions[row]) * frequencies.of[j], &sine, &cosine);
        table[row * 2 * half + j] = float(cosine);
        table[row * 2 * half + half + j] = float(sine);
    }
}

__global__ void __launch_bounds__(THREADS)
rope_split_8(__nv_bfloat16* q, __nv_bfloat16* k, __nv_bfloat16* v, const __nv_bfloat16* qkv, const float* table, int nq,
             int nk, int d) {
    split<8>(q, k, v, qkv, table, nq, nk, d);
}

__global__ void __launch_bounds__(THREADS)
rope_split_1(__nv_bfloat16* q, __nv_bfloat16* k, __nv_bfloat16* v, const __nv_bfloat16* qkv, const float* table, int nq,
             int nk, int d) {
    split<1>(q, k, v, qkv, table, nq, nk, d);
}

__global__ void __launch_bounds__(THREADS)
rope_merge_backward_8(__nv_bfloat16* dqkv, const __nv_bfloat16* dq, const float* dk, const float* dv, const float* table,
                      int nq, int nk, int d) {
    merge_backward<8>(dqkv, dq, dk, dv, table, nq, nk, d);
}

__global__ void __launch_bounds__(THREADS)
rope_merge_backward_1(__nv_bfloat16* dqkv, const __nv_bfloat16* dq, const float* dk, const float* dv, const float* table,
                      int nq, int nk, int d) {
    merge_backward<1>(dqkv, dq, dk, dv, table, nq, nk, d);
}

} // extern "C"
