// What one instruction set's attention is asked to do, as plain data: the files that are compiled for
// more than the building machine's baseline include this and no standard containers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memserve/bf16.h"

namespace memserve {

// Keys are taken in blocks, and blocks in segments, both counted from position 0 of the sequence: what
// a row computes then depends on its own position alone. Segments are what threads may share; their
// results are folded together in order, whoever computed them.
constexpr std::size_t block_keys = 64;
constexpr std::size_t segment_keys = 512;

// Query rows of one tile share the packed keys and values of a block.
constexpr std::size_t most_tile_rows = 192;
constexpr std::size_t most_head_dim = 512;
constexpr std::size_t most_group = 192;

// `positions` consecutive tokens of a request with `heads` consecutive K/V heads and, for each of these,
// the `group` query heads that share it. Rows are numbered in the order (head, position, query head).
// Strides are in bytes, those of `lse` in floats.
struct Tile {
    const std::uint8_t *query;  // first token, first query head
    std::ptrdiff_t query_token, query_head;
    const std::uint8_t *key, *value;  // slot 0, first K/V head
    std::ptrdiff_t key_slot, key_head, value_slot, value_head;
    const std::int32_t *slots;  // of the request, by position
    std::uint8_t *out;          // as query
    std::ptrdiff_t out_token, out_head;
    float *lse;  // null where it is not wanted
    std::ptrdiff_t lse_token;
    std::size_t positions, heads, group;
    std::size_t first_position;  // of the first token, in the sequence
    std::size_t length;          // of the sequence
    std::size_t window;          // keys before its own that a row sees
    bool causal;                 // else every row sees the whole sequence, and there is no window
    std::size_t qk_dim, v_dim;
    float scale, softcap;  // softcap 0: none

    std::size_t rows_of_head() const { return positions * group; }
    std::size_t rows() const { return heads * positions * group; }
};

// Half-open range of keys, both ends multiples of `segment_keys` or the sequence's own ends.
struct KeyRange {
    std::size_t begin, end;
};

// One instruction set and dtype. A state is what is known of one row after some segments; its floats
// are the kernel's own business, 64-byte aligned.
struct AttentionKernel {
    std::size_t (*state_floats)(std::size_t v_dim);
    // Bytes of working memory for tiles of up to so many rows.
    std::size_t (*scratch_bytes)(std::size_t rows, std::size_t qk_dim, std::size_t v_dim);
    // Attends to `keys`; leaves one state a row in `states`.
    void (*attend)(const Tile &tile, KeyRange keys, void *scratch, float *states);
    // states[row] = states[row] and `later[row]` together.
    void (*fold)(const Tile &tile, float *states, const float *later);
    // Writes `out` and `lse`.
    void (*finish)(const Tile &tile, const float *states);
};

// Null where this build has none. The pair kernel computes with pairs of bf16.
const AttentionKernel *attention_plain(Dtype dtype);
const AttentionKernel *attention_avx2(Dtype dtype);
const AttentionKernel *attention_avx512(Dtype dtype);
const AttentionKernel *attention_avx512_bf16(Dtype dtype);

}  // namespace memserve
