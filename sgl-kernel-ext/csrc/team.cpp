#include "memserve/team.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memserve {

namespace {

// Longer than Python takes between two ops of a layer, shorter than anyone would notice.
constexpr std::chrono::microseconds awake{100};
constexpr unsigned looks_per_clock = 32;
constexpr std::uint64_t left_mask = 0xffffffffu;
constexpr std::size_t most_tasks = std::numeric_limits<std::uint32_t>::max();

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The ticket is all that helpers look at: how many of them may help, and how many tasks are left.
// Who takes a task lowers the ticket in one exchange; only then does it read the job, which stays
// as long as one of its tasks is unfinished. A helper that comes late finds nothing to take, so a
// caller never waits for one to wake up.
struct Team {
    alignas(64) std::atomic<std::uint64_t> ticket{0};
    alignas(64) std::atomic<std::size_t> unfinished{0};

    alignas(64) Task call = nullptr;
    const void *context = nullptr;
    std::size_t tasks = 0;
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    std::mutex asleep;
    std::condition_variable wake;
    std::atomic<unsigned> sleepers{0};

    std::atomic<bool> busy{false};
    std::atomic<unsigned> helpers{0};  // raised by who holds `busy`
};

// Never freed: helpers may look at it until the process is gone.
std::atomic<Team *> current{nullptr};

// The child has this thread alone, and whatever the team did in the parent stays there.
void forget_team() { current.store(nullptr, std::memory_order_relaxed); }

Team &team() {
    Team *found = current.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_team);
    if (registered != 0) throw std::system_error(registered, std::generic_category());
    Team *made = new Team;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

bool has_work(std::uint64_t ticket, unsigned helper) {
    return (ticket & left_mask) != 0 && helper < (ticket >> 32);
}

void do_task(Team &of, std::size_t task) {
    try {
        of.call(of.context, task);
    } catch (...) {
        if (!of.failed.exchange(true)) of.error = std::current_exception();
    }
    of.unfinished.fetch_sub(1, std::memory_order_acq_rel);
}

// Takes and does tasks for as long as `may` says so of the ticket.
template <typename May>
void work_off(Team &of, const May &may) {
    std::uint64_t ticket = of.ticket.load(std::memory_order_acquire);
    while (may(ticket)) {
        if (!of.ticket.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
            continue;
        }
        do_task(of, of.tasks - static_cast<std::size_t>(ticket & left_mask));
        ticket = of.ticket.load(std::memory_order_acquire);
    }
}

bool look_out(const Team &of, unsigned helper) {
    const auto until = std::chrono::steady_clock::now() + awake;
    for (unsigned looks = 0;; ++looks) {
        if (has_work(of.ticket.load(std::memory_order_relaxed), helper)) return true;
        if (looks % looks_per_clock == 0 && std::chrono::steady_clock::now() >= until) return false;
        pause();
    }
}

void sleep_until_work(Team &of, unsigned helper) {
    std::unique_lock<std::mutex> lock(of.asleep);
    // Counted before the last look at the ticket, as the caller looks at the count after it wrote
    // the ticket: one of the two sees the other.
    of.sleepers.fetch_add(1, std::memory_order_seq_cst);
    of.wake.wait(lock, [&] {
        return has_work(of.ticket.load(std::memory_order_seq_cst), helper);
    });
    of.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void help(Team *of, unsigned helper) {
    for (;;) {
        work_off(*of, [&](std::uint64_t ticket) { return has_work(ticket, helper); });
        if (!look_out(*of, helper)) sleep_until_work(*of, helper);
    }
}

void start_helpers(Team &of, unsigned wanted) {
    unsigned have = of.helpers.load(std::memory_order_relaxed);
    if (have >= wanted) return;
    // Threads inherit the mask: signals are for threads that know what to do with them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (; have < wanted; ++have) std::thread(help, &of, have).detach();
    } catch (const std::system_error &) {
        // The machine gives no more threads: those that run do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    of.helpers.store(have, std::memory_order_relaxed);
}

void wait_for_helpers(const Team &of) {
    for (unsigned looks = 0; of.unfinished.load(std::memory_order_acquire) != 0; ++looks) {
        // Somebody else may need this processor to finish.
        if (looks < 4096) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

void run_alone(std::size_t tasks, Task call, const void *context) {
    std::exception_ptr error;
    for (std::size_t task = 0; task < tasks; ++task) {
        try {
            call(context, task);
        } catch (...) {
            if (!error) error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace

void run_tasks(unsigned threads, std::size_t tasks, Task call, const void *context) {
    const std::size_t useful = std::min<std::size_t>({threads, tasks, most_team_threads});
    if (useful <= 1 || tasks > most_tasks) return run_alone(tasks, call, context);
    Team &ours = team();
    if (ours.busy.exchange(true, std::memory_order_acquire)) {
        return run_alone(tasks, call, context);
    }
    const unsigned helpers = static_cast<unsigned>(useful) - 1;
    start_helpers(ours, helpers);
    ours.call = call, ours.context = context, ours.tasks = tasks;
    ours.unfinished.store(tasks, std::memory_order_relaxed);
    ours.ticket.store(std::uint64_t{helpers} << 32 | tasks, std::memory_order_seq_cst);
    if (ours.sleepers.load(std::memory_order_seq_cst) != 0) {
        // Held for a moment, so that who is about to sleep does so before it is woken.
        { const std::lock_guard<std::mutex> lock(ours.asleep); }
        ours.wake.notify_all();
    }
    work_off(ours, [](std::uint64_t ticket) { return (ticket & left_mask) != 0; });
    wait_for_helpers(ours);
    std::exception_ptr error;
    if (ours.failed.load(std::memory_order_relaxed)) {
        std::swap(error, ours.error);
        ours.failed.store(false, std::memory_order_relaxed);
    }
    ours.busy.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
}

unsigned team_helpers() {
    const Team *found = current.load(std::memory_order_acquire);
    return found == nullptr ? 0 : found->helpers.load(std::memory_order_relaxed);
}

}  // namespace memserve
