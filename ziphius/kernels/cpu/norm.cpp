// RMSNorm over rows: g * x / sqrt(mean(x^2) + eps).
#include "numbers.h"
#include "repeat.h"

#include <vector>

namespace {

template <class T>
void norm_forward(const T* x, int64_t stride, int64_t gain_type, const void* stored, T* out,
                  wide<T>* inverse_root, int64_t rows, int64_t width, double eps,
                  int64_t threads) {
    using H = wide<T>;
    Gain<H> kept(gain_type, stored, width);
    const H* gain = kept.numbers;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= FEW)
    for (int64_t n = 0; n < rows; n++) {
        const T* row = x + n * stride;
        H squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += widen(row[i]) * widen(row[i]);
        H inverse = H(1) / std::sqrt(squares / H(width) + H(eps));
        inverse_root[n] = inverse;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            out[n * width + i] = narrow<T>(widen(row[i]) * inverse * gain[i]);
    }
}

// partial_gain is [threads, width]: every thread sums over its own rows, the caller over threads.
template <class T>
void norm_backward(const T* x, int64_t stride, const wide<T>* gain, const wide<T>* inverse_root,
                   const T* dout, T* dx, wide<T>* partial_gain, int64_t rows, int64_t width,
                   int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        H* total = partial_gain + thread * width;
        std::vector<H> block(width);
        int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
        for (int64_t start = begin; start < end; start += 64) {
            for (int64_t i = 0; i < width; i++) block[i] = 0;
            for (int64_t n = start; n < end && n < start + 64; n++) {
                const T* row = x + n * stride;
                const T* grad = dout + n * width;
                H inverse = inverse_root[n], along = 0;
#pragma omp simd reduction(+ : along)
                for (int64_t i = 0; i < width; i++)
                    along += widen(grad[i]) * gain[i] * widen(row[i]);
                along *= inverse / H(width);
                H* sums = block.data();
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    H unit = widen(row[i]) * inverse, d = widen(grad[i]);
                    sums[i] += d * unit;
                    dx[n * width + i] = narrow<T>((d * gain[i] - unit * along) * inverse);
                }
            }
            for (int64_t i = 0; i < width; i++) total[i] += block[i];
        }
    }
}

}  // namespace

extern "C" void norm_forward(int64_t type, const void* x, int64_t stride, int64_t gain_type,
                             const void* gain, void* out, void* inverse_root, int64_t rows,
                             int64_t width, double eps, int64_t threads) {
    WITH_TYPE(type, norm_forward<T>((const T*)x, stride, gain_type, gain, (T*)out,
                                    (wide<T>*)inverse_root, rows, width, eps, threads))
}

extern "C" void norm_backward(int64_t type, const void* x, int64_t stride, const void* gain,
                              const void* inverse_root, const void* dout, void* dx,
                              void* partial_gain, int64_t rows, int64_t width, int64_t threads) {
    WITH_TYPE(type, norm_backward<T>((const T*)x, stride, (const wide<T>*)gain,
                                     (const wide<T>*)inverse_root, (const T*)dout, (T*)dx,
                                     (wide<T>*)partial_gain, rows, width, threads))
}

REPEATABLE(norm_forward)
