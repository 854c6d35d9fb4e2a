// Queries, keys and values of every head from what the up-projections gave: the rotary parts
// turned, the rotary key repeated for all heads. One pass, and one pass back.
#include "numbers.h"

struct Sizes {
    int64_t tokens, length, heads, nope, rope, value;
};

// Turn neighbouring pairs by their angle, or back by it.
template <class T>
inline void turn(const T* x, T* out, const wide<T>* cosine, const wide<T>* sine, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        wide<T> even = widen(x[2 * i]), odd = widen(x[2 * i + 1]);
        out[2 * i] = narrow<T>(even * cosine[i] - odd * sine[i]);
        out[2 * i + 1] = narrow<T>(even * sine[i] + odd * cosine[i]);
    }
}

// q [N, H, nope + rope], kv [N, H, nope + value], k_rope [N, rope] in rows of k_stride.
template <class T>
void expand_forward(const T* q, const T* kv, const T* k_rope, int64_t k_stride,
                    const wide<T>* cosine, const wide<T>* sine, T* q_out, T* k_out, T* v_out,
                    Sizes s, int64_t threads) {
    int64_t width = s.nope + s.rope, half = s.rope / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < s.tokens; n++) {
        const wide<T>*c = cosine + n % s.length * half, *d = sine + n % s.length * half;
        T* first = k_out + n * s.heads * width + s.nope;
        turn(k_rope + n * k_stride, first, c, d, half);
        for (int64_t h = 0; h < s.heads; h++) {
            int64_t head = n * s.heads + h;
            const T *from = q + head * width, *up = kv + head * (s.nope + s.value);
            T *queries = q_out + head * width, *keys = k_out + head * width;
            for (int64_t i = 0; i < s.nope; i++) queries[i] = from[i];
            turn(from + s.nope, queries + s.nope, c, d, half);
            for (int64_t i = 0; i < s.nope; i++) keys[i] = up[i];
            if (h)
                for (int64_t i = 0; i < s.rope; i++) keys[s.nope + i] = first[i];
            for (int64_t i = 0; i < s.value; i++) v_out[head * s.value + i] = up[s.nope + i];
        }
    }
}

template <class T>
void expand_backward(const T* dq, const T* dk, const T* dv, const wide<T>* cosine,
                     const wide<T>* sine, T* dq_in, T* dkv, T* dk_rope, Sizes s,
                     int64_t threads) {
    using H = wide<T>;
    int64_t width = s.nope + s.rope, half = s.rope / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < s.tokens; n++) {
        const H *c = cosine + n % s.length * half, *d = sine + n % s.length * half;
        for (int64_t h = 0; h < s.heads; h++) {
            int64_t head = n * s.heads + h;
            const T *from = dq + head * width, *keys = dk + head * width;
            T *to = dq_in + head * width, *up = dkv + head * (s.nope + s.value);
            for (int64_t i = 0; i < s.nope; i++) to[i] = from[i];
            for (int64_t i = 0; i < half; i++) {
                H even = widen(from[s.nope + 2 * i]), odd = widen(from[s.nope + 2 * i + 1]);
                to[s.nope + 2 * i] = narrow<T>(even * c[i] + odd * d[i]);
                to[s.nope + 2 * i + 1] = narrow<T>(odd * c[i] - even * d[i]);
            }
            for (int64_t i = 0; i < s.nope; i++) up[i] = keys[i];
            for (int64_t i = 0; i < s.value; i++) up[s.nope + i] = dv[head * s.value + i];
        }
        const T* keys = dk + n * s.heads * width + s.nope;
        for (int64_t i = 0; i < half; i++) {
            H even = 0, odd = 0;
            for (int64_t h = 0; h < s.heads; h++) {
                even += widen(keys[h * width + 2 * i]);
                odd += widen(keys[h * width + 2 * i + 1]);
            }
            dk_rope[n * s.rope + 2 * i] = narrow<T>(even * c[i] + odd * d[i]);
            dk_rope[n * s.rope + 2 * i + 1] = narrow<T>(odd * c[i] - even * d[i]);
        }
    }
}

extern "C" void expand_forward(int64_t type, const void* q, const void* kv, const void* k_rope,
                               int64_t k_stride, const void* cosine, const void* sine, void* q_out,
                               void* k_out, void* v_out, int64_t tokens, int64_t length,
                               int64_t heads, int64_t nope, int64_t rope, int64_t value,
                               int64_t threads) {
    Sizes s{tokens, length, heads, nope, rope, value};
    WITH_TYPE(type, expand_forward<T>((const T*)q, (const T*)kv, (const T*)k_rope, k_stride,
                                      (const wide<T>*)cosine, (const wide<T>*)sine, (T*)q_out,
                                      (T*)k_out, (T*)v_out, s, threads))
}

extern "C" void expand_backward(int64_t type, const void* dq, const void* dk, const void* dv,
                                const void* cosine, const void* sine, void* dq_in, void* dkv,
                                void* dk_rope, int64_t tokens, int64_t length, int64_t heads,
                                int64_t nope, int64_t rope, int64_t value, int64_t threads) {
    Sizes s{tokens, length, heads, nope, rope, value};
    WITH_TYPE(type, expand_backward<T>((const T*)dq, (const T*)dk, (const T*)dv,
                                       (const wide<T>*)cosine, (const wide<T>*)sine, (T*)dq_in,
                                       (T*)dkv, (T*)dk_rope, s, threads))
}
