// Rows times one or more weights, which are read where they are stored.
#include "dot.h"
#include "repeat.h"

namespace {

using namespace dot;

constexpr int64_t CACHE = 256 * 1024;  // bytes of rows that stay near while weights pass by
constexpr int64_t DEAL = 32;           // rows of a weight a piece of work

// A product of a call: out[n * out_row + o] for rows x[n * x_row]. The next of `copies` has its
// weight behind this one's, by weight_step bytes, and its numbers x_step and out_step further on.
struct Part {
    Weight weight;
    int64_t copies, weight_step, x, x_row, x_step, out, out_row, out_step, out_wide;
};

template <class T>
void put(void* out, bool is_wide, int64_t at, const wide<T>* from, int64_t count) {
    if (is_wide) std::copy(from, from + count, (wide<T>*)out + at);
    else narrow_row((T*)out + at, from, count);
}

template <class T>
void project(const Part* parts, int64_t count, int64_t rows, int64_t threads) {
    using H = wide<T>;
    struct Piece { const Part* part; int64_t copy, from, to; };
    std::vector<Piece> work;
    for (const Part* p = parts; p < parts + count; p++)
        for (int64_t copy = 0; copy < p->copies; copy++)
            for (int64_t o = 0; o < p->weight.rows; o += DEAL)
                work.push_back({p, copy, o, std::min(o + DEAL, p->weight.rows)});
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> memory;
        std::vector<const T*> x(rows);
        std::vector<H> sums;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < int64_t(work.size()); i++) {
            Part p = *work[i].part;
            p.weight.data += work[i].copy * p.weight_step;
            p.x += work[i].copy * p.x_step * int64_t(sizeof(T));
            int64_t shift = work[i].copy * p.out_step + work[i].from;
            int64_t width = work[i].to - work[i].from;
            int64_t fit = CACHE / int64_t(p.weight.columns * sizeof(T));
            int64_t some = std::max<int64_t>(6, fit / 6 * 6);
            for (int64_t start = 0; start < rows; start += some) {
                int64_t n = std::min(some, rows - start);
                for (int64_t r = 0; r < n; r++) x[r] = (const T*)p.x + (start + r) * p.x_row;
                sums.resize(n * (DEAL + 4));
                for (int64_t o = 0; o < width; o += 4)
                    products(sums.data() + o, DEAL, p.weight, work[i].from + o, x.data(), n,
                             memory);
                for (int64_t r = 0; r < n; r++)
                    put<T>((void*)p.out, p.out_wide, (start + r) * p.out_row + shift,
                           sums.data() + r * DEAL, width);
            }
        }
    }
}

}  // namespace

extern "C" void project(int64_t type, const void* parts, int64_t count, int64_t rows,
                        int64_t threads) {
    WITH_TYPE(type, project<T>((const Part*)parts, count, rows, threads))
}

REPEATABLE(project)
