// Attention over tiles of rows, for any instruction set: online softmax over blocks of keys.
//
// For each block of keys (memory -> packed, in the first-level cache; used by all rows of the tile)
// and each handful of rows:
//
//     scores  = query . keys^T           broadcast from the rows, vectors of keys
//     weights = exp2(scores - peak)      peak: the largest score of the row so far
//     sum     = sum * keep + weights     keep = exp2(old peak - new peak)
//     out     = out * keep + weights . values
//
// Equal bits. Each lane is one key (scores) or one dimension (out), and adds up in the order of
// dimensions (scores) or of keys (out), never across lanes; the row's sum is kept by key modulo the
// lanes. So no number depends on how many rows or vectors a product was given. A key that a row does not
// see has weight 0, and adding nothing is exact: a row may be shown more keys than it sees.
//
// `Simd` is an instruction set and dtype: vectors of floats, and *units*, what a product multiplies (a
// float, or a pair of bf16). Everything is in an anonymous namespace: the same names are compiled with
// other instructions elsewhere, and the linker must not mix them.
#pragma once

#include "attention_tile.h"

namespace memserve {
namespace {

// Of a row that has seen nothing. What is masked lies far below, so that its weight is 0 even then.
constexpr float nothing_seen = -1e38f;
constexpr float masked = -3e38f;
// 2^x = 1 + ... for |x| <= 0.5, highest power first; relative error 2e-9.
constexpr float exp2_factors[] = {0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                  0x1.ebfbdcp-3f,  0x1.62e430p-1f,  1.0f};
constexpr float log2_e = 1.44269504f;
constexpr float ln_2 = 0.69314718f;

alignas(64) const std::uint8_t zero_row[most_head_dim * sizeof(float)] = {};

constexpr std::size_t rounded_up(std::size_t count, std::size_t step) {
    return (count + step - 1) / step * step;
}

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }
inline std::size_t most(std::size_t a, std::size_t b) { return a > b ? a : b; }

template <class Simd>
struct Kernel {
    using Vec = typename Simd::Vec;
    using Unit = typename Simd::Unit;
    static constexpr std::size_t lanes = Simd::lanes;
    static constexpr std::size_t block_units = block_keys / Simd::per_unit;

    // A row's state: `v_dim` of out, `lanes` of sum, the peak.
    static std::size_t state_floats(std::size_t v_dim) {
        return v_dim + rounded_up(lanes + 1, 16);
    }
    static float *sum_of(float *state, const Tile &tile) { return state + tile.v_dim; }
    static float &peak_of(float *state, const Tile &tile) { return state[tile.v_dim + lanes]; }

    struct Work {
        Unit *query, *keys, *values, *weights;
        float *scores, *states;
        std::uint32_t *low, *high;  // keys that a row sees: low .. high - 1
        float query_factor, cap_factor;
    };

    static std::uint8_t *cut(std::uint8_t *&from, std::size_t bytes) {
        std::uint8_t *part = from;
        from += rounded_up(bytes, 64);
        return part;
    }

    // Returns the bytes taken.
    static std::size_t lay_out(Work &work, std::uint8_t *memory, std::size_t rows,
                               std::size_t qk_dim, std::size_t v_dim) {
        std::uint8_t *at = memory;
        const std::size_t units = qk_dim / Simd::per_unit;
        work.query = reinterpret_cast<Unit *>(cut(at, rows * units * sizeof(Unit)));
        work.keys = reinterpret_cast<Unit *>(cut(at, units * block_keys * sizeof(Unit)));
        work.values = reinterpret_cast<Unit *>(cut(at, block_units * v_dim * sizeof(Unit)));
        work.weights =
            reinterpret_cast<Unit *>(cut(at, Simd::most_rows * block_units * sizeof(Unit)));
        work.scores =
            reinterpret_cast<float *>(cut(at, Simd::most_rows * block_keys * sizeof(float)));
        work.states =
            reinterpret_cast<float *>(cut(at, rows * state_floats(v_dim) * sizeof(float)));
        work.low = reinterpret_cast<std::uint32_t *>(cut(at, rows * sizeof(std::uint32_t)));
        work.high = reinterpret_cast<std::uint32_t *>(cut(at, rows * sizeof(std::uint32_t)));
        return static_cast<std::size_t>(at - memory);
    }

