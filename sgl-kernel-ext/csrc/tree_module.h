#pragma once

#include <nanobind/nanobind.h>

// Adds `RadixTree` to the module.
void bind_radix_tree(nanobind::module_ &module);
