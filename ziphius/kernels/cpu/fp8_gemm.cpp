// FP8 products A B^T, one or many: sums of 128 products in FP32, times the scales of both groups,
// added up in FP32 and rounded once. Right factors are packed some at a time, as many as a cache
// holds; then threads take blocks of rows. No number depends on how the work is dealt.
#include "codes.h"

#include <vector>

namespace {

using namespace e4m3;

using Real = typename gemm::Vector<float>::type;
constexpr int64_t WIDE = gemm::LANES<bf16>, PANEL = gemm::PANEL<bf16>, UNITS = GROUP / 2;
constexpr int64_t PACKED = 4 << 20;               // units of right factors at a time
constexpr int64_t DECODED = 112 << 10;            // units of a block of a left factor
constexpr int64_t FEWEST = 12, MOST = 96;         // rows of a block

// Codes in groups along their rows; every ``shared`` rows have a row of scales.
struct Factor {
    const uint8_t* codes;
    int64_t row;
    const float* scales;
    int64_t scale_row, shared;
    float scale(int64_t n, int64_t g) const { return scales[n / shared * scale_row + g]; }
};

// out [rows, columns] = a b^T, summed over ``terms``.
struct Product {
    Factor a, b;
    void* out;
    int64_t rows, columns, terms;
    int64_t a_row() const { return row_units(terms) + 16; }  // not a power of two: spares a cache
};

// Up to 64 columns of a right factor, packed, and behind them their scales in the same order.
struct Panel {
    const Product* product;
    int64_t column, offset;
    int64_t width() const { return std::min(PANEL, product->columns - column); }
    int64_t stride() const { return gemm::round_up(width(), LANES); }
    int64_t scales() const { return row_units(product->terms) * stride(); }
    int64_t size() const { return scales() + groups(product->terms) * stride(); }
};

// Rows that meet some panels.
struct Piece {
    const Product* product;
    int64_t start, rows, panel, panels;
};

struct Batch {
    std::vector<Panel> panels;
    std::vector<Piece> pieces;
    int64_t size = 0;
};

void add_pieces(Batch& batch, const Product& p, int64_t panel, int64_t share) {
    int64_t panels = int64_t(batch.panels.size()) - panel;
    if (!panels) return;
    int64_t most = std::clamp(std::min(DECODED / p.a_row(), share), FEWEST, MOST) / 6 * 6;
    int64_t blocks = (p.rows + most - 1) / most;
    int64_t block = gemm::round_up((p.rows + blocks - 1) / blocks, 6);
    for (int64_t r = 0; r < p.rows; r += block)
        batch.pieces.push_back({&p, r, std::min(block, p.rows - r), panel, panels});
}

// Large pieces come first, so that threads end together.
std::vector<Batch> plan(const std::vector<Product>& products, int64_t threads) {
    int64_t rows = 0;
    for (const Product& p : products) rows += p.rows;
    int64_t share = rows / (4 * threads);
    std::vector<Batch> batches(1);
    for (const Product& p : products) {
        int64_t first = int64_t(batches.back().panels.size());
        for (int64_t c = 0; p.rows && c < p.columns; c += PANEL) {
            Panel panel{&p, c, batches.back().size};
            if (panel.offset && panel.offset + panel.size() > PACKED) {
                add_pieces(batches.back(), p, first, share);
                batches.emplace_back();
                first = panel.offset = 0;
            }
            batches.back().panels.push_back(panel);
            batches.back().size += panel.size();
        }
        add_pieces(batches.back(), p, first, share);
    }
    auto work = [](const Piece& p) { return p.rows * p.panels * p.product->terms; };
    for (Batch& batch : batches)
        std::stable_sort(batch.pieces.begin(), batch.pieces.end(),
                         [&](const Piece& a, const Piece& b) { return work(a) > work(b); });
    return batches;
}

void pack(const Panel& panel, uint32_t* packed) {
    const Product& p = *panel.product;
    int64_t width = panel.width(), stride = panel.stride();
    uint32_t* to = packed + panel.offset;
    pack_codes(to, p.b.codes + panel.column * p.b.row, p.b.row, p.terms, width);
    float* scale = (float*)(to + panel.scales());
    for (int64_t g = 0; g < groups(p.terms); g++, scale += stride)
        for (int64_t n = 0; n < stride; n++)
            scale[n] = n < width ? p.b.scale(panel.column + n, g) : 0.0f;
}

// One group of R rows times a panel of NV vectors: the totals of the first group, or added to them.
template <int R, int NV, bool FIRST>
void tile(float* totals, const uint32_t* a, int64_t a_row, const float* a_scale, int64_t scale_row,
          const uint32_t* b, const float* b_scale, int64_t count) {
    Real sum[R][NV] = {};
    gemm::accumulate<bf16>(sum, a, a_row, 1, b, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            // A branch here would change which operations are fused, and so the last bits.
            float* kept = totals + r * PANEL + j * WIDE;
            Real scale = a_scale[r * scale_row] * gemm::take_all<bf16>(b_scale + j * WIDE);
            if constexpr (FIRST) gemm::give_all<bf16>(kept, sum[r][j] * scale);
            else gemm::give_all<bf16>(kept, sum[r][j] * scale + gemm::take_all<bf16>(kept));
        }
}

template <int R, int NV = 1, class... A>
inline void tile_of(int64_t vectors, bool first, A... arguments) {
    if constexpr (NV < gemm::VECTORS)
        if (vectors > NV) return tile_of<R, NV + 1>(vectors, first, arguments...);
    if (first) tile<R, NV, true>(arguments...);
    else tile<R, NV, false>(arguments...);
}

// All groups of some decoded rows, whose scales are in ``a``, times a panel.
template <class O>
void rows_times(const Factor& a, const uint32_t* decoded, int64_t rows, const Panel& panel,
                const uint32_t* packed, float* totals, O* out) {
    const Product& p = *panel.product;
    int64_t width = panel.width(), stride = panel.stride(), last = groups(p.terms) - 1;
    const uint32_t* b = packed + panel.offset;
    const float* b_scale = (const float*)(b + panel.scales());
    for (int64_t g = 0; g <= last; g++, b += UNITS * stride, b_scale += stride) {
        int64_t count = std::min(UNITS, gemm::units<bf16>(p.terms - g * GROUP));
        auto some = [&](auto number, int64_t r) {
            constexpr int R = decltype(number)::value;
            float* kept = totals + r * PANEL;
            tile_of<R>(stride / WIDE, g == 0, kept, decoded + r * p.a_row() + g * UNITS,
                       p.a_row(), a.scales + r * a.scale_row + g, a.scale_row, b, b_scale, count);
            if (g == last)
                for (int i = 0; i < R; i++)
                    narrow_row(out + (r + i) * p.columns, kept + i * PANEL, width);
            return r + R;
        };
        int64_t r = 0;
        while (r + 6 <= rows) r = some(std::integral_constant<int, 6>{}, r);
        while (r + 2 <= rows) r = some(std::integral_constant<int, 2>{}, r);
        while (r < rows) r = some(std::integral_constant<int, 1>{}, r);
    }
}

// ``decoded`` and ``totals`` are a thread's own memory.
template <class O>
void multiply(const Piece& piece, const Batch& batch, const uint32_t* packed, uint32_t* decoded,
              float* totals) {
    const Product& p = *piece.product;
    O* out = (O*)p.out + piece.start * p.columns;
    if (!p.terms) return (void)std::fill(out, out + piece.rows * p.columns, O{});
    Factor a = p.a;
    a.codes += piece.start * a.row;
    a.scales += piece.start * a.scale_row;
    for (int64_t r = 0; r < piece.rows; r++)
        decode_row(decoded + r * p.a_row(), a.codes + r * a.row, p.terms);
    for (int64_t i = piece.panel; i < piece.panel + piece.panels; i++)
        rows_times(a, decoded, piece.rows, batch.panels[i], packed, totals,
                   out + batch.panels[i].column);
}

template <class O> void run(const std::vector<Product>& products, int64_t threads) {
    std::vector<Batch> batches = plan(products, threads);
    int64_t packed_size = 0, decoded_size = 0;
    for (const Batch& batch : batches) {
        packed_size = std::max(packed_size, batch.size);
        for (const Piece& p : batch.pieces)
            decoded_size = std::max(decoded_size, p.rows * p.product->a_row());
    }
    gemm::Buffer<uint32_t> packed(packed_size);
#pragma omp parallel num_threads(threads)
    {
        gemm::Buffer<uint32_t> decoded(decoded_size);
        gemm::Buffer<float> totals(MOST * PANEL);
        for (const Batch& batch : batches) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < int64_t(batch.panels.size()); i++)
                pack(batch.panels[i], packed.data);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < int64_t(batch.pieces.size()); i++)
                multiply<O>(batch.pieces[i], batch, packed.data, decoded.data, totals.data);
        }
    }
}

