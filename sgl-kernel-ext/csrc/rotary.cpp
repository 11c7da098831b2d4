#include <cstring>

#include "checks.h"
#include "memserve/elementwise.h"
#include "row_tasks.h"

namespace memserve {

namespace {

constexpr std::int64_t most_rotary_dim = 1024;
constexpr std::int64_t most_heads = std::int64_t{1} << 16;
constexpr std::int64_t most_head_dim = std::int64_t{1} << 16;
constexpr int block = 16;

struct Angles {
    float cosines[most_rotary_dim / 2];
    float sines[most_rotary_dim / 2];
};

// As torch does it: two rounded products, then their rounded sum.
template <typename T>
MEMSERVE_INLINE void turn(T &first, T &second, float cosine, float sine) {
    const float a = to_float(first), b = to_float(second);
    first = narrow<T>(rounded<T>(a * cosine) - rounded<T>(b * sine));
    second = narrow<T>(rounded<T>(b * cosine) + rounded<T>(a * sine));
}

template <typename T>
MEMSERVE_INLINE void turn_neox(T *head, std::int64_t half, const Angles &angles) {
    std::int64_t i = 0;
    for (; i + block <= half; i += block) {
        // Local copies: the compiler cannot know that the halves do not overlap.
        T first[block], second[block];
        std::memcpy(first, head + i, sizeof first);
        std::memcpy(second, head + half + i, sizeof second);
        // Unrolled as a whole, it would no longer be vectorised.
#pragma GCC unroll 1
        for (int lane = 0; lane < block; ++lane) {
            turn(first[lane], second[lane], angles.cosines[i + lane], angles.sines[i + lane]);
        }
        std::memcpy(head + i, first, sizeof first);
        std::memcpy(head + half + i, second, sizeof second);
    }
    for (; i < half; ++i) turn(head[i], head[half + i], angles.cosines[i], angles.sines[i]);
}

template <typename T>
MEMSERVE_INLINE void turn_interleaved(T *head, std::int64_t half, const Angles &angles) {
    for (std::int64_t i = 0; i < half; ++i) {
        turn(head[2 * i], head[2 * i + 1], angles.cosines[i], angles.sines[i]);
    }
}

template <typename T>
MEMSERVE_INLINE void turn_heads(T *row, std::int64_t heads, const Rotary &rotary,
                                const Angles &angles) {
    const std::int64_t half = rotary.rotary_dim / 2;
    for (std::int64_t head = 0; head < heads; ++head, row += rotary.head_dim) {
        if (rotary.style == RotaryStyle::neox) {
            turn_neox(row, half, angles);
        } else {
            turn_interleaved(row, half, angles);
        }
    }
}

// The cache's angles, rounded to the activations' dtype as SGLang does.
template <typename T, typename C>
MEMSERVE_INLINE void read_angles(const Rotary &rotary, std::int64_t position, Angles &angles) {
    const std::int64_t half = rotary.rotary_dim / 2;
    const C *row = static_cast<const C *>(rotary.cache) + position * rotary.rotary_dim;
    for (std::int64_t i = 0; i < half; ++i) {
        angles.cosines[i] = rounded<T>(to_float(row[i]));
        angles.sines[i] = rounded<T>(to_float(row[half + i]));
    }
}

template <typename T>
MEMSERVE_INLINE void rotate_rows(const Rotary &rotary, const RotaryCall &call, std::int64_t first,
                                 std::int64_t last) {
    Angles angles;
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t position = call.positions[i];
        switch (rotary.cache_dtype) {
            case Dtype::bf16: read_angles<T, Bf16>(rotary, position, angles); break;
            case Dtype::fp16: read_angles<T, Fp16>(rotary, position, angles); break;
            case Dtype::fp32: read_angles<T, float>(rotary, position, angles); break;
        }
        turn_heads(static_cast<T *>(call.q) + i * call.q_stride, rotary.q_heads, rotary, angles);
        turn_heads(static_cast<T *>(call.k) + i * call.k_stride, rotary.k_heads, rotary, angles);
    }
}

MEMSERVE_INLINE void rotate_body(const Rotary &rotary, const RotaryCall &call, std::int64_t first,
                                 std::int64_t last) {
    switch (rotary.dtype) {
        case Dtype::bf16: return rotate_rows<Bf16>(rotary, call, first, last);
        case Dtype::fp16: return rotate_rows<Fp16>(rotary, call, first, last);
        case Dtype::fp32: return rotate_rows<float>(rotary, call, first, last);
    }
}

MEMSERVE_LEVELS(rotate, (const Rotary &rotary, const RotaryCall &call, std::int64_t first,
                         std::int64_t last), (rotary, call, first, last))

void copy_row(void *to, std::int64_t to_row, const void *from, std::int64_t from_row,
              std::int64_t width, std::size_t size) {
    const auto bytes = static_cast<std::int64_t>(size);
    std::memcpy(static_cast<std::uint8_t *>(to) + to_row * bytes,
                static_cast<const std::uint8_t *>(from) + from_row * bytes,
                static_cast<std::size_t>(width) * size);
}

void write_rows(const KvSlots &kv, const KvCall &call, std::int64_t first, std::int64_t last) {
    const std::size_t size = bytes_of(kv.dtype);
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t slot = call.slots[i];
        copy_row(kv.k, slot * kv.k_stride, call.k, i * call.k_stride, kv.k_width, size);
        copy_row(kv.v, slot * kv.v_stride, call.v, i * call.v_stride, kv.v_width, size);
    }
}

