// SwiGLU and its backward in place (Shazeer 2020, arXiv 2002.05202), s = sigmoid(gate), by row of f elements:
//
//   swiglu            act = gate s up
//   swiglu_backward   dgate = dact up (s + gate s (1 - s)),  dup = dact gate s, written over gate and up
//
// act, dact [n, f] and gate_up [n, 2f] (gate in columns 0..f, up in f..2f) bf16. Suffix _8: f is a multiple of 8 and rows
// are read 16 bytes a thread; suffix _1: any f. One block a row, so indices within a row need no division.
#include "rows.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.f, 1.f + __expf(-x)); // for x < -87 the quotient is 0, as it should be
}

template <int N>
__device__ __forceinline__ void forward(__nv_bfloat16* __restrict__ act, const __nv_bfloat16* __restrict__ gate_up,
                                        int64_t f) {
    const __nv_bfloat16* gate = gate_up + blockIdx.x * 2 * f;
    act += blockIdx.x * f;
    for (int64_t j = threadIdx.x * N; j < f; j += THREADS * N) {
        const Lanes<N> g = load<N>(gate + j), u = load<N>(gate + f + j);
        Lanes<N> out;
#pragma unroll
        for (int i = 0; i < N; i++) out.v[i] = g.v[i] * sigmoid(g.v[i]) * u.v[i];
        store<N>(act + j, out);
    }
}

template <int N>
__device__ __forceinline__ void backward(__nv_bfloat16* __restrict__ gate_up, const __nv_bfloat16* __restrict__ dact,
                                         int64_t f) {
    __nv_bfloat16* gate = gate_up + blockIdx.x * 2 * f;
    dact += blockIdx.x * f;
    for (int64_t j = threadIdx.x * N; j < f; j += THREADS * N) {
        Lanes<N> g = load<N>(gate + j), u = load<N>(gate + f + j);
        const Lanes<N> d = load<N>(dact + j);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float s = sigmoid(g.v[i]), gs = g.v[i] * s;
            g.v[i] = d.v[i] * u.v[i] * (s + gs * (1.f - s));
            u.v[i] = d.v[i] * gs;
        }
        store<N>(gate + j, g);
        store<N>(gate + f + j, u);
    }
}

extern "C" {

__global__ void __launch_bounds__(THREADS) swiglu_8(__nv_bfloat16* act, const __nv_bfloat16* gate_up, int64_t f) {
    forward<8>(act, gate_up, f);
}

__global__ void __launch_bounds__(THREADS) swiglu_1(__nv_bfloat16* act, const __nv_bfloat16* gate_up, int64_t f) {
    forward<1>(act, gate_up, f);
}

__global__ void __launch_bounds__(THREADS) swiglu_backward_8(__nv_bfloat16* gate_up, const __nv_bfloat16* dact, int64_t f) {
    backward<8>(gate_up, dact, f);
}

__global__ void __launch_bounds__(THREADS) swiglu_backward_1(__nv_bfloat16* gate_up, const __nv_bfloat16* dact, int64_t f) {
    backward<1>(gate_up, dact, f);
}

} // extern "C"
