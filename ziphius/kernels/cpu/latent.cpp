// Attention over the paged latent cache in the absorbed form: all heads share the cached rows,
// which are keys whole and values in their first C numbers.
//
// Keys are met in tiles of 32 positions counted from the sequence's start, in order, each query
// for itself. So a query's result depends on its own past alone: not on how a prompt was cut, who
// else is in the batch, or where the pages lie. A page holds whole tiles.
#include "dot.h"
#include "repeat.h"

#include <limits>

namespace {

using namespace dot;

constexpr int64_t TILE = 32;  // keys
constexpr int64_t ROWS = 12;  // queries times heads that share a visit of the keys

template <class T> struct Cache {
    const T* pages;
    int64_t page, C, R;
    const T* row(const int64_t* table, int64_t position) const {
        return pages + (table[position / page] * page + position % page) * (C + R);
    }
};

// What a row has summed so far.
template <class H> struct Soft {
    H largest = -std::numeric_limits<H>::max(), total = 0;
};

// Scores of a tile become weights; what was summed before fades by the result. Keys before `from`
// and from `seen` on weigh nothing.
template <class H> H soften(H* scores, Soft<H>& soft, H scale, int64_t from, int64_t seen) {
    H most = soft.largest, sum = 0, lane[16];
    for (int64_t i = 0; i < TILE; i++)
        scores[i] = from <= i && i < seen ? scores[i] * scale : -std::numeric_limits<H>::infinity();
    for (int64_t i = 0; i < 16; i++)
        lane[i] = scores[i] > scores[i + 16] ? scores[i] : scores[i + 16];
    for (int64_t half = 8; half; half /= 2)
        for (int64_t i = 0; i < half; i++)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    most = lane[0] > most ? lane[0] : most;
    H fading = exponential(soft.largest - most);
    for (int64_t i = 0; i < TILE; i++) scores[i] = exponential(scores[i] - most);
    // In 16 lanes and one fixed tree, like every sum here.
    for (int64_t i = 0; i < 16; i++) lane[i] = scores[i] + scores[i + 16];
    for (int64_t half = 8; half; half /= 2)
        for (int64_t i = 0; i < half; i++) lane[i] += lane[i + half];
    sum = lane[0];
    soft.largest = most;
    soft.total = soft.total * fading + sum;
    return fading;
}

// Whether values are met in pairs of keys.
template <class T> bool paired(int64_t C) {
#ifdef __AVX512BF16__
    return sizeof(T) == 2 && C % 64 == 0;
#else
    return false;
#endif
}

// z [rows][C] = z * fading + weights [rows][TILE] times the tile's values.
template <class T>
void plain(wide<T>* z, const T* weights, const wide<T>* fading, const T* tile, int64_t row,
            int64_t rows, int64_t C, int64_t from, int64_t seen) {
    using H = wide<T>;
    for (int64_t r = 0; r < rows; r++) {
        H* to = z + r * C;
        for (int64_t i = 0; i < C; i++) to[i] *= fading[r];
        for (int64_t k = from; k < seen; k++) {
            H weight = widen(weights[r * TILE + k]);
            const T* value = tile + k * row;
            for (int64_t i = 0; i < C; i++) to[i] += weight * widen(value[i]);
        }
    }
}

template <class T>
void gather(wide<T>* z, const T* weights, const wide<T>* fading, const T* tile, int64_t row,
            int64_t rows, int64_t C, int64_t from, int64_t seen) {
    plain(z, weights, fading, tile, row, rows, C, from, seen);
}

#ifdef __AVX512BF16__
// The same in pairs of keys. Numbers of z lie as the pairs come out of their registers: see `put`.
template <int R>
void pairs(float* z, int64_t z_row, const bf16* weights, const float* fading, const bf16* tile,
           int64_t row, int64_t columns, int64_t from, int64_t seen) {
    for (int64_t i = 0; i < columns; i += 64) {
        __m512 sum[R][4];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
        for (int64_t k = from / 2 * 2; k < seen; k += 2) {
            const bf16 *low = tile + k * row + i, *high = k + 1 < seen ? low + row : low;
            // What lies before the first key may be anything, and zero times NaN is NaN.
            if (k < from) low = high;
            __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
            __m512i c = _mm512_loadu_si512(low + 32), d = _mm512_loadu_si512(high + 32);
            __m512i pair[4] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b),
                               _mm512_unpacklo_epi16(c, d), _mm512_unpackhi_epi16(c, d)};
            for (int r = 0; r < R; r++) {
                int both;
                std::memcpy(&both, weights + r * TILE + k, sizeof both);
                __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                for (int j = 0; j < 4; j++)
                    sum[r][j] = _mm512_dpbf16_ps(sum[r][j], weight, (__m512bh)pair[j]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) {
                float* to = z + r * z_row + i + j * 16;
                __m512 fade = _mm512_set1_ps(fading[r]);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), fade, sum[r][j]));
            }
    }
}

