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
// Many rows are blocks of 16, the last one filled up with zeros: three share a reading of a panel of
// weight rows, more of them take turns while it is in the cache. Either way a whole line of each weight row is read at once: with rows a multiple of
// 4 KiB apart, 16 of them do not fit the first-level cache together.
#include "memserve/linear.h"

#if defined(__x86_64__)

#include <algorithm>
#include <vector>

namespace memserve {

namespace {

constexpr std::int64_t panel = 16;       // outputs at a time
constexpr std::int64_t step = 32;        // of k at a time: one line of each weight row
constexpr std::int64_t block_rows = 16;  // of x
constexpr std::int64_t most_blocks = 3;  // that share a reading of the weights
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

// `count` weight rows, walked along k. The walk goes on in the rows after them: that is what is
// prefetched near the end.
struct Walk {
    const std::uint8_t *weight;
    std::int64_t stride_bytes;
    std::int64_t row_bytes;
    bool again;  // walked before: the rows are in the cache, and so is the start of the next ones

    template <int count>
    MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void prefetch(std::int64_t at_byte) const {
        if (again) return;
        std::int64_t offset = at_byte + std::min(ahead_bytes, row_bytes);
        if (offset >= row_bytes) offset += count * stride_bytes - row_bytes;
        // As a number: near the end of the weights it points beyond them.
        const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(weight) +
                                    static_cast<std::uintptr_t>(offset);
#pragma GCC unroll 16
        for (std::int64_t row = 0; row < count; ++row) {
            const auto at = from + static_cast<std::uintptr_t>(row * stride_bytes);
            _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0);
        }
    }

