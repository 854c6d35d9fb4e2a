// Products of matrices in tiles that stay in registers.
//
// The right factor is packed: panels of up to 64 columns, in each one row after the other of
// "units" along the sum. A unit is one number, or in BF16 two neighbours of the sum in 32 bits,
// which one instruction multiplies and adds in FP32. The left factor is read where it lies.
#pragma once

#include "numbers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace gemm {

#ifdef __AVX512F__
constexpr int64_t BYTES = 64;  // of a vector
constexpr int VECTORS = 4, ROWS = 6;
#else
constexpr int64_t BYTES = 32;
constexpr int VECTORS = 2, ROWS = 6;
#endif

template <class H> struct Vector { typedef H type __attribute__((vector_size(BYTES), may_alias)); };

// What the tile needs of an element type T: how many make a unit, and the sum of products.
template <class T> struct Unit {
    using type = T;
    static constexpr int64_t SIZE = 1;
    using V = typename Vector<T>::type;
    static V add(V sum, type a, V b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
template <> struct Unit<bf16> {
    using type = uint32_t;
    static constexpr int64_t SIZE = 2;
    using V = typename Vector<float>::type;
    static V add(V sum, type a, typename Vector<uint32_t>::type b) {
        return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
};
#else
template <> struct Unit<bf16> {  // without the instruction: two widened products
    using type = uint32_t;
    static constexpr int64_t SIZE = 2;
    using V = typename Vector<float>::type;
    using I = typename Vector<uint32_t>::type;
    static V add(V sum, type a, I b) {
        float low = widen(bf16{uint16_t(a)}), high = widen(bf16{uint16_t(a >> 16)});
        sum += high * (V)(b & 0xffff0000u);
        return sum + low * (V)(b << 16);
    }
};
#endif

template <class T> using unit = typename Unit<T>::type;
template <class T> constexpr int64_t LANES = BYTES / int64_t(sizeof(wide<T>));
template <class T> constexpr int64_t PANEL = VECTORS * LANES<T>;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T> int64_t units(int64_t terms) { return round_up(terms, Unit<T>::SIZE) / Unit<T>::SIZE; }

// Units that a packed factor of ``terms`` rows and ``columns`` takes.
template <class T> int64_t packed_size(int64_t terms, int64_t columns) {
    return units<T>(terms) * round_up(columns, LANES<T>);
}

template <class T> inline unit<T> pair(T low, T high) {
    if constexpr (Unit<T>::SIZE == 1) return low;
    else return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

template <class T, class W> inline T as(W x) {
    if constexpr (std::is_same_v<T, W>) return x;
    else return narrow<T>(wide<T>(widen(x)));
}

// Pack b, whose element (term k, column n) is b[k * row + n]: rows lie side by side.
template <class T, class W>
void pack_rows(unit<T>* to, const W* b, int64_t row, int64_t terms, int64_t columns) {
    constexpr int64_t U = Unit<T>::SIZE;
    for (int64_t start = 0; start < columns; start += PANEL<T>) {
        int64_t width = std::min(PANEL<T>, columns - start), stride = round_up(width, LANES<T>);
        for (int64_t k = 0; k < terms; k += U, to += stride) {
            const W *low = b + k * row + start, *high = k + 1 < terms ? low + row : nullptr;
            if (U == 1 || high)
                for (int64_t n = 0; n < width; n++)
                    to[n] = pair<T>(as<T>(low[n]), U == 1 ? T{} : as<T>(high[n]));
            else
                for (int64_t n = 0; n < width; n++) to[n] = pair<T>(as<T>(low[n]), T{});
            std::fill(to + width, to + stride, unit<T>(0));
        }
    }
}

// Pack the transpose of w: element (term k, column n) is w[n * row + k]. A few terms of all columns
// are first rounded side by side, then turned.
template <class T, class W>
void pack_columns(unit<T>* to, const W* w, int64_t row, int64_t terms, int64_t columns) {
    constexpr int64_t U = Unit<T>::SIZE, SOME = 16;
    int64_t count = units<T>(terms);
    for (int64_t start = 0; start < columns; start += PANEL<T>) {
        int64_t width = std::min(PANEL<T>, columns - start), stride = round_up(width, LANES<T>);
        alignas(64) T rounded[PANEL<T>][SOME * U] = {};
        for (int64_t from = 0; from < count; from += SOME) {
            int64_t some = std::min(SOME, count - from), left = terms - from * U;
            for (int64_t n = 0; n < width; n++) {
                const W* source = w + (start + n) * row + from * U;
                if (left >= SOME * U)
                    for (int64_t k = 0; k < SOME * U; k++) rounded[n][k] = as<T>(source[k]);
                else
                    for (int64_t k = 0; k < SOME * U; k++)
                        rounded[n][k] = k < left ? as<T>(source[k]) : T{};
            }
            for (int64_t u = 0; u < some; u++)
                for (int64_t n = 0; n < stride; n++)
                    std::memcpy(to + (from + u) * stride + n, &rounded[n][u * U], sizeof(unit<T>));
        }
        to += count * stride;
    }
}

// Take one vector of sums from c, or give it back: `count` numbers of it.
template <class T> inline typename Unit<T>::V take(const wide<T>* c, int64_t count) {
    typename Unit<T>::V sum{};
    std::memcpy(&sum, c, std::clamp<int64_t>(count, 0, LANES<T>) * sizeof(wide<T>));
    return sum;
}

template <class T, class O> inline void give(O* c, typename Unit<T>::V sum, int64_t count) {
    wide<T> row[LANES<T>];
    std::memcpy(row, &sum, BYTES);
    for (int64_t n = 0; n < std::min(count, LANES<T>); n++) c[n] = as<O>(row[n]);
}

// A whole vector of them.
template <class T> inline typename Unit<T>::V take_all(const wide<T>* c) {
    typename Unit<T>::V sum;
    std::memcpy(&sum, c, BYTES);
    return sum;
}

template <class T, class O> inline void give_all(O* c, typename Unit<T>::V sum) {
    if constexpr (std::is_same_v<O, wide<T>>) {
        std::memcpy(c, &sum, BYTES);
    } else {
        wide<T> row[LANES<T>];
        std::memcpy(row, &sum, BYTES);
        for (int64_t n = 0; n < LANES<T>; n++) c[n] = as<O>(row[n]);
    }
}

#ifdef __AVX512BF16__
template <> inline void give_all<bf16, bf16>(bf16* c, Unit<bf16>::V sum) {
    _mm256_storeu_si256((__m256i*)c, (__m256i)_mm512_cvtneps_pbh((__m512)sum));
}
#endif

// Add R rows of a times one panel of NV vectors to the sums.
template <class T, int R, int NV>
__attribute__((always_inline)) inline void accumulate(typename Unit<T>::V (&sum)[R][NV],
                                                      const unit<T>* a, int64_t a_row,
                                                      int64_t a_term, const unit<T>* b,
                                                      int64_t count) {
    using B = typename Vector<unit<T>>::type;
    for (int64_t k = 0; k < count; k++, b += NV * LANES<T>) {
        B row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) std::memcpy(&row[j], b + j * LANES<T>, BYTES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            unit<T> x;
            std::memcpy(&x, a + r * a_row + k * a_term, sizeof x);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) sum[r][j] = Unit<T>::add(sum[r][j], x, row[j]);
        }
    }
}

// c [R, width] of a tile, or what is added to it: R rows of a, one panel of NV vectors.
template <class T, class O, int R, int NV>
inline void tile(O* c, int64_t c_row, const unit<T>* a, int64_t a_row, int64_t a_term,
                 const unit<T>* b, int64_t count, int64_t width, bool add) {
    using V = typename Unit<T>::V;
    const bool whole = width == NV * LANES<T>;
    V sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sum[r][j] = V{};
    if constexpr (std::is_same_v<O, wide<T>>) {
        if (add && whole) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++)
                    sum[r][j] = take_all<T>(c + r * c_row + j * LANES<T>);
        } else if (add) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++)
                    sum[r][j] = take<T>(c + r * c_row + j * LANES<T>, width - j * LANES<T>);
        }
    }
    accumulate<T>(sum, a, a_row, a_term, b, count);
    if (whole) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++)
                give_all<T, O>(c + r * c_row + j * LANES<T>, sum[r][j]);
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++)
                give<T, O>(c + r * c_row + j * LANES<T>, sum[r][j], width - j * LANES<T>);
    }
}

