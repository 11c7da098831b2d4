#include "memserve/decoder.h"

#include <cstring>
#include <vector>

#include "checks.h"
#include "memserve/team.h"

namespace memserve {

namespace {

std::int64_t q_width(const DecoderLayer &layer) {
    return static_cast<std::int64_t>(layer.attention.q_heads * layer.attention.qk_dim);
}

std::int64_t k_width(const DecoderLayer &layer) {
    return static_cast<std::int64_t>(layer.attention.kv_heads * layer.attention.qk_dim);
}

std::int64_t v_width(const DecoderLayer &layer) {
    return static_cast<std::int64_t>(layer.attention.kv_heads * layer.attention.v_dim);
}

std::int64_t attended_width(const DecoderLayer &layer) {
    return static_cast<std::int64_t>(layer.attention.q_heads * layer.attention.v_dim);
}

// What lies between the parts: every buffer is [rows, its width], contiguous.
struct Buffers {
    std::uint8_t *qkv, *attended, *gate_up, *gated;

    // Kept a thread, as large as its largest call: at most `most_thin_rows` of a layer.
    Buffers(const DecoderLayer &layer, std::int64_t rows) {
        thread_local std::vector<std::uint8_t> memory;
        const std::int64_t widths[] = {layer.qkv.n, attended_width(layer), layer.gate_up.n,
                                       layer.down.k};
        std::uint8_t **const to[] = {&qkv, &attended, &gate_up, &gated};
        const auto element = static_cast<std::int64_t>(bytes_of(layer.qkv.dtype));
        std::int64_t total = 64;
        for (const std::int64_t width : widths) total += (rows * width * element + 63) / 64 * 64;
        if (memory.size() < static_cast<std::size_t>(total)) {
            memory.resize(static_cast<std::size_t>(total));
        }
        const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
        std::uint8_t *next = memory.data() + (64 - address % 64) % 64;
        for (int i = 0; i < 4; ++i) {
            *to[i] = next;
            next += (rows * widths[i] * element + 63) / 64 * 64;
        }
    }
};

struct Step {
    const DecoderLayer &layer;
    const DecoderCall &call;
    Buffers buffers;
    std::int64_t element;

    std::uint8_t *k() const { return buffers.qkv + q_width(layer) * element; }
    std::uint8_t *v() const { return k() + k_width(layer) * element; }

    void norm(const Norm &of, Residual is) const {
        if (is == Residual::started) {
            const auto bytes = static_cast<std::size_t>(of.width * element);
            for (std::int64_t row = 0; row < call.rows; ++row) {
                std::memcpy(static_cast<std::uint8_t *>(call.residual) +
                                row * call.residual_stride * element,
                            static_cast<const std::uint8_t *>(call.hidden) +
                                row * call.hidden_stride * element,
                            bytes);
            }
        }
        rms_norm(of,
                 {call.hidden, call.hidden_stride, is == Residual::started ? nullptr : call.residual,
                  call.residual_stride, call.hidden, call.hidden_stride, call.rows},
                 call.threads);
    }

    void linear(const ThinWeight &weight, const void *x, std::int64_t x_stride, void *out,
                std::int64_t out_stride) const {
        thin_linear(weight, {x, call.rows, x_stride, out, out_stride}, call.threads);
    }

    // A row's heads lie side by side: rows of their own for a norm.
    void norms_of_heads() const {
        if (!layer.head_norms) return;
        run(call.threads, static_cast<std::size_t>(call.rows), [&](std::size_t row) {
            const std::int64_t offset = static_cast<std::int64_t>(row) * layer.qkv.n * element;
            norm_heads(layer.head_norms->q, buffers.qkv + offset, layer.rotary.q_heads);
            norm_heads(layer.head_norms->k, k() + offset, layer.rotary.k_heads);
        });
    }

    static void norm_heads(const Norm &of, std::uint8_t *heads, std::int64_t count) {
        rms_norm(of, {heads, of.width, nullptr, 0, heads, of.width, count}, 1);
    }

    void rotary() const {
        rotate(layer.rotary,
               {call.positions, call.rows, buffers.qkv, layer.qkv.n, k(), layer.qkv.n},
               call.threads);
    }

    AttentionCall attention() const {
        const auto address = [](const std::uint8_t *at) {
            return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(at));
        };
        const std::int64_t stride = layer.qkv.n;
        return {address(buffers.qkv), stride, address(k()),           address(v()),
                stride,               stride, address(buffers.attended), attended_width(layer),
                0,                    call.threads};
    }

