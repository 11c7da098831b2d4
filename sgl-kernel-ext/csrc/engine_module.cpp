// The Python face of the engine's ops. Tensors come as addresses, sizes and strides.
#include "engine_module.h"

#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "memserve/cpu.h"
#include "memserve/elementwise.h"
#include "memserve/linear.h"
#include "memserve/team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr unsigned most_threads = 256;

void check_threads(unsigned threads) {
    if (threads == 0 || threads > most_threads) {
        throw std::invalid_argument("threads must be in 1..256");
    }
}

memserve::Isa isa_of(int level) {
    if (level < 0 || level > 3) throw std::invalid_argument("no such instruction set");
    return static_cast<memserve::Isa>(level);
}

memserve::Dtype dtype_of(int dtype) {
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

private:
    bool long_enough(std::int64_t rows) const {
        const std::int64_t width = (rotary_.q_heads + rotary_.k_heads) * rotary_.head_dim;
        return rows * width >= elements_worth_releasing;
    }

    memserve::Rotary rotary_;
};

void gate(std::uint64_t x, std::int64_t x_stride, std::uint64_t out, std::int64_t out_stride,
          std::int64_t rows, std::int64_t width, int dtype, int activation, unsigned threads) {
    check_threads(threads);
    const memserve::Gate of{at<const void>(x), x_stride, at<void>(out), out_stride, rows, width,
                            dtype_of(dtype),
                            choice_of<memserve::Activation>("activation", activation, 1)};
    memserve::check_gate(of);
    unlocked_if(rows * width >= elements_worth_releasing / 4, [&] { memserve::gate(of, threads); });
}

// How often each task ran, for tests; task number `failing` throws after it has counted.
std::vector<unsigned> count_tasks(unsigned threads, std::size_t tasks, std::int64_t failing) {
    check_threads(threads);
    std::vector<std::atomic<unsigned>> counts(tasks);
    {
        const nb::gil_scoped_release unlocked;
        memserve::run(threads, tasks, [&](std::size_t task) {
            counts[task].fetch_add(1);
            if (static_cast<std::int64_t>(task) == failing) {
                throw std::runtime_error("task " + std::to_string(task) + " failed as asked");
            }
        });
    }
    return {counts.begin(), counts.end()};
}

}  // namespace

void bind_engine(nb::module_ &module) {
    module.def("isa", [] { return static_cast<int>(memserve::isa()); });
    module.def("limit_isa", [](int best) { memserve::limit_isa(isa_of(best)); }, "best"_a);
    module.def("team_helpers", &memserve::team_helpers);
    nb::class_<ThinLinear>(module, "ThinLinear")
        .def(nb::init<std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::uint64_t, int>(),
             "weight"_a, "n"_a, "k"_a, "stride"_a, "bias"_a, "dtype"_a)
        .def("apply", &ThinLinear::apply, "x"_a, "rows"_a, "x_stride"_a, "out"_a, "out_stride"_a,
             "threads"_a);
    nb::class_<RmsNorm>(module, "RmsNorm")
        .def(nb::init<std::uint64_t, std::int64_t, float, int, int, int>(), "weight"_a, "width"_a,
             "eps"_a, "dtype"_a, "weight_dtype"_a, "form"_a)
        .def("apply", &RmsNorm::apply, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "rows"_a,
             "threads"_a)
        .def("add_and_apply", &RmsNorm::add_and_apply, "x"_a, "x_stride"_a, "residual"_a,
             "residual_stride"_a, "out"_a, "out_stride"_a, "rows"_a, "threads"_a);
    nb::class_<KvSlots>(module, "KvSlots")
        .def(nb::init<std::uint64_t, std::int64_t, std::int64_t, std::uint64_t, std::int64_t,
                      std::int64_t, std::int64_t, int>(),
             "k"_a, "k_stride"_a, "k_width"_a, "v"_a, "v_stride"_a, "v_width"_a, "slots"_a,
             "dtype"_a)
        .def("write", &KvSlots::write, "slots"_a, "rows"_a, "k"_a, "k_stride"_a, "v"_a,
             "v_stride"_a, "threads"_a);
    nb::class_<Rotary>(module, "Rotary")
        .def(nb::init<std::uint64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                      std::int64_t, int, int, int>(),
             "cache"_a, "positions"_a, "rotary_dim"_a, "head_dim"_a, "q_heads"_a, "k_heads"_a,
             "dtype"_a, "cache_dtype"_a, "style"_a)
        .def("apply", &Rotary::apply, "positions"_a, "rows"_a, "q"_a, "q_stride"_a, "k"_a,
             "k_stride"_a, "threads"_a)
        .def("apply_and_write", &Rotary::apply_and_write, "positions"_a, "rows"_a, "q"_a,
             "q_stride"_a, "k"_a, "k_stride"_a, "kv"_a, "slots"_a, "v"_a, "v_stride"_a,
             "threads"_a);
    module.def("gate", &gate, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a,
               "dtype"_a, "activation"_a, "threads"_a);
    module.def("count_tasks", &count_tasks, "threads"_a, "tasks"_a, "failing"_a);
}
