#include "checks.h"
#include "memserve/elementwise.h"
#include "row_tasks.h"

namespace memserve {

namespace {

constexpr std::int64_t most_width = std::int64_t{1} << 30;

// e to the x within an ulp, infinity and 0 at the ends: x = n ln 2 + r, a polynomial in r, 2^n in two
// factors so that the ends overflow as they should. No branches, so that compilers vectorise it.
MEMSERVE_INLINE float exponential(float x) {
    constexpr float whole = 12582912.0f;  // 1.5 * 2^23: to add it rounds to an integer
    const float low = x < -104.0f ? -104.0f : x;
    const float bounded = low > 104.0f ? 104.0f : low;
    const float shifted = bounded * 1.44269504f + whole;
    const float n = shifted - whole;
    // ln 2 in three parts, the first two short enough for exact products.
    const float r = ((bounded - n * 0.693359375f) - n * -2.12192535e-4f) - n * 1.1730463e-9f;
    float p = 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    const std::int32_t power = static_cast<std::int32_t>(bits_of(shifted) - bits_of(whole));
    const std::int32_t half = power >> 1;
    const float first = float_of(static_cast<std::uint32_t>(half + 127) << 23);
    const float second = float_of(static_cast<std::uint32_t>(power - half + 127) << 23);
    return ((p + 1.0f) * first) * second;
}

MEMSERVE_INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

// 0.5 x (1 + tanh(u)) is x / (1 + e^(-2u)).
MEMSERVE_INLINE float gelu_tanh(float x) {
    const float u = 0.79788456f * (x + 0.044715f * ((x * x) * x));
    return x / (1.0f + exponential(-2.0f * u));
}

template <typename T, Activation activation>
MEMSERVE_INLINE void gate_row(const T *x, std::int64_t width, T *__restrict__ out) {
    const T *up = x + width;
    for (std::int64_t i = 0; i < width; ++i) {
        const float value = to_float(x[i]);
        const float active = activation == Activation::silu ? silu(value) : gelu_tanh(value);
        out[i] = from_float<T>(rounded<T>(active) * to_float(up[i]));
    }
}

template <typename T>
MEMSERVE_INLINE void gate_rows(const Gate &of, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
        const T *x = static_cast<const T *>(of.x) + i * of.x_stride;
        T *out = static_cast<T *>(of.out) + i * of.out_stride;
        if (of.activation == Activation::silu) {
            gate_row<T, Activation::silu>(x, of.width, out);
        } else {
            gate_row<T, Activation::gelu_tanh>(x, of.width, out);
        }
    }
}

MEMSERVE_INLINE void gate_body(const Gate &of, std::int64_t first, std::int64_t last) {
    switch (of.dtype) {
        case Dtype::bf16: return gate_rows<Bf16>(of, first, last);
        case Dtype::fp16: return gate_rows<Fp16>(of, first, last);
        case Dtype::fp32: return gate_rows<float>(of, first, last);
    }
}

MEMSERVE_LEVELS(gate, (const Gate &of, std::int64_t first, std::int64_t last), (of, first, last))

}  // namespace

void check_gate(const Gate &of) {
    check_size("gate: width", of.width, most_width);
    check_rows("gate: x", of.x, of.rows, 2 * of.width, of.x_stride, of.dtype);
    check_rows("gate: out", of.out, of.rows, of.width, of.out_stride, of.dtype);
}

void gate(const Gate &of, unsigned threads) {
    const auto rows = gate_for(isa());
    // An exponential costs as much as a few elements of other ops.
    over_rows(threads, of.rows, of.width * 4, [&](std::int64_t first, std::int64_t last) {
        rows(of, first, last);
    });
}

}  // namespace memserve
