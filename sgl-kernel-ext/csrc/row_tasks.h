#pragma once

#include <algorithm>
#include <cstdint>

#include "memserve/team.h"

namespace memserve {

// Fewer elements than these are done sooner than a helper has begun.
constexpr std::int64_t elements_per_task = std::int64_t{8} << 10;

// Calls `work(first, last)` over parts of the rows, each of about `elements_per_task` or more.
template <typename Work>
void over_rows(unsigned threads, std::int64_t rows, std::int64_t width, const Work &work) {
    if (rows == 0) return;
    const std::int64_t least = std::max<std::int64_t>(1, elements_per_task / width);
    const std::int64_t even = (rows + threads * 4 - 1) / (threads * 4);
    const std::int64_t step = threads == 1 ? rows : std::max(least, even);
    run(threads, static_cast<std::size_t>((rows + step - 1) / step), [&](std::size_t task) {
        const std::int64_t first = static_cast<std::int64_t>(task) * step;
        work(first, std::min(rows, first + step));
    });
}

}  // namespace memserve
