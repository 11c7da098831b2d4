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

#include "attention_product.h"
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

template <class Simd>
struct Kernel {
    using Vec = typename Simd::Vec;
    using Unit = typename Simd::Unit;
    static constexpr std::size_t lanes = Simd::lanes;
    static constexpr std::size_t block_units = block_keys / Simd::per_unit;
    static constexpr std::size_t block_vectors = block_keys / lanes;
    // Keys packed between two looks ahead.
    static constexpr std::size_t pack_keys = 16, packs_of_block = block_keys / pack_keys;

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
            reinterpret_cast<float *>(cut(at, 2 * Simd::most_rows * block_keys * sizeof(float)));
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

    // c * tanh(x / c) by e = exp(-2 |x / c|): (1 - e) / (1 + e) with the sign of x.
    static Vec capped(const Work &work, Vec scores) {
        const Vec x = Simd::mul(scores, Simd::set1(work.query_factor));
        const Vec e = Simd::exp2(Simd::mul(Simd::magnitude(x), Simd::set1(-2.0f * log2_e)));
        const Vec one = Simd::set1(1.0f);
        const Vec tanh = Simd::with_sign(Simd::div(Simd::sub(one, e), Simd::add(one, e)), x);
        return Simd::mul(tanh, Simd::set1(work.cap_factor));
    }

    // Some rows of the tile, and the keys that one of them sees of the block at `begin`.
    struct Handful {
        std::size_t row, rows, begin, keys;
        float *scores;
        std::size_t vectors() const { return (keys + lanes - 1) / lanes; }
    };

    // Bit k: whether a row sees key k of the block.
    static std::uint64_t keys_of_row(const Work &work, const Handful &some, std::size_t row) {
        const auto bits_below = [&](std::uint32_t key) {
            const std::size_t count = key > some.begin ? key - some.begin : 0;
            return count >= block_keys ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
        };
        return bits_below(work.high[some.row + row]) & ~bits_below(work.low[some.row + row]);
    }

    // The largest score of each row, as far as it sees them, before `factor`.
    template <bool whole>
    static void find_tops(const Tile &tile, const Work &work, const Handful &some, float *tops) {
        Vec top[Simd::most_rows];
        for (std::size_t r = 0; r < some.rows; ++r) {
            float *scores = some.scores + r * block_keys;
            const std::uint64_t keys = whole ? 0 : keys_of_row(work, some, r);
            top[r] = Simd::set1(masked);
            for (std::size_t v = 0; v < (whole ? block_vectors : some.vectors()); ++v) {
                Vec one = Simd::load(scores + v * lanes);
                if (!whole && tile.softcap != 0.0f) {
                    one = capped(work, one);
                    Simd::store(scores + v * lanes, one);
                }
                if (!whole) one = Simd::chosen(keys >> (v * lanes), one, masked);
                top[r] = Simd::max(top[r], one);
            }
        }
        Simd::largest(top, some.rows, tops);
    }

    // Scores to weights, and the rows' sums to what they become with these.
    template <bool whole>
    static void soften(const Work &work, const Handful &some, const float *peaks,
                       const float *keep, float factor, float *sums, std::size_t sums_row) {
        const Vec factors = Simd::set1(factor);
        for (std::size_t r = 0; r < some.rows; ++r) {
            const float *scores = some.scores + r * block_keys;
            Unit *weights = work.weights + r * block_units;
            const std::uint64_t keys = whole ? 0 : keys_of_row(work, some, r);
            const Vec below = Simd::set1(-peaks[r]);
            Vec sum = Simd::mul(Simd::load(sums + r * sums_row), Simd::set1(keep[r]));
            Vec last = sum;
            for (std::size_t v = 0; v < (whole ? block_vectors : some.vectors()); ++v) {
                Vec one =
                    Simd::exp2(Simd::mul_add(Simd::load(scores + v * lanes), factors, below));
                if (!whole) one = Simd::chosen(keys >> (v * lanes), one, 0.0f);
                sum = Simd::add(sum, one);
                if (!whole) {
                    Simd::put_weights(weights, v * lanes, one);
                } else if (v % 2 == 1) {
                    Simd::put_weights(weights, (v - 1) * lanes, last, one);
                }
                last = one;
            }
            Simd::store(sums + r * sums_row, sum);
        }
    }

    static void score(const Tile &tile, const Work &work, const Handful &some) {
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        Products<Simd>::product(some.rows, some.vectors(), work.query + some.row * units, units,
                                work.keys, block_keys, some.scores, block_keys, units, nullptr);
    }

