// Number formats of tensors, and the arithmetic behind them: at least FP32, as everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};

template <class T> struct Wide { using type = T; };
template <> struct Wide<bf16> { using type = float; };
template <class T> using wide = typename Wide<T>::type;

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
__attribute__((always_inline)) inline float widen(bf16 x) {
    return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
}

template <class T> inline T narrow(wide<T> x) { return x; }
template <> __attribute__((always_inline)) inline bf16 narrow<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u = __builtin_bit_cast(uint32_t, x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// Round numbers that lie side by side.
template <class T> inline void narrow_row(T* to, const wide<T>* from, int64_t count) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == 2)
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256((__m256i*)(to + i),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; i++) to[i] = narrow<T>(from[i]);
}

// exp in a form that compilers vectorise; 0 below the smallest normal number.
inline double exponential(double x) { return std::exp(x); }
__attribute__((always_inline)) inline float exponential(float x) {
    float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    float n = __builtin_rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
    float e = 1.3888889e-3f;
    e = e * r + 8.3333333e-3f;
    e = e * r + 4.1666667e-2f;
    e = e * r + 1.6666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    // 2^n in two factors: n = 128 has no float of its own.
    int32_t half = int32_t(n) >> 1, rest = int32_t(n) - half;
    e *= __builtin_bit_cast(float, (half + 127) << 23);
    e *= __builtin_bit_cast(float, (rest + 127) << 23);
    // Not a number stays so, and what is too large is infinite.
    return x != x ? x : (x < -87.3f ? 0.0f : (x > 88.7f ? __builtin_inff() : e));
}

template <class H> __attribute__((always_inline)) inline H sigmoid(H x) {
    return H(1) / (H(1) + exponential(-x));
}

// Rows below which a pass over them is not worth waking other threads.
constexpr int64_t FEW = 16;

// A vector in the number format that it is stored in, widened where it has to be.
template <class H> struct Gain {
    std::vector<H> memory;
    const H* numbers;
    Gain(int64_t type, const void* stored, int64_t count) : numbers((const H*)stored) {
        if (type == (sizeof(H) == 8 ? 0 : 1)) return;
        memory.resize(count);
        for (int64_t i = 0; i < count; i++)
            memory[i] = type == 0   ? H(((const double*)stored)[i])
                        : type == 1 ? H(((const float*)stored)[i])
                                    : H(widen(((const bf16*)stored)[i]));
        numbers = memory.data();
    }
};

// Runs a statement with T set to the element type that the caller has named.
#define WITH_TYPE(type, ...)                              \
    switch (type) {                                       \
        case 0: { using T = double; __VA_ARGS__; break; } \
        case 1: { using T = float; __VA_ARGS__; break; }  \
        default: { using T = bf16; __VA_ARGS__; }         \
    }
