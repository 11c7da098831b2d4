#include "memserve/linear.h"

#include <algorithm>
#include <string>

#include "checks.h"
#include "memserve/team.h"

namespace memserve {

namespace {

constexpr std::int64_t most_k = std::int64_t{1} << 24;
constexpr std::int64_t panel = 16;
constexpr std::int64_t bytes_per_task = std::int64_t{64} << 10;
constexpr int group = 4;  // rows of x that share one reading of a weight row

// Lowered by the compiler to whatever registers the function it is inlined into may use.
using Floats = float __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));
using HalfWords = std::uint16_t __attribute__((vector_size(32)));

MEMSERVE_INLINE void load(Floats &to, const float *from) { std::memcpy(&to, from, sizeof to); }

MEMSERVE_INLINE void load(Floats &to, const Bf16 *from) {
    HalfWords bits;
    std::memcpy(&bits, from, sizeof bits);
    const Words wide = __builtin_convertvector(bits, Words) << 16;
    std::memcpy(&to, &wide, sizeof to);
}

MEMSERVE_INLINE void load(Floats &to, const Fp16 *from) {
    float values[16];
    for (int lane = 0; lane < 16; ++lane) values[lane] = to_float(from[lane]);
    std::memcpy(&to, values, sizeof to);
}

template <typename T>
MEMSERVE_INLINE void load_some(Floats &to, const T *from, std::int64_t count) {
    float values[16] = {};
    for (std::int64_t lane = 0; lane < count; ++lane) values[lane] = to_float(from[lane]);
    std::memcpy(&to, values, sizeof to);
}

// `rows` products of one weight row: 32 lanes along k, then their sum in a fixed order.
template <typename T, int rows>
MEMSERVE_INLINE void dot(const T *x, std::int64_t x_stride, const T *weight, std::int64_t k,
                         float *sums) {
    Floats even[rows] = {}, odd[rows] = {}, a, b, w, v;
    std::int64_t at = 0;
    for (; at + 32 <= k; at += 32) {
        load(w, weight + at), load(v, weight + at + 16);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            load(a, x + i * x_stride + at), load(b, x + i * x_stride + at + 16);
            even[i] += a * w, odd[i] += b * v;
        }
    }
    for (; at < k; at += 16) {
        const std::int64_t count = std::min<std::int64_t>(16, k - at);
        load_some(w, weight + at, count);
        for (int i = 0; i < rows; ++i) {
            load_some(a, x + i * x_stride + at, count);
            even[i] += a * w;
        }
    }
    for (int i = 0; i < rows; ++i) {
        float lanes[16];
        const Floats both = even[i] + odd[i];
        std::memcpy(lanes, &both, sizeof lanes);
        for (int width = 8; width > 0; width /= 2) {
            for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
        }
        sums[i] = lanes[0];
    }
}

template <typename T>
MEMSERVE_INLINE void rows_of(const ThinWeight &weight, const ThinCall &call, std::int64_t first,
                             std::int64_t last) {
    const T *bias = static_cast<const T *>(weight.bias);
    for (std::int64_t j = first; j < last; ++j) {
        const T *row = static_cast<const T *>(weight.weight) + j * weight.stride;
        for (std::int64_t i = 0; i < call.rows; i += group) {
            const T *x = static_cast<const T *>(call.x) + i * call.x_stride;
            const std::int64_t count = std::min<std::int64_t>(group, call.rows - i);
            float sums[group];
            switch (count) {
                case 1: dot<T, 1>(x, call.x_stride, row, weight.k, sums); break;
                case 2: dot<T, 2>(x, call.x_stride, row, weight.k, sums); break;
                case 3: dot<T, 3>(x, call.x_stride, row, weight.k, sums); break;
                default: dot<T, group>(x, call.x_stride, row, weight.k, sums);
            }
            T *out = static_cast<T *>(call.out) + i * call.out_stride + j;
            for (std::int64_t each = 0; each < count; ++each) {
                const float sum = bias == nullptr ? sums[each] : sums[each] + to_float(bias[j]);
                out[each * call.out_stride] = from_float<T>(sum);
            }
        }
    }
}

MEMSERVE_INLINE void rows_body(const ThinWeight &weight, const ThinCall &call, std::int64_t first,
                               std::int64_t last) {
    switch (weight.dtype) {
        case Dtype::bf16: return rows_of<Bf16>(weight, call, first, last);
        case Dtype::fp16: return rows_of<Fp16>(weight, call, first, last);
        case Dtype::fp32: return rows_of<float>(weight, call, first, last);
    }
}

MEMSERVE_LEVELS(rows, (const ThinWeight &weight, const ThinCall &call, std::int64_t first,
                       std::int64_t last), (weight, call, first, last))

template <typename Work>
void over_outputs(const ThinWeight &weight, unsigned threads, const Work &work) {
    const std::int64_t panel_bytes = panel * weight.k * static_cast<std::int64_t>(bytes_of(weight.dtype));
    const std::int64_t panels = (weight.n + panel - 1) / panel;
    std::int64_t step = std::max<std::int64_t>(1, bytes_per_task / panel_bytes);
    if (threads == 1) step = panels;
    const auto tasks = static_cast<std::size_t>((panels + step - 1) / step);
    run(threads, tasks, [&](std::size_t task) {
        const std::int64_t first = static_cast<std::int64_t>(task) * step * panel;
        work(first, std::min(weight.n, first + step * panel));
    });
}

}  // namespace

void check_weight(const ThinWeight &weight) {
    if (weight.n <= 0 || weight.k <= 0 || weight.n > most_elements || weight.k > most_k) {
        refuse("weights of " + std::to_string(weight.n) + " x " + std::to_string(weight.k));
    }
    check_rows("weight", weight.weight, weight.n, weight.k, weight.stride, weight.dtype);
    if (weight.bias != nullptr) check_rows("bias", weight.bias, 1, weight.n, weight.n, weight.dtype);
}

void check_call(const ThinWeight &weight, const ThinCall &call) {
    if (call.rows < 1 || call.rows > most_thin_rows) {
        refuse(std::to_string(call.rows) + " rows are not in 1.." + std::to_string(most_thin_rows));
    }
    check_rows("x", call.x, call.rows, weight.k, call.x_stride, weight.dtype);
    check_rows("out", call.out, call.rows, weight.n, call.out_stride, weight.dtype);
}

void thin_linear(const ThinWeight &weight, const ThinCall &call, unsigned threads) {
    const Isa level = isa();
#if defined(__x86_64__)
    if (level == Isa::avx512_bf16 && weight.dtype == Dtype::bf16) {
        const PackedX packed = pack_x(weight, call);
        return over_outputs(weight, threads, [&](std::int64_t first, std::int64_t last) {
            thin_panels_bf16(weight, call, packed, first, last);
        });
    }
#endif
    const auto rows = rows_for(level);
    over_outputs(weight, threads, [&](std::int64_t first, std::int64_t last) {
        rows(weight, call, first, last);
    });
}

}  // namespace memserve
