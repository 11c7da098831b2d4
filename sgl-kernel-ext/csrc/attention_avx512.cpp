// Attention in floats, 16 at a time, for what is kept in any dtype. Compiled for AVX-512 F, BW, DQ
// and VL; called where the processor has them.
#include "attention_tile.h"

#if defined(__AVX512F__)

#include "attention_avx512.h"

namespace memserve {
namespace {

__m512 read16(const Bf16 *from) { return load_bf16x16(from); }
__m512 read16(const Fp16 *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
__m512 read16(const float *from) { return _mm512_loadu_ps(from); }

void write16(Bf16 *to, __m512 values) { store_bf16x16(to, values); }
void write16(Fp16 *to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                        _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
void write16(float *to, __m512 values) { _mm512_storeu_ps(to, values); }

template <class T>
struct Avx512Floats : Avx512Vectors {
    using Unit = float;
    using Units = __m512;
    static constexpr std::size_t per_unit = 1, element_bytes = sizeof(T);

    static Units load_units(const Unit *from) { return _mm512_loadu_ps(from); }
    static Units broadcast(const Unit *from) { return _mm512_set1_ps(*from); }
    static Vec dot(Vec sum, Units a, Units b) { return _mm512_fmadd_ps(a, b, sum); }
    static Vec exp2(Vec x) { return power(x, exp2_factors); }

    static void read_units(const std::uint8_t *row, std::size_t units, Unit *to) {
        for (std::size_t i = 0; i < units; i += lanes) {
            _mm512_storeu_ps(to + i, read16(reinterpret_cast<const T *>(row) + i));
        }
    }

    static void pack_keys(const std::uint8_t *const (&rows)[lanes], std::size_t units, Unit *to) {
        for (std::size_t unit = 0; unit < units; unit += lanes) {
            alignas(64) float square[lanes][lanes];
            for (std::size_t row = 0; row < lanes; ++row) {
                read_units(rows[row] + unit * sizeof(T), lanes, square[row]);
            }
            for (std::size_t i = 0; i < lanes; i += 4) {
                __m512i quads[4];
                for (std::size_t j = 0; j < 4; ++j) {
                    const auto quad = [&](std::size_t quarter) {
                        return _mm_load_si128(
                            reinterpret_cast<const __m128i *>(&square[4 * quarter + j][i]));
                    };
                    quads[j] = _mm512_castsi128_si512(quad(0));
                    quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0x00f0, quad(1));
                    quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0x0f00, quad(2));
                    quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0xf000, quad(3));
                }
                transpose_quads(quads,
                                reinterpret_cast<std::uint32_t *>(to + (unit + i) * block_keys));
            }
        }
    }

    static void pack_values(const std::uint8_t *const (&rows)[per_unit], std::size_t v_dim,
                            Unit *to) {
        read_units(rows[0], v_dim, to);
    }

    static void put_weights(Unit *weights, std::size_t key, Vec values) {
        _mm512_storeu_ps(weights + key, values);
    }
    static void put_weights(Unit *weights, std::size_t key, Vec first, Vec second) {
        put_weights(weights, key, first);
        put_weights(weights, key + lanes, second);
    }
    static std::uint8_t *write(std::uint8_t *to, Vec values) {
        write16(reinterpret_cast<T *>(to), values);
        return to + lanes * sizeof(T);
    }
};

}  // namespace

const AttentionKernel *attention_avx512(Dtype dtype) {
    switch (dtype) {
        case Dtype::bf16: return &Kernel<Avx512Floats<Bf16>>::functions;
        case Dtype::fp16: return &Kernel<Avx512Floats<Fp16>>::functions;
        default: return &Kernel<Avx512Floats<float>>::functions;
    }
}

}  // namespace memserve

#else

const memserve::AttentionKernel *memserve::attention_avx512(Dtype) { return nullptr; }

#endif