template <>
void gather<bf16>(float* z, const bf16* weights, const float* fading, const bf16* tile, int64_t row,
                  int64_t rows, int64_t C, int64_t from, int64_t seen) {
    if (!paired<bf16>(C)) return plain(z, weights, fading, tile, row, rows, C, from, seen);
    for (; rows >= 4; rows -= 4, z += 4 * C, weights += 4 * TILE, fading += 4)
        pairs<4>(z, C, weights, fading, tile, row, C, from, seen);
    for (; rows; rows--, z += C, weights += TILE, fading++)
        pairs<1>(z, C, weights, fading, tile, row, C, from, seen);
}
#endif

// Write a row of z over its total, in the order of the columns.
template <class T> void put(T* out, wide<T>* z, int64_t C, wide<T> total) {
    using H = wide<T>;
    for (int64_t i = 0; i < C; i++) z[i] /= total;
    if (paired<T>(C))
        for (int64_t start = 0; start < C; start += 32) {
            H part[32];
            // Of 32 columns the low halves of four lanes come first, then the high ones.
            for (int64_t i = 0; i < 32; i++)
                part[i] = z[start + (i % 8 / 4) * 16 + i / 8 * 4 + i % 4];
            std::copy(part, part + 32, z + start);
        }
    narrow_row(out, z, C);
}

struct Work {
    int64_t token, tokens, head, heads;
};

template <class T>
void attend(const T* q, const Cache<T>& cache, const int64_t* tables, int64_t table_row,
            const int64_t* sequence, const int64_t* position, int64_t first, T* out, int64_t N,
            int64_t H, wide<T> scale, int64_t threads) {
    using W = wide<T>;
    int64_t width = cache.C + cache.R;
    // Heads of a token share its keys, but for a few tokens whose heads must keep all threads busy.
    // Neighbours of a sequence fill up the rows.
    int64_t parts = N < threads ? (threads + N - 1) / N : 1;
    int64_t heads = std::min(ROWS, (H + parts - 1) / parts);
    std::vector<Work> work;
    for (int64_t n = 0, some; n < N; n += some) {
        some = 1;
        while (n + some < N && (some + 1) * heads <= ROWS && sequence[n + some] == sequence[n])
            some++;
        for (int64_t h = 0; h < H; h += heads) work.push_back({n, some, h, std::min(heads, H - h)});
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> memory;
        std::vector<W> z(ROWS * cache.C), scores(ROWS * TILE);
        std::vector<T> weights(ROWS * TILE);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < int64_t(work.size()); i++) {
            Work w = work[i];
            int64_t rows = w.tokens * w.heads, last = 0;
            const T* queries[ROWS];
            int64_t ends[ROWS];  // one beyond the last key of each row
            Soft<W> soft[ROWS];
            W fading[ROWS];
            for (int64_t r = 0; r < rows; r++) {
                int64_t n = w.token + r / w.heads, h = w.head + r % w.heads;
                queries[r] = q + (n * H + h) * width;
                ends[r] = position[n] + 1;
                last = std::max(last, ends[r]);
            }
            std::fill(z.begin(), z.end(), W(0));
            const int64_t* table = tables + sequence[w.token] * table_row;
            for (int64_t key = 0; key < last; key += TILE) {
                const T* tile = cache.row(table, key);
                int64_t seen = std::min(TILE, last - key);
                Weight keys{(const uint8_t*)tile, nullptr,
                            sizeof(T) == 8 ? F64 : (sizeof(T) == 4 ? F32 : BF16), seen, width,
                            width, 1};
                for (int64_t k = 0; k < seen; k += 4)
                    products(scores.data() + k, TILE, keys, k, queries, rows, memory);
                for (int64_t r = 0; r < rows; r++) {
                    W* row = scores.data() + r * TILE;
                    fading[r] = soften(row, soft[r], scale, first - key, ends[r] - key);
                    narrow_row(weights.data() + r * TILE, row, TILE);
                }
                gather<T>(z.data(), weights.data(), fading, tile, width, rows, cache.C,
                          std::max<int64_t>(0, std::min(first - key, seen)), seen);
            }
            for (int64_t r = 0; r < rows; r++) {
                int64_t n = w.token + r / w.heads, h = w.head + r % w.heads;
                put<T>(out + (n * H + h) * cache.C, z.data() + r * cache.C, cache.C, soft[r].total);
            }
        }
    }
}

