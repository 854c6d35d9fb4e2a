// The choice of tokens from rows of logits, and the softmax that tells how likely they were.
#include "numbers.h"

#include <limits>
#include <vector>

namespace {

constexpr double LEAST = -std::numeric_limits<double>::infinity();
constexpr float LEAST_FLOAT = -std::numeric_limits<float>::infinity();
constexpr int WORDS = 4;
// Words of a uniform number so near to 1, one in 512, or to 0, one in 2^20, that float has no room
// for what is missing.
constexpr uint64_t HIGH = ~uint64_t(0) - (uint64_t(1) << 55), LOW = uint64_t(1) << 44;
inline bool rare(uint64_t word) { return word > HIGH || word < LOW; }
// More than estimates of a score are wrong by, where the word is not rare and the score not far
// below the best one.
constexpr float DOUBT = 0.02f;

// Philox4x64 with ten rounds (Salmon et al. 2011): the words of one count.
struct Philox {
    uint64_t key[2], counter[4];

    inline void words(uint64_t count, uint64_t* out) const {
        uint64_t a = counter[0] + 1 + count, b = counter[1], c = counter[2], d = counter[3];
        uint64_t k = key[0], l = key[1];
        for (int round = 0; round < 10; round++) {
            __uint128_t first = (__uint128_t)a * 0xD2E7470EE14C6C93u;
            __uint128_t second = (__uint128_t)c * 0xCA5A826395121157u;
            a = uint64_t(second >> 64) ^ b ^ k;
            b = uint64_t(second);
            c = uint64_t(first >> 64) ^ d ^ l;
            d = uint64_t(first);
            k += 0x9E3779B97F4A7C15u;
            l += 0xBB67AE8584CAA73Bu;
        }
        out[0] = a, out[1] = b, out[2] = c, out[3] = d;
    }

    inline uint64_t word(uint64_t place) const {
        uint64_t found[WORDS];
        words(place / WORDS, found);
        return found[place % WORDS];
    }
};

// -log of an exponential number, from a word: Gumbel noise.
inline double noise(uint64_t word) {
    double uniform = (double(int64_t(word >> 12)) + 0.5) * 0x1p-52;
    return -std::log(-std::log(uniform));
}

// log in float, to 1e-5, of positive normal numbers.
__attribute__((always_inline)) inline float logarithm(float x) {
    int32_t bits = __builtin_bit_cast(int32_t, x);
    int32_t power = (bits - 0x3f3504f3) >> 23;  // so that what is left is around 1
    float m = __builtin_bit_cast(float, bits - (power << 23)) - 1.0f;
    float p = 0.11676998f;
    p = p * m - 0.12420141f;
    p = p * m + 0.14249323f;
    p = p * m - 0.16668057f;
    p = p * m + 0.20000714f;
    p = p * m - 0.24999994f;
    p = p * m + 0.33333331f;
    float square = m * m;
    return float(power) * 0.69314718f + (m - 0.5f * square + p * square * m);
}

// exp of numbers not above 0, in double and in a form that compilers vectorise.
__attribute__((always_inline)) inline double exponential_below(double x) {
    double clamped = x < -700.0 ? -700.0 : x;
    double n = __builtin_rint(clamped * 1.4426950408889634);
    double r = clamped - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
    double e = 2.08767569878681e-9;
    e = e * r + 2.505210838544172e-8;
    e = e * r + 2.755731922398589e-7;
    e = e * r + 2.7557319223985893e-6;
    e = e * r + 2.48015873015873e-5;
    e = e * r + 1.984126984126984e-4;
    e = e * r + 1.388888888888889e-3;
    e = e * r + 8.333333333333333e-3;
    e = e * r + 4.1666666666666664e-2;
    e = e * r + 1.6666666666666666e-1;
    e = e * r + 0.5;
    e = e * r + 1.0;
    e = e * r + 1.0;
    // n in the low bits of 1.5 * 2^52 + n, moved to where the exponent is.
    uint64_t bits = __builtin_bit_cast(uint64_t, n + 0x1.8p52) << 52;
    double found = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, e) + bits);
    return x < -700.0 ? 0.0 : found;
}

inline bool finite(float x) { return x - x == 0; }

