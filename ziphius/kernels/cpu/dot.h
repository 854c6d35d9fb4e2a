// Products of rows with weights as a checkpoint stores them: [out, in], a row after the other, in
// BF16, FP32, or in codes that become BF16 in registers. Both factors lie along the sum, so files
// are used where they are mapped.
//
// One arithmetic for every number of rows: a sum runs over 16 lanes in the order of its terms, and
// the lanes are added in one fixed tree. A row's result does not depend on its neighbours.
#pragma once

#include "numbers.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace dot {

// Numbers of a chunk: one step of a sum.
constexpr int64_t CHUNK = 32;

enum Format : int64_t { F64 = 0, F32 = 1, BF16 = 2, FP8 = 3, INT8 = 4, INT4 = 5 };

// A weight matrix. Codes have a scale for `scale_rows` rows by `group` columns.
struct Weight {
    const uint8_t* data;
    const float* scales;
    int64_t format, rows, columns, group, scale_rows;

    int64_t row_bytes() const {
        switch (format) {
            case F64: return columns * 8;
            case F32: return columns * 4;
            case BF16: return columns * 2;
            case INT4: return columns / 2;
            default: return columns;
        }
    }
    const uint8_t* row(int64_t o) const { return data + o * row_bytes(); }
    const float* row_scales(int64_t o) const {
        return scales + o / scale_rows * ((columns + group - 1) / group);
    }
};

inline float e4m3(uint8_t code) {
    uint32_t bits = uint32_t(code & 0x80) << 24 | uint32_t(code & 0x7f) << 20;
    return __builtin_bit_cast(float, bits) * 0x1p120f;
}

// Decode a weight's row to T: the value of codes is rounded to BF16 once, after the scale.
template <class T> void decode(T* to, const Weight& w, int64_t o) {
    const uint8_t* row = w.row(o);
    const float* scales = w.format >= FP8 ? w.row_scales(o) : nullptr;
    for (int64_t k = 0; k < w.columns; k++) {
        float scale = scales ? scales[k / w.group] : 1, value;
        switch (w.format) {
            case F64: to[k] = T(narrow<T>(wide<T>(((const double*)row)[k]))); continue;
            case F32: value = ((const float*)row)[k]; break;
            case BF16: value = widen(((const bf16*)row)[k]); break;
            case FP8: value = widen(narrow<bf16>(e4m3(row[k]) * scale)); break;
            case INT8: value = widen(narrow<bf16>(float(int(row[k]) - 128) * scale)); break;
            default: {
                int code = (row[k / 2] >> (k % 2 * 4) & 15) - 8;
                value = widen(narrow<bf16>(float(code) * scale));
            }
        }
        to[k] = narrow<T>(wide<T>(value));
    }
}

template <class T>
void products(wide<T>* sums, int64_t stride, const Weight& w, int64_t o, const T* const* x,
              int64_t count, std::vector<uint8_t>& memory);

// --- any processor: 16 lanes of FP32 or 8 of float64 -------------------------------------------

template <class T> struct Plain {
    using H = wide<T>;
    static constexpr int64_t LANES = 16;
    // sums[c] of row w with each of C rows.
    static void row(H* sums, const T* w, const T* const* x, int64_t C, int64_t n) {
        for (int64_t c = 0; c < C; c++) {
            H lane[LANES] = {};
            int64_t k = 0;
            for (; k + LANES <= n; k += LANES)
                for (int64_t i = 0; i < LANES; i++) lane[i] += widen(w[k + i]) * widen(x[c][k + i]);
            for (int64_t i = 0; k + i < n; i++) lane[i] += widen(w[k + i]) * widen(x[c][k + i]);
            for (int64_t half = LANES / 2; half; half /= 2)
                for (int64_t i = 0; i < half; i++) lane[i] += lane[i + half];
            sums[c] = lane[0];
        }
    }
};

#ifdef __AVX512F__

