// What the engine's ops ask of sizes, strides and addresses.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "memserve/bf16.h"

namespace memserve {

constexpr std::int64_t most_elements = std::int64_t{1} << 40;

[[noreturn]] inline void refuse(const std::string &why) { throw std::invalid_argument(why); }

inline void check_address(const char *what, const void *address, std::size_t alignment) {
    const auto number = reinterpret_cast<std::uintptr_t>(address);
    if (number == 0 || number % alignment != 0) {
        refuse(std::string(what) + " at " + std::to_string(number) +
               ": an address is positive and aligned to " + std::to_string(alignment) + " bytes");
    }
}

// `rows` rows of `width` elements, `stride` apart.
inline void check_rows(const char *what, const void *address, std::int64_t rows, std::int64_t width,
                       std::int64_t stride, Dtype dtype) {
    if (rows < 0 || stride < 0 || (rows > 0 && stride > most_elements / rows) ||
        (rows > 1 && stride < width)) {
        refuse(std::string(what) + ": " + std::to_string(rows) + " rows of " +
               std::to_string(width) + " elements, " + std::to_string(stride) + " apart");
    }
    if (rows > 0) check_address(what, address, bytes_of(dtype));
}

inline void check_size(const char *what, std::int64_t size, std::int64_t most) {
    if (size <= 0 || size > most) {
        refuse(std::string(what) + " " + std::to_string(size) + " is not in 1.." +
               std::to_string(most));
    }
}

// `count` numbers in 0 .. limit - 1, or std::out_of_range.
inline void check_indices(const char *what, const std::int64_t *numbers, std::int64_t count,
                          std::int64_t limit) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (numbers[i] < 0 || numbers[i] >= limit) {
            throw std::out_of_range(std::string(what) + " " + std::to_string(numbers[i]) +
                                    " is not in 0.." + std::to_string(limit - 1));
        }
    }
}

}  // namespace memserve
