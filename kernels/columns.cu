// A block of columns of one matrix into another with as many rows:
//
//   copy_columns  to[i, j] = from[i, j]   for elements of any type
//   add_columns   to[i, j] += from[i, j]  for f32
//
// for i < n / width and j < width, where to and from point at the blocks' first elements and their rows lie to_stride and
// from_stride apart. Sizes and strides count units: of 16 bytes (suffix _16) or 2 (_2), of 4 f32 (_4) or 1 (_1); addresses are
// multiples of the unit.
#include <cstdint>

constexpr int THREADS = 256;

template <class Unit, class Use>
__device__ __forceinline__ void by_unit(Unit* to, const Unit* from, int64_t to_stride, int64_t from_stride, int64_t width,
                                        int64_t n, const Use& use) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < n; k += step) {
        const int64_t i = k / width, j = k - i * width;
        use(to + i * to_stride + j, from + i * from_stride + j);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns_16(uint4* __restrict__ to, const uint4* __restrict__ from, int64_t to_stride,
                int64_t from_stride, int64_t width, int64_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](uint4* a, const uint4* b) { *a = *b; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns_2(uint16_t* __restrict__ to, const uint16_t* __restrict__ from, int64_t to_stride,
               int64_t from_stride, int64_t width, int64_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](uint16_t* a, const uint16_t* b) { *a = *b; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_columns_4(float4* __restrict__ to, const float4* __restrict__ from, int64_t to_stride,
              int64_t from_stride, int64_t width, int64_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](float4* a, const float4* b) {
        const float4 x = *a, y = *b;
        *a = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_columns_1(float* __restrict__ to, const float* __restrict__ from, int64_t to_stride,
              int64_t from_stride, int64_t width, int64_t n) {
    by_unit(to, from, to_stride, from_stride, width, n, [](float* a, const float* b) { *a += *b; });
}
