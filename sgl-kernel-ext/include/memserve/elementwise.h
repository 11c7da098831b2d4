// What lies between the products of a layer: norms, rotary embedding with the K/V write, and gated
// activations. Each keeps the roundings of SGLang's own forward in torch. Strides are in elements,
// from row to row; rows themselves are contiguous.
#pragma once

#include <cstdint>

#include "memserve/bf16.h"

namespace memserve {

// Where the weight comes in, once x is divided by its root mean square in fp32.
enum class NormForm {
    plain = 0,       // fp32 product with the weight, one rounding
    gemma = 1,       // the same with 1 + weight; a residual is added in the activations' dtype
    cast_first = 2,  // rounded before the product and after it
};

struct Norm {
    const void *weight;  // [width], of `dtype` or fp32
    std::int64_t width;
    float eps;
    Dtype dtype;
    Dtype weight_dtype;
    NormForm form;
};

// `residual` may be nullptr; else x + residual is what is normed, and what `residual` is afterwards.
// `out` may be `x`.
struct NormCall {
    const void *x;
    std::int64_t x_stride;
    void *residual;
    std::int64_t residual_stride;
    void *out;
    std::int64_t out_stride;
    std::int64_t rows;
};

void check_norm(const Norm &norm);
void check_call(const Norm &norm, const NormCall &call);
// On x86-64 the squares are summed in the order of torch's mean over a contiguous dimension, found
// by experiment: the bits are torch's.
void rms_norm(const Norm &norm, const NormCall &call, unsigned threads);

enum class RotaryStyle {
    neox = 0,         // pairs are (i, i + rotary_dim / 2)
    interleaved = 1,  // pairs are (2i, 2i + 1)
};

// `cache` [positions, rotary_dim]: cosines, then sines, contiguous.
struct Rotary {
    const void *cache;
    std::int64_t positions;
    std::int64_t rotary_dim;
    std::int64_t head_dim;
    std::int64_t q_heads;
    std::int64_t k_heads;
    Dtype dtype;
    Dtype cache_dtype;
    RotaryStyle style;
};

// Turns q and k in place: rows of heads, contiguous within a row.
struct RotaryCall {
    const std::int64_t *positions;
    std::int64_t rows;
    void *q;
    std::int64_t q_stride;
    void *k;
    std::int64_t k_stride;
};

// K and V of one layer, a token a slot.
struct KvSlots {
    void *k;
    std::int64_t k_stride;
    std::int64_t k_width;
    void *v;
    std::int64_t v_stride;
    std::int64_t v_width;
    std::int64_t slots;
    Dtype dtype;
};

struct KvCall {
    const std::int64_t *slots;
    std::int64_t rows;
    const void *k;
    std::int64_t k_stride;
    const void *v;
    std::int64_t v_stride;
};

void check_rotary(const Rotary &rotary);
void check_kv(const KvSlots &kv);
// Throw std::out_of_range for a position or slot beyond its limit, before anything is written.
void check_call(const Rotary &rotary, const RotaryCall &call);
void check_call(const KvSlots &kv, const KvCall &call);
void rotate(const Rotary &rotary, const RotaryCall &call, unsigned threads);
// Where two rows name one slot (a padding slot), what it holds afterwards is not defined.
void write_kv(const KvSlots &kv, const KvCall &call, unsigned threads);
// Both in one pass: `kv_call` writes the k that `call` turned.
void rotate_and_write(const Rotary &rotary, const RotaryCall &call, const KvSlots &kv,
                      const KvCall &kv_call, unsigned threads);

enum class Activation { silu = 0, gelu_tanh = 1 };

// out[i] = activation(x[i]) * x[width + i], the first factor rounded before the product.
struct Gate {
    const void *x;  // [rows, 2 * width]
    std::int64_t x_stride;
    void *out;  // [rows, width]
    std::int64_t out_stride;
    std::int64_t rows;
    std::int64_t width;
    Dtype dtype;
    Activation activation;
};

void check_gate(const Gate &gate);
void gate(const Gate &gate, unsigned threads);

}  // namespace memserve
