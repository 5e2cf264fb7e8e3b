// A block of columns of one matrix into another with as many rows:
//
//   copy_columns  to[i, j] = from[i, j]   for elements of any type
//   add_columns   to[i, j] += from[i, j]  for f32
//
// for i < n / width and j < width, where to and from point at the blocks' first elements and their rows lie to_stride and
// from_stride apart. Sizes and strides count units: of 16 bytes (suffix _16) or 2 (_2), of 4 f32 (_4) or 1 (_1); addresses are
// multiples of the unit. n fits 32 bits: a division of 64 would cost more than moving a unit.
#include <cstdint>

constexpr int THREADS = 256;
// Reads of a thread under way before the first is used.
constexpr int AHEAD = 4;

template <class Unit, class Use>
__device__ __forceinline__ void by_unit(Unit* to, const Unit* from, int64_t to_stride, int64_t from_stride, uint32_t width,
                                        uint32_t n, const Use& use) {
    const int64_t step = int64_t(gridDim.x) * THREADS * AHEAD;
    for (int64_t first = blockIdx.x * int64_t(THREADS * AHEAD) + threadIdx.x; first < n; first += step) {
        Unit x[AHEAD];
        Unit* at[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int64_t k = first + u * THREADS;
            const uint32_t i = uint32_t(k) / width, j = uint32_t(k) - i * width;
            at[u] = k < n ? to + i * to_stride + j : nullptr;
            if (k < n) x[u] = from[i * from_stride + j];
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (at[u]) use(*at[u], x[u]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns_16(uint4* __restrict__ to, const uint4* __restrict__ from, int64_t to_stride, int64_t from_stride,
                uint32_t width, uint32_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](uint4& a, uint4 b) { a = b; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns_2(uint16_t* __restrict__ to, const uint16_t* __restrict__ from, int64_t to_stride, int64_t from_stride,
               uint32_t width, uint32_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](uint16_t& a, uint16_t b) { a = b; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_columns_4(float4* __restrict__ to, const float4* __restrict__ from, int64_t to_stride, int64_t from_stride,
              uint32_t width, uint32_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](float4& a, float4 b) {
        a = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_columns_1(float* __restrict__ to, const float* __restrict__ from, int64_t to_stride, int64_t from_stride, uint32_t width,
              uint32_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](float& a, float b) { a += b; });
}
