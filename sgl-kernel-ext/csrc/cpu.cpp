#include "memserve/cpu.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace memserve {

namespace {

CpuFeatures detect() {
    CpuFeatures found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // These also ask whether the operating system saves the registers.
    found.avx2 = __builtin_cpu_supports("avx2") != 0;
    found.fma = __builtin_cpu_supports("fma") != 0;
    found.avx512 = __builtin_cpu_supports("avx512f") != 0;
    const bool most = found.avx512 && __builtin_cpu_supports("avx512bw") != 0 &&
                      __builtin_cpu_supports("avx512dq") != 0 &&
                      __builtin_cpu_supports("avx512vl") != 0;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
        found.sha = (ebx & (1u << 29)) != 0 && __builtin_cpu_supports("sse4.1") != 0;
        found.amx_bf16 = (edx & (1u << 22)) != 0;
    }
    if (most && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) {
        found.avx512_bf16 = (eax & (1u << 5)) != 0;
    }
#endif
    return found;
}

Isa best_isa() {
    const CpuFeatures &has = cpu_features();
    if (!has.avx2 || !has.fma) return Isa::plain;
#if defined(__x86_64__)
    if (has.avx512_bf16) return Isa::avx512_bf16;
    if (has.avx512 && __builtin_cpu_supports("avx512bw") != 0 &&
        __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0) {
        return Isa::avx512;
    }
#endif
    return Isa::avx2;
}

std::atomic<Isa> limit{Isa::avx512_bf16};

}  // namespace

const CpuFeatures &cpu_features() {
    static const CpuFeatures found = detect();
    return found;
}

Isa isa() {
    static const Isa best = best_isa();
    return std::min(best, limit.load(std::memory_order_relaxed));
}

void limit_isa(Isa best) { limit.store(best, std::memory_order_relaxed); }

}  // namespace memserve
