// Causal attention in blocks of 64 queries and 64 keys; the score matrix is never held.
//
// A head's queries, keys and values are copied once into FP32 (or float64) memory that fits a
// second-level cache; all products run there. Backward computes the weights again from the
// scores' logarithm of sums. Blocks above the diagonal are not visited.
#include "numbers.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t BYTES = 64;  // of a vector, and of the memory's alignment

template <class H> constexpr int64_t LANES = BYTES / int64_t(sizeof(H));
template <class H> struct Vector { typedef H type __attribute__((vector_size(64), may_alias)); };

// c [R rows, NV vectors] = a b, or += a b. Element (r, k) of a is a[r * a_row + k * a_column].
template <class H, int R, int NV>
inline void tile(H* c, int64_t c_row, const H* a, int64_t a_row, int64_t a_column, const H* b,
                 int64_t b_row, int64_t n, bool add) {
    using V = typename Vector<H>::type;
    V sum[R][NV];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < NV; j++)
            sum[r][j] = add ? *(const V*)(c + r * c_row + j * LANES<H>) : V{};
    for (int64_t k = 0; k < n; k++) {
        V row[NV];
        for (int j = 0; j < NV; j++) row[j] = *(const V*)(b + k * b_row + j * LANES<H>);
        for (int r = 0; r < R; r++) {
            H x = a[r * a_row + k * a_column];
            for (int j = 0; j < NV; j++) sum[r][j] += x * row[j];
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < NV; j++) *(V*)(c + r * c_row + j * LANES<H>) = sum[r][j];
}

// c [BLOCK, columns] = a b, or += a b, with n terms a sum; columns is a multiple of LANES.
template <class H>
void multiply(H* c, int64_t c_row, const H* a, int64_t a_row, int64_t a_column, const H* b,
              int64_t b_row, int64_t columns, int64_t n, bool add) {
    constexpr int R = 4;
    for (int64_t left = columns; left > 0;) {
        int64_t vectors = std::min<int64_t>(left / LANES<H>, 4);
        for (int64_t r = 0; r < BLOCK; r += R) {
            H* to = c + r * c_row;
            const H* from = a + r * a_row;
            switch (vectors) {
                case 4: tile<H, R, 4>(to, c_row, from, a_row, a_column, b, b_row, n, add); break;
                case 3: tile<H, R, 3>(to, c_row, from, a_row, a_column, b, b_row, n, add); break;
                case 2: tile<H, R, 2>(to, c_row, from, a_row, a_column, b, b_row, n, add); break;
                default: tile<H, R, 1>(to, c_row, from, a_row, a_column, b, b_row, n, add);
            }
        }
        c += vectors * LANES<H>;
        b += vectors * LANES<H>;
        left -= vectors * LANES<H>;
    }
}

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// A thread's aligned memory for one head after the other, given out in the same pieces each time:
// what a head does not write, the padding, stays zero.
template <class H> struct Memory {
    H* base;
    int64_t used = 0;
    explicit Memory(int64_t count) {
        base = (H*)std::aligned_alloc(BYTES, round_up(count * sizeof(H), BYTES));
        std::fill(base, base + count, H(0));
    }
    ~Memory() { std::free(base); }
    Memory(const Memory&) = delete;
    H* take(int64_t count) { return base + (used += count) - count; }
};

struct Shape {
    int64_t batch, heads, length, width, value;
    int64_t padded, blocks;  // length in whole blocks
};

// Element strides of (batch, head, position).
struct Strides {
    const int64_t* s;
    int64_t at(int64_t b, int64_t h, int64_t t) const { return b * s[0] + h * s[1] + t * s[2]; }
};

template <class T>
void rows_in(wide<T>* to, int64_t to_row, const T* from, int64_t stride, int64_t rows,
             int64_t width, wide<T> factor) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < width; i++)
            to[t * to_row + i] = widen(from[t * stride + i]) * factor;
}

template <class T>
void rows_out(T* to, int64_t stride, const wide<T>* from, int64_t from_row, int64_t rows,
              int64_t width, wide<T> factor) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < width; i++)
            to[t * stride + i] = narrow<T>(from[t * from_row + i] * factor);
}