    static void weigh(const Tile &tile, const Work &work, const Handful &some, float *states) {
        const std::size_t floats = state_floats(tile.v_dim);
        states += some.row * floats;
        bool whole = some.keys == block_keys && tile.softcap == 0.0f;
        for (std::size_t r = some.row; r < some.row + some.rows; ++r) {
            whole = whole && work.low[r] <= some.begin && work.high[r] >= some.begin + block_keys;
        }
        const float factor = tile.softcap != 0.0f ? 1.0f : work.query_factor;
        float peaks[rounded_up(Simd::most_rows, 16)], keep[Simd::most_rows];
        (whole ? find_tops<true> : find_tops<false>)(tile, work, some, peaks);
        for (std::size_t r = 0; r < some.rows; ++r) {
            float &peak = peak_of(states + r * floats, tile);
            const float old_peak = peak, top = peaks[r] * factor;
            peaks[r] = top > old_peak ? top : old_peak;
            // Most blocks have no new peak; multiplying by 1 is exact, so leaving it out is, too.
            keep[r] = 1.0f;
            if (peaks[r] != old_peak) {
                keep[r] = Simd::first(Simd::exp2(Simd::set1(old_peak - peaks[r])));
                peak = peaks[r];
            }
        }
        (whole ? soften<true> : soften<false>)(work, some, peaks, keep, factor,
                                               sum_of(states, tile), floats);
        const std::size_t steps = (some.keys + Simd::per_unit - 1) / Simd::per_unit;
        Products<Simd>::product(some.rows, tile.v_dim / lanes, work.weights, block_units,
                                work.values, tile.v_dim, states, floats, steps, keep);
    }

    // Of the block at `begin`, the keys up to the last that one of these rows sees; 0: they see none.
    static std::size_t keys_seen(const Work &work, std::size_t row, std::size_t rows,
                                 std::size_t begin) {
        std::size_t low = block_keys, high = 0;
        for (std::size_t r = row; r < row + rows; ++r) {
            low = least(low, most(work.low[r], begin) - begin);
            high = most(high, most(work.high[r], begin) - begin);
        }
        high = least(high, block_keys);
        return low < high ? high : 0;
    }

    // Asks memory for the rows of the next block, a few keys at a time while others are computed. All
    // heads of a token lie side by side, so each page of the pool is read from end to end.
    class Ahead {
      public:
        Ahead(const Tile &tile, KeyRange keys, std::size_t steps)
            : tile_(tile), keys_(keys), step_((keys.end - keys.begin + steps - 1) / steps) {}

        void fetch() {
            const std::size_t end = least(keys_.begin + step_, keys_.end);
            for (; keys_.begin < end; ++keys_.begin) {
                const std::int32_t slot = tile_.slots[keys_.begin];
                fetch_row(tile_.key + tile_.key_slot * slot, tile_.key_head, tile_.qk_dim);
                fetch_row(tile_.value + tile_.value_slot * slot, tile_.value_head, tile_.v_dim);
            }
        }

      private:
        void fetch_row(const std::uint8_t *row, std::ptrdiff_t head_bytes, std::size_t dim) const {
            constexpr std::size_t line = 64;
            const std::size_t bytes = static_cast<std::size_t>(head_bytes) * (tile_.heads - 1) +
                                      dim * Simd::element_bytes;
            for (std::size_t at = 0; at < bytes; at += line) __builtin_prefetch(row + at);
        }

        const Tile &tile_;
        KeyRange keys_;
        const std::size_t step_;
    };

    // Calls of `Ahead::fetch` in a block.
    static std::size_t steps_of_block(const Tile &tile) {
        const std::size_t handfuls = (tile.rows_of_head() + Simd::most_rows - 1) / Simd::most_rows;
        return tile.heads * (2 * packs_of_block + handfuls);
    }

    // The rows of one head over its packed block. The next scores are computed before the last ones
    // are used: what waits for a row's peak then has something to run beside.
    static void visit(const Tile &tile, const Work &work, std::size_t head, std::size_t begin,
                      Ahead &ahead, float *states) {
        const std::size_t end = (head + 1) * tile.rows_of_head();
        Handful last{};
        float *scores = work.scores, *free = work.scores + Simd::most_rows * block_keys;
        for (std::size_t row = end - tile.rows_of_head(); row < end; row += Simd::most_rows) {
            ahead.fetch();
            Handful some{row, least(end - row, Simd::most_rows), begin, 0, scores};
            some.keys = keys_seen(work, row, some.rows, begin);
            if (some.keys == 0) continue;
            score(tile, work, some);
            if (last.keys != 0) weigh(tile, work, last, states);
            last = some;
            float *const used = scores;
            scores = free;
            free = used;
        }
        if (last.keys != 0) weigh(tile, work, last, states);
    }

    static const std::uint8_t *row_at(const std::uint8_t *base, std::ptrdiff_t slot_bytes,
                                      const Tile &tile, std::size_t key, KeyRange real) {
        if (key < real.begin || key >= real.end) return zero_row;
        return base + slot_bytes * tile.slots[key];
    }

