// Thin linear layers with AVX512-BF16.
//
// `vdpbf16ps` adds a pair of products to each of 16 lanes. The order of sums that `linear.h` promises
// wants one accumulator an output, so lanes cannot run along k, where memory is contiguous. Two ways:
//
// - few rows of x: lanes are outputs. A tile of 16 weight rows x 16 pairs is transposed in registers
//   (64 shuffles), then each row of x takes 16 products with a pair of x in all lanes.
// - many rows of x: lanes are rows of x, which is transposed once a call. A pair of a weight is put in
//   all lanes: as many products as for 16 rows the other way, and no shuffles.
//
// Either way a whole line of each weight row is read at once: with rows a multiple of 4 KiB apart, 16
// of them do not fit the first-level cache together.
#include "memserve/linear.h"

#if defined(__x86_64__)

#include <algorithm>
#include <vector>

namespace memserve {

namespace {

constexpr std::int64_t panel = 16;       // outputs at a time
constexpr std::int64_t step = 32;        // of k at a time: one line of each weight row
constexpr std::int64_t few_rows = 10;    // measured: from here on the second way is faster
constexpr std::int64_t ahead_bytes = 1024;

std::int64_t block_of(std::int64_t k) { return k <= 1024 ? 512 : 1024; }

__mmask32 first_lanes(std::int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void transpose_4x4(__m512i &a, __m512i &b, __m512i &c,
                                                        __m512i &d) {
    const __m512i e = _mm512_unpacklo_epi32(a, b), f = _mm512_unpackhi_epi32(a, b);
    const __m512i g = _mm512_unpacklo_epi32(c, d), h = _mm512_unpackhi_epi32(c, d);
    a = _mm512_unpacklo_epi64(e, g), b = _mm512_unpackhi_epi64(e, g);
    c = _mm512_unpacklo_epi64(f, h), d = _mm512_unpackhi_epi64(f, h);
}

// 16 rows of 16 double words: lane i of z[j] becomes lane j of z[i].
MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void transpose(__m512i (&z)[16]) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) transpose_4x4(z[i], z[i + 1], z[i + 2], z[i + 3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(z[i], z[4 + i], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(z[i], z[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(z[8 + i], z[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(z[8 + i], z[12 + i], 0xdd);
        z[i] = _mm512_shuffle_i32x4(a, c, 0x88), z[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        z[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd), z[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// acc + the products of two pairs, where one pair is the same in all lanes.
MEMSERVE_AVX512_BF16 MEMSERVE_INLINE __m512 add_pairs(__m512 acc, __m512i pairs,
                                                      const std::uint8_t *pair) {
    std::int32_t same;
    std::memcpy(&same, pair, sizeof same);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(pairs),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(same)));
}

// 16 weight rows, walked along k. The walk goes on in the next panel's rows, which lie
// `panel * stride` further: that is what is prefetched near the end.
struct Walk {
    const std::uint8_t *weight;
    std::int64_t stride_bytes;
    std::int64_t row_bytes;

    MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void prefetch(std::int64_t at_byte) const {
        std::int64_t offset = at_byte + std::min(ahead_bytes, row_bytes);
        if (offset >= row_bytes) offset += panel * stride_bytes - row_bytes;
        // As a number: near the end of the weights it points beyond them.
        const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(weight) +
                                    static_cast<std::uintptr_t>(offset);
#pragma GCC unroll 16
        for (std::int64_t row = 0; row < panel; ++row) {
            const auto at = from + static_cast<std::uintptr_t>(row * stride_bytes);
            _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0);
        }
    }

    MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void load(__m512i (&lines)[16], std::int64_t at_byte,
                                                   __mmask32 lanes) const {
        const std::uint8_t *from = weight + at_byte;
        if (lanes == ~__mmask32{0}) {
#pragma GCC unroll 16
            for (int row = 0; row < panel; ++row) {
                lines[row] = _mm512_loadu_si512(from + row * stride_bytes);
            }
        } else {
            for (int row = 0; row < panel; ++row) {
                lines[row] = _mm512_maskz_loadu_epi16(lanes, from + row * stride_bytes);
            }
        }
    }
};

MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void store_row(Bf16 *to, __m512 sums, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, round_bf16x16_fast(sums));
}

// One panel: sums[i] are the 16 outputs of row i of x.
template <int rows>
MEMSERVE_AVX512_BF16 void few_rows_panel(const Walk &walk, std::int64_t k, const PackedX &x,
                                         __m512 *sums) {
    const auto *x_memory = static_cast<const std::uint8_t *>(x.memory);
    const std::int64_t block = block_of(k);
    for (std::int64_t start = 0; start < k; start += block) {
        const std::int64_t stop = std::min(k, start + block);
        __m512 acc[rows];
        for (int i = 0; i < rows; ++i) acc[i] = _mm512_setzero_ps();
        for (std::int64_t at = start; at < stop; at += step) {
            walk.prefetch(at * 2);
            __m512i tile[16];
            walk.load(tile, at * 2, first_lanes(stop - at));
            transpose(tile);
            const std::uint8_t *pairs = x_memory + at * 2;
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 16
                for (int i = 0; i < rows; ++i) {
                    acc[i] = add_pairs(acc[i], tile[pair], pairs + i * x.row_bytes + 4 * pair);
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            sums[i] = start == 0 ? acc[i] : _mm512_add_ps(sums[i], acc[i]);
        }
    }
}

MEMSERVE_AVX512_BF16 void many_rows_panel(const Walk &walk, std::int64_t k, const PackedX &x,
                                          __m512 *sums) {
    const auto *x_memory = static_cast<const std::uint8_t *>(x.memory);
    const std::int64_t block = block_of(k);
    __m512i sums_of_output[16] = {};
    for (std::int64_t start = 0; start < k; start += block) {
        const std::int64_t stop = std::min(k, start + block);
        __m512 acc[16];
        for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
        for (std::int64_t at = start; at < stop; at += step) {
            walk.prefetch(at * 2);
            alignas(64) std::uint8_t lines[16][64];
            {
                __m512i loaded[16];
                walk.load(loaded, at * 2, first_lanes(stop - at));
                for (int i = 0; i < 16; ++i) _mm512_store_si512(lines[i], loaded[i]);
            }
            const std::uint8_t *pairs = x_memory + at / 2 * 64;
#pragma GCC unroll 2
            for (int pair = 0; pair < 16; ++pair) {
                const __m512i x_pairs = _mm512_load_si512(pairs + pair * 64);
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    acc[i] = add_pairs(acc[i], x_pairs, lines[i] + 4 * pair);
                }
            }
        }
        for (int i = 0; i < 16; ++i) {
            const __m512 before = _mm512_castsi512_ps(sums_of_output[i]);
            const __m512 sum = start == 0 ? acc[i] : _mm512_add_ps(before, acc[i]);
            sums_of_output[i] = _mm512_castps_si512(sum);
        }
    }
    transpose(sums_of_output);
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_castsi512_ps(sums_of_output[i]);
}

using Panel = void (*)(const Walk &, std::int64_t, const PackedX &, __m512 *);

Panel panel_for(std::int64_t rows) {
    switch (rows) {
        case 1: return few_rows_panel<1>;
        case 2: return few_rows_panel<2>;
        case 3: return few_rows_panel<3>;
        case 4: return few_rows_panel<4>;
        case 5: return few_rows_panel<5>;
        case 6: return few_rows_panel<6>;
        case 7: return few_rows_panel<7>;
        case 8: return few_rows_panel<8>;
        case 9: return few_rows_panel<9>;
        case 10: return few_rows_panel<10>;
        default: return many_rows_panel;
    }
}

// Whole steps of k, zero beyond k.
std::int64_t padded(std::int64_t k) { return (k + step - 1) / step * step; }

// Kept a thread: the largest call's, at most 16 rows.
std::uint8_t *scratch(std::size_t bytes, int which) {
    thread_local std::vector<std::uint8_t> memory[2];
    std::vector<std::uint8_t> &chosen = memory[which];
    if (chosen.size() < bytes + 64) chosen.resize(bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(chosen.data());
    return chosen.data() + (64 - address % 64) % 64;
}

MEMSERVE_AVX512_BF16 PackedX transposed_x(const ThinCall &call, std::int64_t k) {
    const std::int64_t width = padded(k);
    std::uint8_t *memory = scratch(static_cast<std::size_t>(width * 32), 0);
    const auto *x = static_cast<const Bf16 *>(call.x);
    for (std::int64_t at = 0; at < k; at += step) {
        __m512i tile[16];
        const __mmask32 lanes = first_lanes(k - at);
        for (int i = 0; i < 16; ++i) {
            tile[i] = i < call.rows ? _mm512_maskz_loadu_epi16(lanes, x + i * call.x_stride + at)
                                    : _mm512_setzero_si512();
        }
        transpose(tile);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(memory + at * 32 + i * 64, tile[i]);
    }
    return {memory, 0};
}

// Fewer outputs than a panel: their rows, and zeros for the others.
Walk padded_walk(const ThinWeight &weight) {
    const std::int64_t row_bytes = weight.k * 2;
    std::uint8_t *memory = scratch(static_cast<std::size_t>(row_bytes * panel), 1);
    std::memset(memory, 0, static_cast<std::size_t>(row_bytes * panel));
    const auto *from = static_cast<const Bf16 *>(weight.weight);
    for (std::int64_t row = 0; row < weight.n; ++row) {
        std::memcpy(memory + row * row_bytes, from + row * weight.stride,
                    static_cast<std::size_t>(row_bytes));
    }
    return {memory, row_bytes, row_bytes};
}

}  // namespace

PackedX pack_x(const ThinWeight &weight, const ThinCall &call) {
    if (call.rows > few_rows) return transposed_x(call, weight.k);
    if (weight.k % step == 0) return {call.x, call.x_stride * 2};
    const std::int64_t row_bytes = padded(weight.k) * 2;
    std::uint8_t *memory = scratch(static_cast<std::size_t>(row_bytes * call.rows), 0);
    const auto *x = static_cast<const Bf16 *>(call.x);
    for (std::int64_t row = 0; row < call.rows; ++row) {
        std::uint8_t *to = memory + row * row_bytes;
        std::memcpy(to, x + row * call.x_stride, static_cast<std::size_t>(weight.k * 2));
        std::memset(to + weight.k * 2, 0, static_cast<std::size_t>(row_bytes - weight.k * 2));
    }
    return {memory, row_bytes};
}

MEMSERVE_AVX512_BF16 void thin_panels_bf16(const ThinWeight &weight, const ThinCall &call,
                                           const PackedX &packed, std::int64_t first,
                                           std::int64_t last) {
    const Panel work = panel_for(call.rows);
    const auto *rows = static_cast<const Bf16 *>(weight.weight);
    const auto *bias = static_cast<const Bf16 *>(weight.bias);
    auto *out = static_cast<Bf16 *>(call.out);
    for (std::int64_t at = first; at < last; at += panel) {
        const std::int64_t wanted = std::min(panel, last - at);
        // A last panel that is not whole starts earlier, and what it computes again is not stored.
        const std::int64_t from = weight.n < panel ? 0 : std::min(at, weight.n - panel);
        const Walk walk = weight.n < panel
                              ? padded_walk(weight)
                              : Walk{reinterpret_cast<const std::uint8_t *>(
                                         rows + from * weight.stride),
                                     weight.stride * 2, weight.k * 2};
        const auto lanes = static_cast<__mmask16>(
            first_lanes(at - from + wanted) & ~first_lanes(at - from));
        __m512 sums[16];
        work(walk, weight.k, packed, sums);
        for (std::int64_t i = 0; i < call.rows; ++i) {
            if (bias != nullptr) {
                sums[i] = _mm512_add_ps(sums[i], load_bf16x16(bias + from, lanes));
            }
            store_row(out + i * call.out_stride + from, sums[i], lanes);
        }
    }
}

}  // namespace memserve

#endif
