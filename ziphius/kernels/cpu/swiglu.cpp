// SwiGLU times the row's routing weight: silu(gate) * up * weight. Rows of gate and up may be
// strided; weights may be absent.
#include "numbers.h"
#include "repeat.h"

namespace {

template <class T>
void swiglu_forward(const T* gate, const T* up, int64_t stride, const wide<T>* weights, T* out,
                    int64_t rows, int64_t width, int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const T *g = gate + m * stride, *u = up + m * stride;
        H weight = weights ? weights[m] : H(1);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            H x = widen(g[i]);
            out[m * width + i] = narrow<T>(x * sigmoid(x) * widen(u[i]) * weight);
        }
    }
}

template <class T>
void swiglu_backward(const T* gate, const T* up, int64_t stride, const wide<T>* weights,
                     const T* dout, T* dgate, T* dup, int64_t dstride, wide<T>* dweights,
                     int64_t rows, int64_t width, int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const T *g = gate + m * stride, *u = up + m * stride, *d = dout + m * width;
        T *dg = dgate + m * dstride, *du = dup + m * dstride;
        H weight = weights ? weights[m] : H(1), dweight = 0;
#pragma omp simd reduction(+ : dweight)
        for (int64_t i = 0; i < width; i++) {
            H x = widen(g[i]), y = widen(u[i]), dh = widen(d[i]);
            H s = sigmoid(x), silu = x * s;
            dweight += dh * silu * y;
            dh *= weight;
            du[i] = narrow<T>(dh * silu);
            dg[i] = narrow<T>(dh * y * (s + silu * (H(1) - s)));
        }
        if (dweights) dweights[m] = dweight;
    }
}

}  // namespace

extern "C" void swiglu_forward(int64_t type, const void* gate, const void* up, int64_t stride,
                               const void* weights, void* out, int64_t rows, int64_t width,
                               int64_t threads) {
    WITH_TYPE(type, swiglu_forward<T>((const T*)gate, (const T*)up, stride,
                                      (const wide<T>*)weights, (T*)out, rows, width, threads))
}

extern "C" void swiglu_backward(int64_t type, const void* gate, const void* up, int64_t stride,
                                const void* weights, const void* dout, void* dgate, void* dup,
                                int64_t dstride, void* dweights, int64_t rows, int64_t width,
                                int64_t threads) {
    WITH_TYPE(type, swiglu_backward<T>((const T*)gate, (const T*)up, stride,
                                       (const wide<T>*)weights, (const T*)dout, (T*)dgate,
                                       (T*)dup, dstride, (wide<T>*)dweights, rows, width, threads))
}

REPEATABLE(swiglu_forward)
