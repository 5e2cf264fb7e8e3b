// One AdamW update (Loshchilov & Hutter 2019, arXiv 1711.05101) of n parameters, g' = g scale[0]:
//
//   m <- beta1 m + (1 - beta1) g',  v <- beta2 v + (1 - beta2) g'^2
//   p <- p (1 - lr wd) - rate m / (sqrt(v) v_scale + epsilon),  rate = lr / (1 - beta1^t),  v_scale = 1 / sqrt(1 - beta2^t)
//
// Products and sums are rounded one by one, never fused, so that every bit is the CPU backend's.
//
// adamw_split: w [n] bf16 is p rounded to nearest, low [n] uint16 the low half of p's bits; p = ((w - (low >> 15)) << 16) | low.
// adamw_wide: w [n] f32 is p. m, v [n] f32, or with wide_moments = 0 bf16; g [n] f32, or with wide_gradient = 0 bf16.
// scale f32 [1, 1].
//
// bf16 moments are rounded stochastically: 16 random bits are added below the last bit that stays. Element i takes them from
// number first + i of the SplitMix64 sequence (Steele, Lea & Flood 2014) that starts at `key`: m the lowest 16, v the next.
// Suffix _4: vectors of 4 elements, addresses are multiples of 16 bytes (f32) or 8 (16-bit types); suffix _1: any address.
#include "flat.cuh"

constexpr int THREADS = 256;

struct Constants {
    float beta1, beta2, one_minus_beta1, one_minus_beta2, rate, v_scale, epsilon, shrink;
};

// Number `i` of the SplitMix64 sequence that starts at `key`.
__device__ __forceinline__ uint64_t draw(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// N 16-bit words, in one access.
template <int N> struct Words {
    uint16_t v[N];
};

template <int N> __device__ __forceinline__ Words<N> load_words(const void* p) {
    if constexpr (N == 1) {
        return {{*static_cast<const uint16_t*>(p)}};
    } else {
        const uint2 bits = *static_cast<const uint2*>(p);
        return {{uint16_t(bits.x), uint16_t(bits.x >> 16), uint16_t(bits.y), uint16_t(bits.y >> 16)}};
    }
}

template <int N> __device__ __forceinline__ void store_words(void* p, const Words<N>& x) {
    if constexpr (N == 1)
        *static_cast<uint16_t*>(p) = x.v[0];
    else
        *static_cast<uint2*>(p) = make_uint2(x.v[0] | uint32_t(x.v[1]) << 16, x.v[2] | uint32_t(x.v[3]) << 16);
}

// The f32 parameter, whole or in two halves.
struct Wide {
    float* w;

    template <int N> __device__ __forceinline__ Lanes<N> read(int64_t i) const { return load<N>(w + i); }
    template <int N> __device__ __forceinline__ void write(int64_t i, const Lanes<N>& p) const { store<N>(w + i, p); }
};

struct Split {
    uint16_t* w;
    uint16_t* low;

    template <int N> __device__ __forceinline__ Lanes<N> read(int64_t i) const {
        const Words<N> high_words = load_words<N>(w + i), low_words = load_words<N>(low + i);
        Lanes<N> p;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const uint32_t half = low_words.v[k];
            p.v[k] = __uint_as_float((high_words.v[k] - (half >> 15)) << 16 | half);
        }
        return p;
    }

    template <int N> __device__ __forceinline__ void write(int64_t i, const Lanes<N>& p) const {
        Words<N> high_words, low_words;
#pragma unroll
        for (int k = 0; k < N; k++) {
            const uint32_t bits = __float_as_uint(p.v[k]);
            high_words.v[k] = (bits + 0x8000u) >> 16;
            low_words.v[k] = bits;
        }
        store_words<N>(w + i, high_words);
        store_words<N>(low + i, low_words);
    }
};

// Rounds f32 bits to bf16 with 16 random bits. Infinity stays, a NaN stays one: neither may carry into the sign.
__device__ __forceinline__ uint16_t round_by(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits >> 16 | ((bits & 0x007fffffu) != 0 ? 0x40u : 0u);
    return (bits + random) >> 16;
}

// Moments of N elements; random holds 16 bits for each.
template <int N> __device__ __forceinline__ void write_moments(float* p, const Lanes<N>& x, const uint32_t (&)[N]) {
    store<N>(p, x);
}

template <int N>
__device__ __forceinline__ void write_moments(__nv_bfloat16* p, const Lanes<N>& x, const uint32_t (&random)[N]) {
    Words<N> words;
#pragma unroll
    for (int k = 0; k < N; k++) words.v[k] = round_by(x.v[k], random[k] & 0xffffu);
    store_words<N>(p, words);
}

