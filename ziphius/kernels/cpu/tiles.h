// Numbers from anywhere into E4M3: in tiles of a row by 128 columns, turned in tiles of 128 rows by
// a column, or both in one reading. A source says what the numbers of a row are.
#pragma once

#include "decode.h"

#include <vector>

namespace e4m3 {

// A matrix as it lies.
template <class T> struct Plain {
    const T* data;
    int64_t stride;
    F at(int64_t row, int64_t column, int64_t some) const {
        return numbers(data + row * stride + column, some);
    }
};

// A matrix in tiles, back as numbers.
struct Tiles {
    const uint8_t* codes;
    const float* scales;
    int64_t width;
    F at(int64_t row, int64_t column, int64_t some) const {
        return decode(codes + row * width + column, some) *
               scales[row * groups(width) + column / GROUP];
    }
};

// Where codes go: no codes, none wanted. ``width`` is a row of codes.
struct Target {
    uint8_t* codes;
    float* scales;
    int64_t width;
    bool power_of_two;
};

constexpr int64_t STRIP = 2;  // vectors of columns that are turned together

// A tile of ``width`` columns as codes with their scale. Where the width is known to be whole, the
// compiler leaves out what ragged ones need.
template <class S>
inline __attribute__((always_inline)) void put_tile(const Target& to, const S& source, int64_t m,
                                                    int64_t column, int64_t width) {
    F row[GROUP / LANES];
    I most{};
    int64_t vectors = (width + LANES - 1) / LANES;
#pragma GCC unroll 8
    for (int64_t j = 0; j < vectors; j++) {
        row[j] = source.at(m, column + j * LANES, width - j * LANES);
        most = larger(most, magnitude(row[j]));
    }
    float scale = scale_of<float>(largest(most), to.power_of_two);
    to.scales[m * groups(to.width) + column / GROUP] = scale;
    uint8_t* codes = to.codes + m * to.width + column;
    Encoder(scale, to.power_of_two).each(
        vectors, [&](int64_t j) { return row[j]; },
        [&](int64_t j, U code) {
            store(codes + j * LANES, __builtin_convertvector(code, U8), width - j * LANES);
        });
}

template <class S>
void put_tiles(const Target& to, const S& source, int64_t start, int64_t rows, int64_t column) {
    int64_t width = to.width - column;
    for (int64_t m = start; m < start + rows; m++)
        if (width >= GROUP) put_tile(to, source, m, column, GROUP);
        else if (width == GROUP / 2) put_tile(to, source, m, column, GROUP / 2);
        else put_tile(to, source, m, column, width);
}

inline void put_zeros(const Target& to, int64_t column, int64_t columns, int64_t group) {
    for (int64_t c = column; c < column + columns; c++) {
        to.scales[c * (to.width / GROUP) + group] = scale_of<float>(0, to.power_of_two);
        std::memset(to.codes + c * to.width + group * GROUP, 0, GROUP);
    }
}

// 128 rows, or fewer and then zeros, of 32 columns: their group number ``group``.
template <class S>
void put_turned(const Target& to, const S& source, int64_t start, int64_t rows, int64_t column,
                int64_t columns, int64_t group) {
    if (!rows) return put_zeros(to, column, std::min(columns - column, STRIP * LANES), group);
    F kept[STRIP][GROUP];
    I most[STRIP] = {};
    for (int64_t m = 0; m < rows; m++)
        for (int64_t j = 0; j < STRIP; j++) {
            kept[j][m] = source.at(start + m, column + j * LANES, columns - column - j * LANES);
            most[j] = larger(most[j], magnitude(kept[j][m]));
        }
    for (int64_t j = 0; j < STRIP; j++) {
        int64_t first = column + j * LANES, some = std::min(columns - first, LANES);
        std::fill(kept[j] + rows, kept[j] + GROUP, F{});
        F scale = scale_of<F>(most[j], to.power_of_two);
        for (int64_t c = 0; c < some; c++)
            to.scales[(first + c) * (to.width / GROUP) + group] = scale[c];
        Encoder encoder(scale, to.power_of_two);
        for (int64_t half = 0; half < GROUP; half += 64) {
            U codes[64];
            encoder.each(
                64, [&](int64_t m) { return kept[j][half + m]; },
                [&](int64_t m, U code) { codes[m] = code; });
            turn(to.codes + first * to.width + group * GROUP + half, to.width, codes, some, 64);
        }
    }
}

// Rows of a turned matrix's group; groups that no row reaches have none.
struct Rows {
    int64_t start, count;
};

inline std::vector<Rows> row_groups(const int64_t* counts, int64_t segments, int64_t rows,
                                    int64_t wanted) {
    std::vector<Rows> found;
    for (int64_t e = 0, start = 0; e < segments; e++) {
        int64_t count = counts ? counts[e] : rows;
        for (int64_t r = 0; r < count; r += GROUP)
            found.push_back({start + r, std::min(GROUP, count - r)});
        start += count;
    }
    if (int64_t(found.size()) < wanted) found.resize(wanted, Rows{rows, 0});
    return found;
}

// Quantise ``rows`` rows of ``columns`` numbers in tiles, turned in segments, or both.
template <class S>
void quantize(const S& source, const Target& tiles, const Target& turned, const int64_t* counts,
              int64_t segments, int64_t rows, int64_t columns, int64_t threads) {
    int64_t wanted = turned.codes ? turned.width / GROUP : 0;
    std::vector<Rows> found = row_groups(counts, segments, rows, wanted);
    int64_t across = groups(columns), pieces = int64_t(found.size()) * across;
    if (rows < FEW) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pieces; i++) {
        int64_t group = i / across, column = i % across * GROUP;
        Rows some = found[group];
        if (tiles.codes) put_tiles(tiles, source, some.start, some.count, column);
        if (turned.codes)
            for (int64_t c = column; c < std::min(column + GROUP, columns); c += STRIP * LANES)
                put_turned(turned, source, some.start, some.count, c, columns, group);
    }
}

}  // namespace e4m3

// Runs a statement with T set to BF16 or FP32.
#define WITH_FLOAT(type, ...)                      \
    if (type == 2) { using T = bf16; __VA_ARGS__; } \
    else { using T = float; __VA_ARGS__; }