void run(int64_t type, const std::vector<Product>& products, int64_t threads) {
    if (type == 2) run<bf16>(products, threads);
    else run<float>(products, threads);
}

}  // namespace

// out [M, N]: segments of rows of a [M, K] meet matrices of b [E, N, K]. Without counts there is
// one of each.
extern "C" void fp8_gemm(int64_t type, const void* a, const void* a_scales, const void* b,
                         const void* b_scales, int64_t shared, void* out, const int64_t* counts,
                         int64_t experts, int64_t M, int64_t N, int64_t K, int64_t threads) {
    std::vector<Product> products;
    int64_t across = groups(K), down = (N + shared - 1) / shared, width = type == 2 ? 2 : 4;
    for (int64_t e = 0, start = 0; e < experts; e++) {
        int64_t rows = counts ? counts[e] : M;
        Factor left{(const uint8_t*)a + start * K, K, (const float*)a_scales + start * across,
                    across, 1};
        Factor right{(const uint8_t*)b + e * N * K, K, (const float*)b_scales + e * down * across,
                     across, shared};
        products.push_back({left, right, (char*)out + start * N * width, rows, N, K});
        start += rows;
    }
    run(type, products, threads);
}

// out [E, N, K]: sums over the segments of turned matrices a [N, S] and b [K, S].
extern "C" void fp8_gemm_along_k(int64_t type, const void* a, const void* a_scales, const void* b,
                                 const void* b_scales, void* out, const int64_t* counts,
                                 int64_t experts, int64_t N, int64_t K, int64_t S,
                                 int64_t threads) {
    std::vector<Product> products;
    int64_t across = groups(S), width = type == 2 ? 2 : 4;
    for (int64_t e = 0, start = 0; e < experts; e++) {
        int64_t group = start / GROUP;
        Factor left{(const uint8_t*)a + start, S, (const float*)a_scales + group, across, 1};
        Factor right{(const uint8_t*)b + start, S, (const float*)b_scales + group, across, 1};
        products.push_back({left, right, (char*)out + e * N * K * width, N, K, counts[e]});
        start += groups(counts[e]) * GROUP;
    }
    run(type, products, threads);
}
