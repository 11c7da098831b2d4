// Paged attention: rows of new tokens over keys and values that lie in a pool, slot by slot.
//
// A plan says which slots each request's tokens lie in; it is made once a forward pass and serves all
// layers. `PagedAttention` is what one layer keeps: its pool and its constants. What a row gets depends
// on its own position and on the keys and values it sees, bit for bit: not on what is computed beside
// it, by how many threads, or on how much of its sequence was computed before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memserve/bf16.h"

namespace memserve {

// Signed integers of 4 or 8 bytes.
struct Integers {
    std::uint64_t address;
    std::size_t itemsize;
    std::size_t count;

    // Throws std::invalid_argument.
    void check() const;
    std::int64_t at(std::size_t index) const;
};

// SGLang's `req_to_token`: row r holds the slots of request r's tokens, by position.
struct SlotTable {
    std::uint64_t address;
    std::size_t itemsize;
    std::size_t rows, columns;
    std::size_t stride;  // of rows, in integers
};

class AttentionPlan {
  public:
    struct Request {
        std::size_t first_row, rows;    // of the batch: this pass's new tokens
        std::size_t first_slot, length; // of `slots`: all tokens, the new ones last
    };
    struct Range {
        std::int64_t least, most;  // least > most: nothing
    };

    // Request i is row `requests[i]` of the table, with `lengths[i]` tokens, of which `rows[i]` are
    // new. `written`: the slots of all new tokens, in order; empty where none are written.
    // Throws std::out_of_range for a request or length beyond the table, std::invalid_argument for
    // sizes that cannot be.
    AttentionPlan(const SlotTable &table, const std::vector<std::int64_t> &requests,
                  const std::vector<std::int64_t> &lengths, const std::vector<std::int64_t> &rows,
                  const Integers &written);

    // The same with `map[slot]` for each slot: for a pool with slots of its own. A slot below 0 stays
    // -1; throws std::out_of_range for one beyond the map.
    AttentionPlan translated(const Integers &map) const;

    // Of all slots that rows read which see themselves and `window` tokens before; or of all slots.
    Range read(bool causal, std::size_t window);
    Range written_range() const { return written_range_; }

    const std::vector<Request> &requests() const { return requests_; }
    const std::vector<std::int32_t> &slots() const { return slots_; }
    const std::vector<std::int32_t> &written() const { return written_; }
    std::size_t rows() const { return rows_; }
    // Whether each request has as many tokens as rows: what causal attention wants.
    bool rows_are_tokens() const { return rows_are_tokens_; }

  private:
    AttentionPlan() = default;

    std::vector<Request> requests_;
    std::vector<std::int32_t> slots_, written_;
    std::size_t rows_ = 0;
    bool rows_are_tokens_ = true;
    Range written_range_{0, -1};
    // What `read` has found, by window. Models have one or two of them.
    std::vector<std::pair<std::size_t, Range>> ranges_;
};

constexpr std::size_t no_window = SIZE_MAX;

// Elements of `dtype`, a slot (or token) and head at a time: element i of head h of slot s lies at
// `address + (s * slot_stride + h * head_stride + i)` times the bytes of one.
struct Pool {
    std::uint64_t address;
    std::int64_t slot_stride, head_stride;
};

// What a call reads and writes besides the pool. Strides are of tokens, in elements; heads lie side by
// side. All addresses are aligned to their elements.
struct AttentionCall {
    std::uint64_t query;  // [rows, q_heads, qk_dim]
    std::int64_t query_stride;
    std::uint64_t key, value;  // [rows, kv_heads, ...] to be written to the pool; 0: nothing is
    std::int64_t key_stride, value_stride;
    std::uint64_t out;  // [rows, q_heads, v_dim]
    std::int64_t out_stride;
    std::uint64_t lse;  // fp32 [rows, q_heads], natural logarithm; 0: not wanted
    unsigned threads;
};

struct PagedAttention {
    Pool key, value;
    std::size_t slots;  // of both pools
    std::size_t q_heads, kv_heads, qk_dim, v_dim;
    Dtype dtype;
    float scale, softcap;  // softcap 0: none
    std::size_t window;    // tokens before its own that a row sees
    bool causal;           // else each row sees all of its request's tokens

    // Throws std::invalid_argument for what cannot be or is not supported.
    void check() const;

    // Writes the new rows to the pool, then attends. Throws std::out_of_range for slots beyond the
    // pool and std::invalid_argument for a plan or addresses that do not fit; nothing is read or
    // written then.
    void check_call(AttentionPlan &plan, const AttentionCall &call) const;
    // After `check_call` has accepted it.
    void attend(const AttentionPlan &plan, const AttentionCall &call) const;
};

// Two attentions of the same rows over different keys, each `out` [rows, dim] with `lse` [rows], to the
// attention over all of them. Everything lies side by side; results may lie over inputs.
struct MergeCall {
    std::uint64_t out_a, lse_a, out_b, lse_b, out, lse;
    std::size_t rows, dim;
    Dtype dtype;
};

// Throws std::invalid_argument for addresses that cannot be.
void check_merge(const MergeCall &call);
void merge_state(const MergeCall &call);

}  // namespace memserve
