// The Python face of the engine's ops. Tensors come as addresses, sizes and strides.
#include "engine_module.h"

#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "memserve/cpu.h"
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
    module.def("count_tasks", &count_tasks, "threads"_a, "tasks"_a, "failing"_a);
}