// Blocks of 64 rows, each turned: [rows / 64][width][64].
template <class H>
void turned(H* to, const H* from, int64_t from_row, int64_t padded, int64_t width) {
    for (int64_t block = 0; block < padded; block += BLOCK)
        for (int64_t i = 0; i < width; i++)
            for (int64_t t = 0; t < BLOCK; t++)
                to[(block * width) + i * BLOCK + t] = from[(block + t) * from_row + i];
}

// Write value over what a query may not see of a block of keys: later ones, and other documents'.
// Queries beyond the sequence are not looked at again.
template <class H>
inline void hide(H* row, H value, const int64_t* documents, int64_t length, int64_t query,
                 int64_t key) {
    if (documents && query < length)
        for (int64_t c = 0; c < BLOCK && key + c <= query; c++)
            if (documents[key + c] != documents[query]) row[c] = value;
    for (int64_t c = query - key + 1; c < BLOCK; c++) row[c] = value;
}

// exp(scores - offset of the row), in place, 0 where the key is hidden.
template <class H>
void weights(H* scores, const H* offset, const int64_t* documents, int64_t length, int64_t query,
             int64_t key) {
    for (int64_t r = 0; r < BLOCK; r++) {
        H *row = scores + r * BLOCK, shift = offset[r];
#pragma omp simd
        for (int64_t c = 0; c < BLOCK; c++) row[c] = exponential(row[c] - shift);
        hide(row, H(0), documents, length, query + r, key);
    }
}

template <class T>
void forward_head(Memory<wide<T>>& memory, const T* q, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row,
                  const int64_t* documents, T* out, int64_t out_row, wide<T>* log_sums, Shape s,
                  wide<T> scale) {
    using H = wide<T>;
    int64_t width = round_up(s.width, LANES<H>), value = round_up(s.value, LANES<H>);
    memory.used = 0;
    H *keys = memory.take(s.padded * width), *keys_turned = memory.take(s.padded * width);
    H *values = memory.take(s.padded * value), *queries = memory.take(BLOCK * width);
    H *scores = memory.take(BLOCK * BLOCK), *sums = memory.take(BLOCK * value);
    H *largest = memory.take(BLOCK), *total = memory.take(BLOCK);
    rows_in(keys, width, k, k_row, s.length, s.width, H(1));
    turned(keys_turned, keys, width, s.padded, width);
    rows_in(values, value, v, v_row, s.length, s.value, H(1));
    for (int64_t query = 0; query < s.padded; query += BLOCK) {
        int64_t rows = std::min(BLOCK, s.length - query);
        std::fill(queries, queries + BLOCK * width, H(0));
        rows_in(queries, width, q + query * q_row, q_row, rows, s.width, scale);
        std::fill(sums, sums + BLOCK * value, H(0));
        std::fill(largest, largest + BLOCK, -std::numeric_limits<H>::max());
        std::fill(total, total + BLOCK, H(0));
        for (int64_t key = 0; key <= query; key += BLOCK) {
            multiply(scores, BLOCK, queries, width, 1, keys_turned + key * width, BLOCK, BLOCK,
                     width, false);
            for (int64_t r = 0; r < BLOCK; r++) {
                H *row = scores + r * BLOCK, most = largest[r];
                hide(row, -std::numeric_limits<H>::infinity(), documents, s.length, query + r, key);
#pragma omp simd reduction(max : most)
                for (int64_t c = 0; c < BLOCK; c++) most = row[c] > most ? row[c] : most;
                H fading = exponential(largest[r] - most), sum = 0;
                largest[r] = most;
#pragma omp simd reduction(+ : sum)
                for (int64_t c = 0; c < BLOCK; c++) {
                    row[c] = exponential(row[c] - most);
                    sum += row[c];
                }
                total[r] = total[r] * fading + sum;
                for (int64_t i = 0; i < value; i++) sums[r * value + i] *= fading;
            }
            multiply(sums, value, scores, BLOCK, 1, values + key * value, value, value, BLOCK,
                     true);
        }
        for (int64_t r = 0; r < rows; r++) {
            log_sums[query + r] = largest[r] + std::log(total[r]);
            rows_out(out + (query + r) * out_row, 0, sums + r * value, 0, 1, s.value,
                     H(1) / total[r]);
        }
    }
}

