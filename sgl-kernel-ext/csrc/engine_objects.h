// What Python keeps of the engine's ops: checked once, called often.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "memserve/decoder.h"
#include "memserve/elementwise.h"
#include "memserve/linear.h"

namespace engine {

namespace nb = nanobind;

constexpr unsigned most_threads = 256;

inline void check_threads(unsigned threads) {
    if (threads == 0 || threads > most_threads) {
        throw std::invalid_argument("threads must be in 1..256");
    }
}

inline memserve::Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("no such dtype");
    return static_cast<memserve::Dtype>(dtype);
}

template <typename T>
T *at(std::uint64_t address) {
    return reinterpret_cast<T *>(static_cast<std::uintptr_t>(address));
}

// Releasing the GIL costs about 0.1 us, and more where others wait for it.
constexpr std::int64_t bytes_worth_releasing = 64 << 10;

template <typename Work>
void unlocked_if(bool long_enough, const Work &work) {
    if (!long_enough) return work();
    const nb::gil_scoped_release unlocked;
    work();
}

class ThinLinear {
public:
    ThinLinear(std::uint64_t weight, std::int64_t n, std::int64_t k, std::int64_t stride,
               std::uint64_t bias, int dtype)
        : weight_{at<const void>(weight), at<const void>(bias), n, k, stride, dtype_of(dtype)} {
        memserve::check_weight(weight_);
        bytes_ = n * k * static_cast<std::int64_t>(memserve::bytes_of(weight_.dtype));
    }

    void apply(std::uint64_t x, std::int64_t rows, std::int64_t x_stride, std::uint64_t out,
               std::int64_t out_stride, unsigned threads) const {
        check_threads(threads);
        const memserve::ThinCall call{at<const void>(x), rows, x_stride, at<void>(out), out_stride};
        memserve::check_call(weight_, call);
        unlocked_if(bytes_ >= bytes_worth_releasing,
                    [&] { memserve::thin_linear(weight_, call, threads); });
    }

    const memserve::ThinWeight &get() const { return weight_; }

private:
    memserve::ThinWeight weight_;
    std::int64_t bytes_;
};

constexpr std::int64_t elements_worth_releasing = 16 << 10;

template <typename Choice>
Choice choice_of(const char *what, int value, int most) {
    if (value < 0 || value > most) throw std::invalid_argument(std::string("no such ") + what);
    return static_cast<Choice>(value);
}

class RmsNorm {
public:
    RmsNorm(std::uint64_t weight, std::int64_t width, float eps, int dtype, int weight_dtype,
            int form)
        : norm_{at<const void>(weight), width, eps, dtype_of(dtype), dtype_of(weight_dtype),
                choice_of<memserve::NormForm>("form of a norm", form, 2)} {
        memserve::check_norm(norm_);
    }

    void apply(std::uint64_t x, std::int64_t x_stride, std::uint64_t out, std::int64_t out_stride,
               std::int64_t rows, unsigned threads) const {
        run({at<const void>(x), x_stride, nullptr, 0, at<void>(out), out_stride, rows}, threads);
    }

    void add_and_apply(std::uint64_t x, std::int64_t x_stride, std::uint64_t residual,
                       std::int64_t residual_stride, std::uint64_t out, std::int64_t out_stride,
                       std::int64_t rows, unsigned threads) const {
        if (residual == 0 && rows != 0) throw std::invalid_argument("norm: no residual");
        run({at<const void>(x), x_stride, at<void>(residual), residual_stride, at<void>(out),
             out_stride, rows},
            threads);
    }

    const memserve::Norm &get() const { return norm_; }

private:
    void run(const memserve::NormCall &call, unsigned threads) const {
        check_threads(threads);
        memserve::check_call(norm_, call);
        unlocked_if(call.rows * norm_.width >= elements_worth_releasing,
                    [&] { memserve::rms_norm(norm_, call, threads); });
    }

    memserve::Norm norm_;
};

class KvSlots {
public:
    KvSlots(std::uint64_t k, std::int64_t k_stride, std::int64_t k_width, std::uint64_t v,
            std::int64_t v_stride, std::int64_t v_width, std::int64_t slots, int dtype)
        : kv_{at<void>(k), k_stride, k_width, at<void>(v), v_stride, v_width, slots,
              dtype_of(dtype)} {
        memserve::check_kv(kv_);
    }

