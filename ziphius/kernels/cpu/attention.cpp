// Causal attention in blocks of 64 queries and 64 keys; the score matrix is never held.
//
// A head's matrices are packed once; all products run on the packed forms, in BF16 with sums in
// FP32 where the tensors are BF16. Backward computes the weights again from the scores' logarithm
// of sums. Blocks above the diagonal are not visited, nor those between other documents.
#include "gemm.h"

#include <limits>
#include <utility>
#include <vector>

namespace {

using namespace gemm;

constexpr int64_t BLOCK = 64;

// A thread's aligned memory for one head after the other.
template <class H> struct Memory {
    Buffer<H> buffer;
    int64_t used = 0;
    explicit Memory(int64_t count) : buffer(count) {}
    H* take(int64_t count) {
        used += round_up(count, BYTES / int64_t(sizeof(H)));
        return buffer.data + used - round_up(count, BYTES / int64_t(sizeof(H)));
    }
};

struct Shape {
    int64_t batch, heads, length, width, value;
    int64_t padded;  // length in whole blocks
};

// A position's numbers, of one head of one sequence.
template <class T> struct Rows {
    T* at;
    int64_t stride;
    T* operator[](int64_t t) const { return at + t * stride; }
};

// Element strides of (batch, head, position).
struct Strides {
    const int64_t* s;
    template <class T> Rows<T> of(T* x, int64_t b, int64_t h) const {
        return {x + b * s[0] + h * s[1], s[2]};
    }
};

template <class T>
void rows_out(Rows<T> to, const wide<T>* from, int64_t rows, int64_t width, wide<T> factor) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < width; i++) to[t][i] = narrow<T>(from[t * width + i] * factor);
}

// Whether queries of one block see keys of another, by the documents of both.
enum class Sight { NOTHING, SOME, ALL };

// The first and the last number of the documents in every block; nothing where there is no mask.
class Documents {
  public:
    Documents(const int64_t* numbers, int64_t length) : numbers(numbers) {
        for (int64_t t = 0; numbers && t < length; t += BLOCK) {
            const int64_t *begin = numbers + t, *end = numbers + std::min(t + BLOCK, length);
            auto [first, last] = std::minmax_element(begin, end);
            ranges.push_back({*first, *last});
        }
    }
    Sight sight(int64_t query, int64_t key) const {
        if (!numbers) return Sight::ALL;
        auto [from, to] = ranges[query / BLOCK];
        auto [first, last] = ranges[key / BLOCK];
        if (first > to || last < from) return Sight::NOTHING;
        return first == last && from == to ? Sight::ALL : Sight::SOME;
    }
    // Write value over what a query may not see of a block of keys: later ones, other documents'.
    template <class H> void hide(H* row, H value, int64_t query, int64_t key) const {
        int64_t seen = std::min(BLOCK, query - key + 1);
        if (numbers)
            for (int64_t c = 0; c < seen; c++)
                row[c] = numbers[key + c] == numbers[query] ? row[c] : value;
        for (int64_t c = seen; c < BLOCK; c++) row[c] = value;
    }

  private:
    const int64_t* numbers;
    std::vector<std::pair<int64_t, int64_t>> ranges;
};

std::vector<Documents> documents_of(const int64_t* numbers, Shape s) {
    std::vector<Documents> all;
    for (int64_t b = 0; b < s.batch; b++)
        all.emplace_back(numbers ? numbers + b * s.length : nullptr, s.length);
    return all;
}

// One row of a block of scores: its weights against the largest score so far, in place. Sums so
// far fade by what is returned.
template <class H> inline H soften(H* row, H scale, H& largest, H& total) {
    H most = largest, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t c = 0; c < BLOCK; c++) {
        row[c] *= scale;
        most = row[c] > most ? row[c] : most;
    }
    H fading = exponential(largest - most);
    largest = most;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < BLOCK; c++) {
        row[c] = exponential(row[c] - most);
        sum += row[c];
    }
    total = total * fading + sum;
    return fading;
}

template <class T> int64_t forward_memory(Shape s) {
    return packed_size<T>(s.width, BLOCK) * s.padded / BLOCK +
           packed_size<T>(BLOCK, s.value) * s.padded / BLOCK + units<T>(s.width) * BLOCK +
           units<T>(BLOCK) * BLOCK;
}

