// Grouped products: rows sorted by expert meet their expert's matrix. Work is dealt to threads in
// blocks of rows, or of a matrix's gradient, so that small experts cost no start of a product.
#include "gemm.h"

#include <vector>

namespace {

using namespace gemm;

constexpr int64_t BLOCK = 96;  // rows a piece of work: whole tiles

struct Piece {
    int64_t expert, start, rows;
};

std::vector<Piece> pieces(const int64_t* counts, int64_t experts) {
    std::vector<Piece> work;
    for (int64_t e = 0, start = 0; e < experts; start += counts[e++])
        for (int64_t r = 0; r < counts[e]; r += BLOCK)
            work.push_back({e, start + r, std::min(BLOCK, counts[e] - r)});
    return work;
}

// out [M, columns] = x [M, terms] times a factor an expert. The weight is stored [terms, columns],
// or turned, [columns, terms].
template <class T, class W>
void rows_times(const T* x, const W* weight, const int64_t* counts, T* out, int64_t experts,
                int64_t terms, int64_t columns, bool turned, int64_t threads) {
    int64_t size = packed_size<T>(terms, columns), row = units<T>(terms);
    bool whole = terms % Unit<T>::SIZE == 0;  // rows of x are units as they lie
    Buffer<unit<T>> packed(size * experts);
    std::vector<Piece> work = pieces(counts, experts);
#pragma omp parallel num_threads(threads)
    {
        Buffer<unit<T>> lined(whole ? 0 : BLOCK * row);
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < experts; e++) {
            if (!counts[e]) continue;
            const W* w = weight + e * terms * columns;
            unit<T>* to = packed.data + e * size;
            if (turned) pack_columns<T>(to, w, terms, terms, columns);
            else pack_rows<T>(to, w, columns, terms, columns);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < int64_t(work.size()); i++) {
            Piece p = work[i];
            const T* rows = x + p.start * terms;
            if (!whole) line_up<T>(lined.data, rows, terms, p.rows, terms);
            multiply<T, T>(out + p.start * columns, columns,
                           whole ? (const unit<T>*)rows : lined.data, row, 1,
                           packed.data + p.expert * size, p.rows, columns, terms);
        }
    }
}

// dweight [E, O, I]: the sum over an expert's rows of dout [M, O] times x [M, I].
template <class T, class W>
void weight_gradient(const T* dout, const T* x, const int64_t* counts, W* dweight, int64_t experts,
                     int64_t O, int64_t I, int64_t threads) {
    std::vector<int64_t> starts(experts, 0);
    int64_t most = 0;
    for (int64_t e = 0; e < experts; e++) {
        most = std::max(most, counts[e]);
        if (e) starts[e] = starts[e - 1] + counts[e - 1];
    }
#pragma omp parallel num_threads(threads)
    {
        Buffer<unit<T>> left(units<T>(most) * O), right(packed_size<T>(most, I));
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < experts; e++) {
            W* to = dweight + e * O * I;
            int64_t rows = counts[e];
            if (!rows) {
                std::fill(to, to + O * I, W{});
                continue;
            }
            interleave<T>(left.data, dout + starts[e] * O, O, rows, O);
            pack_rows<T>(right.data, x + starts[e] * I, I, rows, I);
            multiply<T, W>(to, I, left.data, 1, O, right.data, O, I, rows);
        }
    }
}

}  // namespace

// Runs a statement with T and the weight's type W set: weights have the rows' type, or one of
// both is FP32 and the other BF16.
#define WITH_TYPES(type, weight_type, ...)                                              \
    if (type == 2 && weight_type == 1) {                                                \
        using T = bf16; using W = float; __VA_ARGS__;                                   \
    } else if (type == 1 && weight_type == 2) {                                         \
        using T = float; using W = bf16; __VA_ARGS__;                                   \
    } else WITH_TYPE(type, { using W = T; __VA_ARGS__; })

// turned: the weight of an expert is [columns, terms].
extern "C" void grouped_rows(int64_t type, int64_t weight_type, const void* x, const void* weight,
                             const int64_t* counts, void* out, int64_t experts, int64_t terms,
                             int64_t columns, int64_t turned, int64_t threads) {
    WITH_TYPES(type, weight_type, rows_times<T, W>((const T*)x, (const W*)weight, counts, (T*)out,
                                                   experts, terms, columns, turned, threads))
}

extern "C" void grouped_weight_gradient(int64_t type, int64_t weight_type, const void* dout,
                                        const void* x, const int64_t* counts, void* dweight,
                                        int64_t experts, int64_t O, int64_t I, int64_t threads) {
    WITH_TYPES(type, weight_type,
               weight_gradient<T, W>((const T*)dout, (const T*)x, counts, (W*)dweight, experts, O,
                                     I, threads))
}
