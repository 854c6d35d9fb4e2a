// The experts of every token: the best of the best groups, by biased scores; and their weights.
#include "numbers.h"
#include "repeat.h"

#include <limits>
#include <vector>

namespace {

// Write the places of the k largest values, the largest first; of equals the first one.
template <class H>
inline void largest(H* values, int64_t count, int64_t k, int64_t* places) {
    for (int64_t n = 0; n < k; n++) {
        int64_t best = 0;
        for (int64_t i = 1; i < count; i++)
            if (values[i] > values[best]) best = i;
        places[n] = best;
        values[best] = -std::numeric_limits<H>::infinity();
    }
}

template <class H>
void choose(const H* scores, const float* bias, int64_t* chosen, int64_t tokens, int64_t experts,
            int64_t k, int64_t groups, int64_t kept_groups, int64_t threads) {
    constexpr H LEAST = -std::numeric_limits<H>::infinity();
    int64_t size = experts / groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<H> biased(experts), group(groups), left(experts);
        std::vector<int64_t> best(groups);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) {
            for (int64_t e = 0; e < experts; e++) {
                biased[e] = scores[n * experts + e] + H(bias[e]);
                left[e] = groups > 1 ? LEAST : biased[e];
            }
            if (groups > 1) {
                for (int64_t g = 0; g < groups; g++) {
                    H first = LEAST, second = LEAST;
                    for (int64_t e = g * size; e < (g + 1) * size; e++) {
                        H x = biased[e];
                        second = x > first ? first : (x > second ? x : second);
                        first = x > first ? x : first;
                    }
                    group[g] = first + second;
                }
                largest(group.data(), groups, kept_groups, best.data());
                for (int64_t i = 0; i < kept_groups; i++)
                    for (int64_t e = best[i] * size; e < (best[i] + 1) * size; e++)
                        left[e] = biased[e];
            }
            largest(left.data(), experts, k, chosen + n * k);
        }
    }
}

}  // namespace

extern "C" void choose(int64_t type, const void* scores, const float* bias, int64_t* chosen,
                       int64_t tokens, int64_t experts, int64_t k, int64_t groups,
                       int64_t kept_groups, int64_t threads) {
    if (type == 0)
        choose<double>((const double*)scores, bias, chosen, tokens, experts, k, groups,
                       kept_groups, threads);
    else
        choose<float>((const float*)scores, bias, chosen, tokens, experts, k, groups, kept_groups,
                      threads);
}

namespace {

// weights [tokens, k]: the scores of the chosen, over their sum (and a little) if normalised, times
// scale. The sum is taken in the order of the choices.
template <class H>
void gate(const H* scores, const int64_t* chosen, H* weights, int64_t tokens, int64_t experts,
          int64_t k, bool normalise, H least, H scale) {
    for (int64_t n = 0; n < tokens; n++) {
        H sum = 0;
        for (int64_t i = 0; i < k; i++) {
            weights[n * k + i] = scores[n * experts + chosen[n * k + i]];
            sum += weights[n * k + i];
        }
        for (int64_t i = 0; i < k; i++) {
            H& weight = weights[n * k + i];
            weight = (normalise ? weight / (sum + least) : weight) * scale;
        }
    }
}

}  // namespace

extern "C" void gate(int64_t type, const void* scores, const int64_t* chosen, void* weights,
                     int64_t tokens, int64_t experts, int64_t k, int64_t normalise, double least,
                     double scale, int64_t threads) {
    if (type == 0)
        gate<double>((const double*)scores, chosen, (double*)weights, tokens, experts, k, normalise,
                     least, scale);
    else
        gate<float>((const float*)scores, chosen, (float*)weights, tokens, experts, k, normalise,
                    float(least), float(scale));
}

extern "C" void sigmoids(int64_t type, const void* logits, void* scores, int64_t count,
                         int64_t threads) {
    auto all = [&](auto* x, auto* y) {
        for (int64_t i = 0; i < count; i++) y[i] = sigmoid(x[i]);
    };
    if (type == 0) all((const double*)logits, (double*)scores);
    else all((const float*)logits, (float*)scores);
}

REPEATABLE(choose)
REPEATABLE(gate)
REPEATABLE(sigmoids)
