#include "memserve/rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "memserve/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memserve {

namespace {

// A thread costs about 30 us to start: less than what it copies in that time is not worth one.
constexpr std::size_t bytes_worth_a_thread = std::size_t{1} << 20;
constexpr std::size_t bytes_per_task = std::size_t{256} << 10;

// `next` is where the row after this one will be read.
using CopyRow = void (*)(std::uint8_t *to, const std::uint8_t *from, std::size_t bytes,
                         const std::uint8_t *next);

void copy_row_cached(std::uint8_t *to, const std::uint8_t *from, std::size_t bytes,
                     const std::uint8_t *) {
    std::memcpy(to, from, bytes);
}

void fence_nothing() {}

#if defined(__x86_64__)

// Larger copies push everything else out of the second-level cache and are read back from memory
// anyway; below, the reader that follows finds them in the cache.
constexpr std::size_t streaming_from_bytes = std::size_t{1} << 20;
// Shorter rows are mostly head and tail, which are written through the cache.
constexpr std::size_t shortest_streamed_row = 512;

// Streaming stores want whole aligned lines: what comes before and after goes through the cache.
__attribute__((target("avx512f"))) void copy_row_avx512(std::uint8_t *to, const std::uint8_t *from,
                                                         std::size_t bytes,
                                                         const std::uint8_t *next) {
    const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64;
    if (bytes < shortest_streamed_row) {
        std::memcpy(to, from, bytes);
        return;
    }
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 256; to += 256, from += 256, next += 256, bytes -= 256) {
        for (int line = 0; line < 256; line += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(next + line), _MM_HINT_T0);
        }
        const __m512i a = _mm512_loadu_si512(from);
        const __m512i b = _mm512_loadu_si512(from + 64);
        const __m512i c = _mm512_loadu_si512(from + 128);
        const __m512i d = _mm512_loadu_si512(from + 192);
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), a);
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + 64), b);
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + 128), c);
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + 192), d);
    }
    std::memcpy(to, from, bytes);
}

__attribute__((target("avx2"))) void copy_row_avx2(std::uint8_t *to, const std::uint8_t *from,
                                                   std::size_t bytes,
                                                   const std::uint8_t *next) {
    const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64;
    if (bytes < shortest_streamed_row) {
        std::memcpy(to, from, bytes);
        return;
    }
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 128; to += 128, from += 128, next += 128, bytes -= 128) {
        _mm_prefetch(reinterpret_cast<const char *>(next), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char *>(next + 64), _MM_HINT_T0);
        const auto *source = reinterpret_cast<const __m256i *>(from);
        auto *target = reinterpret_cast<__m256i *>(to);
        const __m256i a = _mm256_loadu_si256(source);
        const __m256i b = _mm256_loadu_si256(source + 1);
        const __m256i c = _mm256_loadu_si256(source + 2);
        const __m256i d = _mm256_loadu_si256(source + 3);
        _mm256_stream_si256(target, a);
        _mm256_stream_si256(target + 1, b);
        _mm256_stream_si256(target + 2, c);
        _mm256_stream_si256(target + 3, d);
    }
    std::memcpy(to, from, bytes);
}

// Streaming stores are not ordered with anything before a fence.
void fence_stores() { _mm_sfence(); }

#endif

struct Copier {
    CopyRow row;
    void (*fence)();
};

Copier copier_for(Store store, std::size_t total_bytes) {
#if defined(__x86_64__)
    const bool stream =
        store == Store::streaming ||
        (store == Store::automatic && total_bytes >= streaming_from_bytes);
    if (stream && cpu_features().avx512) return {copy_row_avx512, fence_stores};
    if (stream && cpu_features().avx2) return {copy_row_avx2, fence_stores};
#else
    (void)store, (void)total_bytes;
#endif
    return {copy_row_cached, fence_nothing};
}

std::uint8_t *row_of(const RowTable &table, std::size_t tensor, std::int64_t row) {
    return reinterpret_cast<std::uint8_t *>(table.pointers[tensor]) + row * table.strides[tensor];
}

std::string text(const char *what, std::int64_t value, std::int64_t limit) {
    return std::string(what) + " " + std::to_string(value) + " is not in 0.." +
           std::to_string(limit - 1);
}

