// Page moves: rows of several tensors, copied between memory of two different shapes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memserve {

// `tensors` tensors of bytes; row r of tensor t is the `row_bytes[t]` bytes at
// `pointers[t] + r * strides[t]`, for 0 <= r < rows[t].
struct RowTable {
    std::size_t tensors;
    const std::uint64_t *pointers;
    const std::int64_t *strides;
    const std::int64_t *row_bytes;
    const std::int64_t *rows;
};

// How the destination is written.
enum class Store {
    automatic,  // streaming where the whole copy is larger than caches are good for
    cached,
    streaming,  // past the caches
};

// What `copy_rows` is asked for: destination row `rows_to[i]` = source row `rows_from[i]`.
struct RowPairs {
    std::size_t count;
    const std::int64_t *rows_to;
    const std::int64_t *rows_from;
};

// Throws std::invalid_argument where tables do not fit each other, a row is named twice as a
// destination, or a table's memory wraps around; std::out_of_range where a row is beyond its limit.
void check_copy(const RowTable &to, const RowTable &from, const RowPairs &pairs);

// Copies what `check_copy` has accepted, with at most `threads` threads, the caller's included.
// The memory of the two tables must not overlap.
void copy_rows(const RowTable &to, const RowTable &from, const RowPairs &pairs, unsigned threads,
               Store store);

}  // namespace memserve
