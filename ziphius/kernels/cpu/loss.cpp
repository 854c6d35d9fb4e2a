// Cross entropy of rows of logits, which become their own gradient.
#include "numbers.h"

// losses[n] = log sum exp(row) - row[target]; row = softmax(row) - onehot(target). A negative
// target does not count: its loss and its gradient are 0.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, wide<T>* losses, int64_t rows, int64_t width,
                   int64_t threads) {
    using H = wide<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        T* row = logits + n * width;
        H largest = widen(row[0]), sum = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < width; i++) {
            H x = widen(row[i]);
            largest = x > largest ? x : largest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += exponential(widen(row[i]) - largest);
        if (targets[n] < 0) {
            losses[n] = 0;
            for (int64_t i = 0; i < width; i++) row[i] = narrow<T>(H(0));
            continue;
        }
        losses[n] = largest + std::log(sum) - widen(row[targets[n]]);
        H target = exponential(widen(row[targets[n]]) - largest) / sum - H(1), factor = H(1) / sum;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            row[i] = narrow<T>(exponential(widen(row[i]) - largest) * factor);
        row[targets[n]] = narrow<T>(target);
    }
}

extern "C" void cross_entropy(int64_t type, void* logits, const int64_t* targets, void* losses,
                              int64_t rows, int64_t width, int64_t threads) {
    WITH_TYPE(type, cross_entropy<T>((T*)logits, targets, (wide<T>*)losses, rows, width, threads))
}