// The first of the largest; the least number that is no place where a row has what is no number.
int64_t largest(const float* row, int64_t width) {
    float top = LEAST_FLOAT;
    int strange = 0;
#pragma omp simd reduction(max : top) reduction(| : strange)
    for (int64_t i = 0; i < width; i++) {
        top = row[i] > top ? row[i] : top;
        strange |= !(row[i] <= std::numeric_limits<float>::max());
    }
    if (strange || !finite(top)) return -1;
    int64_t place = 0;
    while (row[place] != top) place++;
    return place;
}

int64_t race(const float* row, int64_t width, const Philox& philox, double temperature,
             std::vector<float>& scores) {
    int64_t best = largest(row, width);
    if (best < 0 || temperature == 0) return best;
    double top = row[best];
    float shift = row[best];
    double inverse = 1 / temperature, room = std::numeric_limits<float>::max();
    float scale = float(inverse < room ? inverse : room);
    scores.resize(width);
    double reached = LEAST;
    int64_t token = best;
    auto enter = [&](int64_t i, uint64_t word) {
        double score = (double(row[i]) - top) / temperature + noise(word);
        if (score > reached || (score == reached && i < token)) reached = score, token = i;
    };
    // Everybody's score as float tells who can win; their scores are then computed in double.
    constexpr int64_t BLOCK = 256;
    uint64_t drawn[BLOCK];
    float most = LEAST_FLOAT;
    for (int64_t start = 0; start < width; start += BLOCK) {
        int64_t count = width - start < BLOCK ? width - start : BLOCK;
        for (int64_t i = 0; i < count; i += WORDS) philox.words((start + i) / WORDS, drawn + i);
        float* to = scores.data() + start;
        const float* from = row + start;
        int some = 0;
#pragma omp simd reduction(| : some)
        for (int64_t i = 0; i < count; i++) some |= rare(drawn[i]);
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; i++) {
            float uniform = (float(int32_t(uint32_t(drawn[i] >> 33))) + 0.5f) * 0x1p-31f;
            float score = (from[i] - shift) * scale - logarithm(-logarithm(uniform));
            score = rare(drawn[i]) ? LEAST_FLOAT : score;
            to[i] = score;
            most = score > most ? score : most;
        }
        if (some)
            for (int64_t i = 0; i < count; i++)
                if (rare(drawn[i])) enter(start + i, drawn[i]);
    }
    float enough = (reached > most ? float(reached) : most) - DOUBT;
    for (int64_t i = 0; i < width; i++)
        if (scores[i] >= enough) enter(i, philox.word(i));
    return token;
}

}  // namespace

// tokens[r]: the argmax of the row over its temperature plus noise, or of the row where the
// temperature is 0; -1 where the row has no largest finite number. names [rows, 3]: the seed, the
// position and the answer's index.
extern "C" void draw(int64_t type, const float* logits, const int64_t* rows, const uint64_t* names,
                     const double* temperatures, int64_t* tokens, int64_t count, int64_t width,
                     int64_t threads) {
    (void)type;
#pragma omp parallel num_threads(count < 2 ? 1 : threads)
    {
        std::vector<float> scores;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; r++) {
            const uint64_t* name = names + 3 * r;
            Philox philox = {{name[0], name[1]}, {0, 0, 0, name[2]}};
            tokens[r] = race(logits + rows[r] * width, width, philox, temperatures[r], scores);
        }
    }
}

// sums[r] = log sum exp of a row, in double; ranks[r]: the place of its token, from 1, by logits
// and then by numbers of tokens.
extern "C" void log_sums(int64_t type, const float* logits, const int64_t* rows,
                         const int64_t* tokens, double* sums, int64_t* ranks, int64_t count,
                         int64_t width, int64_t threads) {
    (void)type;
#pragma omp parallel for num_threads(count < 2 ? 1 : threads) schedule(static)
    for (int64_t r = 0; r < count; r++) {
        const float* row = logits + rows[r] * width;
        float top = LEAST_FLOAT, value = row[tokens[r]];
        int64_t above = 0;
#pragma omp simd reduction(max : top) reduction(+ : above)
        for (int64_t i = 0; i < width; i++) {
            top = row[i] > top ? row[i] : top;
            above += row[i] > value;
        }
        for (int64_t i = 0; i < tokens[r]; i++) above += row[i] == value;
        double sum = 0, shift = top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += exponential_below(double(row[i]) - shift);
        sums[r] = shift + std::log(sum);
        ranks[r] = 1 + above;
    }
}