    // Keys and values of one head of the block that begins at `begin`; outside `real`, zeros.
    static void pack(const Tile &tile, const Work &work, std::size_t head, std::size_t begin,
                     KeyRange real, Ahead &ahead) {
        const std::size_t count = real.end - begin;
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        const auto which = static_cast<std::ptrdiff_t>(head);
        const std::uint8_t *key = tile.key + which * tile.key_head;
        const std::uint8_t *value = tile.value + which * tile.value_head;
        for (std::size_t k = 0; k < count; k += lanes) {
            if (k % pack_keys == 0) ahead.fetch();
            const std::uint8_t *rows[lanes];
            for (std::size_t i = 0; i < lanes; ++i) {
                rows[i] = row_at(key, tile.key_slot, tile, begin + k + i, real);
            }
            Simd::pack_keys(rows, units, work.keys + k);
        }
        for (std::size_t k = 0; k < count; k += Simd::per_unit) {
            if (k % pack_keys == 0) ahead.fetch();
            const std::uint8_t *rows[Simd::per_unit];
            for (std::size_t i = 0; i < Simd::per_unit; ++i) {
                rows[i] = row_at(value, tile.value_slot, tile, begin + k + i, real);
            }
            Simd::pack_values(rows, tile.v_dim, work.values + k / Simd::per_unit * tile.v_dim);
        }
    }

    struct Place {
        std::size_t position;
        std::ptrdiff_t token, head;  // of the tile's first
    };

    static Place place_of(const Tile &tile, std::size_t row) {
        const std::size_t position = row / tile.group % tile.positions;
        const std::size_t head = row / tile.rows_of_head() * tile.group + row % tile.group;
        return {position, static_cast<std::ptrdiff_t>(position), static_cast<std::ptrdiff_t>(head)};
    }

    static void prepare(const Tile &tile, Work &work, void *scratch) {
        lay_out(work, static_cast<std::uint8_t *>(scratch), tile.rows(), tile.qk_dim, tile.v_dim);
        work.query_factor =
            tile.softcap != 0.0f ? tile.scale / tile.softcap : tile.scale * log2_e;
        work.cap_factor = tile.softcap * log2_e;
        const std::size_t units = tile.qk_dim / Simd::per_unit;
        for (std::size_t row = 0; row < tile.rows(); ++row) {
            const Place place = place_of(tile, row);
            Simd::read_units(
                tile.query + place.token * tile.query_token + place.head * tile.query_head, units,
                work.query + row * units);
            const std::size_t position = tile.first_position + place.position;
            const std::size_t low = position > tile.window ? position - tile.window : 0;
            work.low[row] = static_cast<std::uint32_t>(tile.causal ? low : 0);
            work.high[row] = static_cast<std::uint32_t>(tile.causal ? position + 1 : tile.length);
        }
    }

    static void forget(const Tile &tile, float *states) {
        const std::size_t floats = state_floats(tile.v_dim);
        for (std::size_t row = 0; row < tile.rows(); ++row) {
            float *state = states + row * floats;
            for (std::size_t i = 0; i < floats; ++i) state[i] = 0.0f;
            peak_of(state, tile) = nothing_seen;
        }
    }

    static void attend(const Tile &tile, KeyRange keys, void *scratch, float *states) {
        Work work;
        prepare(tile, work, scratch);
        const KeyRange real{most(keys.begin, work.low[0]),
                            least(keys.end, work.high[tile.rows() - 1])};
        forget(tile, states);
        float *now = states;
        for (std::size_t begin = real.begin / block_keys * block_keys; begin < real.end;
             begin += block_keys) {
            if (begin > real.begin && begin % segment_keys == 0) {
                if (now != states) fold(tile, states, now);
                now = work.states;
                forget(tile, now);
            }
            const std::size_t end = least(real.end, begin + block_keys);
            Ahead ahead(tile, {end, least(real.end, end + block_keys)}, steps_of_block(tile));
            for (std::size_t head = 0; head < tile.heads; ++head) {
                pack(tile, work, head, begin, {real.begin, end}, ahead);
                visit(tile, work, head, begin, ahead, now);
            }
        }
        if (now != states) fold(tile, states, now);
    }

    static void fold(const Tile &tile, float *states, const float *later) {
        const std::size_t floats = state_floats(tile.v_dim);
        for (std::size_t row = 0; row < tile.rows(); ++row) {
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
        for (std::size_t row = 0; row < tile.rows(); ++row) {
            const float *state = states + row * floats;
            const Place place = place_of(tile, row);
            const float sum = Simd::total(Simd::load(state + tile.v_dim));
            const Vec share = Simd::set1(sum == 0.0f ? 0.0f : 1.0f / sum);
            std::uint8_t *to =
                tile.out + place.token * tile.out_token + place.head * tile.out_head;
            for (std::size_t i = 0; i < tile.v_dim; i += lanes) {
                to = Simd::write(to, Simd::mul(Simd::load(state + i), share));
            }
            if (tile.lse != nullptr) {
                float *lse = tile.lse + place.token * tile.lse_token + place.head;
                *lse = sum == 0.0f ? -__builtin_inff()
                                   : state[tile.v_dim + lanes] * ln_2 + __builtin_logf(sum);
            }
        }
    }

    static constexpr AttentionKernel functions = {state_floats, scratch_bytes, attend, fold, finish};
};

}  // namespace
}  // namespace memserve