std::int64_t width_of(const Rotary &rotary) {
    return (rotary.q_heads + rotary.k_heads) * rotary.head_dim;
}

void check_indices_at(const char *what, const std::int64_t *numbers, std::int64_t rows,
                      std::int64_t limit) {
    if (rows == 0) return;
    check_address(what, numbers, sizeof *numbers);
    check_indices(what, numbers, rows, limit);
}

}  // namespace

void check_rotary(const Rotary &rotary) {
    check_size("rotary: positions", rotary.positions, most_elements / most_rotary_dim);
    check_size("rotary: rotary_dim", rotary.rotary_dim, most_rotary_dim);
    check_size("rotary: head_dim", rotary.head_dim, most_head_dim);
    check_size("rotary: q heads", rotary.q_heads, most_heads);
    check_size("rotary: k heads", rotary.k_heads, most_heads);
    if (rotary.rotary_dim % 2 != 0 || rotary.rotary_dim > rotary.head_dim) {
        refuse("rotary: " + std::to_string(rotary.rotary_dim) + " dimensions of heads of " +
               std::to_string(rotary.head_dim) + "; they must be even and fit");
    }
    check_rows("rotary: cache", rotary.cache, rotary.positions, rotary.rotary_dim,
               rotary.rotary_dim, rotary.cache_dtype);
}

void check_kv(const KvSlots &kv) {
    check_size("kv: slots", kv.slots, most_elements);
    check_size("kv: width of k", kv.k_width, most_elements);
    check_size("kv: width of v", kv.v_width, most_elements);
    check_rows("kv: k", kv.k, kv.slots, kv.k_width, kv.k_stride, kv.dtype);
    check_rows("kv: v", kv.v, kv.slots, kv.v_width, kv.v_stride, kv.dtype);
}

void check_call(const Rotary &rotary, const RotaryCall &call) {
    check_rows("rotary: q", call.q, call.rows, rotary.q_heads * rotary.head_dim, call.q_stride,
               rotary.dtype);
    check_rows("rotary: k", call.k, call.rows, rotary.k_heads * rotary.head_dim, call.k_stride,
               rotary.dtype);
    check_indices_at("position", call.positions, call.rows, rotary.positions);
}

void check_call(const KvSlots &kv, const KvCall &call) {
    check_rows("kv: new k", call.k, call.rows, kv.k_width, call.k_stride, kv.dtype);
    check_rows("kv: new v", call.v, call.rows, kv.v_width, call.v_stride, kv.dtype);
    check_indices_at("slot", call.slots, call.rows, kv.slots);
}

void rotate(const Rotary &rotary, const RotaryCall &call, unsigned threads) {
    const auto rows = rotate_for(isa());
    over_rows(threads, call.rows, width_of(rotary), [&](std::int64_t first, std::int64_t last) {
        rows(rotary, call, first, last);
    });
}

void write_kv(const KvSlots &kv, const KvCall &call, unsigned threads) {
    over_rows(threads, call.rows, kv.k_width + kv.v_width,
              [&](std::int64_t first, std::int64_t last) { write_rows(kv, call, first, last); });
}

void rotate_and_write(const Rotary &rotary, const RotaryCall &call, const KvSlots &kv,
                      const KvCall &kv_call, unsigned threads) {
    if (kv.k_width != rotary.k_heads * rotary.head_dim || kv.dtype != rotary.dtype ||
        kv_call.k != call.k || kv_call.k_stride != call.k_stride || kv_call.rows != call.rows) {
        refuse("kv: what is written is not the k that is turned");
    }
    const auto rows = rotate_for(isa());
    const std::int64_t width = width_of(rotary) + kv.k_width + kv.v_width;
    over_rows(threads, call.rows, width, [&](std::int64_t first, std::int64_t last) {
        rows(rotary, call, first, last);
        write_rows(kv, kv_call, first, last);
    });
}

}  // namespace memserve
