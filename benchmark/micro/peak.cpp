// What one thread of this machine can do at most: the floors that kernels are measured against.
#include <cstddef>
#include <cstdint>
#include <ctime>

#include <immintrin.h>

namespace {

// Of this thread: what others take of the processor is not counted.
double now_s() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

constexpr int chains = 24;

__attribute__((target("avx512f,avx512bf16"))) float pairs(std::size_t steps) {
    __m512 sums[chains];
    for (auto &sum : sums) sum = _mm512_setzero_ps();
    __m512bh one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (std::size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
        for (int c = 0; c < chains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], one, one);
        asm volatile("" : "+v"(one));
    }
    float total = 0;
    for (const auto &sum : sums) total += _mm512_reduce_add_ps(sum);
    return total;
}

__attribute__((target("avx512f"))) std::uint64_t sum_of(const std::uint8_t *from,
                                                        std::size_t bytes) {
    __m512i sums[4] = {};
    for (std::size_t at = 0; at + 256 <= bytes; at += 256) {
        for (int i = 0; i < 4; ++i) {
            sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(from + at + 64 * i));
        }
    }
    return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]))));
}

}  // namespace

// The fewest seconds of `tries` that `steps` * 24 instructions of 64 operations took.
extern "C" double pairs_s(std::size_t steps, int tries) {
    double best = 1e9;
    for (int i = 0; i < tries; ++i) {
        const double start = now_s();
        volatile float kept = pairs(steps);
        (void)kept;
        const double took = now_s() - start;
        best = took < best ? took : best;
    }
    return best;
}

// Seconds that reading so many bytes once took.
extern "C" double read_s(const std::uint8_t *from, std::size_t bytes) {
    const double start = now_s();
    volatile std::uint64_t kept = sum_of(from, bytes);
    (void)kept;
    return now_s() - start;
}