template <int N, class Weights, class Moment, class Gradient>
__device__ __forceinline__ void step(const Weights& weights, Moment* m, Moment* v, const Gradient* g, float scale, int64_t i,
                                     uint64_t key, uint64_t first, const Constants& c) {
    Lanes<N> p = weights.template read<N>(i), first_moment = load<N>(m + i), second_moment = load<N>(v + i);
    const Lanes<N> gradient = load<N>(g + i);
    uint32_t for_m[N], for_v[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float a = __fmul_rn(gradient.v[k], scale);
        const float mean = __fadd_rn(__fmul_rn(c.beta1, first_moment.v[k]), __fmul_rn(c.one_minus_beta1, a));
        const float square =
            __fadd_rn(__fmul_rn(c.beta2, second_moment.v[k]), __fmul_rn(__fmul_rn(c.one_minus_beta2, a), a));
        const float size = __fadd_rn(__fmul_rn(__fsqrt_rn(square), c.v_scale), c.epsilon);
        p.v[k] = __fsub_rn(__fmul_rn(p.v[k], c.shrink), __fdiv_rn(__fmul_rn(c.rate, mean), size));
        first_moment.v[k] = mean;
        second_moment.v[k] = square;
        if constexpr (sizeof(Moment) == 2) {
            const uint64_t random = draw(key, first + i + k);
            for_m[k] = uint32_t(random);
            for_v[k] = uint32_t(random >> 16);
        }
    }
    weights.template write<N>(i, p);
    write_moments<N>(m + i, first_moment, for_m);
    write_moments<N>(v + i, second_moment, for_v);
}

template <int N, class Weights, class Moment, class Gradient>
__device__ __forceinline__ void update(const Weights& weights, void* m, void* v, const void* g, const float* scale,
                                       int64_t n, uint64_t key, uint64_t first, const Constants& c) {
    Moment *mp = static_cast<Moment*>(m), *vp = static_cast<Moment*>(v);
    const Gradient* gp = static_cast<const Gradient*>(g);
    const float factor = *scale;
    const int64_t vectors = n / N, thread = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    for (int64_t j = thread; j < vectors; j += gridDim.x * int64_t(THREADS))
        step<N>(weights, mp, vp, gp, factor, j * N, key, first, c);
    if (N > 1 && thread < n - vectors * N) step<1>(weights, mp, vp, gp, factor, vectors * N + thread, key, first, c);
}

template <int N, class Weights>
__device__ __forceinline__ void any_update(const Weights& weights, void* m, void* v, const void* g, const float* scale,
                                           int64_t n, int64_t key, int64_t first, int wide_moments, int wide_gradient,
                                           const Constants& c) {
    if (wide_moments && wide_gradient)
        update<N, Weights, float, float>(weights, m, v, g, scale, n, key, first, c);
    else if (wide_moments)
        update<N, Weights, float, __nv_bfloat16>(weights, m, v, g, scale, n, key, first, c);
    else if (wide_gradient)
        update<N, Weights, __nv_bfloat16, float>(weights, m, v, g, scale, n, key, first, c);
    else
        update<N, Weights, __nv_bfloat16, __nv_bfloat16>(weights, m, v, g, scale, n, key, first, c);
}

extern "C" {

__global__ void __launch_bounds__(THREADS)
adamw_split_4(uint16_t* w, uint16_t* low, void* m, void* v, const void* g, const float* scale, int64_t n, int64_t key,
              int64_t first, int wide_moments, int wide_gradient, float beta1, float beta2, float one_minus_beta1,
              float one_minus_beta2, float rate, float v_scale, float epsilon, float shrink) {
    any_update<4>(Split{w, low}, m, v, g, scale, n, key, first, wide_moments, wide_gradient,
                  {beta1, beta2, one_minus_beta1, one_minus_beta2, rate, v_scale, epsilon, shrink});
}

__global__ void __launch_bounds__(THREADS)
adamw_split_1(uint16_t* w, uint16_t* low, void* m, void* v, const void* g, const float* scale, int64_t n, int64_t key,
              int64_t first, int wide_moments, int wide_gradient, float beta1, float beta2, float one_minus_beta1,
              float one_minus_beta2, float rate, float v_scale, float epsilon, float shrink) {
    any_update<1>(Split{w, low}, m, v, g, scale, n, key, first, wide_moments, wide_gradient,
                  {beta1, beta2, one_minus_beta1, one_minus_beta2, rate, v_scale, epsilon, shrink});
}

__global__ void __launch_bounds__(THREADS)
adamw_wide_4(float* w, void* m, void* v, const void* g, const float* scale, int64_t n, int64_t key, int64_t first,
             int wide_moments, int wide_gradient, float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
             float rate, float v_scale, float epsilon, float shrink) {
    any_update<4>(Wide{w}, m, v, g, scale, n, key, first, wide_moments, wide_gradient,
                  {beta1, beta2, one_minus_beta1, one_minus_beta2, rate, v_scale, epsilon, shrink});
}

__global__ void __launch_bounds__(THREADS)
adamw_wide_1(float* w, void* m, void* v, const void* g, const float* scale, int64_t n, int64_t key, int64_t first,
             int wide_moments, int wide_gradient, float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
             float rate, float v_scale, float epsilon, float shrink) {
    any_update<1>(Wide{w}, m, v, g, scale, n, key, first, wide_moments, wide_gradient,
                  {beta1, beta2, one_minus_beta1, one_minus_beta2, rate, v_scale, epsilon, shrink});
}

} // extern "C"
