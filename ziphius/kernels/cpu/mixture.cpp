// A mixture layer's experts for tokens where they lie: gate, up and down projections, SwiGLU with
// the routing weight before the down projection, and the sum of a token's rows in the order of its
// choices, then of its shared experts. Nothing is sorted or copied for it.
#include "dot.h"
#include "repeat.h"

#include <memory>

namespace {

using namespace dot;

constexpr int64_t DEAL = 32;  // rows of a weight a piece of work
constexpr int64_t SOME = 32;  // tokens that leave an expert waiting for its weights

struct Expert {
    Weight gate, up, down;
};

// The rows of one expert, and where they go.
template <class T> struct Rows {
    const Expert* expert;
    std::vector<const T*> x, hidden;
    std::vector<wide<T>> gates;  // none for shared experts
    std::vector<int64_t> places;  // of its rows among all
    int64_t at;                   // of the first hidden row
};

template <class T> struct Layer {
    std::vector<Rows<T>> rows;
    std::vector<std::pair<int64_t, int64_t>> ups, downs;  // pieces: entry of rows, first row
    std::unique_ptr<T[]> hidden, out;  // not set to zero: they are large

    Layer(const Expert* experts, int64_t n_experts, int64_t n_shared, const T* u,
          const int64_t* chosen, const wide<T>* gates, int64_t N, int64_t D, int64_t K) {
        std::vector<int64_t> entry(n_experts, -1);
        for (int64_t m = 0; m < N * K; m++) {
            int64_t& e = entry[chosen[m]];
            if (e < 0) {
                e = int64_t(rows.size());
                rows.push_back({experts + chosen[m], {}, {}, {}, {}, 0});
            }
            rows[e].x.push_back(u + m / K * D);
            rows[e].gates.push_back(gates[m]);
            rows[e].places.push_back(m);
        }
        for (int64_t s = 0; s < n_shared; s++) {
            rows.push_back({experts + n_experts + s, {}, {}, {}, {}, 0});
            for (int64_t n = 0; n < N; n++) {
                rows.back().x.push_back(u + n * D);
                rows.back().places.push_back(N * K + s * N + n);
            }
        }
        int64_t size = 0;
        for (size_t i = 0; i < rows.size(); i++) {
            rows[i].at = size;
            size += int64_t(rows[i].x.size()) * rows[i].expert->gate.rows;
            for (int64_t o = 0; o < rows[i].expert->gate.rows; o += DEAL) ups.push_back({i, o});
            for (int64_t o = 0; o < D; o += DEAL) downs.push_back({i, o});
        }
        hidden.reset(new T[size]);
        out.reset(new T[N * (K + n_shared) * D]);
        for (Rows<T>& r : rows)
            for (size_t m = 0; m < r.x.size(); m++)
                r.hidden.push_back(hidden.get() + r.at + int64_t(m) * r.expert->gate.rows);
    }
};

template <class T> wide<T> rounded(wide<T> x) { return widen(narrow<T>(x)); }

template <class T>
void activate(Rows<T>& r, int64_t from, std::vector<wide<T>>& sums, std::vector<uint8_t>& memory) {
    using H = wide<T>;
    const Expert& e = *r.expert;
    int64_t count = int64_t(r.x.size()), width = std::min(DEAL, e.gate.rows - from);
    sums.resize(count * (2 * DEAL + 4));
    for (int64_t o = 0; o < width; o += 4) {
        products(sums.data() + o, 2 * DEAL, e.gate, from + o, r.x.data(), count, memory);
        products(sums.data() + DEAL + o, 2 * DEAL, e.up, from + o, r.x.data(), count, memory);
    }
    for (int64_t m = 0; m < count; m++) {
        H *gate = sums.data() + m * 2 * DEAL, *up = gate + DEAL;
        H weight = r.gates.empty() ? H(1) : r.gates[m];
        for (int64_t i = 0; i < width; i++) {
            H x = rounded<T>(gate[i]);
            gate[i] = x * sigmoid(x) * rounded<T>(up[i]) * weight;
        }
        narrow_row((T*)r.hidden[m] + from, gate, width);
    }
}

template <class T>
void come_down(Rows<T>& r, int64_t from, T* out, int64_t D, std::vector<wide<T>>& sums,
               std::vector<uint8_t>& memory) {
    int64_t count = int64_t(r.x.size()), width = std::min(DEAL, D - from);
    sums.resize(count * (DEAL + 4));
    for (int64_t o = 0; o < width; o += 4)
        products(sums.data() + o, DEAL, r.expert->down, from + o, r.hidden.data(), count, memory);
    for (int64_t m = 0; m < count; m++)
        narrow_row(out + r.places[m] * D + from, sums.data() + m * DEAL, width);
}

template <class T>
void mixture(const T* u, const int64_t* chosen, const wide<T>* gates, const Expert* experts, T* out,
             int64_t N, int64_t D, int64_t K, int64_t n_experts, int64_t n_shared,
             int64_t threads) {
    using H = wide<T>;
    Layer<T> layer(experts, n_experts, n_shared, u, chosen, gates, N, D, K);
    // Few tokens wait for memory, which is read best when neighbouring pieces are a thread's own.
    // Many tokens are of different numbers for every expert: whoever is free takes the next piece.
    int64_t n_ups = int64_t(layer.ups.size()), n_downs = int64_t(layer.downs.size());
    int64_t ups = N <= SOME ? (n_ups + threads - 1) / threads : 1;
    int64_t downs = N <= SOME ? (n_downs + threads - 1) / threads : 1;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> memory;
        std::vector<H> sums;
#pragma omp for schedule(dynamic, ups)
        for (int64_t i = 0; i < n_ups; i++)
            activate(layer.rows[layer.ups[i].first], layer.ups[i].second, sums, memory);
#pragma omp for schedule(dynamic, downs)
        for (int64_t i = 0; i < n_downs; i++)
            come_down(layer.rows[layer.downs[i].first], layer.downs[i].second, layer.out.get(), D,
                      sums, memory);
        sums.resize(D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            for (int64_t k = 0; k < K; k++) {
                const T* row = layer.out.get() + (n * K + k) * D;
                for (int64_t i = 0; i < D; i++)
                    sums[i] = k == 0 ? widen(row[i]) : sums[i] + widen(row[i]);
            }
            for (int64_t s = 0; s < n_shared; s++) {
                const T* row = layer.out.get() + (N * K + s * N + n) * D;
                for (int64_t i = 0; i < D; i++) sums[i] = rounded<T>(sums[i]) + widen(row[i]);
            }
            narrow_row(out + n * D, sums.data(), D);
        }
    }
}

}  // namespace

// u and out are [N, D], chosen and gates [N, K]; experts are n_experts and then n_shared triples
// of weights: gate, up, down. Every expert in chosen is below n_experts.
extern "C" void mixture(int64_t type, const void* u, const int64_t* chosen, const void* gates,
                        const void* experts, void* out, int64_t N, int64_t D, int64_t K,
                        int64_t n_experts, int64_t n_shared, int64_t threads) {
    WITH_TYPE(type, mixture<T>((const T*)u, chosen, (const wide<T>*)gates, (const Expert*)experts,
                               (T*)out, N, D, K, n_experts, n_shared, threads))
}

REPEATABLE(mixture)
