// E4M3 in groups, sixteen numbers at a time: codes of numbers, and scales.
#pragma once

#include "numbers.h"

#include <algorithm>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace e4m3 {

constexpr int64_t LANES = 16, GROUP = 128;

// Wider than some processors' registers: the compiler then uses several.
typedef float F __attribute__((vector_size(64), may_alias));
typedef int32_t I __attribute__((vector_size(64), may_alias));
typedef uint32_t U __attribute__((vector_size(64), may_alias));
typedef uint16_t U16 __attribute__((vector_size(32), may_alias));
typedef uint8_t U8 __attribute__((vector_size(16), may_alias));

inline int64_t groups(int64_t count) { return (count + GROUP - 1) / GROUP; }

// Read or write some of a vector's elements; the rest is zero.
template <class V, class T> inline V load(const T* from, int64_t some) {
    V row{};
    if (some >= LANES) std::memcpy(&row, from, sizeof row);
    else if (some > 0) std::memcpy(&row, from, some * sizeof(T));
    return row;
}
template <class V, class T> inline void store(T* to, V row, int64_t some) {
    if (some >= LANES) std::memcpy(to, &row, sizeof row);
    else if (some > 0) std::memcpy(to, &row, some * sizeof(T));
}

inline F numbers(const float* from, int64_t some) { return load<F>(from, some); }
inline F numbers(const bf16* from, int64_t some) {
#ifdef __AVX512F__  // compilers make two halves of the conversion
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)load<U16>(from, some)), 16);
#else
    return (F)(__builtin_convertvector(load<U16>(from, some), U) << 16);
#endif
}

inline void put(float* to, F x, int64_t some) { store(to, x, some); }
inline void put(bf16* to, F x, int64_t some) {
    U16 row;
    narrow_row((bf16*)&row, (const float*)&x, LANES);
    store(to, row, some);
}

// Magnitudes are compared as integers, where infinity is above all numbers and NaN above that.
inline I magnitude(F x) { return (I)x & 0x7fffffff; }
inline I larger(I a, I b) { return a > b ? a : b; }

// Codes in the low bytes; above them is nothing of use. To nearest, ties to even, for numbers whose
// magnitude rounds to 448 or less. A large power of two added to a number leaves its four bits, or
// the multiple of 2^-9 that it is nearest to, as the last ones of the sum.
inline U encode(F x) {
    I bits = (I)x, power = bits & 0x7f800000;
    power = larger(power, I{} + (121 << 23)) + (20 << 23);
    I sum = (I)((F)(bits & 0x7fffffff) + (F)power);
    // The sum's last bits count from the hidden one; the exponent's code is power >> 20, but for a
    // constant, which here is joined with the sign, modulo 256.
    return U(sum - power + (power >> 20)) + ((~(U)bits >> 24 & 0x80u) | 24u);
}

// The same where some numbers are none: NaN for those, and for what is infinite.
inline U encode_any(F x) {
    return magnitude(x) >= 0x7f800000 ? ((U)x >> 24 & 0x80u) | 0x7fu : encode(x);
}

// The largest number of a vector.
inline int32_t largest(I a) {
    a = larger(a, __builtin_shuffle(a, I{8, 9, 10, 11, 12, 13, 14, 15}));
    a = larger(a, __builtin_shuffle(a, I{4, 5, 6, 7}));
    return std::max(std::max(a[0], a[1]), std::max(a[2], a[3]));
}

// max(amax, 1e-4) / 448, or the next power of two that is not smaller.
template <class N, class J> inline N scale_of(J amax, bool power_of_two) {
    J least = J{} + 0x38d1b717;
    N scale = __builtin_bit_cast(N, amax > least ? amax : least) / 448.0f;
    J bits = __builtin_bit_cast(J, scale), raised = (bits + 0x7fffff) & 0x7f800000;
    J kept = bits < 0x7f800000 ? raised : bits;
    return power_of_two ? __builtin_bit_cast(N, kept) : scale;
}

// Codes of numbers divided by a scale. A power of two has an exact reciprocal, with which the
// result is the same: its exponent's bits from the other end.
struct Encoder {
    F scale;
    bool exact, finite;
    Encoder(F scale, bool power_of_two)
        : scale(scale), exact(power_of_two), finite(largest((I)scale) < 0x7f800000) {}
    Encoder(float scale, bool power_of_two)
        : scale(F{} + scale), exact(power_of_two),
          finite(__builtin_bit_cast(int32_t, scale) < 0x7f800000) {}
    // Does something with each of the codes of ``count`` vectors of numbers.
    template <class G, class P> inline void each(int64_t count, G get, P put) const {
        if (!finite) {
            for (int64_t i = 0; i < count; i++) put(i, encode_any(get(i) / scale));
        } else if (exact) {
            F reciprocal = (F)((I{} + (254 << 23)) - (I)scale);
            for (int64_t i = 0; i < count; i++) put(i, encode(get(i) * reciprocal));
        } else {
            for (int64_t i = 0; i < count; i++) put(i, encode(get(i) / scale));
        }
    }
};

// Transpose a square of 16 x 16 numbers of 32 bits.
template <int D> inline void exchange(U* rows) {
    I low, high;
    for (int l = 0; l < LANES; l++) {
        low[l] = l & D ? LANES + l - D : l;
        high[l] = l & D ? LANES + l : l + D;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & D)) {
            U a = rows[i], b = rows[i + D];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + D] = __builtin_shuffle(a, b, high);
        }
}
inline void transpose(U* rows) {
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

// Turn 64 rows of 16 codes each, in the low bytes of vectors: column c goes to to + c * stride.
// Four codes of a column are joined in 32 bits, which are then transposed.
inline void turn(uint8_t* to, int64_t stride, const U* codes, int64_t columns, int64_t some) {
    U rows[LANES];
#pragma GCC unroll 16
    for (int q = 0; q < LANES; q++) {
        const U* four = codes + q * 4;
        U low = (four[0] & 0xff) | (four[1] & 0xff) << 8;
        rows[q] = low | (four[2] & 0xff) << 16 | four[3] << 24;
    }
    transpose(rows);
    for (int64_t c = 0; c < std::min(columns, LANES); c++)
        std::memcpy(to + c * stride, &rows[c], std::clamp<int64_t>(some, 0, 64));
}

}  // namespace e4m3
