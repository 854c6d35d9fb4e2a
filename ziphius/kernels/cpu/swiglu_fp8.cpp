// SwiGLU times the row's routing weight, between FP8 products: result and inputs into tiles, the
// result turned, and the gradients, the last two from the inputs as they were kept.
#include "tiles.h"

namespace {

using namespace e4m3;

// exponential of numbers.h for a vector: 0 below the smallest normal number.
inline F exponential(F x) {
    F low = F{} - 87.3f, high = F{} + 88.7f;
    F clamped = x < low ? low : (x > high ? high : x);
    // Added to 1.5 * 2^23, a number loses what is behind its point.
    F n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    F r = clamped - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
    F e = F{} + 1.3888889e-3f;
    for (float next : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
        e = e * r + next;
    // 2^n in two factors: n = 128 has no float of its own.
    I whole = __builtin_convertvector(n, I), half = whole >> 1;
    e *= (F)((half + 127) << 23);
    e *= (F)((whole - half + 127) << 23);
    e = x < low ? F{} : (x > high ? F{} + __builtin_inff() : e);
    return x == x ? e : x;  // not a number stays so
}

inline F sigmoid(F x) { return 1.0f / (1.0f + exponential(-x)); }

// silu(gate) * up * weight of two matrices.
template <class S> struct Gated {
    S gate, up;
    const float* weights;
    F at(int64_t row, int64_t column, int64_t some) const {
        F x = gate.at(row, column, some), y = x * sigmoid(x) * up.at(row, column, some);
        return weights ? y * weights[row] : y;
    }
};

template <class T>
void forward(const Gated<Plain<T>>& source, const Target& hidden, const Target& gate,
             const Target& up, int64_t rows, int64_t threads) {
#pragma omp parallel for num_threads(rows < FEW ? 1 : threads) schedule(static)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t column = 0; column < hidden.width; column += GROUP) {
            put_tiles(gate, source.gate, m, 1, column);
            put_tiles(up, source.up, m, 1, column);
            put_tiles(hidden, source, m, 1, column);
        }
}

template <class T, class O>
void backward(const Gated<Tiles>& kept, const Plain<T>& dhidden, O* dgate, int64_t gate_row,
              O* dup, int64_t up_row, float* dweights, int64_t rows, int64_t width,
              int64_t threads) {
#pragma omp parallel for num_threads(rows < FEW ? 1 : threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        float weight = kept.weights ? kept.weights[m] : 1.0f, dweight = 0.0f;
        F total{};
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t some = width - i;
            F x = kept.gate.at(m, i, some), y = kept.up.at(m, i, some);
            F dh = dhidden.at(m, i, some), s = sigmoid(x), silu = x * s;
            total += dh * silu * y;
            dh *= weight;
            put(dup + m * up_row + i, dh * silu, some);
            put(dgate + m * gate_row + i, dh * y * (s + silu * (1.0f - s)), some);
        }
        for (int64_t l = 0; l < LANES; l++) dweight += total[l];
        if (dweights) dweights[m] = dweight;
    }
}

Tiles tiles(const void* codes, const void* scales, int64_t width) {
    return {(const uint8_t*)codes, (const float*)scales, width};
}

}  // namespace

// power_of_two is about hidden; the scales of the inputs are FP32.
extern "C" void swiglu_fp8_forward(int64_t type, const void* gate, int64_t gate_row,
                                   const void* up, int64_t up_row, const void* weights,
                                   void* hidden, void* hidden_scales, void* gate_codes,
                                   void* gate_scales, void* up_codes, void* up_scales,
                                   int64_t power_of_two, int64_t rows, int64_t width,
                                   int64_t threads) {
    Target result{(uint8_t*)hidden, (float*)hidden_scales, width, power_of_two != 0};
    Target g{(uint8_t*)gate_codes, (float*)gate_scales, width, false};
    Target u{(uint8_t*)up_codes, (float*)up_scales, width, false};
    WITH_FLOAT(type, forward(Gated<Plain<T>>{{(const T*)gate, gate_row}, {(const T*)up, up_row},
                                             (const float*)weights},
                             result, g, u, rows, threads))
}

extern "C" void swiglu_fp8_turned(int64_t, const void* gate, const void* gate_scales,
                                  const void* up, const void* up_scales, const void* weights,
                                  void* turned, void* turned_scales, int64_t turned_width,
                                  const int64_t* counts, int64_t segments, int64_t power_of_two,
                                  int64_t rows, int64_t width, int64_t threads) {
    Gated<Tiles> source{tiles(gate, gate_scales, width), tiles(up, up_scales, width),
                        (const float*)weights};
    Target to{(uint8_t*)turned, (float*)turned_scales, turned_width, power_of_two != 0};
    quantize(source, Target{}, to, counts, segments, rows, width, threads);
}

// ``type`` is that of dhidden, ``out_type`` that of dgate and dup.
extern "C" void swiglu_fp8_backward(int64_t type, int64_t out_type, const void* gate,
                                    const void* gate_scales, const void* up,
                                    const void* up_scales, const void* weights,
                                    const void* dhidden, int64_t dhidden_row, void* dgate,
                                    int64_t gate_row, void* dup, int64_t up_row, void* dweights,
                                    int64_t rows, int64_t width, int64_t threads) {
    Gated<Tiles> kept{tiles(gate, gate_scales, width), tiles(up, up_scales, width),
                      (const float*)weights};
    WITH_FLOAT(type, {
        Plain<T> dh{(const T*)dhidden, dhidden_row};
        if (out_type == 2)
            backward(kept, dh, (bf16*)dgate, gate_row, (bf16*)dup, up_row, (float*)dweights, rows,
                     width, threads);
        else
            backward(kept, dh, (float*)dgate, gate_row, (float*)dup, up_row, (float*)dweights,
                     rows, width, threads);
    })
}
