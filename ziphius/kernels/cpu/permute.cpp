// Token rows to their experts and back.
#include "numbers.h"

#include <cstring>

// Row m of out is row order[m] / K of x.
template <class T>
void permute(const T* x, const int64_t* order, T* out, int64_t rows, int64_t width, int64_t K,
             int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++)
        std::memcpy(out + m * width, x + order[m] / K * width, width * sizeof(T));
}

// Row n of out is the sum over k of row inverse[n * K + k], one after the other.
template <class T>
void unpermute(const T* rows, const int64_t* inverse, T* out, int64_t tokens, int64_t width,
               int64_t K, int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++) {
        H sum[64];
        for (int64_t start = 0; start < width; start += 64) {
            int64_t some = width - start < 64 ? width - start : 64;
            for (int64_t k = 0; k < K; k++) {
                const T* row = rows + inverse[n * K + k] * width + start;
                for (int64_t i = 0; i < some; i++)
                    sum[i] = k == 0 ? widen(row[i]) : sum[i] + widen(row[i]);
            }
            for (int64_t i = 0; i < some; i++) out[n * width + start + i] = narrow<T>(sum[i]);
        }
    }
}

// The same of rows of bytes beside rows of numbers: codes and their scales.
extern "C" void permute_tiles(int64_t, const uint8_t* codes, const float* scales,
                              const int64_t* order, uint8_t* out, float* out_scales, int64_t rows,
                              int64_t width, int64_t groups, int64_t K, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        int64_t n = order[m] / K;
        std::memcpy(out + m * width, codes + n * width, width);
        for (int64_t g = 0; g < groups; g++) out_scales[m * groups + g] = scales[n * groups + g];
    }
}

extern "C" void permute(int64_t type, const void* x, const int64_t* order, void* out, int64_t rows,
                        int64_t width, int64_t K, int64_t threads) {
    WITH_TYPE(type, permute<T>((const T*)x, order, (T*)out, rows, width, K, threads))
}

extern "C" void unpermute(int64_t type, const void* rows, const int64_t* inverse, void* out,
                          int64_t tokens, int64_t width, int64_t K, int64_t threads) {
    WITH_TYPE(type, unpermute<T>((const T*)rows, inverse, (T*)out, tokens, width, K, threads))
}