template <class T>
void backward_head(Memory<wide<T>>& memory, const T* q, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row,
                   const T* out, int64_t out_row, const T* dout, int64_t dout_row,
                   const int64_t* documents, const wide<T>* log_sums, T* dq, int64_t dq_row, T* dk,
                   int64_t dk_row, T* dv, int64_t dv_row, Shape s, wide<T> scale) {
    using H = wide<T>;
    int64_t width = round_up(s.width, LANES<H>), value = round_up(s.value, LANES<H>);
    memory.used = 0;
    H *queries = memory.take(s.padded * width), *keys = memory.take(s.padded * width);
    H *keys_turned = memory.take(s.padded * width), *values_turned = memory.take(s.padded * value);
    H *values = memory.take(s.padded * value), *douts = memory.take(s.padded * value);
    H *dqueries = memory.take(s.padded * width), *dkeys = memory.take(s.padded * width);
    H *offsets = memory.take(s.padded), *deltas = memory.take(s.padded);
    H *p = memory.take(BLOCK * BLOCK), *ds = memory.take(BLOCK * BLOCK);
    H* dvalues = memory.take(BLOCK * value);
    std::fill(dqueries, dqueries + s.padded * width, H(0));
    std::fill(dkeys, dkeys + s.padded * width, H(0));
    rows_in(queries, width, q, q_row, s.length, s.width, scale);
    rows_in(keys, width, k, k_row, s.length, s.width, H(1));
    rows_in(values, value, v, v_row, s.length, s.value, H(1));
    rows_in(douts, value, dout, dout_row, s.length, s.value, H(1));
    turned(keys_turned, keys, width, s.padded, width);
    turned(values_turned, values, value, s.padded, value);
    for (int64_t t = 0; t < s.length; t++) {
        H delta = 0;
        const T* row = out + t * out_row;
#pragma omp simd reduction(+ : delta)
        for (int64_t i = 0; i < s.value; i++) delta += douts[t * value + i] * widen(row[i]);
        deltas[t] = delta;
        offsets[t] = log_sums[t];
    }
    for (int64_t key = 0; key < s.padded; key += BLOCK) {
        std::fill(dvalues, dvalues + BLOCK * value, H(0));
        H* dkey = dkeys + key * width;
        for (int64_t query = key; query < s.padded; query += BLOCK) {
            const H *some = queries + query * width, *grads = douts + query * value;
            multiply(p, BLOCK, some, width, 1, keys_turned + key * width, BLOCK, BLOCK, width,
                     false);
            weights(p, offsets + query, documents, s.length, query, key);
            multiply(dvalues, value, p, 1, BLOCK, grads, value, value, BLOCK, true);
            multiply(ds, BLOCK, grads, value, 1, values_turned + key * value, BLOCK, BLOCK, value,
                     false);
            for (int64_t r = 0; r < BLOCK; r++)
                for (int64_t c = 0; c < BLOCK; c++)
                    ds[r * BLOCK + c] = p[r * BLOCK + c] * (ds[r * BLOCK + c] - deltas[query + r]);
            multiply(dkey, width, ds, 1, BLOCK, some, width, width, BLOCK, true);
            multiply(dqueries + query * width, width, ds, BLOCK, 1, keys + key * width, width,
                     width, BLOCK, true);
        }
        rows_out(dv + key * dv_row, dv_row, dvalues, value, std::min(BLOCK, s.length - key),
                 s.value, H(1));
    }
    rows_out(dq, dq_row, dqueries, width, s.length, s.width, scale);
    rows_out(dk, dk_row, dkeys, width, s.length, s.width, H(1));  // the queries had the scale
}

