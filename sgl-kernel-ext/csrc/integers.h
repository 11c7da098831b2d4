// Whole numbers out of Python objects.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

// Both take a list, a tuple, or a one-dimensional buffer of 32- or 64-bit integers, as `array.array`
// and numpy have them; any other sequence too, more slowly. They need the GIL, and raise ValueError
// for what is no integer or does not fit.

// In 0 .. 2**32 - 1.
std::vector<std::uint32_t> token_ids(nanobind::handle tokens);
// In -2**63 .. 2**63 - 1.
std::vector<std::int64_t> page_keys_of(nanobind::handle keys);
