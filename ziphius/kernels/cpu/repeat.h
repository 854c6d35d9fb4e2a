// A kernel under one more name, which takes its arguments as a row of words: so a list of calls can
// be made again without Python. Floating-point numbers are their float64 bits.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace repeat {

template <class A> A argument(int64_t word) {
    if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(word);
    else if constexpr (std::is_floating_point_v<A>) return A(__builtin_bit_cast(double, word));
    else return A(word);
}

template <class... A, std::size_t... I>
void spread(void (*kernel)(A...), const int64_t* words, std::index_sequence<I...>) {
    kernel(argument<A>(words[I])...);
}

template <class... A> void spread(void (*kernel)(A...), const int64_t* words) {
    spread(kernel, words, std::index_sequence_for<A...>());
}

}  // namespace repeat

#define REPEATABLE(name)                                         \
    extern "C" void name##_again(const int64_t* words) {         \
        repeat::spread(::name, words);                           \
    }