std::int64_t check_table(const char *side, const RowTable &table) {
    std::int64_t limit = INT64_MAX;
    for (std::size_t t = 0; t < table.tensors; ++t) {
        const std::string where = std::string(side) + " tensor " + std::to_string(t);
        if (table.rows[t] < 0 || table.row_bytes[t] <= 0 || table.strides[t] < table.row_bytes[t]) {
            throw std::invalid_argument(where + ": rows of " + std::to_string(table.row_bytes[t]) +
                                        " bytes, " + std::to_string(table.strides[t]) +
                                        " apart, " + std::to_string(table.rows[t]) + " of them");
        }
        std::int64_t span = 0;
        std::uint64_t end = 0;
        if (__builtin_mul_overflow(table.rows[t], table.strides[t], &span) ||
            __builtin_add_overflow(table.pointers[t], static_cast<std::uint64_t>(span), &end) ||
            (table.pointers[t] == 0 && span > 0)) {
            throw std::invalid_argument(where + ": its memory does not fit the address space");
        }
        limit = std::min(limit, table.rows[t]);
    }
    return limit;
}

void check_rows(const char *what, const std::int64_t *rows, std::size_t count,
                std::int64_t limit) {
    for (std::size_t i = 0; i < count; ++i) {
        if (rows[i] < 0 || rows[i] >= limit) throw std::out_of_range(text(what, rows[i], limit));
    }
}

void check_distinct(const std::int64_t *rows, std::size_t count) {
    const auto not_rising = [](std::int64_t a, std::int64_t b) { return a >= b; };
    if (std::adjacent_find(rows, rows + count, not_rising) == rows + count) return;
    std::vector<std::int64_t> sorted(rows, rows + count);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
        throw std::invalid_argument("destination row " + std::to_string(*twice) +
                                    " is named twice");
    }
}

}  // namespace

void check_copy(const RowTable &to, const RowTable &from, const RowPairs &pairs) {
    if (to.tensors != from.tensors ||
        !std::equal(to.row_bytes, to.row_bytes + to.tensors, from.row_bytes)) {
        throw std::invalid_argument("the two sides differ in tensors or in bytes of a row");
    }
    const std::int64_t limit_to = check_table("destination", to);
    const std::int64_t limit_from = check_table("source", from);
    check_rows("destination row", pairs.rows_to, pairs.count, limit_to);
    check_rows("source row", pairs.rows_from, pairs.count, limit_from);
    check_distinct(pairs.rows_to, pairs.count);
}

void copy_rows(const RowTable &to, const RowTable &from, const RowPairs &pairs, unsigned threads,
               Store store) {
    if (pairs.count == 0 || to.tensors == 0) return;
    std::size_t pair_bytes = 0;
    for (std::size_t t = 0; t < to.tensors; ++t) {
        pair_bytes += static_cast<std::size_t>(to.row_bytes[t]);
    }
    const std::size_t total_bytes = pair_bytes * pairs.count;
    const Copier copier = copier_for(store, total_bytes);
    // A task is a few pairs with all their tensors: the side whose tensors lie together (a block)
    // is walked in order.
    const std::size_t step = std::max<std::size_t>(1, bytes_per_task / pair_bytes);
    const std::size_t tasks = (pairs.count + step - 1) / step;
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t task = next++; task < tasks; task = next++) {
            const std::size_t stop = std::min(pairs.count, (task + 1) * step);
            for (std::size_t i = task * step; i < stop; ++i) {
                const std::int64_t row_to = pairs.rows_to[i];
                const std::int64_t row_from = pairs.rows_from[i];
                for (std::size_t t = 0; t < to.tensors; ++t) {
                    const bool last = t + 1 == to.tensors;
                    const std::int64_t row_next = pairs.rows_from[last ? std::min(i + 1, stop - 1) : i];
                    copier.row(row_of(to, t, row_to), row_of(from, t, row_from),
                               static_cast<std::size_t>(to.row_bytes[t]),
                               row_of(from, last ? 0 : t + 1, row_next));
                }
            }
        }
        copier.fence();
    };
    const std::size_t useful = std::min(tasks, total_bytes / bytes_worth_a_thread);
    std::vector<std::thread> helpers;
    helpers.reserve(threads);
    for (std::size_t i = 1; i < std::min<std::size_t>(threads, useful); ++i) {
        try {
            helpers.emplace_back(work);
        } catch (const std::system_error &) {
            break;  // the machine gives no more threads: those that run do the work
        }
    }
    work();
    for (std::thread &helper : helpers) helper.join();
}

}  // namespace memserve
