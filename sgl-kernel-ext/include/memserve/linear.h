// Thin linear layers: out[m, n] = x[m, k] . weight[n, k]^T (+ bias), for few rows of x: up to 16,
// where reading the weights is what costs, and up to 128, where libraries that pack the weights for
// each call still lose more by that than they gain. The weights are read in place, as torch keeps
// them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memserve/bf16.h"

namespace memserve {

constexpr std::int64_t most_thin_rows = 128;

// Row j of the weights starts at `weight + j * stride` elements; `bias` is nullptr or n elements.
struct ThinWeight {
    const void *weight;
    const void *bias;
    std::int64_t n;
    std::int64_t k;
    std::int64_t stride;
    Dtype dtype;
};

// Strides in elements, from row to row. All of the weight's dtype.
struct ThinCall {
    const void *x;
    std::int64_t rows;
    std::int64_t x_stride;
    void *out;
    std::int64_t out_stride;
};

// Throw std::invalid_argument for what cannot be.
void check_weight(const ThinWeight &weight);
void check_call(const ThinWeight &weight, const ThinCall &call);

// An output is the same whatever the number of rows and threads.
//
// bf16 where the processor has AVX512-BF16: sums are taken in the order of oneDNN's products for
// these processors, so the bits are those of torch's linear for 2 and more rows: within a block of
// 1,024 of k (512 where k <= 1024) one fp32 accumulator takes pairs in rising order; the blocks'
// sums are added in rising order; then the bias; one rounding.
// Elsewhere: fp32 sums in 32 lanes, the same on every processor.
//
// Memory of `out` must not overlap the others. Takes what the two checks have accepted.
void thin_linear(const ThinWeight &weight, const ThinCall &call, unsigned threads);

#if defined(__x86_64__)
// Weight rows [first, last) of a bf16 layer, for `Isa::avx512_bf16`. `packed` is what `pack_x` made
// of the call's rows.
struct PackedX {
    const std::uint8_t *memory;
    std::int64_t stride_bytes;  // from row to row, or from block to block
    std::int64_t blocks;        // of 16 rows, transposed; 0: rows as they are
};
PackedX pack_x(const ThinWeight &weight, const ThinCall &call);
void thin_panels_bf16(const ThinWeight &weight, const ThinCall &call, const PackedX &packed,
                      std::int64_t first, std::int64_t last);
#endif

}  // namespace memserve
