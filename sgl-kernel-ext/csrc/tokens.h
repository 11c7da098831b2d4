// Token ids out of Python objects.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

// The ids of a list, a tuple, or a one-dimensional buffer of 32- or 64-bit integers, as `array.array`
// and numpy have them; of any other sequence too, more slowly. Raises ValueError for an id outside
// 0 .. 2**32 - 1 and for what is no integer. Needs the GIL.
std::vector<std::uint32_t> token_ids(nanobind::handle tokens);
