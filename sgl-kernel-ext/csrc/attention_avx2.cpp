// Attention in floats, 8 at a time. Compiled for AVX2 and FMA; called where the processor has them.
#include "attention_tile.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include "attention_kernel.h"

namespace memserve {
namespace {

__m256 read8(const Bf16 *from) { return load_bf16x8(from); }
__m256 read8(const Fp16 *from) {
    alignas(32) float values[8];
    for (int i = 0; i < 8; ++i) values[i] = to_float(from[i]);
    return _mm256_load_ps(values);
}
__m256 read8(const float *from) { return _mm256_loadu_ps(from); }

void write8(Bf16 *to, __m256 values) { store_bf16x8(to, values); }
void write8(Fp16 *to, __m256 values) {
    alignas(32) float floats[8];
    _mm256_store_ps(floats, values);
    for (int i = 0; i < 8; ++i) to[i] = from_float<Fp16>(floats[i]);
}
void write8(float *to, __m256 values) { _mm256_storeu_ps(to, values); }

template <class T>
struct Avx2Floats {
    using Vec = __m256;
    using Unit = float;
    using Units = __m256;
    static constexpr std::size_t lanes = 8, per_unit = 1, element_bytes = sizeof(T), most_rows = 6, most_vectors = 2;

    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec set1(float value) { return _mm256_set1_ps(value); }
    static Vec load(const float *from) { return _mm256_loadu_ps(from); }
    static void store(float *to, Vec value) { _mm256_storeu_ps(to, value); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    static Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static Vec with_sign(Vec a, Vec sign) {
        return _mm256_or_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
    }
    static float first(Vec a) { return _mm256_cvtss_f32(a); }
    static void largest(const Vec *a, std::size_t count, float *to) {
        for (std::size_t i = 0; i < count; ++i) to[i] = largest(a[i]);
    }
    static float largest(Vec a) {
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    }
    static float total(Vec a) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }

    static Vec mul_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

    // Lane i of `a` where bit i of `lanes_of_a` is set, `other` in the rest.
    static Vec chosen(std::uint64_t lanes_of_a, Vec a, float other) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i bits = _mm256_set1_epi32(static_cast<int>(lanes_of_a & 0xff));
        const __m256i here = _mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit);
        return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(here));
    }

    static Vec exp2(Vec x) {
        // Below the smallest normal number: 0.
        const Vec enough = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
        const Vec limited = _mm256_and_ps(x, enough);
        const Vec whole =
            _mm256_round_ps(limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Vec rest = _mm256_sub_ps(limited, whole);
        Vec sum = zero();
        for (const float factor : exp2_factors) {
            sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(factor));
        }
        const __m256i exponent = _mm256_slli_epi32(
            _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
        return _mm256_and_ps(_mm256_mul_ps(sum, _mm256_castsi256_ps(exponent)), enough);
    }

    static Units load_units(const Unit *from) { return _mm256_loadu_ps(from); }
    static Units broadcast(const Unit *from) { return _mm256_broadcast_ss(from); }
    static Vec dot(Vec sum, Units a, Units b) { return _mm256_fmadd_ps(a, b, sum); }

    static void read_units(const std::uint8_t *row, std::size_t units, Unit *to) {
        for (std::size_t i = 0; i < units; i += lanes) {
            _mm256_storeu_ps(to + i, read8(reinterpret_cast<const T *>(row) + i));
        }
    }

    static void pack_keys(const std::uint8_t *const (&rows)[lanes], std::size_t units, Unit *to) {
        for (std::size_t unit = 0; unit < units; unit += lanes) {
            __m256 pairs[8];
            for (std::size_t i = 0; i < 8; i += 2) {
                const __m256 a = read8(reinterpret_cast<const T *>(rows[i]) + unit);
                const __m256 b = read8(reinterpret_cast<const T *>(rows[i + 1]) + unit);
                pairs[i] = _mm256_unpacklo_ps(a, b);
                pairs[i + 1] = _mm256_unpackhi_ps(a, b);
            }
            // Units 0 1 2 3 (and, in the upper half, 4 5 6 7) of keys 0 .. 3, then of 4 .. 7.
            for (std::size_t i = 0; i < 4; ++i) {
                const std::size_t pair = i / 2;
                const auto of = [&](std::size_t half) {
                    const __m256 a = pairs[4 * half + pair], b = pairs[4 * half + 2 + pair];
                    return i % 2 == 0 ? _mm256_shuffle_ps(a, b, 0x44)
                                      : _mm256_shuffle_ps(a, b, 0xee);
                };
                const __m256 left = of(0), right = of(1);
                _mm256_storeu_ps(to + (unit + i) * block_keys,
                                 _mm256_permute2f128_ps(left, right, 0x20));
                _mm256_storeu_ps(to + (unit + i + 4) * block_keys,
                                 _mm256_permute2f128_ps(left, right, 0x31));
            }
        }
    }

    static void pack_values(const std::uint8_t *const (&rows)[per_unit], std::size_t v_dim,
                            Unit *to) {
        read_units(rows[0], v_dim, to);
    }

    static void put_weights(Unit *weights, std::size_t key, Vec values) {
        _mm256_storeu_ps(weights + key, values);
    }
    static void put_weights(Unit *weights, std::size_t key, Vec first, Vec second) {
        put_weights(weights, key, first);
        put_weights(weights, key + lanes, second);
    }
    static std::uint8_t *write(std::uint8_t *to, Vec values) {
        write8(reinterpret_cast<T *>(to), values);
        return to + lanes * sizeof(T);
    }
};

}  // namespace

const AttentionKernel *attention_avx2(Dtype dtype) {
    switch (dtype) {
        case Dtype::bf16: return &Kernel<Avx2Floats<Bf16>>::functions;
        case Dtype::fp16: return &Kernel<Avx2Floats<Fp16>>::functions;
        default: return &Kernel<Avx2Floats<float>>::functions;
    }
}

}  // namespace memserve

#else

const memserve::AttentionKernel *memserve::attention_avx2(Dtype) { return nullptr; }

#endif
