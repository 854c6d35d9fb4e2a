// E5M6 in tiles (kernels/e5m6.py): two codes of twelve bits in three bytes.
#include "tiles.h"

namespace {

using namespace e4m3;

typedef uint64_t U64 __attribute__((vector_size(64), may_alias));
typedef uint8_t Bytes64 __attribute__((vector_size(64), may_alias));

constexpr int64_t packed_bytes(int64_t width) { return (width + 1) / 2 * 3; }

// Codes of numbers up to 65024, and NaN where one is none. The sum is that of e4m3.h's encode, with
// six bits behind the point and 2^-14 as the smallest normal number.
inline U encode12(F x) {
    I bits = (I)x, power = bits & 0x7f800000;
    power = larger(power, I{} + (113 << 23)) + (17 << 23);
    I sum = (I)((F)(bits & 0x7fffffff) + (F)power);
    U code = U(sum - power + (power >> 17)) - (130u << 6);
    code = magnitude(x) >= 0x7f800000 ? U{} + 0x7e0u : code;
    return code | ((U)bits >> 20 & 0x800u);
}

inline F decode12(U code) {
    U size = code & 0x7ff, normal = (size << 17) + (112u << 23);
    U small = (U)(__builtin_convertvector((I)size, F) * 0x1p-20f);
    U bits = (I)size < 64 ? small : normal;
    bits = (I)size >= 0x7c0 ? size << 17 | 0x7f800000u : bits;
    return (F)(bits | (code & 0x800u) << 20);
}

// Bytes 0, 1 and 2 of every eight, one after the other, and back.
inline Bytes64 squeezed() {
    Bytes64 order{};
    for (int i = 0; i < 24; i++) order[i] = uint8_t(i / 3 * 8 + i % 3);
    return order;
}
inline Bytes64 spread() {
    Bytes64 order{};
    for (int i = 0; i < 64; i++) order[i] = uint8_t(i % 8 < 3 ? i / 8 * 3 + i % 8 : 63);
    return order;
}

inline void store12(uint8_t* to, U codes, int64_t some) {
    U64 pairs = (U64)codes;
    Bytes64 row = __builtin_shuffle((Bytes64)(pairs | pairs >> 20), squeezed());
    if (some >= LANES) std::memcpy(to, &row, packed_bytes(LANES));
    else std::memcpy(to, &row, packed_bytes(some));
}

inline U load12(const uint8_t* from, int64_t some) {
    Bytes64 row{};
    if (some >= LANES) std::memcpy(&row, from, packed_bytes(LANES));
    else std::memcpy(&row, from, packed_bytes(some));
    U64 pairs = (U64)__builtin_shuffle(row, spread());
    return (U)((pairs & 0xfff) | pairs >> 12 << 32);
}

// The smallest power of two that brings a magnitude to 65024 or less, as bits of its exponent.
inline int32_t exponent_of(int32_t amax) {
    if (amax >= 0x7f800000) return 255;
    return ((std::max(amax, 0x38d1b717) + 0x1ffff) >> 23) - 15;
}

inline F power_of_two(int32_t exponent) { return (F)(I{} + int32_t(uint32_t(exponent) << 23)); }

template <class T>
void encode_tile(const T* x, uint8_t* packed, uint8_t* exponent, int64_t width) {
    F row[GROUP / LANES];
    I most{};
    for (int64_t j = 0; j * LANES < width; j++) {
        row[j] = numbers(x + j * LANES, width - j * LANES);
        most = larger(most, magnitude(row[j]));
    }
    int32_t of = exponent_of(largest(most));
    *exponent = uint8_t(of);
    // 255 makes this an infinity, and every number of its tile NaN.
    F inverse = power_of_two(254 - of);
    for (int64_t j = 0; j * LANES < width; j++)
        store12(packed + packed_bytes(j * LANES), encode12(row[j] * inverse), width - j * LANES);
}

template <class T>
void decode_tile(const uint8_t* packed, uint8_t exponent, T* out, int64_t width) {
    F scale = power_of_two(exponent);
    for (int64_t j = 0; j * LANES < width; j++) {
        F row = decode12(load12(packed + packed_bytes(j * LANES), width - j * LANES));
        put(out + j * LANES, row * scale, width - j * LANES);
    }
}

// Calls f(row, number of its tile, first column, columns) for every tile.
template <class G> void each_tile(int64_t rows, int64_t width, int64_t threads, G f) {
#pragma omp parallel for num_threads(rows < FEW ? 1 : threads) schedule(static)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t g = 0; g < groups(width); g++)
            f(m, g, g * GROUP, std::min(GROUP, width - g * GROUP));
}

}  // namespace

extern "C" void e5m6_encode(int64_t type, const void* x, int64_t stride, uint8_t* packed,
                            uint8_t* exponents, int64_t rows, int64_t width, int64_t threads) {
    int64_t across = groups(width), row = packed_bytes(width);
    auto all = [=](auto tile) { each_tile(rows, width, threads, tile); };
    WITH_FLOAT(type, all([=](int64_t m, int64_t g, int64_t c, int64_t n) {
        encode_tile((const T*)x + m * stride + c, packed + m * row + packed_bytes(c),
                    exponents + m * across + g, n);
    }))
}

extern "C" void e5m6_decode(int64_t type, const uint8_t* packed, const uint8_t* exponents,
                            void* out, int64_t rows, int64_t width, int64_t threads) {
    int64_t across = groups(width), row = packed_bytes(width);
    auto all = [=](auto tile) { each_tile(rows, width, threads, tile); };
    WITH_FLOAT(type, all([=](int64_t m, int64_t g, int64_t c, int64_t n) {
        decode_tile(packed + m * row + packed_bytes(c), exponents[m * across + g],
                    (T*)out + m * width + c, n);
    }))
}
