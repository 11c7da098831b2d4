#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "memserve/elementwise.h"
#include "row_tasks.h"

namespace memserve {

namespace {

constexpr std::int64_t most_width = std::int64_t{1} << 24;

using Floats = float __attribute__((vector_size(64)));

constexpr std::int64_t lanes = 8, columns = 4, group = lanes * columns;
constexpr int levels = 4;

// Half as many bits as the number of groups has, but 4 at least: how many groups one level of sums
// takes before it is added to the next.
std::int64_t level_bits(std::int64_t groups) {
    std::int64_t bits = 0;
    while ((std::int64_t{1} << bits) < groups) ++bits;
    return std::max<std::int64_t>(4, bits / levels);
}

struct Sums {
    Floats half[2];  // [columns][lanes]
};

MEMSERVE_INLINE void add_squares(Sums &to, const float *from) {
    Floats values[2];
    std::memcpy(values, from, sizeof values);
    to.half[0] += values[0] * values[0], to.half[1] += values[1] * values[1];
}

// Squares of `groups` whole groups, column by column, in a cascade of levels.
MEMSERVE_INLINE void cascade(const float *values, std::int64_t groups, float *sums) {
    Sums level[levels] = {};
    const std::int64_t bits = level_bits(groups), step = std::int64_t{1} << bits;
    std::int64_t done = 0;
    while (done + step <= groups) {
        for (std::int64_t i = 0; i < step; ++i, ++done) {
            add_squares(level[0], values + done * group);
        }
        for (int up = 1; up < levels; ++up) {
            for (int half = 0; half < 2; ++half) {
                level[up].half[half] += level[up - 1].half[half];
                level[up - 1].half[half] = Floats{};
            }
            if ((done & ((step - 1) << (up * bits))) != 0) break;
        }
    }
    for (; done < groups; ++done) add_squares(level[0], values + done * group);
    for (int up = 1; up < levels; ++up) {
        for (int half = 0; half < 2; ++half) level[0].half[half] += level[up].half[half];
    }
    std::memcpy(sums, level[0].half, sizeof level[0].half);
}

MEMSERVE_INLINE float sum_of_few(const float *values, std::int64_t count) {
    float sums[columns] = {};
    for (std::int64_t i = 0; i < count; ++i) {
        sums[i < count / columns * columns ? i % columns : 0] += values[i] * values[i];
    }
    return ((sums[0] + sums[1]) + sums[2]) + sums[3];
}

MEMSERVE_INLINE float sum_of_squares(const float *values, std::int64_t count) {
    if (count < lanes) return sum_of_few(values, count);
    float sums[group];
    const std::int64_t vectors = count / lanes, groups = vectors / columns;
    cascade(values, groups, sums);
    for (std::int64_t i = groups * columns; i < vectors; ++i) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            const float value = values[i * lanes + lane];
            sums[lane] += value * value;
        }
    }
    for (std::int64_t column = 1; column < columns; ++column) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            sums[lane] += sums[column * lanes + lane];
        }
    }
    float sum = 0;
    for (std::int64_t i = vectors * lanes; i < count; ++i) sum += values[i] * values[i];
    for (std::int64_t lane = 0; lane < lanes; ++lane) sum += sums[lane];
    return sum;
}

template <typename T, typename W>
struct Row {
    const T *x;
    T *residual;
    T *out;
    const W *weight;
    float *values;  // scratch
};

template <typename T, typename W>
MEMSERVE_INLINE void gather(const Row<T, W> &row, std::int64_t width, NormForm form) {
    if (row.residual == nullptr) {
        for (std::int64_t i = 0; i < width; ++i) row.values[i] = to_float(row.x[i]);
    } else if (form == NormForm::gemma) {
        for (std::int64_t i = 0; i < width; ++i) {
            row.residual[i] = narrow<T>(to_float(row.x[i]) + to_float(row.residual[i]));
            row.values[i] = to_float(row.residual[i]);
        }
    } else {
        for (std::int64_t i = 0; i < width; ++i) {
            row.values[i] = to_float(row.x[i]) + to_float(row.residual[i]);
            row.residual[i] = narrow<T>(row.values[i]);
        }
    }
}