    void write(std::uint64_t slots, std::int64_t rows, std::uint64_t k, std::int64_t k_stride,
               std::uint64_t v, std::int64_t v_stride, unsigned threads) const {
        check_threads(threads);
        const memserve::KvCall call{at<const std::int64_t>(slots), rows, at<const void>(k), k_stride,
                                    at<const void>(v), v_stride};
        memserve::check_call(kv_, call);
        unlocked_if(rows * (kv_.k_width + kv_.v_width) >= elements_worth_releasing,
                    [&] { memserve::write_kv(kv_, call, threads); });
    }

    const memserve::KvSlots &get() const { return kv_; }

private:
    memserve::KvSlots kv_;
};

class Rotary {
public:
    Rotary(std::uint64_t cache, std::int64_t positions, std::int64_t rotary_dim,
           std::int64_t head_dim, std::int64_t q_heads, std::int64_t k_heads, int dtype,
           int cache_dtype, int style)
        : rotary_{at<const void>(cache), positions, rotary_dim, head_dim, q_heads, k_heads,
                  dtype_of(dtype), dtype_of(cache_dtype),
                  choice_of<memserve::RotaryStyle>("rotary style", style, 1)} {
        memserve::check_rotary(rotary_);
    }

    void apply(std::uint64_t positions, std::int64_t rows, std::uint64_t q, std::int64_t q_stride,
               std::uint64_t k, std::int64_t k_stride, unsigned threads) const {
        check_threads(threads);
        const memserve::RotaryCall call{at<const std::int64_t>(positions), rows, at<void>(q),
                                        q_stride, at<void>(k), k_stride};
        memserve::check_call(rotary_, call);
        unlocked_if(long_enough(rows), [&] { memserve::rotate(rotary_, call, threads); });
    }

    void apply_and_write(std::uint64_t positions, std::int64_t rows, std::uint64_t q,
                         std::int64_t q_stride, std::uint64_t k, std::int64_t k_stride,
                         const KvSlots &kv, std::uint64_t slots, std::uint64_t v,
                         std::int64_t v_stride, unsigned threads) const {
        check_threads(threads);
        const memserve::RotaryCall call{at<const std::int64_t>(positions), rows, at<void>(q),
                                        q_stride, at<void>(k), k_stride};
        const memserve::KvCall written{at<const std::int64_t>(slots), rows, call.k, k_stride,
                                       at<const void>(v), v_stride};
        memserve::check_call(rotary_, call);
        memserve::check_call(kv.get(), written);
        unlocked_if(long_enough(rows), [&] {
            memserve::rotate_and_write(rotary_, call, kv.get(), written, threads);
        });
    }

    const memserve::Rotary &get() const { return rotary_; }

private:
    bool long_enough(std::int64_t rows) const {
        const std::int64_t width = (rotary_.q_heads + rotary_.k_heads) * rotary_.head_dim;
        return rows * width >= elements_worth_releasing;
    }

    memserve::Rotary rotary_;
};

class DecoderLayer {
public:
    DecoderLayer(const RmsNorm &input_norm, const ThinLinear &qkv, const Rotary &rotary,
                 const memserve::PagedAttention &attention, const ThinLinear &o,
                 const RmsNorm &post_norm, const ThinLinear &gate_up, const ThinLinear &down,
                 int activation, const RmsNorm *q_norm, const RmsNorm *k_norm)
        : layer_{input_norm.get(), qkv.get(),     rotary.get(), attention,
                 o.get(),          post_norm.get(), gate_up.get(), down.get(),
                 choice_of<memserve::Activation>("activation", activation, 1), std::nullopt} {
        if ((q_norm == nullptr) != (k_norm == nullptr)) {
            throw std::invalid_argument("decoder layer: a norm of q heads or of k heads alone");
        }
        if (q_norm != nullptr) layer_.head_norms = {q_norm->get(), k_norm->get()};
        memserve::check_layer(layer_);
    }

    template <memserve::Residual residual_is>
    void apply(memserve::AttentionPlan &plan, std::uint64_t hidden, std::int64_t hidden_stride,
               std::uint64_t residual, std::int64_t residual_stride, std::uint64_t positions,
               std::int64_t rows, unsigned threads) const {
        check_threads(threads);
        const memserve::DecoderCall call{
            at<void>(hidden), hidden_stride, at<void>(residual), residual_stride, residual_is,
            at<const std::int64_t>(positions), rows, threads};
        // The plan remembers what it has found, so it is looked at with the GIL.
        memserve::check_call(layer_, plan, call);
        const nb::gil_scoped_release unlocked;
        memserve::decode(layer_, plan, call);
    }

private:
    memserve::DecoderLayer layer_;
};

}  // namespace engine