template <class T>
void forward_head(Memory<unit<T>>& memory, Memory<wide<T>>& wides, Rows<const T> q,
                  Rows<const T> k, Rows<const T> v, const Documents& documents, Rows<T> out,
                  wide<T>* log_sums, Shape s, wide<T> scale) {
    using H = wide<T>;
    memory.used = wides.used = 0;
    int64_t key_size = packed_size<T>(s.width, BLOCK), value_size = packed_size<T>(BLOCK, s.value);
    unit<T>* keys = memory.take(key_size * s.padded / BLOCK);
    unit<T>* values = memory.take(value_size * s.padded / BLOCK);
    unit<T>* queries = memory.take(units<T>(s.width) * BLOCK);
    unit<T>* weights = memory.take(units<T>(BLOCK) * BLOCK);
    H *scores = wides.take(BLOCK * BLOCK), *sums = wides.take(BLOCK * s.value);
    H *largest = wides.take(BLOCK), *total = wides.take(BLOCK);
    for (int64_t key = 0; key < s.length; key += BLOCK) {
        int64_t some = std::min(BLOCK, s.length - key), block = key / BLOCK;
        pack_columns<T>(keys + block * key_size, k[key], k.stride, s.width, some);
        pack_rows<T>(values + block * value_size, v[key], v.stride, some, s.value);
    }
    for (int64_t query = 0; query < s.length; query += BLOCK) {
        int64_t rows = std::min(BLOCK, s.length - query);
        line_up<T>(queries, q[query], q.stride, rows, s.width);
        std::fill(sums, sums + BLOCK * s.value, H(0));
        std::fill(largest, largest + BLOCK, -std::numeric_limits<H>::max());
        std::fill(total, total + BLOCK, H(0));
        for (int64_t key = 0; key <= query; key += BLOCK) {
            Sight sight = documents.sight(query, key);
            if (sight == Sight::NOTHING) continue;
            int64_t some = std::min(BLOCK, s.length - key), block = key / BLOCK;
            multiply<T, H>(scores, BLOCK, queries, units<T>(s.width), 1, keys + block * key_size,
                           rows, some, s.width);
            for (int64_t r = 0; r < rows; r++) {
                H* row = scores + r * BLOCK;
                if (key == query || sight == Sight::SOME)
                    documents.hide(row, -std::numeric_limits<H>::infinity(), query + r, key);
                H fading = soften(row, scale, largest[r], total[r]);
                for (int64_t i = 0; i < s.value; i++) sums[r * s.value + i] *= fading;
                T* weight = (T*)weights + r * BLOCK;
                for (int64_t c = 0; c < BLOCK; c++) weight[c] = narrow<T>(row[c]);
            }
            multiply<T, H>(sums, s.value, weights, units<T>(BLOCK), 1, values + block * value_size,
                           rows, s.value, some, true);
        }
        for (int64_t r = 0; r < rows; r++) {
            log_sums[query + r] = largest[r] + std::log(total[r]);
            rows_out<T>({out[query + r], 0}, sums + r * s.value, 1, s.value, H(1) / total[r]);
        }
    }
}

// What backward needs of every block of a matrix: its rows as a left factor, and packed forms.
template <class T> struct Packed {
    unit<T>*left, *rows, *columns;
    int64_t left_size, rows_size, columns_size;
    Packed(Memory<unit<T>>& memory, Rows<const T> x, Shape s, int64_t width, bool with_left,
           bool with_rows, bool with_columns) {
        int64_t blocks = s.padded / BLOCK;
        left_size = with_left ? units<T>(width) * BLOCK : 0;
        rows_size = with_rows ? packed_size<T>(BLOCK, width) : 0;
        columns_size = with_columns ? packed_size<T>(width, BLOCK) : 0;
        left = memory.take(left_size * blocks);
        rows = memory.take(rows_size * blocks);
        columns = memory.take(columns_size * blocks);
        for (int64_t b = 0; b < blocks; b++) {
            int64_t t = b * BLOCK, some = std::min(BLOCK, s.length - t);
            if (with_left) line_up<T>(left + b * left_size, x[t], x.stride, some, width);
            if (with_rows) pack_rows<T>(rows + b * rows_size, x[t], x.stride, some, width);
            if (with_columns)
                pack_columns<T>(columns + b * columns_size, x[t], x.stride, width, some);
        }
    }
    static int64_t memory(Shape s, int64_t width) {
        int64_t one = units<T>(width) * BLOCK + packed_size<T>(BLOCK, width) +
                      packed_size<T>(width, BLOCK);
        return one * s.padded / BLOCK + 3 * BYTES;
    }
};

