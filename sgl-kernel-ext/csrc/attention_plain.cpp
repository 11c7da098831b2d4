// Attention in plain C++: any processor. Loops over a few floats that compilers make vectors of.
#include <cmath>

#include "attention_kernel.h"

namespace memserve {
namespace {

template <class T>
struct PlainFloats {
    static constexpr std::size_t lanes = 4, per_unit = 1, most_rows = 2, most_vectors = 2;
    struct Vec {
        float lane[lanes];
    };
    using Unit = float;
    using Units = Vec;

    template <class Function>
    static Vec each(const Function &function) {
        Vec result;
        for (std::size_t i = 0; i < lanes; ++i) result.lane[i] = function(i);
        return result;
    }

    static Vec zero() { return set1(0.0f); }
    static Vec set1(float value) {
        return each([&](std::size_t) { return value; });
    }
    static Vec load(const float *from) {
        return each([&](std::size_t i) { return from[i]; });
    }
    static void store(float *to, Vec value) {
        for (std::size_t i = 0; i < lanes; ++i) to[i] = value.lane[i];
    }
    static Vec add(Vec a, Vec b) {
        return each([&](std::size_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Vec sub(Vec a, Vec b) {
        return each([&](std::size_t i) { return a.lane[i] - b.lane[i]; });
    }
    static Vec mul(Vec a, Vec b) {
        return each([&](std::size_t i) { return a.lane[i] * b.lane[i]; });
    }
    static Vec div(Vec a, Vec b) {
        return each([&](std::size_t i) { return a.lane[i] / b.lane[i]; });
    }
    static Vec max(Vec a, Vec b) {
        return each([&](std::size_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Vec magnitude(Vec a) {
        return each([&](std::size_t i) { return std::fabs(a.lane[i]); });
    }
    static Vec with_sign(Vec a, Vec sign) {
        return each([&](std::size_t i) { return std::copysign(a.lane[i], sign.lane[i]); });
    }
    static float first(Vec a) { return a.lane[0]; }
    static float largest(Vec a) {
        const float x = a.lane[0] > a.lane[1] ? a.lane[0] : a.lane[1];
        const float y = a.lane[2] > a.lane[3] ? a.lane[2] : a.lane[3];
        return x > y ? x : y;
    }
    static float total(Vec a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }

    static Vec within(Vec a, std::ptrdiff_t first, std::ptrdiff_t last) {
        return each([&](std::size_t i) {
            const auto lane = static_cast<std::ptrdiff_t>(i);
            return lane >= first && lane < last ? a.lane[i] : masked;
        });
    }

    static Vec exp2(Vec x) {
        return each([&](std::size_t i) {
            // Below the smallest normal number: 0. NaN stays.
            if (x.lane[i] < -126.0f) return 0.0f;
            const float whole = std::floor(x.lane[i] + 0.5f);
            const float rest = x.lane[i] - whole;
            float sum = 0.0f;
            for (const float factor : exp2_factors) sum = sum * rest + factor;
            return std::ldexp(sum, static_cast<int>(whole == whole ? whole : 0.0f));
        });
    }

    static Units load_units(const Unit *from) { return load(from); }
    static Units broadcast(const Unit *from) { return set1(*from); }
    static Vec dot(Vec sum, Units a, Units b) { return add(sum, mul(a, b)); }

    static void read_units(const std::uint8_t *row, std::size_t units, Unit *to) {
        for (std::size_t i = 0; i < units; ++i) {
            T value;
            std::memcpy(&value, row + i * sizeof(T), sizeof(T));
            to[i] = to_float(value);
        }
    }

    static void pack_keys(const std::uint8_t *const (&rows)[lanes], std::size_t units, Unit *to) {
        for (std::size_t i = 0; i < lanes; ++i) {
            for (std::size_t unit = 0; unit < units; ++unit) {
                read_units(rows[i] + unit * sizeof(T), 1, to + unit * block_keys + i);
            }
        }
    }

    static void pack_values(const std::uint8_t *const (&rows)[per_unit], std::size_t v_dim,
                            Unit *to) {
        read_units(rows[0], v_dim, to);
    }

    static void put_weights(Unit *weights, std::size_t key, Vec values) {
        store(weights + key, values);
    }
    static std::uint8_t *write(std::uint8_t *to, Vec values) {
        for (std::size_t i = 0; i < lanes; ++i) {
            const T value = from_float<T>(values.lane[i]);
            std::memcpy(to + i * sizeof(T), &value, sizeof(T));
        }
        return to + lanes * sizeof(T);
    }
};

}  // namespace

const AttentionKernel *attention_plain(Dtype dtype) {
    switch (dtype) {
        case Dtype::bf16: return &Kernel<PlainFloats<Bf16>>::functions;
        case Dtype::fp16: return &Kernel<PlainFloats<Fp16>>::functions;
        default: return &Kernel<PlainFloats<float>>::functions;
    }
}

}  // namespace memserve
