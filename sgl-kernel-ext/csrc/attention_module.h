#pragma once

#include <nanobind/nanobind.h>

// Adds `AttentionPlan`, `PagedAttention` and `merge_state` to the module.
void bind_attention(nanobind::module_ &module);