template <class T>
void forward(const T* q, const T* k, const T* v, const int64_t* strides, const int64_t* documents,
             T* out, wide<T>* log_sums, Shape s, double scale, int64_t threads) {
    Strides sq{strides}, sk{strides + 3}, sv{strides + 6}, so{strides + 9};
    int64_t width = round_up(s.width, LANES<wide<T>>), value = round_up(s.value, LANES<wide<T>>);
#pragma omp parallel num_threads(threads)
    {
    Memory<wide<T>> memory(s.padded * (2 * width + value) + BLOCK * (width + BLOCK + value + 2));
#pragma omp for schedule(static)
    for (int64_t head = 0; head < s.batch * s.heads; head++) {
        int64_t b = head / s.heads, h = head % s.heads;
        forward_head(memory, q + sq.at(b, h, 0), sq.s[2], k + sk.at(b, h, 0), sk.s[2], v + sv.at(b, h, 0),
                     sv.s[2], documents ? documents + b * s.length : nullptr,
                     out + so.at(b, h, 0), so.s[2], log_sums + head * s.length, s,
                     wide<T>(scale));
    }
    }
}

template <class T>
void backward(const T* q, const T* k, const T* v, const T* out, const T* dout,
              const int64_t* strides, const int64_t* documents, const wide<T>* log_sums, T* dq,
              T* dk, T* dv, Shape s, double scale, int64_t threads) {
    Strides sq{strides}, sk{strides + 3}, sv{strides + 6}, so{strides + 9}, sd{strides + 12};
    Strides gq{strides + 15}, gk{strides + 18}, gv{strides + 21};
    int64_t width = round_up(s.width, LANES<wide<T>>), value = round_up(s.value, LANES<wide<T>>);
#pragma omp parallel num_threads(threads)
    {
    Memory<wide<T>> memory(s.padded * (5 * width + 3 * value + 2) +
                           BLOCK * (2 * BLOCK + value));
#pragma omp for schedule(static)
    for (int64_t head = 0; head < s.batch * s.heads; head++) {
        int64_t b = head / s.heads, h = head % s.heads;
        backward_head(memory, q + sq.at(b, h, 0), sq.s[2], k + sk.at(b, h, 0), sk.s[2],
                      v + sv.at(b, h, 0), sv.s[2], out + so.at(b, h, 0), so.s[2],
                      dout + sd.at(b, h, 0), sd.s[2],
                      documents ? documents + b * s.length : nullptr,
                      log_sums + head * s.length, dq + gq.at(b, h, 0), gq.s[2],
                      dk + gk.at(b, h, 0), gk.s[2], dv + gv.at(b, h, 0), gv.s[2], s,
                      wide<T>(scale));
    }
    }
}

Shape shape(int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t value) {
    int64_t padded = round_up(length, BLOCK);
    return {batch, heads, length, width, value, padded, padded / BLOCK};
}

}  // namespace

// q and k are [batch, heads, length, width], v and out [.., value], log_sums [batch, heads,
// length]. strides has three numbers a tensor: q, k, v, out.
extern "C" void attention_forward(int64_t type, const void* q, const void* k, const void* v,
                                  const int64_t* strides, const int64_t* documents, void* out,
                                  void* log_sums, int64_t batch, int64_t heads, int64_t length,
                                  int64_t width, int64_t value, double scale, int64_t threads) {
    Shape s = shape(batch, heads, length, width, value);
    WITH_TYPE(type, forward<T>((const T*)q, (const T*)k, (const T*)v, strides, documents, (T*)out,
                               (wide<T>*)log_sums, s, scale, threads))
}

// strides: q, k, v, out, dout, dq, dk, dv.
extern "C" void attention_backward(int64_t type, const void* q, const void* k, const void* v,
                                   const void* out, const void* dout, const int64_t* strides,
                                   const int64_t* documents, const void* log_sums, void* dq,
                                   void* dk, void* dv, int64_t batch, int64_t heads,
                                   int64_t length, int64_t width, int64_t value, double scale,
                                   int64_t threads) {
    Shape s = shape(batch, heads, length, width, value);
    WITH_TYPE(type, backward<T>((const T*)q, (const T*)k, (const T*)v, (const T*)out,
                                (const T*)dout, strides, documents, (const wide<T>*)log_sums,
                                (T*)dq, (T*)dk, (T*)dv, s, scale, threads))
}