    static std::size_t scratch_bytes(std::size_t rows, std::size_t qk_dim, std::size_t v_dim) {
        Work work;
        alignas(64) static std::uint8_t nothing[64];
        return lay_out(work, nothing, rows, qk_dim, v_dim);
    }

    // to[row] = (keep == null ? 0 : to[row] * keep[row]) + sum over steps of a[row][step] * b[step],
    // for `rows` rows and `vectors` vectors of columns.
    template <int rows, int vectors>
    static void product_of(const Unit *a, std::size_t a_row, const Unit *b, std::size_t b_step,
                           float *to, std::size_t to_row, std::size_t steps, const float *keep) {
        Vec sums[rows][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                sums[r][v] = keep == nullptr
                                 ? Simd::zero()
                                 : Simd::mul(Simd::load(to + r * to_row + v * lanes),
                                             Simd::set1(keep[r]));
            }
        }
        for (std::size_t step = 0; step < steps; ++step) {
            typename Simd::Units of_b[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                of_b[v] = Simd::load_units(b + step * b_step + v * lanes);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const typename Simd::Units of_a = Simd::broadcast(a + r * a_row + step);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    sums[r][v] = Simd::dot(sums[r][v], of_a, of_b[v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) Simd::store(to + r * to_row + v * lanes, sums[r][v]);
        }
    }

    using Product = void (*)(const Unit *, std::size_t, const Unit *, std::size_t, float *,
                             std::size_t, std::size_t, const float *);

    template <int rows>
    static Product product_for(std::size_t vectors) {
        switch (vectors) {
            case 1: return product_of<rows, 1>;
            case 2: return product_of<rows, 2>;
            case 3: return product_of<rows, Simd::most_vectors < 3 ? 1 : 3>;
            default: return product_of<rows, Simd::most_vectors < 4 ? 1 : 4>;
        }
    }

    static Product product_for(std::size_t rows, std::size_t vectors) {
        static_assert(Simd::most_rows <= 6 && Simd::most_vectors <= 4, "as the switches know");
        switch (rows) {
            case 1: return product_for<1>(vectors);
            case 2: return product_for<2>(vectors);
            case 3: return product_for<3>(vectors);
            case 4: return product_for<4>(vectors);
            case 5: return product_for<5>(vectors);
            default: return product_for<6>(vectors);
        }
    }

    static void product(std::size_t rows, std::size_t vectors, const Unit *a, std::size_t a_row,
                        const Unit *b, std::size_t b_step, float *to, std::size_t to_row,
                        std::size_t steps, const float *keep) {
        while (vectors > 0) {
            const std::size_t now = least(vectors, Simd::most_vectors);
            product_for(rows, now)(a, a_row, b, b_step, to, to_row, steps, keep);
            b += now * lanes;
            to += now * lanes;
            vectors -= now;
        }
    }

    static Vec scaled(const Tile &tile, const Work &work, Vec scores) {
        if (tile.softcap == 0.0f) return Simd::mul(scores, Simd::set1(work.query_factor));
        // tanh by e = exp(-2 |x|): (1 - e) / (1 + e) with the sign of x.
        const Vec x = Simd::mul(scores, Simd::set1(work.query_factor));
        const Vec e = Simd::exp2(Simd::mul(Simd::magnitude(x), Simd::set1(-2.0f * log2_e)));
        const Vec one = Simd::set1(1.0f);
        const Vec tanh = Simd::with_sign(Simd::div(Simd::sub(one, e), Simd::add(one, e)), x);
        return Simd::mul(tanh, Simd::set1(work.cap_factor));
    }

    // Scores of one row to weights; updates the row's sum and peak. Of the block's keys it sees
    // [first, last); the other lanes of `vectors` get weight 0. Returns `keep`.
    static float soften(const Tile &tile, const Work &work, std::size_t row, float *state,
                        std::size_t vectors, std::ptrdiff_t first, std::ptrdiff_t last) {
        float *scores = work.scores + row * block_keys;
        const float old_peak = peak_of(state, tile);
        const bool whole = first <= 0 && last >= static_cast<std::ptrdiff_t>(vectors * lanes);
        Vec top = Simd::set1(old_peak);
        for (std::size_t v = 0; v < vectors; ++v) {
            Vec one = scaled(tile, work, Simd::load(scores + v * lanes));
            if (!whole) {
                const auto before = static_cast<std::ptrdiff_t>(v * lanes);
                one = Simd::within(one, first - before, last - before);
            }
            Simd::store(scores + v * lanes, one);
            top = Simd::max(top, one);
        }
        const float peak = Simd::largest(top);
        // Most blocks have no new peak; multiplying by 1 is exact, so leaving it out is, too.
        float keep = 1.0f;
        if (peak != old_peak) {
            keep = Simd::first(Simd::exp2(Simd::set1(old_peak - peak)));
            peak_of(state, tile) = peak;
        }
        Vec sum = Simd::mul(Simd::load(sum_of(state, tile)), Simd::set1(keep));
        for (std::size_t v = 0; v < vectors; ++v) {
            const Vec weights =
                Simd::exp2(Simd::sub(Simd::load(scores + v * lanes), Simd::set1(peak)));
            sum = Simd::add(sum, weights);
            Simd::put_weights(work.weights + row * block_units, v * lanes, weights);
        }
        Simd::store(sum_of(state, tile), sum);
        return keep;
    }

    // A handful of rows over the packed block that begins at key `begin`.
    static void visit(const Tile &tile, const Work &work, std::size_t row, std::size_t rows,
                      std::size_t begin, float *states) {
        const std::size_t floats = state_floats(tile.v_dim);
        std::size_t low = block_keys, high = 0;
        for (std::size_t r = row; r < row + rows; ++r) {
            low = least(low, most(work.low[r], begin) - begin);
            high = most(high, most(work.high[r], begin) - begin);
        }
        high = least(high, block_keys);
        if (low >= high) return;
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        const std::size_t vectors = (high + lanes - 1) / lanes;
        product(rows, vectors, work.query + row * units, units, work.keys, block_keys, work.scores,
                block_keys, units, nullptr);
        float keep[Simd::most_rows];
        for (std::size_t r = 0; r < rows; ++r) {
            const auto first = static_cast<std::ptrdiff_t>(work.low[row + r]) -
                               static_cast<std::ptrdiff_t>(begin);
            const auto last = static_cast<std::ptrdiff_t>(work.high[row + r]) -
                              static_cast<std::ptrdiff_t>(begin);
            keep[r] = soften(tile, work, r, states + (row + r) * floats, vectors, first, last);
        }
        product(rows, tile.v_dim / lanes, work.weights, block_units, work.values, tile.v_dim,
                states + row * floats, floats, (high + Simd::per_unit - 1) / Simd::per_unit, keep);
    }

    static const std::uint8_t *row_at(const std::uint8_t *base, std::ptrdiff_t slot_bytes,
                                      const Tile &tile, std::size_t key, KeyRange real) {
        if (key < real.begin || key >= real.end) return zero_row;
        return base + slot_bytes * tile.slots[key];
    }

    // Keys and values of the block that begins at `begin`; those outside `real` are zeros.
    static void pack(const Tile &tile, const Work &work, std::size_t begin, KeyRange real) {
        const std::size_t count = real.end - begin;
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        for (std::size_t k = 0; k < count; k += lanes) {
            const std::uint8_t *rows[lanes];
            for (std::size_t i = 0; i < lanes; ++i) {
                rows[i] = row_at(tile.key, tile.key_slot, tile, begin + k + i, real);
            }
            Simd::pack_keys(rows, units, work.keys + k);
        }
        for (std::size_t k = 0; k < count; k += Simd::per_unit) {
            const std::uint8_t *rows[Simd::per_unit];
            for (std::size_t i = 0; i < Simd::per_unit; ++i) {
                rows[i] = row_at(tile.value, tile.value_slot, tile, begin + k + i, real);
            }
            Simd::pack_values(rows, tile.v_dim, work.values + k / Simd::per_unit * tile.v_dim);
        }
    }

    static void prepare(const Tile &tile, Work &work, void *scratch) {
        const std::size_t rows = tile.positions * tile.group;
        lay_out(work, static_cast<std::uint8_t *>(scratch), rows, tile.qk_dim, tile.v_dim);
        const bool capped = tile.softcap != 0.0f;
        work.query_factor = capped ? tile.scale / tile.softcap : tile.scale * log2_e;
        work.cap_factor = tile.softcap * log2_e;
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        for (std::size_t row = 0; row < rows; ++row) {
            const auto token = static_cast<std::ptrdiff_t>(row / tile.group);
            const auto head = static_cast<std::ptrdiff_t>(row % tile.group);
            Simd::read_units(tile.query + token * tile.query_token + head * tile.query_head,
                             units, work.query + row * units);
            const std::size_t position = tile.first_position + row / tile.group;
            const std::size_t low = position > tile.window ? position - tile.window : 0;
            work.low[row] = static_cast<std::uint32_t>(tile.causal ? low : 0);
            work.high[row] = static_cast<std::uint32_t>(tile.causal ? position + 1 : tile.length);
        }
    }

    static void forget(const Tile &tile, float *states) {
        const std::size_t floats = state_floats(tile.v_dim);
        for (std::size_t row = 0; row < tile.positions * tile.group; ++row) {
            float *state = states + row * floats;
            for (std::size_t i = 0; i < floats; ++i) state[i] = 0.0f;
            peak_of(state, tile) = nothing_seen;
        }
    }

    static void attend(const Tile &tile, KeyRange keys, void *scratch, float *states) {
        Work work;
        prepare(tile, work, scratch);
        const std::size_t rows = tile.positions * tile.group;
        const KeyRange real{most(keys.begin, work.low[0]), least(keys.end, work.high[rows - 1])};
        forget(tile, states);
        float *now = states;
        for (std::size_t begin = real.begin / block_keys * block_keys; begin < real.end;
             begin += block_keys) {
            if (begin > real.begin && begin % segment_keys == 0) {
                if (now != states) fold(tile, states, now);
                now = work.states;
                forget(tile, now);
            }
            pack(tile, work, begin, {real.begin, least(real.end, begin + block_keys)});
            for (std::size_t row = 0; row < rows; row += Simd::most_rows) {
                visit(tile, work, row, least(rows - row, Simd::most_rows), begin, now);
            }
        }
        if (now != states) fold(tile, states, now);
    }

    static void fold(const Tile &tile, float *states, const float *later) {
        const std::size_t floats = state_floats(tile.v_dim);
        for (std::size_t row = 0; row < tile.positions * tile.group; ++row) {
            float *a = states + row * floats;
            const float *b = later + row * floats;
            const float peak_a = peak_of(a, tile), peak_b = b[tile.v_dim + lanes];
            const float peak = peak_a > peak_b ? peak_a : peak_b;
            const Vec of_a = Simd::exp2(Simd::set1(peak_a - peak));
            const Vec of_b = Simd::exp2(Simd::set1(peak_b - peak));
            // Out and the sum lie side by side.
            for (std::size_t i = 0; i < tile.v_dim + lanes; i += lanes) {
                Simd::store(a + i, Simd::add(Simd::mul(Simd::load(a + i), of_a),
                                             Simd::mul(Simd::load(b + i), of_b)));
            }
            peak_of(a, tile) = peak;
        }
    }

    static void finish(const Tile &tile, const float *states) {
        const std::size_t floats = state_floats(tile.v_dim);
        for (std::size_t row = 0; row < tile.positions * tile.group; ++row) {
            const float *state = states + row * floats;
            const auto token = static_cast<std::ptrdiff_t>(row / tile.group);
            const auto head = static_cast<std::ptrdiff_t>(row % tile.group);
            const float sum = Simd::total(Simd::load(state + tile.v_dim));
            const Vec share = Simd::set1(sum == 0.0f ? 0.0f : 1.0f / sum);
            std::uint8_t *to = tile.out + token * tile.out_token + head * tile.out_head;
            for (std::size_t i = 0; i < tile.v_dim; i += lanes) {
                to = Simd::write(to, Simd::mul(Simd::load(state + i), share));
            }
            if (tile.lse != nullptr) {
                float *lse = tile.lse + token * tile.lse_token + head * tile.lse_head;
                *lse = sum == 0.0f ? -__builtin_inff()
                                   : state[tile.v_dim + lanes] * ln_2 + __builtin_logf(sum);
            }
        }
    }

    static constexpr AttentionKernel functions = {state_floats, scratch_bytes, attend, fold, finish};
};

}  // namespace
}  // namespace memserve