template <typename T, typename W>
MEMSERVE_INLINE void scale(const Row<T, W> &row, std::int64_t width, NormForm form, float by) {
    switch (form) {
        case NormForm::plain:
            for (std::int64_t i = 0; i < width; ++i) {
                row.out[i] = narrow<T>(row.values[i] * by * to_float(row.weight[i]));
            }
            return;
        case NormForm::gemma:
            for (std::int64_t i = 0; i < width; ++i) {
                const float weight = 1.0f + to_float(row.weight[i]);
                row.out[i] = narrow<T>(row.values[i] * by * weight);
            }
            return;
        case NormForm::cast_first:
            for (std::int64_t i = 0; i < width; ++i) {
                const float normed = rounded<T>(row.values[i] * by);
                row.out[i] = narrow<T>(normed * to_float(row.weight[i]));
            }
    }
}

template <typename T, typename W>
MEMSERVE_INLINE void norm_rows(const Norm &norm, const NormCall &call, std::int64_t first,
                               std::int64_t last, float *values) {
    for (std::int64_t i = first; i < last; ++i) {
        T *residual = static_cast<T *>(call.residual);
        const Row<T, W> row{static_cast<const T *>(call.x) + i * call.x_stride,
                            residual == nullptr ? nullptr : residual + i * call.residual_stride,
                            static_cast<T *>(call.out) + i * call.out_stride,
                            static_cast<const W *>(norm.weight), values};
        gather(row, norm.width, norm.form);
        const float mean = sum_of_squares(values, norm.width) / static_cast<float>(norm.width);
        scale(row, norm.width, norm.form, 1.0f / std::sqrt(mean + norm.eps));
    }
}

MEMSERVE_INLINE void norm_body(const Norm &norm, const NormCall &call, std::int64_t first,
                               std::int64_t last, float *values) {
    const bool wide = norm.weight_dtype == Dtype::fp32;
    switch (norm.dtype) {
        case Dtype::bf16:
            return wide ? norm_rows<Bf16, float>(norm, call, first, last, values)
                        : norm_rows<Bf16, Bf16>(norm, call, first, last, values);
        case Dtype::fp16:
            return wide ? norm_rows<Fp16, float>(norm, call, first, last, values)
                        : norm_rows<Fp16, Fp16>(norm, call, first, last, values);
        case Dtype::fp32: return norm_rows<float, float>(norm, call, first, last, values);
    }
}

MEMSERVE_LEVELS(norm, (const Norm &norm, const NormCall &call, std::int64_t first,
                       std::int64_t last, float *values), (norm, call, first, last, values))

}  // namespace

void check_norm(const Norm &norm) {
    check_size("norm: width", norm.width, most_width);
    check_rows("norm: weight", norm.weight, 1, norm.width, norm.width, norm.weight_dtype);
    if (norm.weight_dtype != norm.dtype && norm.weight_dtype != Dtype::fp32) {
        refuse("norm: a weight is of the activations' dtype or fp32");
    }
    if (!(norm.eps >= 0.0f) || std::isinf(norm.eps)) refuse("norm: eps must not be negative");
}

void check_call(const Norm &norm, const NormCall &call) {
    check_rows("norm: x", call.x, call.rows, norm.width, call.x_stride, norm.dtype);
    check_rows("norm: out", call.out, call.rows, norm.width, call.out_stride, norm.dtype);
    if (call.residual != nullptr) {
        check_rows("norm: residual", call.residual, call.rows, norm.width, call.residual_stride,
                   norm.dtype);
    }
}

void rms_norm(const Norm &norm, const NormCall &call, unsigned threads) {
    const auto rows = norm_for(isa());
    over_rows(threads, call.rows, norm.width, [&](std::int64_t first, std::int64_t last) {
        thread_local std::vector<float> values;
        if (values.size() < static_cast<std::size_t>(norm.width)) {
            values.resize(static_cast<std::size_t>(norm.width));
        }
        rows(norm, call, first, last, values.data());
    });
}

}  // namespace memserve