template <class T>
void backward_head(Memory<unit<T>>& memory, Memory<wide<T>>& wides, Rows<const T> q,
                   Rows<const T> k, Rows<const T> v, Rows<const T> out, Rows<const T> dout,
                   const Documents& documents, const wide<T>* log_sums, Rows<T> dq, Rows<T> dk,
                   Rows<T> dv, Shape s, wide<T> scale) {
    using H = wide<T>;
    memory.used = wides.used = 0;
    Packed<T> queries(memory, q, s, s.width, true, true, false);
    Packed<T> keys(memory, k, s, s.width, false, true, true);
    Packed<T> values(memory, v, s, s.value, false, false, true);
    Packed<T> douts(memory, dout, s, s.value, true, true, false);
    unit<T>* turned = memory.take(units<T>(BLOCK) * BLOCK);
    unit<T>* left = memory.take(units<T>(BLOCK) * BLOCK);
    H *dqueries = wides.take(s.length * s.width), *deltas = wides.take(s.length);
    H *dkeys = wides.take(BLOCK * s.width), *dvalues = wides.take(BLOCK * s.value);
    H *p = wides.take(BLOCK * BLOCK), *ds = wides.take(BLOCK * BLOCK);
    std::fill(dqueries, dqueries + s.length * s.width, H(0));
    for (int64_t t = 0; t < s.length; t++) {
        H delta = 0;
#pragma omp simd reduction(+ : delta)
        for (int64_t i = 0; i < s.value; i++) delta += widen(dout[t][i]) * widen(out[t][i]);
        deltas[t] = delta;
    }
    for (int64_t key = 0; key < s.length; key += BLOCK) {
        int64_t some = std::min(BLOCK, s.length - key), j = key / BLOCK;
        std::fill(dkeys, dkeys + BLOCK * s.width, H(0));
        std::fill(dvalues, dvalues + BLOCK * s.value, H(0));
        for (int64_t query = key; query < s.length; query += BLOCK) {
            Sight sight = documents.sight(query, key);
            if (sight == Sight::NOTHING) continue;
            bool hiding = key == query || sight == Sight::SOME;
            int64_t rows = std::min(BLOCK, s.length - query), i = query / BLOCK;
            multiply<T, H>(p, BLOCK, queries.left + i * queries.left_size, units<T>(s.width), 1,
                           keys.columns + j * keys.columns_size, rows, some, s.width);
            multiply<T, H>(ds, BLOCK, douts.left + i * douts.left_size, units<T>(s.value), 1,
                           values.columns + j * values.columns_size, rows, some, s.value);
            for (int64_t r = 0; r < rows; r++) {
                H *row = p + r * BLOCK, *grad = ds + r * BLOCK;
                H shift = log_sums[query + r], delta = deltas[query + r];
#pragma omp simd
                for (int64_t c = 0; c < BLOCK; c++) row[c] = exponential(row[c] * scale - shift);
                if (hiding) documents.hide(row, H(0), query + r, key);
                for (int64_t c = 0; c < BLOCK; c++) grad[c] = row[c] * (grad[c] - delta);
                if (hiding) documents.hide(grad, H(0), query + r, key);
                T* to = (T*)left + r * BLOCK;
                for (int64_t c = 0; c < BLOCK; c++) to[c] = narrow<T>(grad[c]);
            }
            interleave<T>(turned, p, BLOCK, rows, BLOCK);
            multiply<T, H>(dvalues, s.value, turned, 1, BLOCK, douts.rows + i * douts.rows_size,
                           some, s.value, rows, true);
            interleave<T>(turned, ds, BLOCK, rows, BLOCK);
            multiply<T, H>(dkeys, s.width, turned, 1, BLOCK, queries.rows + i * queries.rows_size,
                           some, s.width, rows, true);
            multiply<T, H>(dqueries + query * s.width, s.width, left, units<T>(BLOCK), 1,
                           keys.rows + j * keys.rows_size, rows, s.width, some, true);
        }
        rows_out<T>({dk[key], dk.stride}, dkeys, some, s.width, scale);
        rows_out<T>({dv[key], dv.stride}, dvalues, some, s.value, H(1));
    }
    rows_out<T>(dq, dqueries, s.length, s.width, scale);
}

template <class T>
void forward(const T* q, const T* k, const T* v, const int64_t* strides, const int64_t* documents,
             T* out, wide<T>* log_sums, Shape s, double scale, int64_t threads) {
    Strides sq{strides}, sk{strides + 3}, sv{strides + 6}, so{strides + 9};
    std::vector<Documents> marked = documents_of(documents, s);
#pragma omp parallel num_threads(threads)
    {
        Memory<unit<T>> memory(forward_memory<T>(s) + 4 * BYTES);
        Memory<wide<T>> wides(BLOCK * (BLOCK + s.value + 2) + 4 * BYTES);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < s.batch * s.heads; head++) {
            int64_t b = head / s.heads, h = head % s.heads;
            forward_head<T>(memory, wides, sq.of(q, b, h), sk.of(k, b, h), sv.of(v, b, h),
                            marked[b], so.of(out, b, h), log_sums + head * s.length, s,
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
    std::vector<Documents> marked = documents_of(documents, s);
#pragma omp parallel num_threads(threads)
    {
        Memory<unit<T>> memory(2 * Packed<T>::memory(s, s.width) +
                               2 * Packed<T>::memory(s, s.value) + 2 * units<T>(BLOCK) * BLOCK);
        Memory<wide<T>> wides((s.length + BLOCK) * s.width + BLOCK * s.value + s.length +
                              2 * BLOCK * BLOCK + 6 * BYTES);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < s.batch * s.heads; head++) {
            int64_t b = head / s.heads, h = head % s.heads;
            backward_head<T>(memory, wides, sq.of(q, b, h), sk.of(k, b, h), sv.of(v, b, h),
                             so.of(out, b, h), sd.of(dout, b, h),
                             marked[b], log_sums + head * s.length, gq.of(dq, b, h),
                             gk.of(dk, b, h), gv.of(dv, b, h), s, wide<T>(scale));
        }
    }
}

Shape shape(int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t value) {
    int64_t padded = round_up(length, BLOCK);
    return {batch, heads, length, width, value, padded};
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
