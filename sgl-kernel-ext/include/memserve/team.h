// A small team of threads that stays between calls. An op of a model's layer takes 5 to 100 us and
// a thread takes 30 us to start, so helpers are kept: they look out for the next job for about
// 100 us, then sleep in the kernel, where they use no processor.
#pragma once

#include <cstddef>

namespace memserve {

// Helpers beyond these are never started, whatever a caller allows.
constexpr unsigned most_team_threads = 64;

using Task = void (*)(const void *context, std::size_t task);

// Calls `call(context, task)` once for each task in 0 .. tasks - 1, in rising order as far as one
// thread sees it, on at most `threads` threads, the caller's included. Returns when all have
// returned. When tasks throw, the first exception caught is thrown here, after all have ended.
//
// There is one team in a process. While it works for another thread, or for an enclosing call, the
// caller does all tasks itself. A forked child starts a team of its own when it needs one.
// Helpers take no signals, and end with the process.
void run_tasks(unsigned threads, std::size_t tasks, Task call, const void *context);

// `run(2, 8, [&](std::size_t task) { ... })`. With two threads that are awake it costs about 1 us.
template <typename Function>
void run(unsigned threads, std::size_t tasks, const Function &function) {
    run_tasks(
        threads, tasks,
        [](const void *context, std::size_t task) {
            (*static_cast<const Function *>(context))(task);
        },
        &function);
}

// Threads of this process's team besides its callers, awake or asleep.
unsigned team_helpers();

}  // namespace memserve
