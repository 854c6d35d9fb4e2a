// Numbers of E4M3 codes.
#pragma once

#include "e4m3.h"

namespace e4m3 {

inline F decode(U code) {
    U size = code & 0x7f, normal = (size << 20) + (120u << 23);
    U small = (U)(__builtin_convertvector((I)size, F) * 0x1p-9f);
    U bits = (I)size < 8 ? small : normal;
    bits = (I)size == 0x7f ? U{} + 0x7fc00000u : bits;
    return (F)(bits | (code & 0x80u) << 24);
}


#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define E4M3_TABLES

// The two bytes of a code's BF16 number, without its sign, are looked up by its other seven bits.
struct Bytes {
    alignas(64) uint8_t low[128], high[128];
    constexpr Bytes() : low(), high() {
        for (int size = 0; size < 128; size++) {
            int exponent = size >> 3, fraction = size & 7, bits = 0;
            if (exponent) {
                bits = (exponent + 120) << 7 | fraction << 4;
            } else if (fraction) {
                int top = fraction > 3 ? 2 : fraction > 1 ? 1 : 0;
                bits = (118 + top) << 7 | ((fraction << (7 - top)) & 0x7f);
            }
            if (size == 127) bits = 0x7fc0;
            low[size] = uint8_t(bits);
            high[size] = uint8_t(bits >> 8);
        }
    }
};
constexpr Bytes BYTES_OF;

// The low and the high bytes of 64 numbers.
struct Halves {
    __m512i low, high;
    explicit Halves(__m512i codes) {
        low = _mm512_permutex2var_epi8(_mm512_load_si512(BYTES_OF.low), codes,
                                       _mm512_load_si512(BYTES_OF.low + 64));
        high = _mm512_permutex2var_epi8(_mm512_load_si512(BYTES_OF.high), codes,
                                        _mm512_load_si512(BYTES_OF.high + 64));
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        high = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
    }
};

inline F decode(const uint8_t* codes, int64_t some) {
    // A code in the lowest byte of every element: bytes of the code 0, beside it, are 0.
    Halves halves(_mm512_cvtepu8_epi32((__m128i)load<U8>(codes, some)));
    const U places{0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    const __m512i order = (__m512i)(places << 16 | (places + 64) << 24);
    const __mmask64 upper = 0xccccccccccccccccull;
    return (F)_mm512_maskz_permutex2var_epi8(upper, halves.low, order, halves.high);
}

#else

inline F decode(const uint8_t* codes, int64_t some) {
    return decode(__builtin_convertvector(load<U8>(codes, some), U));
}

#endif

}  // namespace e4m3
