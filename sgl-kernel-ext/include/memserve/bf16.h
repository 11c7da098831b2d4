// Numbers of 16 bits: bfloat16 and IEEE half, to float and back (round to nearest even).
//
// The scalar forms are plain integer arithmetic that compilers vectorise for whatever function they
// are inlined into; the vector forms are for kernels written by hand, in functions of the same
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memserve/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memserve {

// How activations and weights are kept. Values are those of `tables.Dtype`.
enum class Dtype { bf16 = 0, fp16 = 1, fp32 = 2 };

constexpr std::size_t bytes_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

MEMSERVE_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

MEMSERVE_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MEMSERVE_INLINE float to_float(float value) { return value; }

MEMSERVE_INLINE float to_float(Bf16 value) {
    return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

MEMSERVE_INLINE float to_float(Fp16 value) {
    // The exponent is moved by a multiplication, which brings subnormal numbers along; infinities
    // and NaNs need the rest of the exponent's bits.
    const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return float_of(sign | scaled | special);
}

template <typename T>
T from_float(float value);

template <>
MEMSERVE_INLINE float from_float<float>(float value) {
    return value;
}

template <>
MEMSERVE_INLINE Bf16 from_float<Bf16>(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
MEMSERVE_INLINE Fp16 from_float<Fp16>(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    // Subnormal results: adding 0.5 leaves the wanted bits at the end of the sum, rounded.
    const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<std::uint16_t>(sign | result)};
}

// The same for a value computed from numbers of T: its NaNs are theirs or the processor's, and stay
// NaNs without being looked for.
template <typename T>
MEMSERVE_INLINE T narrow(float value) {
    return from_float<T>(value);
}

MEMSERVE_INLINE std::uint32_t rounded_bits(float value) {
    const std::uint32_t bits = bits_of(value);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <>
MEMSERVE_INLINE Bf16 narrow<Bf16>(float value) {
    return {static_cast<std::uint16_t>(rounded_bits(value) >> 16)};
}

// Narrowed and widened again: what a step of a computation in T leaves.
template <typename T>
MEMSERVE_INLINE float rounded(float value) {
    return to_float(narrow<T>(value));
}

template <>
MEMSERVE_INLINE float rounded<Bf16>(float value) {
    return float_of(rounded_bits(value) & 0xffff0000u);
}

#if defined(__x86_64__)

// 16 bf16 numbers at any address; those beyond `lanes` are 0 and their memory is not touched.
MEMSERVE_AVX512 MEMSERVE_INLINE __m512 load_bf16x16(const Bf16 *from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MEMSERVE_AVX512 MEMSERVE_INLINE __m512 load_bf16x16(const Bf16 *from, __mmask16 lanes) {
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

MEMSERVE_AVX512 MEMSERVE_INLINE __m256i round_bf16x16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

MEMSERVE_AVX512 MEMSERVE_INLINE void store_bf16x16(Bf16 *to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), round_bf16x16(values));
}

MEMSERVE_AVX512 MEMSERVE_INLINE void store_bf16x16(Bf16 *to, __m512 values, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, round_bf16x16(values));
}

// One instruction, which takes subnormal numbers for 0.
MEMSERVE_AVX512_BF16 MEMSERVE_INLINE __m256i round_bf16x16_fast(__m512 values) {
    const __m256bh rounded = _mm512_cvtneps_pbh(values);
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

MEMSERVE_AVX2 MEMSERVE_INLINE __m256 load_bf16x8(const Bf16 *from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

MEMSERVE_AVX2 MEMSERVE_INLINE void store_bf16x8(Bf16 *to, __m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i plain = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_blendv_epi8(plain, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(chosen),
                                            _mm256_extracti128_si256(chosen, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), packed);
}

#endif

}  // namespace memserve