// The same in FP32, several rows at a time: one sum alone waits for itself.
template <> struct Plain<float> {
    static void row(float* sums, const float* w, const float* const* x, int64_t C, int64_t n) {
        int64_t c = 0;
        for (; c + 6 <= C; c += 6) some<6>(sums + c, w, x + c, n);
        for (; c < C; c++) some<1>(sums + c, w, x + c, n);
    }
    template <int C> static void some(float* sums, const float* w, const float* const* x, int64_t n) {
        __m512 lane[C];
        for (int c = 0; c < C; c++) lane[c] = _mm512_setzero_ps();
        for (int64_t k = 0; k < n; k += 16) {
            __mmask16 there = n - k < 16 ? (1 << (n - k)) - 1 : 0xffff;
            __m512 weight = _mm512_maskz_loadu_ps(there, w + k);
            for (int c = 0; c < C; c++)
                lane[c] = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(there, x[c] + k), lane[c]);
        }
        for (int c = 0; c < C; c++) {
            __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lane[c]),
                                         _mm512_extractf32x8_ps(lane[c], 1));
            __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
            __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            sums[c] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
        }
    }
};

#endif

#ifdef __AVX512BF16__

// --- BF16 products that sum in FP32 ------------------------------------------------------------

// How 32 numbers of a row come into a register: `at` is prepared once a group of columns.
template <int64_t FORMAT> struct Codes;

template <> struct Codes<BF16> {
    static constexpr int64_t BYTES = 64;
    struct Group {};
    static Group group(float) { return {}; }
    static __m512bh chunk(const uint8_t* p, Group) { return (__m512bh)_mm512_loadu_si512(p); }
};

template <> struct Codes<F32> {
    static constexpr int64_t BYTES = 128;
    struct Group {};
    static Group group(float) { return {}; }
    static __m512bh chunk(const uint8_t* p, Group) {
        const float* x = (const float*)p;
        return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
    }
};

template <> struct Codes<FP8> {
    static constexpr int64_t BYTES = 32;
    using Group = __m512;
    static Group group(float scale) { return _mm512_set1_ps(scale * 0x1p120f); }
    static __m512 half(const uint8_t* p, __m512 scale) {
        __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
        __m512i bits = _mm512_and_si512(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(int(0x87f00000)));
        return _mm512_mul_ps(_mm512_castsi512_ps(bits), scale);
    }
    static __m512bh chunk(const uint8_t* p, Group scale) {
        return _mm512_cvtne2ps_pbh(half(p + 16, scale), half(p, scale));
    }
};

template <> struct Codes<INT8> {
    static constexpr int64_t BYTES = 32;
    struct Group {
        __m512 scale, shift;
    };
    static Group group(float scale) { return {_mm512_set1_ps(scale), _mm512_set1_ps(scale * -128)}; }
    // (byte - 128) * scale, rounded once as the product is: 128 is a power of two.
    static __m512 half(const uint8_t* p, Group at) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(byte), at.scale, at.shift);
    }
    static __m512bh chunk(const uint8_t* p, Group at) {
        return _mm512_cvtne2ps_pbh(half(p + 16, at), half(p, at));
    }
};

template <> struct Codes<INT4> {  // a table of the group's 16 values, looked up
    static constexpr int64_t BYTES = 16;
    using Group = __m512i;
    static Group group(float scale) {
        __m512 value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(scale));
        return (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
    }
    static __m512bh chunk(const uint8_t* p, Group table) {
        // Byte i becomes the 16-bit numbers 2i and 2i + 1: itself, and shifted by a nibble. What
        // stands above a nibble is not looked at, but for one bit, and the table is there twice.
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        __m512i pair = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
        return (__m512bh)_mm512_permutexvar_epi16(pair, table);
    }
};

