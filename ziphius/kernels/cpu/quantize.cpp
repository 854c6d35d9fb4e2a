// Matrices into E4M3: tiles, turned tiles, and blocks with their transpose.
#include "tiles.h"

namespace {

using namespace e4m3;

// One block of 128 x 128 of a matrix [rows, columns], as codes [.., columns] and turned.
template <class T>
void put_block(const T* weight, int64_t rows, int64_t columns, int64_t row, int64_t column,
               uint8_t* codes, float* scale, uint8_t* turned, float* turned_scale,
               bool power_of_two) {
    int64_t high = std::min(GROUP, rows - row);
    I most{};
    for (int64_t m = 0; m < high; m++)
        for (int64_t j = 0; j < GROUP; j += LANES)
            most = larger(most, magnitude(numbers(weight + (row + m) * columns + column + j,
                                                  columns - column - j)));
    *scale = *turned_scale = scale_of<float>(largest(most), power_of_two);
    Encoder encoder(*scale, power_of_two);
    for (int64_t half = 0; half < high; half += 64)
        for (int64_t c = column; c < std::min(column + GROUP, columns); c += LANES) {
            U kept[64] = {};
            int64_t at = (row + half) * columns + c;
            encoder.each(
                std::min<int64_t>(64, high - half),
                [&](int64_t m) { return numbers(weight + at + m * columns, columns - c); },
                [&](int64_t m, U code) {
                    kept[m] = code;
                    store(codes + at + m * columns, __builtin_convertvector(code, U8), columns - c);
                });
            turn(turned + c * rows + row + half, rows, kept, columns - c, high - half);
        }
}

template <class T>
void put_blocks(const T* weight, uint8_t* codes, float* scales, uint8_t* turned,
                float* turned_scales, bool power_of_two, int64_t experts, int64_t rows,
                int64_t columns, int64_t threads) {
    int64_t down = groups(rows), across = groups(columns);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < experts * down * across; i++) {
        int64_t e = i / (down * across), r = i / across % down, c = i % across;
        int64_t matrix = e * rows * columns;
        put_block(weight + matrix, rows, columns, r * GROUP, c * GROUP, codes + matrix, scales + i,
                  turned + matrix, turned_scales + (e * across + c) * down + r, power_of_two);
    }
}

}  // namespace

// Without codes of a kind, that kind is not made; ``width`` is that of a turned row.
extern "C" void quantize_rows(int64_t type, const void* x, int64_t stride, void* codes,
                              void* scales, void* turned, void* turned_scales, int64_t width,
                              const int64_t* counts, int64_t segments, int64_t power_of_two,
                              int64_t rows, int64_t columns, int64_t threads) {
    Target tiles{(uint8_t*)codes, (float*)scales, columns, power_of_two != 0};
    Target other{(uint8_t*)turned, (float*)turned_scales, width, power_of_two != 0};
    WITH_FLOAT(type, quantize(Plain<T>{(const T*)x, stride}, tiles, other, counts, segments, rows,
                              columns, threads))
}

extern "C" void quantize_regroup(int64_t, const void* codes, const void* scales, void* turned,
                                 void* turned_scales, int64_t width, const int64_t* counts,
                                 int64_t segments, int64_t power_of_two, int64_t rows,
                                 int64_t columns, int64_t threads) {
    Target to{(uint8_t*)turned, (float*)turned_scales, width, power_of_two != 0};
    quantize(Tiles{(const uint8_t*)codes, (const float*)scales, columns}, Target{}, to, counts,
             segments, rows, columns, threads);
}

extern "C" void quantize_blocks(int64_t type, const void* weight, void* codes, void* scales,
                                void* turned, void* turned_scales, int64_t power_of_two,
                                int64_t experts, int64_t rows, int64_t columns, int64_t threads) {
    WITH_FLOAT(type, put_blocks((const T*)weight, (uint8_t*)codes, (float*)scales,
                                (uint8_t*)turned, (float*)turned_scales, power_of_two != 0,
                                experts, rows, columns, threads))
}
