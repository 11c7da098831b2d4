// Attention in plain C++, four floats at a time: any processor.

#include "attention_kernel.h"

namespace memserve {
namespace {

// Vectors as GCC and Clang know them for any processor.
typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));

template <class T>
struct PlainFloats {
    using Vec = Floats;
    using Unit = float;
    using Units = Floats;
    static constexpr std::size_t lanes = 4, per_unit = 1, element_bytes = sizeof(T);
    static constexpr std::size_t most_rows = 4, most_vectors = 2;

    static Vec zero() { return Vec{}; }
    static Vec set1(float value) { return Vec{value, value, value, value}; }
    static Vec load(const float *from) {
        Vec value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    static void store(float *to, Vec value) { std::memcpy(to, &value, sizeof value); }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec sub(Vec a, Vec b) { return a - b; }
    static Vec mul(Vec a, Vec b) { return a * b; }
    static Vec div(Vec a, Vec b) { return a / b; }
    static Vec max(Vec a, Vec b) { return a > b ? a : b; }
    static Vec mul_add(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec magnitude(Vec a) { return floats(ints(a) & 0x7fffffff); }
    static Vec with_sign(Vec a, Vec sign) { return floats(ints(a) | (ints(sign) & INT32_MIN)); }
    static float first(Vec a) { return a[0]; }
    static void largest(const Vec *a, std::size_t count, float *to) {
        for (std::size_t i = 0; i < count; ++i) {
            const float x = a[i][0] > a[i][1] ? a[i][0] : a[i][1];
            const float y = a[i][2] > a[i][3] ? a[i][2] : a[i][3];
            to[i] = x > y ? x : y;
        }
    }
    static float total(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }

    // Lane i of `a` where bit i of `lanes_of_a` is set, `other` in the rest.
    static Vec chosen(std::uint64_t lanes_of_a, Vec a, float other) {
        const Ints bit{1, 2, 4, 8};
        return ((bit & static_cast<std::int32_t>(lanes_of_a & 15)) == bit) ? a : set1(other);
    }

    static Vec exp2(Vec x) {
        // Below the smallest normal number: 0.
        const Vec lowest = set1(-126.0f);
        const Vec limited = x > lowest ? x : lowest;
        const Ints whole = __builtin_convertvector(limited - 0.5f, Ints);
        const Vec rest = limited - __builtin_convertvector(whole, Vec);
        Vec sum = zero();
        for (const float factor : exp2_factors) sum = sum * rest + factor;
        // NaN has gone at the limit: it comes back.
        const Vec result = sum * floats((whole + 127) << 23) + (x - x);
        return x < lowest ? zero() : result;
    }

    static Ints ints(Vec value) { return reinterpret_cast<Ints>(value); }
    static Vec floats(Ints value) { return reinterpret_cast<Vec>(value); }

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
    static void put_weights(Unit *weights, std::size_t key, Vec first, Vec second) {
        put_weights(weights, key, first);
        put_weights(weights, key + lanes, second);
    }
    static std::uint8_t *write(std::uint8_t *to, Vec values) {
        for (std::size_t i = 0; i < lanes; ++i) {
            const T value = from_float<T>(values[static_cast<int>(i)]);
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
