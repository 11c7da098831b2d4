#include <cmath>
#include <stdexcept>

#include "memserve/attention.h"

namespace memserve {

namespace {

template <class T>
void merge(const MergeCall &call) {
    const auto *out_a = reinterpret_cast<const T *>(call.out_a);
    const auto *out_b = reinterpret_cast<const T *>(call.out_b);
    const auto *lse_a = reinterpret_cast<const float *>(call.lse_a);
    const auto *lse_b = reinterpret_cast<const float *>(call.lse_b);
    auto *out = reinterpret_cast<T *>(call.out);
    auto *lse = reinterpret_cast<float *>(call.lse);
    for (std::size_t row = 0; row < call.rows; ++row) {
        const float a = lse_a[row], b = lse_b[row];
        const float larger = a > b ? a : b;
        // Where neither has seen a key, both are -inf, and nothing is the result.
        const bool nothing = std::isinf(larger) && larger < 0.0f;
        const float of_a = nothing ? 0.0f : std::exp(a - larger);
        const float of_b = nothing ? 0.0f : std::exp(b - larger);
        const float share = nothing ? 0.0f : 1.0f / (of_a + of_b);
        for (std::size_t i = row * call.dim; i < (row + 1) * call.dim; ++i) {
            // What has seen no key counts for nothing even where it is not a number.
            const float value_a = of_a == 0.0f ? 0.0f : to_float(out_a[i]) * (of_a * share);
            const float value_b = of_b == 0.0f ? 0.0f : to_float(out_b[i]) * (of_b * share);
            out[i] = from_float<T>(value_a + value_b);
        }
        lse[row] = nothing ? larger : larger + std::log(of_a + of_b);
    }
}

}  // namespace

void check_merge(const MergeCall &call) {
    const std::size_t bytes = call.dtype == Dtype::fp32 ? 4 : 2;
    std::size_t elements = 0, span = 0;
    if (__builtin_mul_overflow(call.rows, call.dim, &elements) ||
        __builtin_mul_overflow(elements, bytes, &span)) {
        throw std::invalid_argument("so many rows cannot be");
    }
    if (elements == 0) return;
    for (const std::uint64_t address : {call.out_a, call.out_b, call.out}) {
        if (address == 0 || address % bytes != 0) {
            throw std::invalid_argument("out cannot lie at this address");
        }
    }
    for (const std::uint64_t address : {call.lse_a, call.lse_b, call.lse}) {
        if (address == 0 || address % alignof(float) != 0) {
            throw std::invalid_argument("lse cannot lie at this address");
        }
    }
}

void merge_state(const MergeCall &call) {
    switch (call.dtype) {
        case Dtype::bf16: return merge<Bf16>(call);
        case Dtype::fp16: return merge<Fp16>(call);
        case Dtype::fp32: return merge<float>(call);
    }
}

}  // namespace memserve
