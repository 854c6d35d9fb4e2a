// Calls that were made before, in order.
#include <cstdint>

struct Call {
    void (*kernel)(const int64_t* words);
    const int64_t* words;
};

extern "C" void repeat_calls(const Call* calls, int64_t count) {
    for (const Call* call = calls; call < calls + count; call++) call->kernel(call->words);
}
