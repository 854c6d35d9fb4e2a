// E4M3 codes as factors of BF16 products (gemm.h), in which they are exact.
#pragma once

#include "decode.h"
#include "gemm.h"

namespace e4m3 {

// Codes side by side that are decoded together.
constexpr int64_t SOME = 64;

#ifdef E4M3_TABLES

inline __m512i some_codes(const uint8_t* codes, int64_t count) {
    if (count >= SOME) return _mm512_loadu_si512(codes);
    return _mm512_maskz_loadu_epi8((__mmask64(1) << count) - 1, codes);
}

inline void decode_some(uint16_t* to, const uint8_t* codes, int64_t count) {
    // Eights of codes in the order in which the two unpackings below take them.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    Halves halves(_mm512_permutexvar_epi64(order, some_codes(codes, count)));
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(halves.low, halves.high));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi8(halves.low, halves.high));
}

inline U load_some(const uint8_t* codes, int64_t count) { return (U)some_codes(codes, count); }

// Four codes in every element: the units of the first two and of the others.
inline void decode_fours(uint32_t* first, uint32_t* second, U fours) {
    Halves halves((__m512i)fours);
    alignas(64) static constexpr struct Order {
        uint8_t of[64];
        constexpr Order() : of() {
            for (int i = 0; i < 64; i++) of[i] = uint8_t(i / 4 * 4 + i % 4 / 2 + i % 2 * 64);
        }
    } ORDER;
    __m512i order = _mm512_load_si512(ORDER.of);
    _mm512_storeu_si512(first, _mm512_permutex2var_epi8(halves.low, order, halves.high));
    order = _mm512_add_epi8(order, _mm512_set1_epi8(2));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi8(halves.low, order, halves.high));
}

#else

inline U load_some(const uint8_t* codes, int64_t count) {
    U row{};
    std::memcpy(&row, codes, std::min(count, SOME));
    return row;
}

inline void decode_some(uint16_t* to, const uint8_t* codes, int64_t count) {
    for (int64_t i = 0; i < SOME; i += LANES) {
        U16 row = __builtin_convertvector((U)decode(codes + i, count - i) >> 16, U16);
        std::memcpy(to + i, &row, sizeof row);
    }
}

inline void decode_fours(uint32_t* first, uint32_t* second, U fours) {
    U units[] = {(U)decode(fours & 0xff) >> 16 | (U)decode(fours >> 8 & 0xff),
                 (U)decode(fours >> 16 & 0xff) >> 16 | (U)decode(fours >> 24)};
    std::memcpy(first, &units[0], sizeof units[0]);
    std::memcpy(second, &units[1], sizeof units[1]);
}

#endif

// Units of a row of codes, filled up with zeros to whole rows of 64.
inline int64_t row_units(int64_t terms) { return gemm::round_up(terms, SOME) / 2; }

inline void decode_row(uint32_t* to, const uint8_t* codes, int64_t terms) {
    for (int64_t k = 0; k < terms; k += SOME)
        decode_some((uint16_t*)(to + k / 2), codes + k, std::min(terms - k, SOME));
}

// Pack up to 64 rows of codes as columns of a right factor, whose sum runs along the codes.
inline void pack_codes(uint32_t* to, const uint8_t* codes, int64_t row, int64_t terms,
                       int64_t columns) {
    int64_t stride = gemm::round_up(columns, LANES);
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t k = 0; k < terms; k += SOME) {
            U rows[LANES] = {};
            for (int64_t n = 0; n < std::min(columns - c, LANES); n++)
                rows[n] = load_some(codes + (c + n) * row + k, std::min(terms - k, SOME));
            transpose(rows);
            uint32_t* unit = to + k / 2 * stride + c;
#pragma GCC unroll 16
            for (int q = 0; q < LANES; q++, unit += 2 * stride)
                decode_fours(unit, unit + stride, rows[q]);
        }
}

}  // namespace e4m3
