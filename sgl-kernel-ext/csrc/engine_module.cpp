// The Python face of the engine's ops. Tensors come as addresses, sizes and strides.
#include "engine_module.h"

#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "memserve/cpu.h"
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
    module.def("count_tasks", &count_tasks, "threads"_a, "tasks"_a, "failing"_a);
}
