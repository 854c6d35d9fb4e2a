// Single passes over numbers that lie side by side.
#include "numbers.h"
#include "repeat.h"

#include <algorithm>

namespace {

constexpr int64_t MANY = 1 << 16;  // numbers from which on all threads take part
constexpr int64_t BLOCK = 256;

template <class T> void add(const T* a, const T* b, T* out, int64_t count, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count >= MANY)
    for (int64_t start = 0; start < count; start += BLOCK) {
        wide<T> sums[BLOCK];
        int64_t n = std::min(BLOCK, count - start);
        for (int64_t i = 0; i < n; i++) sums[i] = widen(a[start + i]) + widen(b[start + i]);
        narrow_row(out + start, sums, n);
    }
}

template <class T>
void join(const T* a, const T* b, T* out, int64_t rows, int64_t width) {
    for (int64_t n = 0; n < rows; n++) {
        std::copy(a + n * width, a + (n + 1) * width, out + 2 * n * width);
        std::copy(b + n * width, b + (n + 1) * width, out + (2 * n + 1) * width);
    }
}

template <class T> void widen_row(const T* x, wide<T>* out, int64_t count, int64_t threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static) if (count >= MANY)
    for (int64_t i = 0; i < count; i++) out[i] = widen(x[i]);
}

}  // namespace

extern "C" void add(int64_t type, const void* a, const void* b, void* out, int64_t count,
                    int64_t threads) {
    WITH_TYPE(type, add<T>((const T*)a, (const T*)b, (T*)out, count, threads))
}

extern "C" void widen_row(int64_t type, const void* x, void* out, int64_t count, int64_t threads) {
    WITH_TYPE(type, widen_row<T>((const T*)x, (wide<T>*)out, count, threads))
}

// a and b are [rows, width], out [rows, 2 * width].
extern "C" void join(int64_t type, const void* a, const void* b, void* out, int64_t rows,
                     int64_t width, int64_t threads) {
    WITH_TYPE(type, join<T>((const T*)a, (const T*)b, (T*)out, rows, width))
}

REPEATABLE(add)
REPEATABLE(join)
REPEATABLE(widen_row)