// The four sums of the lanes of a, b, c and d.
inline __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                               (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

constexpr int64_t AHEAD = 8192;  // bytes

// What comes behind four rows is fetched from memory in the order of its addresses, while the four
// are met at once: that is what a processor's own fetching ahead does best at. One visit fetches
// all of it, `LINES` a chunk; of several each fetches its part into the larger cache.
struct Next {
    const char* from;
    int64_t step;  // bytes a chunk
};

// sums[c * stride + r] of 4 rows of a weight, the first of them o, with C rows of x. Rows of the
// weight beyond its last are the last one again.
// Calls f with the constants 0 to N - 1: what it indexes by them stays in registers.
template <class F, int... I>
__attribute__((always_inline)) inline void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F> __attribute__((always_inline)) inline void each(F f) {
    each(f, std::make_integer_sequence<int, N>());
}
#define EACH(i) [&](auto i) __attribute__((always_inline))

template <int64_t FORMAT, int C, bool ALONE>
inline void four(float* sums, int64_t stride, const Weight& w, int64_t o, const bf16* const* x,
                 Next next) {
    using F = Codes<FORMAT>;
    const uint8_t* rows[4];
    const float* scales[4];
    constexpr int LINES = ALONE ? 4 * F::BYTES / 64 : 2;
    each<4>(EACH(r) {
        int64_t row = std::min<int64_t>(o + r, w.rows - 1);
        rows[r] = w.row(row);
        scales[r] = FORMAT >= FP8 ? w.row_scales(row) : nullptr;
    });
    __m512 sum[4 * C];
    each<4 * C>(EACH(i) { sum[i] = _mm512_setzero_ps(); });
    int64_t n = w.columns, step = FORMAT >= FP8 ? w.group : n;
    for (int64_t start = 0; start < n; start += step) {
        int64_t end = std::min(n, start + step), k = start;
        typename F::Group at[4];
        each<4>(EACH(r) { at[r] = F::group(FORMAT >= FP8 ? scales[r][start / step] : 1); });
        for (; k + CHUNK <= end; k += CHUNK) {
            __m512bh weight[4];
            each<4>(EACH(r) { weight[r] = F::chunk(rows[r] + k / CHUNK * F::BYTES, at[r]); });
            each<LINES>(EACH(i) {
                _mm_prefetch(next.from + 64 * i, _MM_HINT_T1);
            });
            next.from += next.step;
            each<C>(EACH(c) {
                __m512bh y = (__m512bh)_mm512_loadu_si512(x[c] + k);
                each<4>(EACH(r) {
                    sum[4 * c + r] = _mm512_dpbf16_ps(sum[4 * c + r], weight[r], y);
                });
            });
        }
        if (k < end) {  // the last numbers of a row, from copies with zeros behind them
            __m512bh weight[4];
            each<4>(EACH(r) {
                alignas(64) uint8_t rest[F::BYTES] = {};
                std::memcpy(rest, rows[r] + k / CHUNK * F::BYTES, (end - k) * F::BYTES / CHUNK);
                weight[r] = F::chunk(rest, at[r]);
            });
            __mmask32 there = (uint32_t(1) << (end - k)) - 1;
            each<C>(EACH(c) {
                __m512bh y = (__m512bh)_mm512_maskz_loadu_epi16(there, x[c] + k);
                each<4>(EACH(r) {
                    sum[4 * c + r] = _mm512_dpbf16_ps(sum[4 * c + r], weight[r], y);
                });
            });
        }
    }
    each<C>(EACH(c) {
        __m512* four = sum + 4 * c;
        _mm_storeu_ps(sums + c * stride, add_lanes(four[0], four[1], four[2], four[3]));
    });
}

constexpr int64_t MOST = 6;  // rows of x whose sums fit in the registers beside 4 rows of a weight

template <int64_t FORMAT, bool ALONE>
void some_rows(float* sums, int64_t stride, const Weight& w, int64_t o, const bf16* const* x,
               int64_t count, Next next) {
    switch (count) {
        case 1: return four<FORMAT, 1, ALONE>(sums, stride, w, o, x, next);
        case 2: return four<FORMAT, 2, ALONE>(sums, stride, w, o, x, next);
        case 3: return four<FORMAT, 3, ALONE>(sums, stride, w, o, x, next);
        case 4: return four<FORMAT, 4, ALONE>(sums, stride, w, o, x, next);
        case 5: return four<FORMAT, 5, ALONE>(sums, stride, w, o, x, next);
        case 6: return four<FORMAT, 6, ALONE>(sums, stride, w, o, x, next);
    }
}

// Any number of rows, in visits as equal as can be. `behind` are the bytes that are met next.
template <int64_t FORMAT>
void four_rows(float* sums, int64_t stride, const Weight& w, int64_t o, const bf16* const* x,
               int64_t count, const char* behind, int64_t bytes) {
    behind += AHEAD - bytes / 4;
    if (count <= MOST)
        return some_rows<FORMAT, true>(sums, stride, w, o, x, count,
                                       {behind, 4 * Codes<FORMAT>::BYTES});
    int64_t visits = (count + MOST - 1) / MOST, size = count / visits, more = count % visits;
    int64_t part = bytes / visits, step = part / std::max<int64_t>(1, w.columns / CHUNK);
    for (int64_t v = 0, c = 0, some; v < visits; v++, c += some) {
        some = size + (v < more);
        some_rows<FORMAT, false>(sums + c * stride, stride, w, o, x + c, some,
                                 {behind + part * v, step});
    }
}

// Decode 4 rows once where so many rows meet them, in two visits or three: FP8 is dear to decode.
template <int64_t FORMAT> constexpr int64_t MANY = FORMAT == FP8 ? MOST + 1 : 2 * MOST + 1;

template <int64_t FORMAT>
void decode_four(bf16* to, const Weight& w, int64_t o) {
    using F = Codes<FORMAT>;
    int64_t n = w.columns, whole = n / CHUNK * CHUNK;
    for (int r = 0; r < 4; r++, to += n) {
        int64_t row = std::min(o + r, w.rows - 1);
        const float* scales = FORMAT >= FP8 ? w.row_scales(row) : nullptr;
        for (int64_t k = 0; k < whole; k += CHUNK) {
            auto at = F::group(scales ? scales[k / w.group] : 1);
            _mm512_storeu_si512(to + k, (__m512i)F::chunk(w.row(row) + k / CHUNK * F::BYTES, at));
        }
        if (whole < n) {
            alignas(64) uint8_t rest[F::BYTES] = {};
            alignas(64) bf16 values[CHUNK];
            std::memcpy(rest, w.row(row) + whole / CHUNK * F::BYTES, (n - whole) * F::BYTES / CHUNK);
            auto at = F::group(scales ? scales[whole / w.group] : 1);
            _mm512_store_si512(values, (__m512i)F::chunk(rest, at));
            std::memcpy(to + whole, values, (n - whole) * sizeof(bf16));
        }
    }
}

template <int64_t FORMAT>
void four_decoded(float* sums, int64_t stride, const Weight& w, int64_t o, const bf16* const* x,
                  int64_t count, std::vector<uint8_t>& memory) {
    int64_t bytes = 4 * w.row_bytes();
    const char* behind = (const char*)w.row(o) + bytes;
    if (FORMAT == BF16 || count < MANY<FORMAT>)
        return four_rows<FORMAT>(sums, stride, w, o, x, count, behind, bytes);
    memory.resize(4 * w.columns * sizeof(bf16));
    decode_four<FORMAT>((bf16*)memory.data(), w, o);
    Weight plain{memory.data(), nullptr, BF16, 4, w.columns, w.columns, 1};
    four_rows<BF16>(sums, stride, plain, 0, x, count, behind, bytes);
}

inline void products(float* sums, int64_t stride, const Weight& w, int64_t o,
                     const bf16* const* x, int64_t count, std::vector<uint8_t>& memory) {
    switch (w.format) {
        case F64: return products<bf16>(sums, stride, w, o, x, count, memory);
        case F32: return four_decoded<F32>(sums, stride, w, o, x, count, memory);
        case FP8: return four_decoded<FP8>(sums, stride, w, o, x, count, memory);
        case INT8: return four_decoded<INT8>(sums, stride, w, o, x, count, memory);
        case INT4: return four_decoded<INT4>(sums, stride, w, o, x, count, memory);
        default: return four_decoded<BF16>(sums, stride, w, o, x, count, memory);
    }
}

#endif

// sums[c * stride + r], r < 4: rows o to o + 3 of a weight with `count` rows of x. Rows beyond the
// weight's last give numbers that nobody wants.
template <class T>
void products(wide<T>* sums, int64_t stride, const Weight& w, int64_t o, const T* const* x,
              int64_t count, std::vector<uint8_t>& memory) {
    using H = wide<T>;
    memory.resize((w.columns + count) * sizeof(H));
    T* row = (T*)memory.data();
    H* out = (H*)(memory.data() + w.columns * sizeof(H));
    for (int r = 0; r < 4; r++) {
        const T* values = row;
        bool stored = (w.format == F64 && sizeof(T) == 8) || (w.format == F32 && sizeof(T) == 4) ||
                      (w.format == BF16 && sizeof(T) == 2);
        int64_t o_r = std::min(o + r, w.rows - 1);
        if (stored) values = (const T*)w.row(o_r);
        else decode<T>(row, w, o_r);
        Plain<T>::row(out, values, x, count, w.columns);
        for (int64_t c = 0; c < count; c++) sums[c * stride + r] = out[c];
    }
}

}  // namespace dot
