#include "checks.h"
#include "memserve/elementwise.h"
#include "row_tasks.h"

namespace memserve {

namespace {

constexpr std::int64_t most_width = std::int64_t{1} << 30;

// e to the x, to be added to 1: right within an ulp from -86 on, and infinity where it overflows.
// x = n ln 2 + r, a polynomial in r, times 2^(n - 1) and 2. No branches, so that compilers vectorise
// it; what is rounded to 16 bits does with fewer terms.
template <typename T>
MEMSERVE_INLINE float exponential(float x) {
    constexpr bool fine = sizeof(T) == 4;
    constexpr float whole = 12582912.0f;  // 1.5 * 2^23: to add it rounds to an integer
    const float low = x < -86.0f ? -86.0f : x;
    const float bounded = low > 89.0f ? 89.0f : low;
    const float shifted = bounded * 1.44269504f + whole;
    const float n = shifted - whole;
    // ln 2 in parts, of which the first is short enough for exact products.
    float r = (bounded - n * 0.693359375f) - n * -2.12192535e-4f;
    if (fine) r -= n * 1.1730463e-9f;
    float p = fine ? 1.9841270e-4f : 1.3888889e-3f;
    if (fine) p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    const float power = float_of((bits_of(shifted) - bits_of(whole) + 126u) << 23);
    return ((p + 1.0f) * power) * 2.0f;
}

template <typename T>
MEMSERVE_INLINE float silu(float x) {
    return x / (1.0f + exponential<T>(-x));
}

// 0.5 x (1 + tanh(u)) is x / (1 + e^(-2u)).
template <typename T>
MEMSERVE_INLINE float gelu_tanh(float x) {
    const float u = 0.79788456f * (x + 0.044715f * ((x * x) * x));
    return x / (1.0f + exponential<T>(-2.0f * u));
}

template <typename T, Activation activation>
MEMSERVE_INLINE void gate_row(const T *x, std::int64_t width, T *__restrict__ out) {
    const T *up = x + width;
    for (std::int64_t i = 0; i < width; ++i) {
        const float value = to_float(x[i]);
        const float active = activation == Activation::silu ? silu<T>(value)
                                                                : gelu_tanh<T>(value);
        out[i] = narrow<T>(rounded<T>(active) * to_float(up[i]));
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

#if defined(__x86_64__)

// By hand, with fused sums and a scaling instruction: a prompt spends more time here than in its norms.
// The same numbers as above once they are rounded.
MEMSERVE_AVX512 MEMSERVE_INLINE __m512 silu_of(__m512 x) {
    const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), x);
    const __m512 low = _mm512_max_ps(_mm512_set1_ps(-86.0f), minus);
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(89.0f), low);
    const __m512 n = _mm512_roundscale_ps(
        _mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12192535e-4f), r);
    __m512 p = _mm512_set1_ps(1.3888889e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666668e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n));
    return _mm512_div_ps(x, below);
}

// As `rounded_bits`.
MEMSERVE_AVX512 MEMSERVE_INLINE __m512i rounded_bits_of(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

MEMSERVE_AVX512 void silu_rows_bf16(const Gate &of, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        const Bf16 *x = static_cast<const Bf16 *>(of.x) + row * of.x_stride;
        Bf16 *out = static_cast<Bf16 *>(of.out) + row * of.out_stride;
        for (std::int64_t i = 0; i < of.width; i += 16) {
            const std::int64_t left = of.width - i;
            const auto lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
            const __m512i active = _mm512_and_si512(
                rounded_bits_of(silu_of(load_bf16x16(x + i, lanes))),
                _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
            const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(active),
                                                 load_bf16x16(x + of.width + i, lanes));
            const __m512i halves = _mm512_srli_epi32(rounded_bits_of(product), 16);
            _mm256_mask_storeu_epi16(out + i, lanes, _mm512_cvtepi32_epi16(halves));
        }
    }
}

#endif

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
    auto rows = gate_for(isa());
#if defined(__x86_64__)
    const bool by_hand = of.dtype == Dtype::bf16 && of.activation == Activation::silu;
    if (by_hand && isa() >= Isa::avx512) rows = silu_rows_bf16;
#endif
    // An exponential costs as much as a few elements of other ops.
    over_rows(threads, of.rows, of.width * 4, [&](std::int64_t first, std::int64_t last) {
        rows(of, first, last);
    });
}

}  // namespace memserve
