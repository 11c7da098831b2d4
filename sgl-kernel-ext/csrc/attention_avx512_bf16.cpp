// Attention in pairs of bf16, which one instruction multiplies and adds in fp32. Compiled for AVX-512
// with BF16; called where the processor has it.
#include "attention_tile.h"

#if defined(__AVX512BF16__)

#include <cstring>

#include "attention_avx512.h"

namespace memserve {
namespace {

struct Bf16Pairs : Avx512Vectors {
    using Unit = std::uint32_t;
    using Units = __m512i;
    static constexpr std::size_t per_unit = 2, element_bytes = 2;

    static Units load_units(const Unit *from) { return _mm512_loadu_si512(from); }
    static Units broadcast(const Unit *from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
    static Vec dot(Vec sum, Units a, Units b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    // Relative error 3e-6; rounding the weights to bf16 makes 2e-3 of it.
    static Vec exp2(Vec x) {
        return power(x, {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f});
    }

    static void read_units(const std::uint8_t *row, std::size_t units, Unit *to) {
        std::memcpy(to, row, units * sizeof(Unit));
    }

    static void pack_keys(const std::uint8_t *const (&rows)[lanes], std::size_t units, Unit *to) {
        for (std::size_t unit = 0; unit < units; unit += 4) {
            __m512i quads[4];
            for (std::size_t j = 0; j < 4; ++j) {
                const auto quad = [&](std::size_t quarter) {
                    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(
                        rows[4 * quarter + j] + unit * sizeof(Unit)));
                };
                quads[j] = _mm512_castsi128_si512(quad(0));
                quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0x00f0, quad(1));
                quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0x0f00, quad(2));
                quads[j] = _mm512_mask_broadcast_i32x4(quads[j], 0xf000, quad(3));
            }
            transpose_quads(quads, to + unit * block_keys);
        }
    }

    static void pack_values(const std::uint8_t *const (&rows)[per_unit], std::size_t v_dim,
                            Unit *to) {
        for (std::size_t i = 0; i < v_dim; i += 16) {
            const auto wide = [&](std::size_t row) {
                const auto *at = reinterpret_cast<const __m256i *>(rows[row] + i * 2);
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
            };
            _mm512_storeu_si512(to + i,
                                _mm512_or_si512(wide(0), _mm512_slli_epi32(wide(1), 16)));
        }
    }

    static __m256i rounded(Vec values) {
        return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
    }
    static void put_weights(Unit *weights, std::size_t key, Vec values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(weights + key / per_unit),
                            rounded(values));
    }
    static void put_weights(Unit *weights, std::size_t key, Vec first, Vec second) {
        _mm512_storeu_si512(weights + key / per_unit,
                            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
    static std::uint8_t *write(std::uint8_t *to, Vec values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), rounded(values));
        return to + 2 * lanes;
    }
};

}  // namespace

const AttentionKernel *attention_avx512_bf16(Dtype dtype) {
    return dtype == Dtype::bf16 ? &Kernel<Bf16Pairs>::functions : nullptr;
}

}  // namespace memserve

#else

const memserve::AttentionKernel *memserve::attention_avx512_bf16(Dtype) { return nullptr; }

#endif
