// Vectors of 16 floats, for the two kernels of AVX-512.
#pragma once

#include <immintrin.h>

#include "attention_kernel.h"

namespace memserve {
namespace {

struct Avx512Vectors {
    using Vec = __m512;
    static constexpr std::size_t lanes = 16, most_rows = 6, most_vectors = 4;

    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec set1(float value) { return _mm512_set1_ps(value); }
    static Vec load(const float *from) { return _mm512_loadu_ps(from); }
    static void store(float *to, Vec value) { _mm512_storeu_ps(to, value); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
    static Vec with_sign(Vec a, Vec sign) {
        const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), bit));
    }

    // to[i] = the largest lane of a[i], for up to eight vectors; writes 16 floats.
    static void largest(const Vec *a, std::size_t count, float *to) {
        // Each step puts two vectors' lanes side by side and takes the larger ones.
        Vec pairs[4], quads[2];
        for (std::size_t i = 0; i < 4; ++i) {
            const Vec x = a[2 * i < count ? 2 * i : 0], y = a[2 * i + 1 < count ? 2 * i + 1 : 0];
            pairs[i] = max(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
        }
        for (std::size_t i = 0; i < 2; ++i) {
            const __m512d x = _mm512_castps_pd(pairs[2 * i]);
            const __m512d y = _mm512_castps_pd(pairs[2 * i + 1]);
            quads[i] = max(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        const Vec halves = max(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                               _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
        const Vec done = max(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
        _mm512_storeu_ps(to, _mm512_shuffle_f32x4(done, done, 0x08));
    }
    static float total(Vec a) { return _mm512_reduce_add_ps(a); }
    static float first(Vec a) { return _mm512_cvtss_f32(a); }

    static Vec mul_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

    // Lane i of `a` where bit i of `lanes_of_a` is set, `other` in the rest.
    static Vec chosen(std::uint64_t lanes_of_a, Vec a, float other) {
        return _mm512_mask_blend_ps(static_cast<__mmask16>(lanes_of_a), _mm512_set1_ps(other), a);
    }

    // 2^x for x <= 0, 0 from about -150 on: 2^(whole part) times a polynomial of the rest.
    template <std::size_t terms>
    static Vec power(Vec x, const float (&factors)[terms]) {
        const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Vec rest = _mm512_sub_ps(x, whole);
        Vec sum = _mm512_set1_ps(factors[0]);
        for (std::size_t i = 1; i < terms; ++i) {
            sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factors[i]));
        }
        return _mm512_scalef_ps(sum, whole);
    }

    // Four keys of each quarter of a vector: to[u * block_keys + lane] = rows[lane][from + u], for
    // four units of 32 bits. `quads[j]` holds row 4 q + j in quarter q.
    static void transpose_quads(const __m512i (&quads)[4], std::uint32_t *to) {
        const __m512i ab = _mm512_unpacklo_epi32(quads[0], quads[1]);
        const __m512i AB = _mm512_unpackhi_epi32(quads[0], quads[1]);
        const __m512i cd = _mm512_unpacklo_epi32(quads[2], quads[3]);
        const __m512i CD = _mm512_unpackhi_epi32(quads[2], quads[3]);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi64(ab, cd));
        _mm512_storeu_si512(to + block_keys, _mm512_unpackhi_epi64(ab, cd));
        _mm512_storeu_si512(to + 2 * block_keys, _mm512_unpacklo_epi64(AB, CD));
        _mm512_storeu_si512(to + 3 * block_keys, _mm512_unpackhi_epi64(AB, CD));
    }
};

}  // namespace
}  // namespace memserve