    void activation() const {
        gate({buffers.gate_up, layer.gate_up.n, buffers.gated, layer.down.k, call.rows,
              layer.down.k, layer.down.dtype, layer.activation},
             call.threads);
    }
};

Step step_of(const DecoderLayer &layer, const DecoderCall &call) {
    return {layer, call, Buffers(layer, call.rows),
            static_cast<std::int64_t>(bytes_of(layer.qkv.dtype))};
}

void check_equal(const char *what, std::int64_t one, std::int64_t other) {
    if (one != other) {
        refuse(std::string("decoder layer: ") + what + ": " + std::to_string(one) + " and " +
               std::to_string(other));
    }
}

}  // namespace

void check_layer(const DecoderLayer &layer) {
    const PagedAttention &attention = layer.attention;
    const std::int64_t width = layer.input_norm.width;
    check_equal("widths of the norms", width, layer.post_norm.width);
    check_equal("width and k of q/k/v", width, layer.qkv.k);
    check_equal("width and n of the output", width, layer.o.n);
    check_equal("width and k of gate and up", width, layer.gate_up.k);
    check_equal("width and n of down", width, layer.down.n);
    check_equal("heads and n of q/k/v", q_width(layer) + k_width(layer) + v_width(layer),
                layer.qkv.n);
    check_equal("heads and k of the output", attended_width(layer), layer.o.k);
    check_equal("n of gate and up, and twice k of down", layer.gate_up.n, 2 * layer.down.k);
    check_equal("q heads", layer.rotary.q_heads, static_cast<std::int64_t>(attention.q_heads));
    check_equal("k heads", layer.rotary.k_heads, static_cast<std::int64_t>(attention.kv_heads));
    check_equal("head_dim", layer.rotary.head_dim, static_cast<std::int64_t>(attention.qk_dim));
    if (layer.head_norms) {
        check_equal("width of the norm of q heads and head_dim", layer.head_norms->q.width,
                    layer.rotary.head_dim);
        check_equal("width of the norm of k heads and head_dim", layer.head_norms->k.width,
                    layer.rotary.head_dim);
    }
    const Dtype dtype = layer.qkv.dtype;
    const HeadNorms norms = layer.head_norms.value_or(HeadNorms{layer.input_norm, layer.input_norm});
    if (norms.q.dtype != dtype || norms.k.dtype != dtype || layer.input_norm.dtype != dtype || layer.rotary.dtype != dtype ||
        attention.dtype != dtype || layer.o.dtype != dtype || layer.post_norm.dtype != dtype ||
        layer.gate_up.dtype != dtype || layer.down.dtype != dtype) {
        refuse("decoder layer: its parts are of different dtypes");
    }
}

void check_call(const DecoderLayer &layer, AttentionPlan &plan, const DecoderCall &call) {
    check_size("decoder layer: rows", call.rows, most_thin_rows);
    const Dtype dtype = layer.qkv.dtype;
    const std::int64_t width = layer.input_norm.width;
    check_rows("hidden", call.hidden, call.rows, width, call.hidden_stride, dtype);
    check_rows("residual", call.residual, call.rows, width, call.residual_stride, dtype);
    check_equal("rows of the plan and of the call", static_cast<std::int64_t>(plan.rows()),
                call.rows);
    const Step step = step_of(layer, call);
    check_call(layer.rotary,
               {call.positions, call.rows, step.buffers.qkv, layer.qkv.n, step.k(), layer.qkv.n});
    layer.attention.check_call(plan, step.attention());
}

void decode(const DecoderLayer &layer, const AttentionPlan &plan, const DecoderCall &call) {
    const Step step = step_of(layer, call);
    const Buffers &buffers = step.buffers;
    step.norm(layer.input_norm, call.residual_is);
    step.linear(layer.qkv, call.hidden, call.hidden_stride, buffers.qkv, layer.qkv.n);
    step.norms_of_heads();
    step.rotary();
    layer.attention.attend(plan, step.attention());
    step.linear(layer.o, buffers.attended, attended_width(layer), call.hidden, call.hidden_stride);
    step.norm(layer.post_norm, Residual::added);
    step.linear(layer.gate_up, call.hidden, call.hidden_stride, buffers.gate_up, layer.gate_up.n);
    step.activation();
    step.linear(layer.down, buffers.gated, layer.down.k, call.hidden, call.hidden_stride);
}

}  // namespace memserve