template <class T, class O, int R>
inline void tile_of(int vectors, O* c, int64_t c_row, const unit<T>* a, int64_t a_row,
                    int64_t a_term, const unit<T>* b, int64_t count, int64_t width, bool add) {
    switch (vectors) {
        case 1: tile<T, O, R, 1>(c, c_row, a, a_row, a_term, b, count, width, add); break;
        case 2: tile<T, O, R, 2>(c, c_row, a, a_row, a_term, b, count, width, add); break;
#ifdef __AVX512F__
        case 3: tile<T, O, R, 3>(c, c_row, a, a_row, a_term, b, count, width, add); break;
        default: tile<T, O, R, 4>(c, c_row, a, a_row, a_term, b, count, width, add);
#endif
    }
}

// c [rows, columns] = a b, or += a b, with b packed; unit (row r, number u) of a is
// a[r * a_row + u * a_term]. Every number of c is summed in the order of the terms, whatever the
// sizes.
template <class T, class O>
void multiply(O* c, int64_t c_row, const unit<T>* a, int64_t a_row, int64_t a_term,
              const unit<T>* b, int64_t rows, int64_t columns, int64_t terms, bool add = false) {
    int64_t count = units<T>(terms);
    for (int64_t start = 0; start < columns; start += PANEL<T>) {
        int64_t width = std::min(PANEL<T>, columns - start), stride = round_up(width, LANES<T>);
        int vectors = int(stride / LANES<T>);
        auto rows_of = [&](auto number, int64_t r) {
            tile_of<T, O, decltype(number)::value>(vectors, c + r * c_row + start, c_row,
                                                   a + r * a_row, a_row, a_term, b, count, width,
                                                   add);
            return r + decltype(number)::value;
        };
        int64_t r = 0;
        while (r + ROWS <= rows) r = rows_of(std::integral_constant<int, ROWS>{}, r);
        while (r + 4 <= rows) r = rows_of(std::integral_constant<int, 4>{}, r);
        while (r < rows) r = rows_of(std::integral_constant<int, 1>{}, r);
        b += count * stride;
    }
}

