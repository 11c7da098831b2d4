// One decoder layer of a llama-class model for few rows, in one call: what Python does between two
// ops takes as long as the smaller of them.
#pragma once

#include <cstdint>
#include <optional>

#include "memserve/attention.h"
#include "memserve/elementwise.h"
#include "memserve/linear.h"

namespace memserve {

// Of each head of q and of k by itself, before they are turned (Qwen3).
struct HeadNorms {
    Norm q;
    Norm k;
};

// Each part as it would be called alone.
struct DecoderLayer {
    Norm input_norm;
    ThinWeight qkv;  // rows of q heads, then k heads, then v heads
    Rotary rotary;
    PagedAttention attention;
    ThinWeight o;
    Norm post_norm;
    ThinWeight gate_up;  // rows of the gate, then of what it multiplies
    ThinWeight down;
    Activation activation;
    std::optional<HeadNorms> head_norms;
};

enum class Residual {
    added,    // to what comes out of the layer before
    started,  // by the first layer: it is only written
};

// Rows of the batch's new tokens, `hidden` and `residual` [rows, width] of the layer's dtype, both
// read and written: on return hidden is the output of the MLP, which the next layer's norm (or the
// last one) adds to residual.
struct DecoderCall {
    void *hidden;
    std::int64_t hidden_stride;
    void *residual;
    std::int64_t residual_stride;
    Residual residual_is;
    const std::int64_t *positions;
    std::int64_t rows;  // 1 .. most_thin_rows
    unsigned threads;
};

// Throws std::invalid_argument where the parts do not fit each other.
void check_layer(const DecoderLayer &layer);
// The same for addresses and strides, and std::out_of_range for a position or slot beyond its limit,
// before anything is written.
void check_call(const DecoderLayer &layer, AttentionPlan &plan, const DecoderCall &call);
// The bits that the ops give one after another: norm, q/k/v, norms of the heads, rotary embedding,
// attention with the K/V write, output, norm, gate and up, activation, down.
void decode(const DecoderLayer &layer, const AttentionPlan &plan, const DecoderCall &call);

}  // namespace memserve