// Norm the latents, rotate the keys that all heads share, and write both into the rows of the
// cache that `slots` names; a slot below zero is not written.
template <class T>
void append(const T* kv, const wide<T>* gain, const wide<T>* cosine, const wide<T>* sine,
            const int64_t* slots, T* pages, int64_t N, int64_t C, int64_t R, wide<T> eps,
            int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static) if (N >= FEW)
    for (int64_t n = 0; n < N; n++) {
        if (slots[n] < 0) continue;
        const T* row = kv + n * (C + R);
        T* to = pages + slots[n] * (C + R);
        H square = 0;
        for (int64_t i = 0; i < C; i++) square += widen(row[i]) * widen(row[i]);
        H inverse = H(1) / std::sqrt(square / H(C) + eps);
        for (int64_t i = 0; i < C; i++)
            to[i] = narrow<T>(widen(row[i]) * inverse * gain[i]);
        for (int64_t i = 0; i < R / 2; i++) {
            H even = widen(row[C + 2 * i]), odd = widen(row[C + 2 * i + 1]);
            H c = cosine[n * R / 2 + i], s = sine[n * R / 2 + i];
            to[C + 2 * i] = narrow<T>(even * c - odd * s);
            to[C + 2 * i + 1] = narrow<T>(even * s + odd * c);
        }
    }
}

// Rotate the queries' last R numbers into the last ones of the rows that meet the cache.
template <class T>
void turn(const T* q, const wide<T>* cosine, const wide<T>* sine, T* out, int64_t N, int64_t H,
          int64_t nope, int64_t R, int64_t C, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (N >= FEW)
    for (int64_t n = 0; n < N; n++)
        for (int64_t h = 0; h < H; h++) {
            const T* from = q + (n * H + h) * (nope + R) + nope;
            T* to = out + (n * H + h) * (C + R) + C;
            for (int64_t i = 0; i < R / 2; i++) {
                wide<T> even = widen(from[2 * i]), odd = widen(from[2 * i + 1]);
                wide<T> c = cosine[n * R / 2 + i], s = sine[n * R / 2 + i];
                to[2 * i] = narrow<T>(even * c - odd * s);
                to[2 * i + 1] = narrow<T>(even * s + odd * c);
            }
        }
}

}  // namespace

// q [N, H, C + R], pages [.., page, C + R], tables [sequences, table_row] of page numbers, sequence
// and position [N] of every token, out [N, H, C]. Tokens of a sequence stand side by side. Keys
// before position `first` are left out.
extern "C" void latent_attend(int64_t type, const void* q, const void* pages, int64_t page,
                              const int64_t* tables, int64_t table_row, const int64_t* sequence,
                              const int64_t* position, int64_t first, void* out, int64_t N,
                              int64_t H, int64_t C, int64_t R, double scale, int64_t threads) {
    WITH_TYPE(type, attend<T>((const T*)q, Cache<T>{(const T*)pages, page, C, R}, tables, table_row,
                              sequence, position, first, (T*)out, N, H, wide<T>(scale),
                              threads))
}

// kv [N, C + R] before norm and rotation; cosine and sine [N, R / 2], wide; gain [C] as stored.
extern "C" void latent_append(int64_t type, const void* kv, int64_t gain_type, const void* gain,
                              const void* cosine, const void* sine, const int64_t* slots,
                              void* pages, int64_t N, int64_t C, int64_t R, double eps,
                              int64_t threads) {
    WITH_TYPE(type, append<T>((const T*)kv, Gain<wide<T>>(gain_type, gain, C).numbers,
                              (const wide<T>*)cosine, (const wide<T>*)sine, slots, (T*)pages, N, C,
                              R, wide<T>(eps), threads))
}

// q [N, H, nope + R], out [N, H, C + R], of which the last R numbers are written.
extern "C" void latent_turn(int64_t type, const void* q, const void* cosine, const void* sine,
                            void* out, int64_t N, int64_t H, int64_t nope, int64_t R, int64_t C,
                            int64_t threads) {
    WITH_TYPE(type, turn<T>((const T*)q, (const wide<T>*)cosine, (const wide<T>*)sine, (T*)out, N, H,
                            nope, R, C, threads))
}

REPEATABLE(latent_attend)
REPEATABLE(latent_append)
REPEATABLE(latent_turn)
