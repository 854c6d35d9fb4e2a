// One parameter's step of AdamW: everything is read once and written once.
#include "numbers.h"

// Weights and gradients are W, kept moments M; the arithmetic is that of W.
template <class W, class M>
void adamw(W* weights, const W* gradients, M* first, M* second, int64_t count, W beta1, W beta2,
           W decay, W rate, W correction2, W eps, W scale, int64_t threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        W g = gradients[i] * scale;
        W m = W(widen(first[i])), v = W(widen(second[i]));
        m += (W(1) - beta1) * (g - m);
        v = beta2 * v + (W(1) - beta2) * g * g;
        first[i] = narrow<M>(wide<M>(m));
        second[i] = narrow<M>(wide<M>(v));
        weights[i] = weights[i] * decay - rate * m / (std::sqrt(v / correction2) + eps);
    }
}

// type is that of the weights (0 double, 1 float), moments that of the moments.
extern "C" void adamw(int64_t type, int64_t moments, void* weights, const void* gradients,
                      void* first, void* second, int64_t count, double beta1, double beta2,
                      double decay, double rate, double correction2, double eps, double scale,
                      int64_t threads) {
#define STEP(W, M)                                                                            \
    adamw<W, M>((W*)weights, (const W*)gradients, (M*)first, (M*)second, count, beta1, beta2, \
                decay, rate, correction2, eps, scale, threads)
    if (type == 0) {
        if (moments == 0) STEP(double, double); else STEP(double, bf16);
    } else {
        if (moments == 1) STEP(float, float); else STEP(float, bf16);
    }
}
