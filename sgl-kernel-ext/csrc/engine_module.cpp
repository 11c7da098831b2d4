// The Python face of the engine's ops. Tensors come as addresses, sizes and strides.
#include "engine_module.h"

#include <nanobind/stl/vector.h>

#include <atomic>
#include <vector>

#include "engine_objects.h"
#include "memserve/cpu.h"
#include "memserve/team.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace engine;

namespace {

memserve::Isa isa_of(int level) {
    if (level < 0 || level > 3) throw std::invalid_argument("no such instruction set");
    return static_cast<memserve::Isa>(level);
}

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
    nb::class_<DecoderLayer>(module, "DecoderLayer")
        .def(nb::init<const RmsNorm &, const ThinLinear &, const Rotary &,
                      const memserve::PagedAttention &, const ThinLinear &, const RmsNorm &,
                      const ThinLinear &, const ThinLinear &, int, const RmsNorm *,
                      const RmsNorm *>(),
             "input_norm"_a, "qkv"_a, "rotary"_a, "attention"_a, "o"_a, "post_norm"_a, "gate_up"_a,
             "down"_a, "activation"_a, "q_norm"_a.none(), "k_norm"_a.none())
        .def("apply", &DecoderLayer::apply<memserve::Residual::added>, "plan"_a, "hidden"_a,
             "hidden_stride"_a, "residual"_a, "residual_stride"_a, "positions"_a, "rows"_a,
             "threads"_a)
        .def("apply_first", &DecoderLayer::apply<memserve::Residual::started>, "plan"_a,
             "hidden"_a, "hidden_stride"_a, "residual"_a, "residual_stride"_a, "positions"_a,
             "rows"_a, "threads"_a);
    module.def("gate", &gate, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a,
               "dtype"_a, "activation"_a, "threads"_a);
    module.def("count_tasks", &count_tasks, "threads"_a, "tasks"_a, "failing"_a);
}
