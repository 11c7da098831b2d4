#include "memserve/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace memserve {

namespace {

CpuFeatures detect() {
    CpuFeatures found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // These two also ask whether the operating system saves the registers.
    found.avx2 = __builtin_cpu_supports("avx2") != 0;
    found.avx512 = __builtin_cpu_supports("avx512f") != 0;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
        found.sha = (ebx & (1u << 29)) != 0 && __builtin_cpu_supports("sse4.1") != 0;
    }
#endif
    return found;
}

}  // namespace

const CpuFeatures &cpu_features() {
    static const CpuFeatures found = detect();
    return found;
}

}  // namespace memserve
