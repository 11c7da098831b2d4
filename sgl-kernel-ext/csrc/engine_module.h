#pragma once

#include <nanobind/nanobind.h>

// Adds the engine's ops to the module.
void bind_engine(nanobind::module_ &module);