// Copy rows for use as a left factor: whole units a row, the last one filled up with zeros.
template <class T>
void line_up(unit<T>* to, const T* from, int64_t stride, int64_t rows, int64_t width) {
    int64_t row = units<T>(width);
    for (int64_t t = 0; t < rows; t++) {
        if (width % Unit<T>::SIZE) to[(t + 1) * row - 1] = 0;
        std::memcpy(to + t * row, from + t * stride, width * sizeof(T));
    }
}

// Turn a [rows, columns], whose rows are numbers side by side, for use as a left factor:
// unit (column o, number u of pairs of rows) lies at to[u * columns + o].
template <class T, class F>
void interleave(unit<T>* to, const F* a, int64_t row, int64_t rows, int64_t columns) {
    for (int64_t u = 0; u < units<T>(rows); u++) {
        const F* low = a + u * Unit<T>::SIZE * row;
        bool both = Unit<T>::SIZE == 2 && u * 2 + 1 < rows;
        if (both)
            for (int64_t o = 0; o < columns; o++)
                to[u * columns + o] = pair<T>(as<T>(low[o]), as<T>(low[row + o]));
        else
            for (int64_t o = 0; o < columns; o++) to[u * columns + o] = pair<T>(as<T>(low[o]), T{});
    }
}

// Memory of one thread or one call, aligned to vectors.
template <class U> struct Buffer {
    U* data;
    explicit Buffer(int64_t count)
        : data((U*)std::aligned_alloc(BYTES, round_up(count * int64_t(sizeof(U)) + 1, BYTES))) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
};

}  // namespace gemm