    template <int count>
    MEMSERVE_AVX512_BF16 MEMSERVE_INLINE void load(__m512i (&lines)[count], std::int64_t at_byte,
                                                   __mmask32 lanes) const {
        const std::uint8_t *from = weight + at_byte;
        if (lanes == ~__mmask32{0}) {
#pragma GCC unroll 16
            for (int row = 0; row < count; ++row) {
                lines[row] = _mm512_loadu_si512(from + row * stride_bytes);
            }
        } else {
            for (int row = 0; row < count; ++row) {
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
MEMSERVE_AVX512_BF16 void few_rows_panel(const Walk &walk, std::int64_t k, const std::uint8_t *x,
                                         std::int64_t x_row_bytes, __m512 *sums) {
    const std::int64_t block = block_of(k);
    for (std::int64_t start = 0; start < k; start += block) {
        const std::int64_t stop = std::min(k, start + block);
        __m512 acc[rows];
        for (int i = 0; i < rows; ++i) acc[i] = _mm512_setzero_ps();
        for (std::int64_t at = start; at < stop; at += step) {
            walk.prefetch<panel>(at * 2);
            __m512i tile[16];
            walk.load(tile, at * 2, first_lanes(stop - at));
            transpose(tile);
            const std::uint8_t *pairs = x + at * 2;
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 16
                for (int i = 0; i < rows; ++i) {
                    acc[i] = add_pairs(acc[i], tile[pair], pairs + i * x_row_bytes + 4 * pair);
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            sums[i] = start == 0 ? acc[i] : _mm512_add_ps(sums[i], acc[i]);
        }
    }
}

// `outputs` of a panel for `blocks` of 16 rows of x, which are transposed: a weight's pair that was put
// in all lanes serves every block. sums[block * panel + i] are the 16 rows' sums of output i.
template <int blocks, int outputs>
MEMSERVE_AVX512_BF16 void block_sums(const Walk &walk, std::int64_t k, const std::uint8_t *x,
                                     std::int64_t block_bytes, __m512 *sums) {
    const std::int64_t block = block_of(k);
    for (std::int64_t start = 0; start < k; start += block) {
        const std::int64_t stop = std::min(k, start + block);
        __m512 acc[outputs][blocks];
        for (auto &output : acc) {
            for (__m512 &sum : output) sum = _mm512_setzero_ps();
        }
        for (std::int64_t at = start; at < stop; at += step) {
            walk.prefetch<outputs>(at * 2);
            alignas(64) std::uint8_t lines[outputs][64];
            {
                __m512i loaded[outputs];
                walk.load(loaded, at * 2, first_lanes(stop - at));
                for (int i = 0; i < outputs; ++i) _mm512_store_si512(lines[i], loaded[i]);
            }
            const std::uint8_t *pairs = x + at * 32;
#pragma GCC unroll 2
            for (int pair = 0; pair < 16; ++pair) {
                __m512i x_pairs[blocks];
#pragma GCC unroll 4
                for (int b = 0; b < blocks; ++b) {
                    x_pairs[b] = _mm512_load_si512(pairs + b * block_bytes + pair * 64);
                }
#pragma GCC unroll 16
                for (int i = 0; i < outputs; ++i) {
#pragma GCC unroll 4
                    for (int b = 0; b < blocks; ++b) {
                        acc[i][b] = add_pairs(acc[i][b], x_pairs[b], lines[i] + 4 * pair);
                    }
                }
            }
        }
        for (int i = 0; i < outputs; ++i) {
            for (int b = 0; b < blocks; ++b) {
                __m512 &sum = sums[b * panel + i];
                sum = start == 0 ? acc[i][b] : _mm512_add_ps(sum, acc[i][b]);
            }
        }
    }
}

// One panel: sums[row] are the 16 outputs of that row of the blocks.
template <int blocks>
MEMSERVE_AVX512_BF16 void block_panel(const Walk &walk, std::int64_t k, const std::uint8_t *x,
                                      std::int64_t block_bytes, __m512 *sums) {
    // As many accumulators as there are registers for.
    constexpr int outputs = blocks == 1 ? 16 : 8;
    Walk part = walk;
    for (int first = 0; first < panel; first += outputs) {
        block_sums<blocks, outputs>(part, k, x, block_bytes, sums + first);
        part.weight += outputs * walk.stride_bytes;
    }
    for (int b = 0; b < blocks; ++b) {
        __m512i tile[16];
        for (int i = 0; i < 16; ++i) tile[i] = _mm512_castps_si512(sums[b * panel + i]);
        transpose(tile);
        for (int i = 0; i < 16; ++i) sums[b * panel + i] = _mm512_castsi512_ps(tile[i]);
    }
}

using Panel = void (*)(const Walk &, std::int64_t, const std::uint8_t *, std::int64_t, __m512 *);

Panel few_panel_for(std::int64_t rows) {
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
        default: return few_rows_panel<10>;
    }
}

Panel block_panel_for(std::int64_t blocks) {
    switch (blocks) {
        case 1: return block_panel<1>;
        case 2: return block_panel<2>;
        default: return block_panel<3>;
    }
}

// Of `left` blocks: four are two and two, not three and one.
std::int64_t blocks_at_once(std::int64_t left) {
    return left == 4 ? 2 : std::min(left, most_blocks);
}

// Whole steps of k, zero beyond k.
std::int64_t padded(std::int64_t k) { return (k + step - 1) / step * step; }

// Kept a thread: the largest call's.
std::uint8_t *scratch(std::size_t bytes, int which) {
    thread_local std::vector<std::uint8_t> memory[2];
    std::vector<std::uint8_t> &chosen = memory[which];
    if (chosen.size() < bytes + 64) chosen.resize(bytes + 64);
    const auto address = reinterpret_cast<std::uintptr_t>(chosen.data());
    return chosen.data() + (64 - address % 64) % 64;
}

MEMSERVE_AVX512_BF16 void transpose_rows(const Bf16 *x, std::int64_t stride, std::int64_t rows,
                                         std::int64_t k, std::uint8_t *to) {
    for (std::int64_t at = 0; at < k; at += step) {
        __m512i tile[16];
        const __mmask32 lanes = first_lanes(k - at);
        for (int i = 0; i < 16; ++i) {
            tile[i] = i < rows ? _mm512_maskz_loadu_epi16(lanes, x + i * stride + at)
                               : _mm512_setzero_si512();
        }
        transpose(tile);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + at * 32 + i * 64, tile[i]);
    }
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
    return {memory, row_bytes, row_bytes, false};
}

}  // namespace

PackedX pack_x(const ThinWeight &weight, const ThinCall &call) {
    const auto *x = static_cast<const Bf16 *>(call.x);
    const std::int64_t row_bytes = padded(weight.k) * 2;
    if (call.rows > few_rows) {
        const std::int64_t blocks = (call.rows + block_rows - 1) / block_rows;
        const std::int64_t bytes = row_bytes * block_rows;
        std::uint8_t *memory = scratch(static_cast<std::size_t>(bytes * blocks), 0);
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t first = block * block_rows;
            transpose_rows(x + first * call.x_stride, call.x_stride, call.rows - first, weight.k,
                           memory + block * bytes);
        }
        return {memory, bytes, blocks};
    }
    if (weight.k % step == 0) {
        return {reinterpret_cast<const std::uint8_t *>(x), call.x_stride * 2, 0};
    }
    std::uint8_t *memory = scratch(static_cast<std::size_t>(row_bytes * call.rows), 0);
    for (std::int64_t row = 0; row < call.rows; ++row) {
        std::uint8_t *to = memory + row * row_bytes;
        std::memcpy(to, x + row * call.x_stride, static_cast<std::size_t>(weight.k * 2));
        std::memset(to + weight.k * 2, 0, static_cast<std::size_t>(row_bytes - weight.k * 2));
    }
    return {memory, row_bytes, 0};
}

MEMSERVE_AVX512_BF16 void thin_panels_bf16(const ThinWeight &weight, const ThinCall &call,
                                           const PackedX &packed, std::int64_t first,
                                           std::int64_t last) {
    const auto *rows = static_cast<const Bf16 *>(weight.weight);
    const auto *bias = static_cast<const Bf16 *>(weight.bias);
    auto *out = static_cast<Bf16 *>(call.out);
    for (std::int64_t at = first; at < last; at += panel) {
        const std::int64_t wanted = std::min(panel, last - at);
        // A last panel that is not whole starts earlier, and what it computes again is not stored.
        const std::int64_t from = weight.n < panel ? 0 : std::min(at, weight.n - panel);
        Walk walk = weight.n < panel
                        ? padded_walk(weight)
                        : Walk{reinterpret_cast<const std::uint8_t *>(rows + from * weight.stride),
                               weight.stride * 2, weight.k * 2, false};
        const auto lanes = static_cast<__mmask16>(
            first_lanes(at - from + wanted) & ~first_lanes(at - from));
        __m512 sums[most_blocks * block_rows];
        for (std::int64_t row = 0, count; row < call.rows; row += count) {
            const std::int64_t block = row / block_rows;
            const std::int64_t blocks = blocks_at_once(packed.blocks - block);
            const std::int64_t rows_at_once = packed.blocks == 0 ? few_rows : blocks * block_rows;
            count = std::min(rows_at_once, call.rows - row);
            const Panel work = packed.blocks == 0 ? few_panel_for(count) : block_panel_for(blocks);
            work(walk, weight.k, packed.memory + block * packed.stride_bytes, packed.stride_bytes,
                 sums);
            for (std::int64_t i = 0; i < count; ++i) {
                if (bias != nullptr) {
                    sums[i] = _mm512_add_ps(sums[i], load_bf16x16(bias + from, lanes));
                }
                store_row(out + (row + i) * call.out_stride + from, sums[i], lanes);
            }
            walk.again = true;
        }
    }
}

}  // namespace memserve

#endif
